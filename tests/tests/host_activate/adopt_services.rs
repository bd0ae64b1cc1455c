//! `--adopt` with services as they are, many of them side by side: each is woken by its first client, sees that client's own address, goes on
//! doing so over what its administrator does to it, sleeps, and is woken again.

mod name_servers;
mod table;

use std::mem::ManuallyDrop;
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::machine::programs;
use bro_tests::host::site::{ACTIVATOR, PATIENCE, Plan, Site, ask, folder, text};
use bro_tests::host::{Host, Manager};
use bro_tests::tier::met;
use serde_json::Value;
use table::{FILES, Inside, Outside, SERVICES, SOURCES, Service, http, services};

use crate::activated::expect_asleep;
use crate::adopt::{expect_adopted as expect_seen, nginx, under_load};

/// Clients come to, and so from, this address of the host (`networks::outside`): no forwarder has it.
const CLIENT: &str = "192.0.2.1";

/// How many are looked after at once.
const AT_ONCE: usize = 12;

fn prepare(host: &Host, manager: Manager) -> Result<()> {
    manager.import_machine(host)?;
    let files = folder(host, manager, "whom")?;
    for (name, text) in FILES {
        host.write(&format!("{files}/{name}"), text)?;
    }
    folder(host, manager, "whom/log")?;
    build(host)?;
    let key = format!("{files}/key");
    host.client_program(&[
        "ssh-keygen",
        "-q",
        "-t",
        "ed25519",
        "-N",
        "",
        "-f",
        &host.path(&key).display().to_string(),
    ])?;
    Ok(())
}

/// Where in the host the programs are that were built for all managers.
const BUILT: &str = "/srv/built";

/// By whichever manager's case comes first.
fn build(host: &Host) -> Result<()> {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().expect("no holder panics");
    if host.path(&format!("{BUILT}/whom")).exists() {
        return Ok(());
    }
    for (name, text) in SOURCES {
        host.write(&format!("{BUILT}/{name}"), text)?;
    }
    let path = |name: &str| host.path(&format!("{BUILT}/{name}")).display().to_string();
    host.client_program(&["javac", "-d", &path(""), &path("Whom.java")])?;
    let cache = format!("GOCACHE={}", path("cache"));
    let go = ["env", &cache, "GO111MODULE=off", "go", "build", "-o"];
    host.client_program(&[&go[..], &[&path("whom"), &path("whom.go")]].concat())?;
    Ok(())
}

fn activate<'h>(host: &'h Host, manager: Manager, service: &Service) -> Result<Site<'h>> {
    let port = host.free_port()?;
    let site = Site { host, manager, name: service.name.into(), port, front: manager, suffix: ACTIVATOR };
    let inside = match (service.inside, manager) {
        (Inside::Port(inside), _) | (Inside::Compared(inside), Manager::System) => inside,
        (Inside::Compared(_), Manager::User(_)) => port,
    };
    let files = services(manager);
    let lines = service.lines.replace("{port}", &inside.to_string()).replace("{files}", &files);
    let volumes = format!("Volume={files}:/services:ro\nVolume={BUILT}:/built:ro");
    let plan = Plan::new(&format!("{}\nLogDriver=passthrough\n{volumes}\n{lines}", programs()), "", "");
    plan.write_quadlet(host, manager, service.name)?;
    let (adopt, external) = match service.outside {
        Outside::Dual => ("--adopt", port.to_string()),
        Outside::Datagrams => ("--adopt=all", format!("0.0.0.0:{port}/tcp+udp")),
        Outside::V4 | Outside::Unix(_) => ("--adopt", format!("0.0.0.0:{port}")),
    };
    let args = [
        "bro",
        "activate",
        service.name,
        adopt,
        "--trust-loopback",
        "--flow-timeout",
        "500ms",
        "--exit-idle-time",
        "2s",
        "--external-port",
        &external,
    ];
    manager.run(host, &[&args[..], &["--internal-port", &inside.to_string()]].concat())?;
    if let Outside::Unix(inside) = service.outside {
        let external = format!("{}/log/.s.PGSQL.5432", services(manager));
        let args = ["bro", "activate", service.name, "--service-name", "unix", "--external-port", &external];
        manager.run(host, &[&args[..], &["--internal-port", inside]].concat())?;
    }
    Ok(site)
}

