//! As whom a service's unix socket is connected to (`--unix-identity`): what the service sees of its clients, and who is not let in.
//!
//! Needs: root. Takes: seconds.

use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::{Forwarder, Setup};
use bro_tests::netns::{Namespace, Owner};
use bro_tests::peers::{Address, Conn, Family, Here, Listener};
use bro_tests::scene::expect_relayed;
use bro_tests::scratch::Scratch;
use bro_tests::tier::{Need, met};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::{User, chown};

/// A service's socket that everybody may open, and a listener for clients over TCP.
struct Site {
    front: Listener,
    service: Listener,
    path: PathBuf,
    scratch: Scratch,
}

impl Site {
    fn new() -> Result<Self> {
        let scratch = Scratch::new()?;
        let path = scratch.join("service");
        let service = Listener::new(&Here, &Address::Unix(path.clone()))?;
        let front = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
        let site = Self { front, service, path, scratch };
        site.mode(0o666)?;
        Ok(site)
    }

    fn mode(&self, mode: u32) -> Result<()> {
        Ok(std::fs::set_permissions(&self.path, std::fs::Permissions::from_mode(mode))?)
    }

    fn setup(&self, identity: &str) -> Setup {
        Setup::new().socket(&self.front).arg(&self.path).arg(format!("--unix-identity={identity}"))
    }

    fn client(&self) -> Result<Conn> {
        Conn::new(&Here, self.front.address())
    }

    /// The user and the group that the service sees of a client.
    fn seen(&self, forwarder: &Forwarder) -> Result<(u32, u32)> {
        let client = self.client()?;
        let accepted = self.service.accept().with_context(|| format!("{:#?}", forwarder.log().lines()))?;
        expect_relayed(&client, &accepted)?;
        let seen = getsockopt(&accepted.as_fd(), sockopt::PeerCredentials)?;
        Ok((seen.uid(), seen.gid()))
    }
}

fn root_is_there(name: &str) -> bool {
    met(name, &[Need::Root])
}

#[test]
fn a_client_over_tcp_is_no_user_to_the_service() -> Result<()> {
    if !root_is_there("a_client_over_tcp_is_no_user_to_the_service") {
        return Ok(());
    }
    for relay in ["splice", "copy", "auto"] {
        let site = Site::new()?;
        let forwarder = site.setup("unused").arg(format!("--relay={relay}")).start()?;
        for _ in 0..3 {
            let (uid, gid) = site.seen(&forwarder)?;
            ensure!(uid == gid && (65520..=65531).contains(&uid), "the service sees {uid}:{gid}");
            ensure!(User::from_uid(uid.into())?.is_none(), "{uid} is a user");
        }
        forwarder.stop()?;
    }
    Ok(())
}

#[test]
fn an_identity_that_was_named_is_the_one_that_is_seen() -> Result<()> {
    if !root_is_there("an_identity_that_was_named_is_the_one_that_is_seen") {
        return Ok(());
    }
    for (identity, seen) in [("33", (33, 33)), ("33:7", (33, 7)), ("0", (0, 0)), ("forwarder", (0, 0))] {
        let site = Site::new()?;
        let forwarder = site.setup(identity).start()?;
        ensure!(site.seen(&forwarder)? == seen, "{identity}: {:?}", site.seen(&forwarder)?);
        forwarder.stop()?;
    }
    Ok(())
}

/// The service is in another namespace, its files are another process's, and both are asked for by that process.
#[test]
fn a_process_of_a_container_has_the_same_stranger_for_a_client() -> Result<()> {
    if !root_is_there("a_process_of_a_container_has_the_same_stranger_for_a_client") {
        return Ok(());
    }
    let (site, namespace) = (Site::new()?, Namespace::new()?);
    for way in [site.setup("unused").pid(&namespace), site.setup("unused").netns(&namespace)] {
        let forwarder = way.start()?;
        let (uid, _) = site.seen(&forwarder)?;
        ensure!((65520..=65531).contains(&uid), "the service sees {uid}");
        forwarder.stop()?;
    }
    Ok(())
}

/// One id is mapped, the owner's: there is no other to be, and the client is not let in as the owner.
#[test]
fn a_container_without_another_id_is_a_sentence() -> Result<()> {
    if !root_is_there("a_container_without_another_id_is_a_sentence") {
        return Ok(());
    }
    let (site, namespace) = (Site::new()?, Namespace::owned_by(Owner::UserNamespace)?);
    for (identity, words) in
        [("unused", "no id of the container's is free"), ("5", "is no id of the container's")]
    {
        let words = if identity == "5" { "that is no id of the container's" } else { words };
        let mut forwarder = site.setup(identity).pid(&namespace).start()?;
        site.client()?.expect_abort()?;
        forwarder.log().line(bro_tests::peers::PATIENCE, |line| line.contains(words))?;
        ensure!(
            site.service.try_accept(std::time::Duration::ZERO)?.is_none(),
            "the service was connected to"
        );
        ensure!(forwarder.is_running()?, "the forwarder has ended");
        forwarder.stop()?;
    }
    Ok(())
}

#[test]
fn a_socket_that_is_closed_to_that_user_is_a_sentence() -> Result<()> {
    if !root_is_there("a_socket_that_is_closed_to_that_user_is_a_sentence") {
        return Ok(());
    }
    let site = Site::new()?;
    let forwarder = site.setup("unused").start()?;
    let refused = |count: usize| -> Result<()> {
        site.client()?.expect_abort()?;
        let closing = forwarder.closings(count)?.pop().context("a line")?;
        ensure!(closing.reason == "refused", "{closing:?}");
        Ok(())
    };
    site.mode(0o660)?;
    refused(1)?;
    // The folder counts as well as the socket.
    site.mode(0o666)?;
    let folder = |mode| std::fs::set_permissions(site.scratch.path(), std::fs::Permissions::from_mode(mode));
    folder(0o700)?;
    refused(2)?;
    let said = forwarder.log().lines();
    let said =
        said.iter().filter(|line| line.contains("does not let the user in as whom this forwarder connects"));
    ensure!(said.count() == 1, "{:#?}", forwarder.log().lines());
    folder(0o755)?;
    ensure!(site.seen(&forwarder)?.0 != 0);
    forwarder.stop()?;
    // A user who may open it, by the group.
    site.mode(0o660)?;
    chown(&site.path, Some(1.into()), Some(7.into()))?;
    let forwarder = site.setup("33:7").start()?;
    ensure!(site.seen(&forwarder)? == (33, 7));
    forwarder.stop()?;
    Ok(())
}

/// A forwarder that can have no other id is the owner to the service: that is granted by name only.
#[test]
fn an_ordinary_user_is_told_at_the_start() -> Result<()> {
    if !root_is_there("an_ordinary_user_is_told_at_the_start") {
        return Ok(());
    }
    for identity in ["unused", "4711"] {
        let site = Site::new()?;
        let mut forwarder = site.setup(identity).user(4711).start()?;
        forwarder.expect_exit(5)?;
        let lines = forwarder.log().lines();
        ensure!(lines.iter().any(|line| line.contains("--unix-identity=forwarder")), "{lines:#?}");
    }
    let site = Site::new()?;
    let forwarder = site.setup("forwarder").user(4711).start()?;
    ensure!(site.seen(&forwarder)? == (4711, 4711));
    forwarder.stop()?;
    Ok(())
}
