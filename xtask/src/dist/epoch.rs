//! The one time that everything is dated by.

use std::fs::FileTimes;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};

/// Seconds since 1970.
#[derive(Debug, Clone, Copy)]
pub struct Epoch(pub u64);

impl Epoch {
    /// `SOURCE_DATE_EPOCH`; else the time of the last commit; outside a clone, that of the lock file.
    pub fn of(source: &Path) -> Result<Self> {
        if let Some(given) = std::env::var_os("SOURCE_DATE_EPOCH") {
            let seconds = given.to_str().and_then(|text| text.parse().ok());
            return seconds.map(Self).context("SOURCE_DATE_EPOCH is no number of seconds");
        }
        let git = Command::new("git").arg("-C").arg(source).args(["log", "-1", "--format=%ct"]).output();
        let committed =
            git.ok().and_then(|output| String::from_utf8(output.stdout).ok()?.trim().parse().ok());
        if let Some(seconds) = committed {
            return Ok(Self(seconds));
        }
        let written = std::fs::metadata(source.join("Cargo.lock"))?.modified()?;
        Ok(Self(written.duration_since(UNIX_EPOCH)?.as_secs()))
    }

    /// As date(1) writes it, in UTC.
    pub fn date(self, format: &str) -> Result<String> {
        let mut date = Command::new("date");
        date.env("LC_ALL", "C").args(["--utc", &format!("--date=@{}", self.0), format]);
        let text = super::program("date", "coreutils", &mut date)?;
        Ok(String::from_utf8(text)?.trim().to_owned())
    }

    /// Dates a file or folder.
    pub fn stamp(self, path: &Path) -> Result<()> {
        let time: SystemTime = UNIX_EPOCH + Duration::from_secs(self.0);
        let file = std::fs::File::open(path)?;
        file.set_times(FileTimes::new().set_accessed(time).set_modified(time))?;
        Ok(())
    }
}
