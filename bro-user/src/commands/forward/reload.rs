//! `systemctl reload`: a successor takes the listening sockets over, this process finishes its connections.

use std::time::Duration;

use bro_relay::engine::protocol::Plain;
use bro_relay::listener::Listener;
use bro_relay::stats::Stats;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::Instant;

use super::handover::{Born, Ending, Predecessor, Program, Stopper, Successor, Takeover, Telling, Word};
use super::{Control, Phase};
use crate::commands::status;
use crate::metrics;
use crate::systemd::notify;

/// As good as for ever: until its last connection has ended, or the unit is stopped.
const NO_LIMIT: Duration = Duration::from_secs(u32::MAX as u64);

/// In a client's place: has the successor find a service that is awake.
pub(super) const AFTER_RELOAD: &str = "reload";

/// How much later than this process its successor may hear that both are to stop.
const LATER: Duration = Duration::from_secs(5);

/// What happens during a reload.
#[derive(Debug)]
pub(super) enum News {
    /// The successor is ready or stopped, or there is none.
    Successor(anyhow::Result<Born>),
    /// What the predecessor says to this process; nothing if it has ended.
    Told(Option<Word>),
    /// How many connections the predecessor still has.
    PredecessorHas(u64),
    /// The predecessor has ended.
    PredecessorEnded,
}

/// Where replacing stands, with this process in either place.
#[derive(Debug)]
pub(super) struct Replacing<'a> {
    /// What to start again.
    pub(super) program: Option<Program>,
    listeners: &'a [(Listener, usize)],
    /// A successor is being started, or has to be waited for until it has stopped.
    starting: Option<Stopper>,
    /// A successor has taken over.
    replaced: bool,
    /// The successor, to be told how many connections this process still has.
    telling: Option<Telling>,
    /// The predecessor still has connections: if this process ended, systemd would end it as well.
    predecessor: Option<status::Predecessor>,
    /// This process has no connection any more, and only waits for its predecessor, or for the successor that it stops.
    pub(super) drained: bool,
    news: (UnboundedSender<News>, UnboundedReceiver<News>),
}

impl<'a> Replacing<'a> {
    pub(super) fn new(listeners: &'a [(Listener, usize)]) -> Self {
        Self {
            program: None,
            listeners,
            starting: None,
            replaced: false,
            telling: None,
            predecessor: None,
            drained: false,
            news: unbounded_channel(),
        }
    }

