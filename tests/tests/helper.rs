//! `bro helper`: another command in a container's network namespace, with the sockets that systemd passed.
//!
//! Needs: a network namespace; root for one test. Takes: seconds.

use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::{Forwarder, Setup, script};
use bro_tests::netns::{Namespace, Owner};
use bro_tests::peers::{Conn, Family, Here, Listener};
use bro_tests::scratch::Scratch;
use bro_tests::tier::{Need, met};
use bro_tests::{bro, process, require_namespaces};

fn helper(namespace: &Namespace) -> Setup {
    Setup::bare().args(["helper", "--pid", &namespace.pid().to_string(), "--"])
}

fn listener() -> Result<Listener> {
    Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)
}

/// What a shell script says on its standard error, when it has ended well.
fn said(setup: Setup, script: &str) -> Result<Vec<String>> {
    let mut running = setup.args(["sh", "-c", script]).start()?;
    running.expect_exit(0)?;
    Ok(running.log().lines())
}

/// One sentence, and this exit code.
fn refused(setup: Setup, code: i32, words: &str) -> Result<()> {
    let mut running: Forwarder = setup.start()?;
    running.expect_exit(code)?;
    let lines = running.log().lines();
    ensure!(lines.len() == 1 && lines[0].starts_with("bro: "), "not one sentence: {lines:#?}");
    ensure!(lines[0].contains(words), "no “{words}” in: {}", lines[0]);
    Ok(())
}

#[test]
fn the_same_process_goes_on_as_the_command_in_the_other_namespace() -> Result<()> {
    require_namespaces!();
    let (first, second) = (listener()?, listener()?);
    for owner in [Owner::Usual, Owner::UserNamespace, Owner::KeepId] {
        let namespace = Namespace::owned_by(owner)?;
        let script = "echo $LISTEN_PID $$ $LISTEN_FDS $LISTEN_FDNAMES >&2; readlink /proc/$$/ns/net >&2; \
                      cd /proc/$$/fd; echo * >&2; readlink 3 4 >&2";
        let setup = helper(&namespace).named(&first, "one").named(&second, "two");
        let lines = said(setup, script).with_context(|| format!("{owner:?}"))?;
        let words: Vec<&str> = lines[0].split(' ').collect();
        ensure!(words[0] == words[1] && words[2..] == ["2", "one:two"], "{lines:?}");
        let there = std::fs::read_link(namespace.path())?;
        ensure!(lines[1] == there.to_string_lossy(), "{lines:?} instead of {}", there.display());
        // The two, and nothing of bro's own: 5 is the folder that is being listed. (A shell has its own above 9.)
        let numbers = lines[2].split(' ').filter(|number| number.len() == 1);
        ensure!(numbers.eq(["0", "1", "2", "3", "4", "5"]), "{lines:?}");
        for (line, listener) in lines[3..].iter().zip([&first, &second]) {
            let inode = nix::sys::stat::fstat(listener.as_fd())?.st_ino;
            ensure!(*line == format!("socket:[{inode}]"), "{lines:?}");
        }
    }
    Ok(())
}

#[test]
fn the_command_serves_the_passed_socket_from_inside() -> Result<()> {
    require_namespaces!();
    let (namespace, front) = (Namespace::new()?, listener()?);
    let script = "exec \"$PEER\" echo <&3";
    let setup = helper(&namespace).socket(&front).env("PEER", bro::helper()).args(["sh", "-c", script]);
    let running = setup.start()?;
    let client = Conn::new(&Here, front.address())?;
    client.send(b"hello")?;
    let mut answer = [0; 5];
    client.recv_exact(&mut answer)?;
    ensure!(&answer == b"hello");
    let its = std::fs::read_link(format!("/proc/{}/ns/net", running.pid()))?;
    ensure!(its == std::fs::read_link(namespace.path())?, "it answers from {}", its.display());
    ensure!(process::name(running.pid()).as_deref() == Some("peer"), "another process is there");
    Ok(())
}

