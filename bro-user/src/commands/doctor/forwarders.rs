//! Do all forwarders start, also those with units written by hand? The clients of one that does not start wait without a word.

use std::time::Duration;

use zbus::Variant;

use super::Check;
use crate::systemd::manager::Properties;
use crate::systemd::manager::SystemdManager;
use crate::systemd::scope::RuntimeScope;

const NAME: &str = "forwarders";

/// What systemd's own child exits with when it cannot execute a program (EXIT_EXEC, systemd.exec(5)).
const CANNOT_EXECUTE: i32 = 203;

/// How often a start under way is looked at again, and after how long each time: a start that fails is over by then.
const LOOKS: u32 = 40;
const PAUSE: Duration = Duration::from_millis(25);

pub(super) async fn check(manager: RuntimeScope) -> Check {
    match troubled(manager).await {
        Ok(all) if all.is_empty() => Check::ok(NAME, "none fails to start"),
        Ok(all) => {
            let findings: Vec<String> = all.iter().map(UnitTrouble::finding).collect();
            let fixes: Vec<String> = all.iter().map(|trouble| trouble.fix(manager)).collect();
            Check::bad(NAME, findings.join("; "), fixes.join("; "))
        }
        // Another check says that there is no service manager.
        Err(error) => Check::ok(NAME, format!("no service manager that could start one: {error:#}")),
    }
}

/// A forwarder's unit that does not start.
#[derive(Debug, PartialEq, Eq)]
struct UnitTrouble {
    unit: String,
    /// The program, as in ExecStart=.
    program: String,
    /// How often systemd has started it again.
    restarts: u32,
    cannot_execute: bool,
}

impl UnitTrouble {
    fn finding(&self) -> String {
        let Self { unit, program, restarts, cannot_execute } = self;
        let why = if *cannot_execute {
            format!(": its program {program} cannot be executed (203/EXEC)")
        } else {
            String::new()
        };
        format!(
            "{unit} does not get up, and its clients wait{why}; systemd has started it again {restarts} times"
        )
    }

    fn fix(&self, manager: RuntimeScope) -> String {
        let journal = format!("see `{} {}`", manager.journal(), self.unit);
        if !self.cannot_execute {
            return journal;
        }
        // systemd looks for a bare name in a few directories of its own, and in no user's.
        let here = std::env::current_exe().map(|path| path.display().to_string()).unwrap_or_default();
        let user = if manager == RuntimeScope::User { " --user" } else { "" };
        format!(
            "ExecStart= needs the full path of a program that is there (this bro is {here}), then `systemctl{user} daemon-reload`; {journal}"
        )
    }
}

async fn troubled(manager: RuntimeScope) -> anyhow::Result<Vec<UnitTrouble>> {
    let systemd = SystemdManager::connect(manager).await?;
    let mut all = Vec::new();
    for unit in systemd.troubled_services().await? {
        // It may have been unloaded meanwhile.
        let Ok(mut properties) = systemd.properties(&unit).await else { continue };
        let Some(program) = forwarder(&properties) else { continue };
        // systemd says how a start has ended until it begins the next one.
        for _ in 0..LOOKS {
            if number(&properties, "ExecMainCode") != 0 {
                break;
            }
            tokio::time::sleep(PAUSE).await;
            let Ok(later) = systemd.properties(&unit).await else { break };
            properties = later;
        }
        let failed = systemd.active_state(&unit).await.is_ok_and(|state| state == "failed");
        let restarts = systemd.restart_loop(&unit).await.ok().flatten();
        if failed || restarts.is_some() {
            let restarts = restarts.unwrap_or_else(|| number(&properties, "NRestarts"));
            let cannot_execute = number(&properties, "ExecMainStatus") == CANNOT_EXECUTE.unsigned_abs();
            all.push(UnitTrouble { unit, program, restarts, cannot_execute });
        }
    }
    Ok(all)
}

/// The program of a service that is a forwarder.
fn forwarder(properties: &Properties) -> Option<String> {
    // a(sasbttttuii): the program, its words, …
    let Variant::Array(commands) = &**properties.get("ExecStart")? else { return None };
    let Some(Variant::Structure(command)) = commands.first() else { return None };
    let [Variant::Str(program), Variant::Array(words), ..] = command.fields() else { return None };
    let words: &[Variant<'_>] = words;
    let is_forward = matches!(words.get(1), Some(Variant::Str(word)) if word.as_str() == "forward");
    let name = program.as_str().rsplit('/').next()?;
    (is_forward && name == "bro").then(|| program.as_str().to_owned())
}

fn number(properties: &Properties, name: &str) -> u32 {
    match properties.get(name).map(|value| &**value) {
        Some(Variant::U32(number)) => *number,
        Some(Variant::I32(number)) => number.unsigned_abs(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_program_cannot_be_executed() {
        let trouble = |cannot_execute| UnitTrouble {
            unit: "mine-proxy.service".into(),
            program: "bro".into(),
            restarts: 7,
            cannot_execute,
        };
        let (finding, fix) = (trouble(true).finding(), trouble(true).fix(RuntimeScope::User));
        assert!(finding.contains("mine-proxy.service") && finding.contains("203/EXEC"), "{finding}");
        assert!(finding.ends_with("7 times") && fix.contains("full path"), "{finding} {fix}");
        assert!(!trouble(false).finding().contains("203"));
    }
}
