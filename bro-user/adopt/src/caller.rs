//! The thread that waits in a notified call: its descriptors, and what /proc says of them (proc(5)).
//!
//! A thread's number may be another one's as soon as it has ended, so everything that is looked up by it counts only if the call still
//! waits *afterwards* (seccomp_unotify(2), SECCOMP_IOCTL_NOTIF_ID_VALID).

use std::collections::VecDeque;
use std::fs;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use nix::libc;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use crate::notification::Raw;
use crate::sys;

/// A caller, held by its pidfd.
#[derive(Debug)]
pub struct Caller<'a> {
    notify: BorrowedFd<'a>,
    id: u64,
    thread: i32,
    process: Arc<OwnedFd>,
}

/// The threads that have called lately, by their own pidfds: a service's threads call again and again, and to look one up takes three system calls.
///
/// A pidfd leads to its own thread alone (pidfd_open(2)), whatever has the number later. As long as that thread is there, the number is its own, and a
/// notification with that number is its call; as soon as it has ended, the pidfd is good for nothing (ESRCH).
#[derive(Debug, Default)]
pub struct LateCallers(VecDeque<(i32, Arc<OwnedFd>)>);

/// As many as are kept, a descriptor each.
pub const MOST_LATE: usize = 8;

impl LateCallers {
    /// The caller of this notification, if it has called lately. It may have ended since.
    #[must_use]
    pub fn of<'a>(&self, notify: BorrowedFd<'a>, notification: &Raw) -> Option<Caller<'a>> {
        let thread = notification.thread;
        let (_, process) = self.0.iter().find(|(known, _)| *known == thread)?;
        Some(Caller { notify, id: notification.id, thread, process: process.clone() })
    }

    /// The same, looked up, and kept for its next call.
    ///
    /// # Errors
    /// ESRCH when it no longer waits.
    pub fn look_up<'a>(&mut self, notify: BorrowedFd<'a>, notification: &Raw) -> io::Result<Caller<'a>> {
        let thread = notification.thread;
        self.0.retain(|(known, _)| *known != thread);
        let (caller, own) = Caller::find(notify, notification)?;
        // A process's pidfd outlives the thread, and then the number may be another one's.
        if own {
            self.0.truncate(MOST_LATE - 1);
            self.0.push_front((thread, caller.process.clone()));
        }
        Ok(caller)
    }
}

impl<'a> Caller<'a> {
    /// The one of this notification.
    ///
    /// # Errors
    /// ESRCH when it no longer waits.
    pub fn of(notify: BorrowedFd<'a>, notification: &Raw) -> io::Result<Self> {
        Self::find(notify, notification).map(|(caller, _)| caller)
    }

    /// And whether the pidfd is the thread's own. A thread may have a table of descriptors of its own, so its own pidfd is asked for where the kernel can
    /// (Linux 6.9), and else its process's.
    fn find(notify: BorrowedFd<'a>, notification: &Raw) -> io::Result<(Self, bool)> {
        let thread = notification.thread;
        let (process, own) = match sys::pidfd_of_thread(thread) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                (bro_relay::sys::pidfd_open(process_of(thread)?)?, false)
            }
            found => (found?, true),
        };
        let caller = Self { notify, id: notification.id, thread, process: Arc::new(process) };
        caller.still_waits()?;
        Ok((caller, own))
    }

    fn still_waits(&self) -> io::Result<()> {
        if sys::is_waiting(self.notify, self.id) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ESRCH))
        }
    }

    /// A duplicate of its descriptor.
    ///
    /// # Errors
    /// EBADF, EPERM.
    pub fn duplicate(&self, number: RawFd) -> io::Result<OwnedFd> {
        sys::descriptor_of(self.process.as_fd(), number)
    }

    /// Puts a socket in the place of its descriptor.
    ///
    /// # Errors
    /// ENOENT when it no longer waits.
    pub fn replace(&self, socket: BorrowedFd<'_>, number: RawFd, close_on_exec: bool) -> io::Result<()> {
        sys::replace(self.notify, self.id, socket, number, close_on_exec)
    }

    /// Is its descriptor closed by execve(2)? proc_pid_fdinfo(5), `flags`.
    ///
    /// # Errors
    /// When it cannot be read, or the caller no longer waits.
    pub fn closes_on_exec(&self, number: RawFd) -> io::Result<bool> {
        let text = self.information(number)?;
        self.still_waits()?;
        let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
        Ok(flags.ok_or(io::ErrorKind::InvalidData)? & libc::O_CLOEXEC != 0)
    }

    /// Its epoll instances: descriptor and registrations, each as a line that begins with `tfd:`. Of as many as are looked at, and without those that watch
    /// nothing.
    ///
    /// Not by what /proc/PID/fd leads to: that folder is open to its process's user alone, and one in a container may be another than the one that the container
    /// belongs to. Who may trace the process may read fdinfo (Linux 5.14).
    ///
    /// # Errors
    /// When they cannot be listed, or the caller no longer waits.
    pub fn epolls(&self, most: usize) -> io::Result<Vec<(RawFd, String)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(format!("/proc/{}/fdinfo", self.thread))? {
            let number = entry?.file_name().to_str().and_then(|name| name.parse().ok());
            if let Some(number) = number
                && let Ok(text) = self.information(number)
                && text.lines().any(|line| line.starts_with("tfd:"))
            {
                found.push((number, text));
            }
            if found.len() == most {
                break;
            }
        }
        self.still_waits()?;
        Ok(found)
    }

    fn information(&self, number: RawFd) -> io::Result<String> {
        use std::io::Read as _;
        /// An epoll instance may watch very many descriptors, a line of about 80 bytes each.
        const MOST: u64 = 4 << 20;
        let mut file = fs::File::open(format!("/proc/{}/fdinfo/{number}", self.thread))?;
        let mut start = [0; 1024];
        let length = file.read(&mut start)?;
        let mut text = start.get(..length).unwrap_or_default().to_vec();
        // The kernel makes it as a whole (`seq_read_iter`), so that a read that is not full has got all of it; almost every one is so short.
        if length == start.len() {
            let _length = file.take(MOST).read_to_end(&mut text)?;
        }
        String::from_utf8(text).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    /// A `sockaddr_in` or `sockaddr_in6` of the caller's, as bind(2) takes it; `None` of one that it would not take. The caller may change it at any
    /// time: a wrong one must cost the caller alone.
    #[must_use]
    pub fn address_at(&self, address: u64, length: u64) -> Option<SocketAddr> {
        let mut bytes = [0; 28];
        // An int, of which the kernel bears no more than a `sockaddr_storage`.
        let length = usize::try_from(length as u32 as i32).ok()?;
        if length > size_of::<libc::sockaddr_storage>() {
            return None;
        }
        let length = length.min(bytes.len());
        let place = bytes.get_mut(..length)?;
        let remote = RemoteIoVec { base: address.try_into().ok()?, len: length };
        let got =
            process_vm_readv(Pid::from_raw(self.thread), &mut [IoSliceMut::new(place)], &[remote]).ok()?;
        self.still_waits().ok()?;
        internet_address(bytes.get(..got)?)
    }
}

