//! `bro fence`: what `bro activate --adopt` writes as `ExecStartPre=` of a system's socket unit, and root's part for a user's sockets.

use std::path::PathBuf;

use anyhow::Context as _;
use bro_proc::cgroup;
use bro_relay::source::{THIS_HOST_V4, THIS_HOST_V6};
use bro_sockmap::Unavailable;
use bro_sockmap::fence::{self, Told, Unfenced};

use crate::cli::Fence;
use crate::exit::Failure;

/// Puts it up.
///
/// # Errors
/// Without the right to, elsewhere than in a socket unit, or when the kernel refuses.
pub fn run(options: &Fence) -> anyhow::Result<()> {
    let group = match options.user {
        Some(user) => of_manager(user)?,
        None => own()?,
    };
    let told = Told {
        this_host: options.this_host.then_some((THIS_HOST_V4, THIS_HOST_V6)),
        ports: options.port.clone(),
    };
    fence::put_up(&group, &told).map_err(|error| match error {
        Unfenced::Load(Unavailable::NotPermitted(what, _)) => Failure::NotPermitted(format!(
            "not permitted to {what}: a fence takes CAP_BPF and CAP_NET_ADMIN, which a system's socket unit has"
        ))
        .into(),
        other => anyhow::Error::from(other),
    })
}

/// In any other group it would take connecting from what runs there.
fn own() -> anyhow::Result<PathBuf> {
    let group = cgroup::of_self().context("this process's control group")?;
    if group.extension().is_some_and(|extension| extension == "socket") {
        return Ok(group);
    }
    let sentence = "bro fence runs as ExecStartPre= of a socket unit of the system's, and here is none (or its ExecStartPre= has no control group of its own)";
    Err(Failure::Usage(sentence.to_owned()).into())
}

/// Where the listeners of a user's units are made.
fn of_manager(user: u32) -> anyhow::Result<PathBuf> {
    let group = cgroup::of_user(user).context("cgroup v2")?.join(format!("user@{user}.service/init.scope"));
    if group.is_dir() {
        return Ok(group);
    }
    let sentence = format!(
        "the service manager of the user {user} does not run (`loginctl enable-linger {user}` keeps it)"
    );
    Err(Failure::NotFound(sentence).into())
}
