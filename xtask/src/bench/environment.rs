//! Where the figures come from: the machine, its kernel, the versions, and what else it was doing.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::cpu::{Meter, stolen_seconds};
use super::{memory, tools};

/// The machine.
#[derive(Debug, Serialize, Deserialize)]
pub struct Environment {
    pub kernel: String,
    pub processor: String,
    pub cores: usize,
    pub memory_gib: u64,
    pub virtual_machine: bool,
    pub governor: Option<String>,
    pub system: Option<String>,
    pub bro: Option<String>,
    pub commit: Option<String>,
    pub root: bool,
    pub descriptors: u64,
    /// `net.ipv4` settings that matter.
    pub settings: Vec<(String, String)>,
    pub load_average: Option<String>,
    /// How many processors were busy before anything was started.
    pub busy_before: f64,
    /// And after everything was ended.
    pub busy_after: f64,
    /// Seconds that the hypervisor took away during the run.
    pub stolen: f64,
    pub seconds: f64,
    pub date: Option<String>,
}

impl Environment {
    /// Before the run.
    pub fn before(bro: &Path) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
        let processors = read("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = processors.lines().find(|line| line.starts_with(name))?;
            line.split_once(": ").map(|(_, value)| value.to_owned())
        };
        let memory = read("/proc/meminfo")
            .and_then(|table| table.lines().next()?.split_whitespace().nth(1)?.parse::<u64>().ok())
            .unwrap_or(0);
        let settings =
            ["tcp_congestion_control", "tcp_rmem", "tcp_wmem", "tcp_notsent_lowat", "tcp_tw_reuse"]
                .into_iter()
                .filter_map(|name| {
                    let value = read(&format!("/proc/sys/net/ipv4/{name}"))?;
                    Some((format!("net.ipv4.{name}"), value.split_whitespace().collect::<Vec<_>>().join(" ")))
                });
        let os = read("/etc/os-release").unwrap_or_default();
        let system = os
            .lines()
            .find_map(|line| line.strip_prefix("PRETTY_NAME="))
            .map(|name| name.trim_matches('"').to_owned());
        Self {
            kernel: output("uname", &["-srm"]).unwrap_or_default(),
            processor: field("model name").unwrap_or_else(|| "unknown".into()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_gib: memory.div_ceil(1 << 20),
            virtual_machine: processors
                .lines()
                .any(|line| line.starts_with("flags") && line.contains(" hypervisor")),
            governor: read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            system,
            bro: tools::version(bro, "-V"),
            commit: output("git", &["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]),
            root: nix::unistd::geteuid().is_root(),
            descriptors: memory::more_descriptors(),
            settings: settings.collect(),
            load_average: read("/proc/loadavg"),
            busy_before: busy(),
            busy_after: 0.0,
            stolen: -stolen_seconds(),
            seconds: 0.0,
            date: output("date", &["-u", "+%Y-%m-%d"]),
        }
    }

    /// After the run.
    pub fn after(&mut self, elapsed: Duration) {
        self.busy_after = busy();
        self.stolen += stolen_seconds();
        self.seconds = elapsed.as_secs_f64();
    }

    /// What makes the figures doubtful, in sentences.
    pub fn doubts(&self) -> Vec<String> {
        let mut doubts = Vec::new();
        let (before, after) = (self.busy_before, self.busy_after);
        if before.min(after) > 0.1 {
            doubts.push(format!(
                "The machine was not quiet: other programs kept {before:.1} of {} processors busy before the run and {after:.1} after \
                 it. Do not quote these figures.",
                self.cores
            ));
        } else if before.max(after) > 0.1 {
            doubts.push(format!(
                "Other programs kept {before:.2} of {} processors busy in the second before the run and {after:.2} in the one after it, so \
                 the round beside that second may be off.",
                self.cores
            ));
        }
        let share = self.stolen / (self.seconds * self.cores as f64).max(1.0);
        if share > 0.01 {
            doubts.push(format!("The hypervisor took {:.1} % of the processors' time away.", share * 100.0));
        }
        doubts
    }
}

/// How many processors are busy with nothing of ours running.
fn busy() -> f64 {
    const WATCH: Duration = Duration::from_millis(1000);
    let begin = Instant::now();
    let Ok(meter) = Meter::start(None) else { return 0.0 };
    // The interval that is measured.
    std::thread::sleep(WATCH.saturating_sub(begin.elapsed()));
    meter.stop().map_or(0.0, |spent| spent.system / spent.elapsed)
}

fn output(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
