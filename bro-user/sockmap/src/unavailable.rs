//! Why the kernel relay, or one lane of it, cannot be had: each reason with its mend.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::MapError;

use super::btf::BtfError;

/// Why the kernel relay cannot be had on this host, or not for this process.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// bpf(2) said EPERM.
    #[error("not permitted to {0}")]
    NotPermitted(&'static str, #[source] io::Error),
    /// The kernel does not describe its types, or lacks a field.
    #[error("this kernel's types are not known")]
    NoBtf(#[source] BtfError),
    /// /sys/kernel/btf/vmlinux cannot be read.
    #[error("the kernel's BTF (/sys/kernel/btf/vmlinux) cannot be read")]
    UnreadableBtf(#[source] io::Error),
    /// A map could not be made.
    #[error("the kernel refused the map {name}")]
    Map {
        /// The map's name.
        name: String,
        /// What bpf(2) said.
        #[source]
        source: io::Error,
    },
    /// The verifier refused a program; the end of what it said.
    #[error("the kernel refused the program {name}: {verifier}")]
    Verifier {
        /// The program's name.
        name: &'static str,
        /// The last lines of the verifier's log.
        verifier: String,
    },
    /// The memory of a map could not be mapped.
    #[error("the records cannot be shared with the kernel")]
    Mapping(#[source] io::Error),
    /// A cgroup's folder could not be opened.
    #[error("the cgroup {} cannot be opened", .0.display())]
    Cgroup(PathBuf, #[source] io::Error),
    /// E2BIG: a cgroup takes 64 programs of one kind.
    #[error("the cgroup {} has as many sockops programs as the kernel allows (64)", .0.display())]
    CgroupFull(PathBuf),
    /// EPERM at attaching although loading was permitted.
    #[error("a sockops program is attached exclusively to the cgroup {}", .0.display())]
    CgroupExclusive(PathBuf),
    /// Attaching failed for another reason.
    #[error("the sockops program could not be attached to {}", .0.display())]
    Attach(PathBuf, #[source] io::Error),
    /// The embedded object is not what this program expects.
    #[error("the embedded programs are damaged: {0}")]
    Object(String),
    /// The self-test failed.
    #[error("the self-test failed: {0}")]
    SelfTest(String),
    /// The self-test has seen that hooked sockets answer FIONREAD with 0, whatever waits.
    #[error(
        "this kernel answers FIONREAD with 0 for hooked sockets, so a service that asks how much waits (Java, nginx) would wait for \
         ever"
    )]
    FionreadLies,
    /// The pins of `bro loader` cannot be opened or made.
    #[error("bro loader's {} cannot be used", .0.display())]
    Pin(PathBuf, #[source] io::Error),
    /// They are another version's.
    #[error("what bro loader has loaded is of another version than this program")]
    OtherVersion,
    /// The cgroup that they were attached to is gone.
    #[error("the cgroup that bro loader's programs looked at is gone")]
    Detached,
    /// Every seat is taken.
    #[error(
        "{} other forwarders of this user have the kernel relay through bro loader, which is all there can be",
        bro_ebpf::SEATS
    )]
    NoSeat,
    /// A set for the same user is there under the other designation.
    #[error("the kernel relay is loaded for this user already, given {0}")]
    Named(&'static str),
    /// The programs of `bro loader` do not look there.
    #[error("bro loader's programs do not look at the cgroup {}, only at this user's own", .0.display())]
    Outside(PathBuf),
}

impl Unavailable {
    /// What the user can do about it.
    #[must_use]
    pub fn mend(&self) -> &'static str {
        match self {
            _ if self.wants_descriptors() => {
                "raise the limit on descriptors (LimitNOFILE= of the unit, `ulimit -n`; of the whole system: fs.file-max)"
            }
            Self::NotPermitted(..) if !crate::loader_unit_is_installed() => {
                "an ordinary user needs no rights once root has loaded it: `sudo bro loader $(id -u)`, until the next boot \
                 (bro-loader@.service, which does it at each, is not installed: bro's packages bring it); a system unit may \
                 have AmbientCapabilities=CAP_BPF CAP_NET_ADMIN CAP_PERFMON instead (and none of them taken away by \
                 CapabilityBoundingSet= or a user namespace)"
            }
            Self::NotPermitted(..) => {
                "an ordinary user needs no rights with `sudo systemctl enable --now bro-loader@$(id -u)`; a system unit may \
                 have AmbientCapabilities=CAP_BPF CAP_NET_ADMIN CAP_PERFMON instead (and none of them taken away by \
                 CapabilityBoundingSet= or a user namespace)"
            }
            Self::NoBtf(_) | Self::UnreadableBtf(_) => {
                "use a kernel with CONFIG_DEBUG_INFO_BTF=y and /sys mounted"
            }
            Self::Map { .. } => {
                "use Linux 5.19 or newer with CONFIG_BPF_STREAM_PARSER=y; if it is memory: LimitMEMLOCK=infinity or a \
                 smaller --connections-max="
            }
            Self::Verifier { .. } => "use Linux 5.19 or newer; on such a one please report this line",
            Self::Mapping(_) => "raise the memory limit of the unit (MemoryMax=, LimitAS=)",
            Self::Cgroup(..) => "the cgroup must exist, below a mounted cgroup v2 file system",
            Self::CgroupFull(_) => "detach what is no longer needed (bpftool cgroup tree)",
            Self::CgroupExclusive(_) => {
                "attach that program with BPF_F_ALLOW_MULTI (bpftool cgroup tree shows it)"
            }
            Self::Attach(..) => "see bpftool cgroup tree for what else is attached there",
            Self::Object(_) => "build bro anew; cargo xtask build-ebpf remakes the programs",
            Self::FionreadLies => {
                "a kernel without that defect has the kernel relay back: Linux before 6.6.128, 6.12.75 and 6.18.14 of these series, or \
                 one with the commit 04af4efde58a of July 2026; for a service that never asks there is --relay=sockmap"
            }
            Self::SelfTest(_) => "please report this line with the kernel's version",
            Self::Pin(_, error) if error.raw_os_error() == Some(nix::libc::EPERM) => {
                "use Linux 5.19 or newer, or `sysctl kernel.unprivileged_bpf_disabled=0`; a SystemCallFilter= of the unit must \
                 allow bpf"
            }
            Self::Pin(..) | Self::OtherVersion | Self::Detached => {
                "`sudo systemctl restart bro-loader@$(id -u)` loads anew"
            }
            Self::Named(_) => {
                "one of bro-loader@NAME and bro-loader@UID is enough: `systemctl disable --now` the other"
            }
            Self::NoSeat => "end one of them, or give this one's unit the capabilities to load for itself",
            Self::Outside(_) => "the container and its clients have to be the same user's as the forwarder",
        }
    }
}

impl Unavailable {
    /// Is the reason a missing descriptor, whatever it was needed for?
    fn wants_descriptors(&self) -> bool {
        let numbers = [nix::libc::EMFILE, nix::libc::ENFILE];
        match self {
            Self::Verifier { verifier: said, .. } | Self::Object(said) | Self::SelfTest(said) => {
                numbers.iter().any(|number| said.contains(&format!("(os error {number})")))
            }
            other => errno_within(other).is_some_and(|number| numbers.contains(&number)),
        }
    }
}

/// Why one connection has no lane.
#[derive(Debug, thiserror::Error)]
pub enum LaneRefused {
    /// All lanes are in use.
    #[error("all lanes are in use")]
    NoSlot,
    /// The target half-closed already (EOPNOTSUPP).
    #[error("the socket is no longer fully open")]
    NotEstablished,
    /// Another program's map has the target (EBUSY), or it has an upper-layer protocol (EINVAL).
    #[error("the kernel did not take the socket into the map")]
    Socket(#[source] io::Error),
    /// The route could not be written.
    #[error("the kernel did not take the route")]
    Route(#[source] io::Error),
    /// The target's send memory could not be read.
    #[error("the socket's send memory cannot be read")]
    Memory(#[source] io::Error),
}

/// A map that is not what it was made as.
pub(super) fn damaged(error: MapError) -> Unavailable {
    Unavailable::Object(chain(&error))
}

/// The first error number in an error's chain of causes.
pub(super) fn errno_within(error: &(dyn Error + 'static)) -> Option<i32> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// What went wrong with a pin.
pub(super) fn not_pinned(path: &Path, error: &(dyn Error + 'static)) -> Unavailable {
    let number = errno_within(error).map(io::Error::from_raw_os_error);
    Unavailable::Pin(path.into(), number.unwrap_or_else(|| io::Error::other(chain(error))))
}

/// An error with its causes, on one line.
pub(super) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        line = format!("{line}: {error}");
        next = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_of_descriptors_is_told_with_that_limit() {
        let error = || io::Error::from_raw_os_error(nix::libc::EMFILE);
        for reason in [
            Unavailable::Map { name: "RECORDS".into(), source: error() },
            Unavailable::UnreadableBtf(error()),
            Unavailable::Mapping(error()),
            Unavailable::Verifier { name: "bro_send", verifier: format!("{}: without a word", error()) },
            Unavailable::SelfTest(format!("the service listens: {}", error())),
        ] {
            assert!(reason.mend().contains("LimitNOFILE="), "{reason}: {}", reason.mend());
        }
        let memory = io::Error::from_raw_os_error(nix::libc::ENOMEM);
        let reason = Unavailable::Map { name: "RECORDS".into(), source: memory };
        assert!(reason.mend().contains("LimitMEMLOCK="), "{}", reason.mend());
    }
}
