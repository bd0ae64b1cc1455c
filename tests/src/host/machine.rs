//! The machine's own programs on the host: more services and clients than the host itself has, and none that would have to be
//! installed there. A container has the machine's `/usr` as its own.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::inside::{collect, expect};
use super::{Host, Manager};

/// What the image is called, which has all but `/usr`.
const IMAGE: &str = "localhost/machine";

/// Where the machine's `/usr` is in the host (`host/init.sh`), read-only.
const PROGRAMS: &str = "/srv/machine";

/// `[Container]` lines that give a container the machine's programs.
#[must_use]
pub fn programs() -> String {
    format!("Image={IMAGE}\nVolume={PROGRAMS}:/usr:ro")
}

impl Manager {
    /// Makes the image for [`programs`] known to this manager's Podman.
    pub fn import_machine(self, host: &Host) -> Result<()> {
        let owner = match self {
            Self::System => "root",
            Self::User(user) => user,
        };
        let tar = format!("/srv/machine-{owner}.tar");
        // Links to /usr, empty folders, and the few files of /etc that programs look for.
        let script = "cd /; links=; for link in bin sbin lib lib64; do test ! -L $link || links=\"$links $link\"; done; \
                      tar --create --no-recursion --file \"$0\" $links tmp run usr var var/log var/lib var/tmp etc; \
                      tar --append --file \"$0\" etc/passwd etc/group etc/nsswitch.conf etc/alternatives \
                      $(ls -d etc/java-* etc/jetty9 etc/ssl/openssl.cnf 2>/dev/null)";
        let made = Command::new("sh").args(["-euc", script]).arg(host.path(&tar)).output()?;
        ensure!(made.status.success(), "no image of the machine: {}", String::from_utf8_lossy(&made.stderr));
        self.run(host, &["podman", "import", "--quiet", &tar, IMAGE])?;
        Ok(())
    }
}

impl Host {
    /// Runs a program of the machine as a client in the host's network; what it printed, without the last newline.
    pub fn client_program(&self, args: &[&str]) -> Result<String> {
        let network = format!("--net=/proc/{}/ns/net", self.pid());
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", "60", "nsenter", &network, "--"]).args(args);
        expect(args, collect(command.stdin(std::process::Stdio::null()))?)
            .with_context(|| format!("{} of this machine", args.first().unwrap_or(&"nothing")))
    }
}
