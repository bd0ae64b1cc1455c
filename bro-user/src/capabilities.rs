//! Giving up rights that are needed no more (capabilities(7)).

use caps::{CapSet, Capability};

/// What loading and attaching the kernel relay's programs takes.
pub const KERNEL_RELAY: [Capability; 3] =
    [Capability::CAP_BPF, Capability::CAP_NET_ADMIN, Capability::CAP_PERFMON];

/// Gives up, for the calling thread and the children it will have, what only the kernel relay's set-up needed. A thread that
/// never had them loses nothing.
pub fn drop_the_kernel_relays() {
    for capability in KERNEL_RELAY {
        // Ambient first: it must stay within the permitted set.
        for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
            if let Err(error) = caps::drop(None, set, capability) {
                tracing::debug!(%error, %capability, "cannot give up a capability");
            }
        }
    }
}
