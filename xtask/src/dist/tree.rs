//! Every file that a package holds, laid out below one folder as it is on an installed system.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use bro_user::cli;
use clap_complete::Shell;

use super::{Habits, Release, completions, licences, man};

/// What is installed for readers, at the same paths below the documentation's folder, so that links between them say where to look.
const DOCUMENTS: [&str; 7] = [
    "README.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "docs/guide.md",
    "docs/reference.md",
    "docs/clients.md",
    "docs/grafana-dashboard.json",
];

/// Lays the tree out anew.
pub fn lay_out(release: &Release, binary: &Path, habits: Habits, place: &Path) -> Result<()> {
    match std::fs::remove_dir_all(place) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", place.display()));
        }
        _ => {}
    }
    let tree = Tree { release, place };
    tree.program("usr/bin/bro", &std::fs::read(binary)?)?;
    // A further name of a subcommand (cli::NAMES) is a link here and needs nothing else.
    for (name, _) in cli::NAMES {
        tree.link(&format!("usr/bin/{name}"), "bro")?;
    }
    // Units and presets: packaging/systemd is /usr/lib/systemd.
    tree.copy(&release.packaging("systemd"), "usr/lib/systemd")?;
    for page in man::pages(release)? {
        tree.compressed(&format!("usr/share/man/{}", page.place()), &page.text)?;
    }
    for script in completions::scripts() {
        let folder = match (script.shell, habits) {
            (Shell::Bash, _) => "bash-completion/completions",
            (Shell::Fish, _) => "fish/vendor_completions.d",
            (_, Habits::Debian) => "zsh/vendor-completions",
            (_, Habits::Rpm) => "zsh/site-functions",
        };
        tree.file(&format!("usr/share/{folder}/{}", script.file), script.text.as_bytes())?;
    }
    for text in DOCUMENTS {
        tree.compressed(&format!("usr/share/doc/bro/{text}"), &std::fs::read(release.source.join(text))?)?;
    }
    let crates = licences::of_dependencies(release)?;
    match habits {
        Habits::Debian => {
            tree.file("usr/share/doc/bro/copyright", licences::copyright(release, &crates)?.as_bytes())?;
            tree.compressed("usr/share/doc/bro/third-party.txt", licences::texts(&crates)?.as_bytes())?;
            tree.compressed("usr/share/doc/bro/changelog.Debian", changelog(release)?.as_bytes())?;
        }
        Habits::Rpm => {
            for licence in ["LICENSE-MIT", "LICENSE-APACHE"] {
                let text = std::fs::read(release.source.join(licence))?;
                tree.file(&format!("usr/share/licenses/bro/{licence}"), &text)?;
            }
            tree.file("usr/share/licenses/bro/third-party.txt", licences::texts(&crates)?.as_bytes())?;
        }
    }
    tree.date(place)
}

/// Debian's changelog: of the package, not of the program.
fn changelog(release: &Release) -> Result<String> {
    let date = release.epoch.date("--rfc-email")?;
    let (version, revision) = (release.version, release.revision);
    Ok(format!(
        "bro ({version}-{revision}) unstable; urgency=medium\n\n  * Made by cargo xtask dist.\n\n -- {}  {date}\n",
        super::deb::maintainer()
    ))
}

struct Tree<'a> {
    release: &'a Release,
    place: &'a Path,
}

impl Tree<'_> {
    fn write(&self, path: &str, contents: &[u8], mode: u32) -> Result<PathBuf> {
        let path = self.place.join(path);
        self.folders(path.parent().context("a file is in a folder")?)?;
        std::fs::write(&path, contents).with_context(|| format!("cannot write {}", path.display()))?;
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode))?;
        Ok(path)
    }

    /// Whatever the umask is.
    fn folders(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder)?;
        for folder in folder.ancestors().take_while(|folder| folder.starts_with(self.place)) {
            std::fs::set_permissions(folder, PermissionsExt::from_mode(0o755))?;
        }
        Ok(())
    }

    fn file(&self, path: &str, contents: &[u8]) -> Result<()> {
        self.write(path, contents, 0o644).map(drop)
    }

    fn program(&self, path: &str, contents: &[u8]) -> Result<()> {
        self.write(path, contents, 0o755).map(drop)
    }

    /// As gzip(1), without name and time in the file.
    fn compressed(&self, path: &str, contents: &[u8]) -> Result<()> {
        let path = self.write(path, contents, 0o644)?;
        super::program(
            "gzip",
            "gzip",
            Command::new("gzip").args(["--best", "--no-name", "--force"]).arg(path),
        )
        .map(drop)
    }

    fn link(&self, path: &str, to: &str) -> Result<()> {
        let path = self.place.join(path);
        self.folders(path.parent().context("a link is in a folder")?)?;
        symlink(to, &path).with_context(|| format!("cannot link {}", path.display()))
    }

    fn copy(&self, from: &Path, to: &str) -> Result<()> {
        for entry in std::fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
            let path = entry?.path();
            let to =
                format!("{to}/{}", path.file_name().and_then(|name| name.to_str()).context("a plain name")?);
            if path.is_dir() { self.copy(&path, &to)? } else { self.file(&to, &std::fs::read(&path)?)? }
        }
        Ok(())
    }

    /// Deepest first: dating what is in a folder changes nothing of the folder, writing does.
    fn date(&self, folder: &Path) -> Result<()> {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_symlink() {
                // Packers clamp a link's time.
            } else if path.is_dir() {
                self.date(&path)?;
            } else {
                self.release.epoch.stamp(&path)?;
            }
        }
        self.release.epoch.stamp(folder)
    }
}
