//! A socket for datagrams in the kernel's table: of its clients that knows nothing.

use std::os::fd::BorrowedFd;

use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};

use super::Uncountable;
use crate::socket::{self, Place};

/// Was it shut down, for receiving or for sending?
///
/// # Errors
/// [`Uncountable`].
pub fn is_shut_down(socket: BorrowedFd<'_>) -> Result<bool, Uncountable> {
    let (Some(Place::Udp(address)), cookie) = (Place::of(socket), socket::cookie(socket)?) else {
        return Ok(false);
    };
    let (family, any) =
        if address.is_ipv4() { (AF_INET, SocketId::new_v4()) } else { (AF_INET6, SocketId::new_v6()) };
    let request = InetRequest {
        family,
        protocol: IPPROTO_UDP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id: SocketId { source_port: address.port(), ..any },
    };
    let mut found = false;
    super::dump(&super::table(&[socket])?, SockDiagMessage::InetRequest(request), |answer| {
        if let SockDiagMessage::InetResponse(response) = answer
            && u64::from_ne_bytes(response.header.socket_id.cookie) == cookie
        {
            found |= response.nlas.iter().any(|nla| matches!(nla, Nla::Shutdown(how) if *how != 0));
        }
    })?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd as _, AsRawFd as _};

    use nix::sys::socket::{Shutdown, shutdown};

    use super::*;

    #[test]
    fn a_direction_that_was_shut_down_is_told_of() {
        for how in [Shutdown::Read, Shutdown::Write] {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            match is_shut_down(socket.as_fd()) {
                Ok(false) => {}
                Ok(true) => panic!("nothing was shut down"),
                // A kernel without that table.
                Err(Uncountable::Table(error)) if error.raw_os_error() == Some(nix::libc::ENOENT) => return,
                Err(error) => panic!("{error}"),
            }
            shutdown(socket.as_raw_fd(), how).unwrap_err();
            assert!(is_shut_down(socket.as_fd()).unwrap(), "{how:?}");
        }
    }
}
