//! What is there before a run: read once, under the lock.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::plan::{FoundQuadlet, Paths};
use super::transaction::{Provenance, provenance};
use super::{Removable, root_dir};
use crate::cli::Activate;
use crate::installed::{Installed, WrittenUnits};
use crate::podman::quadlet::{self, QuadletKind};
use crate::run_as::RunAsUser;

/// The units that bro has written.
#[derive(Debug)]
pub(super) struct Present {
    pub units: WrittenUnits,
    /// The services whose units they are.
    pub services: Vec<Installed>,
}

impl Present {
    pub fn read(places: &Paths) -> anyhow::Result<Self> {
        let units = WrittenUnits::read(&places.units, places.scope, places.root.as_deref())?;
        Ok(Self { services: units.services(), units })
    }

    /// The service that goes by this name, if it is there.
    pub fn named(&self, name: &str) -> Option<&Installed> {
        self.services.iter().find(|installed| installed.goes_by(name))
    }

    /// The same for its removal: also if only a part of it is left, and with the units that have lost their files.
    pub fn removable(&self, name: &str) -> Option<Removable> {
        match self.named(name) {
            Some(installed) => {
                Some(Removable { installed: installed.clone(), lost: self.units.lost(installed) })
            }
            None => {
                let rest = self.units.leftover(name)?;
                Some(Removable { installed: rest.installed, lost: rest.lost })
            }
        }
    }

    /// The container's owner: as the command line says, or an earlier one said.
    pub fn owner(&self, options: &Activate, places: &Paths) -> anyhow::Result<Option<RunAsUser>> {
        match &options.run_as {
            Some(name) => Ok(Some(RunAsUser::find(name, places.root.as_deref())?)),
            None => Ok(self.named(&options.name).and_then(|installed| installed.run_as.clone())),
        }
    }
}

/// Finds the quadlet, and the pod that it is part of.
pub(super) fn find_quadlet(
    name: &str,
    owner: Option<&RunAsUser>,
    places: &Paths,
) -> anyhow::Result<FoundQuadlet> {
    let find = |name: &str| quadlet::find(name, places.scope, owner, places.root.as_deref());
    let quadlet = find(name)?;
    root_dir::stays_inside(places.root.as_deref(), &quadlet.path)?;
    let pod = quadlet.value("Pod").filter(|_| quadlet.kind == QuadletKind::Container);
    let pod = pod.and_then(|pod| find(pod).ok());
    Ok(FoundQuadlet { quadlet, pod })
}

/// The files at some paths, as they are.
#[derive(Debug, Default)]
pub(super) struct Contents(BTreeMap<PathBuf, Provenance>);

impl Contents {
    pub fn read(paths: impl IntoIterator<Item = PathBuf>, places: &Paths) -> anyhow::Result<Self> {
        let mut contents = Self::default();
        for path in paths {
            root_dir::stays_inside(places.root.as_deref(), &path)?;
            let provenance = provenance(&path)?;
            contents.0.insert(path, provenance);
        }
        Ok(contents)
    }

    /// What is at a path. One that was not looked at has no file.
    pub fn at(&self, path: &Path) -> &Provenance {
        self.0.get(path).unwrap_or(&Provenance::Missing)
    }

    /// The text of a file that bro wrote.
    pub fn text(&self, path: &Path) -> Option<&str> {
        match self.at(path) {
            Provenance::Ours(text) => Some(text),
            Provenance::Missing | Provenance::Theirs => None,
        }
    }
}

#[cfg(test)]
impl FromIterator<(PathBuf, Provenance)> for Contents {
    fn from_iter<I: IntoIterator<Item = (PathBuf, Provenance)>>(files: I) -> Self {
        Self(files.into_iter().collect())
    }
}
