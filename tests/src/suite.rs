//! The one suite of relay behaviours, and what it is run over: every relay ([`Lane`]) with every kind of connection ([`Legs`]).
//!
//! A further relay joins as a variant of [`Lane`] and one line with [`relay_suite!`](crate::relay_suite).

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result, ensure};
use bro_ebpf::role;

use crate::forwarder::{Forwarder, Setup};
use crate::log::Closing;
use crate::netns::Namespace;
use crate::peers::{Address, Conn, Family, Here, Listener, PATIENCE, is_abort};
use crate::process;
use crate::programs::{Flapping, Programs};
use crate::scene::expect_relayed;
use crate::scratch::Scratch;
use crate::tier::Need;

/// What carries the bytes between client and service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// No forwarder: the client stands in the service's namespace. Shows that what the suite asks for is what a plain
    /// connection does, so that a failure over a relay is the relay's.
    Direct,
    /// splice(2).
    Splice,
    /// recv and send.
    Copy,
    /// The kernel relay for what the service sends; splice(2) for the other direction.
    ServiceLane,
    /// The kernel relay both ways: the suite's clients are on this host.
    BothLanes,
    /// The same, with the lanes forced open and shut at random all the time.
    FlappingLanes,
}

impl Lane {
    /// The arguments of `bro forward` that choose it; `None` without a forwarder.
    #[must_use]
    pub const fn arguments(self) -> Option<&'static [&'static str]> {
        match self {
            Self::Direct => None,
            Self::Splice => Some(&["--relay=splice"]),
            Self::Copy => Some(&["--relay=copy"]),
            Self::ServiceLane => Some(&["--relay=sockmap"]),
            Self::BothLanes | Self::FlappingLanes => Some(&["--relay=sockmap", "--local-clients=on"]),
        }
    }

    /// Through the kernel's lanes.
    #[must_use]
    pub const fn is_kernel(self) -> bool {
        matches!(self, Self::ServiceLane | Self::BothLanes | Self::FlappingLanes)
    }

    /// What may stand in the closing line's `relay=`: the kernel relay is named for connections that it moved bytes of.
    #[must_use]
    pub const fn words(self) -> &'static [&'static str] {
        match self {
            Self::Direct => &[],
            Self::Splice => &["splice"],
            Self::Copy => &["copy"],
            Self::ServiceLane | Self::BothLanes | Self::FlappingLanes => &["sockmap", "splice"],
        }
    }

    /// What the machine must have for it.
    #[must_use]
    pub fn needs(self) -> Vec<Need> {
        if self.is_kernel() { vec![Need::Root, Need::Bpf] } else { namespace_needs() }
    }
}

/// What it takes to make a network namespace: an ordinary user needs user namespaces.
#[must_use]
pub fn namespace_needs() -> Vec<Need> {
    if nix::unistd::geteuid().is_root() { vec![Need::Root] } else { vec![Need::UserNamespaces] }
}

/// What a forwarded connection is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Legs {
    /// Between client and forwarder.
    pub front: Family,
    /// Between forwarder and service.
    pub back: Family,
}

impl Legs {
    /// TCP over IPv4 on both sides.
    pub const TCP4: Self = Self { front: Family::Tcp4, back: Family::Tcp4 };
    /// TCP over IPv6 on both sides.
    pub const TCP6: Self = Self { front: Family::Tcp6, back: Family::Tcp6 };
    /// Unix streams on both sides.
    pub const UNIX: Self = Self { front: Family::Unix, back: Family::Unix };
    /// A TCP client, a service on a unix socket.
    pub const TCP_TO_UNIX: Self = Self { front: Family::Tcp4, back: Family::Unix };
    /// A unix client, a service on TCP.
    pub const UNIX_TO_TCP: Self = Self { front: Family::Unix, back: Family::Tcp4 };
    /// Over vsock, to a service on TCP.
    pub const VSOCK_TO_TCP: Self = Self { front: Family::Vsock, back: Family::Tcp4 };
    /// Over vsock, to a service on a unix socket.
    pub const VSOCK_TO_UNIX: Self = Self { front: Family::Vsock, back: Family::Unix };
    /// Without a forwarder between them: no service is connected to over vsock.
    pub const VSOCK: Self = Self { front: Family::Vsock, back: Family::Vsock };

