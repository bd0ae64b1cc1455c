//! Namespaces that go and come.

use super::*;

#[test]
fn a_namespace_destroyed_in_mid_stream_ends_its_connections() -> Result<()> {
    bro_tests::require_bpf!();
    let scratch = Scratch::new()?;
    let namespace = Namespace::new()?;
    let pinned = Pinned::new(&namespace, scratch.join("ns"))?;
    let service = Listener::new(&namespace, &Family::Tcp4.loopback().context("TCP has one")?)?;
    let front = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
    let setup = Setup::new().args(["--relay=sockmap", "--local-clients=on"]).socket(&front).arg("--netns");
    let forwarder = setup.arg(pinned.path()).arg(service.address().to_string()).start()?;
    let programs = forwarder.kernel_relay()?;
    warm(&forwarder, &front, &service, 1)?;
    let client = Conn::new(&Here, front.address())?;
    let served = service.accept()?;
    expect_relayed(&client, &served)?;
    let sent = served.pour_until_stuck(DOWN, BOUND, STUCK)?;
    // Everything that belongs to it, and the service with it: only the forwarder's own sockets are left inside.
    drop(pinned);
    namespace.destroy();
    drop((served, service));
    let (came, end) = client.drink_to_end(DOWN, 0)?;
    println!("{came} of {sent} bytes came, then {end:?}");
    ensure!(came == sent || end == End::Aborted, "cut after {came} of {sent} bytes, with a clean end");
    drop(client);
    forwarder.closings(2)?;
    programs.expect_nothing_in_use()?;
    forwarder.expect_no_spin(Duration::from_millis(400))?;
    forwarder.stop()?;
    programs.expect_gone()
}

/// Some exchanges over a new connection, some of whose bytes must take a lane.
fn expect_lane(forwarder: &Forwarder, front: &Listener, service: &Listener) -> Result<()> {
    let before = kernel_bytes(forwarder)?;
    let client = Conn::new(&Here, front.address())?;
    let served = service.accept()?;
    for at in 0..20 {
        client.pour(UP, at * 100, (at + 1) * 100)?;
        served.drink(UP, at * 100, (at + 1) * 100)?;
        served.pour(DOWN, at * 500, (at + 1) * 500)?;
        client.drink(DOWN, at * 500, (at + 1) * 500)?;
    }
    drop((client, served));
    let moved = || kernel_bytes(forwarder).is_ok_and(|now| now > before + 1000);
    ensure!(process::eventually(PATIENCE, moved), "no lane: {:?}", forwarder.report()?.total);
    Ok(())
}

#[test]
fn a_service_restarted_in_a_new_namespace_has_lanes_again() -> Result<()> {
    bro_tests::require_bpf!();
    let scratch = Scratch::new()?;
    let path = scratch.join("ns");
    let first = Namespace::new()?;
    let pinned = Pinned::new(&first, path.clone())?;
    let service = Listener::new(&first, &Family::Tcp4.loopback().context("TCP has one")?)?;
    let target = service.address().clone();
    let front = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
    // The service's lane alone: a client's would hide that there is none.
    let setup = Setup::new().arg("--relay=sockmap").socket(&front).arg("--netns");
    let forwarder = setup.arg(&path).arg(target.to_string()).start()?;
    let programs = forwarder.kernel_relay()?;
    warm(&forwarder, &front, &service, 2)?;
    expect_lane(&forwarder, &front, &service)?;
    for round in 0..2 {
        // The container ends, and another takes its name, its path and its port.
        forwarder.log().forget();
        let fresh = Namespace::new()?;
        nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH)?;
        nix::mount::mount(
            Some(&fresh.path()),
            &path,
            None::<&str>,
            nix::mount::MsFlags::MS_BIND,
            None::<&str>,
        )?;
        let again = Listener::new(&fresh, &target)?;
        warm(&forwarder, &front, &again, 2).with_context(|| format!("round {round}"))?;
        expect_lane(&forwarder, &front, &again).with_context(|| format!("round {round}"))?;
    }
    drop((pinned, service));
    programs.expect_nothing_in_use()?;
    forwarder.stop()?;
    programs.expect_gone()
}

#[test]
fn two_forwarders_to_the_same_address_in_two_namespaces_both_have_lanes() -> Result<()> {
    bro_tests::require_bpf!();
    let loopback = Family::Tcp4.loopback().context("TCP has one")?;
    let (one, two) = (Namespace::new()?, Namespace::new()?);
    let first = Listener::new(&one, &loopback)?;
    let second = Listener::new(&two, first.address())?;
    let mut stands = Vec::new();
    for (namespace, service) in [(&one, &first), (&two, &second)] {
        let front = Listener::new(&Here, &loopback)?;
        let setup = Setup::new().arg("--relay=sockmap").netns(namespace).socket(&front);
        let forwarder = setup.arg(service.address().to_string()).start()?;
        let programs = forwarder.kernel_relay()?;
        stands.push((forwarder, programs, front, service));
    }
    for (forwarder, _, front, service) in &stands {
        warm(forwarder, front, service, 2)?;
    }
    for _ in 0..3 {
        for (forwarder, _, front, service) in &stands {
            expect_lane(forwarder, front, service)?;
        }
    }
    // The end of one is nothing to the other.
    let (forwarder, programs, ..) = stands.remove(0);
    forwarder.stop()?;
    programs.expect_gone()?;
    let (forwarder, programs, front, service) = stands.remove(0);
    expect_lane(&forwarder, &front, service)?;
    forwarder.stop()?;
    programs.expect_gone()
}
