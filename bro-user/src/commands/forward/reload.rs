//! `systemctl reload`: a successor takes the listening sockets over, this process finishes its connections.

use std::ops::ControlFlow;
use std::time::Duration;

use bro_relay::engine::protocol::Plain;
use bro_relay::listener::Listener;
use bro_relay::stats::Stats;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::Instant;

use super::adoption::SocketAdoption;
use super::control::{self, Control};
use super::handover::{
    Born, Ending, Predecessor, Program, Stopper, Successor, SuccessorFinds, SuccessorWord, Telling,
};
use super::lifecycle::Phase;
use crate::commands::status;
use crate::systemd::notify;

/// As good as for ever: until its last connection has ended, or the unit is stopped.
const NO_LIMIT: Duration = Duration::from_secs(u32::MAX as u64);

/// In a client's place: has the successor find a service that is awake.
pub(super) const AFTER_RELOAD: &str = "reload";

/// How much later than this process its successor may hear that both are to stop.
const LATER: Duration = Duration::from_secs(5);

/// What happens during a reload.
#[derive(Debug)]
pub(super) enum ReloadNews {
    /// The successor is ready or stopped, or there is none.
    Successor(anyhow::Result<Born>),
    /// What the predecessor says to this process; nothing if it has ended.
    Told(Option<SuccessorWord>),
    /// How many connections the predecessor still has.
    PredecessorHas(u64),
    /// The predecessor has ended.
    PredecessorEnded,
}

/// Where replacing stands, with this process in either place.
#[derive(Debug)]
pub(super) struct Reload<'a> {
    /// What to start again.
    program: Program,
    listeners: &'a [(Listener, usize)],
    /// A successor is being started, or has to be waited for until it has stopped.
    starting: Option<Stopper>,
    /// A successor has taken over.
    replaced: bool,
    /// The successor, to be told how many connections this process still has.
    telling: Option<Telling>,
    /// The predecessor still has connections: if this process ended, systemd would end it as well.
    predecessor: Option<status::PredecessorReport>,
    /// This process has no connection any more, and only waits for its predecessor, or for the successor that it stops.
    drained: bool,
    news: (UnboundedSender<ReloadNews>, UnboundedReceiver<ReloadNews>),
}

impl<'a> Reload<'a> {
    pub(super) fn new(program: Program, listeners: &'a [(Listener, usize)]) -> Self {
        Self {
            program,
            listeners,
            starting: None,
            replaced: false,
            telling: None,
            predecessor: None,
            drained: false,
            news: unbounded_channel(),
        }
    }

    pub(super) async fn news(&mut self) -> Option<ReloadNews> {
        self.news.1.recv().await
    }

    /// A successor speaks for the service.
    pub(super) const fn is_replaced(&self) -> bool {
        self.replaced
    }

    /// The predecessor has not ended.
    pub(super) const fn has_predecessor(&self) -> bool {
        self.predecessor.is_some()
    }

    /// The predecessor that has not ended.
    pub(super) const fn predecessor(&self) -> Option<&status::PredecessorReport> {
        self.predecessor.as_ref()
    }

    /// Tells the successor, where there is one, how many connections are left: those of this process, and those of its predecessors.
    pub(super) fn tell(&mut self, stats: &Stats) {
        let before = self.predecessor.as_ref().and_then(|predecessor| predecessor.connections);
        if let Some(telling) = &mut self.telling {
            telling.connections(stats.guests() + before.unwrap_or(0));
        }
    }

    /// This process must not leave now, neither for want of clients nor of connections.
    pub(super) const fn stands_in_the_way(&self) -> bool {
        self.starting.is_some() || self.has_predecessor()
    }

    /// The unit is stopped, and with it both processes.
    pub(super) const fn is_replaced_no_more(&mut self) {
        self.replaced = false;
    }

    /// No client is connected any more. A successor that is replaced in turn waits for its own predecessor, so that the last one
    /// knows of them all; and no process leaves a successor behind that the service manager does not know of.
    pub(super) const fn is_drained(&mut self) -> ControlFlow<()> {
        self.drained = self.stands_in_the_way();
        if self.drained { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    /// The sockets that this process and its successors listen on, each with its target's number.
    pub(super) const fn listeners(&self) -> &'a [(Listener, usize)] {
        self.listeners
    }

    /// A successor is being started.
    pub(super) const fn is_starting(&self) -> bool {
        self.starting.is_some()
    }

    /// This process was told to stop, and the service manager does not know of its successor: that stops too.
    pub(super) fn stop_successor(&self, limit: Duration) {
        if let Some(starting) = &self.starting {
            starting.stop(limit.saturating_add(LATER));
        }
    }
}

impl Control<'_> {
    /// Starts a successor, in the background.
    pub(super) async fn begin_replacement(&mut self) {
        if self.life.phase != Phase::Serving || self.reload.is_starting() {
            return tracing::info!("not reloading: this forwarder is leaving or being replaced already");
        }
        tracing::info!("reloading: starting a successor");
        notify::reloading();
        let all = self.reload.listeners;
        let passed = all.iter().map(|(listener, _)| listener).filter(|listener| !listener.is_own());
        let listeners: Vec<&Listener> = passed.collect();
        let bequest = self.plane.bequest(self.reload.has_predecessor()).await;
        let more = self
            .adoption
            .as_mut()
            .map(SocketAdoption::for_successor)
            .transpose()
            .map(Option::unwrap_or_default);
        let more = more.and_then(|mut more| {
            more.extend(self.plane.teller_for_successor()?);
            Ok(more)
        });
        let started = if listeners.len() == all.len() {
            more.and_then(|more| self.reload.program.start_successor(&listeners, &more, bequest.as_ref()))
        } else {
            Err(anyhow::anyhow!("the sockets of --listen cannot be handed over; use a socket unit"))
        };
        let news = self.reload.news.0.clone();
        match started {
            Ok((successor, stopper)) => {
                self.reload.starting = Some(stopper);
                let waiting = async move { news.send(ReloadNews::Successor(successor.ready().await)).ok() };
                drop(tokio::spawn(waiting));
            }
            Err(error) => drop(news.send(ReloadNews::Successor(Err(error)))),
        }
    }

