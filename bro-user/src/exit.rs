//! How the process ends: the errors that have an exit code of their own. Everything else is 1, and clap's usage errors are 2.

use std::process::ExitCode;

/// An error with an exit code that a caller may want to tell from the others.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Two arguments that do not go together, found after clap accepted each.
    #[error("{0}")]
    Usage(String),
    /// No listening socket to work with.
    #[error("{0}")]
    NoSocket(String),
    /// The container, process or namespace is not there.
    #[error("{0}")]
    NotFound(String),
    /// It is there, and this user may not enter it.
    #[error("{0}")]
    NotPermitted(String),
    /// `bro helper`'s command cannot be executed.
    #[error("{0}")]
    CommandNotExecutable(String),
    /// `bro helper`'s command is not there.
    #[error("{0}")]
    CommandNotFound(String),
}

impl Failure {
    fn code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::NoSocket(_) => 3,
            Self::NotFound(_) => 4,
            Self::NotPermitted(_) => 5,
            // As shells and env(1) have it.
            Self::CommandNotExecutable(_) => 126,
            Self::CommandNotFound(_) => 127,
        }
    }
}

/// The exit code for `error`.
#[must_use]
pub fn code_of(error: &anyhow::Error) -> ExitCode {
    ExitCode::from(error.downcast_ref::<Failure>().map_or(1, Failure::code))
}

/// The error as one sentence.
#[must_use]
pub fn sentence(error: &anyhow::Error) -> String {
    on_one_line(&format!("{error:#}"))
}

/// `text` on one line: text from outside may hold line feeds, and other characters that make a terminal act.
#[must_use]
pub fn on_one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            _ if !acts(c) => line.push(c),
            // As they are known.
            '\n' | '\t' | '\r' => line.extend(c.escape_default()),
            _ => line.extend(c.escape_unicode()),
        }
    }
    line
}

/// Does the character act on a terminal, or on the order of the characters beside it, instead of being shown?
fn acts(c: char) -> bool {
    let separates = matches!(c, '\u{2028}' | '\u{2029}');
    let turns = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() || separates || turns
}

/// As JSON, also for a person to read: a terminal shows its strings without acting on them.
///
/// # Errors
/// When it cannot be JSON.
pub fn json(value: &impl serde::Serialize) -> serde_json::Result<String> {
    use std::fmt::Write as _;
    let text = serde_json::to_string_pretty(value)?;
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        // Line feeds are between values here: within a string they have been escaped. All of the others are in the BMP.
        if c != '\n' && acts(c) {
            // Writing to a String cannot fail.
            write!(shown, "\\u{:04x}", u32::from(c)).ok();
        } else {
            shown.push(c);
        }
    }
    Ok(shown)
}

/// A reader that closes the pipe that is printed to has read enough (`bro status --watch | head`): nothing has failed.
///
/// # Errors
/// Any other.
pub fn unless_reader_has_gone(result: anyhow::Result<()>) -> anyhow::Result<()> {
    let gone = |error: &std::io::Error| error.kind() == std::io::ErrorKind::BrokenPipe;
    match result {
        Err(error) if error.downcast_ref().is_some_and(gone) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_the_same_and_does_nothing_to_a_terminal() {
        let value = serde_json::json!({ "said": "a\nb \u{1b}[2J \u{9b}31m\u{7f} é\u{202e}x", "count": 7 });
        let shown = json(&value).unwrap();
        assert!(shown.chars().all(|c| c == '\n' || !acts(c)) && shown.contains('é'), "{shown}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
    }

    #[test]
    fn nothing_that_acts_is_shown_as_it_is() {
        assert_eq!(on_one_line("a\u{9b}b\u{202e}c\u{2028}d\u{7f}ü"), "a\\u{9b}b\\u{202e}c\\u{2028}d\\u{7f}ü");
    }

    #[test]
    fn an_error_is_one_line() {
        let error = anyhow::anyhow!("it is “a\nb”").context("é\u{1b}[31m\tx\\");
        assert_eq!(sentence(&error), "é\\u{1b}[31m\\tx\\: it is “a\\nb”");
    }
}
