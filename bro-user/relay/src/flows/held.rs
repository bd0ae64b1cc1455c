//! Datagrams that wait for the service, or for their flow's socket: bounded in number and in bytes. Where there is no room the oldest
//! makes it, and a source that has more than its share makes it itself. Whatever a flood does with that takes (almost) constant time.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

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

/// What waits of one source.
#[derive(Debug, Default)]
struct SourceShare {
    numbers: BTreeSet<u64>,
    bytes: usize,
}

/// Datagrams in the order in which they came.
#[derive(Debug)]
pub struct HeldDatagrams {
    most: usize,
    most_bytes: usize,
    /// By their numbers, which grow.
    waiting: BTreeMap<u64, HeldDatagram>,
    flows: HashMap<FlowId, VecDeque<u64>>,
    sources: HashMap<Source, SourceShare>,
    bytes: usize,
    next: u64,
}

impl HeldDatagrams {
    /// Room for so many datagrams and, in all of them together, bytes.
    #[must_use]
    pub fn new(most: usize, most_bytes: usize) -> Self {
        let (flows, sources) = (HashMap::new(), HashMap::new());
        Self { most, most_bytes, waiting: BTreeMap::new(), flows, sources, bytes: 0, next: 0 }
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

    /// How many of one source wait, and how many bytes.
    #[must_use]
    pub fn share(&self, source: Source) -> (usize, usize) {
        self.sources.get(&source).map_or((0, 0), |share| (share.numbers.len(), share.bytes))
    }

    /// One more waits; returns the flows of those that made room for it, which may be its own.
    pub fn push(&mut self, datagram: HeldDatagram) -> Vec<FlowId> {
        let (mut gone, source, number) = (Vec::new(), datagram.source, self.next);
        self.next += 1;
        self.bytes += datagram.bytes.len();
        self.flows.entry(datagram.flow).or_default().push_back(number);
        let share = self.sources.entry(source).or_default();
        share.bytes += datagram.bytes.len();
        let _new = share.numbers.insert(number);
        let _none = self.waiting.insert(number, datagram);
        while self.waiting.len() > self.most || self.bytes > self.most_bytes {
            let Some(datagram) = self.makes_room(source).and_then(|number| self.remove(number)) else {
                break;
            };
            // A flow has one source, so that it is the flow's oldest too.
            if let Some(numbers) = self.flows.get_mut(&datagram.flow) {
                let _number = numbers.pop_front();
                if numbers.is_empty() {
                    let _empty = self.flows.remove(&datagram.flow);
                }
            }
            gone.push(datagram.flow);
        }
        gone
    }

    /// Which one makes room: the oldest of the newcomer's source if that has more, with the newcomer, than the source of the oldest of all; else
    /// that oldest.
    fn makes_room(&self, source: Source) -> Option<u64> {
        let (oldest, datagram) = self.waiting.first_key_value()?;
        let (own, other) = (self.sources.get(&source)?, self.sources.get(&datagram.source)?);
        let greedier = if self.bytes > self.most_bytes {
            own.bytes > other.bytes
        } else {
            own.numbers.len() > other.numbers.len()
        };
        if greedier { own.numbers.first().copied() } else { Some(*oldest) }
    }

    /// Takes one out, but for what its flow knows of it.
    fn remove(&mut self, number: u64) -> Option<HeldDatagram> {
        let datagram = self.waiting.remove(&number)?;
        self.bytes -= datagram.bytes.len();
        if let Some(share) = self.sources.get_mut(&datagram.source) {
            share.bytes -= datagram.bytes.len();
            let _was_there = share.numbers.remove(&number);
            if share.numbers.is_empty() {
                let _empty = self.sources.remove(&datagram.source);
            }
        }
        Some(datagram)
    }

    /// Those of one flow, in order, which wait no more.
    pub fn take(&mut self, flow: FlowId) -> Vec<HeldDatagram> {
        let numbers = self.flows.remove(&flow).unwrap_or_default();
        numbers.into_iter().filter_map(|number| self.remove(number)).collect()
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
        assert_eq!(held.share(Source::User(2)), (3, 30));
        let left = held.take(FlowId { index: 2, generation: 0 });
        assert_eq!(held.share(Source::User(2)), (0, 0));
        let marks: Vec<u8> = left.iter().map(|datagram| datagram.bytes[0]).collect();
        assert_eq!(marks, [47, 48, 49]);
        assert_eq!((held.len(), held.bytes), (0, 0));
    }

    #[test]
    fn among_equals_the_oldest_goes() {
        let mut held = HeldDatagrams::new(4, 1 << 20);
        let gone: Vec<FlowId> =
            (0u8..10).flat_map(|one| held.push(datagram(one.into(), one.into(), 10, one))).collect();
        assert_eq!(gone.iter().map(|flow| flow.index).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
        assert_eq!(held.take(FlowId { index: 9, generation: 0 }).len(), 1);
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
                prop_assert_eq!(held.bytes, held.waiting.values().map(|datagram| datagram.bytes.len()).sum::<usize>());
            }
            prop_assert_eq!(held.len() + dropped, pushed.len());
            for flow in 0..9 {
                let taken = held.take(FlowId { index: flow, generation: 0 });
                let marks: Vec<u8> = taken.iter().filter_map(|datagram| datagram.bytes.first().copied()).collect();
                prop_assert!(marks.is_sorted());
            }
            prop_assert!(held.is_empty() && held.bytes == 0 && held.flows.is_empty() && held.sources.is_empty());
        }
    }
}
