//! `bro forward`: one forwarder's life, from the sockets that it gets to its exit. The control process: it starts the engine in a
//! process of its own, wakes targets when the engine asks, and listens to systemd, signals and clocks.

pub mod freeze;
pub mod handover;
pub mod inhibit;

mod reload;
mod sleep;
mod waiting;
mod wake;

use std::collections::HashMap;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, anyhow, bail};
use bro_relay::connection::End;
use bro_relay::engine::protocol::{Event, Plain};
use bro_relay::engine::socket_options::Keepalive;
use bro_relay::engine::{Settings, slot};
use bro_relay::listener::Listener;
use bro_relay::process::{self, Process};
use bro_relay::relay::{Method, pipes};
use bro_relay::stats::{Stats, Tally};
use bro_relay::sys::AddressBook;
use bro_relay::target::Target;
use bro_sockmap::{Bequest, Foreign, News, Unavailable};
use nix::sys::socket::{SockaddrStorage, getsockname};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use wake::Wakefulness;

use super::forward::handover::{Predecessor, Program};
use super::status;
use crate::cli::idle::WakeOn;
use crate::cli::{Forward, LocalClients, RelayChoice};
use crate::control_socket::{self, Asked, Asker, Request};
use crate::exit::Failure;
use crate::ledger::Counts;
use crate::ledger::Ledger;
use crate::logging;
use crate::metrics::{self, Question};
use crate::relay_handle::Handle;
use crate::service::failed_wake::Failures;
use crate::service::kernel_watch::{self, Loaded, Watching};
use crate::service::sources::{Choice, Wanted};
use crate::service::wakes::{Limits, Wakes};
use crate::service::{Awake, ContainerNetns, NetnsSource, ServiceStarter};
use crate::systemd::listen_fds::{self, Passed};
use crate::systemd::scope::RuntimeScope;
use crate::systemd::{notify, own_unit};

/// How often the status is brought up to date; the engine's figures may take no longer.
const STATUS_STEP: Duration = Duration::from_secs(1);

/// How long the service manager may take to say which run of the unit it is, where the forwarder waits for that.
const REMEMBER: Duration = Duration::from_secs(2);

/// How often a drain asks the service manager for more time, and by how much.
const EXTEND_EVERY: Duration = Duration::from_secs(5);
const EXTEND_BY: Duration = Duration::from_secs(15);

/// Each listener with the index of its target, and the targets.
type Routes = (Vec<(Listener, usize)>, Vec<Target>);

/// Pairs each listener with its target: the one named for it, else the positional one.
fn route(options: &Forward, listeners: Vec<Listener>) -> Result<Routes, Failure> {
    for (index, (name, _)) in options.targets.iter().enumerate() {
        if options.targets[..index].iter().any(|(before, _)| before == name) {
            return Err(Failure::Usage(format!("--target {name}=… is given more than once")));
        }
        if !listeners.iter().any(|listener| listener.name == *name) {
            let names: Vec<&str> = listeners.iter().map(|listener| listener.name.as_str()).collect();
            let sentence = format!(
                "--target {name}=… matches no socket; the sockets passed are named {}",
                names.join(", ")
            );
            if !options.allow_missing_sockets {
                return Err(Failure::Usage(sentence));
            }
            tracing::warn!("{sentence}");
        }
    }
    let mut targets: Vec<Target> = Vec::new();
    let mut routes = Vec::with_capacity(listeners.len());
    for listener in listeners {
        let named = options.targets.iter().find(|(name, _)| *name == listener.name).map(|(_, target)| target);
        let Some(target) = named.or(options.target.as_ref()) else {
            return Err(Failure::Usage(format!(
                "the socket “{}” ({}) has no target; give TARGET, or --target {}=ADDR",
                listener.name, listener.address, listener.name
            )));
        };
        let index = targets.iter().position(|known| known == target).unwrap_or_else(|| {
            targets.push(target.clone());
            targets.len() - 1
        });
        routes.push((listener, index));
    }
    Ok((routes, targets))
}

/// Descriptors that connections may not use up: waking a service takes some (the bus, the agent, pidfds), as do pipes and the
/// kernel relay's maps.
const RESERVED_DESCRIPTORS: u64 = 128;

/// For how many connections the kernel relay has lanes without `--connections-max`: more are spliced. Lanes take memory from the
/// start, connections only when they come.
const LANES: u32 = 256;

/// Raises the limit on descriptors as far as may be, and says how many are left for connections and pipes.
fn descriptors_for_connections() -> usize {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return usize::MAX };
    let limit =
        if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_err() { soft } else { hard };
    usize::try_from(limit - RESERVED_DESCRIPTORS.min(limit / 4 * 3)).unwrap_or(usize::MAX)
}

