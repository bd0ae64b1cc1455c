//! Bad input: each case ends with one sentence on stderr and the exit code that is documented for it, and leaves nothing behind.
//!
//! Needs: a network namespace; root for one test. Takes: seconds.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::{Setup, script};
use bro_tests::netns::Namespace;
use bro_tests::peers::{Family, Here, Listener};
use bro_tests::require_namespaces;
use bro_tests::scratch::Scratch;
use bro_tests::tier::{Need, met};

const USAGE: i32 = 2;
const NO_SOCKET: i32 = 3;
const NOT_FOUND: i32 = 4;
const NOT_PERMITTED: i32 = 5;

/// Expects `setup` to be refused with `code` and one sentence that holds each of `words`; returns the sentence.
fn refused(setup: Setup, code: i32, words: &[&str]) -> Result<String> {
    let mut forwarder = setup.start()?;
    forwarder.expect_exit(code)?;
    let lines = forwarder.log().lines();
    ensure!(lines.len() == 1, "not one line: {lines:#?}");
    ensure!(lines[0].starts_with("bro: "), "not a sentence of bro's: {lines:?}");
    ensure!(!lines[0].contains("panicked"), "it panicked: {lines:?}");
    for word in words {
        ensure!(lines[0].contains(word), "“{word}” is missing: {lines:?}");
    }
    Ok(lines[0].clone())
}

fn listener() -> Result<Listener> {
    Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)
}

#[test]
fn no_socket_passed() -> Result<()> {
    refused(Setup::new().arg("127.0.0.1:80"), NO_SOCKET, &["socket", "--listen"]).map(drop)
}

#[test]
fn sockets_passed_to_another_process() -> Result<()> {
    let front = listener()?;
    for pid in ["1", "0", "-1", "", "x", "99999999999999999999"] {
        let setup = Setup::new().socket(&front).launch(format!("listen-pid={pid}")).arg("127.0.0.1:80");
        refused(setup, NO_SOCKET, &["LISTEN_PID"]).with_context(|| format!("LISTEN_PID={pid}"))?;
    }
    Ok(())
}

#[test]
fn nonsense_in_listen_fds() -> Result<()> {
    let front = listener()?;
    for count in ["", "x", "-1", "1x", "99999999", "4294967297"] {
        let fd = std::os::fd::AsFd::as_fd(&front).try_clone_to_owned()?;
        let setup = Setup::new().descriptor(fd, "x").pass_nothing().launch(format!("listen-fds={count}"));
        refused(setup.arg("127.0.0.1:80"), NO_SOCKET, &[]).with_context(|| format!("LISTEN_FDS={count}"))?;
    }
    // More announced than there are.
    let setup = Setup::new().pass_nothing().socket(&front).launch("listen-fds=3");
    refused(setup.arg("127.0.0.1:80"), NO_SOCKET, &["4"]).map(drop)
}

#[test]
fn what_was_passed_is_no_socket_for_clients() -> Result<()> {
    let scratch = Scratch::new()?;
    let datagram = std::net::UdpSocket::bind("127.0.0.1:0")?;
    datagram.connect("127.0.0.1:9")?;
    let unix_datagram: OwnedFd = UnixDatagram::bind(scratch.join("d"))?.into();
    let unbound: OwnedFd = Family::Tcp4.socket()?;
    let file: OwnedFd = File::create(scratch.join("file"))?.into();
    let unix = UnixListener::bind(scratch.join("u"))?;
    let connected: OwnedFd = std::os::unix::net::UnixStream::connect(scratch.join("u"))?.into();
    for (what, fd, word) in [
        ("a UDP socket with a peer", datagram.into(), "connected"),
        ("a socket that does not listen", unbound, "listen"),
        ("a connected socket, as Accept=yes passes it", connected, "Accept=no"),
        ("a file", file, "socket"),
    ] {
        let setup = Setup::new().descriptor(fd, "odd").arg("127.0.0.1:80");
        refused(setup, NO_SOCKET, &[word, "odd"]).context(what)?;
    }
    let setup = Setup::new().descriptor(unix_datagram, "odd").arg("127.0.0.1:80");
    refused(setup, USAGE, &["datagrams over a unix socket", "odd"])?;
    drop(unix);
    Ok(())
}

