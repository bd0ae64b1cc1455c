//! Bad input: one sentence, the right exit code, nothing written.

use std::process::Command;

use anyhow::{Result, ensure};

use crate::tree::{Tree, WEB, environment, said};

/// What follows `bro activate`, the exit code, and what the sentence says.
type Case = (&'static [&'static str], i32, &'static str);

/// A byte longer than a socket's address holds.
const LONG: &str = "/run/xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx";

/// Of every option, what it cannot be given.
const CASES: &[Case] = &[
    (&[], 2, "NAME"),
    (&["web"], 2, "--external-port"),
    (&["nope", "--external-port", "80"], 4, "there is no nope.container"),
    (&["web.pod", "--external-port", "80"], 4, "there is no web.pod"),
    (&["../web", "--external-port", "80"], 2, "cannot be the name of a quadlet"),
    (&["", "--external-port", "80"], 2, "cannot be the name of a quadlet"),
    (&["web@", "--external-port", "80"], 2, "which instance"),
    (&["tpl", "--external-port", "80"], 4, "is a template"),
    (&["data.volume", "--external-port", "80"], 2, "no service"),
    (&["web", "--external-port", "0"], 2, "not a port"),
    (&["web", "--external-port", "65536"], 2, "not a port"),
    (&["web", "--external-port", "-1"], 2, "unexpected argument '-1'"),
    (&["web", "--external-port", "localhost:80"], 2, "not an IP address"),
    (&["web", "--external-port", "127.0.0.1"], 2, "no port"),
    (&["web", "--external-port", "::1"], 2, "no port"),
    (&["web", "--external-port", "/run/a b.sock"], 2, "unit file"),
    (&["web", "--external-port", "/run/web.sock"], 2, "--internal-port"),
    (&["web", "--external-port", "/", "--internal-port", "80"], 2, "no path at which systemd listens"),
    (&["web", "--external-port", "/tmp/", "--internal-port", "80"], 2, "no path at which systemd listens"),
    (&["web", "--external-port", "/tmp/../tmp/x.sock", "--internal-port", "80"], 2, "no path at which"),
    (&["web", "--external-port", LONG, "--internal-port", "80"], 2, "107 bytes"),
    (&["web", "--external-port", "80", "--internal-port", "http"], 2, "no port"),
    (&["web", "--external-port", "80", "--internal-port", "10.0.0.1:0"], 2, "not a port"),
    (&["web", "--external-port", "80", "--service-name", "metrics"], 2, "not activated yet"),
    (&["web", "--external-port", "metrics=80"], 2, "not activated yet"),
    (&["web", "--external-port", "53/sctp"], 2, "neither /tcp, /udp nor /tcp+udp"),
    (&["web", "--external-port", "0/udp"], 2, "not a port"),
    (&["web", "--external-port", "90-80/udp"], 2, "write the lower one first"),
    (&["web", "--external-port", "1000-1256"], 2, "are 257 ports, and 256 is the most"),
    (&["web", "--external-port", "53:53/udp"], 2, "--external-port 53/udp --internal-port 53"),
    (&["web", "--external-port", "80", "--external-port", "443"], 2, "given twice for “web”"),
    (
        &["web", "--external-port", "80", "--external-port", "x=80-81"],
        2,
        "80 is the address of “web” already",
    ),
    (&["web", "--external-port", "80", "--internal-port", "x=81"], 2, "--external-port x=[ADDR:]PORT"),
    (&["web", "--external-port", "a b=80"], 2, "unit's name"),
    (&["web", "--external-port", "80-81", "--internal-port", "90-92"], 2, "has 3 ports, and 80-81 has 2"),
    (&["web", "--external-port", "80-89", "--internal-port", "65530"], 2, "are 10 ports, and from 65530 on"),
    (&["web", "--external-port", "53/udp", "--internal-port", "53/tcp"], 2, "is of another protocol"),
    (&["web", "--external-port", "53/udp", "--internal-port", "/run/x"], 2, "and /run/x is a unix socket"),
    (&["web", "--external-port", "seqpacket:/run/x", "--internal-port", "80"], 2, "--internal-port /PATH"),
    (&["web", "--external-port", "seqpacket:x", "--internal-port", "/run/y"], 2, "neither a path"),
    (&["web", "--external-port", "dgram:/run/x"], 2, "--internal-port"),
    (&["web", "--external-port", "dgram:/run/x", "--internal-port", "80"], 2, "--internal-port /PATH"),
    (&["web", "--external-port", "vsock:5000"], 2, "vsock:CID:PORT"),
    (&["web", "--external-port", "vsock::5000"], 2, "say where the service listens"),
    (
        &["web", "--external-port", "vsock::5000", "--internal-port", "vsock::80"],
        2,
        "bro forwards clients of vsock",
    ),
    (
        &["web", "--external-port", "vsock::5000", "--internal-port", "80", "--adopt"],
        2,
        "--adopt is for sockets",
    ),
    (
        &["web", "--external-port", "seqpacket:/run/x", "--internal-port", "/run/y", "--adopt"],
        2,
        "--adopt is for sockets of streams, and there is none",
    ),
    (&["web", "--external-port", "53/udp", "--flows-max", "0"], 2, "--flows-max"),
    (&["web", "--external-port", "53/udp", "--flow-timeout", "0"], 2, "--flow-timeout"),
    (&["web", "--external-port", "53/udp", "--direct", "--flows-max", "9"], 2, "cannot be used with"),
    (&["web", "--external-port", "53", "--icmp-port-unreachable"], 2, "no port of theirs"),
    (&["web", "--external-port", "80", "--service-name", "a/b"], 2, "unit's name"),
    (&["web", "--external-port", "80", "--direct=magic"], 2, "--direct"),
    (&["web", "--external-port", "80", "--direct", "--exit-idle-time", "5"], 2, "cannot be used with"),
    (&["app.pod", "--external-port", "80", "--direct"], 2, "--direct is for a .container"),
    (&["tpl@one", "--external-port", "80", "--direct"], 2, "ln -s tpl@.container"),
    (&["web", "--external-port", "80", "--network", "lab"], 2, "not on the network “lab”"),
    (&["net", "--external-port", "80", "--network", "lab"], 2, "add IP="),
    (&["web", "--external-port", "80", "--container", "a b"], 2, "cannot be a container's name"),
    (&["play", "--external-port", "80"], 2, "--container"),
    (&["odd", "--external-port", "80"], 2, "specifier %m"),
    (&["web", "--external-port", "80", "--bind-to-device", "no/such"], 2, "network interface"),
    (
        &["web", "--external-port", "/run/x", "--internal-port", "80", "--bind-to-device", "lo"],
        2,
        "leave --bind-to-device lo out",
    ),
    (
        &["web", "--external-port", "@x", "--internal-port", "80", "--bind-to-device", "lo"],
        2,
        "leave --bind-to-device lo out",
    ),
    (&["web", "--external-port", "80", "--backlog", "0"], 2, "--backlog"),
    (&["web", "--external-port", "80", "--backlog", "many"], 2, "--backlog"),
    (&["web", "--external-port", "80", "--exit-idle-time", "soon"], 2, "not a number"),
    (&["web", "--external-port", "80", "--idle-by", "luck"], 2, "--idle-by"),
    (&["web", "--external-port", "80", "--wake-on", "luck"], 2, "--wake-on"),
    (&["web", "--external-port", "80", "--exit-idle-time-max", "soon"], 2, "--exit-idle-time-max"),
    (&["web", "--external-port", "80", "--idle-ignore", "monitor"], 2, "neither an address, a network"),
    (&["web", "--external-port", "80", "--idle-below", "1K"], 2, "not BYTES/TIME"),
    (&["web", "--external-port", "80", "--idle-below", "0/1min"], 2, "not a number of bytes"),
    (&["web", "--external-port", "80", "--idle-below", "1K/infinity"], 2, "100ms to 1d"),
    (&["web", "--external-port", "80", "--wake-ignore", "10.0.0.0/33"], 2, "neither an address, a network"),
    (&["web", "--external-port", "80", "--wakes-per-hour", "0"], 2, "--wakes-per-hour"),
    (&["web", "--external-port", "80", "--wakes-per-hour", "1001"], 2, "--wakes-per-hour"),
    (&["web", "--external-port", "80", "--freeze=perhaps"], 2, "--freeze"),
    (&["web", "--external-port", "80", "--freeze-time", "0"], 2, "--freeze-time"),
    (&["app.pod", "--external-port", "80", "--freeze"], 2, "--freeze does not go with app.pod"),
    (&["web", "--external-port", "80", "--keep-awake", "Mon..Fri"], 2, "not DAYS START..END"),
    (&["web", "--external-port", "80", "--keep-awake", "09:00..24:30"], 2, "not a time of day"),
    (&["web", "--external-port", "80", "--keep-awake", "Mon..Fry 09:00..18:00"], 2, "--keep-awake"),
    (&["web", "--external-port", "80", "--keep-awake", "2020-01-01 09:00..18:00"], 2, "--keep-awake"),
    (&["web", "--external-port", "80", "--direct", "--keep-awake", "09:00..18:00"], 2, "cannot be used with"),
    (&["web", "--external-port", "80", "--min-uptime", "5parsecs"], 2, "not a unit of time"),
    (&["web", "--external-port", "80", "--busy-file", "relative"], 2, "not an absolute path"),
    (&["web", "--external-port", "80", "--busy-exec", "a\nb"], 2, "one line"),
    (&["web", "--external-port", "80", "--busy-exec", ""], 2, "--busy-exec"),
    (&["web", "--external-port", "80", "--ready", "soon"], 2, "no way to know"),
    (&["web", "--external-port", "80", "--ready", "exec:a\nb"], 2, "one line"),
    (&["ill", "--external-port", "80", "--ready", "healthy"], 2, "HealthCmd=none"),
    (&["app.pod", "--external-port", "80", "--ready", "healthy"], 2, "name one of its containers"),
    (&["web", "--external-port", "80", "--start-timeout", ""], 2, "--start-timeout"),
    (&["web", "--external-port", "80", "--relay", "pigeon"], 2, "--relay"),
    (&["web", "--external-port", "80", "--source", "nobody"], 2, "--source"),
    (&["web", "--external-port", "80", "--proxy-protocol", "v3"], 2, "--proxy-protocol"),
    (&["web", "--external-port", "80", "--accept-proxy=perhaps"], 2, "--accept-proxy"),
    (&["web", "--external-port", "80", "--accept-proxy"], 2, "--accept-proxy needs --trusted"),
    (
        &["web", "--external-port", "80", "--accept-proxy", "--trusted", "balancer"],
        2,
        "neither an address, a network",
    ),
    (&["web", "--external-port", "80", "--unix-identity", "www-data"], 2, "numbers inside the container"),
    (&["web", "--external-port", "80", "--user"], 2, "cannot be used with"),
    (&["onhost", "--external-port", "80"], 2, "host's network"),
    (&["inpod", "--external-port", "80"], 2, "host's network"),
    (&["inpod", "--external-port", "80", "--network", "lab"], 2, "it has the network of hostly.pod"),
    (&["byhand", "--external-port", "80"], 2, "RefuseManualStart=yes in byhand.container"),
    (&["web", "--external-port", "80", "--drain-timeout", "soon"], 2, "--drain-timeout"),
    (&["web", "--external-port", "80", "--idle-timeout", "0"], 2, "--idle-timeout"),
    (&["web", "--external-port", "80", "--connections-max", "0"], 2, "--connections-max"),
    (&["web", "--external-port", "80", "--connections-per-source", "0"], 2, "--connections-per-source"),
    (&["web", "--external-port", "80", "--keepalive-time", "0"], 2, "--keepalive-time"),
    (&["web", "--external-port", "80", "--keepalive-interval", "10h"], 2, "--keepalive-interval"),
    (&["web", "--external-port", "80", "--keepalive-probes", "128"], 2, "--keepalive-probes"),
    (&["web", "--external-port", "80", "--user-timeout", "500ms"], 2, "--user-timeout"),
    (&["web", "--external-port", "8080:80"], 2, "--external-port 8080 --internal-port 80"),
    (&["web", "--external-port", "80", "--local-clients", "some"], 2, "--local-clients"),
    (
        &["web", "--external-port", "80", "--local-clients", "on", "--relay", "copy"],
        2,
        "part of the kernel relay",
    ),
    (&["web", "--external-port", "80", "--blocking-sockets=perhaps"], 2, "--blocking-sockets"),
    (&["web", "--external-port", "80", "--metrics", "localhost:9464"], 2, "--metrics"),
    (&["unneeded", "--external-port", "80"], 2, "StopWhenUnneeded=yes in unneeded.container"),
    (&["unneeded", "--external-port", "80", "--direct"], 2, "StopWhenUnneeded=yes in unneeded.container"),
    (&["dropped", "--external-port", "80"], 2, "StopWhenUnneeded=yes in dropped.container"),
    (&["once", "--external-port", "80", "--direct"], 2, "Type=oneshot in once.container"),
    (&["web", "--external-port", "80", "--internal-port", "/"], 2, "no path at which a service listens"),
    (&["both", "--external-port", "80"], 2, "both.container and both.pod"),
    (&["wrong", "--external-port", "80"], 4, "no section [Container]"),
    (&["web", "--external-port", "80", "--run-as", "nosuch"], 4, "there is no user “nosuch”"),
    (&["web", "--external-port", "80", "--run-as", "root"], 2, "leave --run-as out"),
    (&["web", "--external-port", "80", "--run-as", "a b"], 2, "cannot be the name of a user"),
    (&["web", "--external-port", "80", "--run-as", ""], 2, "cannot be the name of a user"),
    (&["web", "--external-port", "80", "--run-as", "test"], 4, "/etc/containers/systemd/users/1000"),
    (&["mine", "--external-port", "80", "--run-as", "test", "--direct"], 2, "cannot be used with"),
    (&["mine", "--external-port", "80", "--run-as", "test", "--user"], 2, "cannot be used with"),
    (&["sly", "--external-port", "80", "--run-as", "test"], 2, "cannot be the name of a unit"),
    (&["misnamed", "--external-port", "80"], 2, "cannot be a container's name"),
    (&["web", "--external-port", "80", "--restrict-network"], 2, "is for --direct"),
    (&["net", "--external-port", "80", "--restrict-network", "--direct"], 2, "add Network=none"),
    (&["web", "--external-port", "80", "--adopt=perhaps"], 2, "--adopt"),
    (&["web", "--external-port", "80", "--adopt=udp"], 2, "no port is one of UDP"),
    (&["web", "--external-port", "80/udp", "--adopt"], 2, "give --adopt=udp"),
    (&["web", "--external-port", "80/udp", "--adopt=udp", "--internal-port", "db:80"], 2, "is a name"),
    (&["web", "--external-port", "80", "--adopt", "--direct"], 2, "cannot be used with"),
    (&["web", "--external-port", "80", "--trust-loopback"], 2, "is for --adopt"),
    (&["web", "--external-port", "80", "--adopt-connect=none"], 2, "is for --adopt"),
    (
        &["web", "--external-port", "80", "--adopt", "--adopt-connect=80-90"],
        2,
        "is not any, none, never or a list",
    ),
    (&["web", "--external-port", "80", "--direct", "--adopt-connect=none"], 2, "cannot be used with"),
    (&["web", "--remove", "--adopt-connect=none"], 2, "cannot be used with"),
    (&["web", "--external-port", "80", "--adopt", "--proxy-protocol", "v2"], 2, "does not go with --adopt"),
    (
        &["web", "--external-port", "80", "--adopt", "--accept-proxy", "--trusted", "10.0.0.1"],
        2,
        "does not go with --adopt",
    ),
    (&["web", "--external-port", "80", "--adopt", "--local-clients", "on"], 2, "does not go with --adopt"),
    (
        &["web", "--external-port", "80", "--adopt", "--connections-per-source", "9"],
        2,
        "--connections-per-source does not go with --adopt",
    ),
    (&["web", "--external-port", "80", "--adopt", "--ready", "connect"], 2, "does not go with --adopt"),
    (&["web", "--external-port", "80", "--adopt", "--internal-port", "db:80"], 2, "is a name"),
    (&["app.pod", "--external-port", "80", "--adopt"], 2, "not yet for app.pod"),
    (&["play", "--external-port", "80", "--adopt", "--container", "x"], 2, "not yet for play.kube"),
    (&["tpl@one", "--external-port", "80", "--adopt"], 2, "ln -s tpl@.container"),
    (&["onhost", "--external-port", "80", "--adopt"], 2, "onhost.container uses the host's network"),
    (&["inpod", "--external-port", "80", "--adopt"], 2, "hostly.pod uses the host's network"),
    (&["loose", "--external-port", "80", "--adopt"], 2, "SeccompProfile=unconfined in loose.container"),
    (&["near", "--external-port", "80", "--adopt"], 2, "write the whole path"),
    (&["machine", "--external-port", "80", "--adopt"], 2, "specifier %m"),
    (&["absent", "--external-port", "80", "--adopt"], 2, "/nosuch.json, of which --adopt makes"),
    (&["strict", "--external-port", "80", "--adopt"], 2, "it does not let the container listen(2)"),
    (&["broken", "--external-port", "80", "--adopt"], 2, "it is no seccomp profile"),
    (&["mighty", "--external-port", "80", "--adopt"], 2, "PodmanArgs=--privileged in mighty.container"),
    (&["admin", "--external-port", "80", "--adopt"], 2, "AddCapability=NET_ADMIN in admin.container"),
    (&["seccomp", "--external-port", "80", "--adopt"], 2, "another name"),
    (&["mine", "--external-port", "80", "--user", "--adopt"], 2, "cannot be used with"),
    (&["web", "--remove", "--adopt"], 2, "cannot be used with"),
    (&["web", "--remove"], 4, "nothing to remove"),
    (&["web\n", "--remove"], 4, "“web\\n” is not activated"),
    (&["web\n", "--external-port", "80"], 2, "“web\\n” cannot be the name"),
    (&["a:b", "--external-port", "80"], 2, "may hold a colon"),
    (&["web", "--remove", "--external-port", "80"], 2, "cannot be used with"),
    (&["web", "--external-port", "80", "stray"], 2, "stray"),
    (&["web", "--external-port", "80", "--nonsense"], 2, "--nonsense"),
];