    /// TCP all the way: the only kind on which an abort can be told from an end.
    #[must_use]
    pub const fn tell_aborts(self) -> bool {
        self.front.is_tcp() && self.back.is_tcp()
    }
}

/// A service that listens in a namespace, a forwarder towards it, and the address a client connects to.
#[derive(Debug)]
pub struct Rig {
    /// The relay.
    pub lane: Lane,
    /// The kinds of connection.
    pub legs: Legs,
    // Before what it uses, so that it ends first.
    forwarder: Option<Forwarder>,
    front: Option<Listener>,
    service: Listener,
    namespace: Namespace,
    connected: AtomicUsize,
    warm_up: Option<Closing>,
    flapping: Option<Flapping>,
    introduced: bool,
    _scratch: Scratch,
}

/// The client that a balancer in front speaks of, in a [`Rig`] that has one.
pub const INTRODUCED: &str = "198.51.100.7:4711";

/// What the balancer sends first.
const INTRODUCTION: &[u8] = b"PROXY TCP4 198.51.100.7 203.0.113.1 4711 443\r\n";

/// What the service hears first.
const HEARD: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc6\x33\x64\x07\xcb\0\x71\x01\x12\x67\x01\xbb";

impl Rig {
    /// The usual one.
    pub fn new(lane: Lane, legs: Legs) -> Result<Self> {
        Self::with(lane, legs, |setup| setup)
    }

    /// One whose clients are balancers that introduce a client each, to a service that wants to be told.
    pub fn introduced(lane: Lane, legs: Legs) -> Result<Self> {
        let options = ["--accept-proxy", "--trusted=127.0.0.0/8,::1,unix", "--proxy-protocol=v2"];
        Self::build(lane, legs, |setup| setup.args(options), true)
    }

    /// One whose forwarder has further settings.
    pub fn with(lane: Lane, legs: Legs, adjust: impl FnOnce(Setup) -> Setup) -> Result<Self> {
        Self::build(lane, legs, adjust, false)
    }

    fn build(lane: Lane, legs: Legs, adjust: impl FnOnce(Setup) -> Setup, introduced: bool) -> Result<Self> {
        let scratch = Scratch::new()?;
        let namespace = Namespace::new()?;
        let at = |family: Family, name: &str| {
            family.loopback().unwrap_or_else(|| Address::Unix(scratch.join(name)))
        };
        let service = Listener::new(&namespace, &at(legs.back, "service"))?;
        let (mut front, mut forwarder) = (None, None);
        if let Some(arguments) = lane.arguments() {
            let listener = Listener::new(&Here, &at(legs.front, "front"))?;
            let setup = Setup::new().args(arguments.iter().copied()).netns(&namespace).socket(&listener);
            let setup = adjust(setup).arg(service.address().to_string());
            forwarder = Some(setup.start()?);
            front = Some(listener);
        }
        let connected = AtomicUsize::new(0);
        let (warm_up, flapping) = (None, None);
        let mut rig = Self {
            lane,
            legs,
            forwarder,
            front,
            service,
            namespace,
            connected,
            warm_up,
            flapping,
            introduced,
            _scratch: scratch,
        };
        if lane.is_kernel() {
            rig.warm_up()?;
        }
        Ok(rig)
    }

    /// Waits for the kernel relay, and for the end of a first connection, which woke the service.
    fn warm_up(&mut self) -> Result<()> {
        let forwarder = self.forwarder.as_ref().context("the lane has one")?;
        let programs = forwarder.kernel_relay()?;
        let (client, service) = self.pair()?;
        expect_relayed(&client, &service)?;
        if self.legs.back.is_tcp() {
            let watched =
                || programs.watched().is_ok_and(|all| all.iter().any(|watch| watch.role == role::SERVICE));
            ensure!(process::eventually(PATIENCE, watched), "no program watches: {:?}", programs.watched());
        }
        drop((client, service));
        self.warm_up = Some(forwarder.closing()?);
        forwarder.log().forget();
        self.connected = AtomicUsize::new(0);
        if self.lane == Lane::FlappingLanes {
            self.flapping = Some(programs.records()?.flap(0xf1a9));
        }
        Ok(())
    }