#[test]
fn a_range_of_targets_for_another_number_of_ports() -> Result<()> {
    let setup = Setup::new().named(&listener()?, "web").arg("--target=web=127.0.0.1:80-82");
    refused(setup, USAGE, &["--target web=127.0.0.1:80-82 has 3 ports", "the sockets named web have 1"])?;
    let setup = Setup::new().named(&listener()?, "web").arg("--target=web=127.0.0.1:82-80");
    refused(setup, USAGE, &["127.0.0.1:82-80"]).map(drop)
}

#[test]
fn no_target() -> Result<()> {
    refused(Setup::new().socket(&listener()?), USAGE, &["TARGET"])?;
    let setup = Setup::new().named(&listener()?, "http").arg("--target=metrics=127.0.0.1:80");
    refused(setup, USAGE, &["http"]).map(drop)
}

#[test]
fn a_target_for_a_socket_that_was_not_passed() -> Result<()> {
    let setup =
        Setup::new().named(&listener()?, "http").arg("--target=htpp=127.0.0.1:81").arg("127.0.0.1:80");
    refused(setup, USAGE, &["htpp"]).map(drop)
}

#[test]
fn what_does_not_count_is_not_understood() -> Result<()> {
    let front = listener()?;
    for (argument, word) in [
        ("--idle-below=1K", "1K/1min"),
        ("--idle-below=/1min", "number of bytes"),
        ("--idle-below=1K/", "time"),
        ("--idle-ignore=monitor", "10.0.0.0/8"),
        ("--idle-ignore=::ffff:10.0.0.1", "IPv4"),
        ("--wake-ignore=10.0.0.0/33", "10.0.0.0/8"),
        ("--wakes-per-hour=0", "1..=1000"),
        ("--wakes-per-hour=often", "--wakes-per-hour"),
        // It would have nothing to freeze.
        ("--freeze", "--unit"),
    ] {
        let setup = Setup::new().socket(&front).arg(argument).arg("127.0.0.1:80");
        refused(setup, USAGE, &[word]).with_context(|| argument.to_owned())?;
    }
    Ok(())
}

#[test]
fn times_that_are_none() -> Result<()> {
    let front = listener()?;
    for (times, word) in [
        ("Mon..Fri", "DAYS START..END"),
        ("9..18", "DAYS START..END"),
        ("09:00..25:00", "time of day"),
        ("", "DAYS START..END"),
        ("09:00..10:00;", "DAYS START..END"),
    ] {
        let setup = Setup::new().socket(&front).arg(format!("--keep-awake={times}")).arg("127.0.0.1:80");
        refused(setup, USAGE, &["--keep-awake", word]).with_context(|| times.to_owned())?;
    }
    if !met("times_that_are_none", &[Need::Program("systemd-analyze", "systemd")]) {
        return Ok(());
    }
    for (times, word) in
        [("Mon..Fry 09:00..18:00", "“Mon..Fry 09:00”"), ("09:00..18:00 Middle/Earth", "“09:00 Middle/Earth”")]
    {
        let setup = Setup::new().socket(&front).arg(format!("--keep-awake={times}")).arg("127.0.0.1:80");
        refused(setup, USAGE, &["--keep-awake", word]).with_context(|| times.to_owned())?;
    }
    Ok(())
}

#[test]
fn bad_time_spans() -> Result<()> {
    let front = listener()?;
    for option in [
        "--exit-idle-time",
        "--exit-idle-time-max",
        "--freeze-time",
        "--min-uptime",
        "--start-timeout",
        "--drain-timeout",
        "--idle-timeout",
        "--keepalive-time",
    ] {
        for span in ["5parsecs", "", "-1", "1 2 3 x", "s", "1e99"] {
            let setup = Setup::new().socket(&front).arg(format!("{option}={span}")).arg("127.0.0.1:80");
            refused(setup, USAGE, &[option]).with_context(|| format!("{option}={span}"))?;
        }
    }
    Ok(())
}