/// A seccomp profile that lets a container listen.
const PROFILE: &str = r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["bind", "listen"], "action": "SCMP_ACT_ALLOW"}]}"#;

fn disk() -> Result<Tree> {
    Tree::new(&[
        (WEB, "[Container]\nImage=docker.io/library/caddy\nNetwork=none\n"),
        ("etc/containers/systemd/tpl@.container", "[Container]\nImage=localhost/tpl\n"),
        ("etc/containers/systemd/app.pod", "[Pod]\n"),
        ("etc/containers/systemd/net.container", "[Container]\nImage=localhost/net\nNetwork=lab.network\n"),
        ("etc/containers/systemd/play.kube", "[Kube]\nYaml=play.yaml\n"),
        ("etc/containers/systemd/odd.container", "[Container]\nImage=localhost/odd\nContainerName=odd-%m\n"),
        ("etc/containers/systemd/ill.container", "[Container]\nImage=localhost/ill\nHealthCmd=none\n"),
        ("etc/containers/systemd/onhost.container", "[Container]\nImage=localhost/on\nNetwork=host\n"),
        ("etc/containers/systemd/hostly.pod", "[Pod]\nNetwork=host\n"),
        ("etc/containers/systemd/inpod.container", "[Container]\nImage=localhost/in\nPod=hostly.pod\n"),
        (
            "etc/containers/systemd/byhand.container",
            "[Unit]\nRefuseManualStart=yes\n[Container]\nImage=localhost/by\n",
        ),
        (
            "etc/containers/systemd/unneeded.container",
            "[Unit]\nStopWhenUnneeded=yes\n[Container]\nImage=localhost/unneeded\n",
        ),
        ("etc/containers/systemd/dropped.container", "[Container]\nImage=localhost/dropped\n"),
        ("etc/containers/systemd/dropped.container.d/un.conf", "[Unit]\nStopWhenUnneeded=on\n"),
        (
            "etc/containers/systemd/once.container",
            "[Container]\nImage=localhost/once\n[Service]\nType=oneshot\n",
        ),
        ("etc/containers/systemd/both.container", "[Container]\nImage=localhost/both\n"),
        ("etc/containers/systemd/both.pod", "[Pod]\n"),
        ("etc/containers/systemd/wrong.container", "[Unit]\n"),
        ("etc/containers/systemd/loose.container", "[Container]\nImage=x\nSeccompProfile=unconfined\n"),
        ("etc/containers/systemd/near.container", "[Container]\nImage=x\nSeccompProfile=near.json\n"),
        ("etc/containers/systemd/machine.container", "[Container]\nImage=x\nSeccompProfile=/%m.json\n"),
        ("etc/containers/systemd/absent.container", "[Container]\nImage=x\nSeccompProfile=/nosuch.json\n"),
        (
            "etc/containers/systemd/strict.container",
            "[Container]\nImage=x\nSeccompProfile=/etc/strict.json\n",
        ),
        (
            "etc/containers/systemd/broken.container",
            "[Container]\nImage=x\nSeccompProfile=/etc/broken.json\n",
        ),
        ("etc/containers/systemd/mighty.container", "[Container]\nImage=x\nPodmanArgs=--privileged\n"),
        ("etc/containers/systemd/admin.container", "[Container]\nImage=x\nAddCapability=NET_ADMIN\n"),
        ("etc/containers/systemd/seccomp.container", "[Container]\nImage=x\n"),
        ("etc/containers/systemd/pg.container", "[Container]\nImage=docker.io/library/postgres\n"),
        ("usr/share/containers/seccomp.json", PROFILE),
        (
            "etc/strict.json",
            r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["bind"], "action": "SCMP_ACT_ALLOW"}]}"#,
        ),
        ("etc/broken.json", "{"),
        (
            "etc/containers/systemd/misnamed.container",
            "[Container]\nImage=localhost/misnamed\nContainerName=a b\n",
        ),
        ("etc/containers/systemd/a:b.container", "[Container]\nImage=localhost/ab\n"),
        ("etc/passwd", "root:x:0:0::/root:/bin/sh\ntest:x:1000:1000::/home/test:/bin/sh\n"),
        ("home/test/.config/containers/systemd/mine.container", "[Container]\nImage=localhost/mine\n"),
        (
            "home/test/.config/containers/systemd/sly.container",
            "[Container]\nImage=localhost/sly\nServiceName=a.service shutdown.target\n",
        ),
    ])
}

