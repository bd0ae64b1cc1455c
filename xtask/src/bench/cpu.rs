//! Processor time: the whole system's, kernel threads and interrupts included, and the forwarder's own.

use std::time::Instant;

use anyhow::{Context as _, Result};

/// What an interval cost.
#[derive(Debug, Clone, Copy)]
pub struct Spent {
    /// How long it was.
    pub elapsed: f64,
    /// Seconds of all processors together, of whatever was not idle.
    pub system: f64,
    /// Seconds of the forwarder's processes.
    pub group: Option<f64>,
}

/// A running measurement.
pub struct Meter {
    begin: Instant,
    system: f64,
    group: Option<(i32, f64)>,
}

impl Meter {
    /// Begins; `group` is the forwarder's process group.
    pub fn start(group: Option<i32>) -> Result<Self> {
        let group = group.map(|group| (group, group_seconds(group)));
        Ok(Self { begin: Instant::now(), system: busy_seconds()?, group })
    }

    /// Ends.
    pub fn stop(self) -> Result<Spent> {
        let elapsed = self.begin.elapsed().as_secs_f64();
        let system = busy_seconds()? - self.system;
        let group = self.group.map(|(group, before)| (group_seconds(group) - before).max(0.0));
        Ok(Spent { elapsed, system, group })
    }
}

fn ticks_per_second() -> f64 {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK);
    ticks.ok().flatten().map_or(100.0, |ticks| ticks as f64)
}

/// Seconds that all processors together were not idle, since boot.
fn busy_seconds() -> Result<f64> {
    let table = std::fs::read_to_string("/proc/stat")?;
    Ok(busy_ticks(&table).context("/proc/stat has no line for all processors")? as f64 / ticks_per_second())
}

/// user, nice, system, irq, softirq and steal; not idle and iowait, and not guest, which user has in it.
fn busy_ticks(table: &str) -> Option<u64> {
    let line = table.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
    (ticks.len() >= 8).then(|| ticks[..3].iter().chain(&ticks[5..8]).sum())
}

/// Seconds that the hypervisor took away, since boot.
pub fn stolen_seconds() -> f64 {
    let table = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let steal = table.lines().next().and_then(|line| line.split_whitespace().nth(8)?.parse::<f64>().ok());
    steal.unwrap_or(0.0) / ticks_per_second()
}

/// Seconds of all processes of a group, and of those they have waited for.
fn group_seconds(group: i32) -> f64 {
    let ticks: u64 = stats().filter(|stat| stat.group == group).map(|stat| stat.ticks).sum();
    ticks as f64 / ticks_per_second()
}

/// The processes of a group.
pub fn members(group: i32) -> Vec<i32> {
    stats().filter(|stat| stat.group == group).map(|stat| stat.pid).collect()
}

struct Stat {
    pid: i32,
    group: i32,
    ticks: u64,
}

fn stats() -> impl Iterator<Item = Stat> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    processes.filter_map(|pid| parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?))
}

/// A line of /proc/PID/stat, whose second field may hold anything.
fn parse(line: &str) -> Option<Stat> {
    let pid = line.split(' ').next()?.parse().ok()?;
    let fields: Vec<&str> = line.rsplit_once(") ")?.1.split(' ').collect();
    let number = |field: usize| fields.get(field)?.parse::<u64>().ok();
    let group = fields.get(2)?.parse().ok()?;
    Some(Stat { pid, group, ticks: number(11)? + number(12)? + number(13)? + number(14)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_not_counted() {
        assert_eq!(busy_ticks("cpu  1 2 4 1000 2000 8 16 32 0 0\ncpu0 9 9 9 9 9 9 9 9 0 0\n"), Some(63));
        assert_eq!(busy_ticks("intr 5\n"), None);
    }

    #[test]
    fn a_program_may_have_any_name() {
        let stat = parse("42 (a) b) S 1 40 42 0 -1 0 0 0 0 0 10 20 3 4 20 0 1 0 5").expect("a line of stat");
        assert_eq!((stat.pid, stat.group, stat.ticks), (42, 40, 37));
    }
}
