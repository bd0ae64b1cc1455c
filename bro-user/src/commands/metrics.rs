//! `bro metrics`: the figures of every activated service, once.

use std::io::Write as _;

use super::status::list;
use crate::systemd::scope::RuntimeScope;
use crate::{exit, metrics};

/// Runs `bro metrics`.
///
/// # Errors
/// When the unit directory cannot be read.
pub fn run(options: &crate::cli::Metrics) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let services = runtime.block_on(list::all(RuntimeScope::choose(options.system, options.user)))?;
    let text = metrics::of(&services)?;
    exit::unless_reader_has_gone(std::io::stdout().lock().write_all(text.as_bytes()).map_err(Into::into))
}
