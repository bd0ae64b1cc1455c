//! Bytes that all take the lane count as the connection's; readers that do not read; streams that leave the lane; many connections.

use super::*;

#[test]
fn bytes_that_all_take_the_lane_keep_a_connection_alive() -> Result<()> {
    bro_tests::require_bpf!();
    let rig = Rig::with(Lane::BothLanes, Legs::TCP4, |setup| setup.arg("--idle-timeout=1s"))?;
    let (client, service) = talking(&rig)?;
    let begin = std::time::Instant::now();
    let before = kernel_bytes(forwarder(&rig)?)?;
    let mut at = 0;
    while begin.elapsed() < Duration::from_millis(3500) {
        service.pour(DOWN, at, at + 100).context("cut although it was not idle")?;
        client.drink(DOWN, at, at + 100).context("cut although it was not idle")?;
        at += 100;
        // A trickle, far more often than the timeout: a pause, not a wait for something.
        std::thread::sleep(Duration::from_millis(200));
    }
    // Silence does end it.
    client.read_to_end().context("silence never ended it")?;
    let closing = forwarder(&rig)?.closing()?;
    ensure!(closing.reason == "idle-timeout", "{closing:?}");
    ensure!(closing.to_client >= at, "{closing:?}");
    let moved = kernel_bytes(forwarder(&rig)?)? - before;
    ensure!(moved >= at, "{moved} of {at} bytes took the lane: nothing was tested");
    drop(service);
    rig.finish()
}

/// The same for the forwarder's own idle exit, which counts bytes that woke no service.
#[test]
fn bytes_that_all_take_the_lane_keep_the_service_awake() -> Result<()> {
    bro_tests::require_bpf!();
    let idle = |setup: Setup| setup.arg("--idle-by=bytes").arg("--exit-idle-time=1s");
    let rig = Rig::with(Lane::BothLanes, Legs::TCP4, idle)?;
    let (client, service) = talking(&rig)?;
    let begin = std::time::Instant::now();
    let before = kernel_bytes(forwarder(&rig)?)?;
    let (mut at, mut moved) = (0, 0);
    while begin.elapsed() < Duration::from_millis(3500) {
        service.pour(DOWN, at, at + 100).context("left although bytes moved")?;
        client.drink(DOWN, at, at + 100).context("left although bytes moved")?;
        at += 100;
        moved = kernel_bytes(forwarder(&rig)?)? - before;
        std::thread::sleep(Duration::from_millis(200));
    }
    ensure!(moved >= at, "{moved} of {at} bytes took the lane: nothing was tested");
    let last = std::time::Instant::now();
    ensure!(client.read_to_end()?.1 == End::Eof, "a connection that slept was reset");
    ensure!(last.elapsed() >= Duration::from_millis(700), "left {:?} after the last byte", last.elapsed());
    let closing = forwarder(&rig)?.closing()?;
    ensure!(closing.reason == "idle-exit" && closing.relay == "sockmap", "{closing:?}");
    Ok(())
}

#[test]
fn a_reader_who_does_not_read_stops_the_sender_and_costs_nothing() -> Result<()> {
    bro_tests::require_bpf!();
    let rig = rig()?;
    let (client, service, sent) = in_mid_stream(&rig)?;
    ensure!(kernel_bytes(forwarder(&rig)?)? > 0, "no byte took the lane: nothing was tested");
    forwarder(&rig)?.expect_no_spin(Duration::from_millis(1000))?;
    std::thread::scope(|scope| -> Result<()> {
        let sender = scope.spawn(|| -> Result<()> {
            service.pour(DOWN, sent, sent + MIB)?;
            Ok(service.close_writing()?)
        });
        client.drink(DOWN, 0, sent + MIB)?;
        client.expect_eof()?;
        sender.join().expect("the sender does not panic")
    })?;
    drop((client, service));
    rig.finish()
}

/// An echo of a megabyte is a flow in bulk both ways: its lanes are closed while both ends send. A send that was to go through a lane
/// when that happened once failed with EPIPE, two or three times in a thousand.
#[test]
fn a_stream_is_not_cut_off_where_it_leaves_its_lane() -> Result<()> {
    const ROUNDS: usize = 1000;
    bro_tests::require_bpf!();
    let rig = rig()?;
    for round in 0..ROUNDS {
        let (client, service) = rig.pair()?;
        let echoed = std::thread::scope(|scope| {
            let serving = scope.spawn(|| -> Result<()> {
                let mut buffer = vec![0; 64 * 1024];
                loop {
                    match service.recv(&mut buffer).context("the service reads")? {
                        0 => return Ok(service.close_writing()?),
                        got => service.send(&buffer[..got]).context("the service answers")?,
                    }
                }
            });
            // In turn at first, so that there are lanes.
            for _ in 0..4 {
                client.send(b"turn")?;
                client.recv_exact(&mut [0; 4])?;
            }
            let sending = scope.spawn(|| -> Result<()> {
                client.pour(UP, 0, MIB).context("the client sends")?;
                Ok(client.close_writing()?)
            });
            let came = client.drink_to_end(UP, 0).context("the client reads")?;
            serving.join().expect("the service does not panic")?;
            sending.join().expect("the client does not panic")?;
            ensure!(came == (MIB, End::Eof), "{came:?} came back");
            anyhow::Ok(())
        });
        echoed.with_context(|| format!("connection {round}"))?;
    }
    ensure!(kernel_bytes(forwarder(&rig)?)? > 0, "no connection had lanes");
    rig.finish()
}

#[test]
fn thousands_of_short_connections_leave_nothing() -> Result<()> {
    bro_tests::require_bpf!();
    short::leave_nothing(10_000)
}
