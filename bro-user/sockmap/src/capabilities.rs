//! Giving up rights that are needed no more (capabilities(7)).

use caps::{CapSet, Capability};

/// What loading and attaching the kernel relay's programs takes.
pub const KERNEL_RELAY: [Capability; 3] =
    [Capability::CAP_BPF, Capability::CAP_NET_ADMIN, Capability::CAP_PERFMON];

/// What it takes to show a service its clients' own addresses, in a namespace that is owned by this user namespace's root: its
/// agents have it from their parent.
const CLIENTS_ADDRESSES: Capability = Capability::CAP_NET_ADMIN;

/// Whether the calling thread may load such programs at all: without either of these bpf(2) refuses it every one.
#[must_use]
pub fn may_load_programs() -> bool {
    let holds = |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(true);
    [Capability::CAP_BPF, Capability::CAP_SYS_ADMIN].into_iter().any(holds)
}

/// Gives up, for the calling thread and the children it will have, what only the kernel relay's set-up needed; `shows_clients`:
/// except what its agents need then. A thread that never had them loses nothing.
pub fn drop_the_kernel_relays(shows_clients: bool) {
    let kept = shows_clients && nix::unistd::geteuid().is_root();
    KERNEL_RELAY
        .into_iter()
        .filter(|capability| !(kept && *capability == CLIENTS_ADDRESSES))
        .for_each(give_up);
}

/// Gives one up, for the calling thread and the children it will have.
pub fn give_up(capability: Capability) {
    // Ambient first: it must stay within the permitted set.
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        if let Err(error) = caps::drop(None, set, capability) {
            tracing::debug!(%error, %capability, "cannot give up a capability");
        }
    }
}
