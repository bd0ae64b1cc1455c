//! Reload: a successor takes over, and no client notices.
//!
//! Needs: a network namespace; root and kernel BTF for some tests. Takes: seconds.
#![allow(clippy::tests_outside_test_module, reason = "this is a test target")]

use std::io::{Read as _, Write as _};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::{Forwarder, Setup};
use bro_tests::loader::Site;
use bro_tests::notify::Notify;
use bro_tests::peers::{Conn, Family, Here, Listener, PATIENCE};
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::{process, require_namespaces};
use bro_user::commands::status::PredecessorReport;
use bro_user::control_socket::Reply;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Long enough to see that something does not happen.
const MOMENT: Duration = Duration::from_millis(400);

/// Reloads `main`, and waits until the service manager has been told of its successor.
fn reload(main: i32, notify: &mut Notify) -> Result<i32> {
    kill(Pid::from_raw(main), Signal::SIGHUP)?;
    notify.wait_anew(PATIENCE, |line| line == "RELOADING=1")?;
    newest_main(notify, &[main])
}

fn newest_main(notify: &mut Notify, but: &[i32]) -> Result<i32> {
    newest_main_within(PATIENCE, notify, but)
}

fn newest_main_within(within: Duration, notify: &mut Notify, but: &[i32]) -> Result<i32> {
    let line = notify.wait(within, |line| {
        let pid = line.strip_prefix("MAINPID=").and_then(|pid| pid.parse::<i32>().ok());
        pid.is_some_and(|pid| !but.contains(&pid))
    })?;
    Ok(line.trim_start_matches("MAINPID=").parse()?)
}

fn ends(pid: i32) -> Result<bool> {
    process::ends(pid, PATIENCE)
}

fn stop(main: i32, forwarder: Forwarder) -> Result<()> {
    kill(Pid::from_raw(main), Signal::SIGTERM)?;
    ensure!(ends(main)?, "the successor does not end");
    forwarder.expect_nothing_left()?;
    forwarder.expect_no_panic()
}

/// A forwarder that has told the service manager that it is ready, and its scene.
fn ready(options: impl FnOnce(Setup) -> Setup) -> Result<(Notify, Scene, Forwarder)> {
    let mut notify = Notify::new()?;
    let scene = Scene::new()?;
    let forwarder = options(scene.setup().env("NOTIFY_SOCKET", notify.name())).arg(scene.target()).start()?;
    notify.wait(PATIENCE, |line| line == "READY=1")?;
    Ok((notify, scene, forwarder))
}

/// A scene's service, and a connection to it that relays: the client's end, and the service's.
fn relaying(scene: &mut Scene) -> Result<(Listener, (Conn, Conn))> {
    let service = scene.serve()?;
    let connection = (scene.client()?, service.accept()?);
    expect_relayed(&connection.0, &connection.1)?;
    Ok((service, connection))
}

#[test]
fn connections_stay_where_they_are_and_new_ones_go_to_the_successor() -> Result<()> {
    require_namespaces!();
    let (mut notify, mut scene, mut forwarder) = ready(|setup| setup)?;
    let (service, old) = relaying(&mut scene)?;

    let successor = reload(forwarder.pid(), &mut notify)?;
    ensure!(successor != forwarder.pid());
    expect_relayed(&old.0, &old.1).context("through the old process")?;
    // The old one has stopped accepting once it says so.
    forwarder.log().line(PATIENCE, |line| line.contains("Replaced by process"))?;
    let new = (scene.client()?, service.accept()?);
    expect_relayed(&new.0, &new.1).context("through its successor")?;
    ensure!(forwarder.wait(MOMENT)?.is_none(), "the old process has left its connection");
    ensure!(!notify.seen().iter().any(|line| line == "STOPPING=1"), "{:?}", notify.seen());
    drop(old);
    let status = forwarder.wait(PATIENCE)?.context("the old process stays without a connection")?;
    ensure!(status.success(), "{status}");
    expect_relayed(&new.0, &new.1).context("after the old process's end")?;
    drop(new);
    stop(successor, forwarder)
}

