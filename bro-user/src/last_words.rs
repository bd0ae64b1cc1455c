//! What a unit's journal says about its last run: Podman's own sentence about why it failed (a port that is taken, an image that
//! cannot be pulled), which systemd's lines around it do not repeat.

use std::time::Duration;

use serde_json::Value;

/// How many records are read. A start that fails says less.
const RECORDS: &str = "--lines=60";

/// How many lines are repeated, and how many characters of them.
const LINES: usize = 3;
const LONGEST: usize = 600;

/// How long the journal may take.
const JOURNAL_LIMIT: Duration = Duration::from_secs(5);

/// The journal is written by another process, which may be a moment behind.
const MOMENT: Duration = Duration::from_millis(150);

/// The service manager of the unit.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Of {
    /// The system's.
    System,
    /// A user's.
    User(u32),
}

impl Of {
    /// The matches for its records (journalctl(1)): the unit's own, and the service manager's about it. (`--user` would read only
    /// files that do not exist where the journal is volatile.)
    fn matches(self, unit: &str) -> Vec<String> {
        let Self::User(uid) = self else { return vec!["--unit".to_owned(), unit.to_owned()] };
        let user = format!("_UID={uid}");
        let by = |field: &str| format!("{field}={unit}");
        vec![by("_SYSTEMD_USER_UNIT"), user.clone(), "+".to_owned(), by("USER_UNIT"), user]
    }
}

/// The last lines in a unit's journal.
#[derive(Debug, Default)]
pub(crate) struct Words {
    /// Podman's error, from there on.
    podmans: Vec<String>,
    /// What the unit's processes said.
    its: Vec<String>,
    /// What the service manager said of it.
    systemds: Vec<String>,
}

impl Words {
    /// Why the unit failed, in Podman's words.
    pub fn cause(&self) -> Option<String> {
        (!self.podmans.is_empty()).then(|| short(&self.podmans[..self.podmans.len().min(LINES)]))
    }

    /// That, or else the last line of the unit's processes, or of the service manager about the unit.
    pub fn last(&self) -> Option<String> {
        let end = |lines: &[String]| {
            (!lines.is_empty()).then(|| short(&lines[lines.len().saturating_sub(LINES)..]))
        };
        self.cause().or_else(|| end(&self.its)).or_else(|| end(&self.systemds))
    }

    /// From records as `--output=json` prints them, one a line; those of runs before the last one do not count.
    fn of(text: &str) -> Self {
        let records: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let field = |record: &Value, name: &str| record.get(name).and_then(Value::as_str).map(str::to_owned);
        let run = |record: &Value| {
            ["_SYSTEMD_INVOCATION_ID", "INVOCATION_ID", "USER_INVOCATION_ID"]
                .iter()
                // A user's manager has one itself, as a service of the system's.
                .filter(|name| !is_systemds(record) || **name != "_SYSTEMD_INVOCATION_ID")
                .find_map(|name| field(record, name))
        };
        let last = records.iter().rev().find_map(run);
        let mut words = Self::default();
        for record in records.iter().filter(|record| last.is_none() || run(record) == last) {
            // Podman's notes about its own actions are there as well.
            if record.get("PODMAN_EVENT").is_some() {
                continue;
            }
            let Some(message) = field(record, "MESSAGE").map(|message| message.trim().to_owned()) else {
                continue;
            };
            if message.is_empty() {
                continue;
            }
            if is_systemds(record) {
                words.systemds.push(message);
                continue;
            }
            if is_podmans(record) {
                if message.starts_with("Error:") {
                    words.podmans.clear();
                    words.podmans.push(message.clone());
                } else if !words.podmans.is_empty() {
                    words.podmans.push(message.clone());
                }
            }
            words.its.push(message);
        }
        words
    }
}

fn is_systemds(record: &Value) -> bool {
    record.get("SYSLOG_IDENTIFIER").and_then(Value::as_str) == Some("systemd")
}

