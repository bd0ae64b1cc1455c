//! Bytes whose value depends on where they stand in their stream: a lost, repeated or reordered byte is seen at its offset.

/// Small repeatable random numbers (splitmix64); every test names its seed.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// The sequence that belongs to `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number from `low` up to and including `high`.
    pub const fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    /// True once in `times`.
    pub const fn once_in(&mut self, times: u64) -> bool {
        self.next().is_multiple_of(times)
    }
}

const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// An endless stream of bytes; byte n is a function of the seed and of n alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern(pub u64);

impl Pattern {
    const fn word(self, index: u64) -> [u8; 8] {
        mix(self.0 ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes()
    }

    /// Fills `buffer` with the stream from `offset` on.
    pub fn fill(self, offset: u64, buffer: &mut [u8]) {
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let word = self.word(at / 8);
            let from = usize::try_from(at % 8).expect("less than 8");
            let (part, next) = rest.split_at_mut((8 - from).min(rest.len()));
            part.copy_from_slice(&word[from..from + part.len()]);
            at += part.len() as u64;
            rest = next;
        }
    }

    /// Compares `buffer` with the stream from `offset` on; says where the first wrong byte stands and what it looks like.
    pub fn check(self, offset: u64, buffer: &[u8]) -> anyhow::Result<()> {
        let mut wanted = vec![0; buffer.len()];
        self.fill(offset, &mut wanted);
        if wanted == buffer {
            return Ok(());
        }
        let index = wanted.iter().zip(buffer).position(|(want, got)| want != got).expect("they differ");
        let came = &buffer[index..buffer.len().min(index + 8)];
        anyhow::bail!(
            "wrong byte at offset {}: {}",
            offset + index as u64,
            self.locate(offset + index as u64, came)
        );
    }

    /// Where in the stream near `offset` the bytes in `came` really belong: tells a lost byte from a repeated one.
    fn locate(self, offset: u64, came: &[u8]) -> String {
        const REACH: u64 = 1 << 20;
        if came.len() < 4 {
            return format!("{came:02x?} came");
        }
        let from = offset.saturating_sub(REACH);
        let mut around = vec![0; usize::try_from(2 * REACH).expect("fits")];
        self.fill(from, &mut around);
        match around.windows(came.len()).position(|window| window == came) {
            Some(found) => format!("what came belongs at offset {}", from + found as u64),
            None => format!("{came:02x?} came, which stands nowhere near"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_the_same_however_it_is_cut() {
        let mut whole = [0; 100];
        Pattern(7).fill(3, &mut whole);
        let mut cut = [0; 100];
        Pattern(7).fill(3, &mut cut[..11]);
        Pattern(7).fill(14, &mut cut[11..]);
        assert_eq!(whole, cut);
    }

    #[test]
    fn a_lost_byte_is_seen_at_its_offset() {
        let mut stream = [0; 100];
        Pattern(7).fill(0, &mut stream);
        let mut lost = stream[..40].to_vec();
        lost.extend(&stream[41..]);
        let error = Pattern(7).check(0, &lost).expect_err("a byte is missing").to_string();
        assert!(
            error.contains("wrong byte at offset 40") && error.contains("belongs at offset 41"),
            "{error}"
        );
    }
}
