//! The table of flows: bounded, in order of use. A flow that comes when the table is full takes the place of another, and which one
//! is decided so that a source that opens flow after flow takes places from itself and not from others.

use std::collections::HashMap;
use std::time::Instant;

use slab::Slab;

use super::FlowEnds;
use crate::peer::Source;

/// How many of the least recently used flows are looked at for one whose source has more than its share.
const LOOK: usize = 64;

/// No flow.
const NONE: usize = usize::MAX;

/// Flows in order of use.
#[derive(Debug, Clone, Copy)]
struct Chain {
    first: usize,
    last: usize,
    length: usize,
}

impl Chain {
    const EMPTY: Self = Self { first: NONE, last: NONE, length: 0 };
}

/// A flow's neighbours in a chain.
#[derive(Debug, Clone, Copy)]
struct Neighbours {
    before: usize,
    after: usize,
}

impl Neighbours {
    const NONE: Self = Self { before: NONE, after: NONE };
}

/// The chains that each flow is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    /// Of all flows.
    All,
    /// Of its source's.
    Source,
}

#[derive(Debug)]
struct FlowSlot<T> {
    key: FlowEnds,
    /// The place of its source.
    source: usize,
    used: Instant,
    all: Neighbours,
    siblings: Neighbours,
    value: T,
}

/// Flows by what tells them apart, each with a value.
#[derive(Debug)]
pub struct FlowTable<T> {
    limit: usize,
    per_source: Option<usize>,
    entries: Slab<FlowSlot<T>>,
    places: HashMap<FlowEnds, usize>,
    all: Chain,
    sources: Slab<(Source, Chain)>,
    source_places: HashMap<Source, usize>,
}

/// What came of a new flow.
#[derive(Debug)]
pub struct NewFlow<T> {
    /// Its place.
    pub index: usize,
    /// The flow whose place it took, with that one's place and whether its own source's limit was the reason.
    pub instead_of: Option<(usize, FlowEnds, T)>,
}

impl<T> FlowTable<T> {
    /// A table for `limit` flows, at least one; of each source at most `per_source`.
    #[must_use]
    pub fn new(limit: usize, per_source: Option<usize>) -> Self {
        Self {
            limit: limit.max(1),
            per_source,
            entries: Slab::new(),
            places: HashMap::new(),
            all: Chain::EMPTY,
            sources: Slab::new(),
            source_places: HashMap::new(),
        }
    }

