//! The records that the kernel relay's programs and user space share. Empty until the kernel relay lands: this crate will
//! hold the `sk_msg` and `sockops` programs and, as pure code, the decision they take.
#![no_std]