/// Expects the forwarder that answers for the service to have `count` connections, and to tell of `predecessor` and its.
fn expect_status(forwarder: &Forwarder, count: u64, predecessor: Option<(i32, u64)>) -> Result<()> {
    let predecessor = predecessor.map(|(pid, count)| PredecessorReport { pid, connections: Some(count) });
    let said = predecessor.as_ref().map(|predecessor| format!("; {predecessor}"));
    let seen = || {
        forwarder.report().is_ok_and(|report| {
            report.total.open == count
                && report.predecessor == predecessor
                && match &said {
                    Some(said) => report.state.ends_with(said),
                    None => !report.state.contains("replaced"),
                }
        })
    };
    ensure!(process::eventually(PATIENCE, seen), "{:?}, and not {predecessor:?}", forwarder.report());
    Ok(())
}

#[test]
fn the_status_tells_of_predecessors_and_their_connections() -> Result<()> {
    require_namespaces!();
    let (mut notify, mut scene, mut forwarder) = ready(|setup| setup)?;
    let service = scene.serve()?;
    let (first, second) = ((scene.client()?, service.accept()?), (scene.client()?, service.accept()?));
    expect_relayed(&first.0, &first.1)?;
    expect_relayed(&second.0, &second.1)?;
    expect_status(&forwarder, 2, None)?;
    let successor = reload(forwarder.pid(), &mut notify)?;
    expect_status(&forwarder, 0, Some((forwarder.pid(), 2)))?;
    notify.wait(PATIENCE, |line| line.starts_with("STATUS=") && line.ends_with("still has 2 connections"))?;
    drop(first);
    expect_status(&forwarder, 0, Some((forwarder.pid(), 1)))?;
    // A third, which waits for both.
    let third = (scene.client()?, service.accept()?);
    expect_relayed(&third.0, &third.1)?;
    kill(Pid::from_raw(successor), Signal::SIGHUP)?;
    let last = newest_main(&mut notify, &[forwarder.pid(), successor])?;
    expect_status(&forwarder, 0, Some((successor, 2)))?;
    drop(second);
    ensure!(forwarder.wait(PATIENCE)?.is_some(), "the first process stays");
    expect_status(&forwarder, 0, Some((successor, 1)))?;
    drop(third);
    ensure!(ends(successor)?, "the second process stays");
    expect_status(&forwarder, 0, None)?;
    stop(last, forwarder)
}

#[test]
fn one_reload_after_another_under_load_and_no_client_is_refused() -> Result<()> {
    require_namespaces!();
    let (mut notify, mut scene, forwarder) = ready(|setup| setup)?;
    let service = scene.serve()?;
    let (over, served) = (AtomicBool::new(false), AtomicU64::new(0));
    let front = scene.front.address().clone();
    std::thread::scope(|scope| -> Result<()> {
        let echo = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                let Some(conn) = service.try_accept(Duration::from_millis(50))? else { continue };
                let mut byte = [0; 64];
                conn.recv_exact(&mut byte)?;
                conn.send(&byte)?;
            }
            Ok(())
        });
        let client = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                let conn = Conn::new(&Here, &front)?;
                conn.send(&[7; 64])?;
                conn.recv_exact(&mut [0; 64])?;
                conn.expect_eof()?;
                served.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        let mut mains = vec![forwarder.pid()];
        let reloading = (0..5).try_for_each(|_| -> Result<()> {
            let before = served.load(Ordering::Relaxed);
            let more = || served.load(Ordering::Relaxed) > before + 20;
            ensure!(process::eventually(PATIENCE, more), "no client is served");
            let main = *mains.last().unwrap_or(&0);
            kill(Pid::from_raw(main), Signal::SIGHUP)?;
            mains.push(newest_main(&mut notify, &mains)?);
            ensure!(ends(main)?, "process {main} does not end");
            Ok(())
        });
        over.store(true, Ordering::Relaxed);
        client.join().expect("the client's thread").context("a client")?;
        // The service may wait for one that was the last.
        echo.join().expect("the service's thread").context("the service")?;
        reloading?;
        let main = *mains.last().unwrap_or(&0);
        kill(Pid::from_raw(main), Signal::SIGTERM)?;
        ensure!(ends(main)?, "the last successor does not end");
        Ok(())
    })?;
    forwarder.expect_nothing_left()?;
    forwarder.expect_no_panic()
}

