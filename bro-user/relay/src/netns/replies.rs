//! What lets a service answer clients by their own addresses, in a namespace that has no way to them: what it sends to a client
//! from the port where it listens stays in the namespace, where the forwarder's end of the connection is.
//!
//! A rule for each target (ip-rule(8)), and one route in a table of bro's own. Nothing else in the namespace is led another way:
//! the rule is for TCP, from that address and port alone, and a socket that still looks for its own address has no port yet.
//!
//! A UDP service that is bound to every address has none of its own when it answers, so that rule is by port alone, and its route
//! names the address that the answer is to come from: a table for each port. Another rule is for what the kernel itself answers
//! where nothing is bound (“port unreachable”), and for no other message.

use std::net::IpAddr;
use std::os::fd::OwnedFd;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use netlink_packet_route::{AddressFamily, IpProtocol, RouteNetlinkMessage};
use nix::errno::Errno;
use nix::libc;

use super::netlink;
use super::wire::Address;
use crate::sys;

/// The routing table: “bro” in ASCII.
pub const TABLE: u32 = 0x0062_726f;

/// The tables of UDP targets, one for each port: “br” in ASCII, and the port.
pub const UDP_TABLES: u32 = 0x6272_0000;

/// The rules' priority, before the main table's: “br” in ASCII.
pub const PRIORITY: u32 = 0x6272;

/// The maker of them, as `ip rule` and `ip route` show it (`proto 98`): “b” in ASCII.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(0x62);

/// The loopback interface, by its name and its index.
const LOOPBACK: (&str, u32) = ("lo", 1);

/// Keeps what a service at `target` answers in this namespace. What is there already, from before or from another forwarder, stays.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN over the namespace; EOPNOTSUPP where the kernel has no such rules; EINVAL for a unix socket.
pub fn keep(target: &Address) -> nix::Result<()> {
    let socket = sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE);
    let socket = socket.map_err(|error| sys::errno_of(&error))?;
    match target {
        Address::Tcp(target) => {
            add(&socket, RouteNetlinkMessage::NewRoute(route(target.ip(), TABLE, None)))?;
            let from = Some(target.ip());
            let ports = RuleAttribute::SourcePortRange(range(target.port()));
            add(&socket, RouteNetlinkMessage::NewRule(rule(target.ip(), from, IpProtocol::Tcp, ports, TABLE)))
        }
        Address::Udp(target) => {
            let (ip, table) = (target.ip(), UDP_TABLES | u32::from(target.port()));
            add(&socket, RouteNetlinkMessage::NewRoute(route(ip, table, Some(ip))))?;
            let ports = RuleAttribute::SourcePortRange(range(target.port()));
            add(&socket, RouteNetlinkMessage::NewRule(rule(ip, None, IpProtocol::Udp, ports, table)))?;
            // The kernel looks its own messages up by type and code, where others have the destination's port (`flowi_uli`).
            let (protocol, kind) = if ip.is_ipv4() {
                (IpProtocol::Icmp, 0x0303)
            } else {
                (IpProtocol::Other(libc::IPPROTO_ICMPV6), 0x0104)
            };
            let unreachable = RuleAttribute::DestinationPortRange(range(kind));
            add(&socket, RouteNetlinkMessage::NewRule(rule(ip, Some(ip), protocol, unreachable, table)))
        }
        Address::Unix(_) | Address::Abstract(_) | Address::Inside(_) | Address::Datagrams(_) => {
            Err(Errno::EINVAL)
        }
    }
}

const fn range(port: u16) -> RulePortRange {
    RulePortRange { start: port, end: port }
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

/// To everywhere: here; as `own`, where a socket has no address.
fn route(ip: IpAddr, table: u32, own: Option<IpAddr>) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = family(ip);
    route.header.protocol = PROTOCOL;
    route.header.scope = RouteScope::Host;
    route.header.kind = RouteType::Local;
    route.attributes = vec![RouteAttribute::Oif(LOOPBACK.1), RouteAttribute::Table(table)];
    route.attributes.extend(own.map(|own| RouteAttribute::PrefSource(own.into())));
    route
}

/// What is sent from here over `protocol`, from `from` if that is given, and with these ports, looks in that table.
fn rule(
    family_of: IpAddr,
    from: Option<IpAddr>,
    protocol: IpProtocol,
    ports: RuleAttribute,
    table: u32,
) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family(family_of);
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![
        // What is sent from here looks as if it came in there (`fl4->flowi4_iif`).
        RuleAttribute::Iifname(LOOPBACK.0.into()),
        RuleAttribute::IpProtocol(protocol),
        ports,
        RuleAttribute::Priority(PRIORITY),
        RuleAttribute::Protocol(PROTOCOL),
        RuleAttribute::Table(table),
    ];
    if let Some(from) = from {
        rule.header.src_len = if from.is_ipv4() { 32 } else { 128 };
        rule.attributes.push(RuleAttribute::Source(from));
    }
    rule
}
