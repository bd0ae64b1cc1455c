//! The tiers: what they are called, what they need, which of them are slow, and in which lane each runs.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::build::workspace;

/// One step of the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tier {
    /// Format, clippy, docs, and the checks of this task's own.
    Lint,
    /// The licences and sources of what the project depends on.
    Licences,
    /// What needs nothing but the compiler: unit tests, property tests and models.
    Logic,
    /// A file of integration tests of a package.
    Suite { package: &'static str, name: String },
    /// Whether the checked-in kernel programs are what their source makes.
    Programs,
    /// The fuzzers of `fuzz/`, a few seconds each.
    Fuzz,
    /// The disk of the machine that is emulated, made before that machine has this one for itself.
    Disk,
    /// As root: the suites once more, by a user who may do nothing.
    OrdinaryUser,
}

/// The packages that have suites, and where.
const PACKAGES: [(&str, &str); 2] = [("bro-tests", "tests/tests"), ("xtask", "xtask/tests")];

/// Suites whose names begin so boot whole hosts or emulated machines, or take minutes for another reason.
const SLOW: &[&str] = &["emulator", "host", "million", "slow", "vm"];

/// Run only when named: they take minutes, and emulated processors bear no neighbours.
const BY_NAME: &[&str] = &["emulator", "million"];

/// Tiers that run one after another. The lanes run side by side: each waits for something most of its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// In this process, with its output as it comes: the tests whose deadlines are short.
    Front,
    /// Whole hosts, which wait for systemd and containers.
    Hosts,
    /// When the other lanes have ended: a machine with emulated processors, in which there are deadlines. Beside a host it missed them.
    Alone,
    /// What computes, and neither measures nor minds how long that takes: at a low priority.
    Computing,
}

impl Tier {
    pub fn name(&self) -> &str {
        match self {
            Self::Lint => "lint",
            Self::Licences => "licences",
            Self::Logic => "logic",
            Self::Suite { name, .. } => name,
            Self::Programs => "kernel-programs",
            Self::Fuzz => "fuzz",
            Self::Disk => "vm-disk",
            Self::OrdinaryUser => "ordinary-user",
        }
    }

    pub fn is_run_by_name_only(&self) -> bool {
        BY_NAME.contains(&self.name())
    }

    /// Its line of the list: what it is called, what it needs and how long it takes.
    pub fn described(&self) -> Result<String> {
        let (needs, takes) = match self {
            Self::Lint => ("rustfmt, clippy".into(), "a minute".into()),
            Self::Licences => ("cargo-deny".into(), "a second".into()),
            Self::Logic => ("the compiler".into(), "a minute".into()),
            Self::Programs => ("a compiler with library source, bpf-linker".into(), "a minute".into()),
            Self::Fuzz => ("g++, cargo-fuzz".into(), "4 min".into()),
            Self::Disk => ("as vm".into(), "4 min, once".into()),
            Self::OrdinaryUser => ("root".into(), "3 min".into()),
            Self::Suite { package, name } => {
                let header = Header::of(package, name)?;
                (header.needs, header.takes)
            }
        };
        let note = match self.is_slow() {
            _ if self.is_run_by_name_only() => " (only when named)",
            true => " (slow)",
            false => "",
        };
        Ok(format!("{:22} {takes:24} {needs}{note}", self.name()))
    }

    pub fn is_slow(&self) -> bool {
        match self {
            Self::Suite { name, .. } => SLOW.iter().any(|slow| name.starts_with(slow)),
            Self::Programs | Self::Fuzz | Self::Disk | Self::OrdinaryUser => true,
            Self::Lint | Self::Licences | Self::Logic => false,
        }
    }

    /// Does it run programs that cargo installs?
    pub fn needs_tools(&self) -> bool {
        matches!(self, Self::Licences | Self::Programs | Self::Fuzz)
    }

    /// Where it runs.
    pub fn lane(&self) -> Lane {
        match self {
            Self::Licences | Self::Programs | Self::Fuzz | Self::Disk => Lane::Computing,
            Self::Suite { name, .. } if name.starts_with("host") => Lane::Hosts,
            Self::Suite { name, .. } if name == "vm" => Lane::Alone,
            Self::Lint | Self::Logic | Self::Suite { .. } | Self::OrdinaryUser => Lane::Front,
        }
    }

    /// All there are, the quick ones first. A suite is a file in a package's tests folder, so a new one needs no entry.
    pub fn all() -> Result<Vec<Self>> {
        let mut suites = Vec::new();
        for (package, folder) in PACKAGES {
            suites.extend(suites_in(&workspace().join(folder))?.into_iter().map(|name| (package, name)));
        }
        suites.sort_by(|a, b| a.1.cmp(&b.1));
        let mut tiers = vec![Self::Lint, Self::Licences, Self::Logic, Self::Disk, Self::Programs, Self::Fuzz];
        tiers.extend(suites.into_iter().map(|(package, name)| Self::Suite { package, name }));
        if nix::unistd::geteuid().is_root() {
            tiers.push(Self::OrdinaryUser);
        }
        tiers.sort_by_key(Self::is_slow);
        Ok(tiers)
    }
}

fn suites_in(folder: &Path) -> Result<Vec<String>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let paths: Vec<PathBuf> =
        std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    let suite = |path: &PathBuf| {
        let is_suite = path.extension() == Some(OsStr::new("rs")) || path.join("main.rs").is_file();
        is_suite.then(|| path.file_stem()?.to_str().map(str::to_owned)).flatten()
    };
    Ok(paths.iter().filter_map(suite).collect())
}

/// What a suite says of itself at its top, in one line: `//! Needs: root, kernel BTF. Takes: 20 s.`
#[derive(Debug, PartialEq, Eq)]
pub struct Header {
    pub needs: String,
    pub takes: String,
}

impl Header {
    /// The one of a suite.
    fn of(package: &str, name: &str) -> Result<Self> {
        let (_, folder) = PACKAGES.iter().find(|(known, _)| *known == package).context("no such package")?;
        let folder = workspace().join(folder);
        let file = [folder.join(format!("{name}.rs")), folder.join(name).join("main.rs")];
        let file = file.iter().find(|file| file.is_file()).with_context(|| format!("no suite {name}"))?;
        let text = std::fs::read_to_string(file)?;
        Self::in_text(&text).with_context(|| {
            format!("{} has no line `//! Needs: THIS, THAT. Takes: SO LONG.` at its top", file.display())
        })
    }

    fn in_text(text: &str) -> Option<Self> {
        let mut top = text.lines().take_while(|line| line.starts_with("//!"));
        let (needs, takes) =
            top.find_map(|line| line.strip_prefix("//! Needs: "))?.split_once(". Takes: ")?;
        Some(Self { needs: needs.to_owned(), takes: takes.strip_suffix('.')?.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::{Header, Lane, Tier};

    #[test]
    fn a_suite_says_at_its_top_what_it_needs_and_how_long_it_takes() {
        let header =
            Header::in_text("//! One.\n//!\n//! Needs: root, ip. Takes: 20 s.\n\nuse a;\n").expect("it does");
        assert_eq!((header.needs.as_str(), header.takes.as_str()), ("root, ip", "20 s"));
        assert_eq!(Header::in_text("//! One.\n\n//! Needs: root. Takes: 20 s.\n"), None);
        assert_eq!(Header::in_text("//! Needs: root.\n"), None);
    }

    #[test]
    fn a_quick_run_boots_no_host() {
        for tier in Tier::all().expect("the suites can be listed") {
            assert!(tier.lane() != Lane::Hosts || tier.is_slow(), "{}", tier.name());
        }
    }
}
