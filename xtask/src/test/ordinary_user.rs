//! As root, the quick suites once more as a user who may do nothing: what holds for root may hold by its capabilities.
//!
//! The built test binaries are copied to a folder of that user, for the workspace may lie where only root can look.

use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use nix::unistd::User;

use super::cargo_test::Runner;
use super::second_look;
use super::summary::{Count, in_ci};
use super::tiers::Tier;
use crate::build::cargo;

/// Present on every Linux host, with no power on any.
const USER: &str = "nobody";

/// Cases of a suite that ask for nothing an ordinary user might not have, beside others of the same suite that ask the same: the
/// relay that copies and the one of no forwarder, beside the one that splices.
const SAME_FOR_ALL: [(&str, [&str; 2]); 1] = [("relay", ["copy::", "direct::"])];

/// Runs all the quick suites among `tiers`.
pub fn run(runner: &Runner, tiers: &[Tier]) -> Result<Count> {
    let user = User::from_name(USER)?.with_context(|| format!("this host has no user {USER}"))?;
    let folder = Folder::create()?;
    let own = |path: &Path| chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw()));
    let copy = |from: &Path, name: &str| -> Result<PathBuf> {
        let to = folder.0.join(name);
        std::fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o755))?;
        Ok(to)
    };
    own(&folder.0)?;
    // As in a target folder: helpers lie one above the tests, where the harness looks for them.
    std::fs::create_dir(folder.0.join("deps"))?;
    let bro = copy(&runner.bro, "bro")?;
    let runner = Runner::new(bro)?;

    let mut total = Count::default();
    for tier in tiers {
        let Tier::Suite { package: "bro-tests", name } = tier else { continue };
        if tier.is_slow() {
            continue;
        }
        println!("-- {name}, as {USER} --");
        let built = Built::of(name)?;
        for helper in &built.helpers {
            let name = helper.file_name().and_then(|name| name.to_str()).context("a helper has a name")?;
            copy(helper, name)?;
        }
        let binary = copy(&built.suite, &format!("deps/{name}"))?;
        let skips = folder.0.join("skips");
        // The user who runs the tests has to be able to write it.
        let own_file = |path: &Path| std::fs::write(path, "").and_then(|()| own(path));
        own_file(&skips)?;
        let left_out = SAME_FOR_ALL.iter().filter(|(suite, _)| suite == name).flat_map(|(_, cases)| cases);
        let left_out: Vec<String> = left_out.map(|cases| format!("--skip={cases}")).collect();
        let command = || {
            let mut command = Command::new(&binary);
            command
                .arg("--quiet")
                .args(&left_out)
                .uid(user.uid.as_raw())
                .gid(user.gid.as_raw())
                .current_dir(&folder.0)
                .env("HOME", &folder.0)
                .env("TMPDIR", &folder.0)
                .env_remove("XDG_RUNTIME_DIR")
                .env_remove("DBUS_SESSION_BUS_ADDRESS")
                // Here a test that needs root is to skip: it ran as root before.
                .env_remove("CI");
            command
        };
        let first = runner.count(&mut command(), &skips)?;
        let mut count = second_look::look(name, first, |failed, _| {
            own_file(&skips)?;
            runner.count(command().args(["--test-threads=1", "--exact"]).args(failed), &skips)
        })?;
        count.skips.retain(|(_, need)| need.contains("user namespaces"));
        count.skipped = count.skips.len();
        if in_ci() {
            count.failed += count.skipped;
        }
        total = total + count;
    }
    Ok(total)
}

/// What cargo builds to run a suite.
struct Built {
    suite: PathBuf,
    /// The programs of its package.
    helpers: Vec<PathBuf>,
}

impl Built {
    /// Builds it unless it is up to date.
    fn of(suite: &str) -> Result<Self> {
        let output = cargo()
            .args(["test", "--quiet", "--workspace", "--test", suite, "--no-run", "--message-format=json"])
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run cargo")?;
        ensure!(output.status.success(), "cargo could not build the suite {suite}");
        let messages: Vec<serde_json::Value> = String::from_utf8(output.stdout)?
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        let executables = |kind: &'static str| {
            let wanted = move |message: &&serde_json::Value| {
                let manifest = message["manifest_path"].as_str().unwrap_or_default();
                message["target"]["kind"][0] == kind && manifest.ends_with("/tests/Cargo.toml")
            };
            messages
                .iter()
                .filter(wanted)
                .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        };
        let suite = executables("test").next().with_context(|| format!("cargo built no suite {suite}"))?;
        Ok(Self { suite, helpers: executables("bin").collect() })
    }
}

/// A folder under /tmp that is removed with everything in it.
struct Folder(PathBuf);

impl Folder {
    fn create() -> Result<Self> {
        let path = nix::unistd::mkdtemp("/tmp/bro-ordinary-user-XXXXXX").context("a folder in /tmp")?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}
