//! Every reader of what comes from outside, for the fuzzers in `fuzz/`: one function for each kind of input, which panics when a
//! reader does, or when what was read is not what was written. Built by cargo fuzz only.

use std::path::{Path, PathBuf};

use bro_proc::cgroup;
use bro_relay::engine::protocol;
use bro_relay::netns::{netlink, wire};
use bro_relay::proxy_protocol::{Bad, Incoming, Introduction, LONGEST, Version};
use bro_relay::target::Target;
use bro_sockmap::btf::Offsets;
use clap::Parser as _;

use crate::address::{self, External, Internal};
use crate::cli::{Cli, LocalClients};
use crate::commands::activate::publish_port::PublishedPorts;
use crate::commands::status;
use crate::installed::{SECTION, WrittenUnits};
use crate::podman::container;
use crate::podman::quadlet::{self, QuadletKind};
use crate::service::readiness::Ready;
use crate::systemd::listen_fds::{self, Environment};
use crate::systemd::scope::RuntimeScope;
use crate::systemd::time_span::TimeSpan;
use crate::systemd::unit_file::{UnitFile, quote_word, split_words};
use crate::targets::TargetRange;
use crate::{control_socket, port_owner, targets};

/// Takes an answer that is not looked at further, so that the optimizer leaves no reader out.
fn used<T>(answer: T) {
    drop(std::hint::black_box(answer));
}

/// `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES`, a line each.
pub fn environment(text: &str) {
    let mut lines = text.split('\n').map(|line| Some(line.to_owned()).filter(|line| line != "-"));
    let mut next = || lines.next().flatten();
    let environment = Environment { pid: next(), fds: next(), names: next() };
    if let Ok(names) = environment.passed_to(7) {
        assert!(names.len() <= 1024);
    }
}

/// A unit file with a drop-in after a line of dashes.
pub fn unit_file(text: &str) {
    let (first, second) = text.split_once("\n----\n").unwrap_or((text, ""));
    let mut file = UnitFile::parse(first);
    file.read(second);
    for section in ["Container", "Service", "Unit", "Install", SECTION] {
        for key in ["Image", "Exec", "ExecStart", "WantedBy", "Name", "Option"] {
            used((file.value(section, key).is_some(), file.boolean(section, key)));
            let words = file.words(section, key);
            let line: Vec<String> = words.iter().map(|word| quote_word(word)).collect();
            let doubled: Vec<String> =
                words.iter().map(|word| word.replace('%', "%%").replace('$', "$$")).collect();
            assert_eq!(split_words(&line.join(" ")), doubled);
        }
    }
}

/// The name of a quadlet, and after it the quadlet.
pub fn quadlet(text: &str) {
    let (name, text) = text.split_once('\n').unwrap_or((text, ""));
    let Ok((stem, kinds)) = quadlet::parse_name(name) else { return };
    let file = UnitFile::parse(text);
    for kind in kinds {
        if let Ok(unit) = quadlet::unit(&stem, kind, &file, Path::new("x")) {
            let container = quadlet::container(&stem, kind, &file, &unit, None);
            let quadlet = quadlet::Quadlet {
                name: stem.clone(),
                kind,
                path: "x".into(),
                file: file.clone(),
                unit,
                container,
            };
            let _nginx: bool = quadlet.is_nginx();
            for publish in quadlet.values("PublishPort") {
                used(PublishedPorts::read(publish));
            }
        }
    }
    assert!(!QuadletKind::Pod.extension().is_empty());
}

/// Whatever the command line takes as an address or a way.
pub fn target(text: &str) {
    if let Ok(target) = text.parse::<Target>() {
        assert_eq!(target.to_string().parse::<Target>(), Ok(target));
    }
    if let Ok(external) = text.parse::<External>() {
        assert_eq!(external.to_string().parse::<External>(), Ok(external.clone()));
        used(external.local());
    }
    if let Ok(targets) = text.parse::<TargetRange>() {
        assert_eq!(targets.to_string().parse::<TargetRange>(), Ok(targets.clone()));
        used(targets.all().count());
    }
    used((targets::parse_named(text).is_ok(), listen_fds::parse_listen(text).is_ok()));
    used((
        text.parse::<Internal>().is_ok(),
        text.parse::<Ready>().is_ok(),
        text.parse::<LocalClients>().is_ok(),
    ));
    used((address::service_name(text).is_ok(), address::device(text).is_ok()));
    used((address::absolute(text).is_ok(), address::one_line(text).is_ok()));
}

