//! What a service is told of its sockets: no client of this host's loopback interface is seen by a loopback address, and the external port
//! as the internal one.

use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::Global;
use aya_ebpf::bindings::bpf_sock_addr;

/// The port that systemd listens at, and the one that the service means to, both in network byte order.
#[unsafe(no_mangle)]
static EXTERNAL: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static INTERNAL: Global<u32> = Global::new(0);

/// By which a forwarder shows them too, in network byte order. The loader says which.
#[unsafe(no_mangle)]
static THIS_HOST_V4: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static THIS_HOST_V6: Global<[u32; 4]> = Global::new([0; 4]);

/// The 32 bits before an IPv4 address that stands for one in an IPv6 socket.
const MAPPED: u32 = 0xffff_u32.to_be();

#[inline(always)]
fn is_loopback(v4: u32) -> bool {
    v4.to_ne_bytes()[0] == 127
}

/// Word by word and volatile: the kernel lets a program have each field of this context by itself alone.
macro_rules! get {
    ($address:expr, $($field:tt)+) => {{
        // SAFETY: the context is the kernel's own, and the verifier checks the field.
        let field = unsafe { &raw const (*$address).$($field)+ };
        // SAFETY: as above.
        unsafe { read_volatile(field) }
    }};
}

macro_rules! set {
    ($value:expr, $address:expr, $($field:tt)+) => {{
        // SAFETY: the context is the kernel's own, and the verifier checks the field.
        let field = unsafe { &raw mut (*$address).$($field)+ };
        // SAFETY: as above.
        unsafe { write_volatile(field, $value) }
    }};
}

#[inline(always)]
pub fn peer4(address: *mut bpf_sock_addr) {
    if is_loopback(get!(address, user_ip4)) {
        set!(THIS_HOST_V4.load(), address, user_ip4);
    }
}

#[inline(always)]
pub fn peer6(address: *mut bpf_sock_addr) {
    let first = get!(address, user_ip6[0]) | get!(address, user_ip6[1]);
    let (third, last) = (get!(address, user_ip6[2]), get!(address, user_ip6[3]));
    if first != 0 {
        return;
    }
    if third == MAPPED && is_loopback(last) {
        set!(THIS_HOST_V4.load(), address, user_ip6[3]);
    } else if third == 0 && last == 1_u32.to_be() {
        let [one, two, three, four] = THIS_HOST_V6.load();
        set!(one, address, user_ip6[0]);
        set!(two, address, user_ip6[1]);
        set!(three, address, user_ip6[2]);
        set!(four, address, user_ip6[3]);
    }
}

#[inline(always)]
pub fn port(address: *mut bpf_sock_addr) {
    if get!(address, user_port) == EXTERNAL.load() {
        set!(INTERNAL.load(), address, user_port);
    }
}
