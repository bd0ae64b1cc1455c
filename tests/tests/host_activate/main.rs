//! `bro activate` on a real host: quadlets become activated services, rootful and rootless, behind systemd as PID 1, with real
//! services in real containers; what breaks them; and every example of the documentation. `BRO_CASE=part` runs the cases so
//! named.

mod crossover;
mod networks;
mod power;

use anyhow::Result;
use bro_tests::host::cases::{Cases, note};
use bro_tests::host::{Host, Manager, NEEDS, site};

/// A case that holds for rootful and for rootless containers.
type Case = (&'static str, fn(&Host, Manager) -> Result<()>);

const BOTH: &[Case] = &[
    ("an address on a network of one's own", networks::own_network),
];

/// A case that chooses its managers itself.
type OtherCase = (&'static str, fn(&Host) -> Result<()>);

const OTHERS: &[OtherCase] = &[
    ("the rootless network namespace itself", networks::rootless_namespace),
    ("one account's container wakes another's service", crossover::pasta),
];

#[test]
fn activated_services_on_a_real_host() {
    if !bro_tests::tier::met("activated_services_on_a_real_host", &NEEDS) {
        return;
    }
    let cases = Cases::default();
    let mut host = Host::boot().expect("the host boots");
    note(&format!("the host booted in {:.1} s", host.booted_in().as_secs_f64()));
    site::prepare(&host).expect("the host can be prepared");
    for manager in [Manager::System, Manager::User("test"), Manager::User("other")] {
        manager.import_image(&host, "socat", "docker.io/alpine/socat").expect("the image can be imported");
    }
    // At once, as on a server: most of the time is spent waiting.
    std::thread::scope(|scope| {
        for manager in [Manager::System, Manager::User("test")] {
            let (host, cases) = (&host, &cases);
            scope.spawn(move || {
                let kind = if manager == Manager::System { "rootful" } else { "rootless" };
                for (name, case) in BOTH {
                    cases.case(&format!("{kind}: {name}"), || case(host, manager));
                }
            });
        }
    });
    for (name, case) in OTHERS {
        cases.case(name, || case(&host));
    }
    cases.case("reboot and power cut in mid-stream", || power::reboot_and_power_cut(&mut host));
    cases.conclude();
}
