//! The options of a socket for datagrams, by what becomes of them at adoption (ip(7), ipv6(7), udp(7), socket(7)). All are put back after it: a service
//! sets most of them after bind(2), which is on systemd's own socket.

use nix::libc;

use crate::option_name::{Name, at};

/// What comes beside a datagram. The socket gets exactly what the service has, on and off: one that has no room for more would be told that something is
/// missing (MSG_CTRUNC).
pub const BESIDE: [Name; 10] = [
    at(libc::SOL_IP, libc::IP_PKTINFO),
    at(libc::SOL_IP, libc::IP_RECVTOS),
    at(libc::SOL_IP, libc::IP_RECVTTL),
    at(libc::SOL_IP, libc::IP_RECVERR),
    at(libc::SOL_IP, libc::IP_RECVORIGDSTADDR),
    at(libc::SOL_SOCKET, libc::SO_TIMESTAMP),
    at(libc::SOL_SOCKET, libc::SO_TIMESTAMPNS),
    at(libc::SOL_SOCKET, libc::SO_TIMESTAMPING),
    at(libc::SOL_SOCKET, libc::SO_RXQ_OVFL),
    at(libc::SOL_UDP, libc::UDP_GRO),
];

/// The same of IPv6.
pub const BESIDE_V6: [Name; 5] = [
    at(libc::SOL_IPV6, libc::IPV6_RECVPKTINFO),
    at(libc::SOL_IPV6, libc::IPV6_RECVHOPLIMIT),
    at(libc::SOL_IPV6, libc::IPV6_RECVTCLASS),
    at(libc::SOL_IPV6, libc::IPV6_RECVERR),
    at(libc::SOL_IPV6, libc::IPV6_RECVORIGDSTADDR),
];

/// What is carried over where the service has set it.
pub const CARRIED: [Name; 6] = [
    at(libc::SOL_SOCKET, libc::SO_BROADCAST),
    at(libc::SOL_SOCKET, libc::SO_PEEK_OFF),
    at(libc::SOL_IP, libc::IP_MULTICAST_TTL),
    at(libc::SOL_IP, libc::IP_MULTICAST_LOOP),
    at(libc::SOL_IP, libc::IP_MULTICAST_ALL),
    at(libc::SOL_UDP, libc::UDP_SEGMENT),
];

/// The same of IPv6.
pub const CARRIED_V6: [Name; 3] = [
    at(libc::SOL_IPV6, libc::IPV6_MULTICAST_HOPS),
    at(libc::SOL_IPV6, libc::IPV6_MULTICAST_LOOP),
    at(libc::SOL_IPV6, libc::IPV6_DONTFRAG),
];

/// What is only put back: interfaces, which are others in the container, and who else may have the port.
pub const PUT_BACK: [Name; 7] = [
    at(libc::SOL_SOCKET, libc::SO_REUSEADDR),
    at(libc::SOL_SOCKET, libc::SO_REUSEPORT),
    at(libc::SOL_SOCKET, libc::SO_DONTROUTE),
    at(libc::SOL_SOCKET, libc::SO_BINDTOIFINDEX),
    at(libc::SOL_SOCKET, libc::SO_MARK),
    at(libc::SOL_IP, libc::IP_MULTICAST_IF),
    at(libc::SOL_IP, libc::IP_FREEBIND),
];

/// The same of IPv6.
pub const PUT_BACK_V6: [Name; 1] = [at(libc::SOL_IPV6, libc::IPV6_MULTICAST_IF)];
