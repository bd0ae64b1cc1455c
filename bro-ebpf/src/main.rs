//! The programs of the kernel relay: `sk_msg` runs in a sender's `sendmsg` and decides where its bytes go, `sockops` finds
//! the senders, and a program that the forwarder runs itself hooks those that have to prove something first. Built for the kernel by `cargo xtask build-ebpf`; the decision itself is in the library.
//!
//! `sockops` and the hooking program can be traced (`programs/trace.rs`), which costs nothing while it is not asked for. `sk_msg`
//! cannot, by design: it runs with every message, and what it does is counted in the lane's record instead.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![allow(missing_docs, reason = "the macros of aya make public items without documentation")]

#[path = "programs/hook.rs"]
mod hook;
#[path = "programs/kernel.rs"]
mod kernel;
#[path = "programs/maps.rs"]
mod maps;
#[path = "programs/send.rs"]
mod send;
#[path = "programs/trace.rs"]
mod trace;
#[path = "programs/watch.rs"]
mod watch;

use aya_ebpf::macros::{classifier, sk_msg, sock_ops};
use aya_ebpf::programs::{SkMsgContext, SockOpsContext, TcContext};

/// A sender on this host sends a message.
#[sk_msg]
pub fn bro_send(ctx: SkMsgContext) -> u32 {
    send::message(ctx.msg)
}

/// Something happens to a TCP socket of the cgroup this is attached to.
#[sock_ops]
pub fn bro_watch(ctx: SockOpsContext) -> u32 {
    watch::event(ctx.ops);
    // 1 leaves the answer to the other programs of the cgroup.
    1
}

/// The forwarder has a client hooked that has proved to be a non-blocking one. Attached nowhere: the forwarder runs it (bpf(2)
/// BPF_PROG_TEST_RUN), since `sockops` may put a socket into a map only when it is established.
#[classifier]
pub fn bro_hook(ctx: TcContext) -> i32 {
    hook::request(ctx.skb.skb)
}

/// `bpf_probe_read_kernel` is for programs under the GPL or a licence compatible with it.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses programs that could get here.
    loop {}
}
