//! A command that root runs as an ordinary user: it is that user's from its first instruction on, and the user may trace it and
//! read its environment. So it has nothing of root's: no terminal, no environment, no descriptor, no capability.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use super::RunAsUser;

/// Where a user's commands are.
const PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// May the command get rights that are not the user's, from the files that it executes?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gaining {
    /// It may not.
    Forbidden,
    /// As in any session of the user's: rootless Podman makes its user namespace by newuidmap, which has such a file.
    Allowed,
}

impl RunAsUser {
    /// `program` as this user, in a session of its own. The caller adds its arguments, and sees to it that it ends.
    pub(crate) fn command(&self, gaining: Gaining, program: impl AsRef<OsStr>) -> Command {
        self.dressed(Command::new("setsid"), gaining, program.as_ref())
    }

    /// The same; root's timeout(1) ends it after so many seconds, however it is stopped.
    pub(crate) fn command_within(
        &self,
        seconds: &str,
        gaining: Gaining,
        program: impl AsRef<OsStr>,
    ) -> Command {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", seconds, "setsid"]);
        self.dressed(command, gaining, program.as_ref())
    }

    fn dressed(&self, mut command: Command, gaining: Gaining, program: &OsStr) -> Command {
        // Descriptors that this process was started with may be open in it, and are root's.
        bro_relay::sys::keep_descriptors();
        let runtime = self.runtime_directory();
        command
            .args(["--wait", "setpriv", "--reuid", &self.uid.to_string(), "--regid", &self.gid.to_string()])
            .args(["--init-groups", "--inh-caps=-all"])
            .args((gaining == Gaining::Forbidden).then_some("--no-new-privs"))
            .arg(program)
            .env_clear()
            .env("PATH", PATH)
            .env("HOME", &self.home)
            .env("DBUS_SESSION_BUS_ADDRESS", format!("unix:path={}/bus", runtime.display()))
            .env("XDG_RUNTIME_DIR", runtime)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Says what a command as another user has of the process that starts it.
    fn has(gaining: Gaining) -> String {
        let other = RunAsUser { name: "x".into(), uid: 65534, gid: 65534, home: "/nowhere".into() };
        let script = "tr '\\0' '\\n' </proc/$$/environ | sort; id -u; cut -d' ' -f6,7 /proc/$$/stat; echo $$; ls /proc/self/fd; \
                      grep -e NoNewPrivs -e CapEff /proc/self/status; pwd";
        let mut command = other.command(gaining, "sh");
        let output = command.args(["-c", script]).stdout(Stdio::piped()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn has_nothing_of_roots() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        // Not closed on execution, like a file to which a shell has redirected.
        let open = std::fs::File::open("/etc/hostname").unwrap();
        let kept = nix::unistd::dup(&open).unwrap();
        let said = has(Gaining::Forbidden);
        drop((open, kept));
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(
            lines[..5],
            [
                "DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/65534/bus",
                "HOME=/nowhere",
                &format!("PATH={PATH}"),
                "XDG_RUNTIME_DIR=/run/user/65534",
                "65534"
            ]
        );
        // Its session is its own, and has no terminal; 3 is ls's own.
        assert_eq!(lines[5], format!("{} 0", lines[6]));
        assert_eq!(lines[7..11], ["0", "1", "2", "3"], "{said}");
        assert!(said.contains("NoNewPrivs:\t1") && said.contains("CapEff:\t0000000000000000"), "{said}");
        assert_eq!(lines.last(), Some(&"/"));
        assert!(has(Gaining::Allowed).contains("NoNewPrivs:\t0"));
    }
}