/// Spans that can be read, and that the option cannot have: it says why, instead of doing something else.
#[test]
fn time_spans_that_make_no_sense_for_an_option() -> Result<()> {
    let front = listener()?;
    for option in ["--start-timeout", "--idle-timeout", "--exit-idle-time"] {
        for span in ["0", "0s", "0min 0ms"] {
            let setup = Setup::new().socket(&front).arg(format!("{option}={span}")).arg("127.0.0.1:80");
            refused(setup, USAGE, &[option, "infinity"]).with_context(|| format!("{option}={span}"))?;
        }
    }
    for option in ["--keepalive-time", "--keepalive-interval"] {
        for span in ["0", "10ms", "32768", "99999999", "infinity"] {
            let setup = Setup::new().socket(&front).arg(format!("{option}={span}")).arg("127.0.0.1:80");
            refused(setup, USAGE, &[option, "1s to 32767s"]).with_context(|| format!("{option}={span}"))?;
        }
    }
    for span in ["0", "999ms"] {
        let setup = Setup::new().socket(&front).arg(format!("--user-timeout={span}")).arg("127.0.0.1:80");
        refused(setup, USAGE, &["--user-timeout", "1s or more"]).with_context(|| span)?;
    }
    refused(Setup::bare().args(["wake", "x", "--timeout=0"]), USAGE, &["--timeout", "infinity"])?;
    for option in ["--start-timeout=0", "--exit-idle-time=0"] {
        refused(Setup::bare().args(["activate", "x", option]), USAGE, &["infinity"]).context(option)?;
    }
    Ok(())
}

#[test]
fn a_name_with_two_targets() -> Result<()> {
    let setup = Setup::new().named(&listener()?, "http");
    let setup = setup.args(["--target=http=127.0.0.1:80", "--target=http=127.0.0.1:81"]);
    refused(setup, USAGE, &["--target http=", "more than once"]).map(drop)
}

/// sd_listen_fds_with_names(3) has it that each descriptor is named, or none.
#[test]
fn names_for_another_number_of_sockets() -> Result<()> {
    let (one, other) = (listener()?, listener()?);
    for (names, words) in [("a", "one name"), ("a:b:c", "3 names"), ("", "one name")] {
        let setup = Setup::new().socket(&one).socket(&other).launch(format!("listen-names={names}"));
        refused(setup.arg("127.0.0.1:80"), NO_SOCKET, &["LISTEN_FDNAMES", words, "2"])
            .with_context(|| format!("{names:?}"))?;
    }
    Ok(())
}

#[test]
fn bad_words_about_waking_and_sleeping() -> Result<()> {
    let front = listener()?;
    for (option, others) in [
        ("--wake-on=anything", ["connect", "data"]),
        ("--wake-on=", ["connect", "data"]),
        ("--wake-on=data:0", ["1 to 16384", "data:64"]),
        ("--idle-by=packets", ["connections", "bytes"]),
        ("--idle-by=BYTES", ["connections", "bytes"]),
    ] {
        let setup = Setup::new().socket(&front).arg(option).arg("127.0.0.1:80");
        let sentence = refused(setup, USAGE, &[option.split('=').next().unwrap_or_default()])?;
        ensure!(sentence.len() < 300, "{others:?} or nothing: {sentence}");
    }
    for words in [
        &["wake"][..],
        &["sleep"],
        &["wake", ""],
        &["sleep", "a/b"],
        &["wake", "a\nb"],
        &["wake", "x", "--timeout=soon"],
    ] {
        refused(Setup::bare().args(words.iter().copied()), USAGE, &[])
            .with_context(|| format!("{words:?}"))?;
    }
    for words in [&["doctor", "--wake"][..], &["doctor", "a", "b"], &["status", "--user", "--system"]] {
        refused(Setup::bare().args(words.iter().copied()), USAGE, &[])
            .with_context(|| format!("{words:?}"))?;
    }
    let setup = Setup::bare().arg("doctor").arg("no-such-service");
    refused(setup, NOT_FOUND, &["no-such-service"])?;
    let setup = Setup::bare().arg("status").arg("no-such-service");
    refused(setup, NOT_FOUND, &["no-such-service"]).map(drop)
}

#[test]
fn bad_addresses() -> Result<()> {
    let front = listener()?;
    let long = format!("/{}", "x".repeat(120));
    for target in [
        "127.0.0.1:99999",
        "127.0.0.1:",
        "127.0.0.1:http",
        "0",
        "70000",
        "",
        "[::1",
        "::1",
        "@",
        ":80",
        "a b",
        &long,
    ] {
        let setup = Setup::new().socket(&front).arg("--").arg(target);
        refused(setup, USAGE, &[]).with_context(|| format!("target {target:?}"))?;
    }
    for target in ["127.0.0.1:80", "=127.0.0.1:80", "x=", "x=127.0.0.1:0"] {
        let setup = Setup::new().socket(&front).arg("--target").arg(target);
        refused(setup, USAGE, &["--target"]).with_context(|| format!("--target {target:?}"))?;
    }
    for address in ["", "127.0.0.1:99999", "nonsense:x", "@"] {
        let setup = Setup::new().arg("--listen").arg(address).arg("127.0.0.1:80");
        refused(setup, USAGE, &["--listen"]).with_context(|| format!("--listen {address:?}"))?;
    }
    Ok(())
}

