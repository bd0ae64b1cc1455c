//! Whether this kernel has a loopback for vsock(7), which is how clients of the same machine come over it.

use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::Result;
use nix::libc::{VMADDR_CID_ANY, VMADDR_CID_LOCAL, VMADDR_PORT_ANY};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, VsockAddr};

use crate::tier;

/// Is there one? A socket can be bound to its address only then; nothing is sent for that, which a hypervisor would get.
#[must_use]
pub fn has_loopback() -> bool {
    listener(SockType::Stream, VMADDR_CID_LOCAL).is_ok()
}

/// True where there is one. Else says that `test` is left out.
#[must_use]
pub fn met(test: &str) -> bool {
    let there = has_loopback();
    if !there {
        tier::lacks(
            test,
            "this kernel has no vsock loopback: run `sudo modprobe vsock_loopback` (CONFIG_VSOCKETS_LOOPBACK)",
        );
    }
    there
}

/// Listens at a port of the kernel's choice.
pub fn listener(kind: SockType, cid: u32) -> Result<OwnedFd> {
    let socket = socket::socket(AddressFamily::Vsock, kind, SockFlag::SOCK_CLOEXEC, None)?;
    socket::bind(socket.as_raw_fd(), &VsockAddr::new(cid, VMADDR_PORT_ANY))?;
    socket::listen(&socket, Backlog::new(16)?)?;
    Ok(socket)
}

/// The same of every address of this machine, as `ListenStream=vsock::PORT` has it.
pub fn any(kind: SockType) -> Result<OwnedFd> {
    listener(kind, VMADDR_CID_ANY)
}
