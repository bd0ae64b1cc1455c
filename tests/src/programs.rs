//! A forwarder's kernel relay as the kernel itself shows it: its programs, links and maps, found through the forwarder's own
//! descriptors and asked about by id, so that nothing here keeps any of them alive.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bro_ebpf::{Counter, Record, Watch, WatchKey};

use crate::pattern::Rng;
use crate::sys::{self, BpfObject, Shared};
use crate::{process, sys::bpf_object};

/// The kernel relay of one forwarder.
#[derive(Debug, Clone)]
pub struct Programs {
    maps: HashMap<String, u32>,
    objects: Vec<BpfObject>,
}

impl Programs {
    /// Those that `pid` has loaded.
    pub fn of(pid: i32) -> Result<Self> {
        let pidfd = sys::pidfd_open(pid)?;
        let (mut maps, mut objects) = (HashMap::new(), Vec::new());
        for (number, what) in process::descriptors(pid)? {
            if !what.starts_with("anon_inode:bpf") {
                continue;
            }
            // The maps' own descriptors go to the relay process and are closed here.
            let Ok(info) = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")) else { continue };
            let id = |name: &str| {
                info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse().ok())
            };
            if let Some(link) = id("link_id") {
                objects.push(BpfObject::Link(link));
            } else if let Some(program) = id("prog_id") {
                objects.push(BpfObject::Program(program));
                // The forwarder keeps no descriptor of a map that it only reads through memory; its programs do.
                // One of the program that hooks goes to the relay process as well, and may be closed here by now; another stays.
                let Ok(program) = sys::pidfd_getfd(pidfd.as_fd(), number) else { continue };
                for map in sys::bpf_maps_of(program.as_fd())? {
                    let name = sys::bpf_map_name(bpf_object(BpfObject::Map(map))?.as_fd())?;
                    maps.insert(name, map);
                }
            }
        }
        objects.extend(maps.values().map(|id| BpfObject::Map(*id)));
        ensure!(maps.contains_key("RECORDS"), "process {pid} has no kernel relay: {maps:?}");
        Ok(Self { maps, objects })
    }

    /// Those that `bro loader` has pinned in `folder`.
    pub fn pinned(folder: &Path) -> Result<Self> {
        let (mut maps, mut objects) = (HashMap::new(), Vec::new());
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                continue;
            }
            let object = sys::bpf_pinned(&entry.path())?;
            if entry.file_name() == "link" {
                objects.push(BpfObject::Link(fdinfo(object.as_fd(), "link_id")?));
                objects.push(BpfObject::Program(fdinfo(object.as_fd(), "prog_id")?));
            } else if entry.file_name() == "hook" {
                objects.push(BpfObject::Program(fdinfo(object.as_fd(), "prog_id")?));
            } else {
                maps.insert(sys::bpf_map_name(object.as_fd())?, fdinfo(object.as_fd(), "map_id")?);
            }
        }
        objects.extend(maps.values().map(|id| BpfObject::Map(*id)));
        ensure!(maps.contains_key("RECORDS"), "there is no kernel relay in {}: {maps:?}", folder.display());
        Ok(Self { maps, objects })
    }

    /// What of it the kernel still has.
    #[must_use]
    pub fn left(&self) -> Vec<BpfObject> {
        let there = |object: &&BpfObject| !bpf_object(**object).is_err_and(|error| is_absent(&error));
        self.objects.iter().filter(there).copied().collect()
    }

    /// Expects that the kernel has let go of everything, which it does a moment after the last descriptor is closed.
    pub fn expect_gone(&self) -> Result<()> {
        let gone = process::eventually(Duration::from_secs(5), || self.left().is_empty());
        ensure!(gone, "left in the kernel: {:?}", self.left());
        Ok(())
    }

    /// How many programs, links and maps there are.
    #[must_use]
    pub fn count(&self, wanted: fn(&BpfObject) -> bool) -> usize {
        self.objects.iter().filter(|object| wanted(object)).count()
    }

    fn map(&self, name: &str) -> Result<OwnedFd> {
        let id = self.maps.get(name).with_context(|| format!("there is no map {name}"))?;
        bpf_object(BpfObject::Map(*id)).with_context(|| format!("the map {name}"))
    }

    /// How many entries a map has whose keys are `KEY` bytes long.
    fn entries<const KEY: usize>(&self, name: &str) -> Result<usize> {
        let map = self.map(name)?;
        let (mut key, mut count) = (None, 0);
        while let Some(next) = sys::bpf_next_key::<KEY>(map.as_fd(), key.as_ref())? {
            (key, count) = (Some(next), count + 1);
            // Walking a map that changes may begin anew, again and again.
            ensure!(count < 1_000_000, "the map {name} has no end");
        }
        Ok(count)
    }

    /// How many sockets are in the senders' map.
    pub fn hooked(&self) -> Result<usize> {
        self.entries::<8>("SENDERS")
    }

    /// Sockets in the senders' and the targets' maps, and routes.
    pub fn in_use(&self) -> Result<[usize; 3]> {
        Ok([self.hooked()?, self.entries::<8>("TARGETS")?, self.entries::<48>("ROUTES")?])
    }

    /// Expects that no socket is left in a map, and no route.
    pub fn expect_nothing_in_use(&self) -> Result<()> {
        let empty = || self.in_use().is_ok_and(|counts| counts == [0; 3]);
        ensure!(
            process::eventually(Duration::from_secs(5), empty),
            "senders, targets, routes left: {:?}",
            self.in_use()
        );
        Ok(())
    }

    /// The kinds of the watched ports, by role.
    pub fn watched(&self) -> Result<Vec<Watch>> {
        let map = self.map("WATCHED")?;
        let (mut key, mut all) = (None, Vec::new());
        while let Some(next) = sys::bpf_next_key::<{ size_of::<WatchKey>() }>(map.as_fd(), key.as_ref())? {
            if let Some(value) = sys::bpf_lookup::<_, { size_of::<Watch>() }>(map.as_fd(), &next)? {
                let (words, _) = value.as_chunks::<4>();
                let word = |at: usize| words.get(at).map_or(0, |word| u32::from_ne_bytes(*word));
                all.push(Watch { role: word(0), kind: word(1), seat: word(2), zero: word(3) });
            }
            key = Some(next);
        }
        Ok(all)
    }

    /// One of the programs' counters.
    pub fn total(&self, counter: Counter) -> Result<u64> {
        let map = self.map("TOTALS")?;
        let value = sys::bpf_lookup::<4, 8>(map.as_fd(), &(counter as u32).to_ne_bytes())?;
        Ok(u64::from_ne_bytes(value.context("a counter")?))
    }

    /// The lanes' records, as the forwarder and the programs share them.
    pub fn records(&self) -> Result<Records> {
        let map = self.map("RECORDS")?;
        let count = sys::bpf_map_size(map.as_fd())?;
        Ok(Records(sys::share(map.as_fd(), count)?))
    }
}