    /// How many flows there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.all.length
    }

    /// Is there none?
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.all.length == 0
    }

    /// The place of a flow.
    #[must_use]
    pub fn find(&self, key: &FlowEnds) -> Option<usize> {
        self.places.get(key).copied()
    }

    /// The flow at a place.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<(&FlowEnds, &T)> {
        self.entries.get(index).map(|entry| (&entry.key, &entry.value))
    }

    /// The same, to be changed.
    pub fn get_mut(&mut self, index: usize) -> Option<(&FlowEnds, &mut T)> {
        self.entries.get_mut(index).map(|entry| (&entry.key, &mut entry.value))
    }

    /// Every flow with its place, the least recently used one first, and when it was used.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &FlowEnds, Instant, &T)> {
        let mut next = self.all.first;
        std::iter::from_fn(move || {
            let (index, entry) = (next, self.entries.get(next)?);
            next = entry.all.after;
            Some((index, &entry.key, entry.used, &entry.value))
        })
    }

    /// It is the most recently used one from now on, unless it is known to have been used later than that.
    pub fn touch(&mut self, index: usize, now: Instant) {
        if self.entries.get(index).is_none_or(|entry| entry.used > now) {
            return;
        }
        self.entries[index].used = now;
        for which in [Which::All, Which::Source] {
            self.unlink(which, index);
            self.append(which, index);
        }
    }

    /// A new flow, which is not in the table yet. Another one gives up its place to it where the table is full, or its source has as
    /// many as it may have.
    pub fn insert(&mut self, key: FlowEnds, source: Source, value: T, now: Instant) -> NewFlow<T> {
        let gone = self.gives_way(source);
        let instead_of = gone.and_then(|index| self.remove(index).map(|(key, value)| (index, key, value)));
        let source_place = match self.source_places.get(&source) {
            Some(place) => *place,
            None => {
                let place = self.sources.insert((source, Chain::EMPTY));
                let _none = self.source_places.insert(source, place);
                place
            }
        };
        let index = self.entries.insert(FlowSlot {
            key: key.clone(),
            source: source_place,
            used: now,
            all: Neighbours::NONE,
            siblings: Neighbours::NONE,
            value,
        });
        let _none = self.places.insert(key, index);
        self.append(Which::All, index);
        self.append(Which::Source, index);
        NewFlow { index, instead_of }
    }

    /// The flow at a place ends.
    pub fn remove(&mut self, index: usize) -> Option<(FlowEnds, T)> {
        if !self.entries.contains(index) {
            return None;
        }
        self.unlink(Which::All, index);
        self.unlink(Which::Source, index);
        let entry = self.entries.remove(index);
        let _place = self.places.remove(&entry.key);
        if self.sources[entry.source].1.length == 0 {
            let (source, _empty) = self.sources.remove(entry.source);
            let _place = self.source_places.remove(&source);
        }
        if self.entries.is_empty() {
            // What a flood took is given back.
            self.entries.shrink_to_fit();
            self.places.shrink_to_fit();
            self.source_places.shrink_to_fit();
        }
        Some((entry.key, entry.value))
    }

    /// The flow that gives up its place to a new one of this source, if one has to.
    fn gives_way(&self, source: Source) -> Option<usize> {
        let own = self.source_places.get(&source).map(|place| self.sources[*place].1);
        let has = own.map_or(0, |chain| chain.length);
        if self.per_source.is_some_and(|most| has >= most.max(1)) {
            return own.map(|chain| chain.first);
        }
        if self.len() < self.limit {
            return None;
        }
        let sources = self.sources.len() + usize::from(own.is_none());
        let share = (self.limit / sources).max(1);
        if let Some(own) = own.filter(|_| has >= share) {
            return Some(own.first);
        }
        let greedy = self.iter().take(LOOK).find(|(index, ..)| {
            let source = self.entries[*index].source;
            self.sources[source].1.length > share
        });
        Some(greedy.map_or(self.all.first, |(index, ..)| index))
    }

    fn chain(&mut self, which: Which, index: usize) -> &mut Chain {
        match which {
            Which::All => &mut self.all,
            Which::Source => &mut self.sources[self.entries[index].source].1,
        }
    }

    fn neighbours(&mut self, which: Which, index: usize) -> &mut Neighbours {
        let entry = &mut self.entries[index];
        match which {
            Which::All => &mut entry.all,
            Which::Source => &mut entry.siblings,
        }
    }

    fn append(&mut self, which: Which, index: usize) {
        let chain = self.chain(which, index);
        let before = std::mem::replace(&mut chain.last, index);
        chain.length += 1;
        if before == NONE {
            chain.first = index;
        } else {
            self.neighbours(which, before).after = index;
        }
        *self.neighbours(which, index) = Neighbours { before, after: NONE };
    }

    fn unlink(&mut self, which: Which, index: usize) {
        let Neighbours { before, after } = std::mem::replace(self.neighbours(which, index), Neighbours::NONE);
        if before == NONE {
            self.chain(which, index).first = after;
        } else {
            self.neighbours(which, before).after = after;
        }
        if after == NONE {
            self.chain(which, index).last = before;
        } else {
            self.neighbours(which, after).before = before;
        }
        self.chain(which, index).length -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flows::FlowClient;
    use proptest::prelude::*;
    use std::net::{IpAddr, Ipv4Addr, SocketAddr};
    use std::time::Duration;

    fn key(host: u8, port: u16) -> FlowEnds {
        FlowEnds {
            listener: 0,
            client: FlowClient::Inet(SocketAddr::new(Ipv4Addr::new(10, 0, 0, host).into(), port)),
            local: None,
        }
    }

    fn source(key: &FlowEnds) -> Source {
        match &key.client {
            FlowClient::Inet(SocketAddr::V4(address)) => Source::Address(IpAddr::V4(*address.ip())),
            _ => Source::User(0),
        }
    }

    fn insert(table: &mut FlowTable<u32>, key: FlowEnds, now: Instant) -> Option<FlowEnds> {
        let source = source(&key);
        table.insert(key, source, 0, now).instead_of.map(|(_, key, _)| key)
    }

    #[test]
    fn a_flood_takes_places_from_itself() {
        let (mut table, now) = (FlowTable::new(8, None), Instant::now());
        assert_eq!(insert(&mut table, key(1, 1), now), None);
        for port in 0..100 {
            let gone = insert(&mut table, key(2, port), now);
            assert_ne!(gone, Some(key(1, 1)), "after {port}");
        }
        // A third one takes a place from the flood, although the first client's flow is older.
        let gone = insert(&mut table, key(3, 1), now).unwrap();
        assert_eq!(source(&gone), source(&key(2, 0)));
        assert!(table.find(&key(1, 1)).is_some());
        assert_eq!(table.len(), 8);
    }

    #[test]
    fn the_least_recently_used_one_goes() {
        let (mut table, now) = (FlowTable::new(3, None), Instant::now());
        for port in 0..3 {
            assert_eq!(insert(&mut table, key(1, port), now), None);
        }
        table.touch(table.find(&key(1, 0)).unwrap(), now);
        assert_eq!(insert(&mut table, key(1, 3), now), Some(key(1, 1)));
    }

    /// What a client or the clock does.
    #[derive(Debug, Clone, Copy)]
    enum Step {
        Use(u8, u16),
        End(u8, u16),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = (0u8..4, 0u16..6, 0u8..5).prop_map(|(host, port, what)| {
            if what == 0 { Step::End(host, port) } else { Step::Use(host, port) }
        });
        proptest::collection::vec(step, 0..200)
    }

    proptest! {
        #[test]
        fn is_a_bounded_list_in_order_of_use(steps in steps(), limit in 1usize..12, per_source in proptest::option::of(1usize..5)) {
            let start = Instant::now();
            let mut table: FlowTable<u32> = FlowTable::new(limit, per_source);
            // The same as a plain list, the least recently used one first.
            let mut list: Vec<FlowEnds> = Vec::new();
            for (number, step) in (0u32..).zip(steps) {
                let now = start + Duration::from_millis(number.into());
                match step {
                    Step::End(host, port) => {
                        let key = key(host, port);
                        let removed = table.find(&key).and_then(|index| table.remove(index));
                        let known = list.contains(&key).then(|| key.clone());
                        prop_assert_eq!(removed.map(|(key, _)| key), known);
                        list.retain(|known| *known != key);
                    }
                    Step::Use(host, port) => {
                        let key = key(host, port);
                        if let Some(index) = table.find(&key) {
                            prop_assert_eq!(table.get(index).unwrap().0, &key);
                            table.touch(index, now);
                            list.retain(|known| *known != key);
                        } else {
                            let own: Vec<FlowEnds> = list.iter().filter(|known| source(known) == source(&key)).cloned().collect();
                            let made = table.insert(key.clone(), source(&key), number, now);
                            if let Some((_, gone, _)) = made.instead_of {
                                let over = per_source.is_some_and(|most| own.len() >= most);
                                prop_assert!(over || list.len() == limit, "nothing had to go");
                                // Within a source the oldest goes, and the new flow's own source if that has its limit.
                                let first = list.iter().find(|known| source(known) == source(&gone));
                                prop_assert_eq!(first, Some(&gone));
                                prop_assert!(!over || source(&gone) == source(&key));
                                // No source gives way to one that has more.
                                let loser = list.iter().filter(|known| source(known) == source(&gone)).count();
                                prop_assert!(over || loser >= own.len());
                                list.retain(|known| *known != gone);
                            } else {
                                prop_assert!(list.len() < limit && per_source.is_none_or(|most| own.len() < most));
                            }
                        }
                        list.push(key);
                    }
                }
                prop_assert!(list.len() <= limit);
                prop_assert_eq!(table.len(), list.len());
                prop_assert_eq!(table.iter().map(|(_, key, ..)| key.clone()).collect::<Vec<_>>(), list.clone());
                let used: Vec<Instant> = table.iter().map(|(_, _, used, _)| used).collect();
                prop_assert!(used.is_sorted());
                let mut hosts: Vec<Source> = list.iter().map(source).collect();
                hosts.sort();
                hosts.dedup();
                prop_assert_eq!(table.sources.len(), hosts.len());
                prop_assert_eq!(table.source_places.len(), hosts.len());
            }
        }
    }
}
