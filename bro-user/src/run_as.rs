//! The ordinary user that owns the container of a system service (`bro activate --run-as`), and acting as that user: root does with
//! that user's rights what it does in places of that user's, so that no link there leads it astray.

mod command;

use std::ffi::CString;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nix::unistd::{Gid, Uid, User, getegid, geteuid, getgroups, initgroups, setegid, seteuid, setgroups};

pub(crate) use command::Gaining;

use crate::exit::Failure;

/// The number that no user and no group can have.
const NO_ID: u32 = u32::MAX;

/// Such a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunAsUser {
    /// As in the user database.
    pub name: String,
    /// The user's number.
    pub uid: u32,
    /// The number of the user's own group.
    pub gid: u32,
    /// Where quadlets are, in .config.
    pub home: PathBuf,
}

/// Does the service manager of the user of that name run from boot on? logind's own notes.
pub(crate) fn lingers(name: &str) -> bool {
    Path::new("/var/lib/systemd/linger").join(name).exists()
}

/// A user's name, if it can stand in a unit file.
///
/// # Errors
/// When it is none.
pub fn name(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if !text.is_empty() && text.chars().all(fits) && !text.starts_with(['-', '.']) {
        return Ok(text.to_owned());
    }
    Err(format!("“{}” cannot be the name of a user; see `getent passwd`", text.escape_debug()))
}

impl RunAsUser {
    /// Looks the user up; below `root`, in the user database of that tree.
    ///
    /// # Errors
    /// [`Failure::NotFound`] when there is no such user, [`Failure::Usage`] for root and for names that no unit file can hold.
    pub fn find(name: &str, root: Option<&Path>) -> anyhow::Result<Self> {
        let name = &*self::name(name).map_err(Failure::Usage)?;
        let found = match root {
            Some(root) => Self::in_file(name, &crate::paths::below(Some(root), Path::new("/etc/passwd"))),
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
        crate::paths::runtime_directory_of(self.uid)
    }

    /// The unit of the user's service manager.
    #[must_use]
    pub fn manager(&self) -> String {
        format!("user@{}.service", self.uid)
    }

    /// Does the user's service manager run from boot on?
    #[must_use]
    pub fn lingers(&self) -> bool {
        lingers(&self.name)
    }

    /// A user that is gone: only the name is left, and files that were made for the user.
    #[must_use]
    pub fn gone(name: &str, uid: Option<u32>) -> Self {
        Self { name: name.to_owned(), uid: uid.unwrap_or(NO_ID), gid: NO_ID, home: "/nonexistent".into() }
    }

    /// Is the user in the user database no more?
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.gid == NO_ID
    }

    /// Is it this process's own user?
    #[must_use]
    pub fn is_me(&self) -> bool {
        geteuid().as_raw() == self.uid
    }

    /// Opens files and connects sockets as this user and with the user's groups, until the returned value is dropped. The process
    /// stays root's: the user can neither kill nor trace it. A process that is not root's stays as it is.
    ///
    /// # Errors
    /// Those of initgroups, setegid and seteuid.
    pub fn act(&self) -> anyhow::Result<Acting> {
        let uid = geteuid();
        if !uid.is_root() {
            return Ok(Acting(None));
        }
        let cannot = || format!("cannot act as {}", self.name);
        let groups = getgroups().with_context(cannot)?;
        let (name, gid) = (CString::new(&*self.name).with_context(cannot)?, Gid::from_raw(self.gid));
        // The groups first: afterwards there is no right to change them.
        initgroups(&name, gid).with_context(cannot)?;
        let acting = Acting(Some(FormerIds { uid, gid: getegid(), groups }));
        setegid(gid).with_context(cannot)?;
        seteuid(Uid::from_raw(self.uid)).with_context(cannot)?;
        Ok(acting)
    }
}

/// The ids of this process when it does not act.
#[derive(Debug)]
struct FormerIds {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

/// While it lives, this process acts as another user.
#[derive(Debug)]
#[must_use = "dropping it ends the acting"]
pub struct Acting(Option<FormerIds>);

impl Drop for Acting {
    fn drop(&mut self) {
        if let Some(FormerIds { uid, gid, groups }) = self.0.take() {
            // The real and saved ids are root's still, so this cannot fail; were it to, going on would be wrong.
            let back = seteuid(uid).and_then(|()| setegid(gid)).and_then(|()| setgroups(&groups));
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
        let find = |name: &str| RunAsUser::find(name, Some(&root)).map_err(|error| error.to_string());
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
        let other = RunAsUser { name: "x".into(), uid: 65534, gid: 65534, home: "/".into() };
        // Only root changes at all. (Other tests run in the same process: for a moment, as the user nobody.)
        if !before.is_root() {
            drop(other.act().unwrap());
        }
        assert_eq!(geteuid(), before);
    }

    /// What root's further groups (those of disks, of the journal) allow, the user may not do.
    #[test]
    fn acts_with_the_users_groups_and_no_others() {
        const ALONE: &str = "BRO_TEST_ALONE";
        if !geteuid().is_root() {
            return;
        }
        if std::env::var_os(ALONE).is_none() {
            // Other tests in the same process would act as that user as well.
            let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
            alone.args(["--exact", "owner::tests::acts_with_the_users_groups_and_no_others"]);
            let output = alone.env(ALONE, "1").output().unwrap();
            assert!(output.status.success(), "{output:?}");
            return;
        }
        let roots = [0, 4, 6].map(Gid::from_raw);
        setgroups(&roots).unwrap();
        let other = RunAsUser { name: "bro-is-nobody".into(), uid: 65534, gid: 65534, home: "/".into() };
        let acting = other.act().unwrap();
        assert_eq!(getgroups().unwrap(), [Gid::from_raw(65534)]);
        assert_eq!((geteuid().as_raw(), getegid().as_raw()), (65534, 65534));
        drop(acting);
        assert_eq!(getgroups().unwrap(), roots);
        assert_eq!((geteuid().as_raw(), getegid().as_raw()), (0, 0));
    }
}
