//! What an OCI runtime does for a container with bro's seccomp profile: from the host it connects to the socket at `listenerPath`,
//! and in the container it puts the filter up, sends the notification descriptor, and becomes the container's program.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use anyhow::{Context as _, Result};
use bro_adopt::Call;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};

/// Passed to bro beside the sockets for clients, under this name.
pub const SECCOMP: &str = "seccomp";

/// The socket at `listenerPath`, as systemd holds it. It has an abstract name, not a path, so that nothing of it is left behind.
pub struct ListenerPath {
    socket: UnixListener,
    /// For [`Runtime::connect`].
    pub name: String,
}

impl ListenerPath {
    /// For what is passed with the socket of this port, of which there is one on this host.
    pub fn listen(port: u16) -> Result<Self> {
        let name = format!("bro-xtask-seccomp-{port}");
        let socket = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name)?)
            .context("cannot listen for an OCI runtime")?;
        Ok(Self { socket, name })
    }

    /// To pass on.
    pub fn passed(&self) -> Result<OwnedFd> {
        Ok(self.socket.try_clone()?.into())
    }
}

/// A runtime at work, between its connection to `listenerPath` and the container's program.
pub struct Runtime(UnixStream);

impl Runtime {
    /// On the host, whose network namespace the name belongs to.
    pub fn connect(listener_path: &str) -> Result<Self> {
        let connected =
            SocketAddr::from_abstract_name(listener_path).and_then(|at| UnixStream::connect_addr(&at));
        Ok(Self(connected.context("nothing answers at listenerPath")?))
    }

    /// In the container: from here on this process, and what it becomes, waits in each listen(2) for bro's answer.
    pub fn notify(self) -> Result<()> {
        let notify = install_filter().map_err(refused)?;
        let pid = std::process::id();
        let state = serde_json::json!({"ociVersion": "1.0", "fds": ["seccompFd"], "pid": pid,
            "state": {"ociVersion": "1.0", "id": "xtask", "status": "creating", "pid": pid, "bundle": "/"}});
        let rights = [notify.as_raw_fd()];
        let (text, flags) = (state.to_string(), MsgFlags::empty());
        let (parts, rights) = ([IoSlice::new(text.as_bytes())], [ControlMessage::ScmRights(&rights)]);
        sendmsg::<SockaddrStorage>(self.0.as_raw_fd(), &parts, &rights, flags, None)
            .context("sending the notification descriptor")?;
        Ok(())
    }
}

/// Has this process, and what it becomes, pass the same filter at each call, of which nothing is notified.
///
/// # Errors
/// Where the kernel has no seccomp filters.
pub fn only_filter() -> Result<()> {
    install(&mut filter(libc::SECCOMP_RET_ALLOW), 0).map(drop).map_err(refused)
}

/// One sentence: what the host lacks or refuses.
fn refused(error: io::Error) -> anyhow::Error {
    let why = match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
        Errno::EINVAL | Errno::ENOSYS => {
            "this kernel has no seccomp notifications (CONFIG_SECCOMP_FILTER, Linux 5.9)"
        }
        Errno::EBUSY => {
            "this task itself runs under a seccomp profile that notifies, and the kernel allows no second one"
        }
        _ => "this host does not let a program have a seccomp filter that notifies",
    };
    anyhow::Error::new(error).context(why)
}

/// What [`bro_adopt::profile`] has an OCI runtime put up, without what a distribution's profile refuses: bind(2), listen(2), and shutdown(2) other
/// than SHUT_WR are notified, all else is allowed (seccomp(2), SECCOMP_FILTER_FLAG_NEW_LISTENER).
fn install_filter() -> io::Result<OwnedFd> {
    const NEW_LISTENER: libc::c_ulong = 1 << 3;
    /// Linux 5.19; it spares a program EINTR when a signal comes while bro answers.
    const WAIT_KILLABLE: libc::c_ulong = 1 << 5;
    let mut filter = filter(libc::SECCOMP_RET_USER_NOTIF);
    let made = install(&mut filter, NEW_LISTENER | WAIT_KILLABLE)
        .or_else(|_older_kernel| install(&mut filter, NEW_LISTENER))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

/// The filter, with the answer to the calls that it picks out.
fn filter(picked_out: u32) -> [libc::sock_filter; 8] {
    let step = |code: u32, then: u8, or: u8, value: u32| libc::sock_filter {
        code: code as u16,
        jt: then,
        jf: or,
        k: value,
    };
    let load = |at: u32| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, at);
    let equal = |value: u32, then, or| step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, then, or, value);
    let answer = |value: u32| step(libc::BPF_RET | libc::BPF_K, 0, 0, value);
    // struct seccomp_data has the number at 0, and at 24 the lower half of the second argument. This program and what it becomes make
    // calls of one architecture only.
    [
        load(0),
        equal(Call::Bind.number() as u32, 4, 0),
        equal(Call::Listen.number() as u32, 3, 0),
        equal(Call::Shutdown.number() as u32, 0, 3),
        load(24),
        equal(libc::SHUT_WR as u32, 1, 0),
        answer(picked_out),
        answer(libc::SECCOMP_RET_ALLOW),
    ]
}

/// Puts a filter up; what the kernel answers, which is a descriptor where that was asked for.
fn install(program: &mut [libc::sock_filter], flags: libc::c_ulong) -> io::Result<libc::c_int> {
    let program = libc::sock_fprog { len: program.len() as libc::c_ushort, filter: program.as_mut_ptr() };
    // Without it only root may have a filter.
    nix::sys::prctl::set_no_new_privs()?;
    // SAFETY: the kernel reads the program, which outlives the call.
    let made =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if made < 0 { Err(io::Error::last_os_error()) } else { Ok(made as libc::c_int) }
}
