//! Which unit this process belongs to.

/// The unit that this process is the service of, as its cgroup says.
#[must_use]
pub fn own_unit() -> Option<String> {
    let cgroups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
    path.rsplit('/').next().filter(|unit| unit.ends_with(".service")).map(str::to_owned)
}
