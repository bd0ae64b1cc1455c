//! `adopt serve datagrams… PLACE`: small services that have datagrams.

use std::io::{BufRead as _, Read as _};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, Shutdown, SockFlag, SockType, SockaddrStorage, bind, getpeername, setsockopt, shutdown,
    socket, sockopt,
};

use crate::say;

pub(crate) fn serve(kind: &str, place: &str) -> Result<()> {
    match kind {
        "" => plain(place),
        "-epoll" => watched(place),
        "-options" => options(place),
        "-times" => times(place),
        "-elsewhere" => elsewhere(place),
        "-connects" => connects(place),
        "-shut" => shut(place),
        "-workers" => workers(place),
        "-lies" => lies(place),
        "-race" => race(place),
        "-asleep" => {
            let _bound = bound(place, SockFlag::SOCK_CLOEXEC)?;
            say("ready")?;
            wait()
        }
        _ => bail!("no such service: datagrams{kind}"),
    }
}

/// For the end of the test.
fn wait() -> Result<()> {
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn line() -> Result<String> {
    std::io::stdin().lock().lines().next().context("a line")?.context("a line")
}

fn made(place: &str, flags: SockFlag) -> Result<(OwnedFd, SocketAddr)> {
    let address: SocketAddr = place.trim_start_matches("only").parse()?;
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let made = socket(family, SockType::Datagram, flags, None)?;
    if address.is_ipv6() {
        setsockopt(&made, sockopt::Ipv6V6Only, &place.starts_with("only"))?;
    }
    Ok((made, address))
}

fn bound(place: &str, flags: SockFlag) -> Result<UdpSocket> {
    let (made, address) = made(place, flags)?;
    bind(made.as_raw_fd(), &SockaddrStorage::from(address)).context("bind(2)")?;
    Ok(made.into())
}

/// Says to the client what address it has.
fn answer(socket: &UdpSocket) -> std::io::Result<()> {
    let (_length, client) = socket.recv_from(&mut [0; 512])?;
    let _sent = socket.send_to(client.to_string().as_bytes(), client)?;
    Ok(())
}

fn ready(socket: &UdpSocket) -> Result<()> {
    let flags = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", socket.as_raw_fd()))?;
    let flags = flags.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    say(&format!("ready {flags}"))
}

fn plain(place: &str) -> Result<()> {
    let socket = bound(place, SockFlag::SOCK_CLOEXEC)?;
    ready(&socket)?;
    loop {
        answer(&socket)?;
    }
}

/// Has its socket watched before it is bound.
fn watched(place: &str) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let (made, address) = made(place, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    epoll.add(&made, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 7))?;
    bind(made.as_raw_fd(), &SockaddrStorage::from(address))?;
    epoll.modify(&made, &mut EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 8))?;
    let socket = UdpSocket::from(made);
    ready(&socket)?;
    loop {
        let mut events = [EpollEvent::empty(); 8];
        match epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(_) => ensure!(events[0].data() == 8, "foreign data"),
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        while let Ok(()) = answer(&socket) {}
    }
}

/// Sets options before it binds its socket, and after that.
fn options(place: &str) -> Result<()> {
    let (made, address) = made(place, SockFlag::SOCK_CLOEXEC)?;
    setsockopt(&made, sockopt::Ipv4PacketInfo, &true)?;
    setsockopt(&made, sockopt::RcvBuf, &30_000)?;
    bind(made.as_raw_fd(), &SockaddrStorage::from(address))?;
    setsockopt(&made, sockopt::IpRecvTos, &true)?;
    setsockopt(&made, sockopt::Broadcast, &true)?;
    setsockopt(&made, sockopt::ReusePort, &true)?;
    let socket = UdpSocket::from(made);
    ready(&socket)?;
    loop {
        answer(&socket)?;
    }
}

/// Has the kernel tell it when each datagram came.
fn times(place: &str) -> Result<()> {
    let (made, address) = made(place, SockFlag::SOCK_CLOEXEC)?;
    setsockopt(&made, sockopt::ReceiveTimestamp, &true)?;
    bind(made.as_raw_fd(), &SockaddrStorage::from(address))?;
    let socket = UdpSocket::from(made);
    ready(&socket)?;
    loop {
        answer(&socket)?;
    }
}

/// Sends to an address that it is told on its input.
fn elsewhere(place: &str) -> Result<()> {
    let socket = bound(place, SockFlag::SOCK_CLOEXEC)?;
    ready(&socket)?;
    let address: SocketAddr = line()?.parse()?;
    say(&format!("sent {:?}", socket.send_to(b"from inside", address).map_err(|error| error.kind())))?;
    wait()
}

