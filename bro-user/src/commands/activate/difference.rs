//! How what is there differs from what is wanted (pure). A file that is not bro's is never touched.

use std::path::{Path, PathBuf};

use anyhow::bail;

use super::plan::Paths;
use super::present::{Contents, Present};
use super::transaction::{Change, Provenance};
use crate::exit::Failure;
use crate::installed::{self, Installed, SECTION, SocketUnit};
use crate::systemd::unit_file::UnitFile;
use crate::units::{self, DropIn, File};

/// What a run has to change so that `files` are there, and none of those that it `left` behind.
pub(super) fn to(
    files: &[File],
    service: &str,
    left: impl IntoIterator<Item = PathBuf>,
    there: &Contents,
) -> anyhow::Result<Vec<Change>> {
    let mut changes = Vec::new();
    for File { path, text } in files {
        match there.at(path) {
            Provenance::Ours(old) if old == text => continue,
            Provenance::Ours(old) if is_of_another(old, service) => {
                bail!("{} belongs to another activated service; nothing was changed", path.display())
            }
            Provenance::Ours(_) | Provenance::Missing => {}
            Provenance::Theirs => bail!(
                "{} is there and was not written by bro activate; move it away (nothing was changed)",
                path.display()
            ),
        }
        changes.push(Change { path: path.clone(), text: Some(text.clone()) });
    }
    for path in left {
        let is_wanted = files.iter().any(|file| file.path == path);
        if !is_wanted && *there.at(&path) != Provenance::Theirs {
            changes.push(Change { path, text: None });
        }
    }
    Ok(changes)
}

fn is_of_another(text: &str, service: &str) -> bool {
    if let Some(other) = units::wrote_profile(text) {
        return other != service;
    }
    UnitFile::parse(text).value(SECTION, "Name").is_some_and(|other| other != service)
}

/// What can be removed: a service, or what is left of one.
#[derive(Debug)]
pub(super) struct Removable {
    pub installed: Installed,
    /// Its socket units that have lost their files; systemd may still have them.
    pub lost: Vec<SocketUnit>,
}

/// What a removal changes.
#[derive(Debug)]
pub(super) struct Removal {
    /// The service, as it is before.
    pub installed: Installed,
    /// The socket units that go.
    pub sockets: Vec<SocketUnit>,
    pub changes: Vec<Change>,
    /// What stays activated, where only a port goes.
    pub rest: Option<Installed>,
}

impl Removal {
    /// Of all of it.
    fn whole(removable: Removable, there: &Contents) -> Self {
        let Removable { installed, lost } = removable;
        // Some may have been deleted by hand.
        let files = installed.files().into_iter().filter(|path| *there.at(path) != Provenance::Missing);
        let sockets = installed.sockets().cloned();
        Self {
            changes: files.map(|path| Change { path, text: None }).collect(),
            sockets: sockets.chain(lost).collect(),
            installed,
            rest: None,
        }
    }

    /// Of one port.
    fn port(installed: Installed, service: &str, there: &Contents, places: &Paths) -> anyhow::Result<Self> {
        let name = &installed.name;
        if service == name {
            return Err(Failure::Usage(format!(
                "“{service}” is the first port of {name}; remove all of it: `bro activate {name} --remove`"
            ))
            .into());
        }
        let Some(listener) = installed.listeners.iter().find(|listener| listener.service == *service) else {
            let others: Vec<&str> =
                installed.listeners.iter().map(|listener| listener.service.as_str()).collect();
            return Err(Failure::NotFound(format!(
                "{name} has no port “{service}”; it has {}",
                others.join(", ")
            ))
            .into());
        };
        let socket = listener.socket.clone();
        let mut rest = installed.clone();
        rest.listeners.retain(|listener| listener.service != *service);
        let drop_in = installed.drop_in.as_deref().and_then(|path| there.text(path));
        let drop_in = drop_in.map(|text| DropIn::read(&UnitFile::parse(text), &rest));
        let files = units::files(&rest, drop_in.as_ref(), (places.root.as_deref(), places.has_steps))?;
        let changed = files.into_iter().filter(|file| there.text(&file.path) != Some(&file.text));
        let mut changes = vec![Change { path: socket.file.clone(), text: None }];
        changes.extend(changed.map(|file| Change { path: file.path, text: Some(file.text) }));
        Ok(Self { installed, sockets: vec![socket], changes, rest: Some(rest) })
    }

    /// Of a service, or of the port that is named.
    pub fn of(
        removable: Removable,
        port: Option<&str>,
        present: &Present,
        there: &Contents,
        places: &Paths,
    ) -> anyhow::Result<Self> {
        let Some(port) = port else { return Ok(Self::whole(removable, there)) };
        if let Some(rest) = present.units.leftover(&removable.installed.name) {
            return Err(installed::in_part(&rest).into());
        }
        Self::port(removable.installed, port, there, places)
    }

    /// The first of its changes to a file that bro did not write, or that has been written over since.
    pub fn not_ours(&self, there: &Contents) -> Option<&Path> {
        let mut paths = self.changes.iter().map(|change| change.path.as_path());
        paths.find(|path| *there.at(path) == Provenance::Theirs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::systemd::unit_file::MARKER;

    fn file(path: &str, text: &str) -> File {
        File { path: path.into(), text: text.into() }
    }

    fn there(files: &[(&str, Provenance)]) -> Contents {
        files.iter().map(|(path, provenance)| (PathBuf::from(path), provenance.clone())).collect()
    }

    #[test]
    fn only_what_differs_is_written_and_only_what_is_not_wanted_goes() {
        let ours = |text: &str| Provenance::Ours(text.to_owned());
        let contents = there(&[("/same", ours("a")), ("/other", ours("b")), ("/left", ours("c"))]);
        let wanted = [file("/same", "a"), file("/other", "new"), file("/new", "d")];
        let left = ["/same", "/other", "/left"].map(PathBuf::from);
        let changes = to(&wanted, "web", left, &contents).unwrap();
        let change =
            |path: &str, text: Option<&str>| Change { path: path.into(), text: text.map(str::to_owned) };
        let expected = [change("/other", Some("new")), change("/new", Some("d")), change("/left", None)];
        assert_eq!(changes, expected);
    }

    #[test]
    fn what_is_not_bros_or_another_services_is_not_touched() {
        let contents = there(&[
            ("/theirs", Provenance::Theirs),
            ("/app", Provenance::Ours(format!("{MARKER}\n[X-Bro]\nName=app\n"))),
        ]);
        let refused = |path: &str| to(&[file(path, "x")], "web", [], &contents).unwrap_err().to_string();
        assert!(refused("/theirs").contains("not written by bro activate"));
        assert!(refused("/app").contains("belongs to another activated service"));
        let left = ["/theirs".into()];
        assert_eq!(to(&[], "web", left, &contents).unwrap(), [], "what was written over stays");
    }
}