#[test]
fn options_that_are_wrong_or_contradict_each_other() -> Result<()> {
    let front = listener()?;
    for options in [
        &["--connections-max=0"][..],
        &["--connections-max=many"],
        &["--connections-per-source=0"],
        &["--relay=fast"],
        &["--source=nobody"],
        &["--ready=soon"],
        &["--ready=exec:"],
        &["--pid=0"],
        &["--pid=x"],
        &["--pid=1", "--netns=/proc/self/ns/net"],
        &["--user", "--system"],
        &["--keepalive-probes=0"],
        &["--no-such-option"],
        &["--unit"],
    ] {
        let setup = Setup::new().socket(&front).args(options.iter().copied());
        let setup = if options.last() == Some(&"--unit") { setup } else { setup.arg("127.0.0.1:80") };
        refused(setup, USAGE, &[]).with_context(|| format!("{options:?}"))?;
    }
    refused(Setup::new().socket(&front).arg("127.0.0.1:80").arg("127.0.0.1:81"), USAGE, &[])?;
    refused(Setup::bare().arg("forwrad"), USAGE, &["forwrad"])?;
    refused(Setup::bare(), USAGE, &[]).map(drop)
}

/// Whether an option has a value.
#[derive(Clone, Copy)]
enum Value {
    None,
    /// It may stand alone.
    May,
    Must,
}

/// The options of `bro SUBCOMMAND`, and whether each takes a value, as its help has them.
fn options_of(subcommand: &str) -> Result<Vec<(String, Value)>> {
    let output =
        std::process::Command::new(bro_tests::bro::binary()).args([subcommand, "--help"]).output()?;
    let help = String::from_utf8(output.stdout)?;
    let lines = help.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
    let options = lines.filter_map(|line| {
        let (_, option) = line.split_once("--")?;
        let name: String = option.chars().take_while(|c| c.is_ascii_lowercase() || *c == '-').collect();
        let value = match option[name.len()..].trim_start() {
            rest if rest.starts_with("[=") => Value::May,
            rest if rest.starts_with(['<', '[', '=']) => Value::Must,
            _ => Value::None,
        };
        Some((format!("--{name}"), value))
    });
    Ok(options.collect())
}

/// Of every option of every subcommand: without its value, with an empty one, and with one where it takes none.
#[test]
fn every_option_without_a_value_or_with_one_too_many() -> Result<()> {
    let mut tried = 0;
    for subcommand in ["loader", "forward", "activate", "wake", "sleep", "status", "doctor"] {
        for (option, value) in options_of(subcommand)? {
            let empty = format!("{option}=");
            let wrong = [&[&*option][..], &[&*empty]];
            let wrong = match value {
                Value::Must => &wrong[..2],
                Value::May | Value::None => &wrong[1..2],
            };
            for words in wrong {
                let name =
                    ["forward", "status"].iter().all(|own| *own != subcommand).then_some("some-service");
                let setup = Setup::bare().arg(subcommand).args(name).args(words.iter().copied());
                refused(setup, USAGE, &[&option]).with_context(|| format!("{subcommand} {words:?}"))?;
                tried += 1;
            }
        }
    }
    ensure!(tried > 90, "only {tried} were tried");
    Ok(())
}

#[test]
fn names_that_cannot_be_any() -> Result<()> {
    let front = listener()?;
    for words in [
        "--unit=web",
        "--unit=.service",
        "--unit=a/b.service",
        "--unit=a b.service",
        "--container=a/b",
        "--container=-x",
        "--container=a b",
    ] {
        let option = words.split('=').next().unwrap_or_default();
        let setup = Setup::new().socket(&front).arg(words).arg("127.0.0.1:80");
        refused(setup, USAGE, &[option]).context(words)?;
    }
    Ok(())
}

#[test]
fn a_health_check_needs_a_container() -> Result<()> {
    refused(
        Setup::new().socket(&listener()?).arg("--ready=healthy").arg("127.0.0.1:80"),
        USAGE,
        &["--container"],
    )
    .map(drop)
}

