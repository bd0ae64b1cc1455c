//! `bro activate` on a real host: quadlets become activated services, rootful and rootless, behind systemd as PID 1, with real
//! services in real containers; what breaks them; and every example of the documentation. `BRO_CASE=part` runs the cases so
//! named.
//!
//! Needs: root, mmdebstrap, the services that `.ci/run` installs. Takes: 6 min.

mod activated;
mod adopt;
mod adopt_last_look;
mod adopt_services;
mod clients;
mod crossover;
mod datagrams;
mod direct;
mod doctor;
mod examples;
mod faults;
mod haproxy;
mod helper;
mod honest;
mod kinds;
mod metrics;
mod networks;
mod power;
mod refusals;
mod reload;
mod run_as;
mod services;
mod unix_socket;
mod words;

use anyhow::Result;
use bro_tests::host::cases::{Case, Cases, note};
use bro_tests::host::{Host, Manager, NEEDS, site};

const BOTH: &[Case] = &[
    ("from a quadlet to an activated service and back", activated::from_quadlet_to_service),
    ("a second port of the same container", activated::second_port),
    ("networks: a bridge of its own, the host's", activated::other_networks),
    ("pods and templates", activated::pods_and_templates),
    ("a .kube", activated::kubernetes),
    ("systemd's own check of the units", activated::verified),
    ("frozen instead of stopped", activated::frozen),
    ("kept awake at times", activated::kept_awake),
    ("ready when healthy", activated::healthy),
    ("ready and busy by commands of the owner's", activated::owners_commands),
    ("bad input", refusals::bad_input),
    ("files and ports of others", refusals::others_property),
    ("warnings", refusals::warnings),
    ("nginx takes the socket over", direct::nginx),
    ("an echo service takes a TCP socket over", direct::echo_over_tcp),
    ("an echo service takes a unix socket over", direct::echo_over_unix),
    ("a crash loop of one that takes its socket over", direct::crash_loop),
    (
        "a client while one that takes its socket over is restarted or stopped",
        direct::client_while_restarting,
    ),
    ("adopt: from a quadlet to an adopted service and back", adopt::from_quadlet_to_service),
    ("adopt: restarted under load", adopt::restarted_under_load),
    ("adopt: the forwarder is killed", adopt::forwarder_killed),
    ("adopt: a container that is started by hand", adopt::started_by_hand),
    ("adopt: off again", adopt::off_again),
    ("adopt: a profile that is older than its source", adopt::older_profile),
    ("adopt: looked after", adopt::looked_after),
    ("adopt: frozen without bytes", adopt::frozen_without_bytes),
    ("adopt: a client at the last moment", adopt_last_look::last_moment),
    ("adopt: another socket", adopt::another_socket),
    ("adopt: a socket that the container has broken", adopt::damaged),
    ("adopt: to where its container connects", adopt::connects),
    ("adopt: a second port for the same place", adopt::second_port),
    ("adopt: other services", adopt::other_services),
    ("adopt: a table of services", adopt_services::each),
    ("adopt: in a pod", adopt_services::in_a_pod),
    ("PostgreSQL and pgbench", services::postgresql),
    ("redis and redis-benchmark", services::redis),
    ("clients of PostgreSQL in other containers", clients::postgresql),
    ("clients of redis in other containers", clients::redis),
    ("whom a service sees, wherever it is and however it is found", clients::by_place),
    ("HAProxy on either side, by PROXY v1 and v2", haproxy::on_either_side),
    ("reloaded under pgbench", reload::under_pgbench),
    ("no system call with half an argument undefined", words::nothing_undefined),
    ("a service that Podman and all may make no socket for", direct::restricted),
    ("a command in the container's network", helper::by_its_owner),
    ("unix_socket: whom a service sees through a confined forwarder", unix_socket::who_connects),
    ("unix_socket: whom a service sees in a user namespace of its own", unix_socket::mapped),
    ("datagrams: a name server, over UDP and TCP", datagrams::name_server),
    ("datagrams: a name server that has its socket itself", datagrams::adopted),
    ("datagrams: a range of ports", datagrams::range),
    (
        "datagrams: passed on to the container; and messages over a unix socket",
        datagrams::passed_and_messages,
    ),
    ("kinds: an echo service takes a socket of every kind over", kinds::direct),
    ("kinds: a unix socket for datagrams", kinds::unix_datagrams),
    ("status and doctor", doctor::status_and_doctor),
    ("metrics: counted over stops and reloads", metrics::counted_over_stops_and_reloads),
    ("metrics: over a unix socket", metrics::over_a_unix_socket),
    ("metrics: top wakes and puts to sleep", metrics::top),
    ("doctor and a forwarder that is confined too much", doctor::confined_forwarder),
    ("honest: Podman's own words about a wake that failed", honest::podmans_own_words),
    ("honest: what is in the way", honest::in_the_way),
    ("honest: changed settings are taken up", honest::settings_taken_up),
    ("honest: what is taken down, and what is left", honest::taken_down),
    ("activated several times at once", faults::twice_at_once),
    ("a run that was killed", faults::killed),
    ("a run that is interrupted", faults::interrupted),
    ("a file of it is deleted by hand", faults::deleted_by_hand),
    ("the quadlet is renamed, and deleted", faults::quadlet_goes),
    ("the socket is stopped while clients are held", faults::socket_stopped),
    ("a hundred clients in the first millisecond", faults::hundred_at_once),
    ("removed under a client", faults::removed_under_a_client),
    ("a crash loop", faults::crash_loop),
    ("a start whose readiness was lost", faults::readiness_lost),
    ("the container is updated", faults::updated),
    ("a client while the container is being stopped", faults::client_while_stopping),
    ("two activators of one container", faults::two_activators),
    ("a forwarder to an address on a network of one's own", networks::own_network),
];

