//! Handing over to a successor (`systemctl reload`, after a package upgrade): the running forwarder starts the program anew with
//! the same command line and the same listening sockets. When the new one is ready, it is the service's main process, and the old
//! one finishes the connections it has, in the same cgroup. No client is refused meanwhile: both accept until the old one stops.
//!
//! The two talk over a socket pair; the successor finds its number in `BRO_HANDOVER`. The successor says that it is ready, and
//! hears that it has taken over, or that it is to stop because its predecessor was told to, or it sees its predecessor's end first.
//! After the takeover the predecessor says how many connections it still has, eight bytes each time; of a version that does not,
//! only that is known that it has not ended.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Child;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bro_relay::listener::Listener;
use bro_relay::sys;
use bro_sockmap::Bequest;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// The variable that names the descriptor of the successor's end.
const VARIABLE: &str = "BRO_HANDOVER";

/// How long a successor may take to be ready.
const SUCCESSOR_LIMIT: Duration = Duration::from_secs(30);

/// More than a letter about the kernel relay takes.
const LONGEST_LETTER: usize = 64 * 1024;

/// How long a successor that is not ready yet may take to hear that it is to stop.
const DEAF: Duration = Duration::from_secs(3);

/// What the successor says when it is ready.
const READY: u8 = b'R';

/// What the successor is told when it is to stop, not to take over.
const STOP: u8 = b'T';

/// What the successor is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SuccessorWord {
    /// It has taken over.
    TakenOver(SuccessorFinds),
    /// The predecessor was told to stop, and waits until the successor stops too.
    Stop,
}

/// What the successor is told when it has taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SuccessorFinds {
    /// The service is awake.
    Awake,
    /// It is asleep.
    Asleep,
}

impl SuccessorFinds {
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
    /// The predecessor that has started this process, if any. To be called first, like [`crate::systemd::listen_fds::take_passed`].
    #[must_use]
    pub fn take() -> Option<Self> {
        let number = std::env::var(VARIABLE).ok()?;
        sys::unset_environment(&[VARIABLE]);
        let socket = sys::adopt(number.parse().ok()?).ok()?;
        // A variable that is only left over leads to no such socket.
        let pid = getsockopt(&socket, sockopt::PeerCredentials).ok()?.pid();
        (pid == nix::unistd::getppid().as_raw()).then_some(Self(socket))
    }

    /// What it has left of the kernel relay, if anything. To be called once, before [`Predecessor::reach`].
    #[must_use]
    pub fn bequest(&self) -> Option<Bequest> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        fcntl(&self.0, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).ok()?;
        let mut letter = vec![0; LONGEST_LETTER];
        // It was sent before this process was started; a predecessor that has left nothing has sent nothing.
        let (length, descriptors) = sys::receive_with_descriptors(self.0.as_fd(), &mut letter).ok()?;
        letter.truncate(length);
        (length > 0).then_some(Bequest { letter, descriptors })
    }

    /// Its descriptor, which the relay process must not have.
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
        Ok((
            pid,
            Ending(crate::sys::watch(pidfd, Interest::READABLE)?),
            Saying(UnixStream::from_std(stream)?),
        ))
    }
}

/// The end of a predecessor.
#[derive(Debug)]
pub struct Ending(AsyncFd<OwnedFd>);

impl Ending {
    /// Waits for the end.
    pub async fn come(&self) {
        // An error would mean that the pidfd is no pidfd.
        self.0.readable().await.map(|mut guard| guard.retain_ready()).unwrap_or_default();
    }
}

/// The way to a predecessor.
#[derive(Debug)]
pub struct Saying(UnixStream);

impl Saying {
    /// Says that this process is ready, and waits for what comes of that. `None` when the predecessor ends without a word.
    pub async fn ready(&mut self) -> Option<SuccessorWord> {
        // The predecessor may have ended after a word.
        drop(self.0.write_all(&[READY]).await);
        match self.0.read_u8().await.ok()? {
            STOP => Some(SuccessorWord::Stop),
            byte if byte == SuccessorFinds::Awake.byte() => {
                Some(SuccessorWord::TakenOver(SuccessorFinds::Awake))
            }
            _ => Some(SuccessorWord::TakenOver(SuccessorFinds::Asleep)),
        }
    }

    /// How many connections the predecessor and those before it have, when that has changed. `None` when it says no more.
    pub async fn connections(&mut self) -> Option<u64> {
        self.0.read_u64_le().await.ok()
    }
}

/// This program and how it was called, as it was at the start: an upgrade puts another file in its place.
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

    /// Starts a successor on `listeners`, passes it `more` by name, and leaves it the kernel relay.
    ///
    /// # Errors
    /// When the program cannot be executed.
    pub fn start_successor(
        &self,
        listeners: &[&Listener],
        more: &[(&'static str, OwnedFd)],
        bequest: Option<&Bequest>,
    ) -> anyhow::Result<(Successor, Stopper)> {
        let (ours, theirs) = UnixStream::pair()?;
        if let Some(Bequest { letter, descriptors }) = bequest {
            let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(OwnedFd::as_fd).collect();
            // The socket is empty, so this does not wait.
            sys::send_with_descriptors(ours.as_fd(), letter, &descriptors)?;
        }
        let theirs = theirs.into_std()?;
        theirs.set_nonblocking(false)?;
        let passed = listeners.iter().map(|listener| (listener.name.as_str(), listener.socket.as_fd()));
        let passed = passed.chain(more.iter().map(|(name, descriptor)| (*name, descriptor.as_fd())));
        let (names, mut descriptors): (Vec<&str>, Vec<BorrowedFd<'_>>) = passed.unzip();
        descriptors.push(theirs.as_fd());
        let mut command = std::process::Command::new(&self.path);
        if let Some((name, arguments)) = self.words.split_first() {
            command.arg0(name).args(arguments);
        }
        command
            .env("LISTEN_FDS", names.len().to_string())
            .env("LISTEN_FDNAMES", names.join(":"))
            .env(VARIABLE, (crate::systemd::listen_fds::FIRST as usize + names.len()).to_string());
        if std::env::var("WATCHDOG_PID").is_ok_and(|pid| pid.parse() == Ok(std::process::id())) {
            // The successor also has to report that it is alive.
            command.env_remove("WATCHDOG_PID");
        }
        sys::pass_descriptors(&mut command, &descriptors)?;
        let child = command.spawn().with_context(|| format!("cannot execute {}", self.path.display()))?;
        let (stopper, stops) = unbounded_channel();
        Ok((Successor { child: Started(Some(child)), channel: ours, stops }, Stopper(stopper)))
    }
}

/// A successor's process, which ends with this unless it was let go: no other process knows of it.
#[derive(Debug)]
struct Started(Option<Child>);

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _killed = child.kill();
            let _status = child.wait();
        }
    }
}