/// Has one client alone.
fn connects(place: &str) -> Result<()> {
    let socket = bound(place, SockFlag::SOCK_CLOEXEC)?;
    ready(&socket)?;
    let (_length, client) = socket.recv_from(&mut [0; 512])?;
    socket.connect(client)?;
    let _sent = socket.send(client.to_string().as_bytes())?;
    say(&format!("connected {}", getpeername::<SockaddrStorage>(socket.as_raw_fd()).is_ok()))?;
    wait()
}

/// Shuts its socket down, which fails and is done.
fn shut(place: &str) -> Result<()> {
    let socket = bound(place, SockFlag::SOCK_CLOEXEC)?;
    ready(&socket)?;
    answer(&socket)?;
    say(&format!("shutdown {:?}", shutdown(socket.as_raw_fd(), Shutdown::Both)))?;
    say(&format!("then {:?}", socket.recv(&mut [0; 8]).map_err(|error| error.kind())))?;
    wait()
}

/// Two sockets at one place (SO_REUSEPORT), each in a process of its own.
fn workers(place: &str) -> Result<()> {
    for _ in 0..2 {
        if bro_relay::sys::fork()?.is_some() {
            continue;
        }
        let (made, address) = made(place, SockFlag::SOCK_CLOEXEC)?;
        setsockopt(&made, sockopt::ReusePort, &true)?;
        bind(made.as_raw_fd(), &SockaddrStorage::from(address))?;
        let socket = UdpSocket::from(made);
        ready(&socket)?;
        loop {
            answer(&socket)?;
        }
    }
    wait()
}

/// An address in memory that another thread changes: a `sockaddr_in`, by halves of words.
static ADDRESS: [AtomicU16; 8] = [const { AtomicU16::new(0) }; 8];

fn write_address(address: SocketAddr) {
    let SocketAddr::V4(v4) = address else { return };
    let [a, b, c, d] = v4.ip().octets();
    let words =
        [libc::AF_INET as u16, v4.port().to_be(), u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])];
    for (place, word) in ADDRESS.iter().zip(words) {
        place.store(word, Relaxed);
    }
}

fn ask_to_bind(socket: i64, address: i64, length: i64) -> String {
    let result = bro_tests::sys::ask(libc::SYS_bind, [socket, address, length]);
    result.map_or_else(|error| format!("{:?}", bro_relay::sys::errno_of(&error)), |value| value.to_string())
}

/// Addresses that the kernel takes for none, and what it says of them; then it serves.
fn lies(place: &str) -> Result<()> {
    let (made, address) = made(place, SockFlag::SOCK_CLOEXEC)?;
    write_address(address);
    let (number, here) = (i64::from(made.as_raw_fd()), ADDRESS.as_ptr() as i64);
    for (what, address, length) in [
        ("no address", 8, 16),
        ("an address of the kernel's", i64::MIN, 16),
        ("a short one", here, 15),
        ("a long one", here, 129),
        ("a negative one", here, -1),
        ("one that is longer than an int", here, 1 << 32 | 15),
    ] {
        say(&format!("{what}: {}", ask_to_bind(number, address, length)))?;
    }
    ADDRESS[0].store(libc::AF_INET6 as u16, Relaxed);
    say(&format!("another family: {}", ask_to_bind(number, here, 28)))?;
    say(&format!("a stream: {}", {
        let stream = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        write_address(address);
        ask_to_bind(stream.as_raw_fd().into(), here, 16)
    }))?;
    // The upper half of the length is none of the kernel's business, and what comes after an address neither.
    say(&format!("the right one: {}", ask_to_bind(number, here, 1 << 32 | 128)))?;
    say(&format!("once more: {}", ask_to_bind(number, here, 16)))?;
    let socket = UdpSocket::from(made);
    ready(&socket)?;
    loop {
        answer(&socket)?;
    }
}

/// Binds sockets to an address that changes meanwhile, and says where each was bound.
fn race(place: &str) -> Result<()> {
    let target: SocketAddr = place.parse()?;
    let other = SocketAddr::new(target.ip(), target.port() + 1);
    write_address(target);
    std::thread::spawn(move || {
        loop {
            ADDRESS[1].store(other.port().to_be(), Relaxed);
            ADDRESS[1].store(target.port().to_be(), Relaxed);
        }
    });
    for _ in 0..200 {
        let (made, _) = made(place, SockFlag::SOCK_CLOEXEC)?;
        let said = ask_to_bind(made.as_raw_fd().into(), ADDRESS.as_ptr() as i64, 16);
        let at = UdpSocket::from(made);
        let cookie = bro_adopt::socket::cookie(at.as_fd())?;
        say(&format!("bound {said} {} {cookie}", at.local_addr()?))?;
    }
    say("done")?;
    wait()
}
