//! NAME-activator.service: the forwarder, as systemd.service(5) is to run it.

use std::fmt::Write as _;
use std::path::Path;

use crate::adopt::Adopt;
use crate::installed::{Forwarder, Installed, SECTION};
use crate::systemd::scope::RuntimeScope;
use crate::systemd::unit_file::quote_word;

pub(super) fn text(
    installed: &Installed,
    forwarder: &Forwarder,
    root: Option<&Path>,
    has_steps: bool,
) -> String {
    let service = installed.service().unwrap_or_default();
    let mut text = super::heading(installed, Some(&service));
    let unit = &installed.unit;
    let sockets: Vec<&str> = installed.listeners.iter().map(|listener| &*listener.socket.name).collect();
    let sockets = sockets.join(" ");
    let order = if installed.adoption().is_some() {
        format!(
            "# At shutdown the container goes first: until then there is to be an answer to what it asks. The forwarder itself starts\n\
             # {unit}, so that clients of a container that cannot start are still told.\n\
             Before={unit}\n"
        )
    } else {
        format!(
            "# Nothing but an order, for shutdown: connections may finish before the container goes. The forwarder itself starts\n\
             # {unit}, so that clients of a container that cannot start are still told.\n\
             After={unit}\n"
        )
    };
    let (passed, store) = match installed.adoption() {
        None => (sockets.clone(), String::new()),
        Some(adoption) => (
            format!("{sockets} {}", adoption.agent.name),
            format!(
                "# What a running container asks comes by these descriptors, and by no others: also after the forwarder's end, however it ends.\n\
                 FileDescriptorStoreMax={STORE}\n\
                 FileDescriptorStorePreserve=yes\n"
            ),
        ),
    };
    let (part_of, after, user) = match &installed.run_as {
        None => (sockets.clone(), order, String::new()),
        Some(owner) => {
            let (name, manager, runtime) = (&owner.name, owner.manager(), owner.runtime_directory());
            (
                format!("{sockets} {manager}"),
                format!(
                    "# {unit} is {name}'s, and so is the service manager that runs it. (Requires= would leave clients untold when that\n\
                     # cannot start.)\n\
                     Wants={manager}\n\
                     After={manager}\n"
                ),
                format!("User={name}\nEnvironment=XDG_RUNTIME_DIR={}\n", runtime.display()),
            )
        }
    };
    let sandbox = super::hardening::lines(installed, forwarder, root.is_none());
    let again = if has_steps {
        "# One that cannot start is tried less and less often.\nRestartSec=1s\nRestartSteps=8\nRestartMaxDelaySec=1min\n"
    } else {
        "# (systemd before 254 knows no RestartSteps=, which would try one that cannot start less and less often.)\nRestartSec=5s\n"
    };
    let command = command(installed, forwarder).join(" \\\n    ");
    // Writing to a String cannot fail.
    write!(
        text,
        "[Unit]\n\
         Description=Forwarder that wakes {unit}\n\
         # Who stops the listening stops the forwarder too: it would go on with the sockets it has.\n\
         PartOf={part_of}\n\
         {after}\
         # Waking is not restarting: no limit on how often.\n\
         StartLimitIntervalSec=0\n\
         \n\
         [Service]\n\
         Type=notify\n\
         {user}\
         ExecStart={command}\n\
         # The program as it is on the disk by then takes over, and drops no client.\n\
         ExecReload=kill -HUP $MAINPID\n\
         Sockets={passed}\n\
         {store}\
         RuntimeDirectory=bro/%N\n\
         Restart=on-failure\n\
         {again}\
         WatchdogSec=30s\n\
         TimeoutStopSec=2min\n\
         \n\
         {sandbox}\
         \n\
         [{SECTION}]\n\
         Name={}\n",
        installed.name
    )
    .ok();
    for (key, value) in super::notes(installed, root) {
        writeln!(text, "{key}={value}").ok();
    }
    text
}

/// The most descriptors that the service manager keeps: those of the agent, and what a reload stores.
const STORE: usize = bro_adopt::store::MOST + 256;

fn command(installed: &Installed, forwarder: &Forwarder) -> Vec<String> {
    let mut words = vec![format!("{} forward", quote_word(&forwarder.program.display().to_string()))];
    let mut option = |name: &str, value: &str| words.push(quote_word(&format!("--{name}={value}")));
    option("unit", &installed.unit);
    if let Some(container) = &forwarder.container {
        option("container", container);
    }
    for (name, value) in forwarder.options.iter() {
        option(name, value);
    }
    for listener in &installed.listeners {
        let target = listener.internal.as_ref().map(ToString::to_string).unwrap_or_default();
        option("target", &format!("{}={target}", listener.service));
    }
    match installed.adoption().map(|adoption| adoption.what) {
        Some(Adopt::On) => words.push("--adopt".to_owned()),
        Some(what) => words.push(format!("--adopt={}", what.word())),
        None => {}
    }
    if installed.listeners.len() > 1 {
        words.push("--allow-missing-sockets".to_owned());
    }
    // bro chooses by the user that runs it, and root has a manager of its own too.
    if installed.unit_scope() == RuntimeScope::User {
        words.push("--user".to_owned());
    }
    words
}
