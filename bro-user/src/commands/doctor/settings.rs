//! Does a running forwarder have its unit's settings? A forwarder that `bro activate` did not start anew, since it had clients, or
//! that was reloaded since, keeps the settings that it was started with.

use zbus::Variant;

use crate::systemd::manager::Properties;

/// Its command line differs from its unit's; false where that is unknown.
pub(super) fn are_older(properties: &Properties) -> bool {
    let Some(Variant::U32(pid)) = properties.get("MainPID").map(|value| &**value) else { return false };
    let Some(wanted) = command(properties) else { return false };
    let Ok(running) = std::fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    differ(&words(&running), &wanted)
}

/// ExecStart= as systemd has read it.
fn command(properties: &Properties) -> Option<Vec<String>> {
    // a(sasbttttuii): the program, its words, …
    let Variant::Array(commands) = &**properties.get("ExecStart")? else { return None };
    let Some(Variant::Structure(command)) = commands.first() else { return None };
    let [_, Variant::Array(words), ..] = command.fields() else { return None };
    let words: &[Variant<'_>] = words;
    words
        .iter()
        .map(|word| if let Variant::Str(word) = word { Some(word.as_str().to_owned()) } else { None })
        .collect()
}

fn words(cmdline: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(cmdline);
    text.strip_suffix('\0').unwrap_or(&text).split('\0').map(str::to_owned).collect()
}

fn differ(running: &[String], wanted: &[String]) -> bool {
    // A variable's value is unknown.
    let has_variable = |word: &String| word.replace("$$", "").contains('$');
    if running.len() < 2 || wanted.iter().any(has_variable) {
        return false;
    }
    // The program may have been called by another path.
    let wanted: Vec<String> = wanted.iter().skip(1).map(|word| word.replace("$$", "$")).collect();
    running[1..] != wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_command_line_is_seen() {
        let text = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        let running = words(b"/usr/bin/bro\0forward\0--busy-exec=echo $x\0");
        assert_eq!(running, text(&["/usr/bin/bro", "forward", "--busy-exec=echo $x"]));
        assert!(!differ(&running, &text(&["bro", "forward", "--busy-exec=echo $$x"])));
        assert!(differ(&running, &text(&["bro", "forward", "--busy-exec=echo y"])));
        assert!(!differ(&running, &text(&["bro", "forward", "--busy-exec=$FOO"])));
        assert!(!differ(&words(b""), &text(&["bro", "forward"])));
    }
}
