//! What an epoll event is about, packed into the 64 bits that epoll carries.

use crate::relay::Side;

/// The subject of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    /// One side of a connection. The generation tells it from an earlier one with the same index, which may still have an event in
    /// the batch.
    Connection { index: usize, generation: u32, side: Side },
    /// A listener.
    Listener(usize),
    /// The agent in a target's namespace.
    Agent(usize),
    /// A flow's socket in the service's namespace, with a generation as of connections.
    Flow { index: usize, generation: u32 },
    /// The control process.
    Mailbox,
    /// The kernel relay's programs.
    Kernel,
    /// The thread that answers clients' datagrams.
    WayBack,
}

/// Generations wrap at this many connections; a batch of events never spans so many.
pub(super) const GENERATIONS: u64 = 1 << 29;

/// The two bits of what is not a connection, listener or agent, and one more; 24 are left for a generation.
const FLOW: u64 = (3 << 62) | (1 << 61);

impl From<Token> for u64 {
    fn from(token: Token) -> Self {
        match token {
            Token::Connection { index, generation, side } => {
                (u64::from(generation) << 33) | ((index as u64) << 1) | u64::from(side == Side::Service)
            }
            Token::Listener(index) => (1 << 62) | index as u64,
            Token::Agent(index) => (2 << 62) | index as u64,
            Token::Flow { index, generation } => {
                FLOW | (u64::from(generation) << 32) | (index as u64 & u64::from(u32::MAX))
            }
            Token::Mailbox => 3 << 62,
            Token::Kernel => (3 << 62) | 1,
            Token::WayBack => (3 << 62) | 2,
        }
    }
}

impl From<u64> for Token {
    fn from(packed: u64) -> Self {
        let rest = packed & ((1 << 62) - 1);
        match packed >> 62 {
            0 => Self::Connection {
                index: ((rest >> 1) & u64::from(u32::MAX)) as usize,
                generation: (rest >> 33) as u32,
                side: if rest & 1 == 1 { Side::Service } else { Side::Client },
            },
            1 => Self::Listener(rest as usize),
            2 => Self::Agent(rest as usize),
            _ if packed & FLOW == FLOW => Self::Flow {
                index: (rest & u64::from(u32::MAX)) as usize,
                generation: ((rest >> 32) & ((1 << 24) - 1)) as u32,
            },
            _ if rest == 1 => Self::Kernel,
            _ if rest == 2 => Self::WayBack,
            _ => Self::Mailbox,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn unpacks_what_it_packs(index in 0usize..1 << 32, generation in 0u32..1 << 29, service: bool) {
            let side = if service { Side::Service } else { Side::Client };
            for token in [Token::Connection { index, generation, side }, Token::Listener(index), Token::Agent(index), Token::Flow { index, generation: generation % (1 << 24) }, Token::Mailbox, Token::Kernel, Token::WayBack] {
                prop_assert_eq!(Token::from(u64::from(token)), token);
            }
        }
    }
}
