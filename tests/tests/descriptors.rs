//! Descriptors that one side passes over a unix socket (SCM_RIGHTS) are refused, and none is lost in silence. Credentials
//! (SCM_CREDENTIALS) are lost, and why that is so.
//!
//! Needs: a network namespace; root for two tests. Takes: seconds.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::Forwarder;
use bro_tests::peers::{Conn, Family, PATIENCE, wait_for};
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::tier::{Need, met};
use bro_tests::{process, require_namespaces};
use nix::errno::Errno;
use nix::libc;
use nix::poll::PollFlags;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, UnixCredentials, getsockopt, recvmsg, sendmsg, setsockopt,
    sockopt,
};

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
fn descriptors_are_refused_to_the_side_that_passes_them() -> Result<()> {
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

/// Another user than this process's.
const OTHER: u32 = 4711;

/// Sends a byte and says that it is the other user's, as only root may.
fn claim(through: &impl AsFd) -> Result<()> {
    let other = libc::ucred { pid: std::process::id().cast_signed(), uid: OTHER, gid: OTHER };
    let other = UnixCredentials::from(other);
    let claim = [ControlMessage::ScmCredentials(&other)];
    let fd = through.as_fd().as_raw_fd();
    sendmsg::<()>(fd, &[IoSlice::new(b"x")], &claim, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives a byte: whose it is said to be, if that is said, and what else the kernel says of it.
fn receive(from: &impl AsFd) -> Result<(Option<u32>, MsgFlags)> {
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut room = nix::cmsg_space!(UnixCredentials);
    let message = recvmsg::<()>(from.as_fd().as_raw_fd(), &mut parts, Some(&mut room), MsgFlags::empty())?;
    let user = message.cmsgs()?.find_map(|part| match part {
        ControlMessageOwned::ScmCredentials(said) => Some(said.uid()),
        _ => None,
    });
    Ok((user, message.flags))
}

/// Why they are not refused: a receiver is not told of them, or it is told of the kernel's own as well, which look the same.
#[test]
fn credentials_that_are_passed_look_like_those_that_the_kernel_adds() -> Result<()> {
    if !met("credentials_that_are_passed_look_like_those_that_the_kernel_adds", &[Need::Root]) {
        return Ok(());
    }
    let (ours, theirs) = UnixStream::pair()?;
    claim(&ours)?;
    ensure!(receive(&theirs)? == (None, MsgFlags::empty()), "who has not asked for them is told");
    setsockopt(&theirs, sockopt::PassCred, &true)?;
    claim(&ours)?;
    let passed = receive(&theirs)?;
    // A child that has become another user since the connection was made, and says nothing of itself.
    let child = Command::new("printf").arg("x").uid(OTHER).stdout(OwnedFd::from(ours)).status()?;
    ensure!(child.success(), "{child}");
    let added = receive(&theirs)?;
    ensure!(passed == added && passed.0 == Some(OTHER), "{passed:?} and {added:?} can be told apart");
    ensure!(getsockopt(&theirs, sockopt::PeerCredentials)?.uid() == 0, "it is not root who has connected");
    Ok(())
}

#[test]
fn credentials_that_are_passed_end_at_the_forwarder_and_the_bytes_do_not() -> Result<()> {
    if !met("credentials_that_are_passed_end_at_the_forwarder_and_the_bytes_do_not", &[Need::Root]) {
        return Ok(());
    }
    for relay in RELAYS {
        let mut scene = Scene::of(Family::Unix)?;
        let service = scene.serve()?;
        let forwarder = scene.start(&[relay])?;
        let (client, accepted) = (scene.client()?, service.accept()?);
        expect_relayed(&client, &accepted)?;
        setsockopt(&accepted, sockopt::PassCred, &true)?;
        claim(&client)?;
        wait_for(accepted.as_fd(), PollFlags::POLLIN, PATIENCE)?;
        // The user of who has sent it last.
        ensure!(receive(&accepted)?.0 == Some(0), "{relay}: a client's claim came through");
        expect_relayed(&client, &accepted)?;
        drop((client, accepted));
        forwarder.stop()?;
    }
    Ok(())
}