/// How many of the wanted connections fit into so many descriptors, and how many pipes beside them. Each takes two descriptors;
/// where too few are left for all pipes, there are fewer pipes, and bytes are copied.
fn fitting(descriptors: usize, asked: usize) -> (usize, usize) {
    let pairs = descriptors / 2;
    let connections = asked.min((pairs / 3 * 2).max(pairs.saturating_sub(pipes::MOST)).max(1));
    (connections, connections.saturating_mul(2).min(pipes::MOST).min(pairs.saturating_sub(connections)))
}

/// Runs a forwarder until it is idle, told to stop, or fails. `passed` is what systemd passed, or the forwarder that this one takes
/// over from.
///
/// # Errors
/// Each with the exit code of [`crate::exit`].
pub fn run(
    options: &Forward,
    passed: Result<Vec<Passed>, Failure>,
    predecessor: Option<Predecessor>,
) -> anyhow::Result<()> {
    // A predecessor speaks for the service until this process has taken over.
    notify::mute(predecessor.is_some());
    let program = Program::own()?;
    let listeners = listen_fds::listeners(passed?, &options.listen)?;
    let (listeners, targets) = route(options, listeners)?;
    let healthy_without_container =
        options.ready == crate::service::readiness::Ready::Healthy && options.container.is_none();
    if healthy_without_container {
        anyhow::bail!(Failure::Usage("--ready=healthy needs --container, whose health check it is".into()));
    }
    if let Some(refusal) = targets.iter().find_map(|target| options.ready.refusal(target)) {
        bail!(Failure::Usage(refusal));
    }
    if options.accept_proxy && options.trusted.is_empty() {
        bail!(Failure::Usage(
            "--accept-proxy needs --trusted: who may say in a header who the client is, such as --trusted=10.0.0.5".into()
        ));
    }
    let local_clients = local_clients(options)?;
    let stats = Arc::new(Stats::new()?);
    let mut addresses = AddressBook::new(slot(targets.len(), 0))?;
    // Before the first thread.
    let private = predecessor.as_ref().map(Predecessor::descriptor);
    let settings = settings(options);
    let limit = waiting::Limit::new(options.connections_max, settings.connections_max);
    let (relay, channel) = process::start(
        &settings,
        &listeners,
        &targets,
        &mut addresses,
        &stats,
        private,
        logging::without_addresses,
    )?;
    // After the fork: the relay process may not have this either.
    let bequest = predecessor.as_ref().and_then(Predecessor::bequest);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let place = match (&options.container, options.pid, &options.netns) {
            (Some(name), _, _) => NetnsSource::Container(name.clone()),
            (_, Some(pid), _) => NetnsSource::Pid(pid),
            (_, _, Some(path)) => NetnsSource::Netns(path.clone()),
            _ => NetnsSource::Own,
        };
        let manager = RuntimeScope::choose(options.system, options.user);
        let source = Wanted { choice: options.source, clients: clients_namespace(&listeners) };
        let (unit, ready, identity) = (options.unit.clone(), options.ready.clone(), options.unix_identity);
        let activator = Arc::new(ServiceStarter::new(place, unit, manager, ready, source, identity));
        activator.check(&targets).await?;
        if options.idle.freeze {
            activator.check_freezing().await?;
            activator.thaw_what_was_left().await;
        }
        let engine = (relay, channel, addresses, stats);
        let mut control =
            Control::start(options, &listeners, targets, activator, engine, local_clients, bequest)?;
        control.replacing.program = Some(program);
        control.limit = limit;
        // A predecessor, if there is one, still listens there.
        if predecessor.is_none()
            && let Some(endpoint) = &options.metrics
        {
            control.metrics = Some(metrics::Server::start(endpoint)?);
        }
        control.run(predecessor).await
    })
}

/// What a finished wake reports.
type Woken = (usize, anyhow::Result<Awake>);

/// How far the exit has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Clients are welcome.
    Serving,
    /// The engine was asked whether it is idle.
    Leaving,
    /// No more clients; the present ones may finish until then.
    Draining(Instant),
}

/// The kernel relay, being loaded.
type Loading = tokio::sync::oneshot::Receiver<Result<Loaded, Unavailable>>;

/// Waits for the kernel relay to be loaded.
async fn loaded(loading: &mut Option<Loading>) -> Result<Loaded, Unavailable> {
    match loading {
        Some(loading) => {
            loading.await.unwrap_or_else(|_| Err(Unavailable::SelfTest("it did not end".into())))
        }
        None => Err(Unavailable::SelfTest("no thread to run it on".into())),
    }
}

