//! The forwarder's control socket: `wake`, `sleep`, and requests that are none.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Result, ensure};
use bro_tests::forwarder::{Forwarder, Setup};
use bro_tests::peers::PATIENCE;
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::{process, require_namespaces};
use bro_user::commands::status::ServiceState;
use bro_user::control_socket::Reply;

use crate::{MOMENT, wakes};

/// Sends one request, without waiting for the answer.
pub fn request(forwarder: &Forwarder, line: &[u8]) -> Result<UnixStream> {
    await_socket(forwarder)?;
    let mut stream = UnixStream::connect(forwarder.status_socket())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(line)?;
    Ok(stream)
}

fn await_socket(forwarder: &Forwarder) -> Result<()> {
    let there = || UnixStream::connect(forwarder.status_socket()).is_ok();
    ensure!(process::eventually(PATIENCE, there), "the forwarder has no socket to be asked at");
    Ok(())
}

pub fn answer(mut stream: UnixStream) -> Result<Reply> {
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(serde_json::from_str(&text)?)
}

fn ask(forwarder: &Forwarder, line: &str) -> Result<Reply> {
    answer(request(forwarder, line.as_bytes())?)
}

#[test]
fn wake_is_answered_when_the_service_is_ready() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let mut forwarder = scene.start(&["--exit-idle-time=500ms"])?;
    await_socket(&forwarder)?;
    ensure!(forwarder.report()?.activity.state == ServiceState::Asleep, "{:?}", forwarder.report()?.activity);
    let mut asked = request(&forwarder, b"wake\n")?;
    forwarder.log().line(PATIENCE, |line| line.contains("waking the service"))?;
    asked.set_read_timeout(Some(MOMENT))?;
    ensure!(asked.read(&mut [0]).is_err(), "answered although the service does not listen");
    ensure!(
        forwarder.report()?.activity.state == ServiceState::Starting,
        "{:?}",
        forwarder.report()?.activity
    );
    ensure!(forwarder.wait(Duration::from_millis(700))?.is_none(), "it left while it was told to wake");
    let _service = scene.serve()?;
    asked.set_read_timeout(Some(PATIENCE))?;
    let outcome = answer(asked)?;
    ensure!(outcome.done, "{outcome:?}");
    // The idle time counts from then on.
    let activity = forwarder.report()?.activity;
    ensure!(activity.state == ServiceState::Awake && activity.since.is_some(), "{activity:?}");
    ensure!(activity.woken_by.as_deref() == Some("bro wake"), "{activity:?}");
    let again = ask(&forwarder, "wake\n")?;
    ensure!(again.done && wakes(&forwarder) == 1, "{again:?}, {} wakes", wakes(&forwarder));
    ensure!(forwarder.wait(MOMENT)?.is_none(), "it left at once");
    forwarder.expect_exit(0)
}

#[test]
fn wake_says_when_the_service_does_not_come() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let forwarder = scene.start(&["--start-timeout=500ms"])?;
    await_socket(&forwarder)?;
    let outcome = ask(&forwarder, "wake\n")?;
    ensure!(!outcome.done && outcome.message.contains("did not listen"), "{outcome:?}");
    forwarder.stop().map(drop)
}

#[test]
fn sleep_is_refused_while_a_client_is_connected() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let mut forwarder = scene.start(&[])?;
    let (client, served) = (scene.client()?, service.accept()?);
    expect_relayed(&client, &served)?;
    let outcome = ask(&forwarder, "sleep\n")?;
    ensure!(!outcome.done, "{outcome:?}");
    ensure!(outcome.clients == [client.address()?.to_string()], "{outcome:?}");
    expect_relayed(&client, &served)?;
    let activity = forwarder.report()?.activity;
    ensure!(activity.woken_by == Some(client.address()?.to_string()), "{activity:?}");
    // Nothing has changed: others are let in.
    let other = (scene.client()?, service.accept()?);
    expect_relayed(&other.0, &other.1)?;
    drop((client, served, other));
    forwarder.closings(2)?;
    let outcome = ask(&forwarder, "sleep\n")?;
    // There is no unit here that it could stop, and it says so.
    ensure!(!outcome.done && outcome.message.contains("no --unit"), "{outcome:?}");
    forwarder.expect_exit(0)
}

