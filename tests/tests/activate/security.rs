//! `systemd-analyze security` of what is written: the score that each kind of forwarder's unit has, and may not lose.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use bro_tests::tier::{Need, find_program, met};

use crate::tree::{Tree, said};

/// Below which the units are to stay, in tenths: of the user's no more can be had, since a user's manager makes of most of what
/// counts a user namespace, out of which no container can be entered.
const CASES: &[(&str, &[&str], u32)] = &[
    ("rootful", &["web", "--system"], 20),
    ("rootful, without the kernel relay", &["web", "--system", "--relay", "splice"], 20),
    (
        "rootful, without clients' addresses too",
        &["web", "--system", "--relay", "splice", "--source", "container"],
        18,
    ),
    (
        "rootful, a container's address",
        &["net", "--system", "--network", "lan", "--bind-to-device", "lo"],
        21,
    ),
    // As another user to the service's socket, which openat2(2) finds: RestrictSUIDSGID= (0.2) forbids that.
    ("rootful, a unix target", &["web", "--system", "--internal-port", "/run/x"], 24),
    ("a user's container, by the system", &["mine", "--system", "--run-as", "test"], 13),
    ("a user's", &["mine", "--user"], 67),
    // Whatever commands these have: the service manager runs them, outside.
    ("rootful, ready when healthy", &["web", "--system", "--ready", "healthy"], 20),
    ("rootful, ready by a command", &["web", "--system", "--ready", "exec:true"], 20),
    ("rootful, busy by a command", &["web", "--system", "--busy-exec", "true"], 20),
    (
        "by the system, ready when healthy",
        &["mine", "--system", "--run-as", "test", "--ready", "healthy", "--busy-exec", "true"],
        13,
    ),
    ("a user's, ready when healthy", &["mine", "--user", "--ready", "healthy", "--busy-exec", "true"], 67),
];

fn tree() -> Result<Tree> {
    Tree::new(&[
        ("etc/passwd", "root:x:0:0::/root:/bin/sh\ntest:x:1000:1000::/home/test:/bin/sh\n"),
        ("etc/containers/systemd/web.container", "[Container]\nImage=localhost/web\nNetwork=none\n"),
        (
            "etc/containers/systemd/net.container",
            "[Container]\nImage=localhost/net\nNetwork=lan.network\nIP=10.9.8.7\n",
        ),
        ("home/test/.config/containers/systemd/mine.container", "[Container]\nImage=localhost/mine\n"),
    ])
}

/// The text of the forwarder's unit that these words make, of an image.
fn unit(words: &[&str]) -> Result<String> {
    let tree = tree()?;
    let answer = said(tree.command(words).args(["--external-port", "8080"]))?;
    ensure!(answer.code == 0, "{words:?}: {answer:?}");
    let listing = tree.listing()?;
    let unit = listing.iter().find(|(path, _)| path.ends_with("-activator.service"));
    Ok(unit.context("it wrote a service")?.1.clone())
}

#[test]
fn exposure_is_what_it_was_promised_to_be() -> Result<()> {
    let needs = [Need::Program("systemd-analyze", "systemd")];
    if !met("exposure_is_what_it_was_promised_to_be", &needs) {
        return Ok(());
    }
    let analyze = find_program("systemd-analyze").context("looked for above")?;
    let mut failures = Vec::new();
    for (what, words, limit) in CASES {
        let folder = Tree::new(&[("x.service", &unit(words)?)])?;
        let score = |limit: u32| {
            let mut command = Command::new(&analyze);
            command.args(["security", "--offline=yes", "--no-pager", &format!("--threshold={limit}")]);
            said(command.arg(folder.path("x.service")))
        };
        let answer = score(*limit)?;
        let overall =
            answer.stdout.lines().find(|line| line.contains("Overall exposure")).unwrap_or("no score");
        if answer.code != 0 {
            failures.push(format!("{what}: {overall}, more than {limit} tenths: {answer:?}"));
        }
        // It would not be a limit if anything passed.
        ensure!(score(0)?.code != 0, "{what}: systemd-analyze fails nothing");
        // Whatever it says on its standard error is about a directive that it does not know or take.
        ensure!(answer.stderr.is_empty(), "{what}: {}", answer.stderr);
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

/// What the options name stays within reach.
#[test]
fn what_it_has_to_see_is_not_hidden() -> Result<()> {
    let has = |words: &[&str], line: &str| -> Result<bool> { Ok(unit(words)?.lines().any(|it| it == line)) };
    ensure!(has(&["web", "--system"], "PrivateTmp=yes")?);
    ensure!(!has(&["web", "--system", "--busy-file", "/tmp/busy"], "PrivateTmp=yes")?);
    ensure!(has(&["mine", "--system", "--run-as", "test"], "BindPaths=-/run/user/1000")?);
    ensure!(has(
        &["mine", "--system", "--run-as", "test", "--busy-file", "/home/test/busy"],
        "ReadWritePaths=-/run/user/1000"
    )?);
    ensure!(
        has(&["web", "--system"], "PrivateNetwork=yes")?
            && has(&["web", "--system"], "IPAddressAllow=localhost")?
    );
    let lan = ["net", "--system", "--network", "lan"];
    ensure!(has(&lan, "IPAddressAllow=localhost 10.9.8.7")? && has(&lan, "PrivateNetwork=yes")?);
    // Only who has a network learns the address that a name has.
    let named = ["web", "--system", "--internal-port", "db.internal:5432"];
    ensure!(!has(&named, "PrivateNetwork=yes")? && !has(&named, "IPAddressDeny=any")?);
    Ok(())
}
