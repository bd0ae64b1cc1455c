//! A million short connections over both lanes, which leave nothing behind. Takes some minutes, so it is run only when named
//! (`cargo xtask test million`); sockmap_faults has some thousands.
//!
//! Needs: root, kernel BTF. Takes: minutes.

use anyhow::Result;
use bro_tests::short;
use bro_tests::tier::{Need, met};

#[test]
fn a_million_short_connections_leave_nothing() -> Result<()> {
    if !met("a_million_short_connections_leave_nothing", &[Need::Root, Need::Bpf]) {
        return Ok(());
    }
    short::leave_nothing(1_000_000)
}