#[test]
fn every_bad_input_is_one_sentence_and_changes_nothing() -> Result<()> {
    let tree = disk()?;
    let before = tree.listing()?;
    let mut failures = Vec::new();
    for (arguments, code, words) in CASES {
        let answer = tree.run(arguments)?;
        let one =
            answer.stderr.lines().filter(|line| !line.starts_with("bro: warning: ")).collect::<Vec<_>>();
        let good = answer.code == *code
            && one.len() == 1
            && one[0].starts_with("bro: ")
            && one[0].contains(words)
            && answer.stdout.is_empty();
        if !good || tree.listing()? != before {
            failures.push(format!("{arguments:?}: expected {code} and “{words}”: {answer:?}"));
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

/// None of the options that take a value is without a case.
#[test]
fn every_option_has_its_bad_input() -> Result<()> {
    let help = said(Command::new(bro_tests::bro::binary()).args(["activate", "--help"]))?.stdout;
    let mut looked_at = 0;
    for line in help.lines().map(str::trim_start).filter(|line| line.starts_with("--")) {
        let (name, rest) = line.split_once([' ', '[']).unwrap_or((line, ""));
        if rest.starts_with(['<', '=']) {
            let tried = |word: &str| word == name || word.starts_with(&format!("{name}="));
            let has = CASES.iter().any(|(words, ..)| words.iter().any(|word| tried(word)));
            ensure!(has || name == "--root", "no bad input is tried for {name}");
            looked_at += 1;
        }
    }
    ensure!(looked_at > 15, "only {looked_at} options take a value:\n{help}");
    // Every case has a good one of these.
    let answer =
        said(Command::new(bro_tests::bro::binary()).args(["activate", "web", "--root", "relative"]))?;
    ensure!(answer.code == 2 && answer.stderr.contains("not an absolute path"), "{answer:?}");
    Ok(())
}

#[test]
fn a_users_service_cannot_have_the_right_to_tell_clients() -> Result<()> {
    let quadlet = "home/test/.config/containers/systemd/dns.container";
    let tree = Tree::new(&[(quadlet, "[Container]\nImage=localhost/dns\nNetwork=none\n")])?;
    let before = tree.listing()?;
    let words = ["dns", "--user", "--external-port", "53/udp", "--icmp-port-unreachable"];
    let answer = said(&mut tree.command(&words))?;
    let refused = answer.code == 2 && answer.stderr.contains("no service of a user's manager can have");
    ensure!(refused && tree.listing()? == before, "{answer:?}");
    Ok(())
}

/// A socket that was bound to a network interface stays bound, and a unix socket cannot be.
#[test]
fn a_port_on_an_interface_becomes_no_unix_socket() -> Result<()> {
    let tree = Tree::with_web()?;
    ensure!(tree.run(&["web", "--external-port", "80", "--bind-to-device", "lo"])?.code == 0);
    let before = tree.listing()?;
    let answer = tree.run(&["web", "--external-port", "/run/x"])?;
    ensure!(answer.code == 2 && answer.stderr.contains("network interface lo"), "{answer:?}");
    ensure!(tree.listing()? == before, "something was written");
    Ok(())
}

/// Of which the profile would be made.
#[test]
fn without_a_profile_none_that_adopts_is_made() -> Result<()> {
    let tree = Tree::with_web()?;
    let before = tree.listing()?;
    let answer = tree.run(&["web", "--external-port", "80", "--adopt"])?;
    ensure!(answer.code == 4 && answer.stderr.contains("install containers-common"), "{answer:?}");
    // Whose runtime directory the profile would name is not known.
    tree.write("home/test/.config/containers/systemd/mine.container", "[Container]\nImage=x\n")?;
    let answer = said(&mut tree.command(&["mine", "--user", "--external-port", "80", "--adopt"]))?;
    ensure!(answer.code == 2 && answer.stderr.contains("--adopt with --user and --root"), "{answer:?}");
    std::fs::remove_dir_all(tree.path("home"))?;
    ensure!(tree.listing()? == before, "something was written");
    Ok(())
}

/// Removing and leaving adoption take the profile away only if it is bro's.
#[test]
fn anothers_profile_is_not_touched() -> Result<()> {
    let tree = disk()?;
    let profile = "etc/systemd/system/web-activator-seccomp.json";
    tree.write(profile, PROFILE)?;
    let before = tree.listing()?;
    let answer = tree.run(&["web", "--external-port", "80", "--adopt"])?;
    ensure!(answer.code == 1 && answer.stderr.contains("was not written by bro activate"), "{answer:?}");
    ensure!(tree.listing()? == before, "something was written");
    std::fs::remove_file(tree.path(profile))?;
    ensure!(tree.run(&["web", "--external-port", "80", "--adopt"])?.code == 0);
    let adopting = tree.listing()?;
    // A newer source: the same command makes the profile anew, and nothing else.
    tree.write("usr/share/containers/seccomp.json", &PROFILE.replace("\"bind\"", "\"bind\", \"brk\""))?;
    let answer = tree.run(&["web"])?;
    ensure!(
        answer.code == 0
            && answer.stdout.starts_with(&format!("wrote {}\nenabled", tree.path(profile).display())),
        "{answer:?}"
    );
    let now = tree.listing()?;
    ensure!(now[profile] != adopting[profile] && now[profile].contains("\"brk\""), "{}", now[profile]);
    Ok(())
}

/// Also the directories that are made for the files.
#[test]
fn a_dry_run_prints_what_is_written() -> Result<()> {
    let tree = Tree::with_web()?;
    let dry = tree.run(&["web", "--external-port", "80", "--dry-run"])?;
    ensure!(dry.code == 0 && tree.run(&["web", "--external-port", "80"])?.code == 0, "{dry:?}");
    let mut files = 0;
    for (path, text) in tree.listing()? {
        if text.starts_with("# Written by bro activate") {
            let printed = format!("==> {} <==\n{text}", tree.path(&path).display());
            ensure!(dry.stdout.contains(&printed), "{printed}\nis not in\n{}", dry.stdout);
            files += 1;
        }
    }
    ensure!(files == 3, "{files} files");
    Ok(())
}

#[test]
fn files_of_others_are_not_touched() -> Result<()> {
    for theirs in [
        "etc/systemd/system/web-activator.socket",
        "etc/systemd/system/web-activator.service",
        "etc/containers/systemd/web.container.d/50-bro-activator.conf",
    ] {
        let tree = Tree::with_web()?;
        tree.write(theirs, "# mine\n")?;
        let before = tree.listing()?;
        let answer = tree.run(&["web", "--external-port", "80"])?;
        ensure!(
            answer.code == 1 && answer.stderr.contains("was not written by bro activate"),
            "{theirs}: {answer:?}"
        );
        ensure!(tree.listing()? == before, "{theirs}: something was written");
    }
    // What was ours and is no more is not removed either.
    let tree = Tree::with_web()?;
    ensure!(tree.run(&["web", "--external-port", "80"])?.code == 0);
    let drop_in = "etc/containers/systemd/web.container.d/50-bro-activator.conf";
    tree.write(drop_in, "# mine now\n")?;
    let before = tree.listing()?;
    let answer = tree.run(&["web", "--remove"])?;
    ensure!(answer.code == 1 && answer.stderr.contains("was not written by bro activate"), "{answer:?}");
    ensure!(tree.listing()? == before, "something was removed");
    Ok(())
}

/// Users may name directories as they like, and root's units say where the quadlet is: a line feed there would be a line of theirs.
#[test]
fn a_directorys_name_is_no_line_of_roots_unit() -> Result<()> {
    use std::os::unix::ffi::OsStrExt as _;

    let tree = disk()?;
    let quadlets = "home/test/.config/containers/systemd";
    let evil = format!("{quadlets}/x\n[Service]\nUser=root\nExecStartPre=+/bin/touch /evil\n#");
    tree.write(&format!("{evil}/evil.container"), "[Container]\nImage=localhost/evil\n")?;
    // Nor would one that is no UTF-8 be read back as what it is.
    let other = tree.path(quadlets).join(std::ffi::OsStr::from_bytes(b"\xff"));
    std::fs::create_dir(&other)?;
    std::fs::write(other.join("other.container"), "[Container]\nImage=localhost/other\n")?;
    for name in ["evil", "other"] {
        for more in [&[][..], &["--dry-run"]] {
            let answer = said(
                tree.command(&[name, "--system", "--run-as", "test", "--external-port", "80"]).args(more),
            )?;
            ensure!(
                answer.code == 2
                    && answer.stderr.contains("no unit file can hold")
                    && answer.stderr.lines().count() == 1
                    && answer.stdout.is_empty(),
                "{answer:?}"
            );
        }
    }
    ensure!(!tree.path("etc/systemd").exists(), "something was written");
    Ok(())
}

/// The names of the units are the same, whichever user's container it is.
#[test]
fn one_name_is_one_users() -> Result<()> {
    let tree = disk()?;
    tree.write("home/test/.config/containers/systemd/web.container", "[Container]\nImage=localhost/web\n")?;
    ensure!(tree.run(&["web", "--external-port", "80"])?.code == 0);
    let before = tree.listing()?;
    let answer = tree.run(&["web", "--external-port", "81", "--run-as", "test"])?;
    ensure!(answer.code == 2 && answer.stderr.contains("for the system's own container"), "{answer:?}");
    ensure!(tree.listing()? == before, "something was written");
    ensure!(tree.run(&["web", "--remove"])?.code == 0);
    ensure!(tree.run(&["web", "--external-port", "81", "--run-as", "test"])?.code == 0);
    // Also when the user has gone since, it can be taken back.
    tree.write("etc/passwd", "root:x:0:0::/root:/bin/sh\n")?;
    ensure!(tree.run(&["web", "--external-port", "82"])?.code == 4);
    ensure!(tree.run(&["web", "--remove"])?.code == 0);
    Ok(())
}

#[test]
fn another_services_port_is_not_overwritten() -> Result<()> {
    let tree = Tree::with_web()?;
    tree.write("etc/containers/systemd/web-api.container", "[Container]\nImage=localhost/api\n")?;
    ensure!(tree.run(&["web", "--external-port", "80"])?.code == 0);
    ensure!(tree.run(&["web", "--service-name", "api", "--external-port", "81"])?.code == 0);
    let before = tree.listing()?;
    let answer = tree.run(&["web-api", "--external-port", "82"])?;
    ensure!(answer.code == 1 && answer.stderr.contains("belongs to another activated service"), "{answer:?}");
    ensure!(tree.listing()? == before, "something was written");
    Ok(())
}

#[test]
fn a_port_already_taken_is_said_with_its_owner() -> Result<()> {
    let listening = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listening.local_addr()?.to_string();
    let tree = Tree::with_web()?;
    // Without --root, so that ports are looked at; --dry-run, so that no service manager is.
    let config = tree.path("home/.config");
    tree.write("home/.config/containers/systemd/web.container", "[Container]\nImage=localhost/web\n")?;
    let mut command = Command::new(bro_tests::bro::binary());
    command.args(["activate", "web", "--user", "--dry-run", "--external-port", &address]);
    environment(&mut command);
    let answer = said(command.env("XDG_CONFIG_HOME", config))?;
    let expected = format!("{address} is taken by ");
    ensure!(answer.code == 0 && answer.stderr.contains(&expected), "{answer:?}");
    ensure!(answer.stderr.contains(&format!("(pid {}", std::process::id())), "{answer:?}");
    // Of a range, over UDP, each is looked at.
    let bound = std::net::UdpSocket::bind("127.0.0.6:0")?;
    let port = bound.local_addr()?.port();
    let range = format!("127.0.0.6:{}-{port}/udp", port - 1);
    let mut command = Command::new(bro_tests::bro::binary());
    command.args(["activate", "web", "--user", "--dry-run", "--external-port", &range]);
    environment(&mut command);
    let answer = said(command.env("XDG_CONFIG_HOME", tree.path("home/.config")))?;
    let expected = format!("{range} is taken by ");
    ensure!(answer.code == 0 && answer.stderr.contains(&expected), "{answer:?}");
    ensure!(answer.stderr.contains(&format!("at 127.0.0.6:{port}/udp")), "{answer:?}");
    Ok(())
}

/// systemd would remove it to listen there.
#[test]
fn what_is_no_socket_is_in_the_way_of_one() -> Result<()> {
    let tree = Tree::with_web()?;
    tree.write("home/.config/containers/systemd/web.container", "[Container]\nImage=localhost/web\n")?;
    tree.write("precious", "mine")?;
    let path = tree.path("precious").display().to_string();
    let mut command = Command::new(bro_tests::bro::binary());
    command.args([
        "activate",
        "web",
        "--user",
        "--dry-run",
        "--external-port",
        &path,
        "--internal-port",
        "80",
    ]);
    environment(&mut command);
    let answer = said(command.env("XDG_CONFIG_HOME", tree.path("home/.config")))?;
    let expected = format!("there is a file at {path}, which systemd would remove");
    ensure!(answer.code == 0 && answer.stderr.contains(&expected), "{answer:?}");
    Ok(())
}

#[test]
fn without_a_service_manager_nothing_is_written() -> Result<()> {
    let tree =
        Tree::new(&[("config/containers/systemd/web.container", "[Container]\nImage=localhost/web\n")])?;
    let before = tree.listing()?;
    let mut command = Command::new(bro_tests::bro::binary());
    command.args(["activate", "web", "--user", "--external-port", "8080"]);
    environment(&mut command);
    command.env("XDG_CONFIG_HOME", tree.path("config")).env("XDG_RUNTIME_DIR", tree.path("nowhere"));
    let answer = said(command.env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent/bus"))?;
    ensure!(answer.code == 1 && answer.stderr.contains("service manager cannot be reached"), "{answer:?}");
    ensure!(tree.listing()? == before, "something was written");
    Ok(())
}

#[test]
fn it_goes_by_its_other_names_too() -> Result<()> {
    let tree = Tree::with_web()?;
    for name in ["bro-activate", "bro-activator"] {
        let link = tree.path(name);
        std::os::unix::fs::symlink(bro_tests::bro::binary(), &link)?;
        let mut command = Command::new(&link);
        command.args(["web", "--external-port", "80", "--system", "--dry-run", "--root"]).arg(tree.root());
        environment(&mut command);
        let answer = said(&mut command)?;
        let program = format!("ExecStart={} forward", bro_tests::bro::binary().display());
        ensure!(answer.code == 0 && answer.stdout.contains(&program), "{answer:?}");
    }
    Ok(())
}
