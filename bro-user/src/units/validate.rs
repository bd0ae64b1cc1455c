//! What a unit file can hold. Every value passes here before any text is made of it, wherever it comes from: one with a line feed
//! in it would be a line of its own, and in a unit of root's that is a command of root's.

use std::path::Path;

use super::DropIn;
use crate::exit::Failure;
use crate::installed::{Installed, InstalledPort};
use crate::run_as::RunAsUser;
use crate::systemd::unit_file::{holds, holds_path};

/// Checks all that files are made of. Taken apart without `..`, so that no field that is added later goes by unseen.
pub(super) fn check(activated: &Installed, bro: &Path, drop_in: Option<&DropIn>) -> Result<(), Failure> {
    let Installed {
        name,
        scope: _,
        run_as,
        quadlet,
        unit,
        container,
        direct: _,
        socket_file,
        service_file,
        listeners,
        options,
        container_given: _,
        drop_in: drop_in_file,
        pause_unit,
        made,
    } = activated;
    let mut texts: Vec<&str> = vec![name, unit];
    let mut paths: Vec<&Path> = vec![bro, quadlet, socket_file];
    texts.extend(container.as_deref());
    paths.extend(service_file.as_deref());
    paths.extend(drop_in_file.iter().chain(pause_unit).chain(made).map(std::path::PathBuf::as_path));
    if let Some(RunAsUser { name, uid: _, gid: _, home }) = run_as {
        texts.push(name);
        paths.push(home);
    }
    for InstalledPort { service, socket, file, address, target, backlog: _, device } in listeners {
        texts.extend([service, socket, address].map(String::as_str));
        texts.extend(target.as_deref().into_iter().chain(device.as_deref()));
        paths.push(file);
    }
    for (name, value) in options {
        texts.extend([name.as_str(), value.as_str()]);
    }
    if let Some(DropIn { no_network: _, sockets, nginx: _, never_notifies: _ }) = drop_in {
        texts.extend(sockets.iter().map(String::as_str));
    }
    let bad = texts.into_iter().find(|text| !holds(text)).map(str::to_owned);
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
    use super::*;
    use crate::systemd::scope::RuntimeScope;

    fn activated() -> Installed {
        Installed {
            name: "web".into(),
            scope: RuntimeScope::System,
            run_as: Some(RunAsUser { name: "test".into(), uid: 7, gid: 7, home: "/home/test".into() }),
            quadlet: "/home/test/web.container".into(),
            unit: "web.service".into(),
            container: Some("systemd-web".into()),
            direct: false,
            socket_file: "/units/web-activator.socket".into(),
            service_file: Some("/units/web-activator.service".into()),
            listeners: vec![InstalledPort {
                service: "web".into(),
                socket: "web-activator.socket".into(),
                file: "/units/web-activator.socket".into(),
                address: "80".into(),
                target: Some("127.0.0.1:80".into()),
                backlog: None,
                device: Some("lo".into()),
            }],
            options: vec![("exit-idle-time".into(), "5min".into())],
            container_given: false,
            drop_in: Some("/drop-in.conf".into()),
            pause_unit: Some("/pause.service".into()),
            made: vec!["/made".into()],
        }
    }

    /// No file is made of a value with a line feed, wherever it is.
    #[test]
    fn a_line_feed_gets_nowhere() {
        const BAD: &str = "/x\nExecStartPre=+/bin/evil";
        let drop_in = DropIn { sockets: vec!["web.socket".into()], ..DropIn::default() };
        let files = |activated: &Installed, drop_in: &DropIn| {
            super::super::files(activated, Path::new("/usr/bin/bro"), Some(drop_in), (None, true))
        };
        assert!(!files(&activated(), &drop_in).unwrap().is_empty());
        let spoil: [fn(&mut Installed); 15] = [
            |all| all.name = BAD.into(),
            |all| all.run_as.as_mut().unwrap().name = BAD.into(),
            |all| all.run_as.as_mut().unwrap().home = BAD.into(),
            |all| all.quadlet = BAD.into(),
            |all| all.unit = BAD.into(),
            |all| all.container = Some(BAD.into()),
            |all| all.service_file = Some(BAD.into()),
            |all| all.listeners[0].service = BAD.into(),
            |all| all.listeners[0].address = BAD.into(),
            |all| all.listeners[0].target = Some(BAD.into()),
            |all| all.listeners[0].device = Some(BAD.into()),
            |all| all.options[0].1 = BAD.into(),
            |all| all.drop_in = Some(BAD.into()),
            |all| all.pause_unit = Some(BAD.into()),
            |all| all.made[0] = BAD.into(),
        ];
        for (number, spoil) in spoil.iter().enumerate() {
            let mut spoilt = activated();
            spoil(&mut spoilt);
            let error = files(&spoilt, &drop_in).unwrap_err().to_string();
            assert!(
                error.contains("cannot stand in a unit file") && !error.contains('\n'),
                "{number}: {error}"
            );
        }
        let drop_in = DropIn { sockets: vec![BAD.into()], ..DropIn::default() };
        files(&activated(), &drop_in).unwrap_err();
    }

    #[test]
    fn what_would_be_read_back_otherwise_is_refused_too() {
        use std::os::unix::ffi::OsStrExt as _;
        assert!(holds_path(Path::new("/run/ü b")) && !holds_path(Path::new("/run/x\\")));
        assert!(!holds_path(Path::new(std::ffi::OsStr::from_bytes(b"/run/\xff"))));
    }
}
