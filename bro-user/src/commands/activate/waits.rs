//! What is said while `bro activate` waits for a forwarder that lets its clients finish: which clients, for how long, and how to
//! cut it short.

use std::future::Future;
use std::io::Write as _;
use std::pin::pin;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::cli::DRAIN_TIMEOUT;
use crate::exit::on_one_line;
use crate::installed::Installed;
use crate::systemd::manager::SystemdManager;
use crate::systemd::scope::RuntimeScope;

/// Between two looks. A wait that ends sooner needs no words.
const STEP: Duration = Duration::from_secs(1);

/// How long nothing is said while nothing changes.
const SILENCE: Duration = Duration::from_secs(10);

/// Does the work, and says on standard error what it waits for.
pub(super) async fn telling<T>(
    systemd: &SystemdManager,
    installed: Option<&Installed>,
    work: impl Future<Output = T>,
) -> T {
    let mut work = pin!(work);
    let mut wait = installed.and_then(Wait::for_clients_of);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            () = sleep(STEP) => if let Some(wait) = &mut wait {
                wait.look(systemd).await;
            }
        }
    }
}

/// A forwarder that may take long to stop.
#[derive(Debug)]
struct Wait {
    service: String,
    manager: RuntimeScope,
    limit: String,
    began: Instant,
    /// The last words, and their time.
    said: Option<(String, Instant)>,
}

impl Wait {
    /// For a service with a forwarder.
    fn for_clients_of(installed: &Installed) -> Option<Self> {
        let limit = installed.option("drain-timeout").unwrap_or(DRAIN_TIMEOUT).to_owned();
        Some(Self {
            service: installed.service()?,
            manager: installed.scope,
            limit,
            began: Instant::now(),
            said: None,
        })
    }

    async fn look(&mut self, systemd: &SystemdManager) {
        // A service manager that does not answer now is waited for all the same.
        let Ok(found) = systemd.how_far(&self.service).await else { return };
        if found.state == "deactivating"
            && let Some(text) = self.news(&found.status, Instant::now())
        {
            std::io::stderr().lock().write_all(text.as_bytes()).ok();
        }
    }

    /// What there is to say, if anything: `status` is what the forwarder says of itself.
    fn news(&mut self, status: &str, now: Instant) -> Option<String> {
        let status = on_one_line(status);
        let is_old = self.said.as_ref().is_some_and(|(said, at)| *said == status && now < *at + SILENCE);
        if is_old {
            return None;
        }
        let first = self.said.is_none();
        self.said = Some((status.clone(), now));
        let service = &self.service;
        if !first {
            return Some(format!("bro: still waiting, {} s now: {status}\n", (now - self.began).as_secs()));
        }
        let user = if self.manager == RuntimeScope::User { " --user" } else { "" };
        Some(format!(
            "bro: {service} lets its clients finish before it stops, for {} at most (--drain-timeout): {status}\n\
             bro: to cut them off: systemctl{user} kill --kill-whom=main {service}\n",
            self.limit
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_is_new_and_now_and_then_that_nothing_is() {
        let began = Instant::now();
        let mut wait = Wait {
            service: "web-activator.service".into(),
            manager: RuntimeScope::User,
            limit: "30s".into(),
            began,
            said: None,
        };
        let at = |seconds| began + Duration::from_secs(seconds);
        let first = wait.news("Draining: 2 connections left", at(1)).unwrap();
        assert!(first.contains("for 30s at most") && first.contains("2 connections left"), "{first}");
        assert!(first.contains("systemctl --user kill --kill-whom=main web-activator.service"), "{first}");
        assert_eq!(wait.news("Draining: 2 connections left", at(2)), None);
        let next = wait.news("Draining: 1 connection left", at(3)).unwrap();
        assert_eq!(next, "bro: still waiting, 3 s now: Draining: 1 connection left\n");
        assert_eq!(wait.news("Draining: 1 connection left", at(12)), None);
        assert!(wait.news("Draining: 1 connection left", at(13)).unwrap().contains("13 s now"));
    }
}
