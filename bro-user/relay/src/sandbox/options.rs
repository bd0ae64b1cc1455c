//! The options of sockets that the relay process may set and ask for (setsockopt(2), getsockopt(2)), by level and name. No other:
//! the user that has made a user namespace has every capability in it without holding one (`cap_capable`), and the forwarder's user
//! has made a rootless container's. So the kernel would let this process mark and repair the container's connections and rewrite
//! its netfilter tables. And a filter that is put on a listener is systemd's listener's too, for it is the same socket.
//!
//! What the engine or the kernel relay comes to need is added here; the tests of the sandbox show that the rest is refused.

use nix::libc;

/// A level and a name.
pub type Option = (i32, i32);

/// A host-wide limit may be in the way of the kernel relay ([`bro_sockmap::Lane`]).
const TCP_NOTSENT_LOWAT: i32 = 25;
/// How full a send buffer is.
const SO_MEMINFO: i32 = 55;
/// Which namespace a socket is in.
const SO_NETNS_COOKIE: i32 = 71;

/// Whether descriptors may be passed to a unix socket; and what comes with each message to it besides.
const SO_PASSRIGHTS: i32 = 83;
const SO_PASSPIDFD: i32 = 76;

/// What may be set.
pub const SET: &[Option] = &[
    (libc::SOL_SOCKET, libc::SO_LINGER),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE),
    (libc::SOL_SOCKET, libc::SO_OOBINLINE),
    (libc::SOL_SOCKET, libc::SO_RCVLOWAT),
    (libc::SOL_SOCKET, SO_PASSRIGHTS),
    (libc::SOL_SOCKET, libc::SO_PASSCRED),
    (libc::SOL_SOCKET, libc::SO_PASSSEC),
    (libc::SOL_SOCKET, SO_PASSPIDFD),
    (libc::IPPROTO_IP, libc::IP_TOS),
    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    (libc::SOL_UDP, libc::UDP_SEGMENT),
    (libc::IPPROTO_TCP, libc::TCP_NODELAY),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT),
    (libc::IPPROTO_TCP, libc::TCP_CONGESTION),
    (libc::IPPROTO_TCP, TCP_NOTSENT_LOWAT),
];

/// What may be asked for.
pub const GET: &[Option] = &[
    (libc::SOL_SOCKET, libc::SO_ERROR),
    (libc::SOL_SOCKET, libc::SO_PEERCRED),
    (libc::SOL_SOCKET, libc::SO_TYPE),
    (libc::SOL_SOCKET, SO_PASSRIGHTS),
    (libc::SOL_SOCKET, SO_MEMINFO),
    (libc::SOL_SOCKET, SO_NETNS_COOKIE),
    (libc::IPPROTO_TCP, libc::TCP_INFO),
];
