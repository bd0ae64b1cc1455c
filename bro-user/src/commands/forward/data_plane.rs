//! The data plane, as the control process holds it: the relay process, the addresses that it may connect to, and the kernel relay
//! from its loading on.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::anyhow;
use bro_relay::engine::protocol::{EngineCommand, EngineEvent, Plain};
use bro_relay::engine::{ReadyTarget, Settings, slot};
use bro_relay::process::{self, Process};
use bro_relay::stats::Stats;
use bro_relay::sys::AddressBook;
use bro_relay::unreachable::Undelivered;
use bro_sockmap::{Bequest, Foreign, ForeignNews, Unavailable};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::oneshot;

use super::routes::Routes;
use super::settings;
use super::undelivered::Teller;
use crate::cli::{Forward, RelayChoice};
use crate::commands::status::{self, UndeliveredReport};
use crate::exit::Failure;
use crate::logging;
use crate::relay_handle::Handle;
use crate::service::kernel_watch::{self, LoadedRelay, Watching};

/// The relay process, forked while this process had a single thread, and what both have of each other.
pub(super) struct RelayProcess {
    process: Process,
    channel: OwnedFd,
    addresses: AddressBook,
    stats: Arc<Stats>,
}

impl RelayProcess {
    /// Forks it. What is `private` is open here, and not there.
    pub(super) fn fork(
        settings: &Settings,
        routes: &Routes,
        private: &[BorrowedFd<'_>],
    ) -> anyhow::Result<Self> {
        let Routes { listeners, targets } = routes;
        let stats = Arc::new(Stats::new()?);
        let mut addresses = AddressBook::new(slot(targets.len(), 0))?;
        let (process, channel) =
            process::start(settings, listeners, targets, &mut addresses, &stats, private)?;
        Ok(Self { process, channel, addresses, stats })
    }
}

/// Whether the kernel relay is available.
enum KernelRelay {
    /// It is not to be used.
    Unwanted,
    /// Not known yet: a thread loads it, where there was one to be had.
    Loading(Option<oneshot::Receiver<Result<LoadedRelay, Unavailable>>>),
    /// It is in the engine's hands; with the sockets that its programs left alone.
    Loaded(Option<Foreign>),
    /// It is not, and why.
    Unavailable(String),
}

impl KernelRelay {
    /// Waits for it to be loaded; for ever where it is not being loaded.
    async fn loaded(&mut self) -> Result<LoadedRelay, Unavailable> {
        match self {
            Self::Loading(Some(loading)) => {
                loading.await.unwrap_or_else(|_| Err(Unavailable::SelfTest("it did not end".into())))
            }
            Self::Loading(None) => Err(Unavailable::SelfTest("no thread to run it on".into())),
            Self::Unwanted | Self::Loaded(_) | Self::Unavailable(_) => std::future::pending().await,
        }
    }
}

/// What happens in the data plane.
pub(super) enum PlaneNews {
    /// The engine says something.
    Event(EngineEvent),
    /// The kernel relay is loaded, or cannot be had.
    KernelRelay(Result<LoadedRelay, Unavailable>),
    /// The relay process has ended.
    Ended,
}

/// The data plane.
pub(super) struct DataPlane<'a> {
    options: &'a Forward,
    process: Process,
    /// What tells clients that a datagram was not received, where that is wanted.
    teller: Option<Teller>,
    engine: Arc<Handle>,
    events: UnboundedReceiver<EngineEvent>,
    /// The addresses that the relay process may connect to.
    addresses: AddressBook,
    stats: Arc<Stats>,
    kernel: KernelRelay,
    /// What the kernel relay's programs watch.
    watching: Arc<Watching>,
    /// The cgroup of the clients that the kernel relay is for too.
    local_clients: Option<PathBuf>,
}

impl<'a> DataPlane<'a> {
    /// Talks to the relay process from now on, and begins to load the kernel relay, where it may be used.
    pub(super) fn start(
        options: &'a Forward,
        relay: RelayProcess,
        teller: Option<Teller>,
        local_clients: Option<PathBuf>,
        bequest: Option<Bequest>,
    ) -> anyhow::Result<Self> {
        let RelayProcess { process, channel, addresses, stats } = relay;
        let (handle, events) = Handle::new(channel)?;
        let engine = Arc::new(handle);
        let kernel = if settings::wants_kernel_relay(options) {
            KernelRelay::Loading(kernel_watch::load(settings::kernel_relay(options), bequest))
        } else {
            KernelRelay::Unwanted
        };
        let watching = Arc::new(Watching::new(engine.clone()));
        Ok(Self {
            options,
            process,
            teller,
            engine,
            events,
            addresses,
            stats,
            kernel,
            watching,
            local_clients,
        })
    }

    /// The engine, to be told.
    pub(super) const fn engine(&self) -> &Arc<Handle> {
        &self.engine
    }

    /// The numbers that the engine counts in memory of both processes.
    pub(super) const fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// What has the kernel relay's programs watch a service, where there may be any.
    pub(super) fn watching(&self) -> Option<&Arc<Watching>> {
        (!matches!(self.kernel, KernelRelay::Unwanted)).then_some(&self.watching)
    }

    /// What happens there next. Nothing is lost when this is cancelled.
    pub(super) async fn news(&mut self) -> PlaneNews {
        tokio::select! {
            event = self.events.recv() => event.map_or(PlaneNews::Ended, PlaneNews::Event),
            loaded = self.kernel.loaded() => PlaneNews::KernelRelay(loaded),
        }
    }