/// Waits for a caller that asks; for ever where there is no socket to ask at.
async fn asked(server: &mut Option<control_socket::Server>) -> std::io::Result<Asked> {
    match server {
        Some(server) => server.asked().await,
        None => std::future::pending().await,
    }
}

/// Waits for a caller that wants metrics; for ever where they are not served.
async fn metrics_asked(server: &mut Option<metrics::Server>) -> Question {
    match server {
        Some(server) => server.asked().await,
        None => std::future::pending().await,
    }
}

/// Says how many sockets were left alone. The programs know no more than that they are not this user's.
fn left_alone(News { new, total }: News) {
    let sockets = if new == 1 { "socket" } else { "sockets" };
    tracing::warn!(
        foreign = new,
        foreign_total = total,
        "left {new} {sockets} of other users alone, at ports that forwarders of this user watch"
    );
}

/// Whether the kernel relay is available.
#[derive(Debug)]
enum KernelRelay {
    /// Not known yet.
    Loading,
    /// It is in the engine's hands.
    Loaded,
    /// It is not, and why.
    Unavailable(String),
}

/// Begins to load the kernel relay, where it may be used.
fn load_kernel_relay(options: &Forward, bequest: Option<Bequest>) -> Option<Loading> {
    if !matches!(options.relay, RelayChoice::Auto | RelayChoice::Sockmap) {
        return None;
    }
    let config = bro_sockmap::Config {
        connections: options.connections_max.unwrap_or(LANES),
        hook_blocking: options.blocking_sockets,
        bear_fionread: options.relay == RelayChoice::Sockmap,
        trace: bro_sockmap::trace_wanted(),
    };
    kernel_watch::load(config, bequest)
}

/// The cookie of the network namespace that all clients come to, if all use TCP and it is one namespace.
fn clients_namespace(listeners: &[(Listener, usize)]) -> Option<u64> {
    let mut cookies = listeners.iter().map(|(listener, _)| {
        let address = getsockname::<SockaddrStorage>(listener.socket.as_raw_fd()).ok()?;
        bro_relay::sockaddr::tcp(&address)?;
        bro_sockmap::netns_cookie(listener.socket.as_fd()).ok()
    });
    let first = cookies.next()??;
    cookies.all(|other| other == Some(first)).then_some(first)
}

/// What the command line decides for the engine.
fn settings(options: &Forward) -> Settings {
    let asked = options.connections_max.map(|most| most as usize);
    let (connections_max, pipes) = fitting(descriptors_for_connections(), asked.unwrap_or(usize::MAX));
    if let Some(asked) = asked.filter(|&asked| connections_max < asked) {
        tracing::warn!(
            "--connections-max={asked} is more than the limit on descriptors allows: {connections_max} at once (LimitNOFILE=)"
        );
    }
    Settings {
        connections_max,
        pipes,
        connections_per_source: options.connections_per_source,
        method: match options.relay {
            RelayChoice::Auto | RelayChoice::Sockmap | RelayChoice::Splice => Method::Splice,
            RelayChoice::Copy => Method::Copy,
        },
        keepalive: Keepalive::new(
            options.keepalive_time.or_forever(),
            options.keepalive_interval.or_forever(),
            options.keepalive_probes,
        ),
        user_timeout: options.user_timeout.finite(),
        binds: options.source != Choice::Loopback,
        idle_timeout: options.idle_timeout.finite(),
        proxy_protocol: options.proxy_protocol.map(Into::into),
        trusted: if options.accept_proxy { options.trusted.clone() } else { Vec::new() },
        wake_on_data: options.idle.wake_on == WakeOn::Data,
        idle_by_bytes: options.idle.exit_idle_time.finite().filter(|_| options.idle.counts_bytes()),
        idle_ignore: options.idle.idle_ignore.clone(),
        idle_below: options.idle.idle_below,
        wake_ignore: options.idle.wake_ignore.clone(),
        hold_limit: options.start_timeout.or_forever(),
        hold_refused: options.ready != crate::service::readiness::Ready::Unchecked,
    }
}

/// What the command line decides about how often the service is started.
fn wake_limits(options: &Forward) -> Limits {
    let idle = &options.idle;
    Limits {
        per_hour: idle.wakes_per_hour,
        idle_time: idle.exit_idle_time.or_forever(),
        most_idle_time: idle.exit_idle_time_max.or_forever(),
    }
}

