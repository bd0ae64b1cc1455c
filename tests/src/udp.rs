//! UDP: clients here, and a service in a namespace that answers.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, sockopt};

use crate::forwarder::Setup;
use crate::netns::Namespace;
use crate::peers::PATIENCE;
use crate::process;

/// How long a service waits for a datagram before it looks whether it is to end.
const STEP: Duration = Duration::from_millis(20);

/// A datagram socket in the network namespace of the calling thread.
pub fn socket(ipv6: bool) -> io::Result<OwnedFd> {
    let domain = if ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    Ok(socket::socket(domain, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?)
}

/// A unix socket for datagrams in the network namespace of the calling thread, to which its abstract names belong.
pub fn unix_socket() -> io::Result<OwnedFd> {
    Ok(socket::socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?)
}

/// The loopback address with this port.
#[must_use]
pub fn loopback(ipv6: bool, port: u16) -> SocketAddr {
    if ipv6 { (Ipv6Addr::LOCALHOST, port).into() } else { (Ipv4Addr::LOCALHOST, port).into() }
}

/// A socket of the namespace that is bound to `address`. One that was closed there a moment ago may be open still in a process that another
/// test has just forked, until that executes its program.
pub fn bound(namespace: &Namespace, address: SocketAddr) -> Result<UdpSocket> {
    let socket = namespace.datagram_socket(address.is_ipv6())?;
    let mut bound = Ok(());
    process::eventually(PATIENCE, || {
        bound = socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address));
        bound != Err(Errno::EADDRINUSE)
    });
    bound.with_context(|| format!("binding {address}"))?;
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// A client with an address of the kernel's choice, or of this one.
pub fn client(front: SocketAddr, from: Option<SocketAddr>) -> Result<UdpSocket> {
    let any = if front.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
    let socket = match from {
        Some(from) => UdpSocket::bind(from)?,
        None => UdpSocket::bind(any)?,
    };
    // Then it hears nothing that comes from another address.
    socket.connect(front)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Sends `bytes`, and expects just these back.
pub fn expect_echo(client: &UdpSocket, bytes: &[u8]) -> Result<()> {
    let _sent = client.send(bytes).with_context(|| format!("sending {} bytes", bytes.len()))?;
    expect(client, bytes)
}

/// Expects these bytes.
pub fn expect(socket: &UdpSocket, bytes: &[u8]) -> Result<()> {
    let mut answer = vec![0; 1 << 16];
    let length = socket.recv(&mut answer).with_context(|| format!("no answer of {} bytes", bytes.len()))?;
    ensure!(answer[..length] == *bytes, "{length} bytes came for {}", bytes.len());
    Ok(())
}

/// A service that sends everything back.
#[derive(Debug)]
pub struct Echo {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Echo {
    /// Answers at this socket.
    pub fn new(socket: UdpSocket) -> Result<Self> {
        socket.set_read_timeout(Some(STEP))?;
        setsockopt(&socket.as_fd(), sockopt::RcvBuf, &(1 << 20)).ok();
        let over = Arc::new(AtomicBool::new(false));
        let told = over.clone();
        let thread = std::thread::spawn(move || {
            let (mut buffer, mut answered) = (vec![0; 1 << 16], 0);
            while !told.load(Ordering::Acquire) {
                let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
                answered += u64::from(socket.send_to(&buffer[..length], from).is_ok());
            }
            answered
        });
        Ok(Self { over, thread: Some(thread) })
    }

    /// Ends it; says how many datagrams it has answered.
    #[must_use]
    pub fn stop(mut self) -> u64 {
        self.over.store(true, Ordering::Release);
        self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// The usual scene: a namespace, a port in it at which nothing is bound yet, and a socket here that clients write to.
#[derive(Debug)]
pub struct UdpScene {
    /// The namespace of the service.
    pub namespace: Namespace,
    /// What clients write to.
    pub front: UdpSocket,
    /// Where the service is, or will be.
    pub target: SocketAddr,
}

impl UdpScene {
    /// Over IPv6 on both sides, or IPv4.
    pub fn new(ipv6: bool) -> Result<Self> {
        Self::at(loopback(ipv6, 0), ipv6)
    }

    /// Clients write to `front`.
    pub fn at(front: SocketAddr, ipv6: bool) -> Result<Self> {
        let namespace = Namespace::new()?;
        let target = bound(&namespace, loopback(ipv6, 0))?.local_addr()?;
        let front = UdpSocket::bind(front)?;
        Ok(Self { namespace, front, target })
    }

    /// What clients write to.
    pub fn address(&self) -> Result<SocketAddr> {
        Ok(self.front.local_addr()?)
    }

    /// A forwarder that has the socket, the namespace and the target.
    pub fn setup(&self) -> Result<Setup> {
        let socket = self.front.as_fd().try_clone_to_owned()?;
        Ok(Setup::new().netns(&self.namespace).descriptor(socket, "dns").arg(self.target.to_string()))
    }

    /// Binds the service's socket.
    pub fn service(&self) -> Result<UdpSocket> {
        bound(&self.namespace, self.target)
    }

    /// The service that answers everything.
    pub fn echo(&self) -> Result<Echo> {
        Echo::new(self.service()?)
    }

    /// A client.
    pub fn client(&self) -> Result<UdpSocket> {
        client(self.address()?, None)
    }
}
