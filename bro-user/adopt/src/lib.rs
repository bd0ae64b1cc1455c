//! Adoption: a container that was created with a seccomp profile which notifies listen(2) gets systemd's own listening socket put in the place of
//! the one that its service made. The service, unmodified, accepts the host's clients itself from then on.
//!
//! The profile ([`profile`]) has a `listenerPath`, which leads to this process: the OCI runtime sends a notification descriptor there ([`receiver`]). An
//! [`agent`] answers what the container's processes ask by it (seccomp_unotify(2)). What it does at listen(2) is in [`agent`]'s `listen.rs`: it takes a
//! duplicate of the service's socket (pidfd_getfd(2)), finds the listener that fits ([`family`]), carries socket options and epoll registrations over,
//! replaces it, and answers 0. A socket for datagrams never listens: that one is replaced at bind(2) ([`agent`]'s `datagrams.rs`).
//!
//! The container is not trusted. No decision depends on its memory but for the address that it binds a socket for datagrams to, by which it can get no
//! other socket than it gets anyway; and none on a look at a descriptor that the kernel would look up again: sockets are known
//! by their SO_COOKIE, and a call that must not be made is answered and never continued.

pub mod agent;
pub mod bound;
mod budget;
pub mod caller;
pub mod clients;
mod datagram_options;
pub mod datagrams;
mod epoll;
pub mod family;
pub mod health;
mod in_flight;
mod inside;
mod inside_datagrams;
mod notification;
mod option_name;
mod options;
mod original;
pub mod profile;
pub mod receiver;
pub mod socket;
pub mod store;
pub mod surroundings;
mod sys;

pub use agent::{Agent, HostListener};
pub use notification::Call;
pub use surroundings::{Event, Misfit, Step, Stored, Surroundings};
