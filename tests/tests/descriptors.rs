//! Descriptors that one side passes over a unix socket (SCM_RIGHTS) are refused, and nobody loses one in silence.

use std::io::IoSlice;
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::Forwarder;
use bro_tests::peers::{Conn, Family, PATIENCE};
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::{process, require_namespaces};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

const RELAYS: [&str; 3] = ["--relay=splice", "--relay=copy", "--relay=auto"];

/// Sends bytes and this many descriptors.
fn pass(through: &Conn, bytes: &[u8], count: usize) -> nix::Result<usize> {
    let descriptors: Vec<RawFd> = vec![0; count];
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let fd = through.as_fd().as_raw_fd();
    sendmsg::<()>(fd, &[IoSlice::new(bytes)], &rights, MsgFlags::MSG_NOSIGNAL, None)
}

/// Refused at once, and then the connection is as before; or, on an older kernel, ended with a line that says why.
fn expect_refused(sender: &Conn, other: &Conn, forwarder: &Forwarder) -> Result<()> {
    match pass(sender, b"with", 3) {
        Err(Errno::EPERM) => expect_relayed(sender, other),
        Err(errno) => Err(errno.into()),
        Ok(_) => {
            let closing = forwarder.closing()?;
            ensure!(closing.reason == "descriptors", "{closing:?}");
            Ok(())
        }
    }
}

#[test]
fn descriptors_are_refused_to_whoever_passes_them() -> Result<()> {
    require_namespaces!();
    for relay in RELAYS {
        for client_passes in [true, false] {
            let mut scene = Scene::of(Family::Unix)?;
            let service = scene.serve()?;
            let forwarder = scene.start(&[relay])?;
            let client = scene.client()?;
            let accepted = service.accept()?;
            expect_relayed(&client, &accepted)?;
            let (sender, other) = if client_passes { (&client, &accepted) } else { (&accepted, &client) };
            expect_refused(sender, other, &forwarder).with_context(|| format!("{relay} {client_passes}"))?;
            drop((client, accepted));
            forwarder.stop()?;
        }
    }
    Ok(())
}

/// As soon as it is accepted, before a byte has gone the other way.
#[test]
fn a_service_that_passes_descriptors_first_is_refused_too() -> Result<()> {
    require_namespaces!();
    for relay in RELAYS {
        let mut scene = Scene::of(Family::Unix)?;
        let service = scene.serve()?;
        let forwarder = scene.start(&[relay])?;
        let (client, accepted) = (scene.client()?, service.accept()?);
        expect_refused(&accepted, &client, &forwarder).with_context(|| relay.to_owned())?;
        drop((client, accepted));
        forwarder.stop()?;
    }
    Ok(())
}

/// Sent while only systemd listened: nothing had told the kernel to refuse them.
#[test]
fn what_was_sent_before_the_forwarder_was_there_ends_the_connection() -> Result<()> {
    require_namespaces!();
    for relay in RELAYS {
        let mut scene = Scene::of(Family::Unix)?;
        let service = scene.serve()?;
        let client = scene.client()?;
        client.send(b"first")?;
        ensure!(pass(&client, b"with", 200) == Ok(4));
        // And one that has only bytes, which all arrive.
        let honest = scene.client()?;
        honest.send(b"ping")?;
        let forwarder = scene.start(&[relay])?;
        let before = process::descriptors(forwarder.relay())?.len();
        let closing = forwarder.closing().with_context(|| relay.to_owned())?;
        ensure!(closing.reason == "descriptors" && closing.to_service <= 5, "{relay}: {closing:?}");
        forwarder.log().line(PATIENCE, |line| line.contains("the client passed descriptors"))?;
        let after = process::descriptors(forwarder.relay())?.len();
        ensure!(after < before + 100, "{relay}: {before} descriptors, and then {after}");
        // In the order in which they came.
        let (first, second) = (service.accept()?, service.accept()?);
        let mut bytes = [0; 4];
        second.recv_exact(&mut bytes)?;
        ensure!(&bytes == b"ping", "{relay}: {bytes:?} came");
        drop((client, honest, first, second));
        forwarder.stop()?;
    }
    Ok(())
}