#[test]
fn a_held_client_is_served_by_whom_it_has_come_to() -> Result<()> {
    require_namespaces!();
    let (mut notify, mut scene, forwarder) = ready(|setup| setup)?;
    let held = scene.client()?;
    scene.expect_held(&forwarder, 1)?;
    let successor = reload(forwarder.pid(), &mut notify)?;
    let service = scene.serve()?;
    let served = service.accept()?;
    expect_relayed(&held, &served)?;
    drop((held, served));
    ensure!(ends(forwarder.pid())?, "the old process stays");
    stop(successor, forwarder)
}

#[test]
fn a_successor_does_not_leave_before_its_predecessor() -> Result<()> {
    require_namespaces!();
    let (mut notify, mut scene, mut forwarder) = ready(|setup| setup.arg("--exit-idle-time=200ms"))?;
    let service = scene.serve()?;
    let old = (scene.client()?, service.accept()?);
    expect_relayed(&old.0, &old.1)?;
    let successor = reload(forwarder.pid(), &mut notify)?;
    ensure!(!process::ends(successor, MOMENT * 2)?, "it left, and systemd would end the old process with it");
    expect_relayed(&old.0, &old.1)?;
    drop(old);
    ensure!(forwarder.wait(PATIENCE)?.is_some(), "the old process stays");
    ensure!(ends(successor)?, "the successor stays although no client comes");
    forwarder.expect_nothing_left()
}

#[test]
fn a_replaced_process_waits_for_the_one_it_has_replaced() -> Result<()> {
    require_namespaces!();
    let (mut notify, mut scene, mut forwarder) = ready(|setup| setup.arg("--exit-idle-time=200ms"))?;
    let service = scene.serve()?;
    let old = (scene.client()?, service.accept()?);
    expect_relayed(&old.0, &old.1)?;
    let second = reload(forwarder.pid(), &mut notify)?;
    kill(Pid::from_raw(second), Signal::SIGHUP)?;
    let third = newest_main(&mut notify, &[forwarder.pid(), second])?;
    // Neither the second, which has nothing to do, nor the third, to which no client comes.
    ensure!(!process::ends(third, MOMENT * 2)?, "the third left before the first");
    ensure!(!process::ends(second, Duration::ZERO)?, "the second left before the first");
    expect_relayed(&old.0, &old.1)?;
    drop(old);
    ensure!(forwarder.wait(PATIENCE)?.is_some() && ends(second)? && ends(third)?, "one of them stays");
    forwarder.expect_nothing_left()
}

#[test]
fn sigterm_to_both_ends_both_in_order() -> Result<()> {
    require_namespaces!();
    let (mut notify, mut scene, mut forwarder) = ready(|setup| setup)?;
    let (_service, old) = relaying(&mut scene)?;
    let successor = reload(forwarder.pid(), &mut notify)?;
    for pid in process::members(forwarder.pid()) {
        kill(Pid::from_raw(pid), Signal::SIGTERM)?;
    }
    ensure!(forwarder.wait(MOMENT)?.is_none(), "the old process has cut its connection");
    expect_relayed(&old.0, &old.1)?;
    drop(old);
    ensure!(forwarder.wait(PATIENCE)?.is_some_and(|status| status.success()), "the old process stays");
    ensure!(ends(successor)?, "the successor stays");
    forwarder.expect_nothing_left()
}

