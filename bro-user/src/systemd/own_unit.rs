//! Which unit this process belongs to.

use std::path::Path;

/// The unit that this process is the service of, as its cgroup says.
#[must_use]
pub fn own_unit() -> Option<String> {
    let path = bro_proc::cgroup::shown(Path::new("/proc/self"))?;
    path.rsplit('/').next().filter(|unit| unit.ends_with(".service")).map(str::to_owned)
}
