//! Handing over to a successor (`systemctl reload`, after a package upgrade): the running forwarder starts the program anew with
//! the same command line and the same listening sockets. When the new one is ready, it is the service's main process, and the old
//! one finishes the connections it has, in the same cgroup. Nobody is refused meanwhile: both accept until the old one stops.
//!
//! They talk over a socket pair, whose number the successor finds in `BRO_HANDOVER`: it says that it is ready, and hears that it
//! has taken over, or sees the end of its predecessor first. From then on the predecessor says how many connections it still has,
//! eight bytes each time; a version that does not is one of which only that is known that it has not ended.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use nix::sys::socket::{getsockopt, sockopt};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;

use crate::kernel::Bequest;
use crate::listen::Listener;
use crate::sys;

/// The variable that names the descriptor of the successor's end.
const VARIABLE: &str = "BRO_HANDOVER";

/// How long a successor may take to be ready.
const PATIENCE: Duration = Duration::from_secs(30);

/// More than what is said of the kernel relay.
const LONGEST_LETTER: usize = 64 * 1024;

/// What the successor says when it is ready.
const READY: u8 = b'R';

/// What the successor is told when it has taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takeover {
    /// The service is awake.
    Awake,
    /// It is asleep.
    Asleep,
}

impl Takeover {
    const fn byte(self) -> u8 {
        match self {
            Self::Awake => b'A',
            Self::Asleep => b'S',
        }
    }
}

/// The forwarder that this process takes over from.
#[derive(Debug)]
pub struct Predecessor(OwnedFd);

impl Predecessor {
    /// The one that has started this process, if one has. To be called first of all, like [`crate::listen::take_passed`].
    #[must_use]
    pub fn take() -> Option<Self> {
        let number = std::env::var(VARIABLE).ok()?;
        sys::unset_environment(&[VARIABLE]);
        let socket = sys::adopt(number.parse().ok()?).ok()?;
        // A leftover of the variable alone leads to no such socket.
        let pid = getsockopt(&socket, sockopt::PeerCredentials).ok()?.pid();
        (pid == nix::unistd::getppid().as_raw()).then_some(Self(socket))
    }

    /// What it has left of the kernel relay, if anything. To be taken once, before [`Predecessor::reach`].
    #[must_use]
    pub fn bequest(&self) -> Option<Bequest> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        fcntl(&self.0, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).ok()?;
        let mut letter = vec![0; LONGEST_LETTER];
        // It was sent before this process was started; from one that has left nothing there is nothing to read.
        let (length, descriptors) = sys::receive_with_descriptors(self.0.as_fd(), &mut letter).ok()?;
        letter.truncate(length);
        (length > 0).then_some(Bequest { letter, descriptors })
    }

    /// Its descriptor, which is not for the relay process.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Its end, to wait for and to talk to.
    ///
    /// # Errors
    /// When it is gone already.
    pub fn reach(self) -> anyhow::Result<(i32, Ending, Saying)> {
        let pid = getsockopt(&self.0, sockopt::PeerCredentials)?.pid();
        let pidfd = sys::pidfd_open(pid).context("the predecessor")?;
        let stream = std::os::unix::net::UnixStream::from(self.0);
        stream.set_nonblocking(true)?;
        Ok((pid, Ending(sys::watch(pidfd, Interest::READABLE)?), Saying(UnixStream::from_std(stream)?)))
    }
}

/// The end of a predecessor.
#[derive(Debug)]
pub struct Ending(AsyncFd<OwnedFd>);

impl Ending {
    /// Waits for it.
    pub async fn come(&self) {
        // An error would mean that the pidfd is no pidfd.
        self.0.readable().await.map(|mut guard| guard.retain_ready()).unwrap_or_default();
    }
}

/// The way to a predecessor.
#[derive(Debug)]
pub struct Saying(UnixStream);

impl Saying {
    /// Says that this process is ready, and waits until it has taken over. `None` when the predecessor ends without a word.
    pub async fn ready(&mut self) -> Option<Takeover> {
        self.0.write_all(&[READY]).await.ok()?;
        match self.0.read_u8().await.ok()? {
            byte if byte == Takeover::Awake.byte() => Some(Takeover::Awake),
            _ => Some(Takeover::Asleep),
        }
    }

