//! `bro loader`: what it leaves for one user is used by that user's forwarders without any right, and by no other user in any way.
//!
//! Needs: root, kernel BTF. Takes: seconds.

mod life;
mod lines;
mod sharing;

/// Returns from the test, loudly, without bpf(2).
#[macro_export]
macro_rules! require_bpf {
    () => {
        use bro_tests::tier::{Need, met};
        if !met(std::thread::current().name().unwrap_or("?"), &[Need::Root, Need::Bpf]) {
            return Ok(());
        }
    };
}
