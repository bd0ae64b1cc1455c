//! The specifiers of systemd.unit(5) that occur in containers' names and in paths.

use crate::run_as::RunAsUser;

/// `text` with the specifiers replaced as systemd does for `unit`; else the first specifier that is not known here.
pub(super) fn expand(text: &str, unit: &str, owner: Option<&RunAsUser>) -> Result<String, String> {
    let stem = unit.strip_suffix(".service").unwrap_or(unit);
    let (prefix, instance) = stem.split_once('@').unwrap_or((stem, ""));
    let last = prefix.rsplit('-').next().unwrap_or(prefix);
    let uid = owner.map_or_else(|| nix::unistd::geteuid().as_raw(), |owner| owner.uid);
    let user = || match owner {
        Some(owner) => Some((owner.name.clone(), owner.home.clone())),
        None => nix::unistd::User::from_uid(uid.into()).ok().flatten().map(|user| (user.name, user.dir)),
    };
    let mut expanded = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            expanded.push(c);
            continue;
        }
        let specifier = chars.next();
        match specifier {
            Some('%') => expanded.push('%'),
            Some('n') => expanded.push_str(unit),
            Some('N') => expanded.push_str(stem),
            Some('p' | 'P') => expanded.push_str(prefix),
            Some('i' | 'I') => expanded.push_str(instance),
            Some('j' | 'J') => expanded.push_str(last),
            Some('U') => expanded.push_str(&uid.to_string()),
            Some('u') => expanded.push_str(&user().ok_or("%u")?.0),
            Some('h') => expanded.push_str(user().ok_or("%h")?.1.to_str().ok_or("%h")?),
            other => return Err(other.map_or_else(|| "%".to_owned(), |other| format!("%{other}"))),
        }
    }
    Ok(expanded)
}

#[cfg(test)]
mod tests {
    use super::expand;
    use crate::run_as::RunAsUser;

    #[test]
    fn expands_what_it_knows() {
        assert_eq!(expand("systemd-%p_%i", "web@blue.service", None), Ok("systemd-web_blue".into()));
        assert_eq!(expand("%N-100%%", "web.service", None), Ok("web-100%".into()));
        assert_eq!(expand("%j", "my-web.service", None), Ok("web".into()));
        let test = RunAsUser { name: "test".into(), uid: 1000, gid: 1000, home: "/home/test".into() };
        assert_eq!(expand("%h/%u-%U", "web.service", Some(&test)), Ok("/home/test/test-1000".into()));
        assert_eq!(expand("x%m", "web.service", None), Err("%m".into()));
        assert_eq!(expand("x%", "web.service", None), Err("%".into()));
    }
}
