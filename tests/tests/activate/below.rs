//! Below `--root DIR`, and whatever the umask: what is made, who may read it, and that nothing else is touched.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::process::Command;

use anyhow::{Result, ensure};

use crate::tree::{Tree, WEB, environment, said};

const PORT: [&str; 3] = ["web", "--external-port", "8080"];

/// A user's service manager and `bro status` read what root has written.
#[test]
fn everybody_can_read_what_is_written_whatever_the_umask() -> Result<()> {
    let tree = Tree::with_web()?;
    let mut command = Command::new("sh");
    command.args(["-c", "umask 077; exec \"$0\" activate \"$@\" --system --root \"$ROOT\""]);
    command.arg(bro_tests::bro::binary()).args(PORT).env("ROOT", tree.root());
    environment(&mut command);
    let ran = said(&mut command)?;
    ensure!(ran.code == 0, "{ran:?}");
    let mode =
        |path: &str| Ok::<_, anyhow::Error>(std::fs::metadata(tree.path(path))?.permissions().mode() & 0o777);
    for file in [
        "etc/systemd/system/web-activator.socket",
        "etc/systemd/system/web-activator.service",
        "etc/containers/systemd/web.container.d/50-bro-activator.conf",
    ] {
        ensure!(mode(file)? == 0o644, "{file}: {:o}", mode(file)?);
    }
    for directory in [
        "etc/systemd",
        "etc/systemd/system",
        "etc/systemd/system/sockets.target.wants",
        "etc/containers/systemd/web.container.d",
    ] {
        ensure!(mode(directory)? == 0o755, "{directory}: {:o}", mode(directory)?);
    }
    Ok(())
}

/// An empty directory of links may be the image's own.
#[test]
fn only_directories_that_it_made_go() -> Result<()> {
    for (there, made) in [
        ("etc/systemd/system/sockets.target.wants", None),
        ("etc/systemd/system", Some("etc/systemd/system/sockets.target.wants")),
        ("etc", Some("etc/systemd")),
    ] {
        let tree = Tree::with_web()?;
        std::fs::create_dir_all(tree.path(there))?;
        let before = tree.listing()?;
        let ran = tree.run(&PORT)?;
        ensure!(ran.code == 0, "{ran:?}");
        ensure!(made.is_none_or(|made| tree.path(made).is_dir()), "{made:?} was not made");
        let ran = tree.run(&["web", "--remove"])?;
        ensure!(ran.code == 0 && tree.listing()? == before, "{there}: {ran:?} {:#?}", tree.listing()?);
    }
    Ok(())
}

/// Links of an image are meant for whoever boots it.
#[test]
fn an_absolute_link_leads_nowhere() -> Result<()> {
    let outside = Tree::new(&[("quadlets/web.container", "[Container]\nImage=localhost/outside\n")])?;
    for link in ["etc/systemd", "etc/systemd/system", "etc/containers/systemd"] {
        let tree = Tree::new(&[])?;
        if !link.starts_with("etc/containers") {
            tree.write(WEB, "[Container]\nImage=localhost/web\n")?;
        }
        std::fs::create_dir_all(tree.path(link).parent().expect("it lies in a directory"))?;
        symlink(outside.path("quadlets"), tree.path(link))?;
        let before = (tree.listing()?, outside.listing()?);
        for arguments in [&PORT[..], &["web", "--external-port", "8080", "--dry-run"], &["web", "--remove"]] {
            let ran = tree.run(arguments)?;
            ensure!(ran.code != 0 && ran.stderr.lines().count() == 1, "{link}: {arguments:?}: {ran:?}");
            if arguments.len() > 2 {
                ensure!(
                    ran.code == 2 && ran.stderr.contains("leads out of"),
                    "{link}: {arguments:?}: {ran:?}"
                );
            }
        }
        ensure!((tree.listing()?, outside.listing()?) == before, "{link}: something has changed");
    }
    Ok(())
}

/// Reading it would wait for somebody who writes.
#[test]
fn a_pipe_among_the_units_is_nobodys() -> Result<()> {
    let tree = Tree::with_web()?;
    let units = tree.path("etc/systemd/system");
    std::fs::create_dir_all(&units)?;
    nix::unistd::mkfifo(&units.join("other-activator.socket"), nix::sys::stat::Mode::S_IRWXU)?;
    let ran = tree.run(&PORT)?;
    ensure!(ran.code == 0, "{ran:?}");
    let ran = tree.run(&["web", "--remove"])?;
    ensure!(ran.code == 0 && units.join("other-activator.socket").exists(), "{ran:?}");
    Ok(())
}

/// Both can listen there.
#[test]
fn a_published_port_of_another_address_is_a_way_past_and_no_clash() -> Result<()> {
    let quadlet = "[Container]\nImage=localhost/web\nPublishPort=127.0.0.2:18080:80\n";
    let tree = Tree::new(&[(WEB, quadlet)])?;
    let ran = tree.run(&["web", "--external-port", "127.0.0.1:18080"])?;
    ensure!(ran.code == 0 && ran.stderr.contains("a way in past bro"), "{ran:?}");
    let ran = tree.run(&["web", "--external-port", "18080"])?;
    ensure!(ran.code == 0 && ran.stderr.contains("takes port 18080 as well"), "{ran:?}");
    Ok(())
}
