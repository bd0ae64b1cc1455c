//! The commands that a finding advises, for the service manager that it is about: root's commands for an ordinary user's manager
//! differ from those for root's own.

use crate::installed::Installed;
use crate::last_words::{self, Of};
use crate::run_as::RunAsUser;
use crate::systemd::scope::RuntimeScope;

/// A service manager's owner, as the user of bro sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ManagerOwner {
    /// The system's.
    System,
    /// The caller's own.
    Mine,
    /// That of a `--run-as` user.
    Of(RunAsUser),
}

impl ManagerOwner {
    /// The forwarder's manager.
    pub fn front(installed: &Installed) -> Self {
        match installed.scope {
            RuntimeScope::System => Self::System,
            RuntimeScope::User => Self::Mine,
        }
    }

    /// The container's manager.
    pub fn container(installed: &Installed) -> Self {
        match &installed.run_as {
            Some(owner) if owner.is_me() => Self::Mine,
            Some(owner) => Self::Of(owner.clone()),
            None => Self::front(installed),
        }
    }

    /// `systemctl`, with the words for this manager.
    pub fn systemctl(&self) -> String {
        match self {
            Self::System => "systemctl".to_owned(),
            Self::Mine => "systemctl --user".to_owned(),
            Self::Of(owner) => format!("systemctl --user --machine {}@", owner.name),
        }
    }

    /// The command that shows a unit's log. (With `--user-unit` journalctl looks for the units of the user that runs it.)
    pub fn journal(&self, unit: &str) -> String {
        match self {
            Self::System => format!("journalctl --unit {unit}"),
            Self::Mine => format!("journalctl --user --unit {unit}"),
            Self::Of(owner) => format!("journalctl _SYSTEMD_USER_UNIT={unit} _UID={}", owner.uid),
        }
    }

    /// Why a unit has failed, in Podman's words, or else the last lines of its log, to follow a finding.
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
        let commands = |manager: ManagerOwner| (manager.systemctl(), manager.journal("web.service"));
        let is = |systemctl: &str, journal: &str| (systemctl.to_owned(), journal.to_owned());
        assert_eq!(commands(ManagerOwner::System), is("systemctl", "journalctl --unit web.service"));
        assert_eq!(
            commands(ManagerOwner::Mine),
            is("systemctl --user", "journalctl --user --unit web.service")
        );
        assert_eq!(
            commands(ManagerOwner::Of(owner)),
            is("systemctl --user --machine test@", "journalctl _SYSTEMD_USER_UNIT=web.service _UID=1000")
        );
    }
}
