//! How many clients a listener may give in one turn. An accept(2) that finds no client is not free: the kernel makes a socket and a
//! file before it looks. So one client at first, and the next turn tells whether there were more.

/// How many clients a listener had of late.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct AcceptBatch {
    turn: u64,
    taken: usize,
}

impl AcceptBatch {
    /// The most in any turn, so that others get theirs.
    const MOST: usize = 32;

    /// How many may be taken in this turn, in which the listener has a client: twice as many as in the last one if there was a
    /// client then too, and all that were allowed could be had.
    pub(super) fn allowed(&self, turn: u64) -> usize {
        if self.turn + 1 == turn { (self.taken * 2).clamp(1, Self::MOST) } else { 1 }
    }

    /// Notes that so many were taken; `all`: as many as were allowed.
    pub(super) fn took(&mut self, turn: u64, taken: usize, all: bool) {
        *self = Self { turn, taken: if all { taken } else { 0 } };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Turns until all are taken, and accepts that found no client. `arrivals` is how many come before each turn.
    fn turns(arrivals: impl IntoIterator<Item = usize>) -> (usize, usize) {
        let (mut batch, mut waiting, mut turns, mut vain) = (AcceptBatch::default(), 0, 0, 0);
        let mut arrivals = arrivals.into_iter();
        for turn in 1.. {
            let came = arrivals.next();
            waiting += came.unwrap_or(0);
            if waiting == 0 && came.is_none() {
                break;
            }
            if waiting > 0 {
                let allowed = batch.allowed(turn);
                let taken = allowed.min(waiting);
                vain += usize::from(taken < allowed);
                waiting -= taken;
                batch.took(turn, taken, taken == allowed);
            }
            turns += 1;
        }
        (turns, vain)
    }

    #[test]
    fn a_crowd_is_let_in_soon_and_one_at_a_time_costs_nothing() {
        // 1, 2, 4, 8, 16, then 32 at a time.
        assert_eq!(turns([1000]), (36, 1));
        assert_eq!(turns([1, 0, 1, 0, 0, 1]), (6, 0));
    }
}
