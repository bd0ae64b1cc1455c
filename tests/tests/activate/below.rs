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

/// Links of an image are meant for the system that boots it.
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

/// Units of a tree belong to the user who made the tree, and what they name may lie beside the tree, or anywhere.
#[test]
fn what_a_trees_units_say_leads_nowhere() -> Result<()> {
    const MARKED: &str =
        "# Written by bro activate for web.container, and\n# To undo everything: bro activate web --remove\n";
    let socket = |name: &str, service: &str| {
        format!(
            "{MARKED}[Socket]\nListenStream=127.0.0.1:8080\nFileDescriptorName={service}\nService=web-activator.service\n\
             [X-Bro]\nName={name}\nExternal=127.0.0.1:8080\nInternal=127.0.0.1:80\n"
        )
    };
    let service = |sockets: &str, unit: &str, notes: &str| {
        format!(
            "{MARKED}[Service]\nExecStart=/usr/bin/bro forward\nSockets=web-activator.socket {sockets}\n[X-Bro]\nName=web\n\
             Quadlet=/etc/containers/systemd/web.container\nUnit={unit}\nContainer=systemd-web\n{notes}\n"
        )
    };
    let plain = || socket("web", "web");
    let marked = format!("{MARKED}precious\n");
    let cases = [
        ("Also=", plain(), service("", "web.service", "Also=/../outside/file")),
        ("Also= of ours", plain(), service("", "web.service", "Also=/../outside/marked.service")),
        ("Also= within", plain(), service("", "web.service", "Also=/etc/own")),
        ("Made=", plain(), service("", "web.service", "Made=/../outside/empty")),
        ("Sockets=", plain(), service("../../../../../outside/file", "web.service", "")),
        ("Sockets= of ours", plain(), service("../../../../../outside/marked.socket", "web.service", "")),
        ("Unit=", plain(), service("", "../../../../outside/marked.service", "")),
        ("Name=", socket("../../../../outside/marked", "web"), service("", "web.service", "")),
        ("FileDescriptorName=", socket("web", "../../../../outside/marked"), service("", "web.service", "")),
    ];
    for (what, socket, service) in cases {
        for arguments in [&["web", "--external-port", "127.0.0.1:8081"][..], &["web", "--remove"]] {
            let outer = Tree::new(&[
                ("outside/file", "precious\n"),
                ("outside/marked.service", &marked),
                ("outside/marked.socket", &marked),
            ])?;
            std::fs::create_dir(outer.path("outside/empty"))?;
            let units = "tree/etc/systemd/system";
            outer.write("tree/etc/containers/systemd/web.container", "[Container]\nImage=localhost/web\n")?;
            outer.write("tree/etc/own", "not written by bro\n")?;
            outer.write(&format!("{units}/web-activator.socket"), &socket)?;
            outer.write(&format!("{units}/web-activator.service"), &service)?;
            std::fs::create_dir(outer.path(&format!("{units}/sockets.target.wants")))?;
            let rest = |all: std::collections::BTreeMap<String, String>| {
                all.into_iter().filter(|(path, _)| path.starts_with("outside") || path.ends_with("/own"))
            };
            let before: Vec<_> = rest(outer.listing()?).collect();
            let mut command = Command::new(bro_tests::bro::binary());
            command.arg("activate").args(arguments).arg("--system").arg("--root").arg(outer.path("tree"));
            environment(&mut command);
            let ran = said(&mut command)?;
            let after: Vec<_> = rest(outer.listing()?).collect();
            ensure!(before == after, "{what}: {arguments:?}: {ran:?}: {after:#?}");
            ensure!(!ran.stdout.contains("outside"), "{what}: {arguments:?}: {ran:?}");
        }
    }
    Ok(())
}

/// Reading it would wait for a writer.
#[test]
fn a_pipe_among_the_units_is_not_read() -> Result<()> {
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
