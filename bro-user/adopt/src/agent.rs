//! The agent: answers the notified calls of one service's container, one after the other, in one poll(2).
//!
//! It holds the listeners and never accepts at them.

mod abandoned;
mod bind;
mod datagrams;
mod listen;
mod shutdown;

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use abandoned::{Queue, QueueLooks};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::budget::Budget;
use crate::caller::{Caller, LateCallers};
use crate::family::Family;
use crate::in_flight::{InFlight, Note};
use crate::inside::{Inside, Then};
use crate::inside_datagrams::InsideFlows;
use crate::notification::{Answer, Call, Meant, Raw};
use crate::options::{self, Before};
use crate::original::{self, Original};
use crate::receiver::{self, Notifier, Receiver, Role};
use crate::socket::{Place, Seen, cookie, look};
use crate::store::{Kind, MOST_NOTIFIERS, RECORD};
use crate::surroundings::{Event, Step, Stored, Surroundings};
use crate::sys;

/// The most connections from inside.
const MOST_INSIDE: usize = 256;

/// A listening socket of systemd's, or one for datagrams, and where in the container its service is to be found.
#[derive(Debug)]
pub struct HostListener {
    /// The socket.
    pub socket: OwnedFd,
    /// Where the service listens, or has its datagrams from, seen from inside.
    pub target: Place,
}

/// One of them with what became of it.
#[derive(Debug)]
struct Adoptable {
    socket: OwnedFd,
    target: Place,
    seen: Seen,
    state: ListenerState,
    queue: Queue,
}

impl Adoptable {
    /// Has a service got it?
    const fn is_held(&self) -> bool {
        matches!(&self.state, ListenerState::Adopted { by, .. } if !by.is_empty())
    }
}

#[derive(Debug)]
enum ListenerState {
    /// As systemd made it.
    Free,
    /// As a service wants it.
    Adopted {
        /// The notifiers' numbers of those that took it; nothing yet while it is being prepared.
        by: Vec<u64>,
        before: Before,
    },
}

/// A notification descriptor with what it may cost.
#[derive(Debug)]
struct AnsweredNotifier {
    number: u64,
    notifier: Notifier,
    budget: Budget,
}

/// What a poll is for.
#[derive(Debug, Clone, Copy)]
enum ReadySource {
    Stop,
    Receiver,
    /// By its number.
    Notifier(u64),
    /// By its place.
    Original(usize),
    /// By its place.
    Inside(usize),
    /// By its place.
    InsideFlow(usize),
}

/// One service's agent.
#[derive(Debug)]
pub struct Agent<S> {
    surroundings: S,
    listeners: Vec<Adoptable>,
    receiver: Receiver,
    notifiers: Vec<AnsweredNotifier>,
    originals: Vec<Original>,
    inside: Vec<Inside>,
    flows: InsideFlows,
    record: InFlight,
    late: LateCallers,
    /// The last number that something in the store was given.
    last: u64,
    flags: FlagLooks,
    looks: QueueLooks,
}

/// When to look whether a service has changed O_NONBLOCK of what it has adopted, which no call tells of: some set it a moment after listen(2), and later
/// hardly one does.
#[derive(Debug, Default)]
struct FlagLooks {
    next: Option<Instant>,
    done: usize,
}

impl FlagLooks {
    /// The times between looks.
    const STEPS: [Duration; 4] = [
        Duration::from_millis(20),
        Duration::from_millis(200),
        Duration::from_secs(2),
        Duration::from_secs(20),
    ];

    /// Something was adopted.
    fn begin(&mut self, now: Instant) {
        *self = Self { next: Self::STEPS.first().map(|step| now + *step), done: 0 };
    }

    /// Is it time for a look?
    fn is_due(&mut self, now: Instant) -> bool {
        if self.next.is_none_or(|next| next > now) {
            return false;
        }
        self.done += 1;
        self.next = Self::STEPS.get(self.done).map(|step| now + *step);
        true
    }
}

