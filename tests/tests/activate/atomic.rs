//! All or nothing, and one at a time: full and read-only disks, places that may not be written, many runs at once.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::tree::{Tree, environment, said};

/// Runs a shell script in mount and user namespaces of its own, with the program as `$BRO`; its output.
fn in_own_mounts(script: &str) -> Result<String> {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-euc", script]);
    environment(&mut command);
    let answer = said(command.env("BRO", bro_tests::bro::binary()))?;
    ensure!(answer.code == 0, "{answer:?}");
    Ok(answer.stdout)
}

/// Makes a small disk at /mnt with a quadlet on it, lists it and shows the end of what bro says.
const DISK: &str = r#"
mount -t tmpfs -o size=256k,mode=755 disk /mnt
mkdir -p /mnt/etc/containers/systemd /mnt/etc/systemd/system
printf '[Container]\nImage=localhost/web\nNetwork=none\n' >/mnt/etc/containers/systemd/web.container
activate() { code=0; "$BRO" activate web --system --root /mnt "$@" >/dev/null 2>/mnt.err || code=$?; echo "exit $code"; cat /mnt.err; }
tree() { find /mnt/etc | sort; find /mnt/etc -type f | sort | xargs cat; }
"#;

fn disk() -> String {
    // A file for what bro says that is not on the disk in question.
    DISK.replace("/mnt.err", "\"$ERR\"").replacen('\n', "\nERR=$(mktemp)\ntrap 'rm -f \"$ERR\"' EXIT\n", 1)
}

#[test]
fn a_full_disk_leaves_everything_as_it_was() -> Result<()> {
    bro_tests::require_namespaces!();
    // Ever less room: from none at all to enough for one file or two.
    let script = disk()
        + r#"
before=$(tree)
left=0
while :; do
  rm -f /mnt/ballast
  head -c 262144 /dev/zero >/mnt/ballast 2>/dev/null || true
  truncate -s -$((left * 4096)) /mnt/ballast
  answer=$(activate --external-port 8080)
  case $answer in
    *'exit 0'*) break ;;
    *'No space left'*'nothing was changed'*) ;;
    *) echo "unexpected: $answer"; exit 0 ;;
  esac
  [ "$(tree)" = "$before" ] || { echo "with $left pages left: $(tree)"; exit 0; }
  left=$((left + 1))
done
echo "refused $left times"
# The same for a change of what is there.
before=$(tree)
rm -f /mnt/ballast
head -c 262144 /dev/zero >/mnt/ballast 2>/dev/null || true
answer=$(activate --exit-idle-time 1h)
[ "$(tree)" = "$before" ] || { echo "the update: $(tree)"; exit 0; }
echo "$answer"
"#;
    let said = in_own_mounts(&script)?;
    let refused: u32 = said
        .lines()
        .find_map(|line| line.strip_prefix("refused ")?.strip_suffix(" times")?.parse().ok())
        .with_context(|| said.clone())?;
    // Three files need three pages, and their directories some.
    ensure!(refused >= 3, "{said}");
    ensure!(said.contains("exit 1") && said.contains("No space left"), "{said}");
    Ok(())
}

#[test]
fn a_read_only_disk_is_said() -> Result<()> {
    bro_tests::require_namespaces!();
    let script = disk()
        + "mount --bind /mnt /mnt\nmount -o remount,ro,bind /mnt\nbefore=$(tree)\nactivate --external-port 8080\n[ \"$(tree)\" = \"$before\" ]\n";
    let said = in_own_mounts(&script)?;
    ensure!(said.contains("exit 1") && said.contains("Read-only file system"), "{said}");
    Ok(())
}

#[test]
fn drop_ins_that_cannot_be_written_hold_back_the_units() -> Result<()> {
    bro_tests::require_namespaces!();
    let script = disk()
        + "mount --bind /mnt/etc/containers /mnt/etc/containers\nmount -o remount,ro,bind /mnt/etc/containers\n\
           before=$(tree)\nactivate --external-port 8080\n[ \"$(tree)\" = \"$before\" ]\n";
    let said = in_own_mounts(&script)?;
    ensure!(said.contains("exit 1") && said.contains("Read-only file system"), "{said}");
    Ok(())
}