#[test]
fn sleep_by_force_resets_who_is_connected() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let mut forwarder = scene.start(&[])?;
    let (client, served) = (scene.client()?, service.accept()?);
    expect_relayed(&client, &served)?;
    let _outcome = ask(&forwarder, "sleep force\n")?;
    client.expect_abort()?;
    served.expect_abort()?;
    ensure!(forwarder.closing()?.reason == "shutdown", "{:?}", forwarder.closing());
    forwarder.expect_exit(0)?;
    // The next client finds the socket listening, and the next forwarder behind it.
    let late = scene.client()?;
    let next = scene.start(&[])?;
    let served = service.accept()?;
    expect_relayed(&late, &served)?;
    drop((late, served));
    next.stop().map(drop)
}

#[test]
fn a_client_that_says_nothing_does_not_keep_it_from_being_put_to_sleep() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let mut forwarder = scene.start(&["--wake-on=data"])?;
    let silent = scene.client()?;
    scene.expect_held(&forwarder, 1)?;
    await_socket(&forwarder)?;
    let _outcome = ask(&forwarder, "sleep\n")?;
    silent.expect_eof()?;
    forwarder.expect_exit(0)
}

#[test]
fn nonsense_is_refused_and_blocks_no_other() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let forwarder = scene.start(&[])?;
    await_socket(&forwarder)?;
    for line in ["wake up\n", "SLEEP\n", "{}\n", "\u{1F634}\n"] {
        let outcome = ask(&forwarder, line)?;
        ensure!(!outcome.done && outcome.message.contains("understand"), "{line}: {outcome:?}");
    }
    // Too long, not text, and nothing at all.
    let long = request(&forwarder, &[b'x'; 60_000]);
    drop(long);
    let mut binary = request(&forwarder, &[0xff, 0xfe, b'\n'])?;
    let mut nothing = Vec::new();
    binary.read_to_end(&mut nothing).ok();
    ensure!(nothing.is_empty(), "{nothing:?}");
    let silent: Vec<UnixStream> =
        (0..10).map(|_| Ok(UnixStream::connect(forwarder.status_socket())?)).collect::<Result<_>>()?;
    let report = forwarder.report()?;
    ensure!(report.total.accepted == 0, "{report:?}");
    // Who says nothing is sent away, so that the others get their turn, however many they are.
    let more: Vec<UnixStream> =
        (0..30).map(|_| Ok(UnixStream::connect(forwarder.status_socket())?)).collect::<Result<_>>()?;
    let _report = forwarder.report()?;
    drop((silent, more));
    ensure!(wakes(&forwarder) == 0, "nonsense woke the service");
    forwarder.stop().map(drop)
}

#[test]
fn no_other_user_may_ask() -> Result<()> {
    require_namespaces!();
    if !bro_tests::tier::met("no_other_user_may_ask", &[bro_tests::tier::Need::Root]) {
        return Ok(());
    }
    let scene = Scene::new()?;
    let forwarder = scene.start(&[])?;
    await_socket(&forwarder)?;
    // Even where a file's mode would let them.
    use std::os::unix::fs::PermissionsExt as _;
    let folder = forwarder.status_socket().parent().expect("it is in a folder").to_owned();
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755))?;
    std::fs::set_permissions(forwarder.status_socket(), std::fs::Permissions::from_mode(0o666))?;
    let asks = Setup::bare().user(65534).arg("status").arg(forwarder.status_socket());
    let mut asks = asks.start()?;
    asks.expect_exit(4)?;
    forwarder.log().line(PATIENCE, |line| line.contains("another user"))?;
    let answered = forwarder.report()?;
    ensure!(answered.activity.state == ServiceState::Asleep, "{answered:?}");
    forwarder.stop().map(drop)
}
