//! Flows that wait for their sockets, in the order in which they came. One that ends meanwhile is forgotten in constant time, however many
//! wait: a flood may end as many flows as it begins.

use std::collections::{HashMap, VecDeque};

use super::FlowId;

/// So many forgotten ones are kept before the queue is tidied.
const SLACK: usize = 64;

/// Flows, each with what is to be known when its turn comes.
#[derive(Debug)]
pub struct FlowQueue<T> {
    /// In order; those that were forgotten are among them.
    order: VecDeque<FlowId>,
    waiting: HashMap<FlowId, T>,
}

impl<T> Default for FlowQueue<T> {
    fn default() -> Self {
        Self { order: VecDeque::new(), waiting: HashMap::new() }
    }
}

impl<T> FlowQueue<T> {
    /// The flow waits, behind all others; one that waits already stays where it is.
    pub fn push(&mut self, flow: FlowId, value: T) {
        if self.waiting.insert(flow, value).is_none() {
            self.order.push_back(flow);
        }
    }

    /// The one that has waited for longest, which waits no more.
    pub fn pop(&mut self) -> Option<(FlowId, T)> {
        while let Some(flow) = self.order.pop_front() {
            if let Some(value) = self.waiting.remove(&flow) {
                self.shrink();
                return Some((flow, value));
            }
        }
        self.shrink();
        None
    }

    /// The flow has ended, whether it waits or not; it does not come back.
    pub fn forget(&mut self, flow: FlowId) {
        if self.waiting.remove(&flow).is_some() && self.order.len() > 2 * self.waiting.len() + SLACK {
            // At least as many were forgotten since the last time as are looked at now.
            self.order.retain(|flow| self.waiting.contains_key(flow));
            self.shrink();
        }
    }

    /// What a flood took is given back.
    fn shrink(&mut self) {
        if self.waiting.is_empty() && self.waiting.capacity() > SLACK {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FLOWS: usize = 10;

    fn flow(index: usize) -> FlowId {
        FlowId { index, generation: u32::MAX }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Push(usize),
        Pop,
        Forget(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![(0..FLOWS).prop_map(Step::Push), Just(Step::Pop), (0..FLOWS).prop_map(Step::Forget)]
    }

    proptest! {
        #[test]
        fn does_as_a_list_does(steps in proptest::collection::vec(step(), 0..400)) {
            let (mut queue, mut list) = (FlowQueue::default(), Vec::<FlowId>::new());
            for (generation, step) in (0..).zip(steps) {
                let place = |list: &[FlowId], index: usize| list.iter().position(|one| one.index == index);
                match step {
                    Step::Push(index) => {
                        let known = place(&list, index).map(|at| list[at]);
                        let flow = known.unwrap_or(FlowId { index, generation });
                        queue.push(flow, index);
                        if known.is_none() {
                            list.push(flow);
                        }
                    }
                    Step::Pop => {
                        let first = (!list.is_empty()).then(|| list.remove(0));
                        prop_assert_eq!(queue.pop(), first.map(|flow| (flow, flow.index)));
                    }
                    Step::Forget(index) => {
                        let known = place(&list, index).map(|at| list.remove(at));
                        queue.forget(known.unwrap_or(flow(index)));
                    }
                }
                prop_assert_eq!(queue.waiting.len(), list.len());
                prop_assert!(queue.order.len() <= 2 * FLOWS + SLACK + 1);
            }
        }
    }

    /// The first one stays, and flows behind it come and go.
    #[test]
    fn forgotten_flows_take_no_room() {
        let mut queue = FlowQueue::default();
        queue.push(flow(0), ());
        for index in 1..10_000 {
            queue.push(flow(index), ());
            queue.forget(flow(index));
            assert!(queue.order.len() <= SLACK + 3, "{}", queue.order.len());
        }
        assert_eq!(queue.pop(), Some((flow(0), ())));
        assert_eq!(queue.pop(), None);
    }
}