    /// The first connection, which woke the service, was made before the behaviour began.
    #[must_use]
    pub const fn is_warm(&self) -> bool {
        self.warm_up.is_some() || self.forwarder.is_none()
    }

    /// The forwarder, if the lane has one.
    #[must_use]
    pub const fn forwarder(&self) -> Option<&Forwarder> {
        self.forwarder.as_ref()
    }

    /// The service's listening socket.
    #[must_use]
    pub const fn service(&self) -> &Listener {
        &self.service
    }

    /// A client's connection.
    pub fn connect(&self) -> Result<Conn> {
        let conn = match &self.front {
            Some(front) => Conn::new(&Here, front.address()),
            None => Conn::new(&self.namespace, self.service.address()),
        }?;
        self.connected.fetch_add(1, Ordering::Relaxed);
        if self.introduced {
            conn.send(INTRODUCTION)?;
        }
        Ok(conn)
    }

    /// Do its clients come through a balancer?
    #[must_use]
    pub const fn is_introduced(&self) -> bool {
        self.introduced
    }

    /// The service's end of the next connection, from the client's first byte on.
    pub fn accept(&self) -> Result<Conn> {
        let conn = self.service.accept()?;
        if self.introduced {
            let mut heard = [0; HEARD.len()];
            match conn.recv_exact(&mut heard) {
                Ok(()) => ensure!(heard == HEARD, "the service heard {heard:?}"),
                // A client's abort throws away what has not been read.
                Err(error) if error.downcast_ref().is_some_and(is_abort) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(conn)
    }

    /// A connection's two ends: the client's and the service's.
    pub fn pair(&self) -> Result<(Conn, Conn)> {
        let client = self.connect()?;
        let service = self.accept().context("the service waits for the client's connection")?;
        Ok((client, service))
    }

    /// Ends the forwarder, and checks what must hold after any behaviour: it exits well, nothing has panicked, and each
    /// client has exactly one closing line, which names the relay.
    pub fn finish(mut self) -> Result<()> {
        let Some(forwarder) = self.forwarder.take() else { return Ok(()) };
        let clients = self.connected.load(Ordering::Relaxed);
        forwarder.closings(clients)?;
        let total = forwarder.report()?.total;
        let left = if self.lane.is_kernel() { Some(Programs::of(forwarder.pid())?) } else { None };
        if let Some(programs) = &left {
            programs.expect_nothing_in_use()?;
        }
        let changes = self.flapping.take().map(Flapping::stop);
        let log = forwarder.stop()?;
        let closings = log.closings(clients, std::time::Duration::ZERO)?;
        ensure!(closings.len() == clients, "{} closing lines for {clients} clients", closings.len());
        for closing in &closings {
            // A unix client that came before the forwarder may have sent descriptors, so what it sent first was looked at. What comes
            // over vsock is copied.
            let first = matches!(self.legs.front, Family::Unix | Family::Vsock) && closing.relay == "copy";
            let fits = first || self.lane.words().contains(&closing.relay.as_str());
            ensure!(fits, "relayed by {:?}: {closing:?}", closing.relay);
        }
        let all = || closings.iter().chain(&self.warm_up);
        let (up, down) = (all().map(|c| c.to_service).sum::<u64>(), all().map(|c| c.to_client).sum::<u64>());
        let counted = total.kernel + total.spliced + total.copied;
        // While a connection is being aborted its sender may still send, so one of the two may be a little later.
        let exact = all().all(|closing| closing.reason == "eof");
        ensure!(
            counted == up + down || !exact,
            "the closing lines tell of {up} and {down} bytes, the status of {total:?}"
        );
        if let Some(programs) = left {
            println!("lanes: {total:?}; {changes:?} changes; {up} up, {down} down");
            programs.expect_gone()?;
        }
        Ok(())
    }
}

/// Runs one behaviour over one lane and one kind of connection, if the machine has what that needs.
pub fn run(lane: Lane, legs: Legs, behaviour: fn(&Rig) -> Result<()>) -> Result<()> {
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    if !crate::tier::met(&name, &lane.needs()) {
        return Ok(());
    }
    let rig = Rig::new(lane, legs)?;
    behaviour(&rig)?;
    rig.finish()
}

/// The same, with a balancer in front and a service that wants to be told.
pub fn run_introduced(lane: Lane, legs: Legs, behaviour: fn(&Rig) -> Result<()>) -> Result<()> {
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    if !crate::tier::met(&name, &lane.needs()) {
        return Ok(());
    }
    let rig = Rig::introduced(lane, legs)?;
    behaviour(&rig)?;
    rig.finish()
}

/// The whole suite over one lane: a module of tests for each kind of connection.
#[macro_export]
macro_rules! relay_suite {
    ($lane:ident) => {
        $crate::relay_suite!($lane over tcp [tcp4: TCP4, tcp6: TCP6] and
            others [unix: UNIX, tcp_to_unix: TCP_TO_UNIX, unix_to_tcp: UNIX_TO_TCP]);
    };
    ($lane:ident over tcp [$($tcp:ident: $tcp_legs:ident),*] and others [$($other:ident: $other_legs:ident),*]) => {
        $(mod $tcp {
            $crate::relay_suite!(@common $lane $tcp_legs);
            $crate::relay_suite!(@tests $lane $tcp_legs
                urgent_byte_arrives_in_its_place,
                urgent_byte_in_mid_stream,
            );
        })*
        $(mod $other {
            $crate::relay_suite!(@common $lane $other_legs);
        })*
    };
    (@common $lane:ident $legs:ident) => { $crate::relay_behaviours!(relay_suite @tests $lane $legs); };
    (@tests $lane:ident $legs:ident $($behaviour:ident,)+) => {
        $(#[test]
        fn $behaviour() -> anyhow::Result<()> {
            use $crate::suite::{Lane, Legs, run};
            run(Lane::$lane, Legs::$legs, $crate::behaviours::$behaviour)
        })+
    };
    (@list $($behaviour:ident,)+) => { [$((stringify!($behaviour), $crate::behaviours::$behaviour as fn(&$crate::suite::Rig) -> anyhow::Result<()>)),+] };
}

/// What every kind of connection is to do, handed to a macro.
#[macro_export]
macro_rules! relay_behaviours {
    ($then:ident $($before:tt)*) => {
        $crate::$then!($($before)*
            both_ends_at_once,
            answer_after_the_clients_half_close,
            service_closes_first,
            service_half_closes_first_and_reads_on,
            nothing_is_sent_at_all,
            client_closes_with_bytes_still_under_way,
            client_leaves_in_mid_download,
            client_abort_is_seen_as_an_abort,
            service_abort_is_seen_as_an_abort,
            client_abort_after_its_half_close,
            client_abort_after_a_half_close_that_came_first,
            service_abort_after_its_half_close,
            client_abort_under_back_pressure,
            service_abort_under_back_pressure,
            client_that_never_reads_then_reads_everything,
            service_that_never_reads_then_reads_everything,
            no_side_reads_in_either_direction,
            early_answer_arrives_whole,
            early_answer_reaches_a_client_that_still_sends,
            all_that_a_service_sent_before_its_reset_arrives,
            all_that_a_client_sent_before_its_reset_arrives,
            an_end_before_a_reset_is_an_end,
            a_reset_behind_full_queues,
            closing_line_of_a_reset_counts_what_came_before,
            one_byte_at_a_time,
            small_writes_are_not_delayed,
            megabytes_with_pauses,
            mixed_torture,
            idle_connections_cost_little,
            descriptors_return_to_the_start,
            closing_line_counts_every_byte,
        );
    };
}
