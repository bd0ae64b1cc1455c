//! `bro loader`: what it leaves for one user is used by that user's forwarders without any right, and by no other user in any way.
//!
//! Needs: root, kernel BTF. Takes: seconds.

mod life;
mod lines;
mod sharing;
