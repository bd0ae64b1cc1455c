//! `--wake-on=data`: clients of a sleeping service that have not said anything yet. They wake nothing; their first byte does. They
//! count as connections, but where there is no room for another client, the source that has most of them gives up the one that has
//! been silent longest: a scanner shuts no other client out, neither by holding its connections open nor by making many.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::peer::Source;

/// The connections on which the client has to say something first.
#[derive(Debug, Default)]
pub(super) struct Silent {
    /// Each source's connections by number, with their places in the table of connections.
    of: HashMap<Source, BTreeMap<u64, usize>>,
    /// How many each source has, and its first one.
    ranks: BTreeSet<(usize, Reverse<u64>, Source)>,
}

impl Silent {
    pub(super) fn is_empty(&self) -> bool {
        self.of.is_empty()
    }

    pub(super) fn insert(&mut self, source: Source, number: u64, index: usize) {
        self.change(source, |of| {
            let _none = of.insert(number, index);
        });
    }

    pub(super) fn remove(&mut self, source: Source, number: u64) {
        self.change(source, |of| {
            let _index = of.remove(&number);
        });
    }

    fn change(&mut self, source: Source, how: impl FnOnce(&mut BTreeMap<u64, usize>)) {
        let rank = |of: &BTreeMap<u64, usize>| {
            of.first_key_value().map(|(&first, _)| (of.len(), Reverse(first), source))
        };
        let of = self.of.entry(source).or_default();
        let before = rank(of);
        how(of);
        let after = rank(of);
        if after.is_none() {
            let _none = self.of.remove(&source);
        }
        if before != after {
            let _was_there = before.is_some_and(|before| self.ranks.remove(&before));
            self.ranks.extend(after);
        }
    }

    /// The one that makes room.
    pub(super) fn first_to_go(&self) -> Option<usize> {
        let (_, _, source) = self.ranks.last()?;
        self.of.get(source)?.first_key_value().map(|(_, &index)| index)
    }

    /// All, in the order in which they came; none is left.
    pub(super) fn take(&mut self) -> Vec<usize> {
        self.ranks.clear();
        let mut all: Vec<(u64, usize)> = std::mem::take(&mut self.of).into_values().flatten().collect();
        all.sort_unstable();
        all.into_iter().map(|(_, index)| index).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_most_makes_room_with_the_first() {
        let [many, few] = [1, 2].map(Source::User);
        let mut silent = Silent::default();
        silent.insert(few, 1, 10);
        assert_eq!(silent.first_to_go(), Some(10));
        silent.insert(many, 2, 20);
        // As many as the other: the first that came.
        assert_eq!(silent.first_to_go(), Some(10));
        silent.insert(many, 3, 30);
        assert_eq!(silent.first_to_go(), Some(20));
        silent.remove(many, 2);
        silent.remove(many, 2);
        assert_eq!(silent.first_to_go(), Some(10));
        silent.remove(few, 1);
        assert_eq!(silent.first_to_go(), Some(30));
        silent.insert(few, 4, 40);
        assert_eq!((silent.take(), silent.is_empty(), silent.first_to_go()), (vec![30, 40], true, None));
    }
}
