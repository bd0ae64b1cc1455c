//! NAME-activator-seccomp.json: the container's seccomp profile (containers-common's seccomp.json), of another one.
//!
//! JSON has no comments, so what other files of bro's say in their first lines are fields here; Podman passes over fields that it does not know.

use std::path::Path;

use bro_adopt::profile::{Connecting, Unfit, WantedProfile, profile_with};
use serde_json::{Value, json};

use crate::installed::{Connects, Installed};

/// The start of each of them.
const START: &str = "{\n  \"bro\": \"Written by bro activate for ";

/// The field of the service's name.
const NAME: &str = "bro-name";

/// The profile, made of the text of another one.
///
/// # Errors
/// [`Unfit`].
pub fn profile_text(
    installed: &Installed,
    source: &str,
    listener_path: &Path,
    wait_killable: bool,
) -> Result<String, Unfit> {
    let name = &installed.name;
    let quadlet = installed.quadlet.file_name().unwrap_or_default().to_string_lossy();
    let listener_path = listener_path.to_string_lossy();
    let wanted = WantedProfile {
        source,
        listener_path: &listener_path,
        listener_metadata: &installed.unit,
        wait_killable,
    };
    let never = installed.adoption().is_some_and(|adoption| adoption.connects == Some(Connects::Never));
    let text = profile_with(&wanted, if never { Connecting::Never } else { Connecting::AsBefore })?;
    let rest = text.strip_prefix('{').unwrap_or(&text);
    let note = json!(format!(
        "Written by bro activate for {quadlet}, and written anew by each further run. To undo everything: bro activate {name} --remove"
    ));
    Ok(format!("{{\n  \"bro\": {note},\n  \"{NAME}\": {},{rest}", json!(name)))
}

/// What a profile that bro wrote says of how it was made.
#[derive(Debug, PartialEq, Eq)]
pub struct MadeProfile {
    /// Where the agent listens.
    pub listener_path: String,
    /// It has the flag for calls that no signal breaks off.
    pub wait_killable: bool,
}

impl MadeProfile {
    /// Reads it; `None` of one that is another's.
    #[must_use]
    pub fn read(text: &str) -> Option<Self> {
        wrote(text)?;
        let profile: Value = serde_json::from_str(text).ok()?;
        let flags = profile.get("flags").and_then(Value::as_array).into_iter().flatten();
        Some(Self {
            listener_path: profile.get("listenerPath")?.as_str()?.to_owned(),
            wait_killable: flags.filter_map(Value::as_str).any(|flag| flag.ends_with("_WAIT_KILLABLE_RECV")),
        })
    }
}

/// The service whose profile bro has written in this text; `None` where it has written none.
#[must_use]
pub fn wrote(text: &str) -> Option<String> {
    if !text.starts_with(START) {
        return None;
    }
    let profile: Value = serde_json::from_str(text).ok()?;
    Some(profile.get(NAME)?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::installed::example;

    const SOURCE: &str = r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["bind", "listen"], "action": "SCMP_ACT_ALLOW"}]}"#;

    #[test]
    fn it_is_known_again_and_leads_to_the_agent() {
        let web = example::forwarded(Some("systemd-web"), &[]);
        let text = profile_text(&web, SOURCE, Path::new("/run/a"), false).unwrap();
        assert_eq!(wrote(&text).as_deref(), Some("web"));
        assert_eq!((wrote(SOURCE), wrote(&text[1..])), (None, None));
        let made = |listener_path: &str, wait_killable| {
            Some(MadeProfile { listener_path: listener_path.to_owned(), wait_killable })
        };
        assert_eq!(MadeProfile::read(&text), made("/run/a", false));
        let killable = profile_text(&web, SOURCE, Path::new("/run/b"), true).unwrap();
        assert_eq!((MadeProfile::read(&killable), MadeProfile::read(SOURCE)), (made("/run/b", true), None));
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (&value["listenerPath"], &value["listenerMetadata"]),
            (&json!("/run/a"), &json!("web.service"))
        );
        assert_eq!(profile_text(&web, &text, Path::new("/run/b"), false), Err(Unfit::Notifies));
    }
}