/// A successor that has been started.
#[derive(Debug)]
pub struct Successor {
    child: Started,
    channel: UnixStream,
    stops: UnboundedReceiver<Duration>,
}

/// Stops a successor that has not taken over.
#[derive(Debug)]
pub struct Stopper(UnboundedSender<Duration>);

impl Stopper {
    /// Makes it let its clients finish, and end within `limit`; when called again, at once.
    pub fn stop(&self, limit: Duration) {
        // It may have ended meanwhile.
        self.0.send(limit).ok();
    }
}

/// What has become of a successor.
#[derive(Debug)]
pub enum Born {
    /// It is ready.
    Ready(Successor),
    /// It was stopped, and has ended.
    Stopped,
}

impl Successor {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.0.as_ref().map_or(0, Child::id)
    }

    /// Waits until it is ready, or stopped; a successor that is too slow is ended.
    ///
    /// # Errors
    /// When it ended, or was ended.
    pub async fn ready(mut self) -> anyhow::Result<Born> {
        let said = tokio::select! {
            said = tokio::time::timeout(SUCCESSOR_LIMIT, self.channel.read_u8()) => said,
            Some(limit) = self.stops.recv() => {
                self.stop(limit, false).await;
                return Ok(Born::Stopped);
            }
        };
        match (said, self.child.0.take()) {
            (Ok(Ok(READY)), child) => {
                self.child.0 = child;
                Ok(Born::Ready(self))
            }
            (Ok(_), Some(mut child)) => {
                // Its end of the channel is closed when it ends, so this does not wait.
                let _killed = child.kill();
                bail!("the new program ended before it was ready: {}", child.wait()?)
            }
            (_, child) => {
                drop(Started(child));
                bail!("the new program was not ready within {SUCCESSOR_LIMIT:?}")
            }
        }
    }

    /// For a successor that was ready when it was told to stop: waits until it has.
    pub async fn stopped(mut self) {
        if let Some(limit) = self.stops.recv().await {
            self.stop(limit, true).await;
        }
    }

    /// Tells it to stop, and waits for that. It may have clients once it is ready, since it accepts beside its predecessor; before
    /// that, it does not listen on this channel.
    async fn stop(mut self, limit: Duration, ready: bool) {
        let pid = self.pid().cast_signed();
        let Ok(Ok(ended)) = sys::pidfd_open(pid).map(|pidfd| crate::sys::watch(pidfd, Interest::READABLE))
        else {
            return;
        };
        let (ended, mut speaks, mut told_again) = (Ending(ended), !ready, true);
        let deadline = tokio::time::sleep(if ready { limit } else { limit.min(DEAF) });
        tokio::pin!(deadline);
        if ready {
            // A successor that is gone has stopped.
            drop(self.channel.write_all(&[STOP]).await);
        }
        loop {
            tokio::select! {
                () = ended.come() => return,
                () = &mut deadline => {
                    return tracing::warn!("process {pid}, the successor that was being started, does not stop; it is killed");
                }
                said = self.channel.read_u8(), if speaks => {
                    speaks = false;
                    if said.is_ok_and(|said| said == READY) {
                        deadline.as_mut().reset(tokio::time::Instant::now() + limit);
                        drop(self.channel.write_all(&[STOP]).await);
                    }
                }
                again = self.stops.recv(), if told_again => {
                    told_again = again.is_some();
                    if told_again {
                        // It is not reaped yet, so the id is still its own.
                        kill(Pid::from_raw(pid), Signal::SIGTERM).ok();
                    }
                }
            }
        }
    }

    /// Tells it that it has taken over.
    ///
    /// # Errors
    /// When it is gone.
    pub async fn take_over(self, takeover: SuccessorFinds) -> anyhow::Result<Telling> {
        let Self { mut child, mut channel, .. } = self;
        if let Some(child) = &mut child.0 {
            ensure!(child.try_wait()?.is_none(), "the new program has ended");
        }
        channel.write_all(&[takeover.byte()]).await?;
        // From now on it does not end with this one.
        drop(child.0.take());
        Ok(Telling { channel, told: None })
    }
}

/// The way to the successor that has taken over.
#[derive(Debug)]
pub struct Telling {
    channel: UnixStream,
    told: Option<u64>,
}

impl Telling {
    /// Says how many connections this process and those before it still have, if that has changed. A successor that does not listen
    /// misses nothing else.
    pub fn connections(&mut self, count: u64) {
        // So few bytes are written all or not at all; if not, there will be another try.
        if self.told != Some(count) && self.channel.try_write(&count.to_le_bytes()).is_ok() {
            self.told = Some(count);
        }
    }
}
