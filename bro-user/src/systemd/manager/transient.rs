//! A command within the confinement of another unit: a transient unit with that unit's directives.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::Context as _;
use zbus::{OwnedVariant, Variant};

use super::{SystemdManager, Transient, plain, wait};

/// A unit's properties, by their names on the bus (org.freedesktop.systemd1(5)).
pub type Properties = HashMap<String, OwnedVariant>;

/// How the command ended, as systemd has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// success, exit-code, signal, timeout, …
    pub result: String,
    /// CLD_EXITED is 1.
    pub code: i32,
    /// Its exit status, or the signal's number.
    pub status: i32,
}

/// A service's confining properties (systemd.exec(5)) that a transient unit takes in the form in which they are read.
pub const CONFINING: &[&str] = &[
    "User",
    "Group",
    "SupplementaryGroups",
    "DynamicUser",
    "Environment",
    "NoNewPrivileges",
    "CapabilityBoundingSet",
    "AmbientCapabilities",
    "SecureBits",
    "RestrictAddressFamilies",
    "RestrictFileSystems",
    "RestrictNamespaces",
    "RestrictRealtime",
    "RestrictSUIDSGID",
    "LockPersonality",
    "MemoryDenyWriteExecute",
    "KeyringMode",
    "Personality",
    "SystemCallArchitectures",
    "SystemCallFilter",
    "SystemCallErrorNumber",
    "ProtectSystem",
    "ProtectHome",
    "ProtectProc",
    "ProcSubset",
    "ProtectClock",
    "ProtectHostname",
    "ProtectKernelLogs",
    "ProtectKernelModules",
    "ProtectKernelTunables",
    "ProtectControlGroups",
    "PrivateTmp",
    "PrivateMounts",
    "PrivateDevices",
    "PrivateIPC",
    "PrivateNetwork",
    "PrivateUsers",
    "ReadOnlyPaths",
    "ReadWritePaths",
    "InaccessiblePaths",
    "NoExecPaths",
    "ExecPaths",
    "BindPaths",
    "BindReadOnlyPaths",
    "TemporaryFileSystem",
    "RootDirectory",
    "RootImage",
    "MountFlags",
    "NetworkNamespacePath",
    "AppArmorProfile",
    "SELinuxContext",
    "SmackProcessLabel",
    "TasksMax",
];

/// Does a unit that does not set the property have this value? Some of these values mean more when they are set.
fn says_nothing(name: &str, value: &Variant<'_>) -> bool {
    /// The bits of all kinds of namespaces.
    const NAMESPACES: u64 = 0x7e02_0080;
    match value {
        Variant::Bool(yes) => !yes,
        Variant::Str(text) => {
            matches!(text.as_str(), "" | "no" | "default")
                || (name == "KeyringMode" && text.as_str() == "inherit")
        }
        Variant::Array(all) => all.is_empty(),
        Variant::I32(number) => *number == 0,
        Variant::U64(bits) if name == "RestrictNamespaces" => bits & NAMESPACES == NAMESPACES,
        Variant::U64(bits) => match name {
            "AmbientCapabilities" | "MountFlags" => *bits == 0,
            // All there are, whatever this systemd knows of.
            "CapabilityBoundingSet" => bits.trailing_ones() > 38,
            _ => *bits == u64::MAX,
        },
        // A list says whether its entries are allowed, a label whether to go on without it: neither counts without the rest.
        Variant::Structure(parts) => match parts.fields() {
            [Variant::Bool(allowed), Variant::Array(all)] => !allowed && all.is_empty(),
            [Variant::Bool(_), Variant::Str(label)] => label.as_str().is_empty(),
            _ => true,
        },
        _ => false,
    }
}

impl SystemdManager {
    /// All that systemd knows of a service.
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn properties(&self, unit: &str) -> anyhow::Result<Properties> {
        let path = self.systemd.load_unit(unit).await?;
        let properties = zbus::fdo::PropertiesProxy::builder(self.connection());
        let properties = properties.destination("org.freedesktop.systemd1").path(path).build().await?;
        let interface = zbus::names::InterfaceName::try_from("org.freedesktop.systemd1.Service")?;
        Ok(properties.get_all(interface).await?)
    }

