//! Sockets inside another network namespace: the forwarder's end of its [agent](bro_relay::netns::agent).

pub mod addresses;
pub mod agent_process;
pub mod sock_diag;

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use agent_process::{AgentProcess, SpareAgent};
use bro_relay::netns::identity::Identity;
use bro_relay::netns::wire::{Address, AgentAnswer, AgentRequest, TargetAddresses};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;

use crate::exit::Failure;

/// How long an agent may take for one answer. It only makes sockets; a longer silence is a fault.
const AGENT_LIMIT: Duration = Duration::from_secs(10);

/// How long an agent that has closed its channel may take to be gone: it closes the channel by ending.
const DYING: Duration = Duration::from_secs(1);

/// How long a container's process may take to execute its program, once its namespace is there.
const EXECUTING: Duration = Duration::from_secs(2);

/// The pause before that process's files are looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A network namespace that was entered: its agent is ended with this, at the latest.
#[derive(Debug)]
pub struct Namespace {
    /// One request at a time; the answer belongs to the last one.
    channel: Mutex<AsyncFd<OwnedFd>>,
    agent: Mutex<AgentProcess>,
}

/// The agent has ended: the administrator killed it, or the kernel for want of memory. Another one can be started.
#[derive(Debug, thiserror::Error)]
#[error("the process that makes sockets in the target's network namespace has ended{}", .0.map(|status| format!(" ({status})")).unwrap_or_default())]
pub struct AgentEnded(Option<std::process::ExitStatus>);

impl AgentEnded {
    /// Is it the cause of `error`?
    #[must_use]
    pub fn is_behind(error: &anyhow::Error) -> bool {
        let inner = |cause: &(dyn std::error::Error + 'static)| {
            cause.downcast_ref().and_then(io::Error::get_ref).is_some_and(|inner| inner.is::<Self>())
        };
        error.chain().any(inner)
    }
}

impl Namespace {
    /// Starts an agent in `netns`, or has the spare one go there; it connects to unix sockets as `identity`. `process` is the folder
    /// in /proc of the process with those ids, `root` is where its unix paths start.
    ///
    /// # Errors
    /// [`Failure::NotPermitted`] when this user may not enter it.
    pub async fn enter(
        netns: OwnedFd,
        process: OwnedFd,
        root: Option<OwnedFd>,
        identity: Identity,
        spare: &SpareAgent,
    ) -> anyhow::Result<Self> {
        let (agent, channel) = AgentProcess::start(spare)?;
        let namespace = Self { channel: Mutex::new(channel), agent: Mutex::new(agent) };
        let mut descriptors = vec![netns.as_fd(), process.as_fd()];
        descriptors.extend(root.as_ref().map(|root| root.as_fd()));
        match namespace.ask(&AgentRequest::Join(identity), &descriptors).await? {
            Ok(_) => Ok(namespace),
            Err(Errno::EPERM | Errno::EACCES) => Err(Failure::NotPermitted(
                "this user may not enter the target's network namespace: it belongs to another user (run bro as that \
                 user, or as root)"
                    .into(),
            )
            .into()),
            Err(errno) => anyhow::bail!("cannot enter the target's network namespace: {}", errno.desc()),
        }
    }

    /// The same for an agent that only makes sockets there, and connects to none over unix.
    ///
    /// # Errors
    /// As [`Namespace::enter`].
    pub async fn look_into(netns: OwnedFd) -> anyhow::Result<Self> {
        let process = folder_of(std::process::id())?;
        Self::enter(netns, process, None, Identity::default(), &SpareAgent::default()).await
    }

    /// Makes `count` sockets in the namespace, non-blocking.
    ///
    /// # Errors
    /// socket(2)'s, or the agent's end.
    pub async fn sockets(
        &self,
        domain: i32,
        kind: i32,
        protocol: i32,
        count: u8,
    ) -> io::Result<Vec<OwnedFd>> {
        let answer = self.ask(&AgentRequest::Sockets { domain, kind, protocol, count }, &[]).await?;
        answer.map_err(Into::into)
    }