/// Why there is no agent.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// A listener that is none.
    #[error("listener {0} is no socket")]
    Listener(usize),
    /// The record, the seccomp socket.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl<S: Surroundings> Agent<S> {
    /// An agent at the socket that `listenerPath` names, with what a predecessor has stored.
    ///
    /// # Errors
    /// [`Unusable`].
    pub fn new(
        listeners: Vec<HostListener>,
        seccomp: OwnedFd,
        stored: Vec<Stored>,
        mut surroundings: S,
    ) -> Result<Self, Unusable> {
        let mut adoptable = Vec::new();
        for (index, HostListener { socket, target }) in listeners.into_iter().enumerate() {
            let other = || Some(Seen { cookie: cookie(socket.as_fd()).ok()?, family: Family::Other });
            let seen = look(socket.as_fd()).or_else(other).ok_or(Unusable::Listener(index))?;
            let (state, queue) = (ListenerState::Free, Queue::default());
            adoptable.push(Adoptable { socket, target, seen, state, queue });
        }
        let (mut record, mut kept) = (None, Vec::new());
        for Stored { name, descriptor } in stored {
            match Kind::of(&name) {
                Some((Kind::Record, _)) => record = InFlight::of(descriptor).ok(),
                Some((kind, number)) => kept.push((kind, number, descriptor)),
                None => tracing::debug!(name, "the store has something else"),
            }
        }
        let record = if let Some(record) = record {
            record
        } else {
            let record = InFlight::new()?;
            surroundings.store(RECORD, record.file(), true);
            record
        };
        let receiver = Receiver::new(seccomp).map_err(io::Error::from)?;
        let mut agent = Self {
            surroundings,
            listeners: adoptable,
            receiver,
            notifiers: Vec::new(),
            originals: Vec::new(),
            inside: Vec::new(),
            flows: InsideFlows::default(),
            record,
            late: LateCallers::default(),
            last: kept.iter().map(|(_, number, _)| *number).max().unwrap_or(0),
            flags: FlagLooks::default(),
            looks: QueueLooks::default(),
        };
        agent.take_over(kept);
        Ok(agent)
    }

    /// Goes on with a predecessor's containers, and answers what that one has left.
    fn take_over(&mut self, kept: Vec<(Kind, u64, OwnedFd)>) {
        let introduced: Vec<u64> = kept
            .iter()
            .filter(|(kind, ..)| matches!(kind, Kind::Notifier(_)))
            .map(|(_, number, _)| *number)
            .collect();
        let (originals, kept): (Vec<_>, Vec<_>) =
            kept.into_iter().partition(|(kind, ..)| matches!(kind, Kind::Original));
        for (kind, number, descriptor) in kept {
            match kind {
                Kind::Notifier(role) if receiver::tells_of_calls(&descriptor) => {
                    if role == Role::Container {
                        self.surroundings.tell(Event::Started { stop_signal: None });
                    }
                    let notifier = Notifier { notify: Arc::new(descriptor), role, stop_signal: None };
                    self.notifiers.push(AnsweredNotifier {
                        number,
                        notifier,
                        budget: Budget::new(Instant::now()),
                    });
                }
                Kind::Arriving if introduced.contains(&number) => {
                    self.surroundings.forget(&kind.name(number))
                }
                Kind::Arriving => self.take_connection(number, descriptor),
                Kind::Notifier(_) | Kind::Original | Kind::Record => {}
            }
        }
        self.take_over_listeners();
        // By now it is known which listener was put in the place of each.
        for (kind, number, descriptor) in originals {
            self.take_over_original(kind.name(number), descriptor);
        }
        if let Some((notification, decided)) = self.record.pending() {
            let waiting = |answered: &&AnsweredNotifier| {
                sys::is_waiting(answered.notifier.notify.as_fd(), notification.id)
            };
            if let Some(number) = self.notifiers.iter().find(waiting).map(|answered| answered.number) {
                tracing::info!("answering a call that a predecessor has received");
                match decided {
                    Some(answer) => self.send(number, &notification, answer),
                    None => self.answer(number, &notification),
                }
            }
            self.record.clear();
        }
        // What was prepared for a service that did not get it, or that has ended meanwhile.
        for index in 0..self.listeners.len() {
            let held = self.listeners.get(index).is_some_and(Adoptable::is_held);
            if !held {
                self.release(index);
            }
        }
        self.open_originals();
    }

    /// As a predecessor has noted them.
    fn take_over_listeners(&mut self) {
        let containers: Vec<u64> = self
            .notifiers
            .iter()
            .filter(|answered| answered.notifier.role == Role::Container)
            .map(|answered| answered.number)
            .collect();
        for Note { cookie, held, nonblocking, before } in self.record.notes() {
            if let Some(listener) = self.listeners.iter_mut().find(|listener| listener.seen.cookie == cookie)
            {
                let by = if held { containers.clone() } else { Vec::new() };
                let restored = if by.is_empty() {
                    Ok(())
                } else {
                    options::set_nonblocking(listener.socket.as_fd(), nonblocking)
                };
                if let Err(error) = restored {
                    tracing::warn!(%error, "O_NONBLOCK of an adopted socket may not be as its service has set it");
                }
                listener.state = ListenerState::Adopted { by, before };
            }
        }
        self.flags.begin(Instant::now());
    }

    /// Only now: a call that was in flight may still see one as the service made it.
    fn open_originals(&mut self) {
        for (index, listener) in self.listeners.iter().enumerate() {
            if !listener.is_held() {
                continue;
            }
            let _ours_already = self.surroundings.claim(index);
            let mut inside = None;
            for original in self.originals.iter_mut().filter(|original| original.listener == index) {
                inside = original.open().err().or(inside);
            }
            self.surroundings.tell(Event::Adopted { listener: index, options_refused: 0, inside });
        }
    }

    fn take_over_original(&mut self, name: String, socket: OwnedFd) {
        let place = Place::of(socket.as_fd()).zip(look(socket.as_fd()));
        let listener = place.as_ref().and_then(|(place, seen)| self.choose(place, seen.family)?.ok());
        match place.zip(listener) {
            Some(((place, seen), listener)) => {
                self.originals.push(Original { socket, place, seen, listener, name, open: false });
            }
            None => self.surroundings.forget(&name),
        }
    }

    /// Which listener a service that is bound at `place` gets: `None` when no listener is for that place, and otherwise
    /// the one that fits, or one that it is for and that does not fit. Of several that fit it is the one that a service has already: one that came
    /// later must not get what was made for that one.
    fn choose(&self, place: &Place, family: Family) -> Option<Result<usize, usize>> {
        let meant = |(_, listener): &(usize, &Adoptable)| place.serves(&listener.target);
        let (first, _) = self.listeners.iter().enumerate().find(meant)?;
        let best = |is_one: fn(&Adoptable) -> bool| {
            let these = self.listeners.iter().enumerate().filter(meant);
            let (indices, families): (Vec<usize>, Vec<Family>) = these
                .filter(|(_, listener)| is_one(listener))
                .map(|(index, listener)| (index, listener.seen.family))
                .unzip();
            family.choose(&families).and_then(|at| indices.get(at).copied())
        };
        let fitting = best(|listener| matches!(listener.state, ListenerState::Adopted { .. }));
        Some(fitting.or_else(|| best(|_| true)).ok_or(first))
    }

    /// Answers until `stop` is readable or hung up.
    ///
    /// # Errors
    /// poll(2)'s.
    pub fn run(&mut self, stop: BorrowedFd<'_>) -> nix::Result<()> {
        loop {
            let ready = self.wait(stop)?;
            // Most of the time only calls come, for each of which a look at the seccomp socket would be a system call more.
            let is_sent_to = ready.iter().any(|(source, _)| matches!(source, ReadySource::Receiver))
                || self.receiver.until(Instant::now()).is_some();
            // From the last one on, so that what goes does not move those that are to come.
            for (source, _) in ready.iter().rev() {
                match source {
                    ReadySource::Inside(index) => self.move_inside(*index),
                    ReadySource::Stop => return Ok(()),
                    _ => {}
                }
            }
            for (source, _) in &ready {
                if let ReadySource::InsideFlow(index) = source {
                    self.flows.answer(*index, &self.originals);
                }
            }
            for (source, _) in &ready {
                if let ReadySource::Original(index) = source {
                    self.take_inside(*index);
                }
            }
            for (source, events) in ready {
                match source {
                    ReadySource::Notifier(number) if events.contains(PollFlags::POLLIN) => {
                        self.receive(number)
                    }
                    // All that had the filter are gone (seccomp_notify_poll, Linux 5.9).
                    ReadySource::Notifier(number) if events.contains(PollFlags::POLLHUP) => {
                        self.ended(number)
                    }
                    _ => {}
                }
            }
            if is_sent_to && self.notifiers.len() < MOST_NOTIFIERS {
                self.take_notifiers();
            }
            if self.flags.is_due(Instant::now()) && self.has_adopted() {
                self.note();
            }
            if self.looks.is_due(Instant::now()) {
                self.look_who_has_it(Instant::now());
            }
        }
    }

    /// Waits for something to do; each source once.
    fn wait(&mut self, stop: BorrowedFd<'_>) -> nix::Result<Vec<(ReadySource, PollFlags)>> {
        let now = Instant::now();
        let any = self.listeners.iter().any(Adoptable::is_held);
        let mut rest: Option<Duration> =
            [self.receiver.until(now), self.flags.next, self.looks.next(any, now)]
                .into_iter()
                .flatten()
                .min()
                .map(|until| until.saturating_duration_since(now));
        let mut polled = vec![(ReadySource::Stop, PollFd::new(stop, PollFlags::POLLIN))];
        if self.notifiers.len() < MOST_NOTIFIERS {
            let receiver = self.receiver.polled().map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            polled.extend(receiver.map(|fd| (ReadySource::Receiver, fd)));
        }
        for answered in &mut self.notifiers {
            let wait = answered.budget.wait(now);
            rest = [rest, wait].into_iter().flatten().min();
            let events = if wait.is_none() { PollFlags::POLLIN } else { PollFlags::empty() };
            polled.push((
                ReadySource::Notifier(answered.number),
                PollFd::new(answered.notifier.notify.as_fd(), events),
            ));
        }
        self.flows.keep(&self.originals);
        polled.extend(
            self.flows
                .polled()
                .map(|(index, fd)| (ReadySource::InsideFlow(index), PollFd::new(fd, PollFlags::POLLIN))),
        );
        {
            let is_full = self.inside.len() >= MOST_INSIDE;
            // One that does not listen polls as hung up.
            let originals =
                self.originals.iter().enumerate().filter(|(_, original)| {
                    original.open && (!is_full || original.seen.family.is_datagrams())
                });
            polled.extend(originals.map(|(index, original)| {
                (ReadySource::Original(index), PollFd::new(original.polled(), PollFlags::POLLIN))
            }));
        }
        for (index, inside) in self.inside.iter().enumerate() {
            polled.extend(
                inside.polled().map(|(fd, events)| (ReadySource::Inside(index), PollFd::new(fd, events))),
            );
        }
        let (sources, mut fds): (Vec<_>, Vec<_>) = polled.into_iter().unzip();
        // Rounded up, or it would be asked again and again within the last millisecond.
        let timeout = rest.map_or(PollTimeout::NONE, |rest| {
            PollTimeout::try_from(rest + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        let events = fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        let mut ready: Vec<(ReadySource, PollFlags)> =
            sources.into_iter().zip(events).filter(|(_, events)| !events.is_empty()).collect();
        // Both sides of a connection are one source.
        ready.dedup_by(|(one, _), (other, _)| {
            matches!((one, other), (ReadySource::Inside(one), ReadySource::Inside(other)) if one == other)
        });
        Ok(ready)
    }

    /// Duplicates of all that a successor in another process needs: what is in the store, by its name there. To be called when no call is being answered,
    /// and to be followed by the end of this agent.
    ///
    /// # Errors
    /// EMFILE.
    pub fn bequeath(&self) -> io::Result<Vec<Stored>> {
        let stored = |name: String, descriptor: BorrowedFd<'_>| {
            Ok(Stored { name, descriptor: descriptor.try_clone_to_owned()? })
        };
        let record = std::iter::once(stored(RECORD.to_owned(), self.record.file()));
        let notifiers = self.notifiers.iter().map(|answered| {
            let name = Kind::Notifier(answered.notifier.role).name(answered.number);
            stored(name, answered.notifier.notify.as_fd())
        });
        let originals =
            self.originals.iter().map(|original| stored(original.name.clone(), original.socket.as_fd()));
        let arriving = self
            .receiver
            .connections()
            .map(|(number, connection)| stored(Kind::Arriving.name(number), connection));
        record.chain(notifiers).chain(originals).chain(arriving).collect()
    }

    fn take_notifiers(&mut self) {
        while let Some(accepted) = self.receiver.accept() {
            match accepted {
                Ok(connection) => {
                    self.last += 1;
                    let name = Kind::Arriving.name(self.last);
                    // Not polled: a runtime that has sent what it had to closes.
                    self.surroundings.store(&name, connection.as_fd(), false);
                    self.surroundings.reached(Step::Connected);
                    self.take_connection(self.last, connection);
                }
                Err(refused) => self.surroundings.tell(Event::Refused(refused)),
            }
        }
        for (number, outcome) in self.receiver.turn() {
            match outcome {
                Ok(notifier) => {
                    let kind = Kind::Notifier(notifier.role);
                    self.surroundings.store(&kind.name(number), notifier.notify.as_fd(), true);
                    self.surroundings.reached(Step::Introduced);
                    sys::wake_in_turn(notifier.notify.as_fd());
                    let (is_container, stop_signal) =
                        (notifier.role == Role::Container, notifier.stop_signal);
                    self.notifiers.push(AnsweredNotifier {
                        number,
                        notifier,
                        budget: Budget::new(Instant::now()),
                    });
                    if is_container {
                        self.surroundings.tell(Event::Started { stop_signal });
                    }
                }
                Err(refused) => self.surroundings.tell(Event::Refused(refused)),
            }
            self.surroundings.forget(&Kind::Arriving.name(number));
        }
    }

    fn take_connection(&mut self, number: u64, connection: OwnedFd) {
        if let Err(error) = self.receiver.take(number, connection) {
            self.surroundings.tell(Event::Refused(error.into()));
            self.surroundings.forget(&Kind::Arriving.name(number));
        }
    }

    fn receive(&mut self, number: u64) {
        let Some(answered) = self.notifiers.iter().find(|answered| answered.number == number) else { return };
        match self.record.receive(answered.notifier.notify.as_fd()) {
            Ok(Some(notification)) => self.answer(number, &notification),
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "a container's calls cannot be received any more");
                self.ended(number);
            }
        }
    }

    /// Decides about a call, and answers it.
    fn answer(&mut self, number: u64, notification: &Raw) {
        let Some(answered) = self.notifiers.iter_mut().find(|answered| answered.number == number) else {
            return;
        };
        let meant = Meant::of(notification);
        // A shutdown is a look and a call; the others read /proc.
        answered.budget.spend(if meant == Meant::Call(Call::Shutdown) { 1 } else { 20 });
        let answer = match meant {
            Meant::Call(call) => {
                self.surroundings.reached(Step::Received(call));
                self.decide(number, call, notification)
            }
            Meant::Other => Some(Answer::Continue),
            // It might be a shutdown(2) of a listener. A kernel without that architecture says the same.
            Meant::Foreign if self.has_adopted() => Some(Answer::Failed(Errno::ENOSYS)),
            Meant::Foreign => Some(Answer::Continue),
        };
        if let Some(answer) = answer {
            self.record.decide(answer);
            if let Meant::Call(call) = meant {
                self.surroundings.reached(Step::Decided(call));
            }
            self.send(number, notification, answer);
            if let Meant::Call(call) = meant {
                self.surroundings.reached(Step::Answered(call));
            }
        }
        self.record.clear();
    }

    fn has_adopted(&self) -> bool {
        self.listeners.iter().any(|listener| matches!(listener.state, ListenerState::Adopted { .. }))
    }

    /// What to answer; `None` when the caller waits no longer.
    fn decide(&mut self, number: u64, call: Call, notification: &Raw) -> Option<Answer> {
        let answered = self.notifiers.iter().find(|answered| answered.number == number)?;
        // Shared, since the answer changes what the agent has.
        let (notify, role) = (Arc::clone(&answered.notifier.notify), answered.notifier.role);
        let notify = notify.as_fd();
        match call {
            Call::Shutdown => self.shutdown(notify, notification),
            Call::Bind => {
                with_caller(notify, notification, |caller| self.bind((number, role), caller, notification))
            }
            Call::Listen => with_caller(notify, notification, |caller| match role {
                Role::Container => self.listen(number, caller, notification),
                // One that it was passed is systemd's still: it listens.
                Role::Executed => self.listen_again(caller, notification),
            }),
        }
    }

    fn send(&mut self, number: u64, notification: &Raw, answer: Answer) {
        let Some(answered) = self.notifiers.iter().find(|answered| answered.number == number) else { return };
        let (error, flags) = answer.words();
        match sys::send(answered.notifier.notify.as_fd(), notification.id, error, flags) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => {}
            Err(error) => tracing::warn!(%error, "a container's call cannot be answered"),
        }
    }

    /// The listener whose socket this is, whichever descriptor leads to it.
    fn listener_of(&self, socket: BorrowedFd<'_>) -> Option<usize> {
        let cookie = crate::socket::cookie(socket).ok()?;
        self.listeners.iter().position(|listener| listener.seen.cookie == cookie)
    }

    /// The last process of a container, or of a command in it, is gone.
    fn ended(&mut self, number: u64) {
        let Some(at) = self.notifiers.iter().position(|answered| answered.number == number) else { return };
        let answered = self.notifiers.remove(at);
        self.surroundings.forget(&Kind::Notifier(answered.notifier.role).name(number));
        if answered.notifier.role == Role::Container {
            self.surroundings.tell(Event::Stopped);
        }
        for index in 0..self.listeners.len() {
            let Some(listener) = self.listeners.get_mut(index) else { continue };
            let ListenerState::Adopted { by, .. } = &mut listener.state else { continue };
            by.retain(|holder| *holder != number);
            if by.is_empty() {
                self.release(index);
                self.surroundings.unclaim(index);
                self.surroundings.tell(Event::Ended { listener: index });
            }
        }
    }

    /// No service has this listener: it is as it was, and its originals are nothing to keep.
    fn release(&mut self, index: usize) {
        let Some(listener) = self.listeners.get_mut(index) else { return };
        listener.queue = Queue::default();
        if let ListenerState::Adopted { before, .. } =
            std::mem::replace(&mut listener.state, ListenerState::Free)
        {
            if listener.seen.family.is_datagrams() {
                crate::datagrams::dissolve(listener.socket.as_fd());
            }
            before.put_back(listener.socket.as_fd());
            self.note();
        }
        let (gone, kept) = std::mem::take(&mut self.originals)
            .into_iter()
            .partition(|original: &Original| original.listener == index);
        self.originals = kept;
        self.let_go(gone);
    }

    /// Writes down what a successor has to know of the listeners.
    fn note(&mut self) {
        let note = |listener: &Adoptable| match &listener.state {
            ListenerState::Free => None,
            ListenerState::Adopted { before, .. } => Some(Note {
                cookie: listener.seen.cookie,
                held: listener.is_held(),
                nonblocking: options::is_nonblocking(listener.socket.as_fd()).unwrap_or(true),
                before: before.clone(),
            }),
        };
        let notes: Vec<Note> = self.listeners.iter().filter_map(note).collect();
        self.record.note(&notes);
    }

    /// This container has the listener.
    fn is_held_by(&mut self, index: usize, number: u64) {
        let Some(listener) = self.listeners.get_mut(index) else { return };
        if let ListenerState::Adopted { by, .. } = &mut listener.state
            && !by.contains(&number)
        {
            by.push(number);
            self.flags.begin(Instant::now());
            self.note();
        }
    }

    /// Their addresses are free afterwards.
    fn let_go(&mut self, originals: Vec<Original>) {
        for original in originals {
            let name = original.name.clone();
            original.make_way();
            drop(original);
            self.surroundings.forget(&name);
        }
    }

    /// A client inside has come, or a datagram of one.
    fn take_inside(&mut self, index: usize) {
        let Some(original) = self.originals.get(index) else { return };
        match self.listeners.get(original.listener) {
            Some(listener) if original.seen.family.is_datagrams() => {
                self.flows.take(original, listener.socket.as_fd());
            }
            _ => self.accept_inside(index),
        }
    }

    fn accept_inside(&mut self, index: usize) {
        let Some(original) = self.originals.get(index).filter(|_| self.inside.len() < MOST_INSIDE) else {
            return;
        };
        let Some(listener) = self.listeners.get(original.listener) else { return };
        match original.accept() {
            Ok(client) => match Inside::new(client, listener.socket.as_fd()) {
                Ok(inside) => {
                    if let Some(end) = inside.end() {
                        self.surroundings.relays(end);
                    }
                    self.inside.push(inside);
                }
                Err(error) => tracing::debug!(%error, "a client inside the container is not relayed"),
            },
            Err(error)
                if matches!(
                    bro_relay::sys::errno_of(&error),
                    Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED
                ) => {}
            // A process that shares it may have shut it down.
            Err(error) => {
                tracing::warn!(%error, "clients inside the container do not find the service any more");
                if let Some(original) = self.originals.get_mut(index) {
                    original.open = false;
                }
            }
        }
    }

    fn move_inside(&mut self, index: usize) {
        if self.inside.get_mut(index).is_some_and(|inside| inside.turn() == Then::Over) {
            let over = self.inside.swap_remove(index);
            if let Some(end) = over.end() {
                self.surroundings.relays_no_more(end);
            }
        }
    }

    /// Is there room for one more original?
    const fn may_keep(&self) -> bool {
        self.originals.len() < original::MOST
    }
}

/// The answer to a caller; the kernel's own where it cannot be looked at, and none where it waits no longer.
fn with_caller<'a>(
    notify: BorrowedFd<'a>,
    notification: &Raw,
    answer: impl FnOnce(&Caller<'a>) -> Option<Answer>,
) -> Option<Answer> {
    match Caller::of(notify, notification) {
        Ok(caller) => answer(&caller),
        Err(error) if bro_relay::sys::errno_of(&error) == Errno::ESRCH => None,
        Err(error) => {
            tracing::debug!(%error, "a caller cannot be looked at");
            Some(Answer::Continue)
        }
    }
}
