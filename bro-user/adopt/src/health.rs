//! Is systemd's listener as systemd made it? A container that had it before can have broken it: connect(2) with AF_UNSPEC ends its listening for
//! good, and a filter that is locked takes no client any more.

use std::os::fd::BorrowedFd;

use nix::libc;

use crate::{datagrams, socket, sys};

/// What is wrong with a listener. Its socket unit has to be started anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// SO_ACCEPTCONN is off.
    #[error("it does not listen any more")]
    NotListening,
    /// It has a peer, and so no datagrams of any other.
    #[error("it is connected to one client")]
    Connected,
    /// shutdown(2), of a socket for datagrams.
    #[error("it was shut down")]
    ShutDown,
    /// SO_ATTACH_FILTER.
    #[error("a filter is attached to it")]
    Filtered,
    /// SO_LOCK_FILTER: whatever filter it has or lacks, it stays so.
    #[error("its filter is locked")]
    Locked,
}

/// Looks (socket(7)).
///
/// # Errors
/// What is wrong.
pub fn check(listener: BorrowedFd<'_>) -> Result<(), Damage> {
    let number = |name| socket::number(listener, libc::SOL_SOCKET, name);
    if number(libc::SO_TYPE).is_ok_and(|kind| kind == libc::SOCK_DGRAM) {
        if datagrams::is_connected(listener) {
            return Err(Damage::Connected);
        }
        if datagrams::is_shut_down(listener) {
            return Err(Damage::ShutDown);
        }
    } else if number(libc::SO_ACCEPTCONN).unwrap_or(0) == 0 {
        return Err(Damage::NotListening);
    }
    // SO_GET_FILTER answers with how many instructions there are, where there is no room for one, and with EACCES of a filter that is no
    // classic one (`sk_get_filter`).
    match sys::option(listener, libc::SOL_SOCKET, libc::SO_GET_FILTER, &mut []) {
        Ok(0) => {}
        Err(error) if error.raw_os_error() != Some(libc::EACCES) => {}
        Ok(_) | Err(_) => return Err(Damage::Filtered),
    }
    if number(libc::SO_LOCK_FILTER).unwrap_or(0) != 0 {
        return Err(Damage::Locked);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd as _, AsRawFd as _};

    use super::*;

    #[test]
    fn damage_is_found() {
        let listener = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(check(listener().as_fd()), Ok(()));
        let shut = listener();
        nix::sys::socket::shutdown(shut.as_raw_fd(), nix::sys::socket::Shutdown::Both).unwrap();
        assert_eq!(check(shut.as_fd()), Err(Damage::NotListening));
        let datagrams = || std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let (whole, connected, shut) = (datagrams(), datagrams(), datagrams());
        connected.connect(whole.local_addr().unwrap()).unwrap();
        // ENOTCONN, and done all the same.
        nix::sys::socket::shutdown(shut.as_raw_fd(), nix::sys::socket::Shutdown::Both).unwrap_err();
        let found = [&whole, &connected, &shut].map(|socket| check(socket.as_fd()));
        assert_eq!(found, [Ok(()), Err(Damage::Connected), Err(Damage::ShutDown)]);
        let locked = listener();
        sys::set_option(locked.as_fd(), libc::SOL_SOCKET, libc::SO_LOCK_FILTER, &1i32.to_ne_bytes()).unwrap();
        assert_eq!(check(locked.as_fd()), Err(Damage::Locked));
    }
}