/// As `nsenter --preserve-credentials`: files are the caller's as before, whatever number the caller has inside.
#[test]
fn the_command_keeps_user_and_groups() -> Result<()> {
    require_namespaces!();
    let scratch = Scratch::new()?;
    let me = nix::unistd::geteuid().as_raw();
    for (owner, inside) in [(Owner::Usual, 0), (Owner::UserNamespace, 0), (Owner::KeepId, me)] {
        let namespace = Namespace::owned_by(owner)?;
        let file = scratch.join(&format!("{owner:?}"));
        let script = format!("id -u >&2; : >{}", file.display());
        let lines = said(helper(&namespace), &script)?;
        ensure!(lines == [inside.to_string()], "{owner:?}: {lines:?}");
        ensure!(std::fs::metadata(&file)?.uid() == me, "{owner:?}: another's file");
    }
    Ok(())
}

#[test]
fn what_cannot_be_is_one_sentence_with_its_exit_code() -> Result<()> {
    require_namespaces!();
    let (namespace, front, scratch) = (Namespace::new()?, listener()?, Scratch::new()?);
    let pid = namespace.pid().to_string();
    refused(Setup::bare().args(["helper", "--pid", &pid]), 2, "<CMD>")?;
    refused(Setup::bare().args(["helper", "--", "true"]), 2, "--pid")?;
    refused(
        Setup::bare().args(["helper", "--pid", &pid, "--container", "x", "--", "true"]),
        2,
        "--container",
    )?;
    refused(Setup::bare().args(["helper", "--pid", "0", "--", "true"]), 2, "--pid")?;
    refused(Setup::bare().args(["helper", "--pid", "x", "--", "true"]), 2, "--pid")?;
    // Beyond any pid_max.
    refused(Setup::bare().args(["helper", "--pid", "99999999", "--", "true"]), 4, "does not exist")?;
    refused(Setup::bare().args(["helper", "--container", "bro-none", "--", "true"]), 4, "bro-none")?;
    refused(helper(&namespace).socket(&front).launch("listen-pid=1").arg("true"), 3, "LISTEN_PID")?;
    refused(helper(&namespace).pass_nothing().launch("listen-fds=7").arg("true"), 3, "not there")?;
    refused(helper(&namespace).launch("listen-fds=x").arg("true"), 3, "LISTEN_FDS")?;
    refused(helper(&namespace).arg("bro-no-such-command"), 127, "bro-no-such-command")?;
    let plain = scratch.join("plain");
    std::fs::write(&plain, "not a program")?;
    refused(helper(&namespace).arg(&plain), 126, "cannot execute")?;
    // The command's own exit status is passed on, of course.
    let seven = script(scratch.path(), "seven", "exit 7")?;
    helper(&namespace).arg(seven).start()?.expect_exit(7)
}

#[test]
fn another_users_is_refused_whatever_it_is() -> Result<()> {
    if !met("another_users_is_refused_whatever_it_is", &[Need::Root]) {
        return Ok(());
    }
    for owner in [Owner::Usual, Owner::UserNamespace] {
        let namespace = Namespace::owned_by(owner)?;
        refused(helper(&namespace).arg("true").user(65_534), 5, "belongs to another user")?;
    }
    Ok(())
}

#[test]
fn it_goes_by_its_other_name_too() -> Result<()> {
    require_namespaces!();
    let (namespace, scratch) = (Namespace::new()?, Scratch::new()?);
    let link = scratch.join("bro-helper");
    std::os::unix::fs::symlink(bro::binary(), &link)?;
    let mut command = Command::new(&link);
    command.arg0(&link).args(["--pid", &namespace.pid().to_string(), "--", "readlink", "/proc/self/ns/net"]);
    let output = command.output()?;
    let there = std::fs::read_link(namespace.path())?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(String::from_utf8(output.stdout)?.trim_end() == there.to_string_lossy());
    Ok(())
}
