//! Content in which every lost, repeated or reordered byte shows, and numbers that look random.

use anyhow::{Result, ensure};

/// A stream of bytes that depend on their position.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    seed: u64,
    position: u64,
}

impl Stream {
    pub fn new(seed: u64) -> Self {
        Self { seed, position: 0 }
    }

    pub fn position(&self) -> u64 {
        self.position
    }

    fn at(&self, position: u64) -> u8 {
        ((position >> 3).wrapping_add(self.seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (8 * (position & 7)))
            as u8
    }

    pub fn next(&mut self, count: usize) -> Vec<u8> {
        let from = self.position;
        self.position += count as u64;
        (from..self.position).map(|position| self.at(position)).collect()
    }

    pub fn check(&mut self, got: &[u8]) -> Result<()> {
        for &byte in got {
            ensure!(byte == self.at(self.position), "wrong byte at {}", self.position);
            self.position += 1;
        }
        Ok(())
    }
}

/// Numbers for sizes and pauses (xorshift): the same for the same seed.
#[derive(Debug)]
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % limit.max(1)
    }
}
