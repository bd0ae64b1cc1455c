//! Attempts to cross the line between two users: each fails with the error that it should fail with.

use std::os::fd::AsFd as _;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use bro_ebpf::{Counter, role};
use bro_sockmap::{Maps, SenderRole, netns_cookie, pinned};
use bro_tests::bro;
use bro_tests::loader::{ALICE, BOB, Site, Stage, as_user};
use bro_tests::peers::{Address, PATIENCE};
use bro_tests::programs::Programs;
use bro_tests::scratch::Scratch;
use bro_tests::sys;

/// What was forged as another user came to nothing, and this is what it was told.
fn as_bob(what: &str) -> Result<std::process::Output> {
    let mut command = Command::new("setpriv");
    command.args([
        "--reuid",
        &BOB.to_string(),
        "--regid",
        &BOB.to_string(),
        "--clear-groups",
        "sh",
        "-c",
        what,
    ]);
    Ok(command.output()?)
}

#[test]
fn another_user_cannot_open_the_pins() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let _programs = stage.load(ALICE)?;
    let folder = pinned::folder(ALICE);
    for file in
        ["records", "watched", "routes", "targets", "senders", "totals", "about", "events-00", "link", "hook"]
    {
        let opened = as_user(BOB, || sys::bpf_pinned(&folder.join(file)));
        let error = opened.err().with_context(|| format!("{file} was opened"))?;
        ensure!(error.raw_os_error() == Some(nix::libc::EACCES), "{file}: {error}");
        let own = as_user(ALICE, || sys::bpf_pinned(&folder.join(file)));
        ensure!(own.is_ok(), "{file} is not hers: {own:?}");
    }
    for what in [
        format!("ls {}", folder.display()),
        format!("flock --nonblock {}/seats/00 true", folder.display()),
        format!("mkdir {}/seats/77", folder.display()),
        format!("mkdir {}/9999", pinned::ROOT),
        format!("rm {}/link", folder.display()),
    ] {
        let ran = as_bob(&what)?;
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        ensure!(!ran.status.success() && said.contains("Permission denied"), "{what}: {said}");
    }
    Ok(())
}

#[test]
fn only_root_loads() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let _programs = stage.load(ALICE)?;
    let scratch = Scratch::new()?;
    let copy = bro::copy(bro::binary(), scratch.path())?;
    for what in ["loader 4001", "loader --remove 4001", "loader 4002"] {
        let ran = as_bob(&format!("{} {what}", copy.display()))?;
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        ensure!(ran.status.code() == Some(5) && said.contains("only root may load"), "{what}: {said}");
    }
    ensure!(pinned::folder(ALICE).exists(), "it was removed");
    Ok(())
}

/// Bob has a set, and even one that looks at Alice's cgroup: Bob names Alice's port and Alice's namespace, and gets nothing.
#[test]
fn watching_another_users_port_hooks_nothing() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let _alices = stage.load(ALICE)?;
    let bobs = stage.load(BOB)?;
    let site = Site::start(ALICE, ALICE, &["--relay=sockmap", "--local-clients=on"])?;
    let opened = pinned::open(&pinned::folder(BOB))?.context("Bob's set")?;
    let mut maps = Maps::new(&opened.descriptors, opened.share)?;
    for (listener, role) in [(&site.service, SenderRole::Service), (&site.front, SenderRole::Client)] {
        let Address::Tcp(address) = listener.address() else { continue };
        maps.watch(netns_cookie(std::net::TcpListener::bind("127.0.0.1:0")?.as_fd())?, address.port(), role)?;
    }
    ensure!(bobs.watched()?.iter().any(|watch| watch.role == role::SERVICE), "Bob watches nothing");
    site.expect_lane(ALICE)?;
    let (near, far) = site.connect(ALICE)?;
    bro_tests::scene::expect_relayed(&near, &far)?;
    ensure!(bobs.total(Counter::Hooked)? == 0 && bobs.hooked()? == 0, "Alice's sockets are in Bob's map");
    ensure!(bobs.total(Counter::Watched)? == 0, "Bob learned of Alice's service");
    ensure!(bobs.total(Counter::Foreign)? > 0, "whose they are was not asked");
    let mut heard = 0;
    maps.drain_events(|_| heard += 1);
    ensure!(heard == 0, "{heard} events told Bob of Alice's connections");
    Ok(())
}

/// `sudo`, or a setuid program: another user's process in Alice's cgroup.
#[test]
fn another_users_service_in_the_same_cgroup_is_not_hooked() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let programs = stage.load(ALICE)?;
    for owner in [BOB, 0, 8_000_033] {
        let site = Site::start(ALICE, owner, &["--relay=sockmap"])?;
        site.seated()?;
        site.expect_no_lane(ALICE)?;
        // The programs count, and Alice's forwarder tells.
        let line = site.forwarder.log().line(PATIENCE, |line| line.contains("of other users alone"))?;
        ensure!(line.contains("foreign="), "{line}");
        site.forwarder.stop()?;
    }
    ensure!(programs.total(Counter::Hooked)? == 0, "something was hooked");
    ensure!(programs.total(Counter::Foreign)? > 0, "whose they are was not asked");
    Ok(())
}

/// Root within a container is no more than the container's owner outside, and what the owner has is not to be seen inside.
#[test]
fn root_of_a_container_can_neither_load_nor_open() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let _programs = stage.load(ALICE)?;
    let scratch = Scratch::new()?;
    let copy = bro::copy(bro::binary(), scratch.path())?;
    // The namespaces of a container, made by Bob, and a file system for programs that may be mounted there.
    let inside = format!(
        "id -u; mkdir -p /run/x; mount -t tmpfs none /run; ls /run/bro/bpf/{ALICE}; \
         timeout 20 {} forward --relay=sockmap --listen 127.0.0.1:0 127.0.0.1:1",
        copy.display()
    );
    let ran = as_bob(&format!("unshare --user --map-root-user --mount --net sh -c '{inside}'"))?;
    let (said, complained) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    ensure!(said.starts_with("0\n"), "Bob is not root inside: {said} {complained}");
    ensure!(complained.contains("No such file"), "the pins are there: {complained}");
    ensure!(complained.contains("not permitted to") && ran.status.code() == Some(5), "{complained}");
    Ok(())
}

/// What users write into their own maps is their own trouble: numbers beyond every end come to nothing.
#[test]
fn nonsense_in_the_maps_is_an_error_and_no_more() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let _programs = stage.load(ALICE)?;
    let about = sys::bpf_pinned(&pinned::folder(ALICE).join("about"))?;
    for records in [0, 1 << 20, u64::from(u32::MAX), u64::MAX] {
        sys::bpf_update(
            about.as_fd(),
            &(bro_ebpf::About::Records as u32).to_ne_bytes(),
            &records.to_ne_bytes(),
        )?;
        let site = Site::start(ALICE, ALICE, &[])?;
        site.forwarder.log().line(PATIENCE, |line| line.contains("by splice"))?;
        site.expect_no_lane(ALICE)?;
    }
    Programs::pinned(&pinned::folder(ALICE)).map(drop)
}
