//! Adoption's unsafe code: the ioctls of seccomp_unotify(2), descriptors of other processes, socket options as bytes, socket filters, and the record
//! that the kernel writes into memory that outlives this process.
#![allow(unsafe_code, reason = "this is the one place for it in adoption; every block says why it is sound")]

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use nix::libc;
use nix::sys::epoll::EpollEvent;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let raw = check(result.try_into().unwrap_or(-1))?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// One notification as the kernel writes it (seccomp_unotify(2), `struct seccomp_notif`), taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Raw {
    /// What the answer is for.
    pub id: u64,
    /// The calling thread, as this process's pid namespace numbers it.
    pub thread: i32,
    /// The AUDIT_ARCH_… of the call.
    pub arch: u32,
    /// The number of the system call, which means nothing without the architecture.
    pub number: i32,
    /// Its arguments.
    pub arguments: [u64; 6],
}

/// The size of a record, and where its parts are: marks at 0, the notification at 64, the answer at 192, notes in two places, of which one
/// is in use. What was never written takes no memory.
const SIZE: usize = 256 * 1024;
const MARK: u64 = u64::from_ne_bytes(*b"bro-adop");
const MARK_AT: usize = 0;
const NOTES_AT: usize = 8;
const NOTIFICATION_AT: usize = 64;
const DECIDED_AT: usize = 192;
const ERROR_AT: usize = 200;
const FLAGS_AT: usize = 208;
/// Where notes are, each with its length before it.
const NOTES: [usize; 2] = [4096, 128 * 1024];
const MOST_NOTES: usize = 120 * 1024;
const _: () = assert!(NOTES[0] + 8 + MOST_NOTES <= NOTES[1] && NOTES[1] + 8 + MOST_NOTES <= SIZE);
const _: () = assert!(NOTIFICATION_AT + size_of::<libc::seccomp_notif>() <= DECIDED_AT);

/// A page of a memfd, in which the notification lies that is being answered. It is in this process and in every other one that
/// has the descriptor, and stays when this one is killed.
#[derive(Debug)]
pub struct Page {
    file: OwnedFd,
    start: NonNull<u8>,
}

// SAFETY: the memory is not tied to a thread.
unsafe impl Send for Page {}

impl Page {
    /// A fresh one.
    ///
    /// # Errors
    /// memfd_create(2)'s, mmap(2)'s.
    pub fn new() -> io::Result<Self> {
        use nix::fcntl::{FcntlArg, SealFlag, fcntl};
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let file = memfd_create(c"bro-adopt", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        nix::unistd::ftruncate(&file, SIZE as libc::off_t)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        let _zero = fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        let page = Self::map(file)?;
        page.word(MARK_AT).store(MARK, SeqCst);
        Ok(page)
    }

    /// A predecessor's.
    ///
    /// # Errors
    /// When it is none: another size, not sealed, without the mark.
    pub fn of(file: OwnedFd) -> io::Result<Self> {
        use nix::fcntl::{FcntlArg, SealFlag, fcntl};
        let seals = SealFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GET_SEALS)?);
        let is_ours = nix::sys::stat::fstat(&file)?.st_size == SIZE as libc::off_t
            && seals.contains(SealFlag::F_SEAL_SHRINK);
        if !is_ours {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let page = Self::map(file)?;
        if page.word(MARK_AT).load(SeqCst) == MARK {
            Ok(page)
        } else {
            Err(io::ErrorKind::InvalidData.into())
        }
    }

