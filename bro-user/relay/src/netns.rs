//! What happens in another network namespace: the [`agent`] that makes or connects sockets there, how it is talked to, and as whom.

pub mod agent;
pub mod identity;
pub mod netlink;
pub mod replies;
pub mod wire;
