//! `bro forward` on a real host: systemd as PID 1 listens, Podman (rootful, and rootless under an ordinary user's manager) runs
//! quadlet containers with `Network=none`, and real services are behind it. `BRO_CASE=part` runs the cases so named.
//!
//! Needs: root, mmdebstrap. Takes: 6 min.

mod doctoring;
mod failures;
mod frozen;
mod life;
mod often;
mod places;
mod services;
mod sharing;
mod site;
mod thirty;
mod unix_socket;
mod users;
mod waking;
mod whose;

use anyhow::Result;
use bro_tests::host::cases::{Case, Cases, note};
use bro_tests::host::{Host, NEEDS};

const BOTH: &[Case] = &[
    (
        "the first client wakes, the last one lets sleep, the next one wakes again",
        waking::wakes_sleeps_and_wakes,
    ),
    ("a unit that was running before is left running", waking::leaves_running_what_ran),
    ("a container started by unit dependencies", waking::started_by_dependencies),
    ("a container in a pod", places::in_a_pod),
    ("containers with a network", places::other_networks),
    ("containers with a user namespace of their own", places::user_namespaces),
    ("a process and a namespace instead of a container", places::process_and_namespace),
    ("two sockets with targets of their own", places::two_sockets),
    ("sockets of IPv6 and unix", places::other_listeners),
    ("a hundred clients in the first millisecond", waking::hundred_clients),
    ("clients around the moment of the idle exit", waking::clients_around_idle_exit),
    ("readiness: healthy, exec, connect", waking::other_readiness),
    ("a container that restarts under a running forwarder", life::container_restarts),
    ("a container that restarts itself while a client is held", life::container_restarts_itself),
    ("a container that is slow to stop", life::slow_to_stop),
    ("a client that leaves while it is held", life::client_leaves),
    ("a forwarder that is killed", life::killed),
    ("stopping the forwarder lets a connection finish", life::drains),
    ("a forwarder that is told to stop while it wakes", life::stopped_while_it_wakes),
    ("what systemd is told", life::status),
    ("a container that dies during its start", failures::dies_during_start),
    ("a service that never listens", failures::never_listens),
    ("an image that is not there", failures::cannot_start),
    ("a unit that does not exist", failures::unknown_unit),
    ("places that do not exist", failures::unknown_places),
    ("two forwarders of one container", sharing::two_forwarders),
    ("a container that is woken while another forwarder stops it", sharing::woken_while_another_stops_it),
    ("a job inside that is busy", sharing::busy_inside),
    ("waking and sleeping by hand", sharing::by_hand),
    ("a container that dies at every start", sharing::crash_loop),
    ("a start that outlasts its limit is slept off", whose::slower_than_the_limit),
    ("a start longer than limit and idle time", whose::longer_than_limit_and_idle_time),
    ("a container that systemd restarts is put to sleep again", whose::restarted_by_systemd),
    ("a start limit that systemd keeps to", whose::restarted_as_often_as_may_be),
    ("a container that is restarted by hand is put to sleep again", whose::restarted_by_hand),
    ("a container that is started anew by hand is left running", whose::started_anew_by_hand),
    ("a forwarder that is killed during the start", whose::killed_while_it_starts),
    ("two targets woken at once", whose::two_targets_at_once),
    ("a container that another unit needs", whose::needed_by_another),
    ("frozen: goes on at once, and is stopped in the end", frozen::goes_on_at_once),
    ("frozen: looked after by others", frozen::looked_after),
    ("frozen: not what was started by others", frozen::others_are_not),
    ("frozen: goes on for a datagram", frozen::goes_on_for_a_datagram),
    ("often: the same client again and again", often::the_same_client_again_and_again),
    ("often: a container that was started too often", often::started_too_often),
    ("often: clients that wake nothing", often::who_wakes_nothing),
    ("services in bro status", doctoring::status_of_services),
    ("bro doctor and a service that is broken", doctoring::doctor_of_a_service),
    ("unix_socket: whom a service in a container sees", unix_socket::who_connects),
    ("PostgreSQL, psql and pgbench", services::postgresql),
    ("nginx over TCP and over its unix socket", services::nginx),
    ("redis and redis-benchmark", services::redis),
];

/// Cases that measure: one manager after the other, and no other case beside.
const ALONE: &[Case] = &[("thirty services woken in one moment", thirty::woken_at_once)];

/// A case that chooses its managers itself.
type OtherCase = (&'static str, fn(&Host) -> Result<()>);

const OTHERS: &[OtherCase] = &[
    (
        "a system service with User= finds that user's manager without any environment",
        users::bus_without_environment,
    ),
    ("another user's container, process and namespace", users::another_users),
    ("root's forwarder and a user's container", users::roots_forwarder),
    (
        "a symbolic link of the container's does not lead to the host's sockets",
        users::symlink_in_the_container,
    ),
    ("a user's process that passes itself off as conmon gets no client of root's", users::false_conmon),
    ("the system's manager is not an ordinary user's to command", users::systems_manager),
    ("a service manager that executes itself anew during a start", life::manager_executes_itself_anew),
];

#[test]
fn forwarders_on_a_real_host() {
    if !bro_tests::tier::met("forwarders_on_a_real_host", &NEEDS) {
        return;
    }
    let cases = Cases::default();
    let mut host = Host::boot().expect("the host boots");
    note(&format!("the host booted in {:.1} s", host.booted_in().as_secs_f64()));
    site::prepare(&host).expect("the host can be prepared");
    cases.both(&host, BOTH);
    cases.each(&host, ALONE);
    for (name, case) in OTHERS {
        cases.on(&host, name, || case(&host));
    }
    cases.rebooting(&mut host, "frozen: the host goes down", frozen::the_host_goes_down);
    cases.rebooting(&mut host, "enabled sockets work after a reboot", life::survives_reboot);
    cases.conclude();
}
