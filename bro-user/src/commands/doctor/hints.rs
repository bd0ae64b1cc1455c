//! The commands that a finding advises, for the service manager that it is about: as root one asks after an ordinary user's in
//! other words than after one's own.

use super::versions::says;
use crate::installed::Activated;
use crate::run_as::Owner;
use crate::systemd::manager::Manager;

/// Whose service manager, seen by whoever runs bro.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Whose {
    /// The system's.
    System,
    /// One's own.
    Mine,
    /// That of a user for whom the system listens.
    Of(Owner),
}

impl Whose {
    /// Who listens and forwards.
    pub fn front(known: &Activated) -> Self {
        match known.scope {
            Manager::System => Self::System,
            Manager::User => Self::Mine,
        }
    }

    /// Who runs the container.
    pub fn container(known: &Activated) -> Self {
        match &known.run_as {
            Some(owner) if owner.is_me() => Self::Mine,
            Some(owner) => Self::Of(owner.clone()),
            None => Self::front(known),
        }
    }

    /// `systemctl`, with the words that lead to it.
    pub fn systemctl(&self) -> String {
        match self {
            Self::System => "systemctl".to_owned(),
            Self::Mine => "systemctl --user".to_owned(),
            Self::Of(owner) => format!("systemctl --user --machine {}@", owner.name),
        }
    }

    /// The command that shows a unit's log. (With `--user-unit` journalctl looks for those of whoever runs it.)
    pub fn journal(&self, unit: &str) -> String {
        match self {
            Self::System => format!("journalctl --unit {unit}"),
            Self::Mine => format!("journalctl --user --unit {unit}"),
            Self::Of(owner) => format!("journalctl _SYSTEMD_USER_UNIT={unit} _UID={}", owner.uid),
        }
    }

    /// The last lines of a unit's log, to stand behind a finding.
    pub async fn last_words(&self, unit: &str) -> String {
        let mut args = vec!["--lines=3", "--output=cat", "--no-pager", "--quiet"];
        let named = match self {
            Self::System => vec!["--unit".to_owned(), unit.to_owned()],
            Self::Mine => vec!["--user".to_owned(), "--unit".to_owned(), unit.to_owned()],
            // What it said itself, or the service manager of it.
            Self::Of(Owner { uid, .. }) => {
                let user = format!("_UID={uid}");
                let by = |field: &str| format!("{field}={unit}");
                vec![by("_SYSTEMD_USER_UNIT"), user.clone(), "+".to_owned(), by("USER_UNIT"), user]
            }
        };
        args.extend(named.iter().map(String::as_str));
        match says("journalctl", &args).await {
            Some(log) if !log.is_empty() => {
                format!(", saying “{}”", log.lines().collect::<Vec<_>>().join(" / "))
            }
            _ => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_lead_to_the_manager_that_is_meant() {
        let owner = Owner { name: "test".into(), uid: 1000, gid: 1000, home: "/home/test".into() };
        let commands = |whose: Whose| (whose.systemctl(), whose.journal("web.service"));
        let is = |systemctl: &str, journal: &str| (systemctl.to_owned(), journal.to_owned());
        assert_eq!(commands(Whose::System), is("systemctl", "journalctl --unit web.service"));
        assert_eq!(commands(Whose::Mine), is("systemctl --user", "journalctl --user --unit web.service"));
        assert_eq!(
            commands(Whose::Of(owner)),
            is("systemctl --user --machine test@", "journalctl _SYSTEMD_USER_UNIT=web.service _UID=1000")
        );
    }
}
