//! One user, whose forwarders have the kernel relay, each in its seat.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bro_ebpf::{Counter, SEATS};
use bro_sockmap::pinned;
use bro_tests::forwarder::Setup;
use bro_tests::loader::{ALICE, INSIDE_ALICE, Site, Stage, as_user};
use bro_tests::peers::{Family, Here, Listener, PATIENCE};
use bro_tests::process;
use bro_tests::scene::{expect_relayed, talk_until};
use nix::sys::signal::Signal;

#[test]
fn a_forwarder_without_any_capability_has_the_kernel_relay() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let programs = stage.load(ALICE)?;
    let site = Site::start(ALICE, ALICE, &["--relay=sockmap"])?;
    site.seated()?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", site.forwarder.pid()))?;
    for set in ["CapPrm", "CapEff", "CapAmb"] {
        let line = status.lines().find(|line| line.starts_with(set)).context("capabilities")?;
        ensure!(line.ends_with("0000000000000000"), "{line}");
    }
    site.expect_lane(ALICE)?;
    ensure!(programs.total(Counter::Hooked)? > 0, "nothing was hooked");
    site.forwarder.stop()?;
    programs.expect_nothing_in_use()
}

#[test]
fn a_service_of_a_container_user_has_it_too() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let _programs = stage.load(ALICE)?;
    let site = Site::start(ALICE, INSIDE_ALICE, &["--relay=sockmap"])?;
    site.expect_lane(ALICE)
}

#[test]
fn several_forwarders_each_have_their_own_seat() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let programs = stage.load(ALICE)?;
    let sites: Vec<Site> =
        (0..3).map(|_| Site::start(ALICE, ALICE, &["--relay=sockmap"])).collect::<Result<_>>()?;
    for site in &sites {
        site.expect_lane(ALICE)?;
    }
    let mut seats: Vec<u32> = programs.watched()?.iter().map(|watch| watch.seat).collect();
    seats.sort_unstable();
    ensure!(seats == [0, 1, 2], "{seats:?}");
    // All at once, so that lanes of all three are open together.
    let open: Vec<_> = sites.iter().map(|site| site.connect(ALICE)).collect::<Result<_>>()?;
    for (nth, (client, service)) in open.iter().enumerate() {
        talk_until(client, service, || programs.hooked().is_ok_and(|now| now > nth))?;
    }
    ensure!(programs.hooked()? == 3, "{} hooked", programs.hooked()?);
    Ok(())
}

#[test]
fn the_seventeenth_forwarder_says_why_it_splices() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let _programs = stage.load(ALICE)?;
    let seats = pinned::folder(ALICE).join("seats");
    let lock = |seat: usize| -> Result<_> {
        let folder = std::fs::File::open(seats.join(format!("{seat:02}")))?;
        let exclusive = nix::fcntl::FlockArg::LockExclusiveNonblock;
        nix::fcntl::Flock::lock(folder, exclusive).map_err(|(_, errno)| errno.into())
    };
    let taken: Vec<_> = (0..SEATS).map(lock).collect::<Result<_>>()?;
    let site = Site::start(ALICE, ALICE, &[])?;
    site.forwarder.log().line(PATIENCE, |line| {
        line.contains("by splice") && line.contains("16 other forwarders of this user")
    })?;
    site.expect_no_lane(ALICE)?;
    drop(taken);
    let site = Site::start(ALICE, ALICE, &["--relay=sockmap"])?;
    site.expect_lane(ALICE)
}

#[test]
fn what_a_killed_forwarder_leaves_is_the_next_ones() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let programs = stage.load(ALICE)?;
    let Site { forwarder, front, service } = Site::start(ALICE, ALICE, &["--relay=sockmap"])?;
    let site = Site { forwarder, front, service };
    site.expect_lane(ALICE)?;
    // Its own lane: the connection before has been logged, and closes its route after that.
    let closed = || programs.in_use().is_ok_and(|in_use| in_use[2] == 0);
    ensure!(process::eventually(PATIENCE, closed), "a route is left: {:?}", programs.in_use()?);
    let (client, far) = site.connect(ALICE)?;
    talk_until(&client, &far, || programs.in_use().is_ok_and(|in_use| in_use[2] > 0))?;
    let records = programs.records()?;
    let before = records.last(0).context("the first record")?;
    let Site { forwarder, front, service } = site;
    // Its relay process could hear of the end before its own SIGKILL comes (prctl(2), PR_SET_PDEATHSIG), and close its lanes in order.
    let mut children = process::children(forwarder.pid()).into_iter();
    let relay = children.find(|&child| process::name(child).as_deref() == Some("bro-relay"));
    let relay = nix::unistd::Pid::from_raw(relay.context("it has a relay process")?);
    nix::sys::signal::kill(relay, Signal::SIGSTOP)?;
    forwarder.signal(Signal::SIGKILL)?;
    ensure!(process::ends(forwarder.pid(), PATIENCE)?, "it survived SIGKILL");
    drop(forwarder);
    let left = || -> Result<usize> { Ok(programs.watched()?.len() * programs.in_use()?[2]) };
    ensure!(left()? > 0, "there is nothing to reclaim");
    // One for another service: nothing of this one is kept.
    let other = Site::start(ALICE, ALICE, &["--relay=sockmap"])?;
    other.seated()?;
    ensure!(
        programs.watched()?.is_empty() && programs.in_use()?[2] == 0,
        "a dead forwarder's entries are left"
    );
    drop(other);

    let forwarder = Site::forwarder(ALICE, &front, &service, &["--relay=sockmap"])?;
    let site = Site { forwarder, front, service };
    site.expect_lane(ALICE)?;
    ensure!(programs.watched()?.len() == 1, "{:?}", programs.watched()?);
    // The old sender may still be there, and knows the number of its lane: no other lane is given that one again.
    let after = records.last(0).context("the first record")?;
    ensure!(before > 0 && after > before, "the numbers began anew: {after} after {before}");
    drop(far);
    Ok(())
}

