//! What a unit file can hold. Every value passes here before any text is made of it, wherever it comes from: one with a line feed
//! in it would be a line of its own, and in a unit of root's that is a command of root's.

use std::borrow::Cow;
use std::path::Path;

use super::{DropIn, RuntimeLink};
use crate::exit::Failure;
use crate::installed::{Adoption, Forwarder, Installed, InstalledPort, Mode, SocketUnit, Takeover};
use crate::run_as::RunAsUser;
use crate::systemd::unit_file::{holds, holds_path};

/// Checks all that files are made of. Taken apart without `..`, so that no field that is added later goes by unseen.
pub(super) fn check(installed: &Installed, drop_in: Option<&DropIn>) -> Result<(), Failure> {
    let Installed { name, scope: _, run_as, quadlet, unit, mode, listeners, drop_in: drop_in_file, made } =
        installed;
    let mut texts: Vec<Cow<'_, str>> = vec![name.into(), unit.into()];
    let mut paths: Vec<&Path> = vec![quadlet];
    let forwarder = match mode {
        Mode::Forward(forwarder) => Some(forwarder),
        Mode::Adopt(Adoption {
            forwarder,
            what: _,
            profile,
            source,
            agent,
            trusts_loopback: _,
            connects: _,
        }) => {
            let SocketUnit { name, file } = agent;
            texts.push(name.into());
            paths.extend([profile.as_path(), source, file]);
            Some(forwarder)
        }
        Mode::Direct(Takeover { way: _, pause_unit }) => {
            paths.extend(pause_unit.as_deref());
            None
        }
    };
    if let Some(Forwarder { service_file, program, container, container_given: _, options }) = forwarder {
        paths.extend([service_file.as_path(), program]);
        texts.extend(container.as_deref().map(Cow::from));
        texts.extend(options.iter().flat_map(|(name, value)| [name.into(), value.into()]));
    }
    paths.extend(drop_in_file.iter().chain(made).map(std::path::PathBuf::as_path));
    if let Some(RunAsUser { name, uid: _, gid: _, home }) = run_as {
        texts.push(name.into());
        paths.push(home);
    }
    for InstalledPort { service, socket, external, internal, backlog: _, device, fence } in listeners {
        let SocketUnit { name, file } = socket;
        texts.extend([service.into(), name.into(), external.to_string().into()]);
        texts.extend(internal.as_ref().map(|target| target.to_string().into()));
        texts.extend(device.as_deref().map(Cow::from));
        paths.extend(fence.as_ref().map(|fence| fence.program.as_path()));
        paths.push(file);
    }
    if let Some(DropIn { no_network: _, sockets, nginx: _, never_notifies: _, profile, runtime }) = drop_in {
        texts.extend(sockets.iter().map(Cow::from));
        paths.extend(profile.as_deref());
        if let Some(RuntimeLink { program, name, ports: _ }) = runtime {
            paths.push(program);
            texts.push(name.into());
        }
    }
    let bad = texts.into_iter().find(|text| !holds(text)).map(Cow::into_owned);
    let bad = bad.or_else(|| {
        paths.into_iter().find(|path| !holds_path(path)).map(|path| path.to_string_lossy().into_owned())
    });
    match bad {
        None => Ok(()),
        Some(bad) => Err(Failure::Usage(format!(
            "“{}” cannot stand in a unit file, which holds lines of UTF-8 without control characters",
            bad.escape_debug()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use bro_relay::listener::SocketKind;
    use bro_relay::target::Target;

    use super::*;
    use crate::address::External;
    use crate::installed::{ForwardOptions, Way, example};
    use crate::systemd::scope::RuntimeScope;
    use crate::targets::TargetRange;

    fn web() -> Installed {
        Installed {
            scope: RuntimeScope::System,
            run_as: Some(RunAsUser { name: "test".into(), uid: 7, gid: 7, home: "/home/test".into() }),
            listeners: vec![InstalledPort {
                device: Some("lo".into()),
                ..example::port("80", Some("127.0.0.1:80"))
            }],
            drop_in: Some("/drop-in.conf".into()),
            made: vec!["/made".into()],
            ..example::forwarded(Some("systemd-web"), &[("exit-idle-time", "5min")])
        }
    }

    fn forwarder(installed: &mut Installed) -> &mut Forwarder {
        let Mode::Forward(forwarder) = &mut installed.mode else { panic!("it has a forwarder") };
        forwarder
    }

    fn adoption(installed: &mut Installed) -> &mut Adoption {
        let forwarder = forwarder(installed).clone();
        installed.mode = Mode::Adopt(Adoption::new("web", forwarder, "/source".into(), Path::new("/units")));
        let Mode::Adopt(adoption) = &mut installed.mode else { panic!("it is one") };
        adoption
    }

    /// No file is made of a value with a line feed, wherever it is.
    #[test]
    fn a_line_feed_gets_nowhere() {
        const BAD: &str = "/x\nExecStartPre=+/bin/evil";
        let drop_in = DropIn { sockets: vec!["web.socket".into()], ..DropIn::default() };
        let files = |installed: &Installed, drop_in: &DropIn| {
            super::super::files(installed, Some(drop_in), (None, true))
        };
        assert!(!files(&web(), &drop_in).unwrap().is_empty());
        let spoil: [fn(&mut Installed); 21] = [
            |all| all.name = BAD.into(),
            |all| all.run_as.as_mut().unwrap().name = BAD.into(),
            |all| all.run_as.as_mut().unwrap().home = BAD.into(),
            |all| all.quadlet = BAD.into(),
            |all| all.unit = BAD.into(),
            |all| forwarder(all).container = Some(BAD.into()),
            |all| forwarder(all).service_file = BAD.into(),
            |all| forwarder(all).program = BAD.into(),
            |all| all.listeners[0].service = BAD.into(),
            |all| all.listeners[0].socket.name = BAD.into(),
            |all| all.listeners[0].external = External::Abstract(SocketKind::Stream, BAD.into()),
            |all| all.listeners[0].internal = Some(TargetRange::one(Target::Unix(BAD.into()))),
            |all| all.listeners[0].device = Some(BAD.into()),
            |all| {
                forwarder(all).options = ForwardOptions::from_iter([("ready".to_owned(), BAD.to_owned())]);
            },
            |all| all.drop_in = Some(BAD.into()),
            |all| {
                all.mode = Mode::Direct(Takeover { way: Way::ListenFds, pause_unit: Some(BAD.into()) });
            },
            |all| all.made[0] = BAD.into(),
            |all| adoption(all).profile = BAD.into(),
            |all| adoption(all).source = BAD.into(),
            |all| adoption(all).agent.name = BAD.into(),
            |all| adoption(all).agent.file = BAD.into(),
        ];
        for (number, spoil) in spoil.iter().enumerate() {
            let mut spoilt = web();
            spoil(&mut spoilt);
            let error = files(&spoilt, &drop_in).unwrap_err().to_string();
            assert!(
                error.contains("cannot stand in a unit file") && !error.contains('\n'),
                "{number}: {error}"
            );
        }
        for drop_in in [
            DropIn { sockets: vec![BAD.into()], ..DropIn::default() },
            DropIn { profile: Some(BAD.into()), ..DropIn::default() },
        ] {
            files(&web(), &drop_in).unwrap_err();
        }
    }

    #[test]
    fn what_would_be_read_back_otherwise_is_refused_too() {
        use std::os::unix::ffi::OsStrExt as _;
        assert!(holds_path(Path::new("/run/ü b")) && !holds_path(Path::new("/run/x\\")));
        assert!(!holds_path(Path::new(std::ffi::OsStr::from_bytes(b"/run/\xff"))));
    }
}
