//! A forwarder, a service or a client is killed in mid-stream.

use super::*;

#[test]
fn a_killed_forwarder_leaves_nothing_in_the_kernel() -> Result<()> {
    bro_tests::require_bpf!();
    let rig = rig()?;
    let (client, service, sent) = in_mid_stream(&rig)?;
    let programs = programs(&rig)?;
    let pid = forwarder(&rig)?.pid();
    ensure!(!programs.left().is_empty(), "nothing to leave behind");
    forwarder(&rig)?.signal(Signal::SIGKILL)?;
    ensure!(process::ends(pid, PATIENCE)?, "it survived SIGKILL");
    expect_cut(&client, sent).context("the client")?;
    service.expect_sending_fails().context("the service")?;
    programs.expect_gone()
}

#[test]
fn a_service_killed_in_mid_stream_is_an_abort() -> Result<()> {
    bro_tests::require_bpf!();
    let rig = rig()?;
    let (client, service, sent) = in_mid_stream(&rig)?;
    // What the kernel does to a killed process' socket with bytes unread: a reset.
    client.send(b"never read")?;
    ensure!(!service.stays_silent(PATIENCE)?, "the client's bytes never came");
    drop(service);
    let end = expect_cut(&client, sent)?;
    ensure!(end == End::Aborted, "a truncated stream ended with a clean end");
    forwarder(&rig)?.closings(1)?;
    programs(&rig)?.expect_nothing_in_use()?;
    rig.finish()
}

#[test]
fn a_client_killed_in_mid_stream_is_an_abort() -> Result<()> {
    bro_tests::require_bpf!();
    let rig = rig()?;
    // Its bytes unread, as a killed client's are.
    let (client, service, _) = in_mid_stream(&rig)?;
    drop(client);
    service.expect_sending_fails()?;
    forwarder(&rig)?.closings(1)?;
    programs(&rig)?.expect_nothing_in_use()?;
    rig.finish()
}