/// Podman goes by the name of the unit (SyslogIdentifier=), as its container does. For a process that has just ended the journal
/// may not know its program; a container's records take another way there (conmon's), unless configured otherwise.
fn is_podmans(record: &Value) -> bool {
    match record.get("_COMM").and_then(Value::as_str) {
        Some(name) => name == "podman",
        None => record.get("_TRANSPORT").and_then(Value::as_str) == Some("stdout"),
    }
}

fn short(lines: &[String]) -> String {
    let text = lines.join(" / ");
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Reads them; nothing where this user may not, or the journal does not answer in time.
pub(crate) async fn read(unit: &str, of: Of) -> Words {
    let mut command = tokio::process::Command::new("journalctl");
    command.args([RECORDS, "--output=json", "--no-pager", "--quiet"]).args(of.matches(unit));
    command.stdin(std::process::Stdio::null()).stderr(std::process::Stdio::null()).kill_on_drop(true);
    match tokio::time::timeout(JOURNAL_LIMIT, command.output()).await {
        Ok(Ok(output)) if output.status.success() => Words::of(&String::from_utf8_lossy(&output.stdout)),
        _ => Words::default(),
    }
}

/// What Podman said about a unit that has just failed.
pub(crate) async fn cause(unit: &str, of: Of) -> Option<String> {
    if let Some(cause) = read(unit, of).await.cause() {
        return Some(cause);
    }
    tokio::time::sleep(MOMENT).await;
    read(unit, of).await.cause()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(run: &str, who: &str, message: &str) -> String {
        let id = if who == "systemd" { "USER_INVOCATION_ID" } else { "_SYSTEMD_INVOCATION_ID" };
        let named = if who == "systemd" { "systemd" } else { "web" };
        let mut record = serde_json::json!({ "SYSLOG_IDENTIFIER": named, "_COMM": who, "MESSAGE": message });
        record[id] = run.into();
        if who == "systemd" {
            record["_SYSTEMD_INVOCATION_ID"] = "of user@1000.service".into();
        }
        record.to_string()
    }

    #[test]
    fn podmans_own_sentence_is_found_among_systemds() {
        let text = [
            record("1", "podman", "Error: of a run before"),
            record("2", "systemd", "Starting web.service..."),
            record("2", "podman", "time=x level=warning msg=y"),
            record("2", "podman", "Error: pasta failed with exit code 1:"),
            record("2", "podman", "Failed to bind port 8150 (Address already in use)"),
            record("2", "systemd", "web.service: Main process exited, code=exited, status=126/n/a"),
            record("2", "systemd", "Failed to start web.service."),
            "not JSON".to_owned(),
        ]
        .join("\n");
        let words = Words::of(&text);
        let cause =
            "Error: pasta failed with exit code 1: / Failed to bind port 8150 (Address already in use)";
        assert_eq!(words.cause().as_deref(), Some(cause));
        assert_eq!(words.last().as_deref(), Some(cause));
    }

    #[test]
    fn what_a_container_says_of_errors_is_not_podmans() {
        let text = [
            record("2", "systemd", "Started web.service."),
            record("2", "conmon", "Error: no configuration"),
            record("2", "systemd", "web.service: Failed with result 'exit-code'."),
        ]
        .join("\n");
        let words = Words::of(&text);
        assert_eq!(words.cause(), None);
        assert_eq!(words.last().as_deref(), Some("Error: no configuration"));
        let systemds = Words::of(&record("1", "systemd", "Failed to listen on sockets"));
        assert_eq!(systemds.last().as_deref(), Some("Failed to listen on sockets"));
        assert_eq!(Words::of("").last(), None);
        let long = Words::of(&record("1", "podman", &format!("Error: {}", "ä".repeat(5000))));
        assert_eq!(long.cause().map(|cause| cause.chars().count()), Some(LONGEST + 1));
    }
}
