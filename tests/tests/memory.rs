//! What a forwarder that is awake costs in memory of its own, in all its processes: control process, relay process, agent.
//!
//! Needs: a network namespace. Takes: a second.

use anyhow::{Result, ensure};
use bro_tests::bro;
use bro_tests::require_namespaces;
use bro_tests::scene::{Scene, expect_relayed};

/// docs/reference.md says so. Seen: 1.1 MB, rootless and rootful (2.0 and 2.7 before property caches and the parser of all
/// subcommands went).
const PACKAGED_KIB: u64 = 1536;

/// A debug build has more of everything.
const DEBUG_KIB: u64 = 4096;

#[test]
fn a_forwarder_that_is_awake_has_little_of_its_own() -> Result<()> {
    require_namespaces!();
    // Two of them: what they share, the program's pages, is the system's.
    let mut scenes = [Scene::new()?, Scene::new()?];
    let mut awake = Vec::new();
    for scene in &mut scenes {
        // Without the kernel relay, which needs rights that few forwarders have.
        let forwarder = scene.start(&["--relay=splice"])?;
        let service = scene.serve()?;
        let (client, served) = (scene.client()?, service.accept()?);
        expect_relayed(&client, &served)?;
        awake.push((forwarder, service, client, served));
    }
    let most = if bro::is_packaged() { PACKAGED_KIB } else { DEBUG_KIB };
    for (forwarder, ..) in &awake {
        let each = forwarder.private_kib()?;
        ensure!(each.len() == 3, "control process, relay process and agent: {each:?}");
        let all: u64 = each.iter().sum();
        ensure!(all <= most, "{all} KiB in all, of {each:?} in each of its processes; at most {most} KiB");
    }
    Ok(())
}
