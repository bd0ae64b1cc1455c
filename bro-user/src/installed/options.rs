//! What `bro forward` is given by `bro activate`, as its unit says it.
//!
//! Kept as text: what a unit says is written again to the letter, also by a run that gives the option another default. Each is read
//! in one place only, here.

use bro_relay::netns::identity::Identity;

use crate::metrics::endpoint::Endpoint;
use crate::service::readiness::Ready;

/// Options of `bro forward` with their values, by their long names without the dashes: `exit-idle-time` and `5min`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ForwardOptions(Vec<(String, String)>);

impl ForwardOptions {
    /// All of them, in the order in which they are written.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The value of one, as written.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.iter().find(|(option, _)| *option == name).map(|(_, value)| value)
    }

    /// `--ready`.
    #[must_use]
    pub fn ready(&self) -> Option<Ready> {
        self.get("ready")?.parse().ok()
    }

    /// `--metrics`.
    #[must_use]
    pub fn metrics(&self) -> Option<Endpoint> {
        self.get("metrics")?.parse().ok()
    }

    /// `--relay`: is it one that the kernel relay may be part of?
    #[must_use]
    pub fn may_use_kernel_relay(&self) -> bool {
        matches!(self.get("relay"), None | Some("auto" | "sockmap"))
    }

    /// `--relay`: is it the kernel relay or nothing?
    #[must_use]
    pub fn needs_kernel_relay(&self) -> bool {
        self.get("relay") == Some("sockmap")
    }

    /// `--source`: may the service see a client's own address?
    #[must_use]
    pub fn may_show_clients(&self) -> bool {
        matches!(self.get("source"), None | Some("auto" | "client"))
    }

    /// `--unix-identity`.
    #[must_use]
    pub fn unix_identity(&self) -> Identity {
        self.get("unix-identity").and_then(|text| text.parse().ok()).unwrap_or_default()
    }

    /// `--icmp-port-unreachable`.
    #[must_use]
    pub fn tells_undelivered(&self) -> bool {
        self.get("icmp-port-unreachable") == Some("true")
    }

    /// `--freeze`.
    #[must_use]
    pub fn freezes(&self) -> bool {
        self.get("freeze") == Some("true")
    }
}

impl FromIterator<(String, String)> for ForwardOptions {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(options: I) -> Self {
        Self(options.into_iter().collect())
    }
}