/// A forwarder that is told to stop while it starts a successor takes that one along: the service manager does not know of it yet.
#[test]
fn sigterm_after_sighup_leaves_no_process() -> Result<()> {
    require_namespaces!();
    let mut taken_along = 0;
    for delay in [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 30, 40, 50] {
        let (mut notify, _scene, mut forwarder) = ready(|setup| setup)?;
        forwarder.signal(Signal::SIGHUP)?;
        std::thread::sleep(Duration::from_millis(delay));
        forwarder.signal(Signal::SIGTERM)?;
        let status =
            forwarder.wait(PATIENCE)?.with_context(|| format!("after {delay} ms: it does not stop"))?;
        ensure!(status.success(), "after {delay} ms: {status}");
        // One that the service manager knows of is told by it.
        match newest_main_so_far(&mut notify, forwarder.pid()) {
            Some(main) => {
                kill(Pid::from_raw(main), Signal::SIGTERM).ok();
                ensure!(ends(main)?, "after {delay} ms: the successor does not stop");
            }
            None => taken_along += 1,
        }
        forwarder.expect_nothing_left().with_context(|| format!("after {delay} ms"))?;
        forwarder.expect_no_panic()?;
    }
    ensure!(taken_along > 0, "each successor was quicker than SIGTERM");
    Ok(())
}

/// The main process that the service manager was told of, if it is not `first`.
fn newest_main_so_far(notify: &mut Notify, first: i32) -> Option<i32> {
    // What has come is all there will be of it.
    newest_main_within(Duration::ZERO, notify, &[first]).ok()
}

#[test]
fn sigterm_after_sighup_lets_connections_finish() -> Result<()> {
    require_namespaces!();
    for delay in [0, 2, 4, 8] {
        let (mut notify, mut scene, mut forwarder) = ready(|setup| setup)?;
        let (_service, old) = relaying(&mut scene)?;
        forwarder.signal(Signal::SIGHUP)?;
        std::thread::sleep(Duration::from_millis(delay));
        forwarder.signal(Signal::SIGTERM)?;
        ensure!(forwarder.wait(MOMENT)?.is_none(), "after {delay} ms: it has cut its connection");
        if let Some(main) = newest_main_so_far(&mut notify, forwarder.pid()) {
            kill(Pid::from_raw(main), Signal::SIGTERM)?;
        } else {
            // The successor is gone before the last connection is.
            let successor = |pid: &i32| process::name(*pid).as_deref() == Some("bro");
            let gone = || !process::children(forwarder.pid()).iter().any(successor);
            ensure!(process::eventually(PATIENCE, gone), "after {delay} ms: the successor stays");
        }
        expect_relayed(&old.0, &old.1).with_context(|| format!("after {delay} ms"))?;
        drop(old);
        ensure!(
            forwarder.wait(PATIENCE)?.is_some_and(|status| status.success()),
            "after {delay} ms: it stays"
        );
        forwarder.expect_nothing_left().with_context(|| format!("after {delay} ms"))?;
    }
    Ok(())
}

#[test]
fn a_successor_that_hears_nothing_is_ended_with_the_one_that_starts_it() -> Result<()> {
    require_namespaces!();
    let (mut notify, _scene, mut forwarder) = ready(|setup| setup.copy())?;
    std::fs::remove_file(forwarder.program())?;
    let folder = forwarder.program().parent().context("a folder")?.to_owned();
    bro_tests::forwarder::script(&folder, "bro", "exec sleep 1000")?;
    forwarder.signal(Signal::SIGHUP)?;
    notify.wait_anew(PATIENCE, |line| line == "RELOADING=1")?;
    let started = || {
        process::children(forwarder.pid())
            .into_iter()
            .any(|pid| process::name(pid).as_deref() == Some("sleep"))
    };
    ensure!(process::eventually(PATIENCE, started), "nothing was started");
    forwarder.signal(Signal::SIGTERM)?;
    forwarder.log().line(PATIENCE, |line| line.contains("does not stop; it is killed"))?;
    forwarder.expect_exit(0)
}

