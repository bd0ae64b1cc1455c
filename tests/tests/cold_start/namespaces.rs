//! A namespace that is another one the next time: what `--netns` names leads to where the container is now.

use super::*;

/// The file that `--netns` names leads to another namespace after the container's restart.
fn follows_the_file(
    scene: &Scene,
    forwarder: &Forwarder,
    swap: impl FnOnce() -> Result<Namespace>,
) -> Result<()> {
    let target = Address::Tcp(scene.target().parse()?);
    let old = Listener::new(&scene.namespace, &target)?;
    let first = (scene.client()?, old.accept()?);
    expect_relayed(&first.0, &first.1)?;
    let fresh = swap()?;
    let client = scene.client()?;
    client.send(b"ping")?;
    // Neither the old namespace's service, which is still there, nor a reset, though the new one is not up yet.
    ensure!(old.try_accept(MOMENT)?.is_none(), "the dead namespace got the connection");
    ensure!(client.stays_silent(Duration::ZERO)?, "ended instead of held");
    let new = Listener::new(&fresh, &target)?;
    let served = new.accept().context("in the new namespace")?;
    served.recv_exact(&mut [0; 4])?;
    served.send(b"pong")?;
    client.recv_exact(&mut [0; 4])?;
    expect_relayed(&first.0, &first.1).context("a connection from before goes on")?;
    drop((first, client, served));
    forwarder.closings(2).map(drop)
}

/// A scene whose target's port is known but free in every namespace.
fn scene_with_free_port() -> Result<Scene> {
    let mut scene = Scene::new()?;
    drop(scene.serve()?);
    Ok(scene)
}

#[test]
fn a_namespace_made_anew_at_the_same_path_gets_the_next_connection() -> Result<()> {
    require_namespaces!();
    let scene = scene_with_free_port()?;
    let path = scene.folder().join("ns");
    std::os::unix::fs::symlink(scene.namespace.path(), &path)?;
    let setup = Setup::new().socket(&scene.front).arg("--netns").arg(&path).arg(scene.target());
    let forwarder = setup.start()?;
    follows_the_file(&scene, &forwarder, || {
        let fresh = Namespace::new()?;
        let next = scene.folder().join("next");
        std::os::unix::fs::symlink(fresh.path(), &next)?;
        std::fs::rename(&next, &path)?;
        Ok(fresh)
    })?;
    forwarder.stop().map(drop)
}

#[test]
fn a_namespace_pinned_anew_at_the_same_path_gets_the_next_connection() -> Result<()> {
    if !bro_tests::tier::met("a_namespace_pinned_anew", &[Need::Root]) {
        return Ok(());
    }
    let scene = scene_with_free_port()?;
    let path = scene.folder().join("ns");
    let pinned = Pinned::new(&scene.namespace, path.clone())?;
    let setup = Setup::new().socket(&scene.front).arg("--netns").arg(&path).arg(scene.target());
    let forwarder = setup.start()?;
    let mut next = None;
    follows_the_file(&scene, &forwarder, || {
        drop(pinned);
        let fresh = Namespace::new()?;
        next = Some(Pinned::new(&fresh, path.clone())?);
        Ok(fresh)
    })?;
    forwarder.stop()?;
    drop(next);
    Ok(())
}

#[test]
fn a_path_that_is_gone_resets_the_client_and_works_again_when_it_is_back() -> Result<()> {
    require_namespaces!();
    let scene = scene_with_free_port()?;
    let path = scene.folder().join("ns");
    std::os::unix::fs::symlink(scene.namespace.path(), &path)?;
    let setup = Setup::new().socket(&scene.front).arg("--netns").arg(&path).arg("--start-timeout=1s");
    let mut forwarder = setup.arg(scene.target()).start()?;
    let service = Listener::new(&scene.namespace, &Address::Tcp(scene.target().parse()?))?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    drop(pair);
    std::fs::remove_file(&path)?;
    scene.client()?.expect_abort().context("a client while the namespace is gone")?;
    let closings = forwarder.closings(2)?;
    // The first one may still have been closing.
    let second =
        closings.iter().find(|closing| closing.conn == 2).context("a line about the second client")?;
    ensure!(second.reason.starts_with("start-"), "{closings:?}");
    ensure!(forwarder.is_running()?, "it has ended");
    std::os::unix::fs::symlink(scene.namespace.path(), &path)?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    drop(pair);
    forwarder.stop().map(drop)
}
