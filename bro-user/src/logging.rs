//! Log lines: to journald with fields when systemd runs bro, as readable text on standard error otherwise.

mod journal;

use std::os::fd::AsFd as _;
use std::sync::OnceLock;
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, fmt};

/// Where lines go, if that is journald.
static JOURNAL: OnceLock<journal::Journal> = OnceLock::new();

/// Sets logging up: `-v` and `-vv` raise the level, `BRO_LOG` (a tracing filter) overrides both.
pub fn init(verbose: u8) {
    let filter = filter(verbose);
    let registry = tracing_subscriber::registry().with(filter);
    let journal = stderr_is_the_journal().then(journal::Journal::connect).and_then(Result::ok);
    match journal {
        // Fields become BRO_CONN=, BRO_PEER=, … (systemd.journal-fields(7)).
        Some(journal) => {
            // Set once: a second call of this function would be a mistake that changes nothing.
            JOURNAL.set(journal.clone()).ok();
            registry.with(journal).init();
        }
        None => {
            use std::io::IsTerminal as _;
            let text = fmt::layer().with_writer(std::io::stderr).with_target(false);
            registry.with(text.with_ansi(std::io::stderr().is_terminal())).init();
        }
    }
}

fn filter(verbose: u8) -> EnvFilter {
    let level = match verbose {
        0 => LevelFilter::INFO,
        1 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    // The libraries' own messages are of use only to a user that asks for them by name. This filter also decides whether the
    // kernel's programs talk (`bro_sockmap::trace_wanted`).
    let default =
        format!("warn,bro={level},bro_user={level},bro_relay={level},bro_sockmap={level},bro_ebpf={level}");
    EnvFilter::builder().parse(std::env::var("BRO_LOG").unwrap_or(default)).unwrap_or_default()
}

/// Waits until journald has read all lines of this process and of those that it has forked: it looks up a line's unit by the process that sent it, and
/// `journalctl --unit` would not show what a process said last that was gone by then. For a quarter of a second at most.
pub fn flush() {
    if let Some(journal) = JOURNAL.get() {
        journal.flush(Duration::from_millis(250));
    }
}

/// systemd.exec(5): JOURNAL_STREAM names the device and inode of the stream it connected our standard error to.
fn stderr_is_the_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stat) = nix::sys::stat::fstat(std::io::stderr().as_fd()) else { return false };
    stream == format!("{}:{}", stat.st_dev, stat.st_ino)
}
