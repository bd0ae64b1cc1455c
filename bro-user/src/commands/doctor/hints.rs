//! The commands that a finding advises, for the service manager that it is about: as root one asks after an ordinary user's in
//! other words than after one's own.

use crate::installed::Installed;
use crate::last_words::{self, Of};
use crate::run_as::RunAsUser;
use crate::systemd::scope::RuntimeScope;

/// Whose service manager, seen by whoever runs bro.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Whose {
    /// The system's.
    System,
    /// One's own.
    Mine,
    /// That of a user for whom the system listens.
    Of(RunAsUser),
}

impl Whose {
    /// Who listens and forwards.
    pub fn front(known: &Installed) -> Self {
        match known.scope {
            RuntimeScope::System => Self::System,
            RuntimeScope::User => Self::Mine,
        }
    }

    /// Who runs the container.
    pub fn container(known: &Installed) -> Self {
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

    /// Why a unit has failed, in Podman's words, or else the last lines of its log, to stand behind a finding.
    pub async fn last_words(&self, unit: &str) -> String {
        let of = match self {
            Self::System => Of::System,
            Self::Mine => Of::User(nix::unistd::geteuid().as_raw()),
            Self::Of(RunAsUser { uid, .. }) => Of::User(*uid),
        };
        let said = last_words::read(unit, of).await.last();
        said.map(|said| format!(", saying “{said}”")).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_lead_to_the_manager_that_is_meant() {
        let owner = RunAsUser { name: "test".into(), uid: 1000, gid: 1000, home: "/home/test".into() };
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
