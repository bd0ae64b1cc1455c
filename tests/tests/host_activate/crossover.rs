//! One account's container reaches another account's service through its activated port, and wakes it.

use anyhow::{Result, ensure};
use bro_tests::host::site::{Plan, Site};
use bro_tests::host::{Host, Manager};

/// Whatever of the host's network a container may reach is said by its own Network=.
pub fn pasta(host: &Host) -> Result<()> {
    let (client, service) = (Manager::User("test"), Manager::User("other"));
    let plan = Plan::service(service, 0.3, "--exit-idle-time 300ms");
    let site = Site::new(host, service, "shared", &plan)?;
    let port = site.port;
    let from = |network: &str, address: &str| {
        let ask = format!(
            "printf who | timeout 60 podman run --rm --interactive --pull=never --network={network} \
             docker.io/alpine/socat -t10 - TCP:{address}:{port}"
        );
        client.try_run(host, &["sh", "-c", &ask])
    };
    let ways = [
        (format!("pasta:-T,{port}"), "127.0.0.1"),
        ("pasta:--map-host-loopback,169.254.1.3".into(), "169.254.1.3"),
        ("pasta".into(), "host.containers.internal"),
        ("podman".into(), "host.containers.internal"),
    ];
    let mut runs = Vec::new();
    for (network, address) in &ways {
        ensure!(site.forwarder_show("ActiveState")? == "inactive", "a forwarder runs without a client");
        let answer = from(network, address)?;
        ensure!(answer.stdout.len() > 32, "{network}, {address}: {answer:?}\n{}", site.journals());
        runs.push(answer.stdout[..32].to_owned());
        site.await_exit()?;
        site.await_container_gone()?;
    }
    runs.dedup();
    ensure!(runs.len() == ways.len(), "not each of them woke it: {runs:?}");
    // Nothing is open unless it is asked for. Podman on a busy machine may not pass on what a container said that ended at once.
    let mut refused = from("pasta", "127.0.0.1")?;
    for _ in 0..2 {
        if !refused.stderr.is_empty() {
            break;
        }
        refused = from("pasta", "127.0.0.1")?;
    }
    ensure!(!refused.success() && refused.stderr.contains("refused"), "{refused:?}");
    Ok(())
}
