//! What the kernel relay takes for granted of the running kernel, fact by fact. A kernel on which one of these fails is a kernel
//! on which the relay would lose bytes, hang a service or leak: better here than there.
//!
//! Needs: root, kernel BTF, bpftool, ip. Takes: seconds.

mod attaching;
mod credit;
mod hooking;
#[path = "../kernel_relay/mod.rs"]
mod kernel_relay;
mod letting_go;
mod order;
mod signals;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bro_ebpf::MESSAGE_OVERHEAD;
use bro_sockmap::{
    Config, Event, Kernel, LaneRefused, Reason, SenderKind, SenderRole, Unavailable, netns_cookie,
    send_memory,
};
use bro_tests::require;
use bro_tests::tier::Need;
use nix::libc;
use nix::poll::PollFlags;
use nix::sys::socket::{self, MsgFlags};

use kernel_relay::content::Stream;
use kernel_relay::{Bench, LIMIT, await_poll, connect_nonblocking, pair, receive, receive_end, send};

const CONFIG: Config = Config { connections: 16, hook_blocking: false, bear_fionread: true, trace: false };
const BPFTOOL: Need = Need::Program("bpftool", "bpftool");

/// Runs in a network namespace of its own, with lo up. The thread ends with it, so nothing else ever runs there.
fn in_a_namespace(test: impl FnOnce() -> Result<()> + Send) {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
            bro_tests::sys::loopback_up()?;
            test()
        });
        inside.join().expect("the thread ends by itself").unwrap();
    });
}

fn set_listener_option(socket: &TcpListener, level: i32, name: i32, value: i32) -> std::io::Result<()> {
    let length = size_of::<i32>() as libc::socklen_t;
    let pointer = (&raw const value).cast();
    // SAFETY: the pointer is to `length` readable bytes.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, pointer, length) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
