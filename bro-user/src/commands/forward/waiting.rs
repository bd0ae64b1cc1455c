//! Clients that are not let in, since there are as many connections as may be: they wait in the kernel's backlog, unseen, so that
//! it has to be said.

use std::os::fd::AsFd as _;

use bro_relay::listener::{Listener, SocketKind};

use crate::commands::status::Waiting;

/// How many connections there may be.
#[derive(Debug)]
pub(super) struct Limit {
    connections: u64,
    /// What lets more clients in.
    lets_in: String,
    /// The clients that waited at the last look.
    waiting: Option<Waiting>,
}

impl Limit {
    /// `asked` is the command line's, `connections` the result.
    pub fn new(asked: Option<u32>, connections: usize) -> Self {
        let connections = u64::try_from(connections).unwrap_or(u64::MAX);
        let lets_in = match asked {
            Some(asked) if u64::from(asked) == connections => format!("--connections-max={asked}"),
            _ => format!("LimitNOFILE=, which allows {connections}"),
        };
        Self { connections, lets_in, waiting: None }
    }

    /// The clients that waited at the last look.
    pub const fn waiting(&self) -> Option<&Waiting> {
        self.waiting.as_ref()
    }

    /// Looks which clients wait, with `open` connections; says so once, until no client waits any more.
    pub fn look(&mut self, open: u64, listeners: &[(Listener, usize)]) {
        let clients = if open < self.connections { 0 } else { listeners.iter().map(backlog).sum() };
        let before = self.waiting.take();
        if clients == 0 {
            return;
        }
        let waiting = Waiting { clients, connections: self.connections, lets_in: self.lets_in.clone() };
        if before.is_none() {
            tracing::warn!(clients, "{waiting}");
        }
        self.waiting = Some(waiting);
    }
}

fn backlog((listener, _): &(Listener, usize)) -> u64 {
    match listener.kind {
        SocketKind::Stream | SocketKind::Vsock | SocketKind::SeqPacket => {
            bro_relay::sys::backlog(listener.socket.as_fd()).unwrap_or(0)
        }
        // They are no connections, and do not wait for one to end.
        SocketKind::Datagram | SocketKind::UnixDatagram => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn those_who_wait_are_counted_and_told_what_lets_them_in() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        assert_eq!(bro_relay::sys::backlog(tcp.as_fd()).unwrap(), 0);
        let _clients = [TcpStream::connect(address).unwrap(), TcpStream::connect(address).unwrap()];
        assert_eq!(bro_relay::sys::backlog(tcp.as_fd()).unwrap(), 2);
        let folder = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-backlog-XXXXXX")).unwrap();
        let unix = UnixListener::bind(folder.join("s")).unwrap();
        assert_eq!(bro_relay::sys::backlog(unix.as_fd()).unwrap(), 0);
        let _client = UnixStream::connect(folder.join("s")).unwrap();
        assert_eq!(bro_relay::sys::backlog(unix.as_fd()).unwrap(), 1);
        std::fs::remove_dir_all(folder).unwrap();
        let asked = Limit::new(Some(256), 256);
        assert_eq!(asked.lets_in, "--connections-max=256");
        assert_eq!(Limit::new(Some(9999), 448).lets_in, "LimitNOFILE=, which allows 448");
        assert_eq!(Limit::new(None, 448).lets_in, "LimitNOFILE=, which allows 448");
    }
}
