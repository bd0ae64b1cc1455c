//! Registrations in epoll instances: a service that has its socket watched before it listens (Netty does) would wait for a socket that it no
//! longer has. What watches the one is made to watch the other, with the same events and data.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, RawFd};

use nix::sched::{CloneFlags, unshare};
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::stat::fstat;

use crate::caller::Caller;
use crate::sys;

/// The most epoll instances of a process that are looked at, and the most registrations that are moved.
const MOST: usize = 64;

/// A registration as /proc/PID/fdinfo tells it (proc_pid_fdinfo(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Registered {
    /// The descriptor that is watched.
    number: RawFd,
    events: u32,
    data: u64,
    /// The watched file's, by which it is known even when the number was used again.
    inode: u64,
}

/// `tfd:        5 events:     2019 data: 5000000000000005  pos:0 ino:1c2f sdev:9` (`ep_show_fdinfo`; `ino` since Linux 4.13).
fn registration(line: &str) -> Option<Registered> {
    let mut words = line.split([' ', ':']).filter(|word| !word.is_empty());
    let mut value = |name: &str| (words.next()? == name).then(|| words.next())?;
    let number = value("tfd")?.parse().ok()?;
    let events = u32::from_str_radix(value("events")?, 16).ok()?;
    let data = u64::from_str_radix(value("data")?, 16).ok()?;
    let _position = value("pos")?;
    let inode = u64::from_str_radix(value("ino")?, 16).ok()?;
    Some(Registered { number, events, data, inode })
}

/// Has the caller's epoll instances watch `listener` where they watch `socket` as descriptor `number`; how many registrations that were.
///
/// # Errors
/// When one cannot be moved, or the caller no longer waits.
pub fn watch_instead(
    caller: &Caller<'_>,
    number: RawFd,
    socket: BorrowedFd<'_>,
    listener: BorrowedFd<'_>,
) -> io::Result<usize> {
    let inode = fstat(socket)?.st_ino;
    let mut moved = 0;
    for (epoll, text) in caller.epolls(MOST)? {
        let registrations = text.lines().filter_map(registration);
        for registration in registrations.filter(|found| found.number == number && found.inode == inode) {
            let epoll = caller.duplicate(epoll)?;
            let event = EpollEvent::new(
                EpollFlags::from_bits_retain(registration.events.cast_signed()),
                registration.data,
            );
            in_a_table_of_its_own(|| sys::watch_instead(epoll.as_fd(), number, socket, listener, event))?;
            moved += 1;
        }
    }
    Ok(moved)
}

/// Runs in a thread that shares no descriptor number with any other (unshare(2) CLONE_FILES), and ends with its table.
fn in_a_table_of_its_own(run: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("bro-epoll".into()).spawn_scoped(scope, || {
            unshare(CloneFlags::CLONE_FILES)?;
            run()
        })?;
        thread.join().unwrap_or_else(|_panicked| Err(io::Error::other("the thread has panicked")))
    })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd as _;

    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollTimeout};

    use super::*;

    #[test]
    fn the_kernels_own_lines_are_read() {
        let line = "tfd:        5 events: 8000201d data: fedcba9800000005  pos:0 ino:1c2f sdev:9";
        let expected =
            Registered { number: 5, events: 0x8000_201d, data: 0xfedc_ba98_0000_0005, inode: 0x1c2f };
        assert_eq!(registration(line), Some(expected));
        for line in ["", "tfd:", "pos:\t0", "tfd: 5 events: 1 data: x pos:0 ino:1 sdev:9"] {
            assert_eq!(registration(line), None, "{line}");
        }
    }

    #[test]
    fn a_registration_moves_to_another_socket_under_the_same_number() {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let (watched, replacement) =
            (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let number = watched.as_raw_fd();
        epoll.add(&watched, EpollEvent::new(EpollFlags::EPOLLIN, 77)).unwrap();
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", epoll.0.as_raw_fd())).unwrap();
        let inode = fstat(&watched).unwrap().st_ino;
        let found = text.lines().find_map(registration).unwrap();
        assert_eq!((found.number, found.data, found.inode), (number, 77, inode));

        let event = EpollEvent::new(EpollFlags::from_bits_retain(found.events.cast_signed()), found.data);
        // Twice: an agent that takes over from a killed one may do it again.
        for _ in 0..2 {
            let (old, new) = (watched.as_fd(), replacement.as_fd());
            in_a_table_of_its_own(|| sys::watch_instead(epoll.0.as_fd(), number, old, new, event)).unwrap();
        }
        let _client = TcpStream::connect(replacement.local_addr().unwrap()).unwrap();
        let mut events = [EpollEvent::empty(); 4];
        let ready = epoll.wait(&mut events, EpollTimeout::from(10_000u16)).unwrap();
        assert_eq!((ready, events[0].data()), (1, 77));
        let _other = TcpStream::connect(watched.local_addr().unwrap()).unwrap();
        drop(replacement.accept().unwrap());
        assert_eq!(epoll.wait(&mut events, EpollTimeout::ZERO).unwrap(), 0);
        assert_eq!(watched.as_raw_fd(), number, "this thread's own table is as it was");
    }
}
