//! Memory: the forwarder's own, each shared page counted once, and the kernel's.

use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::cpu;

/// At one moment, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// Of the forwarder's processes (PSS), where this user may know that.
    pub process: Option<f64>,
    /// Slabs, kernel stacks, page tables and per-processor memory of the whole system.
    pub kernel: f64,
    /// What TCP has in its queues, in this namespace's count.
    pub tcp: f64,
    /// TCP sockets in use in this namespace.
    pub sockets: u64,
}

impl Memory {
    /// Now; `group` is the forwarder's process group.
    pub fn now(group: Option<i32>) -> Result<Self> {
        let meminfo = std::fs::read_to_string("/proc/meminfo")?;
        let kernel = ["Slab", "KernelStack", "PageTables", "Percpu"]
            .map(|name| kilobytes(&meminfo, name).unwrap_or(0.0));
        let (sockets, pages) = sockstat();
        let process = group.and_then(proportional);
        Ok(Self { process, kernel: kernel.iter().sum::<f64>() * 1024.0, tcp: pages as f64 * 4096.0, sockets })
    }
}

/// A forwarder's memory, in bytes.
fn proportional(group: i32) -> Option<f64> {
    let sizes = cpu::members(group).into_iter().filter_map(|pid| {
        let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok();
        let resident = || std::fs::read_to_string(format!("/proc/{pid}/status")).ok();
        // Another user's process shows only what it shares as well.
        rollup.and_then(|text| kilobytes(&text, "Pss")).or_else(|| kilobytes(&resident()?, "VmRSS"))
    });
    let total: f64 = sizes.sum();
    (total > 0.0).then_some(total * 1024.0)
}

/// `Name:   123 kB` in a table.
fn kilobytes(table: &str, name: &str) -> Option<f64> {
    let rest = table.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// TCP sockets in use, and the pages in their queues.
fn sockstat() -> (u64, u64) {
    let table = std::fs::read_to_string("/proc/net/sockstat").unwrap_or_default();
    let line = table.lines().find(|line| line.starts_with("TCP:")).unwrap_or_default();
    let after = |name: &str| {
        let mut words = line.split(' ').skip_while(|word| *word != name);
        words.nth(1)?.parse().ok()
    };
    (after("inuse").unwrap_or(0), after("mem").unwrap_or(0))
}

/// Waits until about as few sockets are in use as before, so that the next contender starts even.
pub fn settle(sockets: u64, limit: Duration) {
    let deadline = Instant::now() + limit;
    while sockstat().0 > sockets + 8 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Raises this process's limit of descriptors, which its children inherit, as far as this user may.
pub fn more_descriptors() -> u64 {
    const WANTED: u64 = 200_000;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    for (soft, hard) in [(WANTED.max(soft), WANTED.max(hard)), (hard, hard)] {
        if setrlimit(Resource::RLIMIT_NOFILE, soft, hard).is_ok() {
            return soft;
        }
    }
    soft
}

#[cfg(test)]
mod tests {
    use super::kilobytes;

    #[test]
    fn a_name_is_not_another_names_beginning() {
        let table = "Slab:              10 kB\nSlabby:    7 kB\nPss_Dirty: 3 kB\nPss:   5 kB\n";
        assert_eq!(kilobytes(table, "Slab"), Some(10.0));
        assert_eq!(kilobytes(table, "Pss"), Some(5.0));
        assert_eq!(kilobytes(table, "None"), None);
    }
}
