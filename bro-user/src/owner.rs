//! The ordinary user whose container a system service serves (`bro activate --run-as`), and doing things as that user: what
//! root does in places that belong to somebody else it does with that user's rights, so that no link there leads it astray.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nix::unistd::{Gid, Uid, User, getegid, geteuid, setegid, seteuid};

use crate::exit::Failure;

/// Such a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// As in the user database.
    pub name: String,
    /// The user's number.
    pub uid: u32,
    /// The number of the user's own group.
    pub gid: u32,
    /// Where quadlets are, in .config.
    pub home: PathBuf,
}

impl Owner {
    /// Looks the user up; below `root`, in the user database of that tree.
    ///
    /// # Errors
    /// [`Failure::NotFound`] when there is no such user, [`Failure::Usage`] for root and for names that no unit file can hold.
    pub fn find(name: &str, root: Option<&Path>) -> anyhow::Result<Self> {
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if name.is_empty() || !name.chars().all(fits) || name.starts_with(['-', '.']) {
            let text = format!("“{}” cannot be the name of a user; see `getent passwd`", name.escape_debug());
            return Err(Failure::Usage(text).into());
        }
        let found = match root {
            Some(root) => Self::in_file(name, &crate::quadlet::below(Some(root), Path::new("/etc/passwd"))),
            None => User::from_name(name).context("the user database cannot be read")?.map(|user| Self {
                name: user.name,
                uid: user.uid.as_raw(),
                gid: user.gid.as_raw(),
                home: user.dir,
            }),
        };
        match found {
            None => Err(Failure::NotFound(format!("there is no user “{name}”")).into()),
            Some(Self { uid: 0, .. }) => Err(Failure::Usage(format!(
                "{name} has root's number 0, and root's containers are the system's own: leave --run-as out"
            ))
            .into()),
            Some(owner) => Ok(owner),
        }
    }

    fn in_file(name: &str, path: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(path).ok()?;
        let fields = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
        let fields = fields.into_iter().find(|fields| fields.first() == Some(&name))?;
        Some(Self {
            name: name.to_owned(),
            uid: fields.get(2)?.parse().ok()?,
            gid: fields.get(3)?.parse().ok()?,
            home: fields.get(5)?.into(),
        })
    }

    /// Where the user's bus is, and what Podman keeps at run time.
    #[must_use]
    pub fn runtime_directory(&self) -> PathBuf {
        format!("/run/user/{}", self.uid).into()
    }

    /// The unit of the user's service manager.
    #[must_use]
    pub fn manager(&self) -> String {
        format!("user@{}.service", self.uid)
    }

    /// Does the user's service manager run from boot on? logind's own notes.
    #[must_use]
    pub fn lingers(&self) -> bool {
        Path::new("/var/lib/systemd/linger").join(&self.name).exists()
    }

    /// Is it this process's own user?
    #[must_use]
    pub fn is_me(&self) -> bool {
        geteuid().as_raw() == self.uid
    }

    /// Files are opened and sockets connected as this user, until what is returned is dropped. It stays root's process: the
    /// user can neither kill nor trace it. Who is not root is who he is.
    ///
    /// # Errors
    /// seteuid's.
    pub fn act(&self) -> anyhow::Result<Acting> {
        let before = (geteuid(), getegid());
        if !before.0.is_root() {
            return Ok(Acting(None));
        }
        let acting = Acting(Some(before));
        setegid(Gid::from_raw(self.gid)).with_context(|| format!("cannot act as {}", self.name))?;
        seteuid(Uid::from_raw(self.uid)).with_context(|| format!("cannot act as {}", self.name))?;
        Ok(acting)
    }
}

/// While it lives, this process acts as somebody else.
#[derive(Debug)]
#[must_use = "dropping it ends the acting"]
pub struct Acting(Option<(Uid, Gid)>);

impl Drop for Acting {
    fn drop(&mut self) {
        if let Some((uid, gid)) = self.0.take() {
            // The real and saved ids are root's still, so this cannot fail; were it to, going on would be wrong.
            let back = seteuid(uid).and_then(|()| setegid(gid));
            assert_eq!(back, Ok(()), "cannot become root again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_users_of_a_tree_and_refuses_the_rest() {
        let root = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-owner-XXXXXX")).unwrap();
        std::fs::create_dir(root.join("etc")).unwrap();
        let passwd = "root:x:0:0::/root:/bin/sh\ntoor:x:0:0::/:/bin/sh\ntest:x:1000:1001::/home/test:/bin/sh\nbad:x:y\n";
        std::fs::write(root.join("etc/passwd"), passwd).unwrap();
        let find = |name: &str| Owner::find(name, Some(&root)).map_err(|error| error.to_string());
        let test = find("test").unwrap();
        assert_eq!((test.uid, test.gid, &*test.home), (1000, 1001, Path::new("/home/test")));
        assert!(find("root").unwrap_err().contains("root's"));
        assert!(find("toor").unwrap_err().contains("root's"));
        assert!(find("nobody").unwrap_err().contains("there is no user"));
        assert!(find("bad").unwrap_err().contains("there is no user"));
        assert!(find("a b").unwrap_err().contains("cannot be the name"));
        assert!(find("%u").unwrap_err().contains("cannot be the name"));
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn acting_ends() {
        let before = geteuid();
        let somebody = Owner { name: "x".into(), uid: 65534, gid: 65534, home: "/".into() };
        // Only root changes at all. (Other tests run in the same process: for a moment, as nobody.)
        if !before.is_root() {
            drop(somebody.act().unwrap());
        }
        assert_eq!(geteuid(), before);
    }
}
