//! The programs of the fence, for the control group that sockets were made in which a container is given: systemd's listeners, and what is
//! accepted at them. The kernel runs them for these sockets, in whichever process has them (it goes by the socket's group, not by the
//! caller's). They know nothing of the kernel relay, and need none of its maps.
//!
//! `connect` and `bind` say no to all but the processes of that group itself, which is where systemd makes its listeners: such a socket has its
//! client, or listens, and a container that dissolves it (connect(2) with AF_UNSPEC) could lead it to any address of the host's network, or bind
//! it to another of the host's ports. The kernel asks for MSG_FASTOPEN too. `getpeername` and `getsockname` change what a service is told, by
//! accept(2) as well.
#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the macros of aya make public items without documentation")]

#[path = "fence/names.rs"]
mod names;

use aya_ebpf::Global;
use aya_ebpf::helpers::generated::bpf_get_current_cgroup_id;
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;

/// The control group whose processes may, by its number.
#[unsafe(no_mangle)]
static HOME: Global<u64> = Global::new(0);

/// The kernel returns EPERM.
const REFUSE: i32 = 0;
const LET: i32 = 1;

#[inline(always)]
fn at_home() -> i32 {
    // SAFETY: the helper has no arguments.
    if unsafe { bpf_get_current_cgroup_id() } == HOME.load() { LET } else { REFUSE }
}

#[cgroup_sock_addr(connect4)]
pub fn bro_connect4(_context: SockAddrContext) -> i32 {
    at_home()
}

#[cgroup_sock_addr(connect6)]
pub fn bro_connect6(_context: SockAddrContext) -> i32 {
    at_home()
}

#[cgroup_sock_addr(bind4)]
pub fn bro_bind4(_context: SockAddrContext) -> i32 {
    at_home()
}

#[cgroup_sock_addr(bind6)]
pub fn bro_bind6(_context: SockAddrContext) -> i32 {
    at_home()
}

#[cgroup_sock_addr(getpeername4)]
pub fn bro_getpeername4(context: SockAddrContext) -> i32 {
    names::peer4(context.sock_addr);
    LET
}

#[cgroup_sock_addr(getpeername6)]
pub fn bro_getpeername6(context: SockAddrContext) -> i32 {
    names::peer6(context.sock_addr);
    LET
}

#[cgroup_sock_addr(getsockname4)]
pub fn bro_getsockname4(context: SockAddrContext) -> i32 {
    names::port(context.sock_addr);
    LET
}

#[cgroup_sock_addr(getsockname6)]
pub fn bro_getsockname6(context: SockAddrContext) -> i32 {
    names::port(context.sock_addr);
    LET
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses programs that could get here.
    loop {}
}