/// The cgroup of the clients that `--local-clients` names.
fn local_clients(options: &Forward) -> anyhow::Result<Option<std::path::PathBuf>> {
    let below = match &options.local_clients {
        LocalClients::Off => return Ok(None),
        _ if !matches!(options.relay, RelayChoice::Auto | RelayChoice::Sockmap) => {
            bail!(Failure::Usage(
                "--local-clients is part of the kernel relay: use --relay=auto or sockmap with it".into()
            ))
        }
        LocalClients::On => Path::new("/"),
        LocalClients::Cgroup(path) => path,
    };
    let root = bro_proc::cgroup::mount_point().context("--local-clients needs cgroup v2")?;
    let path = if below.starts_with(&root) { below.to_owned() } else { root.join(below.strip_prefix("/")?) };
    if !path.is_dir() {
        bail!(Failure::Usage(format!("--local-clients: there is no cgroup {}", below.display())));
    }
    Ok(Some(path))
}

struct Control<'a> {
    options: &'a Forward,
    /// Name, address and target of each listener.
    listeners: Vec<(String, String, String)>,
    started: Instant,
    control: Option<control_socket::Server>,
    targets: Vec<Target>,
    /// How each target has seen its clients since it was last woken.
    seen: HashMap<String, String>,
    activator: Arc<ServiceStarter>,
    stats: Arc<Stats>,
    engine: Arc<Handle>,
    kernel: KernelRelay,
    /// The kernel relay, while it is being loaded.
    loading: Option<Loading>,
    /// What the programs watch.
    watching: Arc<Watching>,
    /// The sockets that they left alone.
    foreign: Option<Foreign>,
    local_clients: Option<std::path::PathBuf>,
    events: UnboundedReceiver<Event>,
    relay: Process,
    /// The addresses it may connect to.
    addresses: AddressBook,
    woken: (UnboundedSender<Woken>, UnboundedReceiver<Woken>),
    /// The tasks of these wakes.
    wakes: JoinSet<()>,
    /// For each target.
    refusals: Vec<wake::Refusals>,
    /// For each target: where it was found, which is watched.
    watched: Vec<Weak<ContainerNetns>>,
    /// Targets that have lost their namespace.
    gone: (UnboundedSender<usize>, UnboundedReceiver<usize>),
    /// For each target.
    wakefulness: Vec<Wakefulness>,
    /// Since when a target has been awake, on the monotonic clock and on the wall clock.
    awake_since: Option<(Instant, SystemTime)>,
    /// When a target was woken last; before that, when the forwarder started.
    woken_at: Instant,
    /// No client was there any more when a long start had succeeded: the service is kept for their return, until then.
    kept_until: Instant,
    /// What woke it last.
    woken_by: Option<String>,
    /// Wakes that failed.
    failures: Failures,
    /// What this side of the forwarder has counted.
    counts: Counts,
    /// Where the counts are kept for later forwarders.
    ledger: Ledger,
    /// `--metrics`
    metrics: Option<metrics::Server>,
    /// The callers that wait until it is awake.
    wakers: Vec<Asker>,
    /// The caller that told it to sleep, and whether by force.
    sleeper: Option<(bool, Asker)>,
    busy: sleep::Busy,
    /// Answers to the question what is busy.
    said_busy: (UnboundedSender<Option<String>>, UnboundedReceiver<Option<String>>),
    /// Whether the service runs, for clients that wake nothing.
    knocked: (UnboundedSender<wake::Knocked>, UnboundedReceiver<wake::Knocked>),
    phase: Phase,
    limit: waiting::Limit,
    /// For each target, while systemd is asked: the clients to turn away if the service does not run.
    turned: Vec<Option<wake::Turned>>,
    frost: freeze::Frost,
    /// When the service was last frozen.
    frozen_at: Option<SystemTime>,
    /// It cannot be frozen, or must not be.
    freezing_failed: bool,
    /// systemd's results.
    frosted: (UnboundedSender<freeze::Done>, UnboundedReceiver<freeze::Done>),
    /// How often the service is started.
    history: Arc<Wakes>,
    /// The log has said that it was started too often.
    too_many_said: bool,
    replacing: reload::Replacing<'a>,
    failure: Option<anyhow::Error>,
}

