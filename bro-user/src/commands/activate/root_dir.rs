//! `--root DIR`: links below DIR are those of the tree's own host; an absolute link would lead this program out of the tree.

use std::path::Path;

use crate::exit::Failure;

/// Refuses a path below `root` if links lead it out, as far as it exists.
pub(super) fn stays_inside(root: Option<&Path>, path: &Path) -> anyhow::Result<()> {
    let Some((root, real_root)) = root.and_then(|root| Some((root, root.canonicalize().ok()?))) else {
        return Ok(());
    };
    // A link to nowhere exists as well.
    let there = path.ancestors().find(|above| std::fs::symlink_metadata(above).is_ok()).unwrap_or(root);
    match there.canonicalize() {
        Ok(real) if real.starts_with(&real_root) => Ok(()),
        _ => Err(Failure::Usage(format!(
            "{} leads out of {} by a symbolic link (or nowhere); make that link a relative one, or put a directory there",
            there.display(),
            root.display()
        ))
        .into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absolute_links_lead_out_and_relative_ones_stay() {
        let outer = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-rooted-XXXXXX")).unwrap();
        let root = outer.join("root");
        std::fs::create_dir_all(root.join("etc/real")).unwrap();
        std::fs::create_dir(outer.join("outside")).unwrap();
        let link =
            |to: &str, name: &str| std::os::unix::fs::symlink(to, root.join("etc").join(name)).unwrap();
        link("real", "relative");
        link("/nonexistent/real", "absolute");
        link("../../outside", "up");
        let inside = |path: &str| stays_inside(Some(&root), &root.join(path)).is_ok();
        assert!(inside("etc/relative/x") && inside("etc/none/yet") && inside("etc"));
        assert!(!inside("etc/absolute/x") && !inside("etc/absolute") && !inside("etc/up/x"));
        assert!(stays_inside(None, Path::new("/")).is_ok());
        std::fs::remove_dir_all(outer).unwrap();
    }
}
