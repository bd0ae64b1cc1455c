//! What happens in another network namespace: the [`agent`] that makes or connects sockets there, its protocol, and its identity.

pub mod agent;
pub mod identity;
pub mod netlink;
pub mod replies;
pub mod wire;