/// What a trusted balancer sends, in pieces of as many bytes as the first one says.
pub fn proxy_header(bytes: &[u8]) {
    let Some((&size, stream)) = bytes.split_first() else { return };
    let (mut incoming, mut taken) = (Incoming::default(), 0);
    for there in (0..stream.len()).step_by(usize::from(size).max(1)).chain([stream.len()]) {
        let waiting = stream.get(taken..there).unwrap_or_default();
        if waiting.is_empty() {
            continue;
        }
        let Ok(count) = incoming.belonging(waiting) else { return };
        assert!((1..=waiting.len()).contains(&count));
        taken += count;
        assert!(taken <= LONGEST);
        match incoming.take(&waiting[..count]) {
            Ok(None) => {}
            // A header that was read can be passed on.
            Ok(Some(Introduction::Client { source, destination }))
                if source.is_ipv4() == destination.is_ipv4() =>
            {
                for version in [Version::V1, Version::V2] {
                    let header = version.header(Some((source, destination)));
                    assert_eq!(
                        incoming_whole(&header),
                        Ok(Some(Introduction::Client { source, destination }))
                    );
                }
                return;
            }
            Ok(Some(_)) | Err(_) => return,
        }
    }
}

fn incoming_whole(header: &[u8]) -> Result<Option<Introduction>, Bad> {
    let mut incoming = Incoming::default();
    assert_eq!(incoming.belonging(header), Ok(header.len()));
    incoming.take(header)
}

/// A span of time; printed, it is the same one.
pub fn time_span(text: &str) {
    if let Ok(span) = text.parse::<TimeSpan>() {
        assert_eq!(span.to_string().parse::<TimeSpan>(), Ok(span));
    }
}

/// The command line: a word a line.
pub fn command_line(text: &str) {
    let words = std::iter::once("bro").chain(text.split('\n'));
    if let Err(error) = Cli::try_parse_from(words) {
        assert!(!error.to_string().is_empty());
    }
}

/// What the kernel shows in /proc: of cgroups, of a process, of sockets; and a process's own command line.
pub fn proc_tables(bytes: &[u8]) {
    container::Conmon::parse(bytes);
    let text = String::from_utf8_lossy(bytes);
    if let Ok(path) = cgroup::parse(&text, Path::new("/sys/fs/cgroup")) {
        assert!(path.starts_with("/sys/fs/cgroup"));
    }
    container::parent_in(&text);
    container::has_one_number(&text);
    for line in text.lines() {
        port_owner::row(line);
    }
}

/// A datagram of sock_diag(7) or rtnetlink(7).
pub fn socket_table(bytes: &[u8]) {
    netlink::messages::<netlink_packet_sock_diag::SockDiagMessage>(bytes, &mut |_| ()).ok();
    netlink::messages::<netlink_packet_route::RouteNetlinkMessage>(bytes, &mut |_| ()).ok();
}

/// The kernel's description of its types.
pub fn kernel_types(bytes: &[u8]) {
    Offsets::find(bytes).ok();
}

/// What a forwarder is asked: over its status socket, and, as an agent, by the forwarder.
pub fn request(bytes: &[u8]) {
    if let Some(request) = std::str::from_utf8(bytes).ok().and_then(control_socket::Request::parse) {
        assert_eq!(control_socket::Request::parse(request.line()), Some(request));
    }
    if let Some(request) = wire::AgentRequest::decode(bytes) {
        assert_eq!(wire::AgentRequest::decode(&request.encode()), Some(request));
    }
}

/// What forwarder and relay process tell each other; the latter might be in other hands.
pub fn relay_process(bytes: &[u8]) {
    if let Ok(event) = serde_json::from_slice::<protocol::EngineEvent>(bytes) {
        assert!(serde_json::to_vec(&event).is_ok());
    }
    used(protocol::EngineCommand::decode(bytes, Vec::new()).is_some());
}

/// What a forwarder answers, as `bro status` reads and prints it.
pub fn answer(text: &str) {
    if let Ok(report) = serde_json::from_str::<status::Report>(text) {
        status::describe(&[report.clone(), report]);
    }
    used(serde_json::from_str::<control_socket::Reply>(text).is_ok());
}

/// Units that `bro activate` wrote, or another author: files with a line of dashes between two.
pub fn activated(text: &str) {
    let files: Vec<_> = text
        .split("\n----\n")
        .enumerate()
        .map(|(number, text)| {
            let kind = if text.contains("[Socket]") { "socket" } else { "service" };
            (PathBuf::from(format!("/units/{number}.{kind}")), UnitFile::parse(text))
        })
        .collect();
    let root = Some(Path::new("/root"));
    let units = WrittenUnits::of(files, Path::new("/units"), RuntimeScope::User, root);
    for installed in units.services() {
        used(crate::units::files(&installed, None, (root, false)).is_ok());
        used(installed.goes_by("web"));
        used(units.lost(&installed));
    }
    used(units.leftover("web").is_some());
}
