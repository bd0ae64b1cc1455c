//! What the programs say of single sockets (aya-log), as lines of this process's log: `bro_ebpf` at the level trace.
//!
//! Programs are loaded with it or without, by a constant that the verifier sees: without, the calls are no part of them. With it,
//! they write into a ring buffer of [`RING`] bytes, which a thread here reads. What comes while it is full is dropped, and not
//! counted. Loading takes longer with it, by some 0.4 s: the verifier follows the writing of each line.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::thread::JoinHandle;

use aya::Ebpf;
use aya_log::{EbpfLogger, Level};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::unavailable::Unavailable;

/// The level, as the object calls it.
pub(super) const LEVEL: &str = aya_log::LEVEL;
/// The ring buffer, as the object calls it.
pub(super) const LINES: &str = "AYA_LOGS";
/// Its size: some 250 lines.
pub(super) const RING: u32 = 64 * 1024;

/// What the programs are loaded with.
pub(super) const fn level(wanted: bool) -> u8 {
    // 0 is less than every level that there is.
    if wanted { Level::Trace as u8 } else { 0 }
}

/// Whether the log's filter lets lines of the programs through.
#[must_use]
pub fn wanted() -> bool {
    tracing::enabled!(target: "bro_ebpf", tracing::Level::TRACE)
}

/// The thread that reads the lines. Dropping it has it read what there is, and ends it.
pub(super) struct Tracer {
    end: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Tracer {
    /// Reads the lines of these programs from now on.
    pub(super) fn start(ebpf: &mut Ebpf) -> Result<Self, Unavailable> {
        let lines = EbpfLogger::init_with_logger(ebpf, Lines);
        let lines = lines.map_err(|error| Unavailable::Object(format!("{LINES}: {error}")))?;
        let no_thread = |error: io::Error| Unavailable::Mapping(error);
        let end = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let end = Arc::new(end.map_err(|errno| no_thread(errno.into()))?);
        let ended = end.clone();
        let thread = std::thread::Builder::new().name("bro-trace".into());
        let thread = thread.spawn(move || read(lines, &ended)).map_err(no_thread)?;
        Ok(Self { end, thread: Some(thread) })
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        let told = self.end.write(1).is_ok();
        if let Some(thread) = self.thread.take().filter(|_| told) {
            drop(thread.join());
        }
    }
}

fn read(mut lines: EbpfLogger<Lines>, end: &EventFd) {
    // Reading takes none of the rights that loading took.
    crate::capabilities::drop_the_kernel_relays(false);
    loop {
        let mut fds =
            [PollFd::new(lines.as_fd(), PollFlags::POLLIN), PollFd::new(end.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return tracing::warn!(%error, "no more lines of the kernel relay's programs"),
        }
        let ended = fds[1].any() == Some(true);
        lines.flush();
        if ended {
            return;
        }
    }
}

/// Makes lines of our log from what aya-log has read.
struct Lines;

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, line: &log::Record<'_>) {
        tracing::trace!(target: "bro_ebpf", "{}", line.args());
    }

    fn flush(&self) {}
}