/// A case that chooses its managers itself.
type OtherCase = (&'static str, fn(&Host) -> Result<()>);

const OTHERS: &[OtherCase] = &[
    ("the rootless network namespace itself", networks::rootless_namespace),
    ("one account's container wakes another's service", crossover::pasta),
    ("the disk is full", faults::disk_full),
    ("the system listens for an ordinary user's container", run_as::from_quadlet_to_service),
    ("adopt: the system listens for an ordinary user's container", adopt::for_a_user),
    ("adopt: a socket of the system's that a user's container has broken", adopt::damaged_for_a_user),
    ("adopt: systemd is executed anew, and bro is upgraded", adopt_services::upgraded),
    ("adopt: what a service is told of addresses", adopt::told),
    ("the system's forwarder for a user, with commands of the user's", run_as::owners_commands),
    ("the system's forwarder for a user, looked after", run_as::looked_after),
    ("what the system's forwarder for a user may and others may not", run_as::lines_that_are_not_crossed),
    ("doctor and the system's forwarder for a user that is confined too much", run_as::confined),
    ("unix_socket: whom a user's service sees through the system's forwarder", unix_socket::of_a_user),
    ("datagrams: the system listens at port 53 for an ordinary user's container", datagrams::of_a_user),
    ("what root has a user's Podman do", run_as::podman_has_nothing_of_roots),
    ("metrics: of the system's forwarder for a user", metrics::of_the_systems_forwarder_for_a_user),
    ("the system's forwarder for a user who is not logged in", run_as::not_logged_in),
    ("another user's container by its process", helper::by_others),
    ("what doctor says of AppArmor and SELinux", doctor::security_modules),
    ("doctor and a loader whose unit is not installed", doctor::loader_without_its_unit),
];

#[test]
fn activated_services_on_a_real_host() {
    if !bro_tests::tier::met("activated_services_on_a_real_host", &NEEDS) {
        return;
    }
    let cases = Cases::default();
    let mut host = Host::boot().expect("the host boots");
    note(&format!("the host booted in {:.1} s", host.booted_in().as_secs_f64()));
    site::prepare(&host).expect("the host can be prepared");
    networks::outside(&host).expect("the host can have a network");
    for manager in [Manager::System, Manager::User("test"), Manager::User("other")] {
        manager.import_image(&host, "socat", "docker.io/alpine/socat").expect("the image can be imported");
    }
    cases.both(&host, BOTH);
    for (name, case) in OTHERS {
        cases.on(&host, name, || case(&host));
    }
    examples::all(&host, &cases);
    cases.rebooting(&mut host, "after a reboot without a login", power::no_user_has_logged_in);
    cases.rebooting(&mut host, "reboot and power cut in mid-stream", power::reboot_and_power_cut);
    cases.conclude();
}
