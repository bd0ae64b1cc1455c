//! What lets a service answer clients by their own addresses, in a namespace that has no way to them: what it sends to a client
//! from the port where it listens stays in the namespace, where the forwarder's end of the connection is.
//!
//! A rule for each target (ip-rule(8)), and one route in a table of bro's own. Nothing else in the namespace is led another way:
//! the rule is for TCP, from that address and port alone, and a socket that still looks for its own address has no port yet.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use netlink_packet_route::{AddressFamily, IpProtocol, RouteNetlinkMessage};
use nix::errno::Errno;
use nix::libc;

use super::netlink;
use crate::sys;

/// The routing table: “bro” in ASCII.
pub const TABLE: u32 = 0x0062_726f;

/// The rules' priority, before the main table's: “br” in ASCII.
pub const PRIORITY: u32 = 0x6272;

/// The maker of them, as `ip rule` and `ip route` show it (`proto 98`): “b” in ASCII.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(0x62);

/// The loopback interface, by its name and its index.
const LOOPBACK: (&str, u32) = ("lo", 1);

/// Keeps what a service at `target` answers in this namespace. What is there already, from before or from another forwarder, stays.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN over the namespace; EOPNOTSUPP where the kernel has no such rules.
pub fn keep(target: SocketAddr) -> nix::Result<()> {
    let socket = sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE);
    let socket = socket.map_err(|error| sys::errno_of(&error))?;
    add(&socket, RouteNetlinkMessage::NewRoute(route(target.ip())))?;
    add(&socket, RouteNetlinkMessage::NewRule(rule(target)))
}

/// Adds a rule or a route that may be there.
fn add(socket: &OwnedFd, what: RouteNetlinkMessage) -> nix::Result<()> {
    let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    match netlink::ask(socket, flags, what, |_| ()).map_err(|error| sys::errno_of(&error)) {
        Err(Errno::EEXIST) => Ok(()),
        added => added,
    }
}

const fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// To everywhere: here.
fn route(ip: IpAddr) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = family(ip);
    route.header.protocol = PROTOCOL;
    route.header.scope = RouteScope::Host;
    route.header.kind = RouteType::Local;
    route.attributes = vec![RouteAttribute::Oif(LOOPBACK.1), RouteAttribute::Table(TABLE)];
    route
}

/// What is sent from here, by TCP from `target`, looks in that table.
fn rule(target: SocketAddr) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family(target.ip());
    rule.header.src_len = if target.is_ipv4() { 32 } else { 128 };
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![
        RuleAttribute::Source(target.ip()),
        // What is sent from here looks as if it came in there (`fl4->flowi4_iif`).
        RuleAttribute::Iifname(LOOPBACK.0.into()),
        RuleAttribute::IpProtocol(IpProtocol::Tcp),
        RuleAttribute::SourcePortRange(RulePortRange { start: target.port(), end: target.port() }),
        RuleAttribute::Priority(PRIORITY),
        RuleAttribute::Protocol(PROTOCOL),
        RuleAttribute::Table(TABLE),
    ];
    rule
}