    /// How many connections the predecessor and those before it have, when that has changed. `None` when it says no more.
    pub async fn connections(&mut self) -> Option<u64> {
        self.0.read_u64_le().await.ok()
    }
}

/// What this program is and how it was called, as it was at the start: an upgrade puts another file in its place.
#[derive(Debug, Clone)]
pub struct Program {
    path: PathBuf,
    words: Vec<OsString>,
}

impl Program {
    /// This one.
    ///
    /// # Errors
    /// When /proc does not tell.
    pub fn own() -> io::Result<Self> {
        Ok(Self { path: std::env::current_exe()?, words: std::env::args_os().collect() })
    }

    /// Starts a successor on `listeners`, and leaves it the kernel relay.
    ///
    /// # Errors
    /// When the program cannot be executed.
    pub fn start_successor(
        &self,
        listeners: &[&Listener],
        bequest: Option<&Bequest>,
    ) -> anyhow::Result<Successor> {
        let (ours, theirs) = UnixStream::pair()?;
        if let Some(Bequest { letter, descriptors }) = bequest {
            let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(OwnedFd::as_fd).collect();
            // Into an empty socket, so at once.
            sys::send_with_descriptors(ours.as_fd(), letter, &descriptors)?;
        }
        let theirs = theirs.into_std()?;
        theirs.set_nonblocking(false)?;
        let names: Vec<&str> = listeners.iter().map(|listener| listener.name.as_str()).collect();
        let mut descriptors: Vec<BorrowedFd<'_>> =
            listeners.iter().map(|listener| listener.socket.as_fd()).collect();
        descriptors.push(theirs.as_fd());
        let mut command = std::process::Command::new(&self.path);
        if let Some((name, arguments)) = self.words.split_first() {
            let _same = command.arg0(name).args(arguments);
        }
        let _same = command
            .env("LISTEN_FDS", listeners.len().to_string())
            .env("LISTEN_FDNAMES", names.join(":"))
            .env(VARIABLE, (crate::listen::FIRST as usize + listeners.len()).to_string());
        if std::env::var("WATCHDOG_PID").is_ok_and(|pid| pid.parse() == Ok(std::process::id())) {
            // The successor has to say that it is alive as well.
            let _same = command.env_remove("WATCHDOG_PID");
        }
        sys::pass_descriptors(&mut command, &descriptors)?;
        let child = command.spawn().with_context(|| format!("cannot execute {}", self.path.display()))?;
        Ok(Successor { child, channel: ours })
    }
}

/// A successor that has been started.
#[derive(Debug)]
pub struct Successor {
    child: std::process::Child,
    channel: UnixStream,
}

impl Successor {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it is ready; one that is not in time is ended.
    ///
    /// # Errors
    /// When it ended, or was ended.
    pub async fn ready(mut self) -> anyhow::Result<Self> {
        match tokio::time::timeout(PATIENCE, self.channel.read_u8()).await {
            Ok(Ok(READY)) => Ok(self),
            Ok(_) => {
                // Its end of the channel is closed when it ends, so this does not wait.
                let _killed = self.child.kill();
                bail!("the new program ended before it was ready: {}", self.child.wait()?)
            }
            Err(_) => {
                let _killed = self.child.kill();
                let _status = self.child.wait();
                bail!("the new program was not ready within {PATIENCE:?}")
            }
        }
    }

    /// Tells it that it has taken over.
    ///
    /// # Errors
    /// When it is gone.
    pub async fn take_over(mut self, takeover: Takeover) -> anyhow::Result<Telling> {
        ensure!(self.child.try_wait()?.is_none(), "the new program has ended");
        self.channel.write_all(&[takeover.byte()]).await?;
        Ok(Telling { channel: self.channel, told: None })
    }
}

/// The way to the successor that has taken over.
#[derive(Debug)]
pub struct Telling {
    channel: UnixStream,
    told: Option<u64>,
}

impl Telling {
    /// Says how many connections this process and those before it still have, if that has changed. One that does not listen misses
    /// nothing but this.
    pub fn connections(&mut self, count: u64) {
        // So few bytes are taken all or not at all; if not, there will be another try.
        if self.told != Some(count) && self.channel.try_write(&count.to_le_bytes()).is_ok() {
            self.told = Some(count);
        }
    }
}