    fn map(file: OwnedFd) -> io::Result<Self> {
        let length = NonZeroUsize::new(SIZE).ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice, of a file that is sealed against shrinking.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &file, 0) }?;
        Ok(Self { file, start: start.cast() })
    }

    /// The memfd, for a store that outlives this process.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset.is_multiple_of(8) && offset + 8 <= SIZE, "a word of the page");
        // SAFETY: within the page, by the constants above.
        let word = unsafe { self.start.add(offset) };
        // SAFETY: aligned and mapped as long as `self` lives; any bits are a valid number; processes change it by atomics, and
        // the kernel, in `receive`, while no reference to it is in use.
        unsafe { word.cast::<AtomicU64>().as_ref() }
    }

    /// The notification that lies here; its id is 0 when there is none.
    pub fn notification(&self) -> Raw {
        // SAFETY: within the page, and as aligned as the structure's largest member.
        let place = unsafe { self.start.add(NOTIFICATION_AT) };
        // SAFETY: integers, for which any bits are valid; nothing else writes there meanwhile.
        let notification = unsafe { place.cast::<libc::seccomp_notif>().read_volatile() };
        Raw {
            id: notification.id,
            thread: notification.pid.cast_signed(),
            arch: notification.data.arch,
            number: notification.data.nr,
            arguments: notification.data.args,
        }
    }

    /// What was decided about it, as (error, flags); `None` when that was not yet.
    pub fn decided(&self) -> Option<(i32, u32)> {
        (self.word(DECIDED_AT).load(SeqCst) == self.notification().id).then(|| {
            (self.word(ERROR_AT).load(SeqCst) as u32 as i32, self.word(FLAGS_AT).load(SeqCst) as u32)
        })
    }

    /// Writes down what was decided.
    pub fn decide(&self, error: i32, flags: u32) {
        self.word(ERROR_AT).store(u64::from(error.cast_unsigned()), SeqCst);
        self.word(FLAGS_AT).store(flags.into(), SeqCst);
        self.word(DECIDED_AT).store(self.notification().id, SeqCst);
    }

    /// Nothing is in flight.
    pub fn clear(&self) {
        for offset in (NOTIFICATION_AT..=FLAGS_AT).step_by(8) {
            self.word(offset).store(0, SeqCst);
        }
    }

    /// Where the notes are that count.
    fn notes(&self) -> usize {
        NOTES[usize::from(self.word(NOTES_AT).load(SeqCst) == 1)]
    }

    /// Replaces the notes, at once: a process that is killed meanwhile leaves the old ones. Whether there is room for them.
    pub fn note(&mut self, text: &[u8]) -> bool {
        if text.len() > MOST_NOTES {
            return false;
        }
        let other = usize::from(self.notes() == NOTES[0]);
        let at = NOTES[other];
        self.word(at).store(text.len() as u64, SeqCst);
        // SAFETY: within the page.
        let place = unsafe { self.start.add(at + 8) };
        // SAFETY: there is room for as many bytes, in memory that no reference leads to.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), place.as_ptr(), text.len()) };
        self.word(NOTES_AT).store(other as u64, SeqCst);
        true
    }

    /// The notes; empty when there were none.
    pub fn noted(&self) -> Vec<u8> {
        let at = self.notes();
        let length = usize::try_from(self.word(at).load(SeqCst)).unwrap_or(0).min(MOST_NOTES);
        let mut text = vec![0; length];
        // SAFETY: within the page.
        let place = unsafe { self.start.add(at + 8) };
        // SAFETY: as many bytes are there, and no other process writes them meanwhile.
        unsafe { std::ptr::copy_nonoverlapping(place.as_ptr(), text.as_mut_ptr(), length) };
        text
    }

    /// SECCOMP_IOCTL_NOTIF_RECV, straight into the page: the kernel marks a notification as received only together with writing it
    /// there (`seccomp_notify_recv`: a failed copy puts it back), so there is no moment in which a killed process has one and the
    /// page has not. The place has to be zero before.
    ///
    /// # Errors
    /// ENOENT when the caller was interrupted meanwhile, EINTR.
    pub fn receive(&self, notify: BorrowedFd<'_>) -> io::Result<()> {
        self.clear();
        // SAFETY: within the page.
        let place = unsafe { self.start.add(NOTIFICATION_AT) };
        // SAFETY: the kernel writes one `seccomp_notif` there, for which there is room.
        let received =
            unsafe { libc::ioctl(notify.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, place.as_ptr()) };
        check(received).map(drop)
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped, and no reference outlives `self`.
        let _unmapped = unsafe { munmap(self.start.cast(), SIZE) };
    }
}

