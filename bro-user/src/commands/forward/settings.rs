//! What the command line decides, for the parts that need it: the engine, the kernel relay, the service's starter.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use bro_relay::engine::Settings;
use bro_relay::engine::socket_options::Keepalive;
use bro_relay::listener::Listener;
use bro_relay::relay::{Method, pipes};
use bro_relay::target::Target;
use nix::sys::socket::{SockaddrStorage, getsockname};

use crate::cli::{Forward, LocalClients, RelayChoice};
use crate::exit::Failure;
use crate::service::ServiceStarter;
use crate::service::incarnation::NetnsSource;
use crate::service::readiness::Ready;
use crate::service::sources::{Choice, WantedSource};
use crate::service::wakes::Limits;
use crate::systemd::scope::RuntimeScope;

/// Descriptors that connections may not use up: waking a service takes some (the bus, the agent, pidfds), as do pipes and the
/// kernel relay's maps.
const RESERVED_DESCRIPTORS: u64 = 128;

/// How many sockets for clients are among those.
const FEW_LISTENERS: usize = 16;

/// For how many connections the kernel relay has lanes without `--connections-max`: more are spliced. Lanes take memory from the
/// start, connections only when they come.
const LANES: u32 = 256;

/// Refuses what makes no sense together.
pub(super) fn check(options: &Forward, targets: &[Target]) -> Result<(), Failure> {
    if options.ready == Ready::Healthy && options.container.is_none() {
        return Err(Failure::Usage("--ready=healthy needs --container, whose health check it is".into()));
    }
    if let Some(refusal) = targets.iter().find_map(|target| options.ready.refusal(target)) {
        return Err(Failure::Usage(refusal));
    }
    if options.adopt.is_any() {
        super::adoption::check(options, targets)?;
        if let Some(most) = options.connections_max {
            tracing::warn!(
                "--connections-max={most} bounds the clients that are forwarded; those of a service that has its socket (--adopt) its own limit bounds, and the socket's Backlog= those that wait"
            );
        }
    }
    if options.accept_proxy && options.trusted.is_empty() {
        return Err(Failure::Usage(
            "--accept-proxy needs --trusted: who may say in a header who the client is, such as --trusted=10.0.0.5".into()
        ));
    }
    Ok(())
}

/// What the engine needs.
pub(super) fn engine(options: &Forward, listeners: &[(Listener, usize)]) -> Settings {
    let asked = options.connections_max.map(|most| most as usize);
    let descriptors = descriptors_for_connections();
    // What is left to others has room for a few sockets, and not for those of a range of ports.
    let descriptors = descriptors.saturating_sub(listeners.len().saturating_sub(FEW_LISTENERS));
    let takes_datagrams = listeners.iter().any(|(listener, _)| listener.kind.takes_datagrams());
    let flows_max = if takes_datagrams { flows(descriptors, options.flows_max) } else { 0 };
    let (connections_max, pipes) = fitting(descriptors - flows_max, asked.unwrap_or(usize::MAX));
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
        wake_on_bytes: options.idle.wake_on.bytes(),
        idle_by_bytes: options.idle.exit_idle_time.finite().filter(|_| options.idle.counts_bytes()),
        idle_ignore: options.idle.idle_ignore.clone(),
        idle_below: options.idle.idle_below,
        wake_ignore: options.idle.wake_ignore.clone(),
        flows_max,
        flow_timeout: options.flow_timeout.or_forever(),
        hold_limit: options.start_timeout.or_forever(),
        hold_refused: options.ready != Ready::Unchecked,
        tells_undelivered: options.icmp_port_unreachable,
        adopts: options.adopt.is_any(),
    }
}

/// Raises the limit on descriptors as far as may be, and says how many are left for connections and pipes.
fn descriptors_for_connections() -> usize {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return usize::MAX };
    let limit =
        if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_err() { soft } else { hard };
    usize::try_from(limit - RESERVED_DESCRIPTORS.min(limit / 4 * 3)).unwrap_or(usize::MAX)
}

/// How many flows fit into so many descriptors, each of which takes one: at most half of them.
fn flows(descriptors: usize, asked: u32) -> usize {
    let (asked, most) = (asked as usize, (descriptors / 2).max(1));
    if asked > most {
        tracing::warn!(
            "--flows-max={asked} is more than the limit on descriptors allows: {most} at once (LimitNOFILE=)"
        );
    }
    asked.min(most)
}

/// How many of the wanted connections fit into so many descriptors, and how many pipes beside them. Each takes two descriptors;
/// where too few are left for all pipes, there are fewer pipes, and bytes are copied.
fn fitting(descriptors: usize, asked: usize) -> (usize, usize) {
    let pairs = descriptors / 2;
    let connections = asked.min((pairs / 3 * 2).max(pairs.saturating_sub(pipes::MOST)).max(1));
    (connections, connections.saturating_mul(2).min(pipes::MOST).min(pairs.saturating_sub(connections)))
}

/// Whether the kernel relay may be used.
pub(super) const fn wants_kernel_relay(options: &Forward) -> bool {
    matches!(options.relay, RelayChoice::Auto | RelayChoice::Sockmap)
}

/// What the kernel relay's programs need.
pub(super) fn kernel_relay(options: &Forward) -> bro_sockmap::Config {
    bro_sockmap::Config {
        connections: options.connections_max.unwrap_or(LANES),
        hook_blocking: options.blocking_sockets,
        bear_fionread: options.relay == RelayChoice::Sockmap,
        trace: bro_sockmap::trace_wanted(),
    }
}

/// The cgroup of the clients that `--local-clients` names.
pub(super) fn local_clients(options: &Forward) -> anyhow::Result<Option<PathBuf>> {
    let below = match &options.local_clients {
        LocalClients::Off => return Ok(None),
        _ if !wants_kernel_relay(options) => {
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

/// How often the service may be started.
pub(super) fn wake_limits(options: &Forward) -> Limits {
    let idle = &options.idle;
    Limits {
        per_hour: idle.wakes_per_hour,
        idle_time: idle.exit_idle_time.or_forever(),
        most_idle_time: idle.exit_idle_time_max.or_forever(),
    }
}

/// What starts and finds the service that clients of these listeners are connected to.
pub(super) fn service_starter(options: &Forward, listeners: &[(Listener, usize)]) -> ServiceStarter {
    let place = match (&options.container, options.pid, &options.netns) {
        (Some(name), _, _) => NetnsSource::Container(name.clone()),
        (_, Some(pid), _) => NetnsSource::Pid(pid),
        (_, _, Some(path)) => NetnsSource::Netns(path.clone()),
        _ => NetnsSource::Own,
    };
    let manager = RuntimeScope::choose(options.system, options.user);
    let source = WantedSource { choice: options.source, clients: clients_namespace(listeners) };
    let (unit, ready, identity) = (options.unit.clone(), options.ready.clone(), options.unix_identity);
    ServiceStarter::new(place, unit, manager, ready, source, identity)
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