/// A number that the kernel shows of a descriptor of ours.
fn fdinfo(fd: BorrowedFd<'_>, name: &str) -> Result<u32> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let found = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse().ok());
    found.with_context(|| format!("no {name} in {info}"))
}

fn is_absent(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::ENOENT)
}

/// The records of all lanes, open or not. Keeps that one map alive.
#[derive(Debug)]
pub struct Records(Shared<Record>);

impl Records {
    /// Those of open lanes.
    pub fn open(&self) -> impl Iterator<Item = &Record> {
        self.0.iter().filter(|record| record.serial.load(Ordering::Relaxed) != 0)
    }

    /// The last serial number of a record.
    #[must_use]
    pub fn last(&self, index: usize) -> Option<u64> {
        self.0.iter().nth(index).map(|record| record.last.load(Ordering::Relaxed))
    }

    /// Forces the lanes open and shut at random until what is returned is dropped.
    #[must_use]
    pub fn flap(self, seed: u64) -> Flapping {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut rng = Rng::new(seed);
            let mut changes = 0;
            while !stopped.load(Ordering::Relaxed) {
                for record in self.open() {
                    if rng.once_in(2) {
                        record.on.fetch_xor(1, Ordering::Relaxed);
                        changes += 1;
                    }
                }
                // Long enough for a few messages, short enough for a hundred changes in any transfer worth the name.
                std::thread::sleep(Duration::from_micros(rng.within(50, 1500)));
            }
            changes
        });
        Flapping { stop, thread: Some(thread) }
    }
}

/// While this lives, lanes open and shut.
#[derive(Debug)]
pub struct Flapping {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Flapping {
    /// Ends it; says how often a lane was opened or shut.
    pub fn stop(mut self) -> u64 {
        self.end()
    }

    fn end(&mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map_or(0, |thread| thread.join().unwrap_or(0))
    }
}

impl Drop for Flapping {
    fn drop(&mut self) {
        self.end();
    }
}
