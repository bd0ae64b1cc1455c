//! What a load generator asks the service for: the first bytes of a connection.

use anyhow::{Result, bail};

/// A letter, and for all but [`Ask::Ping`] a number behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// One byte back, at once. One byte long itself: the cheapest exchange there is.
    Ping,
    /// Everything comes back.
    Echo,
    /// So many bytes to the client.
    Source(u64),
    /// The same in writes of this power of two, each tried first and waited for only when it does not fit, as many programs do.
    Writes(u64, u8),
    /// So many bytes to the service, which then says so in eight bytes.
    Sink(u64),
    /// Both at once, then the eight bytes.
    Both(u64),
    /// When the client has half-closed: eight bytes that count what came, and so many bytes of the pattern, then the end.
    AnswerAtEnd(u64),
    /// A reset.
    Abort,
    /// A byte back; the service then remembers under this token what comes and how the connection ends.
    Watch(u64),
    /// The service half-closes at once, and watches what still comes.
    HalfClose(u64),
    /// A byte back; then the service never reads.
    Deaf,
    /// Bytes without end, counted under this token.
    Flood(u64),
    /// What is known of a token: the bytes, then how it ended.
    Query(u64),
}

/// How long an ask is, but for [`Ask::Ping`].
pub const LENGTH: usize = 9;
/// The whole of [`Ask::Ping`].
pub const PING: u8 = b'P';

/// How a watched connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Open,
    Eof,
    Reset,
}

impl End {
    pub fn encode(self) -> u64 {
        match self {
            Self::Open => 0,
            Self::Eof => 1,
            Self::Reset => 2,
        }
    }

    pub fn decode(code: u64) -> Self {
        match code {
            1 => Self::Eof,
            2 => Self::Reset,
            _ => Self::Open,
        }
    }
}

impl Ask {
    pub fn encode(self) -> Vec<u8> {
        let (letter, number) = match self {
            Self::Ping => return vec![PING],
            Self::Echo => (b'E', 0),
            Self::Source(n) => (b'S', n),
            // No stream has 2^48 bytes.
            Self::Writes(n, log) => (b'T', n | u64::from(log) << 48),
            Self::Sink(n) => (b'K', n),
            Self::Both(n) => (b'B', n),
            Self::AnswerAtEnd(n) => (b'H', n),
            Self::Abort => (b'A', 0),
            Self::Watch(token) => (b'W', token),
            Self::HalfClose(token) => (b'G', token),
            Self::Deaf => (b'N', 0),
            Self::Flood(token) => (b'F', token),
            Self::Query(token) => (b'Q', token),
        };
        let mut bytes = vec![letter];
        bytes.extend_from_slice(&number.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: [u8; LENGTH]) -> Result<Self> {
        let [letter, number @ ..] = bytes;
        let n = u64::from_le_bytes(number);
        Ok(match letter {
            b'E' => Self::Echo,
            b'S' => Self::Source(n),
            b'T' => Self::Writes(n & ((1 << 48) - 1), (n >> 48) as u8),
            b'K' => Self::Sink(n),
            b'B' => Self::Both(n),
            b'H' => Self::AnswerAtEnd(n),
            b'A' => Self::Abort,
            b'W' => Self::Watch(n),
            b'G' => Self::HalfClose(n),
            b'N' => Self::Deaf,
            b'F' => Self::Flood(n),
            b'Q' => Self::Query(n),
            other => bail!("no such ask: {other:#x}"),
        })
    }
}

/// The byte at a place of a stream whose bytes are compared: neighbouring blocks of any size differ.
pub fn pattern(place: u64) -> u8 {
    let mixed = (place / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> (8 * (place % 8))) as u8 ^ (mixed >> 56) as u8
}

/// The pattern from a place on.
pub fn fill(buffer: &mut [u8], place: u64) {
    for (byte, place) in buffer.iter_mut().zip(place..) {
        *byte = pattern(place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ask_survives_the_wire() {
        for ask in [
            Ask::Echo,
            Ask::Source(7),
            Ask::Writes(1 << 40, 20),
            Ask::Both(1 << 40),
            Ask::Abort,
            Ask::Query(3),
        ] {
            let bytes: [u8; LENGTH] = ask.encode().try_into().expect("nine bytes");
            assert_eq!(Ask::decode(bytes).expect("an ask"), ask);
        }
        assert!(Ask::decode([0; LENGTH]).is_err());
    }

    #[test]
    fn blocks_of_the_pattern_differ() {
        let block =
            |number: u64, size: u64| (number * size..(number + 1) * size).map(pattern).collect::<Vec<_>>();
        for size in [64, 1024, 4096, 65536] {
            assert_ne!(block(0, size), block(1, size));
            assert_ne!(block(1, size), block(2, size));
        }
    }
}