/// What the forwarder that answers for the service says to `request`.
fn ask(forwarder: &Forwarder, request: &str) -> Result<Reply> {
    let mut stream = std::os::unix::net::UnixStream::connect(forwarder.status_socket())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(serde_json::from_str(&text)?)
}

#[test]
fn told_to_sleep_it_minds_the_clients_of_its_predecessor() -> Result<()> {
    require_namespaces!();
    let (mut notify, mut scene, mut forwarder) = ready(|setup| setup)?;
    let (_service, old) = relaying(&mut scene)?;
    let successor = reload(forwarder.pid(), &mut notify)?;
    expect_status(&forwarder, 0, Some((forwarder.pid(), 1)))?;
    let outcome = ask(&forwarder, "sleep\n")?;
    ensure!(!outcome.done && outcome.message.contains("still has 1 connection"), "{outcome:?}");
    expect_relayed(&old.0, &old.1)?;
    drop(old);
    ensure!(forwarder.wait(PATIENCE)?.is_some(), "the old process stays");
    expect_status(&forwarder, 0, None)?;
    ask(&forwarder, "sleep\n")?;
    ensure!(ends(successor)?, "the successor stays");
    forwarder.expect_nothing_left()
}

#[test]
fn a_new_program_that_does_not_start_changes_nothing() -> Result<()> {
    require_namespaces!();
    let (mut notify, mut scene, forwarder) = ready(|setup| setup.copy())?;
    let (service, old) = relaying(&mut scene)?;
    // As a package manager does it: another file in its place.
    std::fs::remove_file(forwarder.program())?;
    bro_tests::forwarder::script(forwarder.program().parent().context("a folder")?, "bro", "exit 3")?;
    forwarder.signal(Signal::SIGHUP)?;
    notify.wait_anew(PATIENCE, |line| line == "RELOADING=1")?;
    notify.wait_anew(PATIENCE, |line| line == "READY=1")?;
    forwarder.log().line(PATIENCE, |line| line.contains("cannot reload, and goes on as before"))?;
    expect_relayed(&old.0, &old.1)?;
    let new = (scene.client()?, service.accept()?);
    expect_relayed(&new.0, &new.1)?;
    ensure!(forwarder.report()?.total.open == 2, "{:?}", forwarder.report());
    drop((old, new));
    forwarder.stop().map(drop)
}

/// An ordinary user, by number.
const USER: u32 = 4001;

/// A forwarder that has the rights to load the kernel relay until it has done so, and its site.
fn with_rights(connections: &str) -> Result<(Notify, Site)> {
    let notify = Notify::new_abstract()?;
    let address = Family::Tcp4.loopback().context("TCP has a loopback address")?;
    let (front, service) = (Listener::new(&Here, &address)?, Listener::new(&Here, &address)?);
    let setup = Setup::new().ambient(USER).socket(&front).env("NOTIFY_SOCKET", notify.name());
    // Not auto, which is splice where the kernel answers FIONREAD wrongly.
    let setup = setup.args(["--relay=sockmap", connections]).arg(service.address().to_string());
    Ok((notify, Site { forwarder: setup.start()?, front, service }))
}

/// Reloads, and waits until the successor alone accepts.
fn reload_site(site: &Site, notify: &mut Notify, mains: &mut Vec<i32>) -> Result<()> {
    let main = *mains.last().context("a main process")?;
    kill(Pid::from_raw(main), Signal::SIGHUP)?;
    let successor = newest_main(notify, mains)?;
    let replaced = format!("Replaced by process {successor}");
    site.forwarder.log().line(PATIENCE, |line| line.contains(&replaced))?;
    mains.push(successor);
    Ok(())
}

/// A reload for which the kernel relay has no place. It was insisted on, so no successor does without it: `main` goes on.
fn expect_no_reload(site: &Site, main: i32) -> Result<()> {
    kill(Pid::from_raw(main), Signal::SIGHUP)?;
    for said in ["no place for the successor", "cannot reload, and goes on as before"] {
        site.forwarder.log().line(PATIENCE, |line| line.contains(said))?;
    }
    Ok(())
}

