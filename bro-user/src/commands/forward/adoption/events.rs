//! What happens to listeners that are to be adopted, and what the control process makes of it.

use std::ops::ControlFlow;
use std::time::{Duration, SystemTime};

use bro_adopt::{Event, Misfit};
use tokio::time::{Instant, timeout_at};

use super::agent_thread::AgentNews;
use super::guests::Guests;
use super::{AdoptionNews, GRACE, ListenerHolder};
use crate::commands::forward::control::Control;
use crate::commands::forward::lifecycle::Phase;
use crate::commands::forward::wake::A_CLIENT;

/// How long a container's last process may take to be gone when its unit is stopped.
const ENDS_WITHIN: Duration = Duration::from_secs(3);

/// Whether a listener that is adopted was so before this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AdoptedWhen {
    Now,
    TakenOver,
}

impl Control<'_> {
    /// The agent answers from now on, and listeners that no service has are watched.
    pub(in super::super) async fn begin_adoption(&mut self) -> anyhow::Result<()> {
        let Some(adoption) = &mut self.adoption else { return Ok(()) };
        adoption.start_agent().await?;
        while let Some(news) = self.adoption.as_mut().and_then(|adoption| adoption.agent.said_already()) {
            match news {
                AgentNews::Event(event) => self.agent_says(event, AdoptedWhen::TakenOver),
                AgentNews::Wanted(_) => {}
                AgentNews::Failed(errno) => return Err(errno.into()),
            }
        }
        if let Some(adoption) = &mut self.adoption {
            adoption.watch_the_rest();
        }
        Ok(())
    }

    /// What there is to hear of, or to do.
    pub(in super::super) fn adoption_news(&mut self, news: AdoptionNews) -> ControlFlow<()> {
        match news {
            AdoptionNews::Agent(AgentNews::Event(event)) => self.agent_says(event, AdoptedWhen::Now),
            AdoptionNews::Agent(AgentNews::Wanted(index)) => {
                if let Some(adoption) = &mut self.adoption {
                    adoption.yield_sieve(index, false);
                }
            }
            AdoptionNews::Agent(AgentNews::Failed(errno)) => {
                let error =
                    anyhow::anyhow!("the calls of the container are not answered any more: {}", errno.desc());
                self.adoption_fails(error);
            }
            AdoptionNews::Decide(target) => {
                if let Some(adoption) = &mut self.adoption {
                    adoption.decide(target);
                }
            }
            AdoptionNews::Look => {
                let _told_in_the_status = self.look_for_guests();
            }
            AdoptionNews::Mend => self.mend(),
            AdoptionNews::Mending(asked) => self.mending_asked(asked),
        }
        self.count_fallbacks();
        ControlFlow::Continue(())
    }

    /// Restarted by its service manager, with what that one has stored, it goes on.
    pub(in super::super) fn adoption_fails(&mut self, error: anyhow::Error) {
        tracing::error!("{error:#}; leaving, to be started anew");
        let _first = self.failure.get_or_insert(error);
        if !self.life.is_draining() {
            self.begin_drain("The container's calls cannot be answered");
        }
    }

    fn agent_says(&mut self, event: Event, found: AdoptedWhen) {
        let Some(adoption) = &mut self.adoption else { return };
        match event {
            Event::Started { stop_signal } => {
                adoption.containers += 1;
                // Of several it is not known which one has it.
                adoption.stop_signal = stop_signal.filter(|_| adoption.containers == 1);
                tracing::debug!("a container's calls are answered");
            }
            Event::Stopped => {
                adoption.containers = adoption.containers.saturating_sub(1);
                adoption.ended = Some(Instant::now());
                adoption.stop_signal = None;
                if adoption.containers == 0 {
                    // What was found has ended before it was decided about.
                    adoption.decisions.clear();
                    if adoption.sifts {
                        // Nothing has come of what it was left to.
                        adoption.watch_the_rest();
                    }
                    adoption.watch_what_was_closed(0..adoption.listeners.len());
                }
            }
            Event::Adopted { listener: index, options_refused, inside } => {
                let Some(listener) = adoption.listeners.get_mut(index) else { return };
                let (socket, address, target) = (&listener.name, &listener.address, listener.target);
                if options_refused > 0 {
                    tracing::info!(%socket, options_refused, "socket options of the service's could not be set on the adopted socket");
                }
                if let Some(error) = inside {
                    tracing::warn!(%socket, %error, "clients inside the container do not reach the service any more");
                }
                if !matches!(listener.holder, ListenerHolder::Service { .. }) {
                    let again = if found == AdoptedWhen::TakenOver { ", as before this process" } else { "" };
                    tracing::info!(%socket, %address, "adopted: the service accepts the clients of this socket itself{again}");
                    listener.holder = ListenerHolder::Service { since: SystemTime::now() };
                    adoption.look_at = Some(Instant::now());
                    adoption.use_so(index, adoption.use_of_adopted());
                    if found == AdoptedWhen::Now {
                        self.life.counts.adoptions += 1;
                    }
                }
                self.life.has_sockets = true;
                self.life.started_by_itself(target);
            }
            Event::NotAdopted { listener: index, why } => {
                let Some(listener) = adoption.listeners.get_mut(index) else { return };
                tracing::debug!(socket = %listener.name, "the service listens at a socket of its own: {why}");
                if !matches!(why, Misfit::Relayed) {
                    listener.misfit = Some((&why).into());
                }
                // A service that was found already, and listens only now.
                let target = listener.target;
                if self.life.targets[target].is_awake() {
                    let _sooner = adoption.decisions.entry(target).or_insert_with(|| Instant::now() + GRACE);
                }
            }
            Event::GivenBack { listener } => {
                if let Some(listener) = adoption.listeners.get(listener) {
                    tracing::warn!(socket = %listener.name, address = %listener.address, "the service has shut the adopted socket down");
                }
            }
            Event::Closed { listener: index } => {
                if let Some(listener) = adoption.listeners.get(index) {
                    tracing::warn!(socket = %listener.name, address = %listener.address, "the service has closed the adopted socket; clients are reset until it listens again, or the next instance does");
                }
                adoption.refuse(index);
                self.life.has_sockets = adoption.is_adopted();
            }
            Event::Ended { listener: index } => {
                if let Some(listener) = adoption.listeners.get(index) {
                    tracing::info!(socket = %listener.name, address = %listener.address, "the container that had the socket has ended; the next client wakes it again");
                }
                // Before a client is accepted there: its namespace may stay, as a pod's does, and such a client would be connected into the void.
                if let Some(listener) = adoption.listeners.get(index).filter(|_| adoption.sifts) {
                    self.life.is_gone(listener.target);
                }
                adoption.watch(index);
                self.life.has_sockets = adoption.is_adopted();
            }
            Event::Refused(why) => {
                tracing::warn!("what came to the socket “{}” is not taken: {why}", super::SECCOMP);
            }
        }
    }

    /// A client waits at a listener that nothing accepts at. The relay process is not trusted with its number.
    pub(in super::super) fn client_waits(&mut self, index: usize) {
        let Some(listener) = self.adoption.as_mut().and_then(|adoption| adoption.listeners.get_mut(index))
        else {
            return tracing::error!(index, "the relay process tells of a socket that there is not");
        };
        match listener.holder {
            ListenerHolder::Watched => {
                listener.holder = ListenerHolder::Called;
                let target = listener.target;
                self.life.called(target);
            }
            // A service that accepts itself was frozen, and cannot now.
            ListenerHolder::Service { .. } if self.life.freezing.is_frozen() => {
                self.life.thaw_for(A_CLIENT.to_owned());
            }
            ListenerHolder::Closed => {
                if let Some(adoption) = &mut self.adoption {
                    adoption.refuse(index);
                }
            }
            _ => {}
        }
    }

    /// Looks whether a client is connected to a service that has its socket, or waiting to be.
    pub(in super::super) fn look_for_guests(&mut self) -> Guests {
        let Some(adoption) = self.adoption.as_mut() else { return Guests::None };
        let guests = adoption.look(self.life.history.idle_time());
        // The idle time counts from the first look that finds none: it is never shorter than asked for.
        let limit = self.life.history.idle_time();
        let seen = match guests {
            Guests::There | Guests::Left => Some(Instant::now()),
            // Not before that, and no later for it.
            Guests::Fresh(until) => until.checked_sub(limit),
            Guests::None => None,
        };
        self.life.guests_seen = self.life.guests_seen.max(seen.unwrap_or(self.life.guests_seen));
        if adoption.stirred && self.life.freezing.is_frozen() {
            // It came before the service was frozen, or says something on a connection that it had.
            self.life.thaw_for(A_CLIENT.to_owned());
        }
        guests
    }

    /// Notes why listeners are relayed.
    fn count_fallbacks(&mut self) {
        let Some(adoption) = &mut self.adoption else { return };
        for kind in adoption.fell_back.drain(..) {
            *self.life.counts.fallbacks.entry(kind).or_default() += 1;
        }
    }

    /// The start has taken as long as clients are held: those whom nothing has accepted yet are relayed.
    pub(in super::super) fn relay_what_is_late(&mut self) {
        let Some(adoption) = &mut self.adoption else { return };
        let limit = self.options.start_timeout.or_forever();
        for target in self.life.overdue() {
            if adoption.timed_out(target, limit) {
                self.life.hold_again(target);
            }
        }
    }

    /// Clients that could not be served are reset.
    pub(in super::super) fn turn_away(&mut self) {
        for target in std::mem::take(&mut self.life.turned_away) {
            if let Some(adoption) = &mut self.adoption {
                adoption.turn_away(target);
            }
        }
        self.count_fallbacks();
    }

    /// The container's unit is stopped: its sockets are as they were when its last process is gone.
    pub(in super::super) async fn let_containers_end(&mut self) {
        let deadline = Instant::now() + ENDS_WITHIN;
        while self.adoption.as_ref().is_some_and(super::SocketAdoption::is_adopted) {
            match timeout_at(deadline, super::news(&mut self.adoption)).await {
                Ok(news) => drop(self.adoption_news(news)),
                Err(_) => {
                    return tracing::warn!("processes of the container go on after its unit was stopped");
                }
            }
        }
    }

    /// The engine accepts no more: where a successor has taken over, it may have what is known of containers.
    pub(in super::super) fn hand_containers_over(&mut self) {
        if self.reload.is_replaced()
            && let Some(mut adoption) = self.adoption.take()
        {
            adoption.hand_over();
        }
    }

    /// This process is about to leave: may it, while a container has its sockets? Only one that ends with it may.
    pub(in super::super) async fn why_the_container_goes_on(&self) -> Option<String> {
        let adopted = self.adoption.as_ref().is_some_and(super::SocketAdoption::is_adopted);
        if adopted && self.life.phase == Phase::Leaving {
            self.life.activator.why_it_goes_on().await
        } else {
            None
        }
    }
}
