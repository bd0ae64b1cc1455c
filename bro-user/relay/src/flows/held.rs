//! Datagrams that wait for the service, or for their flow's socket: bounded in number and in bytes. Where there is no room the oldest
//! makes it, and a source that has more than its share makes it itself.

use std::collections::VecDeque;

use super::FlowId;
use crate::peer::Source;

/// A datagram that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldDatagram {
    /// Its flow.
    pub flow: FlowId,
    /// Its flow's source.
    pub source: Source,
    /// What it says.
    pub bytes: Box<[u8]>,
    /// Its ECN bits.
    pub ecn: u8,
}

/// Datagrams in the order in which they came.
#[derive(Debug)]
pub struct HeldDatagrams {
    most: usize,
    most_bytes: usize,
    waiting: VecDeque<HeldDatagram>,
    bytes: usize,
}

impl HeldDatagrams {
    /// Room for so many datagrams and, in all of them together, bytes.
    #[must_use]
    pub const fn new(most: usize, most_bytes: usize) -> Self {
        Self { most, most_bytes, waiting: VecDeque::new(), bytes: 0 }
    }

    /// How many wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Does none wait?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// One more waits; returns the flows of those that made room for it, which may be its own.
    pub fn push(&mut self, datagram: HeldDatagram) -> Vec<FlowId> {
        let (mut gone, source) = (Vec::new(), datagram.source);
        self.bytes += datagram.bytes.len();
        self.waiting.push_back(datagram);
        while self.waiting.len() > self.most || self.bytes > self.most_bytes {
            let Some(at) = self.makes_room(source) else { break };
            if let Some(datagram) = self.waiting.remove(at) {
                self.bytes -= datagram.bytes.len();
                gone.push(datagram.flow);
            }
        }
        gone
    }

    /// Which one makes room: the oldest of the newcomer's source if no other source has as much as that one; else the oldest of all.
    fn makes_room(&self, source: Source) -> Option<usize> {
        let weight = |of: Source| -> (usize, usize) {
            let those = self.waiting.iter().filter(|datagram| datagram.source == of);
            those.fold((0, 0), |(count, bytes), datagram| (count + 1, bytes + datagram.bytes.len()))
        };
        let oldest = self.waiting.front()?.source;
        let (own, other) = (weight(source), weight(oldest));
        let greedier = if self.bytes > self.most_bytes { own.1 >= other.1 } else { own.0 >= other.0 };
        let from = if greedier { source } else { oldest };
        self.waiting.iter().position(|datagram| datagram.source == from)
    }

    /// Those of one flow, in order, which wait no more.
    pub fn take(&mut self, flow: FlowId) -> Vec<HeldDatagram> {
        if self.waiting.is_empty() {
            return Vec::new();
        }
        let all = std::mem::take(&mut self.waiting);
        let (taken, rest): (Vec<_>, Vec<_>) = all.into_iter().partition(|datagram| datagram.flow == flow);
        self.waiting = rest.into();
        self.bytes -= taken.iter().map(|datagram| datagram.bytes.len()).sum::<usize>();
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn datagram(user: u32, flow: usize, length: usize, mark: u8) -> HeldDatagram {
        let flow = FlowId { index: flow, generation: 0 };
        HeldDatagram { flow, source: Source::User(user), bytes: vec![mark; length].into(), ecn: 0 }
    }

    #[test]
    fn the_oldest_of_the_greedy_source_goes() {
        let mut held = HeldDatagrams::new(4, 1 << 20);
        assert!(held.push(datagram(1, 1, 10, 0)).is_empty());
        for mark in 0..50 {
            drop(held.push(datagram(2, 2, 10, mark)));
        }
        assert_eq!(
            held.take(FlowId { index: 1, generation: 0 }).len(),
            1,
            "the other client's is still there"
        );
        let left = held.take(FlowId { index: 2, generation: 0 });
        let marks: Vec<u8> = left.iter().map(|datagram| datagram.bytes[0]).collect();
        assert_eq!(marks, [47, 48, 49]);
        assert_eq!((held.len(), held.bytes), (0, 0));
    }

    proptest! {
        #[test]
        fn is_bounded_and_keeps_order(pushed in proptest::collection::vec((0u32..3, 0usize..3, 0usize..40), 0..80),
                                      most in 1usize..10, most_bytes in 1usize..100) {
            let mut held = HeldDatagrams::new(most, most_bytes);
            let mut dropped = 0;
            for (mark, (user, flow, length)) in (0u8..).zip(&pushed) {
                // A flow has one source.
                dropped += held.push(datagram(*user, *flow * 3 + *user as usize, *length, mark)).len();
                prop_assert!(held.len() <= most && held.bytes <= most_bytes);
                prop_assert_eq!(held.bytes, held.waiting.iter().map(|datagram| datagram.bytes.len()).sum::<usize>());
            }
            prop_assert_eq!(held.len() + dropped, pushed.len());
            for flow in 0..9 {
                let taken = held.take(FlowId { index: flow, generation: 0 });
                let marks: Vec<u8> = taken.iter().filter_map(|datagram| datagram.bytes.first().copied()).collect();
                prop_assert!(marks.is_sorted());
            }
            prop_assert!(held.is_empty() && held.bytes == 0);
        }
    }
}
