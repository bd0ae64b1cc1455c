//! What the kernel relay's programs and user space share: the record of a lane, keys, events, and *the decision itself* as
//! pure code, so that what runs in the kernel is tested and model-checked on the host (`tests/`).
//!
//! Words used here. A **sender** is a socket on this host whose `sendmsg` is hooked: the service's accepted socket
//! (service lane) or a client's socket (client lane). Its **target** is the forwarder's socket on the far side of the
//! connection; the program pushes what the sender sends straight into the target's transmit queue. A **lane** is one
//! direction of one connection, with one [`Record`]. **Passed** bytes take the ordinary way: TCP to the forwarder, which
//! relays them.
#![no_std]

mod decision;
mod event;
mod keys;
mod owners;
mod record;
mod seat;

pub use decision::{
    BULK, MESSAGE_OVERHEAD, QUIET_CREDIT, SEGMENT, Snapshot, Verdict, Watermark, charge, credit_for, decide,
    grant, regrant, watermark,
};
pub use event::{Event, RawEvent, RawProved};
pub use keys::{
    Flow, HookRequest, REQUEST_OFFSET, Route, Sender, SenderState, TargetKey, Watch, WatchKey, kind, role,
    v4_mapped,
};
pub use owners::Owners;
pub use record::{Counter, Reason, Record};
pub use seat::{About, SEATS, seat_of};