/// All that its forwarder has logged says that its clients were never relayed.
fn expect_never_relayed(site: &Site<'_>) -> Result<Vec<Value>> {
    let records = site.front.journal_records(site.host, &site.forwarder())?;
    for record in &records {
        let said = text(record, "MESSAGE");
        ensure!(!said.contains("relayed, not adopted"), "{said}");
        ensure!(record.get("BRO_DURATION_MS").is_none(), "it has relayed: {record}");
        ensure!(text(record, "PRIORITY") != "3" || text(record, "_COMM") != "bro", "{said}");
    }
    Ok(records)
}

/// In a network of its own a relayed client has its own address too: what is said tells the two apart. So many sockets, each time that it was awake.
fn expect_adopted(site: &Site<'_>, sockets: usize) -> Result<()> {
    let records = expect_never_relayed(site)?;
    let says = |record: &&Value| {
        text(record, "MESSAGE").contains("adopted: the service accepts the clients of this socket itself")
    };
    let adopted = records.iter().filter(says).count();
    ensure!(adopted >= 2 * sockets, "of its sockets, {sockets}, one was adopted {adopted} times");
    Ok(())
}

/// From the first client to the one that wakes it again. It goes to sleep once more by itself.
fn one(host: &Host, manager: Manager, service: &Service, activates: &Mutex<()>) -> Result<()> {
    let site = {
        // One waits for the other in any case, and has a deadline.
        let _one = activates.lock().expect("no holder panics");
        ManuallyDrop::new(activate(host, manager, service)?)
    };
    let expect_client = || -> Result<()> {
        let said = (service.ask)(&site)?;
        ensure!(said.contains(CLIENT), "it sees another client: {said}");
        Ok(())
    };
    let both_times = || -> Result<()> {
        expect_client().context("the first client")?;
        (service.awake)(&site)?;
        expect_client().context("a client afterwards")?;
        expect_asleep(&site)?;
        expect_client().context("the client that wakes it again")?;
        expect_adopted(&site, service.outside.sockets())
    };
    both_times().with_context(|| site.journals())
}

/// All at once: `bro activate --remove` has systemd read all units anew for each.
fn remove_all(host: &Host, manager: Manager) -> Result<()> {
    let (units, quadlets) = (manager.unit_folder(), manager.quadlet_path(""));
    let sockets = host.sh(&format!("cd {units}; ls -d whom-*.socket whom-*-activator.service"))?;
    let services: Vec<String> = SERVICES.iter().map(|service| format!("{}.service", service.name)).collect();
    let all = sockets.lines().chain(services.iter().map(String::as_str));
    manager.systemctl(host, &["stop"].into_iter().chain(all).collect::<Vec<_>>())?;
    host.sh(&format!("rm -rf {units}/whom-* {units}/*.wants/whom-* {quadlets}whom-*"))?;
    manager.systemctl(host, &["daemon-reload"])?;
    let left = manager.run(host, &["podman", "ps", "--all", "--quiet", "--filter", "name=systemd-whom-"])?;
    ensure!(left.is_empty(), "containers are left: {left}");
    Ok(())
}

pub fn each(host: &Host, manager: Manager) -> Result<()> {
    prepare(host, manager)?;
    let (next, failed, activates) = (AtomicUsize::new(0), Mutex::new(Vec::new()), Mutex::new(()));
    let tried: Vec<&Service> = SERVICES.iter().filter(|service| met(service.name, service.needs)).collect();
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(service) = tried.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = one(host, manager, service, &activates) {
                        let mut failed = failed.lock().expect("no thread panics");
                        failed.push(format!("{}: {error:#}", service.name));
                    }
                }
            });
        }
    });
    let removed = remove_all(host, manager);
    let failed = failed.into_inner().expect("no thread panics");
    ensure!(failed.is_empty(), "{} of {} services:\n{}", failed.len(), tried.len(), failed.join("\n\n"));
    removed
}

/// As whom a service sees clients of this host, and those inside.
const fn this_host(manager: Manager) -> &'static str {
    match manager {
        Manager::System => "169.254.1.2",
        Manager::User(_) => "127.0.0.1",
    }
}

