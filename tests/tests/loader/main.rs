//! `bro loader`: what it leaves for one user is used by his forwarders without any right, and by nobody else in any way.

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