impl<'a> Control<'a> {
    fn start(
        options: &'a Forward,
        listeners: &'a [(Listener, usize)],
        targets: Vec<Target>,
        activator: Arc<ServiceStarter>,
        (relay, channel, addresses, stats): (Process, OwnedFd, AddressBook, Arc<Stats>),
        local_clients: Option<std::path::PathBuf>,
        bequest: Option<Bequest>,
    ) -> anyhow::Result<Self> {
        let described = listeners.iter().map(|(listener, target)| {
            (listener.name.clone(), listener.address.clone(), targets[*target].to_string())
        });
        let described = described.collect();
        let (handle, events) = Handle::new(channel)?;
        let handle = Arc::new(handle);
        let watching = Arc::new(Watching::new(handle.clone()));
        let history = Arc::new(Wakes::of(options.unit.as_deref(), wake_limits(options)));
        activator.count_starts(history.clone());
        let loading = load_kernel_relay(options, bequest);
        if loading.is_some() {
            activator.watch_through(watching.clone());
        }
        Ok(Self {
            options,
            listeners: described,
            started: Instant::now(),
            control: control_socket::Server::start_or_warn(),
            wakefulness: targets.iter().map(|_| Wakefulness::Asleep).collect(),
            wakes: JoinSet::new(),
            refusals: vec![wake::Refusals::default(); targets.len()],
            watched: targets.iter().map(|_| Weak::new()).collect(),
            awake_since: None,
            woken_at: Instant::now(),
            kept_until: Instant::now(),
            woken_by: None,
            failures: Failures::of(options.unit.as_deref(), &targets),
            counts: Counts::default(),
            ledger: Ledger::of(options.unit.as_deref()),
            metrics: None,
            wakers: Vec::new(),
            sleeper: None,
            busy: sleep::Busy::default(),
            said_busy: unbounded_channel(),
            knocked: unbounded_channel(),
            targets,
            seen: HashMap::new(),
            activator,
            stats,
            engine: handle,
            kernel: KernelRelay::Loading,
            loading,
            watching,
            foreign: None,
            local_clients,
            events,
            relay,
            addresses,
            woken: unbounded_channel(),
            gone: unbounded_channel(),
            phase: Phase::Serving,
            limit: waiting::Limit::new(None, usize::MAX),
            turned: vec![None; listeners.iter().map(|(_, target)| target + 1).max().unwrap_or(0)],
            frost: freeze::Frost::None,
            frozen_at: None,
            freezing_failed: false,
            frosted: unbounded_channel(),
            history,
            too_many_said: false,
            replacing: reload::Replacing::new(listeners),
            failure: None,
        })
    }