    /// A target listens: its clients are to be connected there, and nowhere else.
    pub(super) fn ready(&mut self, target: usize, ready: ReadyTarget) {
        // An old address may be another service's by now.
        self.addresses.clear(slot(target, ready.addresses.len())..slot(target + 1, 0));
        for (number, address) in ready.addresses.iter().enumerate() {
            if let Some(address) = address {
                // There is room for as many addresses as a target may have.
                let _there_is_room = self.addresses.write(slot(target, number), *address);
            }
        }
        self.engine.send(EngineCommand::Ready { target, ready });
    }

    /// The engine says that a client's datagram was not received.
    pub(super) fn undelivered(&mut self, about: &Undelivered) {
        if let Some(teller) = &mut self.teller {
            teller.tell(about);
        }
    }

    /// What comes of that, where it is wanted.
    pub(super) fn undelivered_report(&self) -> Option<UndeliveredReport> {
        let report = || self.teller.as_ref().map_or(UndeliveredReport::NoSocket, Teller::report);
        self.options.icmp_port_unreachable.then(report)
    }

    /// What a successor gets to tell clients by.
    ///
    /// # Errors
    /// EMFILE.
    pub(super) fn teller_for_successor(&self) -> std::io::Result<Vec<(&'static str, OwnedFd)>> {
        self.teller.as_ref().map_or(Ok(Vec::new()), Teller::for_successor)
    }

    /// Waits for the kernel relay alone.
    pub(super) async fn loaded(&mut self) -> Result<LoadedRelay, Unavailable> {
        self.kernel.loaded().await
    }

    /// Hands the kernel relay to the engine, or says why there is none.
    pub(super) async fn kernel_loaded(
        &mut self,
        loaded: Result<LoadedRelay, Unavailable>,
    ) -> anyhow::Result<()> {
        match loaded {
            Ok(loaded) => {
                tracing::info!("kernel relay loaded and tested");
                if loaded.share.fionread_lies {
                    // It was asked for: with auto it would have been refused.
                    let hooked =
                        if self.local_clients.is_some() { "the service, or a client" } else { "the service" };
                    tracing::warn!(
                        "--relay=sockmap: this kernel answers FIONREAD with 0 for hooked sockets; if {hooked} asks how much waits \
                         (Java, nginx, Qt, .NET), its connections hang ({})",
                        Unavailable::FionreadLies.mend()
                    );
                }
                self.kernel = KernelRelay::Loaded(Foreign::of(&loaded.descriptors).ok());
                self.watching.loaded(loaded, self.local_clients.as_deref()).await;
            }
            Err(reason) => {
                let (mend, permitted) = (reason.mend(), !matches!(reason, Unavailable::NotPermitted(..)));
                let why = format!("{:#}", anyhow::Error::from(reason));
                if self.options.relay == RelayChoice::Sockmap {
                    let sentence = format!("--relay=sockmap cannot be had: {why}; {mend}");
                    return Err(if permitted {
                        anyhow!(sentence)
                    } else {
                        Failure::NotPermitted(sentence).into()
                    });
                }
                let clients =
                    if self.local_clients.is_some() { "; --local-clients has no effect" } else { "" };
                tracing::info!("relaying by splice, without the kernel relay: {why}; {mend}{clients}");
                self.kernel = KernelRelay::Unavailable(why);
                self.watching.unavailable();
            }
        }
        Ok(())
    }

    /// What a successor gets of the kernel relay; `older`: predecessors of this process still have connections.
    pub(super) async fn bequest(&self, older: bool) -> Option<Bequest> {
        self.watching.bequest(older).await
    }

    /// A successor has taken over.
    pub(super) fn is_succeeded(&self) {
        self.watching.leave();
    }

    /// Says, from time to time, how many sockets of other users the kernel relay's programs left alone.
    pub(super) fn tell_what_was_left_alone(&mut self) {
        if let KernelRelay::Loaded(Some(foreign)) = &mut self.kernel
            && let Some(news) = foreign.news(Instant::now())
        {
            left_alone(news);
        }
    }

    /// What moves bytes, for `bro status`.
    pub(super) fn describe(&self) -> status::Relay {
        let (name, reason) = match (&self.kernel, self.options.relay) {
            (_, RelayChoice::Copy) => ("copy", Some("asked for with --relay=copy".to_owned())),
            (_, RelayChoice::Splice) => ("splice", Some("asked for with --relay=splice".to_owned())),
            (KernelRelay::Loading(_) | KernelRelay::Unwanted, _) => {
                ("splice", Some("the kernel relay is being loaded".to_owned()))
            }
            (KernelRelay::Unavailable(reason), _) => ("splice", Some(reason.clone())),
            (KernelRelay::Loaded(_), _) => ("sockmap", None),
        };
        status::Relay { name: name.into(), reason }
    }

    /// Tells the relay process to end, and waits until it has.
    pub(super) async fn stop(self) -> anyhow::Result<()> {
        if let KernelRelay::Loaded(Some(foreign)) = &self.kernel
            && let Some(news) = foreign.rest()
        {
            left_alone(news);
        }
        self.engine.send(Plain::Stop);
        // The command goes out during this wait.
        let process = self.process;
        let ended = tokio::task::spawn_blocking(move || process.wait(logging::flush)).await;
        ended.unwrap_or_else(|error| Err(error.into()))
    }
}

/// Says how many sockets were left alone. The programs know no more than that they are not this user's.
fn left_alone(ForeignNews { new, total }: ForeignNews) {
    let sockets = if new == 1 { "socket" } else { "sockets" };
    tracing::warn!(
        foreign = new,
        foreign_total = total,
        "left {new} {sockets} of other users alone, at ports that forwarders of this user watch"
    );
}