/// `struct sockaddr_in` (ip(7)), `struct sockaddr_in6` (ipv6(7)).
fn internet_address(bytes: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(*bytes.first_chunk()?));
    // Shorter ones are no addresses to bind(2) either (`inet_bind`, `inet6_bind`).
    let shortest = if family == libc::AF_INET { size_of::<libc::sockaddr_in>() } else { 24 };
    if bytes.len() < shortest {
        return None;
    }
    let port = u16::from_be_bytes(*bytes.get(2..)?.first_chunk()?);
    let ip: IpAddr = match family {
        libc::AF_INET => bytes.get(4..)?.first_chunk::<4>().copied()?.into(),
        libc::AF_INET6 => bytes.get(8..)?.first_chunk::<16>().copied()?.into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// The process of a thread (proc_pid_status(5), Tgid).
fn process_of(thread: i32) -> io::Result<i32> {
    let status = fs::read_to_string(format!("/proc/{thread}/status"))?;
    let process = status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
    process.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_has_ended_is_not_taken_for_one_that_has_its_number() {
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            tell.send(nix::unistd::gettid().as_raw()).unwrap();
            let _hung_up = ended.recv();
        });
        let number = told.recv().unwrap();
        // Before Linux 6.9 there are no threads' own pidfds, and then none are kept.
        let Ok(own) = sys::pidfd_of_thread(number) else { return };
        let own = Arc::new(own);
        let late = LateCallers(VecDeque::from([(number, own.clone())]));
        let file = fs::File::open("/dev/null").unwrap();
        let raw = Raw { id: 1, thread: number, arch: 0, number: 0, arguments: [0; 6] };
        let open = std::os::fd::AsRawFd::as_raw_fd(&file);
        let caller = late.of(file.as_fd(), &raw).unwrap();
        caller.duplicate(open).unwrap();
        let absent = caller.duplicate(100_000).unwrap_err();
        assert_eq!(absent.raw_os_error(), Some(libc::EBADF));
        drop(end);
        thread.join().unwrap();
        while !bro_relay::sys::exited(&own) {
            std::thread::yield_now();
        }
        let gone = caller.duplicate(open).unwrap_err();
        assert_eq!(gone.raw_os_error(), Some(libc::ESRCH));
        let other = Raw { thread: number + 1, ..raw };
        assert!(late.of(file.as_fd(), &other).is_none());
    }

    #[test]
    fn an_address_is_read_from_bytes_and_a_cut_off_one_is_not() {
        let mut v4 = Vec::from((libc::AF_INET as u16).to_ne_bytes());
        v4.extend([0, 80, 127, 0, 0, 1]);
        v4.extend([0; 8]);
        let mut v6 = Vec::from((libc::AF_INET6 as u16).to_ne_bytes());
        v6.extend([1, 0, 0, 0, 0, 0]);
        v6.extend(std::net::Ipv6Addr::LOCALHOST.octets());
        assert_eq!(internet_address(&v4), Some("127.0.0.1:80".parse().unwrap()));
        assert_eq!(internet_address(&v6), Some("[::1]:256".parse().unwrap()));
        for short in [&v4[..15], &v6[..23], &v4[..1], &[]] {
            assert_eq!(internet_address(short), None);
        }
        v4[..2].copy_from_slice(&(libc::AF_UNIX as u16).to_ne_bytes());
        assert_eq!(internet_address(&v4), None);
    }
}
