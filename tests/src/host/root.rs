//! The host's root file system, built once by mmdebstrap and kept in the target directory under a hash of its recipe.

use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::PathBuf;

use anyhow::Result;

use crate::debian::Root;
pub(super) use crate::debian::SUITE;
use crate::kept::Kept;

const PACKAGES: &str = include_str!("../../host/packages");
const CUSTOMIZE: &str =
    concat!(include_str!("../../host/customize.sh"), include_str!("../../host/images.sh"));

/// Raise it when a change of the code changes what is built.
const FORMAT: u32 = 1;

/// The root's folder, and a shared lock to hold while it is used. Builds it when there is none for this recipe.
pub(super) fn built() -> Result<(PathBuf, File)> {
    let mut hasher = DefaultHasher::new();
    (FORMAT, SUITE, PACKAGES, CUSTOMIZE).hash(&mut hasher);
    let recipe = Root { what: "the test host", packages: PACKAGES, prepare: "", customize: CUSTOMIZE };
    Kept::new("host-root", "BRO_HOST_CACHE")?.made(hasher.finish(), |cache, fresh| recipe.build(cache, fresh))
}