#[test]
fn who_may_not_write_is_told_so() -> Result<()> {
    bro_tests::require_namespaces!();
    let tree = Tree::with_web()?;
    std::fs::create_dir_all(tree.path("etc/systemd/system"))?;
    let before = tree.listing()?;
    // In a user namespace without a mapping even root has no id of its own: the mode bits count.
    let script = "chmod 555 \"$ROOT/etc/systemd/system\"; code=0; \
                  unshare --user \"$BRO\" activate web --system --root \"$ROOT\" --external-port 80 || code=$?; \
                  chmod 755 \"$ROOT/etc/systemd/system\"; exit $code";
    let mut command = Command::new("sh");
    command.args(["-c", script]).env("ROOT", tree.root()).env("BRO", bro_tests::bro::binary());
    environment(&mut command);
    let answer = said(&mut command)?;
    ensure!(answer.code == 5 && answer.stderr.contains("Permission denied"), "{answer:?}");
    ensure!(tree.listing()? == before, "something was written");
    // And without --root, before anything is looked at.
    let mut command = Command::new("unshare");
    command.arg("--user").arg(bro_tests::bro::binary()).args([
        "activate",
        "web",
        "--system",
        "--external-port",
        "80",
    ]);
    let answer = said(&mut command)?;
    ensure!(answer.code == 5 && answer.stderr.contains("sudo"), "{answer:?}");
    Ok(())
}

#[test]
fn many_at_once_end_as_one_after_the_other() -> Result<()> {
    let tree = Tree::with_web()?;
    tree.write("etc/containers/systemd/two.container", "[Container]\nImage=localhost/two\n")?;
    std::fs::create_dir_all(tree.path("etc/systemd/system"))?;
    let before = tree.listing()?;
    let expected = {
        let alone = Tree::with_web()?;
        alone.write("etc/containers/systemd/two.container", "[Container]\nImage=localhost/two\n")?;
        std::fs::create_dir_all(alone.path("etc/systemd/system"))?;
        ensure!(alone.run(&["web", "--external-port", "80"])?.code == 0);
        ensure!(alone.run(&["two", "--external-port", "81"])?.code == 0);
        alone.listing()?
    };
    let mut running = Vec::new();
    for round in 0..16 {
        let arguments: &[&str] = if round % 2 == 0 {
            &["web", "--external-port", "80"]
        } else {
            &["two", "--external-port", "81"]
        };
        let mut command = tree.command(arguments);
        running.push(command.arg("--system").stdout(std::process::Stdio::piped()).spawn()?);
    }
    let mut wrote = 0;
    for child in running {
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{output:?}");
        wrote += usize::from(String::from_utf8_lossy(&output.stdout).contains("wrote "));
    }
    ensure!(wrote == 2, "{wrote} runs wrote something");
    ensure!(tree.listing()? == expected, "{:#?}", tree.listing()?);
    ensure!(tree.run(&["web", "--remove"])?.code == 0 && tree.run(&["two", "--remove"])?.code == 0);
    ensure!(tree.listing()? == before, "{:#?}", tree.listing()?);
    Ok(())
}

/// Whichever of its files was deleted by hand, no other stays, nor a link that enables one.
#[test]
fn what_is_left_of_a_service_can_be_removed() -> Result<()> {
    let forwarded = |tree: &Tree| -> Result<()> {
        ensure!(tree.run(&["web", "--external-port", "80"])?.code == 0);
        ensure!(tree.run(&["web", "--service-name", "metrics", "--external-port", "81"])?.code == 0);
        Ok(())
    };
    let direct = |tree: &Tree| -> Result<()> {
        ensure!(tree.run(&["web", "--external-port", "80", "--direct"])?.code == 0);
        ensure!(tree.run(&["web", "--service-name", "metrics", "--external-port", "81"])?.code == 0);
        Ok(())
    };
    let alone = |tree: &Tree| -> Result<()> {
        ensure!(tree.run(&["web", "--external-port", "80"])?.code == 0);
        Ok(())
    };
    let (service, first) = ("web-activator.service", "web-activator.socket");
    type Set = dyn Fn(&Tree) -> Result<()>;
    let cases: [(&Set, &[&str]); 8] = [
        (&forwarded, &[service]),
        (&forwarded, &[first]),
        (&forwarded, &["web-metrics-activator.socket"]),
        (&forwarded, &[service, first]),
        (&alone, &[first]),
        (&alone, &[service]),
        (&direct, &["web.socket"]),
        (&direct, &["web-metrics.socket"]),
    ];
    for (set_up, deleted) in cases {
        let tree = Tree::with_web()?;
        std::fs::create_dir_all(tree.path("etc/systemd/system"))?;
        std::fs::create_dir_all(tree.path("etc/containers/systemd/web.container.d"))?;
        tree.write("etc/systemd/system/web.service.d/mine.conf", "[Service]\n")?;
        let before = tree.listing()?;
        set_up(&tree)?;
        for file in deleted {
            std::fs::remove_file(tree.path("etc/systemd/system").join(file))?;
        }
        let answer = tree.run(&["web", "--remove"])?;
        ensure!(answer.code == 0, "without {deleted:?}: {answer:?}");
        ensure!(!deleted.iter().any(|file| answer.stdout.contains(file)), "{answer:?}");
        ensure!(tree.listing()? == before, "without {deleted:?}: {:?}", tree.listing()?.keys());
    }
    // Another port's socket would be taken for one of the new forwarder's, which knows nothing of it.
    let tree = Tree::with_web()?;
    forwarded(&tree)?;
    std::fs::remove_file(tree.path("etc/systemd/system").join(service))?;
    let answer = tree.run(&["web", "--external-port", "80"])?;
    let words = "only in part: web-activator.service is gone";
    ensure!(answer.code == 4 && answer.stderr.contains(words), "{answer:?}");
    // What a first run that was killed has left is no hindrance.
    let tree = Tree::with_web()?;
    alone(&tree)?;
    std::fs::remove_file(tree.path("etc/systemd/system").join(service))?;
    ensure!(tree.run(&["web", "--external-port", "80"])?.code == 0);
    Ok(())
}

