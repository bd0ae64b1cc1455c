//! One direction of a connection as a pure state: what was read, what still waits, whether the FIN is due. No socket in sight,
//! so that every order of events can be tried (see the tests below).
//!
//! The rules: bytes are read only when none wait, so what one direction holds is bounded by one read; a FIN is forwarded
//! exactly once, and only after the last byte; an abort overtakes no byte that was sent before it, and never passes for a FIN.

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
    /// The source has aborted, as the kernel has said already: what it had sent before is still there to be read, and the end of
    /// that is no FIN.
    Last {
        /// Bytes read and not yet written.
        held: usize,
    },
    /// The sink has aborted: what the source still sends is read and thrown away, so that a source which reads only after it
    /// has sent everything gets to what waits for it.
    Void,
    /// It has ended without a FIN: nothing will flow here again.
    Over,
}

impl Half {
    /// A direction in which nothing has happened yet.
    pub const NEW: Self = Self::Open { held: 0 };

    /// Bytes read and not yet written.
    #[must_use]
    pub const fn held(self) -> usize {
        match self {
            Self::Open { held } | Self::Ending { held } | Self::Last { held } => held,
            Self::Finished | Self::Void | Self::Over => 0,
        }
    }

    /// Is the source to be read?
    #[must_use]
    pub const fn wants_read(self) -> bool {
        matches!(self, Self::Open { held: 0 } | Self::Last { held: 0 } | Self::Void)
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

    /// Is what is read thrown away?
    #[must_use]
    pub const fn is_void(self) -> bool {
        matches!(self, Self::Void)
    }

    /// Has the sink been given all that will ever come?
    #[must_use]
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Finished | Self::Over)
    }

    /// `count` bytes came from the source.
    pub fn read(&mut self, count: usize) {
        debug_assert!(self.wants_read(), "read while {self:?}");
        match self {
            Self::Last { held } | Self::Open { held } => *held = count,
            Self::Ending { .. } | Self::Finished | Self::Void | Self::Over => {}
        }
    }

    /// The end of the stream was read: the source's FIN, unless the source is known to have aborted.
    pub fn ended(&mut self) {
        debug_assert!(self.wants_read(), "end of file while {self:?}");
        *self = match *self {
            Self::Open { held } => Self::Ending { held },
            _ => Self::Over,
        };
    }

    /// Reading failed: the source has aborted, and nothing that it had sent is left to be read.
    pub fn broke(&mut self) {
        debug_assert!(self.wants_read(), "a read failed while {self:?}");
        *self = Self::Over;
    }

    /// The source has aborted, and the kernel has said so for the last time: what is left will seem to end like any stream.
    pub const fn source_aborted(&mut self) {
        if let Self::Open { held } = *self {
            *self = Self::Last { held };
        }
    }

    /// The sink has aborted: what is held is held for nothing.
    pub const fn sink_aborted(&mut self) {
        *self = match *self {
            Self::Open { .. } | Self::Void => Self::Void,
            // Nothing is to be read any more.
            Self::Ending { .. } | Self::Last { .. } | Self::Over => Self::Over,
            Self::Finished => Self::Finished,
        };
    }

    /// The sink took `count` bytes.
    pub fn wrote(&mut self, count: usize) {
        debug_assert!(count <= self.held(), "wrote {count} while {self:?}");
        if let Self::Open { held } | Self::Ending { held } | Self::Last { held } = self {
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
    enum PeerEvent {
        Readable(usize),
        SourceEnds,
        Writable(usize),
    }

    fn event() -> impl Strategy<Value = PeerEvent> {
        prop_oneof![
            4 => (1usize..5000).prop_map(PeerEvent::Readable),
            1 => Just(PeerEvent::SourceEnds),
            4 => (1usize..5000).prop_map(PeerEvent::Writable),
        ]
    }

    /// How an abort comes to be known.
    #[derive(Debug, Clone, Copy)]
    enum AbortTold {
        /// By a read, once nothing is left.
        Reading,
        /// By something else, before all was read.
        Otherwise,
    }

    fn told() -> impl Strategy<Value = AbortTold> {
        prop_oneof![Just(AbortTold::Reading), Just(AbortTold::Otherwise)]
    }

    proptest! {
        #[test]
        fn every_byte_then_one_fin(events in proptest::collection::vec(event(), 0..200)) {
            let mut half = Half::NEW;
            let (mut read, mut written, mut fins, mut ended) = (0, 0, 0, false);
            for event in events.into_iter().chain([PeerEvent::SourceEnds, PeerEvent::Writable(5000), PeerEvent::SourceEnds]) {
                match event {
                    PeerEvent::Readable(count) if half.wants_read() => { half.read(count); read += count; }
                    PeerEvent::SourceEnds if half.wants_read() => { half.ended(); ended = true; }
                    PeerEvent::Writable(room) if half.wants_write() => {
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
                    PeerEvent::Readable(count) if half.wants_read() => half.read(count),
                    PeerEvent::SourceEnds if half.wants_read() => half.ended(),
                    PeerEvent::Writable(room) if half.wants_write() => half.wrote(room.min(half.held())),
                    _ if half.fin_due() => half.fin_sent(),
                    _ => {}
                }
            }
        }
    }

    proptest! {
        /// The source has sent `queued` more bytes, perhaps a FIN, and then aborted.
        #[test]
        fn an_abort_overtakes_no_byte_and_is_no_end(
            events in proptest::collection::vec(event(), 0..100),
            queued in 0usize..50_000,
            fin in proptest::bool::ANY,
            told in told(),
            rooms in proptest::collection::vec(1usize..5000, 1..20),
        ) {
            let mut half = Half::NEW;
            let (mut read, mut written, mut ended) = (0, 0, false);
            for event in events {
                match event {
                    PeerEvent::Readable(count) if half.wants_read() => { half.read(count); read += count; }
                    PeerEvent::SourceEnds if half.wants_read() => { half.ended(); ended = true; }
                    PeerEvent::Writable(room) if half.wants_write() => {
                        let count = room.min(half.held());
                        half.wrote(count);
                        written += count;
                    }
                    _ if half.fin_due() => half.fin_sent(),
                    _ => {}
                }
            }
            // A FIN is the last thing in the queue, and an abort that comes after one shows by a read alone.
            let told = if fin { AbortTold::Reading } else { told };
            let mut left = if ended { 0 } else { queued };
            if matches!(told, AbortTold::Otherwise) {
                half.source_aborted();
            }
            let mut steps = 0;
            while !half.is_over() {
                steps += 1;
                // Each byte may be a step of its own.
                prop_assert!(steps < 200_000, "it never ends: {half:?}");
                if half.fin_due() {
                    prop_assert!(ended, "an abort has passed for a FIN");
                    prop_assert_eq!(read, written, "a FIN before the last byte");
                    half.fin_sent();
                } else if half.wants_write() {
                    let count = rooms[steps % rooms.len()].min(half.held());
                    half.wrote(count);
                    written += count;
                } else if half.wants_read() && left > 0 {
                    let count = left.min(1234);
                    half.read(count);
                    (read, left) = (read + count, left - count);
                } else if half.wants_read() && fin {
                    half.ended();
                    ended = true;
                } else if half.wants_read() {
                    match told {
                        AbortTold::Reading => half.broke(),
                        AbortTold::Otherwise => half.ended(),
                    }
                } else {
                    prop_assert!(false, "nothing is wanted: {half:?}");
                }
            }
            prop_assert_eq!(left, 0, "bytes are left unread");
            prop_assert_eq!(read, written, "bytes are lost");
            prop_assert_eq!(half == Half::Finished, ended);
        }

        #[test]
        fn what_is_sent_to_a_sink_that_is_gone_goes_nowhere(
            before in proptest::collection::vec(event(), 0..50),
            after in proptest::collection::vec(event(), 0..50),
        ) {
            let mut half = Half::NEW;
            let happens = |half: &mut Half, event| match event {
                PeerEvent::Readable(count) if half.wants_read() => half.read(count),
                PeerEvent::SourceEnds if half.wants_read() => half.ended(),
                PeerEvent::Writable(room) if half.wants_write() => half.wrote(room.min(half.held())),
                _ if half.fin_due() => half.fin_sent(),
                _ => {}
            };
            before.into_iter().for_each(|event| happens(&mut half, event));
            let (was_open, was_finished) = (half.is_open(), half == Half::Finished);
            half.sink_aborted();
            prop_assert_eq!(half.is_void(), was_open);
            for event in after.into_iter().chain([PeerEvent::SourceEnds]) {
                happens(&mut half, event);
                prop_assert!(!half.wants_write() && !half.fin_due(), "{half:?}");
            }
            prop_assert_eq!(half, if was_finished { Half::Finished } else { Half::Over });
        }
    }
}