/// SECCOMP_IOCTL_NOTIF_SEND.
///
/// # Errors
/// ENOENT when the caller was interrupted or has ended.
pub fn send(notify: BorrowedFd<'_>, id: u64, error: i32, flags: u32) -> io::Result<()> {
    let mut response = libc::seccomp_notif_resp { id, val: 0, error, flags };
    // SAFETY: the kernel reads (and may write) one `seccomp_notif_resp`, which outlives the call.
    let sent = unsafe { libc::ioctl(notify.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut response) };
    check(sent).map(drop)
}

/// SECCOMP_IOCTL_NOTIF_ID_VALID: does the caller still wait for this answer? Only then is what was looked up by its number its own.
#[must_use]
pub fn is_waiting(notify: BorrowedFd<'_>, id: u64) -> bool {
    // SAFETY: the kernel reads one number, which outlives the call.
    let valid = unsafe { libc::ioctl(notify.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &raw const id) };
    valid == 0
}

/// SECCOMP_IOCTL_NOTIF_ADDFD with SECCOMP_ADDFD_FLAG_SETFD: the caller's descriptor `number` is `socket` from now on, as dup2(2) would do.
/// Linux 5.9.
///
/// # Errors
/// ENOENT when the caller no longer waits; EINVAL on an older kernel; EBADF beyond the caller's limit.
pub fn replace(
    notify: BorrowedFd<'_>,
    id: u64,
    socket: BorrowedFd<'_>,
    number: RawFd,
    close_on_exec: bool,
) -> io::Result<()> {
    let request = libc::seccomp_notif_addfd {
        id,
        flags: libc::SECCOMP_ADDFD_FLAG_SETFD as u32,
        srcfd: socket.as_raw_fd().cast_unsigned(),
        newfd: number.cast_unsigned(),
        newfd_flags: if close_on_exec { libc::O_CLOEXEC.cast_unsigned() } else { 0 },
    };
    // SAFETY: the kernel reads one `seccomp_notif_addfd`, which outlives the call.
    let added =
        unsafe { libc::ioctl(notify.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ADDFD, &raw const request) };
    check(added).map(drop)
}

/// SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP (Linux 6.6): caller and agent take turns on one processor, which makes a notified call five times as
/// fast. An older kernel stays as it is.
pub fn wake_in_turn(notify: BorrowedFd<'_>) {
    const SYNC_WAKE_UP: libc::c_ulong = 1;
    // SAFETY: this request takes its flags by value.
    let _older_kernel =
        unsafe { libc::ioctl(notify.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS, SYNC_WAKE_UP) };
}

/// pidfd_open(2) of a thread (PIDFD_THREAD, Linux 6.9), which may have descriptors of its own.
///
/// # Errors
/// EINVAL on an older kernel.
pub fn pidfd_of_thread(thread: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, thread, libc::PIDFD_THREAD) })
}

/// pidfd_getfd(2): a duplicate of another process's descriptor.
///
/// # Errors
/// EBADF when it has none of this number, EPERM without the right to trace it.
pub fn descriptor_of(process: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
}

/// getsockopt(2) as bytes; how many the kernel wrote.
///
/// # Errors
/// ENOPROTOOPT when the socket knows no such option, ENOTSOCK.
pub fn option(socket: BorrowedFd<'_>, level: i32, name: i32, value: &mut [u8]) -> io::Result<usize> {
    let mut length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    let place = value.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most `length` bytes, which is the slice's.
    check(unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, place, &raw mut length) })?;
    Ok(length as usize)
}

/// setsockopt(2) with bytes.
///
/// # Errors
/// setsockopt's.
pub fn set_option(socket: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the value is valid for reading for as long as the call lasts.
    let set = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), length) };
    check(set).map(drop)
}