    async fn run(mut self, predecessor: Option<Predecessor>) -> anyhow::Result<()> {
        let mut hang_up = signal(SignalKind::hangup())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let watchdog = notify::watchdog_interval();
        let mut watch = tokio::time::interval(watchdog.unwrap_or(Duration::from_secs(3600)));
        let mut status = tokio::time::interval(STATUS_STEP);
        let mut extend = tokio::time::interval(EXTEND_EVERY);
        // Only a forwarder that insists on the kernel relay waits for it.
        if self.options.relay == RelayChoice::Sockmap {
            let loaded = tokio::select! {
                loaded = loaded(&mut self.loading) => loaded,
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
            };
            self.kernel_loaded(loaded).await?;
        }
        // The thread that has loaded the programs attaches them; this one never needs the rights for that.
        bro_sockmap::capabilities::drop_the_kernel_relays(self.shows_clients());
        // Not before: if the demanded relay cannot be had, one sentence is all.
        for (name, address, target) in &self.listeners {
            tracing::info!(socket = %name, %address, %target, "listening");
        }
        self.engine.send(Plain::Start);
        let mut said = self.status();
        match predecessor {
            Some(predecessor) => self.take_over_from(predecessor),
            None => notify::ready(&said),
        }
        loop {
            let idle_at = self.idle_deadline();
            let impatient_at = self.impatience();
            let draining_until = if let Phase::Draining(until) = self.phase { Some(until) } else { None };
            tokio::select! {
                event = self.events.recv() => match event {
                    None => {
                        // However it ends, it was not told to.
                        let ended = "the relay process has ended by itself, and with it every connection";
                        let _first = self.failure.get_or_insert_with(|| anyhow!(ended));
                        break;
                    }
                    // A successor that is replaced in turn waits for its own predecessor, so that the last one knows of them all;
                    // and no process leaves a successor behind that the service manager does not know of.
                    Some(Event::Drained) if self.replacing.stands_in_the_way() => self.replacing.drained = true,
                    Some(Event::Drained) => break,
                    Some(Event::Leaving(true)) => {
                        self.leaves().await;
                        break;
                    }
                    Some(event) => self.event(event),
                },
                Some((backend, result)) = self.woken.1.recv() => self.woken(backend, result),
                Some(backend) = self.gone.1.recv() => self.gone(backend),
                Some(who) = self.said_busy.1.recv() => self.busy(who),
                Some(done) = self.frosted.1.recv() => self.frost_done(done),
                Some(knocked) = self.knocked.1.recv() => self.knocked(knocked),
                _ = terminate.recv() => self.terminate(),
                _ = interrupt.recv() => self.terminate(),
                _ = hang_up.recv() => self.begin_replacement().await,
                Some(news) = self.replacing.news() => {
                    self.replacement(news).await;
                    if self.replacing.drained && !self.replacing.stands_in_the_way() {
                        break;
                    }
                }
                () = sleep_until(idle_at.unwrap_or_else(Instant::now)), if idle_at.is_some() => {
                    // The deadline may have moved while it was waited for; the engine has the last word.
                    if self.idle_deadline().is_some_and(|deadline| deadline <= Instant::now()) {
                        self.idle_time_is_over();
                    }
                }
                () = sleep_until(impatient_at.unwrap_or_else(Instant::now)), if impatient_at.is_some() => self.loses_patience(),
                () = sleep_until(draining_until.unwrap_or_else(Instant::now)), if draining_until.is_some() => {
                    self.engine.send(Plain::EndAll(End::DrainTimeout));
                    // Another process may have to be waited for still.
                    self.phase = Phase::Draining(Instant::now() + STATUS_STEP);
                }
                _ = extend.tick(), if draining_until.is_some() => notify::extend(EXTEND_BY),
                loaded = loaded(&mut self.loading), if self.loading.is_some() => self.kernel_loaded(loaded).await?,
                asked = asked(&mut self.control) => self.asked(asked),
                question = metrics_asked(&mut self.metrics) => self.tell_metrics(question),
                _ = watch.tick(), if watchdog.is_some() => self.engine.send(Plain::Ping),
                _ = status.tick() => {
                    self.replacing.tell(&self.stats);
                    if matches!(self.phase, Phase::Draining(_)) {
                        self.give_up_where_in_the_way();
                        self.keep_counts().await;
                    }
                    self.give_up_on_slow_starts();
                    if self.ledger.is_due(Stats::get(&self.stats.accepted), Stats::get(&self.stats.open)) {
                        self.keep_counts().await;
                    }
                    if self.phase == Phase::Serving {
                        self.limit.look(Stats::get(&self.stats.open), self.replacing.listeners());
                    }
                    if let Some(news) = self.foreign.as_mut().and_then(|foreign| foreign.news(std::time::Instant::now())) {
                        left_alone(news);
                    }
                    let now = self.status();
                    if now != said {
                        notify::status(&now);
                        said = now;
                    }
                }
            }
        }
        if matches!(self.phase, Phase::Draining(_)) {
            // A service that was woken only now may not be noted yet, and would never be put to sleep.
            drop(tokio::time::timeout(REMEMBER, self.activator.note_run()).await);
        }
        if self.is_frozen() && !self.replacing.is_replaced() {
            // No other process would have it go on.
            drop(tokio::time::timeout(REMEMBER, self.activator.thaw()).await);
        }
        if let Some(news) = self.foreign.as_ref().and_then(Foreign::rest) {
            left_alone(news);
        }
        self.keep_counts().await;
        self.engine.send(Plain::Stop);
        // The command goes out during this wait.
        let relay = self.relay;
        let ended = tokio::task::spawn_blocking(move || relay.wait()).await;
        ended.unwrap_or_else(|error| Err(error.into()))?;
        self.failure.map_or(Ok(()), Err)
    }

    /// Whether agents may have to show the service clients' own addresses.
    fn shows_clients(&self) -> bool {
        matches!(self.options.source, Choice::Auto | Choice::Client)
    }

    fn status(&self) -> String {
        let (open, held) = (Stats::get(&self.stats.open), Stats::get(&self.stats.held));
        let served = Stats::get(&self.stats.accepted);
        let plural = |count: u64| if count == 1 { "" } else { "s" };
        let said = match self.phase {
            Phase::Draining(_) => format!("Draining: {open} connection{} left", plural(open)),
            _ if self.is_frozen() => "Frozen: the next client has the service go on".into(),
            _ if self.who_is_busy().is_some() => {
                format!("Idle, but busy: {}", self.who_is_busy().unwrap_or_default())
            }
            _ if held > 0 || self.being_woken().is_some() => {
                let waiting = if held == 0 { "no".into() } else { held.to_string() };
                format!(
                    "Starting the service{}{waiting} client{} waiting",
                    self.how_far(),
                    plural(held.max(1))
                )
            }
            _ => format!("{open} connection{} now, {served} since the start", plural(open)),
        };
        let said = match self.limit.waiting().filter(|_| self.phase == Phase::Serving) {
            Some(waiting) => format!("{said}; {waiting}"),
            None => said,
        };
        let said = match self.history.remark() {
            Some(remark) => format!("{said}; {remark}"),
            None => said,
        };
        match self.replacing.predecessor() {
            Some(predecessor) => format!("{said}; {predecessor}"),
            None => said,
        }
    }