#[test]
fn two_forwarders_of_one_service_both_have_its_lanes() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let programs = stage.load(ALICE)?;
    let first = Site::start(ALICE, ALICE, &["--relay=sockmap"])?;
    first.expect_lane(ALICE)?;
    let address = Family::Tcp4.loopback().context("TCP has a loopback address")?;
    let front = as_user(ALICE, || Listener::new(&Here, &address))?;
    let forwarder = Site::forwarder(ALICE, &front, &first.service, &["--relay=sockmap"])?;
    let Site { forwarder: one, front: ones, service } = first;
    let second = Site { forwarder, front, service };
    second.expect_lane(ALICE)?;
    let Site { forwarder, front, service } = second;
    let first = Site { forwarder: one, front: ones, service };
    first.expect_lane(ALICE)?;
    let watched = programs.watched()?;
    ensure!(watched.len() == 1 && watched[0].seat == 1, "{watched:?}");
    // The first one's end takes nothing from the second.
    let Site { forwarder: one, service, .. } = first;
    one.stop()?;
    Site { forwarder, front, service }.expect_lane(ALICE)
}

#[test]
fn a_successor_has_the_lanes_after_a_reload() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let _programs = stage.load(ALICE)?;
    let address = Family::Tcp4.loopback().context("TCP has a loopback address")?;
    let service = as_user(ALICE, || Listener::new(&Here, &address))?;
    let front = as_user(ALICE, || Listener::new(&Here, &address))?;
    let setup = Setup::new().user(ALICE).socket(&front).arg("--relay=sockmap");
    let forwarder = setup.arg(service.address().to_string()).start()?;
    let site = Site { forwarder, front, service };
    site.expect_lane(ALICE)?;
    let (client, far) = site.connect(ALICE)?;
    expect_relayed(&client, &far)?;
    site.forwarder.signal(Signal::SIGHUP)?;
    site.forwarder.log().line(PATIENCE, |line| line.contains("Replaced by process"))?;
    site.forwarder.log().line(PATIENCE, |line| line.contains("seat 2 of 16"))?;
    expect_relayed(&client, &far)?;
    for _ in 0..3 {
        site.expect_lane(ALICE)?;
    }
    drop((client, far));
    Ok(())
}

#[test]
fn the_client_lane_is_for_the_users_own_processes() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let programs = stage.load(ALICE)?;
    let site = Site::start(ALICE, ALICE, &["--relay=sockmap", "--local-clients=on"])?;
    site.expect_lane(ALICE)?;
    // A client is hooked once it has been non-blocking at a few messages, or not within `within`: how many sockets are then.
    let hooked = |client: u32, within: Duration| -> Result<usize> {
        let (near, far) = site.connect(client)?;
        for _ in 0..20 {
            expect_relayed(&near, &far)?;
        }
        process::eventually(within, || programs.hooked().is_ok_and(|now| now > 1));
        programs.hooked()
    };
    let soon = Duration::from_millis(500);
    let idle = || programs.hooked().is_ok_and(|count| count == 0);
    ensure!(process::eventually(PATIENCE, idle), "{} hooked", programs.hooked()?);
    ensure!(hooked(ALICE, PATIENCE)? == 2, "her own client has no lane");
    ensure!(process::eventually(PATIENCE, idle), "{} hooked", programs.hooked()?);
    let foreign = programs.total(Counter::Foreign)?;
    ensure!(hooked(0, soon)? == 1, "root's client in her cgroup was hooked");
    ensure!(programs.total(Counter::Foreign)? > foreign, "whose it is was not asked");
    ensure!(process::eventually(PATIENCE, idle), "{} hooked", programs.hooked()?);
    // Outside Alice's cgroup no socket is looked at at all.
    let outside = stage.another()?;
    stage.enter(&outside)?;
    let count = hooked(ALICE, soon);
    stage.enter(stage.cgroup())?;
    std::fs::remove_dir(&outside)?;
    ensure!(count? == 1, "a client outside her cgroup was hooked");
    Ok(())
}

#[test]
fn a_cgroup_of_clients_that_is_not_the_users_is_refused_in_a_sentence() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let _programs = stage.load(ALICE)?;
    let outside = stage.another()?;
    let named = format!("--local-clients={}", outside.display());
    let site = Site::start(ALICE, ALICE, &["--relay=sockmap", &named]);
    let said = site.and_then(|site| {
        site.forwarder.log().line(PATIENCE, |line| {
            line.contains("no lane for local clients") && line.contains("only at this user's own")
        })?;
        // The service lane is none of that.
        site.expect_lane(ALICE)
    });
    std::fs::remove_dir(&outside)?;
    said
}
