//! One direction of a connection as a pure state: what was read, what still waits, whether the FIN is due. No socket in sight,
//! so that every order of events can be tried (see the tests below).
//!
//! The rules: bytes are read only when none wait, so what one direction holds is bounded by one read; a FIN is forwarded
//! exactly once, and only after the last byte.

/// A direction of flow, from its source to its sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// The source may still send.
    Open {
        /// Bytes read and not yet written.
        held: usize,
    },
    /// The source's FIN was read; the sink gets its own once `held` is zero.
    Ending {
        /// Bytes read and not yet written.
        held: usize,
    },
    /// The FIN was passed on: nothing will flow here again.
    Finished,
}

impl Half {
    /// A direction in which nothing has happened yet.
    pub const NEW: Self = Self::Open { held: 0 };

    /// Bytes read and not yet written.
    #[must_use]
    pub const fn held(self) -> usize {
        match self {
            Self::Open { held } | Self::Ending { held } => held,
            Self::Finished => 0,
        }
    }

    /// Is the source to be read?
    #[must_use]
    pub const fn wants_read(self) -> bool {
        matches!(self, Self::Open { held: 0 })
    }

    /// Is there something for the sink?
    #[must_use]
    pub const fn wants_write(self) -> bool {
        self.held() > 0
    }

    /// Is the sink's FIN due now?
    #[must_use]
    pub const fn fin_due(self) -> bool {
        matches!(self, Self::Ending { held: 0 })
    }

    /// May the source still send, as far as we have read?
    #[must_use]
    pub const fn is_open(self) -> bool {
        matches!(self, Self::Open { .. })
    }

    /// `count` bytes came from the source.
    pub fn read(&mut self, count: usize) {
        debug_assert!(self.wants_read(), "read while {self:?}");
        *self = Self::Open { held: count };
    }

    /// The source's FIN was read.
    pub fn ended(&mut self) {
        debug_assert!(self.wants_read(), "end of file while {self:?}");
        *self = Self::Ending { held: self.held() };
    }

    /// The sink took `count` bytes.
    pub fn wrote(&mut self, count: usize) {
        debug_assert!(count <= self.held(), "wrote {count} while {self:?}");
        if let Self::Open { held } | Self::Ending { held } = self {
            *held = held.saturating_sub(count);
        }
    }

    /// The sink's FIN was sent.
    pub fn fin_sent(&mut self) {
        debug_assert!(self.fin_due(), "FIN sent while {self:?}");
        *self = Self::Finished;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the world may do next. Whatever the machine does not ask for is not offered to it, as with epoll.
    #[derive(Debug, Clone)]
    enum Event {
        Readable(usize),
        SourceEnds,
        Writable(usize),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            4 => (1usize..5000).prop_map(Event::Readable),
            1 => Just(Event::SourceEnds),
            4 => (1usize..5000).prop_map(Event::Writable),
        ]
    }

    proptest! {
        #[test]
        fn every_byte_then_one_fin(events in proptest::collection::vec(event(), 0..200)) {
            let mut half = Half::NEW;
            let (mut read, mut written, mut fins, mut ended) = (0, 0, 0, false);
            for event in events.into_iter().chain([Event::SourceEnds, Event::Writable(5000), Event::SourceEnds]) {
                match event {
                    Event::Readable(count) if half.wants_read() => { half.read(count); read += count; }
                    Event::SourceEnds if half.wants_read() => { half.ended(); ended = true; }
                    Event::Writable(room) if half.wants_write() => {
                        let count = room.min(half.held());
                        half.wrote(count);
                        written += count;
                    }
                    _ => {}
                }
                prop_assert_eq!(half.held(), read - written);
                if half.fin_due() {
                    prop_assert_eq!(read, written, "a FIN before the last byte");
                    half.fin_sent();
                    fins += 1;
                }
                prop_assert!(!half.wants_read() || !ended, "read after the end");
            }
            prop_assert_eq!(fins, usize::from(ended));
            prop_assert!(!ended || half == Half::Finished, "an end that was never passed on: {:?}", half);
        }

        #[test]
        fn something_is_always_wanted_until_the_end(events in proptest::collection::vec(event(), 0..50)) {
            // No state may wait for nothing: that would be a connection that hangs for ever.
            let mut half = Half::NEW;
            for event in events {
                prop_assert!(half.wants_read() || half.wants_write() || half.fin_due() || half == Half::Finished);
                match event {
                    Event::Readable(count) if half.wants_read() => half.read(count),
                    Event::SourceEnds if half.wants_read() => half.ended(),
                    Event::Writable(room) if half.wants_write() => half.wrote(room.min(half.held())),
                    _ if half.fin_due() => half.fin_sent(),
                    _ => {}
                }
            }
        }
    }
}
