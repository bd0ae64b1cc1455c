//! A stage for `bro loader`: a /run, an /etc/subuid and a cgroup of one test's own, users who exist as numbers, and what they do.
//!
//! All of it belongs to the calling thread and to what that thread starts: nothing of it is seen by another test or outlives it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use bro_proc::cgroup;
use bro_sockmap::pinned;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Uid, setfsuid};

use crate::bro;
use crate::forwarder::{Forwarder, Setup};
use crate::peers::{Conn, Family, Here, Listener, PATIENCE};
use crate::process;
use crate::programs::Programs;
use crate::scene::talk;
use crate::scratch::Scratch;

/// A user for whom something is loaded.
pub const ALICE: u32 = 4001;
/// Another one.
pub const BOB: u32 = 4002;
/// A user of Alice's containers.
pub const INSIDE_ALICE: u32 = 7_000_033;

/// The stage. Dropping it leaves the cgroup and removes it; the rest goes with the thread.
#[derive(Debug)]
pub struct Stage {
    cgroup: PathBuf,
    parent: PathBuf,
    _scratch: Scratch,
}

impl Stage {
    /// Sets it for the calling thread.
    pub fn new() -> Result<Self> {
        unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace")?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).context("private mounts")?;
        mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755")).context("/run")?;
        let scratch = Scratch::new()?;
        let subuid = scratch.join("subuid");
        std::fs::write(&subuid, format!("{ALICE}:7000000:65536\n{BOB}:8000000:65536\n"))?;
        if !Path::new("/etc/subuid").exists() {
            std::fs::write("/etc/subuid", "").context("/etc/subuid")?;
        }
        mount(Some(&subuid), "/etc/subuid", None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .context("/etc/subuid")?;

        let parent = cgroup::of_self()?;
        let stage = Self { cgroup: sibling(&parent)?, parent, _scratch: scratch };
        stage.enter(&stage.cgroup)?;
        Ok(stage)
    }

    /// The cgroup that stands for Alice's slice; the calling thread is in it.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Another cgroup, for the caller to remove.
    pub fn another(&self) -> Result<PathBuf> {
        sibling(&self.parent)
    }

    /// Puts the calling thread into a cgroup.
    pub fn enter(&self, cgroup: &Path) -> Result<()> {
        std::fs::write(cgroup.join("cgroup.threads"), "0").context("entering a cgroup")
    }

    /// Runs `bro loader`.
    pub fn loader(&self, arguments: &[&str]) -> Result<Output> {
        Ok(Command::new(bro::binary()).arg("loader").args(arguments).output()?)
    }

    /// Loads for a user, at the stage's cgroup.
    pub fn load(&self, user: u32) -> Result<Programs> {
        self.load_at(user, &self.cgroup)
    }

    /// Loads for a user, at any cgroup.
    pub fn load_at(&self, user: u32, cgroup: &Path) -> Result<Programs> {
        let path = cgroup.to_str().context("a cgroup's path")?;
        let ran = self.loader(&[&user.to_string(), "--cgroup", path])?;
        ensure!(ran.status.success(), "bro loader: {}", String::from_utf8_lossy(&ran.stderr));
        Programs::pinned(&pinned::folder(user))
    }

    /// Takes away what was loaded for a user.
    pub fn remove(&self, user: u32) -> Result<()> {
        let ran = self.loader(&[&user.to_string(), "--remove"])?;
        ensure!(ran.status.success(), "bro loader --remove: {}", String::from_utf8_lossy(&ran.stderr));
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let tasks = std::fs::read_to_string(self.cgroup.join("cgroup.threads")).unwrap_or_default();
        for thread in tasks.lines() {
            std::fs::write(self.parent.join("cgroup.threads"), thread).ok();
        }
        process::eventually(PATIENCE, || std::fs::remove_dir(&self.cgroup).is_ok());
    }
}

fn sibling(parent: &Path) -> Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = parent.join(format!("bro-stage-{}-{number}", std::process::id()));
    std::fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
    std::fs::write(path.join("cgroup.type"), "threaded").context("a threaded cgroup")?;
    Ok(path)
}

/// Does something as a user: the sockets that it makes are that user's.
pub fn as_user<T>(user: u32, what: impl FnOnce() -> T) -> T {
    struct Back(Uid);
    impl Drop for Back {
        fn drop(&mut self) {
            setfsuid(self.0);
        }
    }
    let _back = Back(setfsuid(Uid::from_raw(user)));
    what()
}

/// A user's service, the same user's forwarder without any right, and a client.
#[derive(Debug)]
pub struct Site {
    /// The forwarder.
    pub forwarder: Forwarder,
    /// What it listens at.
    pub front: Listener,
    /// The service's socket.
    pub service: Listener,
}

impl Site {
    /// A service of `owner` behind a forwarder of `user`'s, with more options.
    pub fn start(user: u32, owner: u32, options: &[&str]) -> Result<Self> {
        let address = Family::Tcp4.loopback().context("TCP has a loopback address")?;
        let service = as_user(owner, || Listener::new(&Here, &address))?;
        let front = as_user(user, || Listener::new(&Here, &address))?;
        let forwarder = Self::forwarder(user, &front, &service, options)?;
        Ok(Self { forwarder, front, service })
    }

    /// A forwarder between these two.
    pub fn forwarder(user: u32, front: &Listener, service: &Listener, options: &[&str]) -> Result<Forwarder> {
        let setup = Setup::new().user(user).socket(front).args(options.iter().copied());
        setup.arg(service.address().to_string()).start()
    }

    /// Waits until it has a seat.
    pub fn seated(&self) -> Result<()> {
        self.forwarder.log().line(PATIENCE, |line| line.contains("kernel relay is bro loader's"))?;
        self.forwarder.log().line(PATIENCE, |line| line.contains("kernel relay loaded")).map(drop)
    }

    /// A connection of `client`'s, with both its ends.
    pub fn connect(&self, client: u32) -> Result<(Conn, Conn)> {
        let near = as_user(client, || Conn::new(&Here, self.front.address()))?;
        let far = self.service.accept()?;
        Ok((near, far))
    }

    /// One connection from its beginning to its end: what relayed it.
    pub fn exchange(&self, client: u32) -> Result<String> {
        let count = self.forwarder.log().closings(0, PATIENCE)?.len();
        let (near, far) = self.connect(client)?;
        talk(&near, &far)?;
        drop((near, far));
        let closings = self.forwarder.closings(count + 1)?;
        Ok(closings.last().context("a closing line")?.relay.clone())
    }

    /// Connections until one takes the kernel's lane: how much of one does is a matter of who else uses the processors.
    pub fn expect_lane(&self, client: u32) -> Result<()> {
        let mut relay = String::new();
        let taken = process::eventually(PATIENCE, || {
            relay = self.exchange(client).unwrap_or_else(|error| format!("{error:#}"));
            relay != "splice"
        });
        ensure!(
            taken && relay == "sockmap",
            "relayed by {relay}:\n{}",
            self.forwarder.log().lines().join("\n")
        );
        Ok(())
    }

    /// Connections, none of which takes the kernel's lane.
    pub fn expect_no_lane(&self, client: u32) -> Result<()> {
        for _ in 0..4 {
            let relay = self.exchange(client)?;
            ensure!(relay == "splice", "relayed by {relay}");
        }
        Ok(())
    }
}