    pub(super) async fn news(&mut self) -> Option<News> {
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
    pub(super) const fn predecessor(&self) -> Option<&status::Predecessor> {
        self.predecessor.as_ref()
    }

    /// Tells the successor, where there is one, how many connections are left: those of this process, and those of its predecessors.
    pub(super) fn tell(&mut self, stats: &Stats) {
        let before = self.predecessor.as_ref().and_then(|predecessor| predecessor.connections);
        if let Some(telling) = &mut self.telling {
            telling.connections(Stats::get(&stats.open) + before.unwrap_or(0));
        }
    }

    /// This process must not leave now, neither for want of clients nor of connections.
    pub(super) const fn stands_in_the_way(&self) -> bool {
        self.starting.is_some() || self.has_predecessor()
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
        let Some(program) = self.replacing.program.clone() else { return };
        if self.phase != Phase::Serving || self.replacing.is_starting() {
            return tracing::info!("not reloading: this forwarder is leaving or being replaced already");
        }
        tracing::info!("reloading: starting a successor");
        notify::reloading();
        let listeners: Vec<&Listener> = self
            .replacing
            .listeners
            .iter()
            .filter(|(listener, _)| !listener.is_own())
            .map(|(listener, _)| listener)
            .collect();
        let bequest = self.watching.bequest(self.replacing.has_predecessor()).await;
        let started = if listeners.len() == self.replacing.listeners.len() {
            program.start_successor(&listeners, bequest.as_ref())
        } else {
            Err(anyhow::anyhow!("the sockets of --listen cannot be handed over; use a socket unit"))
        };
        let news = self.replacing.news.0.clone();
        match started {
            Ok((successor, stopper)) => {
                self.replacing.starting = Some(stopper);
                let waiting = async move { news.send(News::Successor(successor.ready().await)).ok() };
                drop(tokio::spawn(waiting));
            }
            Err(error) => drop(news.send(News::Successor(Err(error)))),
        }
    }

    /// Hears of a successor or predecessor.
    pub(super) async fn replacement(&mut self, news: News) {
        match news {
            News::Successor(Ok(Born::Ready(successor))) if self.phase == Phase::Serving => {
                self.hand_over(successor).await;
            }
            // The successor was told to stop, and has heard of it only now.
            News::Successor(Ok(Born::Ready(successor))) => {
                let news = self.replacing.news.0.clone();
                let stopping = async move {
                    successor.stopped().await;
                    news.send(News::Successor(Ok(Born::Stopped))).ok()
                };
                drop(tokio::spawn(stopping));
            }
            News::Successor(Ok(Born::Stopped)) => self.replacing.starting = None,
            News::Successor(Err(error)) if self.phase != Phase::Serving => {
                tracing::debug!("the successor has not come up: {error:#}");
                self.replacing.starting = None;
            }
            News::Successor(Err(error)) => {
                self.counts.failed_reloads += 1;
                tracing::error!("cannot reload, and goes on as before: {error:#}");
                self.replacing.starting = None;
                // The successor may have put its own socket in this one's place. The old one removes its file, so it goes first.
                self.control = None;
                self.control = crate::control_socket::Server::start_or_warn();
                notify::ready(&self.status());
            }
            News::Told(Some(Word::Stop)) => {
                // The successor waits for this process, not vice versa.
                self.replacing.predecessor = None;
                if !matches!(self.phase, Phase::Draining(_)) {
                    self.begin_drain("The predecessor was told to stop before this process had taken over");
                }
            }
            News::Told(word) => {
                notify::mute(false);
                tracing::info!("has taken over from its predecessor");
                self.serve_metrics();
                notify::ready(&self.status());
                if word == Some(Word::TakenOver(Takeover::Awake)) {
                    self.engine.send(Plain::Wake(AFTER_RELOAD.into()));
                }
            }
            News::PredecessorHas(count) => {
                if let Some(predecessor) = &mut self.replacing.predecessor {
                    predecessor.connections = Some(count);
                }
            }
            News::PredecessorEnded => {
                self.replacing.predecessor = None;
                self.woken_at = Instant::now();
            }
        }
    }

    async fn hand_over(&mut self, successor: Successor) {
        self.replacing.starting = None;
        // The run that the successor may stop when idle.
        drop(tokio::time::timeout(super::REMEMBER, self.activator.note_run()).await);
        let pid = successor.pid();
        // The successor waits for a start that is under way.
        let awake = self.awake_since.is_some() || self.being_woken().is_some();
        let takeover = if awake { Takeover::Awake } else { Takeover::Asleep };
        // The successor listens there, and counts on from here.
        self.metrics = None;
        self.keep_counts().await;
        // Before the successor says anything: systemd listens to the main process alone.
        notify::succeeded_by(pid);
        match successor.take_over(takeover).await {
            Ok(telling) => self.replacing.telling = Some(telling),
            Err(error) => {
                tracing::error!("the successor is gone; going on as before: {error:#}");
                self.counts.failed_reloads += 1;
                self.serve_metrics();
                return notify::succeeded_by(std::process::id());
            }
        }
        self.counts.reloads += 1;
        self.keep_counts().await;
        self.replacing.tell(&self.stats);
        notify::mute(true);
        self.watching.leave();
        if let Some(control) = &mut self.control {
            control.is_succeeded();
        }
        self.replacing.replaced = true;
        self.phase = Phase::Draining(Instant::now() + NO_LIMIT);
        self.engine.send(Plain::Drain(format!("Replaced by process {pid}")));
    }

    /// Listens for requests for metrics, now that the other process does not any more.
    fn serve_metrics(&mut self) {
        let Some(endpoint) = &self.options.metrics else { return };
        match metrics::Server::start(endpoint) {
            Ok(server) => self.metrics = Some(server),
            // That is no reason to end the clients' connections.
            Err(error) => tracing::error!("{error:#}; going on without"),
        }
    }

    /// Takes over from a predecessor, in the background.
    pub(super) fn take_over_from(&mut self, predecessor: Predecessor) {
        let news = self.replacing.news.0.clone();
        match predecessor.reach() {
            Ok((pid, ending, mut saying)) => {
                self.replacing.predecessor = Some(status::Predecessor { pid, connections: None });
                drop(tokio::spawn({
                    let news = news.clone();
                    async move {
                        // The receiver may have left meanwhile.
                        news.send(News::Told(saying.ready().await)).ok();
                        while let Some(count) = saying.connections().await {
                            news.send(News::PredecessorHas(count)).ok();
                        }
                    }
                }));
                drop(tokio::spawn(async move {
                    Ending::come(&ending).await;
                    news.send(News::PredecessorEnded).ok()
                }));
            }
            // The predecessor has ended meanwhile, so this process is alone.
            Err(error) => {
                tracing::debug!("no predecessor any more: {error:#}");
                drop(news.send(News::Told(None)));
            }
        }
    }

    /// The unit is stopped: the connections that this process still has get the same time as the successor's.
    pub(super) fn told_to_stop_although_replaced(&mut self) {
        self.replacing.replaced = false;
        self.phase = Phase::Draining(Instant::now() + self.options.drain_timeout.or_forever());
    }
}
