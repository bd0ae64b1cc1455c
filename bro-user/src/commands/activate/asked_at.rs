//! `--metrics`: can the forwarder be asked for them there? If it cannot listen, it serves no client either.

use std::path::Path;

use bro_relay::listener::SocketKind;

use super::plan::Paths;
use super::present::Present;
use crate::address::{External, ExternalSocket, SocketPlace};
use crate::exit::Failure;
use crate::installed;
use crate::installed::Installed;
use crate::metrics::endpoint::Endpoint;
use crate::port_owner;
use crate::port_owner::AddressTrouble;

/// Is the address free, also while other forwarders sleep?
pub(super) fn check(
    wanted: &Installed,
    installed: Option<&Installed>,
    present: &Present,
    places: &Paths,
) -> anyhow::Result<()> {
    let Some(text) = wanted.option("metrics") else { return Ok(()) };
    let endpoint: Endpoint = text.parse()?;
    for listener in &wanted.listeners {
        if clashes(&endpoint, &listener.external) {
            return Err(Failure::Usage(format!(
                "--metrics {text} is where clients connect, at {}; give another address",
                listener.external
            ))
            .into());
        }
    }
    if places.root.is_some() {
        return Ok(());
    }
    let elsewhere = installed::of_this_user_by_the_system(places.scope);
    let others = present.services.iter().chain(&elsewhere).filter(|other| other.name != wanted.name);
    let mut asked = others.filter_map(|other| Some((other, other.forwarder()?.options.metrics()?)));
    if let Some((other, _)) = asked.find(|(_, at)| same(&endpoint, at)) {
        return Err(Failure::Usage(format!(
            "--metrics {text}: those of {} are there; give each service an address of its own",
            other.name
        ))
        .into());
    }
    if installed.is_some_and(|installed| installed.option("metrics") == Some(text)) {
        return Ok(());
    }
    let place = match &endpoint {
        Endpoint::Tcp(address) => SocketPlace::Address(*address),
        Endpoint::Unix(path) => {
            folder(path)?;
            SocketPlace::Path(path.clone())
        }
    };
    match port_owner::look_at(&ExternalSocket { kind: SocketKind::Stream, place }) {
        None => Ok(()),
        Some(AddressTrouble::Forbidden(why)) => {
            Err(Failure::NotPermitted(format!("--metrics: {why}")).into())
        }
        Some(AddressTrouble::InTheWay(why)) => anyhow::bail!("--metrics: {why} (nothing was changed)"),
        Some(AddressTrouble::Taken(holder)) => {
            anyhow::bail!(
                "--metrics {text} is taken {}; give another address (nothing was changed)",
                holder.who(None)
            )
        }
    }
}

/// systemd makes the forwarder's own folder when it starts it; any other folder has to be there.
fn folder(path: &Path) -> anyhow::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let made = folder.parent().is_some_and(|above| above.ends_with("bro"));
    if made || folder.is_dir() {
        return Ok(());
    }
    Err(Failure::Usage(format!(
        "--metrics {}: there is no folder {}; make it, or give another path (nothing was changed)",
        path.display(),
        folder.display()
    ))
    .into())
}

/// Do both want the same address?
fn same(endpoint: &Endpoint, other: &Endpoint) -> bool {
    match (endpoint, other) {
        (Endpoint::Tcp(one), Endpoint::Tcp(other)) => {
            let everywhere = one.ip().is_unspecified() || other.ip().is_unspecified();
            one.port() != 0 && one.port() == other.port() && (one.ip() == other.ip() || everywhere)
        }
        (Endpoint::Unix(one), Endpoint::Unix(other)) => one == other,
        _ => false,
    }
}

fn clashes(endpoint: &Endpoint, external: &External) -> bool {
    external.sockets().any(|socket| match (endpoint, socket.place) {
        // The same port of UDP is another.
        (Endpoint::Tcp(_), _) if socket.kind == SocketKind::Datagram => false,
        (Endpoint::Tcp(address), SocketPlace::Port(port)) => address.port() == port,
        (_, SocketPlace::Address(other)) => same(endpoint, &Endpoint::Tcp(other)),
        (Endpoint::Unix(path), SocketPlace::Path(other)) => *path == other,
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_for_one() {
        let clash =
            |endpoint: &str, external: &str| clashes(&endpoint.parse().unwrap(), &external.parse().unwrap());
        assert!(clash("127.0.0.1:80", "80") && clash("127.0.0.1:80", "127.0.0.1:80"));
        assert!(clash("127.0.0.1:80", "0.0.0.0:80") && clash("0.0.0.0:80", "127.0.0.1:80"));
        assert!(
            clash("/run/x", "/run/x") && clash("127.0.0.1:81", "80-82") && !clash("127.0.0.1:81", "81/udp")
        );
        assert!(!clash("127.0.0.1:81", "80") && !clash("127.0.0.2:80", "127.0.0.1:80"));
        assert!(!clash("/run/x", "/run/y") && !clash("/run/x", "80") && !clash("127.0.0.1:80", "@x"));
        assert!(!clash("127.0.0.1:0", "127.0.0.1:1"));
    }

    #[test]
    fn a_folder_that_is_not_there_is_told_of() {
        for path in ["/run/bro/web-activator/m", "/run/user/7/bro/web-activator/m", "/tmp/m"] {
            folder(Path::new(path)).unwrap();
        }
        assert!(folder(Path::new("/nowhere/m")).unwrap_err().to_string().contains("no folder /nowhere"));
    }
}