    /// Hears of a successor or predecessor.
    pub(super) async fn replacement(&mut self, news: ReloadNews) -> ControlFlow<()> {
        match news {
            ReloadNews::Successor(Ok(Born::Ready(successor))) if self.life.phase == Phase::Serving => {
                self.hand_over(successor).await;
            }
            // The successor was told to stop, and has heard of it only now.
            ReloadNews::Successor(Ok(Born::Ready(successor))) => {
                let news = self.reload.news.0.clone();
                let stopping = async move {
                    successor.stopped().await;
                    news.send(ReloadNews::Successor(Ok(Born::Stopped))).ok()
                };
                drop(tokio::spawn(stopping));
            }
            ReloadNews::Successor(Ok(Born::Stopped)) => self.reload.starting = None,
            ReloadNews::Successor(Err(error)) if self.life.phase != Phase::Serving => {
                tracing::debug!("the successor has not come up: {error:#}");
                self.reload.starting = None;
            }
            ReloadNews::Successor(Err(error)) => {
                self.life.counts.failed_reloads += 1;
                tracing::error!("cannot reload, and goes on as before: {error:#}");
                self.reload.starting = None;
                self.requests.listen_anew();
                notify::ready(&self.status());
            }
            ReloadNews::Told(Some(SuccessorWord::Stop)) => {
                // The successor waits for this process, not vice versa.
                self.reload.predecessor = None;
                if !self.life.is_draining() {
                    self.begin_drain("The predecessor was told to stop before this process had taken over");
                }
            }
            ReloadNews::Told(word) => {
                notify::mute(false);
                tracing::info!("has taken over from its predecessor");
                self.requests.serve_metrics(self.options.metrics.as_ref());
                if let Err(error) = self.begin_adoption().await {
                    self.adoption_fails(error);
                }
                notify::ready(&self.status());
                if word == Some(SuccessorWord::TakenOver(SuccessorFinds::Awake)) {
                    self.plane.engine().send(Plain::Wake(AFTER_RELOAD.into()));
                }
            }
            ReloadNews::PredecessorHas(count) => {
                if let Some(predecessor) = &mut self.reload.predecessor {
                    predecessor.connections = Some(count);
                }
            }
            ReloadNews::PredecessorEnded => {
                self.reload.predecessor = None;
                self.life.woken_at = Instant::now();
            }
        }
        if self.reload.drained { self.reload.is_drained() } else { ControlFlow::Continue(()) }
    }

    async fn hand_over(&mut self, successor: Successor) {
        self.reload.starting = None;
        // The run that the successor may stop when idle.
        drop(tokio::time::timeout(control::REMEMBER, self.life.activator.note_run()).await);
        let pid = successor.pid();
        // The successor waits for a start that is under way.
        let awake = self.life.awake_since.is_some() || self.life.being_woken().is_some();
        let takeover = if awake { SuccessorFinds::Awake } else { SuccessorFinds::Asleep };
        // The successor listens there, and counts on from here.
        self.requests.leave_metrics();
        self.keep_counts().await;
        // From now on no agent answers; the successor's does, once it has all that this one has.
        if let Err(error) = self.adoption.as_mut().map_or(Ok(()), SocketAdoption::bequeath) {
            return self.adoption_fails(error);
        }
        // Before the successor says anything: systemd listens to the main process alone.
        notify::succeeded_by(pid);
        match successor.take_over(takeover).await {
            Ok(telling) => self.reload.telling = Some(telling),
            Err(error) => {
                tracing::error!("the successor is gone; going on as before: {error:#}");
                self.life.counts.failed_reloads += 1;
                self.requests.serve_metrics(self.options.metrics.as_ref());
                notify::succeeded_by(std::process::id());
                if let Err(error) = self.adoption.as_mut().map_or(Ok(()), SocketAdoption::goes_on) {
                    self.adoption_fails(error);
                }
                return;
            }
        }
        self.life.counts.reloads += 1;
        self.keep_counts().await;
        self.reload.tell(self.plane.stats());
        notify::mute(true);
        self.plane.is_succeeded();
        self.requests.is_succeeded();
        self.reload.replaced = true;
        self.life.phase = Phase::Draining(Instant::now() + NO_LIMIT);
        self.plane.engine().send(Plain::Drain(format!("Replaced by process {pid}")));
    }

    /// Takes over from a predecessor, in the background.
    pub(super) fn take_over_from(&mut self, predecessor: Predecessor) {
        let news = self.reload.news.0.clone();
        match predecessor.reach() {
            Ok((pid, ending, mut saying)) => {
                self.reload.predecessor = Some(status::PredecessorReport { pid, connections: None });
                drop(tokio::spawn({
                    let news = news.clone();
                    async move {
                        // The receiver may have left meanwhile.
                        news.send(ReloadNews::Told(saying.ready().await)).ok();
                        while let Some(count) = saying.connections().await {
                            news.send(ReloadNews::PredecessorHas(count)).ok();
                        }
                    }
                }));
                drop(tokio::spawn(async move {
                    Ending::come(&ending).await;
                    news.send(ReloadNews::PredecessorEnded).ok()
                }));
            }
            // The predecessor has ended meanwhile, so this process is alone.
            Err(error) => {
                tracing::debug!("no predecessor any more: {error:#}");
                drop(news.send(ReloadNews::Told(None)));
            }
        }
    }
}
