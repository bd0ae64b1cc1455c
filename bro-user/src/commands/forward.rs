//! `bro forward`: one forwarder, from the sockets that it gets to its exit. The control process: it starts the engine in a process of
//! its own, wakes targets when the engine asks, and listens to systemd, signals and clocks.
//!
//! Its parts: the life cycle of the service (`lifecycle.rs`), the data plane (`data_plane.rs`), sockets that the service has itself
//! (`adoption.rs`), reload (`reload.rs`), what callers ask (`requests.rs`); `control.rs` is the loop that hears of everything, and gives it to the part that it is for.

pub mod freeze;
pub mod handover;
pub mod inhibit;

mod adoption;
mod control;
mod data_plane;
mod drain;
mod keep_awake;
mod lifecycle;
mod reload;
mod report;
mod requests;
mod routes;
mod settings;
mod sleep;
mod target_state;
mod undelivered;
mod waiting;
mod wake;

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use adoption::{Reserved, SocketAdoption};
use control::Control;
use data_plane::{DataPlane, RelayProcess};
use handover::{Predecessor, Program};
use keep_awake::KeepAwake;
use lifecycle::Lifecycle;
use reload::Reload;
use requests::Requests;
use routes::Routes;
use undelivered::Teller;

use crate::cli::Forward;
use crate::exit::Failure;
use crate::metrics;
use crate::netns::agent_process::SpareAgent;
use crate::systemd::listen_fds::{self, Passed};
use crate::systemd::notify;
use crate::systemd::run_command;

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
    confine_further();
    // A predecessor speaks for the service until this process has taken over.
    notify::mute(predecessor.is_some());
    let program = Program::own()?;
    let (left, passed) = undelivered::take(predecessor.is_some(), passed?);
    let (reserved, passed) = adoption::take(options.adopt.is_any(), passed)?;
    let mut routes = Routes::of(options, listen_fds::listeners(passed, &options.listen, options.adopt)?)?;
    if options.adopt.is_any() {
        adoption::name_as_clients_know_them(&mut routes.listeners);
    }
    settings::check(options, &routes.targets)?;
    let local_clients = settings::local_clients(options)?;
    let settings = settings::engine(options, &routes.listeners);
    let teller = Teller::new(options, &routes.listeners, left)?;
    let limit = waiting::Limit::new(options.connections_max, settings.connections_max);
    // Before the first thread.
    let mut private: Vec<BorrowedFd<'_>> = predecessor.iter().map(Predecessor::descriptor).collect();
    private.extend(reserved.iter().flat_map(Reserved::descriptors));
    private.extend(teller.iter().flat_map(Teller::descriptors));
    let relay = RelayProcess::fork(&settings, &routes, &private)?;
    // After that fork: the relay process may have neither the channel to the agent nor what a predecessor has left.
    let agent = SpareAgent::fork();
    let bequest = predecessor.as_ref().and_then(Predecessor::bequest);
    let Routes { listeners, targets } = routes;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let starter = settings::service_starter(options, &listeners).with_agent(agent);
        starter.check(&targets).await?;
        if options.idle.freeze {
            starter.check_freezing().await?;
        }
        if options.idle.freeze || reserved.as_ref().is_some_and(Reserved::has_left_any) {
            starter.thaw_what_was_left().await;
        }
        let keep_awake = KeepAwake::of(&options.idle.keep_awake).await?;
        let plane = DataPlane::start(options, relay, teller, local_clients, bequest)?;
        let adoption =
            reserved.map(|reserved| SocketAdoption::new(reserved, &listeners, &targets, options, &plane));
        let adoption = adoption.transpose()?;
        let life = Lifecycle::new(options, targets, Arc::new(starter), keep_awake, &plane);
        let reload = Reload::new(program, &listeners);
        // A predecessor, if there is one, still listens for requests for metrics.
        let endpoint = options.metrics.as_ref().filter(|_| predecessor.is_none());
        let requests = Requests::start(endpoint.map(metrics::MetricsServer::start).transpose()?);
        Control::new(options, life, plane, adoption, reload, requests, limit).run(predecessor).await
    })
}

/// In a confined service, refuses what its list of forbidden system calls cannot name. A child that this process starts where the service
/// manager does not start it would be under that too; without such a service it has to be free.
fn confine_further() {
    if run_command::is_confined()
        && let Err(error) = bro_relay::sandbox::new_calls::refuse()
    {
        tracing::warn!(%error, "new system calls are not refused");
    }
}