    /// One socket.
    ///
    /// # Errors
    /// As [`Namespace::sockets`].
    pub async fn socket(&self, domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
        self.sockets(domain, kind, protocol, 1)
            .await?
            .pop()
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// Another channel to the same agent, for the relay to be connected to a target, non-blocking.
    ///
    /// # Errors
    /// The agent's end.
    pub async fn channel(&self, target: TargetAddresses) -> io::Result<OwnedFd> {
        let until = tokio::time::Instant::now() + EXECUTING;
        let request = AgentRequest::Channel(target);
        loop {
            let (ours, theirs) = pair()?;
            match self.ask(&request, &[theirs.as_fd()]).await? {
                Ok(_) => return Ok(ours),
                // The container's process has not executed its program yet: until then its files in /proc, which name its users,
                // may be the runtime's alone (ptrace(2), "Ptrace access mode checking").
                Err(Errno::EACCES) if tokio::time::Instant::now() < until => {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Gives the agent the program that hooks a sender of its namespace.
    ///
    /// # Errors
    /// The agent's end.
    pub async fn program(&self, hook: BorrowedFd<'_>) -> io::Result<()> {
        self.ask(&AgentRequest::Program, &[hook]).await??;
        Ok(())
    }

    /// Keeps the answers of a service at `target` in the namespace ([`bro_relay::netns::replies::keep`]).
    ///
    /// # Errors
    /// The agent's end; within, what [`bro_relay::netns::replies::keep`] says.
    pub async fn keep_replies(&self, target: Address) -> io::Result<nix::Result<()>> {
        Ok(self.ask(&AgentRequest::KeepReplies(target), &[]).await?.map(drop))
    }

    /// One connection to `address`, or why there is none.
    ///
    /// # Errors
    /// As [`Namespace::channel`].
    pub async fn dial(&self, address: Address) -> io::Result<AgentAnswer> {
        let channel =
            self.channel(TargetAddresses { addresses: vec![address], ..TargetAddresses::default() }).await?;
        AgentRequest::Dial(0, None).send(channel.as_fd(), &[])?;
        let channel = crate::sys::watch(channel, tokio::io::Interest::READABLE)?;
        let answered = channel
            .async_io(tokio::io::Interest::READABLE, |fd| bro_relay::netns::wire::receive_answer(fd.as_fd()));
        tokio::time::timeout(AGENT_LIMIT, answered)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Has the agent ended? That may be so and not be known yet: then a request fails with [`AgentEnded`].
    #[must_use]
    pub fn has_ended(&self) -> bool {
        // A task that holds it is waiting for the agent's end.
        self.agent.try_lock().is_ok_and(|mut agent| agent.has_ended())
    }

    async fn ask(&self, request: &AgentRequest, descriptors: &[BorrowedFd<'_>]) -> io::Result<AgentAnswer> {
        let exchange = async {
            let channel = self.channel.lock().await;
            channel
                .async_io(tokio::io::Interest::WRITABLE, |fd| request.send(fd.as_fd(), descriptors))
                .await?;
            channel
                .async_io(tokio::io::Interest::READABLE, |fd| {
                    bro_relay::netns::wire::receive_answer(fd.as_fd())
                })
                .await
        };
        let answered = tokio::time::timeout(AGENT_LIMIT, exchange).await;
        let answered = answered.unwrap_or_else(|_| {
            Err(io::Error::new(io::ErrorKind::TimedOut, "the namespace agent does not answer"))
        });
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        match answered {
            Err(error) if matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof) => {
                let ended = tokio::time::timeout(DYING, async { self.agent.lock().await.wait().await }).await;
                Err(io::Error::new(BrokenPipe, AgentEnded(ended.ok().and_then(Result::ok))))
            }
            answered => answered,
        }
    }
}

/// The folder of a process in /proc: it stays that process's, even if another process gets its number.
///
/// # Errors
/// open's, when there is no such process.
pub fn folder_of(pid: u32) -> io::Result<OwnedFd> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    let folder = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(format!("/proc/{pid}"))?;
    Ok(folder.into())
}

/// A socket pair: our end non-blocking, theirs blocking.
fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    let _zero = nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFL(flags))?;
    Ok((ours, theirs))
}

/// Where to make a socket: here or in another namespace.
#[derive(Debug, Clone)]
pub enum NetnsRef {
    /// The forwarder's own namespace.
    Own,
    /// An entered one.
    Entered(std::sync::Arc<Namespace>),
}

impl NetnsRef {
    /// One socket there.
    ///
    /// # Errors
    /// socket(2)'s, or the agent's end.
    pub async fn socket(&self, domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
        match self {
            Self::Own => bro_relay::sys::socket(domain, kind, protocol),
            Self::Entered(namespace) => namespace.socket(domain, kind, protocol).await,
        }
    }

    /// Is `address` one of the namespace's own, so that its table of listeners can show it?
    ///
    /// # Errors
    /// As [`NetnsRef::socket`].
    pub async fn is_local(&self, address: std::net::IpAddr) -> io::Result<bool> {
        if address.is_loopback() || address.is_unspecified() {
            return Ok(true);
        }
        let domain = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let probe = self.socket(domain, libc::SOCK_STREAM, 0).await?;
        let any_port = nix::sys::socket::SockaddrStorage::from(std::net::SocketAddr::new(address, 0));
        use std::os::fd::AsRawFd as _;
        Ok(nix::sys::socket::bind(probe.as_raw_fd(), &any_port) != Err(Errno::EADDRNOTAVAIL))
    }
}
