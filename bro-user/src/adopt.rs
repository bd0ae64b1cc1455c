//! `--adopt`: which sockets a service has itself.

use bro_relay::listener::SocketKind;
use clap::ValueEnum;

/// `--adopt=`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Adopt {
    /// Those of TCP, and unix sockets
    #[value(alias = "true")]
    On,
    /// Those of UDP
    Udp,
    /// All of these
    All,
    /// None
    #[value(alias = "false")]
    Off,
}

impl Adopt {
    /// Is there any that a service may have?
    #[must_use]
    pub const fn is_any(self) -> bool {
        !matches!(self, Self::Off)
    }

    /// May a service have a socket of this kind? The ports of vsock(7) belong to no network namespace: a service in a container cannot have the one
    /// that systemd has.
    #[must_use]
    pub const fn offers(self, kind: SocketKind) -> bool {
        match kind {
            SocketKind::Stream => matches!(self, Self::On | Self::All),
            SocketKind::Datagram => matches!(self, Self::Udp | Self::All),
            SocketKind::Vsock | SocketKind::SeqPacket | SocketKind::UnixDatagram => false,
        }
    }

    /// As it is written after `--adopt=`, and noted in a unit.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Udp => "udp",
            Self::All => "all",
            Self::Off => "off",
        }
    }

    /// By that word.
    #[must_use]
    pub fn of(word: &str) -> Option<Self> {
        Self::value_variants().iter().copied().find(|adopt| adopt.word() == word)
    }
}
