//! Users who may not have the kernel relay.

use super::*;

#[test]
fn an_ordinary_user_who_insists_is_told_why_not() -> Result<()> {
    bro_tests::require_bpf!();
    let service = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
    let front = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
    let setup = Setup::new().user(NOBODY).arg("--relay=sockmap").socket(&front);
    let mut forwarder = setup.arg(service.address().to_string()).start()?;
    forwarder.expect_exit(5)?;
    let lines = forwarder.log().lines();
    ensure!(
        lines.len() == 1 && lines[0].starts_with("bro: ") && lines[0].contains("CAP_BPF"),
        "not one sentence alone, that tells the mend: {lines:#?}"
    );
    Ok(())
}

#[test]
fn an_ordinary_user_who_does_not_insist_is_served_and_told_once() -> Result<()> {
    bro_tests::require_bpf!();
    let service = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
    let front = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
    let setup = Setup::new().user(NOBODY).arg("--relay=auto").socket(&front);
    let forwarder = setup.arg(service.address().to_string()).start()?;
    forwarder.log().line(PATIENCE, |line| line.contains("without the kernel relay"))?;
    warm(&forwarder, &front, &service, 3)?;
    let client = Conn::new(&Here, front.address())?;
    let served = service.accept()?;
    std::thread::scope(|scope| -> Result<()> {
        let sender = scope.spawn(|| -> Result<()> {
            served.pour(DOWN, 0, 4 * MIB)?;
            Ok(served.close_writing()?)
        });
        client.drink(DOWN, 0, 4 * MIB)?;
        client.expect_eof()?;
        sender.join().expect("the sender does not panic")
    })?;
    drop((client, served));
    let closings = forwarder.closings(4)?;
    ensure!(closings.iter().all(|closing| closing.relay == "splice"), "{closings:?}");
    let log = forwarder.stop()?;
    let says_why = |line: &&String| line.contains("kernel relay") || line.contains("sockmap");
    let lines = log.lines();
    ensure!(lines.iter().filter(says_why).count() == 1, "not exactly one line says why: {lines:#?}");
    ensure!(log.complaints().is_empty(), "{:?}", log.complaints());
    Ok(())
}
