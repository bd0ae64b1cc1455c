//! Targets on networks of one's own: `.network` quadlets, and the namespace that a user's bridges are in.

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{INNER, Plan, Site};
use bro_tests::host::{Host, Manager};

/// Gives the host what every host has: an interface to the outside with an address and a default route. Without one, pasta
/// models a user's namespace on whatever else it finds, such as a bridge of root's containers.
pub fn outside(host: &Host) -> Result<()> {
    host.sh(
        "ip link add ext0 type veth peer name ext1; ip addr add 192.0.2.1/24 dev ext0; ip link set ext0 up; \
         ip link set ext1 up; ip route add default via 192.0.2.254 dev ext0",
    )?;
    Ok(())
}

/// Podman refuses a subnet that any other network of the host has, another user's too where it sees it.
fn subnet(manager: Manager) -> &'static str {
    match manager {
        Manager::System => "10.89.7",
        Manager::User(_) => "10.89.8",
    }
}

/// A service that listens on its address of a bridge network and nowhere else.
fn on_bridge(host: &Host, manager: Manager) -> Result<Plan> {
    let subnet = subnet(manager);
    manager.quadlet(host, "own.network", &format!("[Network]\nSubnet={subnet}.0/24\n"))?;
    let container = format!(
        "Image=docker.io/alpine/socat\nExec=TCP-LISTEN:{INNER},bind={subnet}.9,reuseaddr,fork EXEC:cat\nStopSignal=SIGKILL\n\
         IP={subnet}.9"
    );
    Ok(Plan { network: "Network=own.network", ..Plan::new(&container, "", "") })
}

pub fn own_network(host: &Host, manager: Manager) -> Result<()> {
    let target = format!("{}.9:{INNER}", subnet(manager));
    let mut plan = on_bridge(host, manager)?;
    plan.forward =
        format!("--unit {{name}}.service --container systemd-{{name}} --exit-idle-time 300ms {target}");
    let site = Site::new(host, manager, "bridged", &plan)?;
    for _ in 0..2 {
        site.check_echo().with_context(|| site.journals())?;
        site.await_exit()?;
        site.await_container_gone()?;
    }
    // Rootful, the bridge is the host's own network: the container need not be entered.
    if manager == Manager::System {
        plan.forward = format!("--unit {{name}}.service --exit-idle-time 300ms {target}");
        let site = Site::new(host, manager, "reached", &plan)?;
        site.check_echo().with_context(|| site.journals())?;
        site.await_exit()?;
    }
    Ok(())
}

/// Rootless bridges are in a namespace of their own, which no container is in: its file is Podman's, in Podman's mount
/// namespace.
pub fn rootless_namespace(host: &Host) -> Result<()> {
    let test = Manager::User("test");
    let runtime = format!("/run/user/{}", host.uid("test")?);
    let namespace = format!("{runtime}/containers/networks/rootless-netns/rootless-netns");
    let mut plan = on_bridge(host, test)?;
    plan.forward = format!(
        "--unit {{name}}.service --netns {namespace} --exit-idle-time 300ms --start-timeout 10s {}.9:{INNER}",
        subnet(test)
    );
    let site = Site::new(host, test, "namespace", &plan)?;
    for _ in 0..2 {
        site.check_echo().with_context(|| site.journals())?;
        site.await_exit()?;
        site.await_container_gone()?;
    }
    ensure!(site.errors()?.is_empty(), "{:?}", site.errors()?);
    Ok(())
}