fn expect_no_capability(pid: i32) -> Result<()> {
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = std::fs::read_to_string(thread?.path().join("status"))?;
        for set in ["CapPrm:", "CapEff:", "CapAmb:"] {
            let held = status.lines().find(|line| line.starts_with(set)).context(set)?;
            ensure!(held.ends_with("\t0000000000000000"), "process {pid}: {held}");
        }
    }
    Ok(())
}

#[test]
fn the_kernel_relay_goes_on_in_a_successor_without_rights() -> Result<()> {
    bro_tests::require_bpf!();
    let (mut notify, site) = with_rights("--connections-max=64")?;
    let programs = site.forwarder.kernel_relay()?;
    site.expect_lane(USER)?;
    let mut mains = vec![site.forwarder.pid()];
    expect_no_capability(mains[0])?;
    let old = site.connect(USER)?;
    expect_relayed(&old.0, &old.1)?;

    for seat in ["seat 2 of 4", "seat 3 of 4", "seat 4 of 4"] {
        reload_site(&site, &mut notify, &mut mains)?;
        let inherited = format!("the kernel relay is the predecessor's ({seat})");
        site.forwarder.log().line(PATIENCE, |line| line.contains(&inherited))?;
        expect_no_capability(*mains.last().context("the successor")?)?;
        site.expect_lane(USER).with_context(|| seat.to_owned())?;
        expect_relayed(&old.0, &old.1).context("through the first process")?;
    }
    // Each of them waits for the first, and so keeps its place.
    expect_no_reload(&site, mains[3])?;
    site.expect_lane(USER).context("after a reload that was refused")?;
    drop(old);
    for main in &mains[..3] {
        ensure!(ends(*main)?, "process {main} stays without a connection");
    }
    kill(Pid::from_raw(mains[3]), Signal::SIGTERM)?;
    ensure!(ends(mains[3])?, "the last one does not end");
    programs.expect_gone()?;
    site.forwarder.expect_nothing_left()?;
    site.forwarder.expect_no_panic()
}

#[test]
fn lanes_outlive_the_process_that_has_loaded_the_programs() -> Result<()> {
    bro_tests::require_bpf!();
    let (mut notify, site) = with_rights("--connections-max=64")?;
    let programs = site.forwarder.kernel_relay()?;
    let mut mains = vec![site.forwarder.pid()];
    // The service has not been woken, so nothing is attached yet: the successor does that without any right.
    for seat in [2, 1, 2] {
        reload_site(&site, &mut notify, &mut mains)?;
        let replaced = mains[mains.len() - 2];
        ensure!(ends(replaced)?, "process {replaced} stays without a connection");
        let inherited = format!("the kernel relay is the predecessor's (seat {seat} of 4)");
        site.forwarder.log().line(PATIENCE, |line| line.contains(&inherited))?;
        site.expect_lane(USER)?;
    }
    ensure!(!programs.left().is_empty(), "others took their place");
    let last = *mains.last().context("a main process")?;
    expect_no_capability(last)?;
    // However it ends.
    kill(Pid::from_raw(last), Signal::SIGKILL)?;
    ensure!(ends(last)?, "it cannot be killed");
    ensure!(process::eventually(PATIENCE, || programs.left().is_empty()), "{:?} are left", programs.left());
    site.forwarder.expect_nothing_left()
}

#[test]
fn a_set_for_very_many_connections_has_one_place() -> Result<()> {
    bro_tests::require_bpf!();
    let (_notify, site) = with_rights("--connections-max=40000")?;
    site.forwarder.kernel_relay()?;
    let main = site.forwarder.pid();
    expect_no_reload(&site, main)?;
    site.expect_lane(USER).context("after a reload that was refused")?;
    kill(Pid::from_raw(main), Signal::SIGTERM)?;
    ensure!(ends(main)?, "the forwarder does not end");
    site.forwarder.expect_nothing_left()
}