/// SIOCGSTAMPNS (socket(7), `sock_gettstamp`): when the last datagram that was received had come, since 1970. The first question has the kernel take down
/// such times from then on.
///
/// # Errors
/// ENOENT when none was received since then.
pub fn last_received(socket: BorrowedFd<'_>) -> io::Result<std::time::Duration> {
    /// Its older form, whose `timespec` is this architecture's.
    const SIOCGSTAMPNS: libc::Ioctl = 0x8907;
    let mut at = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one `timespec`, which outlives the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSTAMPNS, &raw mut at) })?;
    let (seconds, rest) = (u64::try_from(at.tv_sec), u32::try_from(at.tv_nsec));
    Ok(std::time::Duration::new(seconds.unwrap_or(0), rest.unwrap_or(0)))
}

/// connect(2) with AF_UNSPEC: a socket for datagrams has no peer any more.
///
/// # Errors
/// connect(2)'s.
pub fn dissolve(socket: BorrowedFd<'_>) -> io::Result<()> {
    let none = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    let length = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the kernel reads one `sockaddr`, which outlives the call.
    check(unsafe { libc::connect(socket.as_raw_fd(), &raw const none, length) }).map(drop)
}

/// SO_ATTACH_FILTER (socket(7)): the kernel queues only what this classic BPF program returns more than zero for.
///
/// # Errors
/// EINVAL for a program that is empty, longer than 4096 instructions (BPF_MAXINSNS) or wrong; ENOMEM.
pub fn attach_filter(socket: BorrowedFd<'_>, program: &mut [libc::sock_filter]) -> io::Result<()> {
    let length = program.len().try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    let size = size_of::<libc::sock_fprog>() as libc::socklen_t;
    let place = (&raw const program).cast();
    // SAFETY: the kernel copies as many instructions as the slice has, which outlives the call, and checks the program.
    let attached = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, place, size)
    };
    check(attached).map(drop)
}

/// Has `replacement` watched in `epoll` instead of `watched`, both as descriptor `number` of another process.
///
/// The kernel knows a registration by the file *and* the number (epoll(7), `struct epoll_filefd`), so it takes a table of descriptors in which
/// that number is free: this runs in a thread that has unshared its own (unshare(2) CLONE_FILES). Adding comes first and both calls may be
/// made again, so that a process that is killed in between loses nothing.
///
/// # Errors
/// epoll_ctl(2)'s, but for EEXIST of the new one and ENOENT of the old one.
pub fn watch_instead(
    epoll: BorrowedFd<'_>,
    number: RawFd,
    watched: BorrowedFd<'_>,
    replacement: BorrowedFd<'_>,
    mut event: EpollEvent,
) -> io::Result<()> {
    // Numbers that the one in question cannot be.
    let above = number.saturating_add(1);
    let epoll = bro_relay::sys::duplicate(epoll, above)?;
    let watched = bro_relay::sys::duplicate(watched, above)?;
    let replacement = bro_relay::sys::duplicate(replacement, above)?;
    let event = std::ptr::from_mut(&mut event).cast::<libc::epoll_event>();
    // SAFETY: plain numbers; whatever had this one here is a copy that nothing in this thread uses.
    check(unsafe { libc::dup2(replacement.as_raw_fd(), number) })?;
    // SAFETY: `EpollEvent` is a transparent `epoll_event`, which outlives the call.
    let added = unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, number, event) };
    check(added).or_else(|error| tolerate(error, libc::EEXIST))?;
    // SAFETY: as above.
    check(unsafe { libc::dup2(watched.as_raw_fd(), number) })?;
    // SAFETY: EPOLL_CTL_DEL looks at no event.
    let removed =
        unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_DEL, number, std::ptr::null_mut()) };
    check(removed).or_else(|error| tolerate(error, libc::ENOENT)).map(drop)
}

fn tolerate(error: io::Error, number: i32) -> io::Result<libc::c_int> {
    if error.raw_os_error() == Some(number) { Ok(0) } else { Err(error) }
}