    /// Hands the kernel relay to the engine, or says why there is none.
    async fn kernel_loaded(&mut self, loaded: Result<Loaded, Unavailable>) -> anyhow::Result<()> {
        self.loading = None;
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
                self.kernel = KernelRelay::Loaded;
                self.foreign = Foreign::of(&loaded.descriptors).ok();
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

    fn asked(&mut self, asked: std::io::Result<Asked>) {
        match asked {
            Ok(Asked { request: Request::Status, to }) => self.report(to),
            Ok(Asked { request: Request::Wake, to }) => self.told_to_wake(to),
            Ok(Asked { request: Request::Sleep { force }, to }) => self.told_to_sleep(force, to),
            Err(error) => {
                tracing::warn!(%error, "nobody can ask this forwarder any more");
                self.control = None;
            }
        }
    }

    /// Answers a caller that asked for the status, in the background.
    fn report(&self, asker: Asker) {
        let report = self.reporting();
        let answering = async move {
            if let Some(report) = report.await {
                asker.answer(report);
            }
        };
        drop(tokio::spawn(answering));
    }

    /// The report, once the engine has given its figures.
    fn reporting(&self) -> impl Future<Output = Option<status::Report>> + use<> {
        let mut report = status::Report {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            unit: self.options.unit.clone(),
            manager: Some(RuntimeScope::choose(self.options.system, self.options.user)),
            uptime_s: self.started.elapsed().as_secs(),
            state: self.status(),
            activity: self.activity(),
            failed_wake: self.failures.last().cloned(),
            rhythm: self.history.rhythm().map(Box::new),
            service: own_unit::own_unit(),
            peers: Vec::new(),
            waiting: self.limit.waiting().cloned(),
            predecessor: self.replacing.predecessor().cloned(),
            relay: self.relay(),
            listeners: Vec::new(),
            total: Tally::default(),
            own: self.ledger.own(self.counts.clone()),
        };
        let (listeners, seen) = (self.listeners.clone(), self.seen.clone());
        let figures = self.engine.report();
        async move {
            let figures = figures.await.ok()?;
            report.peers = figures.peers;
            let names = listeners.iter().map(|(name, ..)| name.as_str());
            report.own.counts = report.own.counts.with(names.zip(&figures.tallies));
            for ((name, address, target), tally) in listeners.into_iter().zip(figures.tallies) {
                report.total += &tally;
                let seen = seen.get(&target).cloned();
                report.listeners.push(status::ListenerReport { name, address, target, seen, tally });
            }
            Some(report)
        }
    }

    /// Answers a caller that wants metrics, in the background.
    fn tell_metrics(&self, to: Question) {
        let report = self.reporting();
        let answering = async move {
            // A caller that does not wait for it any more has closed the connection.
            match report.await.map(metrics::of_forwarder) {
                Some(Ok(text)) => drop(to.send(text)),
                Some(Err(error)) => tracing::error!("metrics cannot be written: {error:#}"),
                None => {}
            }
        };
        drop(tokio::spawn(answering));
    }

    /// Keeps what was counted so far for later forwarders.
    async fn keep_counts(&mut self) {
        if !self.ledger.keeps() {
            return;
        }
        // A relay process that has ended by itself reports no more.
        let Ok(Ok(figures)) = tokio::time::timeout(STATUS_STEP, self.engine.report()).await else { return };
        let names = self.listeners.iter().map(|(name, ..)| name.as_str());
        self.ledger.keep(self.counts.with(names.zip(&figures.tallies)));
    }

    /// Whether the service is awake, since when, and why.
    fn activity(&self) -> status::Activity {
        let state = match self.phase {
            Phase::Draining(_) => status::ServiceState::Stopping,
            _ if self.is_frozen() => status::ServiceState::Frozen,
            _ if self.awake_since.is_some() && self.who_is_busy().is_some() => status::ServiceState::Busy,
            _ if self.awake_since.is_some() => status::ServiceState::Awake,
            _ if self.being_woken().is_some() => status::ServiceState::Starting,
            Phase::Serving | Phase::Leaving => status::ServiceState::Asleep,
        };
        let is_starting = state == status::ServiceState::Starting;
        let woken =
            self.being_woken().filter(|_| is_starting).map(|since| SystemTime::now() - since.elapsed());
        let woken = woken.or(self.frozen_at.filter(|_| self.is_frozen()));
        let since = woken.or_else(|| self.awake_since.map(|(_, since)| since));
        let since = since.and_then(|since| since.duration_since(SystemTime::UNIX_EPOCH).ok());
        let woken_by = self.woken_by.clone().filter(|_| state != status::ServiceState::Asleep);
        let doing = Some(self.activator.progress().doing).filter(|doing| is_starting && !doing.is_empty());
        status::Activity { state, since: since.map(|since| since.as_secs()), woken_by, doing }
    }

    fn relay(&self) -> status::Relay {
        let (name, reason) = match (&self.kernel, self.options.relay) {
            (_, RelayChoice::Copy) => ("copy", Some("asked for with --relay=copy".to_owned())),
            (_, RelayChoice::Splice) => ("splice", Some("asked for with --relay=splice".to_owned())),
            (KernelRelay::Loading, _) => ("splice", Some("the kernel relay is being loaded".to_owned())),
            (KernelRelay::Unavailable(reason), _) => ("splice", Some(reason.clone())),
            (KernelRelay::Loaded, _) => ("sockmap", None),
        };
        status::Relay { name: name.into(), reason }
    }

    fn event(&mut self, event: Event) {
        match event {
            // The relay process is not trusted: neither with a target's number, nor to ask only once.
            Event::Wake { backend, peer, source, refused } => match self.wakefulness.get(backend) {
                Some(Wakefulness::Waking(waking)) if waking.until.is_some() => {
                    tracing::debug!(backend, "woken already");
                }
                Some(Wakefulness::Waking(_)) => self.wait_again(backend, &peer),
                Some(Wakefulness::Asleep) if source.is_some() && self.history.too_many().is_some() => {
                    self.looks_before_refusing(backend, peer);
                }
                Some(_) => {
                    if !refused && self.is_asleep() {
                        self.found_asleep(source.as_deref());
                    }
                    self.wake(backend, &peer, refused);
                }
                None => tracing::error!(backend, "the relay process wants a target woken that there is not"),
            },
            Event::Knock { backend, peer } => self.knocked_for(backend, peer),
            Event::Frozen(frozen) => self.engine_froze(frozen),
            Event::Thaw { peer } => self.thaw_for(peer),
            Event::Leaving(_) => self.stays(),
            Event::Draining(why) => self.draining(&why),
            Event::Pong => notify::alive(),
            Event::Listening { netns, port } => {
                tracing::debug!(netns, port, "the kernel says that somebody listens");
                self.activator.heard();
            }
            // Answers, which the handle has already taken.
            Event::Drained | Event::Watching { .. } | Event::Tallies(_) | Event::Peers(_) => {}
        }
    }

    fn terminate(&mut self) {
        if self.replacing.is_replaced() {
            // The successor does not have this process's connections.
            return self.told_to_stop_although_replaced();
        }
        if matches!(self.phase, Phase::Draining(_)) {
            tracing::warn!("told twice to stop: ending every connection now");
            self.engine.send(Plain::EndAll(End::Shutdown));
            return self.replacing.stop_successor(Duration::ZERO);
        }
        self.begin_drain("Told to stop");
    }

    fn begin_drain(&mut self, why: &'static str) {
        let limit = self.options.drain_timeout.or_forever();
        self.phase = Phase::Draining(Instant::now() + limit);
        // These clients have not asked for anything, and they would hold the drain for its whole time.
        self.engine.send(Plain::EndSilent);
        self.engine.send(Plain::Drain(why.into()));
        self.replacing.stop_successor(limit);
    }

    /// The engine accepts no more. Said only now: a reader of STOPPING=1 may rely on it.
    fn draining(&self, why: &str) {
        let limit = self.options.drain_timeout.or_forever();
        let open = Stats::get(&self.stats.open);
        tracing::info!(open, "{why}: no more clients are accepted, those there are may finish");
        // A successor now speaks for the service: then this is muted.
        notify::stopping(&self.status(), EXTEND_BY.min(limit + Duration::from_secs(5)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_for_their_pipes() {
        for descriptors in (0..3000).chain([65_536, 524_288]) {
            for asked in [1, 2, 256, 1000, 100_000] {
                let (connections, pipes) = fitting(descriptors, asked);
                assert!((1..=asked).contains(&connections), "{descriptors} {asked}");
                assert!(descriptors < 4 || 2 * (connections + pipes) <= descriptors, "{descriptors} {asked}");
                assert!(pipes <= 2 * connections && (pipes > 0 || descriptors < 8), "{descriptors} {asked}");
            }
        }
        assert_eq!(fitting(524_160, 256), (256, 256));
        assert_eq!(fitting(896, 256), (256, 192));
        assert_eq!(fitting(172, 1000), (56, 30));
    }
}
