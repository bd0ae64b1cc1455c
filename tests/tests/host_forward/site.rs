//! One container behind one forwarder: the harness's, so that other suites have it too.

pub use bro_tests::host::site::*;