#[test]
fn what_a_killed_run_left_behind_is_no_hindrance() -> Result<()> {
    let tree = Tree::with_web()?;
    tree.write("etc/systemd/system/.web-activator.socket.bro-new", "half")?;
    tree.write("etc/systemd/system/.web-activator.socket.bro-old", "half")?;
    ensure!(tree.run(&["web", "--external-port", "80"])?.code == 0);
    let hidden = || -> Result<Vec<String>> {
        Ok(tree.listing()?.into_keys().filter(|path| path.contains("/.")).collect())
    };
    ensure!(hidden()?.is_empty(), "{:?}", hidden()?);
    // Also where the next run has no file to change, and where a file has gone for good.
    let socket = std::fs::read_to_string(tree.path("etc/systemd/system/web-activator.socket"))?;
    for more in [&["--external-port", "80"][..], &["--remove"]] {
        tree.write("etc/systemd/system/.web-activator.socket.bro-old", &socket)?;
        tree.write("etc/systemd/system/.web-gone-activator.socket.bro-old", &socket)?;
        tree.write("etc/systemd/system/.web-gone-activator.socket.bro-new", "half")?;
        ensure!(tree.run(&[&["web"], more].concat())?.code == 0);
        ensure!(hidden()?.is_empty(), "{more:?}: {:?}", hidden()?);
    }
    Ok(())
}

/// By the signals that Ctrl-C, systemd and a connection that drops send.
#[test]
fn who_is_told_to_stop_leaves_everything_as_it_was() -> Result<()> {
    use nix::sys::signal::{Signal, kill};

    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let tree = Tree::with_web()?;
        std::fs::create_dir_all(tree.path("etc/systemd/system"))?;
        let before = tree.listing()?;
        // It waits for this one, which never ends.
        let locked = std::fs::File::open(tree.path("etc/systemd/system"))?;
        locked.lock()?;
        let bro = tree.command(&["web", "--external-port", "80", "--system"]);
        // What started this test may ignore them, as nohup does, and so would its children.
        let mut command = std::process::Command::new("env");
        command.arg("--default-signal=INT,TERM,HUP").arg(bro.get_program()).args(bro.get_args());
        command.envs(bro.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let child =
            command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn()?;
        let status = format!("/proc/{}/status", child.id());
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        loop {
            let text = std::fs::read_to_string(&status)?;
            let caught = text.lines().find_map(|line| line.strip_prefix("SigCgt:")).context("it has one")?;
            if u64::from_str_radix(caught.trim(), 16)? >> (signal as i32 - 1) & 1 == 1 {
                break;
            }
            ensure!(std::time::Instant::now() < deadline, "it does not listen to {signal}: {text}");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        kill(nix::unistd::Pid::from_raw(child.id().cast_signed()), signal)?;
        let output = child.wait_with_output()?;
        let words = String::from_utf8(output.stderr)?;
        ensure!(
            output.status.code() == Some(1)
                && words.contains("interrupted by")
                && words.contains(signal.as_str())
                && words.contains("nothing was changed"),
            "{signal}: {:?}, {words}",
            output.status
        );
        ensure!(tree.listing()? == before, "{signal}: something was written");
    }
    Ok(())
}
