//! Documentation that is executed: the files and the terminal sessions that a Markdown text shows.
//!
//! A fenced block `ini` (or `sh`) after a line with a path in backquotes and a colon at its end is that file. A block `console` is a session:
//! `$ command` is typed by the ordinary user whose documentation it is, `# command` by root, `NAME$ command` by the user that
//! the test means by NAME; `> ` continues a command. What follows it is what it prints, where `...` stands for any text, and
//! alone on a line for any lines. A command without any must succeed. Every other block is only to be read.

use anyhow::{Context as _, Result, bail, ensure};

/// A part of a text below a heading, with what there is to do in it, in order.
#[derive(Debug, PartialEq, Eq)]
pub struct Chapter {
    /// The heading.
    pub title: String,
    /// What it shows.
    pub steps: Vec<Step>,
}

/// One thing that a reader would do.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Write this file.
    File {
        /// As it stands there: `~/…` or absolute.
        path: String,
        /// All of it.
        text: String,
    },
    /// Type this.
    Command {
        /// Who does.
        who: Who,
        /// For a shell.
        line: String,
        /// What comes then, where that is shown.
        prints: Option<String>,
    },
}

/// Whose prompt it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Who {
    /// `#`
    Root,
    /// `$`
    User,
    /// `NAME$`
    Named(String),
}

/// The chapters of a Markdown text that show something to do.
///
/// # Errors
/// When a file has no path, or a session does not begin with a prompt.
pub fn chapters(markdown: &str) -> Result<Vec<Chapter>> {
    let mut chapters = vec![Chapter { title: String::new(), steps: Vec::new() }];
    let mut lines = markdown.lines();
    let mut before = "";
    while let Some(line) = lines.next() {
        if let Some(kind) = line.strip_prefix("```") {
            let block: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
            let steps = &mut chapters.last_mut().context("there is a first one")?.steps;
            match kind {
                "ini" | "sh" => steps.push(file(before, &block)?),
                "console" => steps.extend(session(&block)?),
                _ => {}
            }
        } else if line.starts_with("## ") || line.starts_with("### ") {
            let title = line.trim_start_matches('#').trim().to_owned();
            chapters.push(Chapter { title, steps: Vec::new() });
        }
        if !line.trim().is_empty() {
            before = line;
        }
    }
    chapters.retain(|chapter| !chapter.steps.is_empty());
    Ok(chapters)
}

fn file(before: &str, block: &[&str]) -> Result<Step> {
    let path = before.strip_suffix(":").and_then(|line| line.strip_suffix('`')?.rsplit('`').next());
    let path = path
        .filter(|path| path.starts_with(['~', '/']))
        .with_context(|| format!("no path in backquotes and colon at the end of “{before}”"))?;
    Ok(Step::File { path: path.into(), text: block.join("\n") + "\n" })
}

fn session(block: &[&str]) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for line in block {
        if let Some((who, line)) = prompt(line) {
            steps.push(Step::Command { who, line: line.into(), prints: None });
            continue;
        }
        let Some(Step::Command { line: command, prints, .. }) = steps.last_mut() else {
            bail!("a session begins without a prompt: {line}");
        };
        match line.strip_prefix("> ") {
            Some(more) if prints.is_none() => *command = format!("{command}\n{more}"),
            _ => {
                let prints = prints.get_or_insert_default();
                prints.push_str(line);
                prints.push('\n');
            }
        }
    }
    Ok(steps)
}

fn prompt(line: &str) -> Option<(Who, &str)> {
    if let Some(line) = line.strip_prefix("# ") {
        return Some((Who::Root, line));
    }
    let (name, rest) = line.split_once("$ ")?;
    match name {
        "" => Some((Who::User, rest)),
        name if name.bytes().all(|byte| byte.is_ascii_lowercase()) => Some((Who::Named(name.into()), rest)),
        _ => None,
    }
}

/// Is `printed` what was to be expected?
///
/// # Errors
/// When it is not; says what was printed.
pub fn compare(expected: &str, printed: &str) -> Result<()> {
    let expected: Vec<&str> = expected.trim_end().lines().collect();
    let lines: Vec<&str> = printed.trim_end().lines().map(str::trim_end).collect();
    ensure!(
        lines_match(&expected, &lines),
        "it printed\n{}\nwhere the text has\n{}",
        lines.join("\n"),
        expected.join("\n")
    );
    Ok(())
}

fn lines_match(expected: &[&str], lines: &[&str]) -> bool {
    match expected {
        [] => lines.is_empty(),
        ["...", rest @ ..] => (0..=lines.len()).any(|skipped| lines_match(rest, &lines[skipped..])),
        [first, rest @ ..] => lines
            .split_first()
            .is_some_and(|(line, lines)| line_matches(first, line) && lines_match(rest, lines)),
    }
}

fn line_matches(expected: &str, line: &str) -> bool {
    match expected.split_once("...") {
        None => expected == line,
        Some((start, rest)) => line.strip_prefix(start).is_some_and(|line| {
            line.char_indices()
                .map(|(at, _)| at)
                .chain([line.len()])
                .any(|at| line_matches(rest, &line[at..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# Title\n\n```\nread only\n```\n\n## Web\n\nThe container, `~/web.container`:\n\n```ini\n[Container]\n```\n\n\
                        ```console\n$ cat <<E\n> x\n> E\nx\n# id -u\ndb$ true\n```\n";

    #[test]
    fn reads_files_and_sessions() {
        let command = |who, line: &str, prints: Option<&str>| Step::Command {
            who,
            line: line.into(),
            prints: prints.map(Into::into),
        };
        let steps = vec![
            Step::File { path: "~/web.container".into(), text: "[Container]\n".into() },
            command(Who::User, "cat <<E\nx\nE", Some("x\n")),
            command(Who::Root, "id -u", None),
            command(Who::Named("db".into()), "true", None),
        ];
        assert_eq!(chapters(TEXT).unwrap(), [Chapter { title: "Web".into(), steps }]);
    }

    #[test]
    fn refuses_a_file_without_a_path_and_a_session_without_a_prompt() {
        assert!(chapters("Here:\n```ini\nx\n```\n").is_err());
        assert!(chapters("```console\nx\n```\n").is_err());
    }

    #[test]
    fn compares_with_gaps() {
        assert!(compare("a\n...\nd ... f\n", "a\nb\nc\nd e f\n").is_ok());
        assert!(compare("a\n", "a\nb\n").is_err());
        assert!(compare("a...c", "abcd").is_err());
        assert!(compare("", "").is_ok());
    }
}
