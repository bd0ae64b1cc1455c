//! A network namespace that stands for a container with `Network=none`: made by root or by an ordinary user, kept alive by one
//! helper process, gone with it.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context as _, Result, ensure};
use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrStorage, recv, recvmsg, send,
    socketpair,
};

use crate::bro;
use crate::peers::{Family, Place};

/// Who owns the namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// Root's namespaces belong to the machine, an ordinary user's to a user namespace in which that user is root (as podman does).
    Usual,
    /// A user namespace in which the user who runs the test is root, also when root runs it.
    UserNamespace,
    /// A user namespace in which the user who runs the test keeps their id (`--userns=keep-id`).
    KeepId,
}

/// The namespace, and the process that holds it.
#[derive(Debug)]
pub struct Namespace {
    holder: Child,
    owner: Owner,
    control: Mutex<OwnedFd>,
}

impl Namespace {
    /// A namespace with lo up.
    pub fn new() -> Result<Self> {
        Self::owned_by(Owner::Usual)
    }

    /// The same, for a certain kind of owner.
    pub fn owned_by(owner: Owner) -> Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let mut command = Command::new(bro::helper());
        command.arg("hold").stdin(Stdio::from(theirs));
        match owner {
            Owner::Usual => {}
            Owner::UserNamespace => drop(command.arg("user")),
            Owner::KeepId => drop(command.arg("self")),
        }
        let holder = command.spawn().context("starting the helper that holds a namespace")?;
        // From here on a failure must not leave the helper behind.
        let namespace = Self { holder, owner, control: Mutex::new(ours) };
        let mut answer = [0; 16];
        let control = namespace.control.lock().expect("no holder of this lock panics");
        let count = recv(control.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        ensure!(&answer[..count] == b"ready", "the namespace could not be made (its helper said why)");
        drop(control);
        Ok(namespace)
    }

    /// The process that holds the namespace: what `--pid` takes.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.holder.id().cast_signed()
    }

    /// The namespace as a file: what `--netns` takes.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new("/proc").join(self.pid().to_string()).join("ns/net")
    }

    /// A command line that runs a program inside, as the user who runs the test.
    #[must_use]
    pub fn enter(&self) -> Vec<String> {
        let mut words = vec!["nsenter".into(), format!("--target={}", self.pid()), "--net".into()];
        if self.owner != Owner::Usual || !nix::unistd::geteuid().is_root() {
            words.extend(["--user".into(), "--preserve-credentials".into()]);
        }
        words
    }

    /// Ends the namespace now: its process is gone afterwards, and every connection inside it with the last socket.
    pub fn destroy(self) {
        drop(self);
    }
}

impl Place for Namespace {
    fn socket(&self, family: Family) -> io::Result<OwnedFd> {
        self.ask(match family {
            Family::Tcp4 => b"4",
            Family::Tcp6 => b"6",
            Family::Unix => b"u",
            // Its ports belong to no network namespace.
            Family::Vsock => return family.socket(),
        })
    }
}

impl Namespace {
    /// A UDP socket made there.
    pub fn datagram_socket(&self, ipv6: bool) -> io::Result<OwnedFd> {
        self.ask(if ipv6 { b"e" } else { b"d" })
    }

    /// A unix socket for datagrams made there.
    pub fn unix_datagram_socket(&self) -> io::Result<OwnedFd> {
        self.ask(b"g")
    }

    fn ask(&self, request: &[u8; 1]) -> io::Result<OwnedFd> {
        let control = self.control.lock().expect("no holder of this lock panics");
        send(control.as_raw_fd(), request, MsgFlags::MSG_NOSIGNAL)?;
        let mut byte = [0];
        let mut parts = [IoSliceMut::new(&mut byte)];
        let mut space = cmsg_space!([RawFd; 1]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<SockaddrStorage>(control.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = part
                && let [raw] = fds[..]
            {
                // SAFETY: the kernel has just made this descriptor for us out of the message.
                return Ok(unsafe { OwnedFd::from_raw_fd(raw) });
            }
        }
        Err(io::Error::other("the namespace's helper is gone"))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.holder.kill().ok();
        self.holder.wait().ok();
    }
}

/// A network namespace bound to a file, as `ip netns add` leaves it. Only root can.
#[derive(Debug)]
pub struct Pinned(PathBuf);

impl Pinned {
    /// Binds `namespace` to the file `at`.
    pub fn new(namespace: &Namespace, at: PathBuf) -> Result<Self> {
        std::fs::File::create(&at)?;
        nix::mount::mount(
            Some(&namespace.path()),
            &at,
            None::<&str>,
            nix::mount::MsFlags::MS_BIND,
            None::<&str>,
        )?;
        Ok(Self(at))
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH).ok();
        std::fs::remove_file(&self.0).ok();
    }
}