#[test]
fn a_process_that_is_not_there() -> Result<()> {
    // Above the highest pid a kernel gives (PID_MAX_LIMIT), and one that has just ended.
    let mut ended = std::process::Command::new("true").spawn()?;
    ended.wait()?;
    for pid in ["4194305", &ended.id().to_string()] {
        let setup = Setup::new().socket(&listener()?).arg("--pid").arg(pid).arg("127.0.0.1:80");
        refused(setup, NOT_FOUND, &[pid]).with_context(|| format!("--pid {pid}"))?;
    }
    Ok(())
}

#[test]
fn a_namespace_that_is_gone() -> Result<()> {
    require_namespaces!();
    let namespace = Namespace::new()?;
    let path = namespace.path();
    namespace.destroy();
    let setup = Setup::new().socket(&listener()?).arg("--netns").arg(&path).arg("127.0.0.1:80");
    refused(setup, NOT_FOUND, &[&path.display().to_string()]).map(drop)
}

#[test]
fn a_file_that_is_no_network_namespace() -> Result<()> {
    let scratch = Scratch::new()?;
    std::fs::write(scratch.join("file"), "")?;
    let others = ["/proc/self/ns/mnt", "/proc/self/ns/user", "/dev/null"].map(std::path::PathBuf::from);
    for path in [scratch.join("file"), scratch.path().to_owned()].into_iter().chain(others) {
        let name = path.display().to_string();
        let setup = Setup::new().socket(&listener()?).arg("--netns").arg(&path).arg("127.0.0.1:80");
        refused(setup, NOT_FOUND, &[&name]).context(name)?;
    }
    Ok(())
}

/// podman's own words, from a stand-in: the real one is tested on a real host.
#[test]
fn an_unknown_container() -> Result<()> {
    let scratch = Scratch::new()?;
    script(scratch.path(), "podman", "echo 'Error: no such object: \"no-such-container\"' >&2; exit 125")?;
    let setup =
        Setup::new().socket(&listener()?).arg("--container=no-such-container").tools(scratch.path().into());
    refused(setup.arg("127.0.0.1:80"), NOT_FOUND, &["no-such-container"]).map(drop)
}

#[test]
fn no_podman_to_ask() -> Result<()> {
    let setup = Setup::new().socket(&listener()?).arg("--container=web").env("PATH", "/nonexistent");
    refused(setup.arg("127.0.0.1:80"), NOT_FOUND, &["podman"]).map(drop)
}

/// An ordinary user names a process of root's: root takes a user's part, a user simply tries.
#[test]
fn another_users_namespace() -> Result<()> {
    use bro_tests::process::NOBODY;
    let as_user = |setup: Setup| if nix::unistd::geteuid().is_root() { setup.user(NOBODY) } else { setup };
    for (option, value) in [("--pid", "1"), ("--netns", "/proc/1/ns/net")] {
        let setup = as_user(Setup::new()).socket(&listener()?).arg(option).arg(value).arg("127.0.0.1:80");
        refused(setup, NOT_PERMITTED, &[]).context(option)?;
    }
    if !met("another_users_namespace", &[Need::Root]) {
        return Ok(());
    }
    // Readable, and yet not to be entered: the file is there for everyone, the namespace is root's.
    let scratch = Scratch::new()?;
    let pinned = bro_tests::netns::Pinned::new(&Namespace::new()?, scratch.join("ns"))?;
    let setup = Setup::new().user(NOBODY).socket(&listener()?).arg("--netns").arg(pinned.path());
    refused(setup.arg("127.0.0.1:80"), NOT_PERMITTED, &[]).context("a pinned namespace of root's").map(drop)
}

#[test]
fn an_address_that_is_taken() -> Result<()> {
    let taken = listener()?;
    let address = taken.address().to_string();
    refused(Setup::new().arg("--listen").arg(&address).arg("127.0.0.1:80"), 1, &[&address])?;
    let scratch = Scratch::new()?;
    let _unix = UnixListener::bind(scratch.join("u"))?;
    let path = scratch.join("u");
    refused(Setup::new().arg("--listen").arg(&path).arg("127.0.0.1:80"), 1, &[&path.display().to_string()])?;
    ensure!(path.exists(), "it has removed another's socket");
    Ok(())
}

#[test]
fn help_and_version_are_no_errors() -> Result<()> {
    for setup in [Setup::new().arg("--help"), Setup::bare().arg("--help"), Setup::bare().arg("--version")] {
        let mut forwarder = setup.start()?;
        forwarder.expect_exit(0)?;
        ensure!(forwarder.log().lines().is_empty(), "{:?}", forwarder.log().lines());
    }
    Ok(())
}