/// A container of a pod is adopted, and the pod's other containers find it where it was.
pub fn in_a_pod(host: &Host, manager: Manager) -> Result<()> {
    manager.import_machine(host)?;
    let files = folder(host, manager, "podded")?;
    host.write(&format!("{files}/whom.py"), include_str!("../../services/whom/whom.py"))?;
    manager.quadlet(host, "berth.pod", "[Pod]\nNetwork=none\n")?;
    let lines = format!(
        "{}\nVolume={files}:/services:ro\nExec=/usr/bin/python3 /services/whom.py 80\nStopSignal=SIGKILL",
        programs()
    );
    let whom = Plan { network: "Pod=berth.pod", ..Plan::new(&lines, "", "") };
    let other = Plan { network: "Pod=berth.pod", ..Plan::busybox("exec sleep 1000", "") };
    other.write_quadlet(host, manager, "beside")?;
    // The pod of a quadlet starts all its containers.
    let options = ["--adopt", "--internal-port", "80"];
    let site = Site::activated(host, manager, "podded", &whom, &options)?;
    let seen = || -> Result<()> {
        let answer = http(&site)?;
        ensure!(answer.ends_with(CLIENT), "{answer}");
        let page = ["podman", "exec", "systemd-beside", "wget", "-q", "-O-", "http://127.0.0.1:80/"];
        let answer = manager.run(host, &page)?;
        ensure!(answer == this_host(manager), "{answer}");
        Ok(())
    };
    let both_times = || -> Result<()> {
        seen()?;
        manager.run(host, &["bro", "sleep", "podded"])?;
        site.await_container_gone()?;
        seen()?;
        expect_adopted(&site, 1)
    };
    let said = both_times().with_context(|| site.journals());
    manager.systemctl(host, &["stop", "berth-pod.service"])?;
    said
}

/// systemd is executed anew, forwarders are reloaded, and bro itself is replaced: no client of an adopted service notices.
pub fn upgraded(host: &Host) -> Result<()> {
    let managers = [Manager::System, Manager::User("test")];
    let mut sites = Vec::new();
    for manager in managers {
        let site = Site::activated(
            host,
            manager,
            "upgraded",
            &nginx(host, manager)?,
            &["--adopt", "--trust-loopback"],
        )?;
        expect_seen(&site)?;
        sites.push(site);
    }
    let change = || -> Result<()> {
        for site in &sites {
            let mut mains = vec![site.forwarder_show("MainPID")?];
            let mut await_next = || {
                let mut main = String::new();
                host.wait_until("the next forwarder", PATIENCE, || {
                    main = site.forwarder_show("MainPID")?;
                    let active = site.forwarder_show("ActiveState")? == "active";
                    Ok(active && main != "0" && !mains.contains(&main))
                })?;
                mains.push(main);
                anyhow::Ok(())
            };
            site.manager.systemctl(host, &["daemon-reexec"])?;
            expect_seen(site)?;
            site.manager.systemctl(host, &["reload", &site.forwarder()])?;
            await_next()?;
            expect_seen(site)?;
            host.sh("cp /usr/local/bin/bro /usr/local/bin/bro.next; mv /usr/local/bin/bro.next /usr/local/bin/bro")?;
            let scope: &[&str] = if site.manager == Manager::System { &[] } else { &["--user"] };
            site.manager.run(host, &[&["bro", "after-upgrade"], scope].concat())?;
            await_next()?;
            expect_seen(site)?;
        }
        Ok(())
    };
    let held: Vec<TcpStream> = sites.iter().map(Site::client).collect::<Result<_>>()?;
    // Each under load while both are changed.
    let (system, user) = (&sites[0], &sites[1]);
    let mut of_user = (0, Vec::new());
    let (answered, failures) = under_load(system, || {
        of_user = under_load(user, change)?;
        Ok(())
    })?;
    for (site, (answered, failures)) in sites.iter().zip([(answered, failures), of_user]) {
        let well = answered > 10 && failures.is_empty();
        ensure!(well, "{answered} answered, and {failures:?}\n{}", site.journals());
        expect_never_relayed(site)?;
    }
    for client in held {
        let answer = ask(client, b"GET / HTTP/1.0\r\n\r\n")?;
        ensure!(answer.ends_with(b"127.0.0.1"), "the held client got {answer:?}");
    }
    Ok(())
}