    /// Runs a command that prints to `output`, confined as these properties say, and waits for its end. After `limit` it is killed,
    /// with everything that it has started. Properties that this systemd does not take are left out.
    ///
    /// # Errors
    /// When systemd refuses, with its own words.
    pub async fn run_confined(
        &self,
        words: &[String],
        confines: &Properties,
        output: OwnedFd,
        limit: Duration,
    ) -> anyhow::Result<Ended> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let unit = format!("bro-doctor-{}-{}.service", std::process::id(), NEXT.fetch_add(1, Relaxed));
        let program = words.first().context("a command has a first word")?;
        let mut confining: Vec<(&str, &OwnedVariant)> = CONFINING
            .iter()
            .filter_map(|name| Some((*name, confines.get(*name)?)))
            .filter(|(name, value)| !says_nothing(name, value))
            .collect();
        let mut removed = self.systemd.receive_job_removed().await?;
        let job = loop {
            let mut properties = vec![
                ("Description", Variant::from(format!("{} for bro doctor", words.join(" ")))),
                ("Type", Variant::from("oneshot")),
                ("ExecStart", Variant::from(vec![(program.clone(), words.to_vec(), false)])),
                ("TimeoutStartUSec", Variant::from(limit.as_micros() as u64)),
                ("KillSignal", Variant::from(nix::libc::SIGKILL)),
                ("StandardOutputFileDescriptor", Variant::from(zbus::Fd::from(output.try_clone()?))),
                ("StandardError", Variant::from("null")),
                ("CollectMode", Variant::from("inactive-or-failed")),
                // It is there until its exit status has been read, or this connection ends.
                ("AddRef", Variant::from(true)),
            ];
            for (name, value) in &confining {
                properties.push((name, value.try_clone()?.into()));
            }
            match self.systemd.start_transient_unit(&unit, "fail", &properties, &[]).await.map_err(plain) {
                Ok(job) => break job,
                Err(error) => {
                    // It names the property.
                    let said = error.to_string();
                    let quoted =
                        |name: &str| said.split(|c: char| !c.is_alphanumeric()).any(|word| word == name);
                    let Some(at) = confining.iter().position(|(name, _)| quoted(name)) else {
                        return Err(error);
                    };
                    tracing::debug!("tried without {}: {said}", confining[at].0);
                    confining.remove(at);
                }
            }
        };
        drop(output);
        let mut transient = Transient { systemd: self.systemd.clone(), unit, runs: true };
        wait(&mut removed, &job).await?;
        transient.runs = false;
        let service = self.service(&transient.unit).await?;
        Ok(Ended {
            result: service.result().await?,
            code: service.exec_main_code().await?,
            status: service.exec_main_status().await?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_says_nothing_is_not_said() {
        let list = |allowed: bool, all: &[&str]| {
            Variant::from((allowed, all.iter().map(|&word| word.to_owned()).collect::<Vec<String>>()))
        };
        for (name, value, nothing) in [
            ("NoNewPrivileges", Variant::from(false), true),
            ("NoNewPrivileges", Variant::from(true), false),
            ("User", Variant::from(""), true),
            ("ProtectSystem", Variant::from("strict"), false),
            ("KeyringMode", Variant::from("private"), false),
            ("CapabilityBoundingSet", Variant::from(0x1ff_ffff_ffff_u64), true),
            ("CapabilityBoundingSet", Variant::from(u64::MAX), true),
            ("CapabilityBoundingSet", Variant::from(0_u64), false),
            ("AmbientCapabilities", Variant::from(0_u64), true),
            ("RestrictNamespaces", Variant::from(0x7e02_0080_u64), true),
            ("RestrictNamespaces", Variant::from(0x4000_0000_u64), false),
            ("RestrictAddressFamilies", list(false, &[]), true),
            // Of none at all.
            ("RestrictAddressFamilies", list(true, &[]), false),
            ("SystemCallFilter", list(false, &["setns"]), false),
            ("AppArmorProfile", Variant::from((false, String::new())), true),
            ("AppArmorProfile", Variant::from((true, "bro".to_owned())), false),
        ] {
            assert_eq!(says_nothing(name, &value), nothing, "{name} {value:?}");
        }
    }
}
