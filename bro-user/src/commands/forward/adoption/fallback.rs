//! Why a listener is relayed although it was to be adopted.

use std::time::Duration;

use bro_adopt::Misfit;
use bro_adopt::health::Damage;
use bro_relay::listener::SocketKind;

use crate::fallback::FallbackKind;

/// The reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fallback {
    /// A service listens, and no runtime has sent a notification descriptor.
    #[error(
        "the container has no seccomp profile of bro's: its runtime did not connect to the socket “seccomp”"
    )]
    NoProfile,
    /// A service listens, and not with a listen(2) of the container's own processes that this one could answer.
    #[error("the service listens at no socket that this one fits")]
    NoneFits,
    /// Nothing listens.
    #[error("the service did not listen within {} (--start-timeout)", crate::systemd::time_span::roughly(*.0))]
    StartTimeout(Duration),
    /// It listens at one that does not fit.
    #[error("{1}")]
    Misfit(FallbackKind, String),
    /// It is of a kind that no `--adopt=` names.
    #[error("{0} are not adopted")]
    Kind(&'static str),
    /// Nothing would tell of the service's clients, and so when it is idle.
    #[error("{0}: it could not be seen who is connected to a service that accepts its clients itself")]
    Uncountable(String),
    /// The listener is broken.
    #[error("{0}; its socket unit is started anew when no client is connected")]
    Damaged(#[from] Damage),
}

impl Fallback {
    /// Why no service ever gets a socket of this kind, if none does.
    pub(super) const fn never_adopted(kind: SocketKind) -> Option<Self> {
        match kind {
            SocketKind::Stream | SocketKind::Datagram => None,
            SocketKind::Vsock => {
                Some(Self::Kind("sockets of vsock, whose ports no container has for itself,"))
            }
            SocketKind::SeqPacket => Some(Self::Kind("unix sockets of messages (ListenSequentialPacket=)")),
            SocketKind::UnixDatagram => Some(Self::Kind("unix sockets for datagrams")),
        }
    }

    pub(super) const fn kind(&self) -> FallbackKind {
        match self {
            Self::NoProfile => FallbackKind::NoProfile,
            Self::NoneFits => FallbackKind::NoneFits,
            Self::StartTimeout(_) => FallbackKind::StartTimeout,
            Self::Misfit(kind, _) => *kind,
            Self::Kind(_) => FallbackKind::Kind,
            Self::Uncountable(_) => FallbackKind::Uncountable,
            Self::Damaged(_) => FallbackKind::Damaged,
        }
    }
}

impl From<&Misfit> for Fallback {
    fn from(misfit: &Misfit) -> Self {
        let kind = match misfit {
            Misfit::Damaged(damage) => return Self::Damaged(*damage),
            Misfit::Relayed => FallbackKind::NoneFits,
            Misfit::Family => FallbackKind::Family,
            Misfit::Options(_) | Misfit::Epoll(_) | Misfit::Replacing(_) => FallbackKind::Refused,
        };
        Self::Misfit(kind, misfit.to_string())
    }
}
