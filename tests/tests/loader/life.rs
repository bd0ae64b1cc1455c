//! A set's life: replaced and removed under forwarders that use it, of another version, and without its cgroup.

use std::os::fd::AsFd as _;
use std::time::Instant;

use anyhow::{Result, ensure};
use bro_ebpf::About;
use bro_sockmap::pinned;
use bro_tests::loader::{ALICE, Site, Stage, as_user};
use bro_tests::peers::PATIENCE;
use bro_tests::scene::expect_relayed;
use bro_tests::scratch::Scratch;
use bro_tests::sys;

#[test]
fn a_set_is_replaced_under_a_forwarder_that_uses_it() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let old = stage.load(ALICE)?;
    let first = Site::start(ALICE, ALICE, &["--relay=sockmap"])?;
    first.expect_lane(ALICE)?;
    let (client, service) = first.connect(ALICE)?;
    expect_relayed(&client, &service)?;

    let new = stage.load(ALICE)?;
    expect_relayed(&client, &service)?;
    first.expect_lane(ALICE)?;
    ensure!(!old.left().is_empty(), "the old programs went under their forwarder");
    let second = Site::start(ALICE, ALICE, &["--relay=sockmap"])?;
    second.expect_lane(ALICE)?;
    ensure!(
        new.watched()?.len() == 1 && old.watched()?.len() == 1,
        "{:?} {:?}",
        new.watched(),
        old.watched()
    );

    drop((client, service));
    first.forwarder.stop()?;
    old.expect_gone()?;
    second.expect_lane(ALICE)
}

#[test]
fn a_removed_set_goes_on_for_those_who_use_it_and_then_ends() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let programs = stage.load(ALICE)?;
    let site = Site::start(ALICE, ALICE, &["--relay=sockmap"])?;
    site.expect_lane(ALICE)?;
    stage.remove(ALICE)?;
    ensure!(!pinned::folder(ALICE).exists(), "the folder is still there");
    site.expect_lane(ALICE)?;

    let later = Site::start(ALICE, ALICE, &[])?;
    later
        .forwarder
        .log()
        .line(PATIENCE, |line| line.contains("by splice") && line.contains("bro-loader@"))?;
    later.expect_no_lane(ALICE)?;

    site.forwarder.stop()?;
    programs.expect_gone()?;
    let again = String::from_utf8(stage.loader(&["--remove", &ALICE.to_string()])?.stdout)?;
    ensure!(again.contains("nothing to remove"), "{again}");
    Ok(())
}

#[test]
fn programs_of_another_version_are_not_used() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let _programs = stage.load(ALICE)?;
    let about = sys::bpf_pinned(&pinned::folder(ALICE).join("about"))?;
    sys::bpf_update(about.as_fd(), &(About::Version as u32).to_ne_bytes(), &7u64.to_ne_bytes())?;
    let site = Site::start(ALICE, ALICE, &[])?;
    site.forwarder.log().line(PATIENCE, |line| {
        line.contains("another version") && line.contains("systemctl restart bro-loader@")
    })?;
    site.expect_no_lane(ALICE)
}

#[test]
fn a_set_whose_cgroup_is_gone_says_so() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let cgroup = stage.another()?;
    let _programs = stage.load_at(ALICE, &cgroup)?;
    std::fs::remove_dir(&cgroup)?;
    // The kernel detaches the programs some time after the folder has gone (cgroup_bpf_release runs in a work queue).
    let deadline = Instant::now() + PATIENCE;
    loop {
        let site = Site::start(ALICE, ALICE, &[])?;
        let said = site.forwarder.log().line(PATIENCE, |line| line.contains("relaying by splice"))?;
        if said.contains("the cgroup that bro loader's programs looked at is gone") {
            return site.expect_no_lane(ALICE);
        }
        ensure!(Instant::now() < deadline, "the last forwarder says: {said}");
    }
}

#[test]
fn a_loader_that_was_killed_in_the_middle_is_no_obstacle() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let _programs = stage.load(ALICE)?;
    // As far as one may have come.
    std::fs::create_dir_all(format!("{}/{ALICE}-new/seats/00", pinned::ROOT))?;
    let programs = stage.load(ALICE)?;
    ensure!(
        !std::path::Path::new(&format!("{}/{ALICE}-new", pinned::ROOT)).exists(),
        "the rest is still there"
    );
    stage.remove(ALICE)?;
    programs.expect_gone()
}

/// What users themselves put into their folders is no obstacle either, and leads root nowhere.
#[test]
fn a_users_rubbish_is_no_obstacle() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let programs = stage.load(ALICE)?;
    let elsewhere = Scratch::new()?;
    std::fs::write(elsewhere.join("precious"), "")?;
    let seat = pinned::folder(ALICE).join("seats/03");
    as_user(ALICE, || {
        std::fs::create_dir_all(seat.join("deep/deeper"))?;
        std::os::unix::fs::symlink(elsewhere.path(), seat.join("deep/link"))
    })?;
    stage.remove(ALICE)?;
    ensure!(!pinned::folder(ALICE).exists(), "the folder is still there");
    ensure!(elsewhere.join("precious").exists(), "root followed the user's link");
    programs.expect_gone()
}

#[test]
fn wrong_orders_are_refused_in_a_sentence() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    for (arguments, code, says) in [
        (["no-user-of-this-name", "--connections=1"], 4, "there is no user"),
        (["0", "--connections=1"], 2, "root's forwarders"),
        (["4001", "--cgroup=/sys/nothing"], 1, "cannot be opened"),
        (["4009", "--connections=1"], 1, "neither logged in nor lingers"),
    ] {
        let ran = stage.loader(&arguments)?;
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        ensure!(said.starts_with("bro: ") && said.contains(says), "{arguments:?}: {said}");
        ensure!(ran.status.code() == Some(code), "{arguments:?}: {:?}", ran.status);
    }
    ensure!(
        std::fs::read_dir(pinned::ROOT)
            .map_or(true, |all| { !all.flatten().any(|entry| entry.path().is_dir()) }),
        "something was left behind"
    );
    Ok(())
}
