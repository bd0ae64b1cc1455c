//! One of the host's service managers: the system's, or a user's. What differs between a rootful and a rootless set-up is here.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{Host, Ran};

/// How often systemd is asked about a unit that has processes, and so has not ended.
const SELDOM: Duration = Duration::from_secs(1);

/// Whose systemd and whose Podman.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manager {
    /// PID 1, rootful Podman.
    System,
    /// An ordinary user's, rootless Podman.
    User(&'static str),
}

impl Manager {
    /// Writes a unit (`web-in.socket`) where its administrator would.
    pub fn unit(self, host: &Host, name: &str, text: &str) -> Result<()> {
        host.write(&format!("{}/{name}", self.unit_folder()), text)
    }

    /// Where an administrator's units are.
    #[must_use]
    pub fn unit_folder(self) -> String {
        match self {
            Self::System => "/etc/systemd/system".into(),
            Self::User(user) => format!("/home/{user}/.config/systemd/user"),
        }
    }

    /// Writes a quadlet (`web.container`) where its administrator would.
    pub fn quadlet(self, host: &Host, name: &str, text: &str) -> Result<()> {
        host.write(&self.quadlet_path(name), text)
    }

    /// Where the quadlet file `name` goes.
    #[must_use]
    pub fn quadlet_path(self, name: &str) -> String {
        match self {
            Self::System => format!("/etc/containers/systemd/{name}"),
            Self::User(user) => format!("/home/{user}/.config/containers/systemd/{name}"),
        }
    }

    /// Runs a command as the owner of this manager, whatever its exit code.
    pub fn try_run(self, host: &Host, args: &[&str]) -> Result<Ran> {
        match self {
            Self::System => host.try_run(args),
            Self::User(user) => host.try_run_as(user, args),
        }
    }

    /// Runs a command as the owner of this manager.
    pub fn run(self, host: &Host, args: &[&str]) -> Result<String> {
        match self {
            Self::System => host.run(args),
            Self::User(user) => host.run_as(user, args),
        }
    }

    /// systemctl, with --user where it belongs.
    pub fn systemctl(self, host: &Host, args: &[&str]) -> Result<String> {
        self.run(host, &self.with_scope("systemctl", args))
    }

    /// One property of a unit.
    pub fn show(self, host: &Host, unit: &str, property: &str) -> Result<String> {
        self.systemctl(host, &["show", "--value", "--property", property, unit])
    }

    /// Waits until a property of a unit has a value.
    pub fn wait_for(
        self,
        host: &Host,
        unit: &str,
        property: &str,
        value: &str,
        limit: Duration,
    ) -> Result<()> {
        let ends = property == "ActiveState" && ["inactive", "failed"].contains(&value);
        let what = format!("{property}={value} of {unit}");
        self.wait_until(host, (unit, property), (&what, limit), ends, |now| now == value)
    }

    /// Waits until a unit is "inactive" or "failed".
    pub fn await_end(self, host: &Host, unit: &str, limit: Duration) -> Result<()> {
        let what = format!("the end of {unit}");
        let has_ended = |now: &str| matches!(now, "inactive" | "failed");
        self.wait_until(host, (unit, "ActiveState"), (&what, limit), true, has_ended)
    }

    /// Waits until a property of a unit is as wanted. `ends`: that is not so while anything of the unit runs.
    fn wait_until(
        self,
        host: &Host,
        (unit, property): (&str, &str),
        (what, limit): (&str, Duration),
        ends: bool,
        is_wanted: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let (mut last, mut asked) = (String::new(), Instant::now());
        host.wait_until(what, limit, || {
            if ends && asked.elapsed() < SELDOM && self.has_group(host, unit)? {
                return Ok(false);
            }
            asked = Instant::now();
            last = self.show(host, unit, property)?;
            Ok(is_wanted(&last))
        })
        .with_context(|| {
            format!("{property} of {unit} is {last}\n{}", self.journal(host, unit).unwrap_or_default())
        })
    }

    /// Whether a unit has a control group where its manager makes them, as it has for as long as something of it runs. A look at a folder: to ask
    /// systemd takes half a dozen processes, and those who wait are many.
    fn has_group(self, host: &Host, unit: &str) -> Result<bool> {
        let slice = match self {
            Self::System => "system.slice".into(),
            Self::User(user) => {
                let uid = host.uid(user)?;
                format!("user.slice/user-{uid}.slice/user@{uid}.service/app.slice")
            }
        };
        Ok(host.path(&format!("/sys/fs/cgroup/{slice}/{unit}")).exists())
    }

    /// The messages a unit and systemd logged about it, one a line, oldest first.
    pub fn journal(self, host: &Host, unit: &str) -> Result<String> {
        self.journalctl(host, "--output=cat", unit)
    }

    /// The same with all its fields.
    pub fn journal_records(self, host: &Host, unit: &str) -> Result<Vec<Value>> {
        let text = self.journalctl(host, "--output=json", unit)?;
        text.lines().map(|line| serde_json::from_str(line).context("a journal record is no JSON")).collect()
    }

    /// Read as root, also a user's: that needs no membership in any group. (`--user-unit` would only show root's own units.)
    fn journalctl(self, host: &Host, output: &str, unit: &str) -> Result<String> {
        let matches = match self {
            Self::System => vec!["--unit".into(), unit.to_owned()],
            Self::User(user) => {
                let uid = host.uid(user)?;
                let of_user = |field: &str| [format!("_UID={uid}"), format!("{field}={unit}")];
                [&of_user("_SYSTEMD_USER_UNIT")[..], &["+".into()], &of_user("USER_UNIT")].concat()
            }
        };
        // All that has been logged by now: the journal takes its messages up one after the other, and on a busy machine late.
        let script = "journalctl --sync; exec journalctl \"$@\"";
        let args = ["sh", "-euc", script, "journalctl", "--quiet", "--all", output];
        host.run(&args.into_iter().chain(matches.iter().map(String::as_str)).collect::<Vec<_>>())
    }

    /// Makes the busybox image `localhost/busybox` known to this manager's Podman.
    pub fn import_busybox(self, host: &Host) -> Result<()> {
        self.run(host, &["podman", "import", "--quiet", "/srv/busybox.tar", "localhost/busybox"])?;
        Ok(())
    }

    /// Makes one of the images of `tests/host/images.sh` (nginx, postgres, redis, socat) known to this manager's Podman under
    /// the name that it has in a registry.
    pub fn import_image(self, host: &Host, name: &str, reference: &str) -> Result<()> {
        let config = format!("/srv/images.d/{name}.config");
        let config =
            std::fs::read_to_string(host.path(&config)).with_context(|| format!("no image {name}"))?;
        let mut args = vec!["podman", "import", "--quiet"];
        args.extend(config.lines().flat_map(|line| ["--change", line]));
        let tar = format!("/srv/images.d/{name}.tar");
        args.extend([&*tar, reference]);
        self.run(host, &args)?;
        Ok(())
    }

    /// A root file system for containers (`Rootfs=…:O`) with PostgreSQL, nginx, redis and Python in it.
    #[must_use]
    pub fn image(self) -> String {
        match self {
            Self::System => "/srv/image".into(),
            Self::User(user) => format!("/srv/images/{user}"),
        }
    }

    fn with_scope<'a>(self, program: &'a str, args: &[&'a str]) -> Vec<&'a str> {
        let scope = match self {
            Self::System => "--system",
            Self::User(_) => "--user",
        };
        [program, scope].into_iter().chain(args.iter().copied()).collect()
    }
}
