//! `cargo xtask dist`: what a system's package manager installs. One tree of files is laid out, and everything else is made of
//! it: the Debian package here, the RPM by packaging/bro.spec.
//!
//! The same source makes the same bytes: times are `SOURCE_DATE_EPOCH` (by default the last commit's), files belong to root,
//! names are sorted, and the binary names no folder of the machine that built it.

mod binary;
mod completions;
mod deb;
mod epoch;
mod licences;
mod man;
mod rpm;
mod tree;

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::build::target_folder;
use epoch::Epoch;

/// `cargo xtask dist`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to make (default: all; the RPM where rpmbuild is)
    #[arg(value_name = "WHAT")]
    what: Vec<What>,

    /// Where to put it (default: target/dist)
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Package this binary instead of building one
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,

    /// The packages' own number, for packages that are made again of the same version
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    revision: u32,

    /// For whose habits `tree` is laid out
    #[arg(long, value_enum, default_value_t = Habits::Debian)]
    habits: Habits,
}

/// One product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// The man pages, in man/
    Man,
    /// The completions of bash, zsh and fish, in completions/
    Completions,
    /// Every file that a package holds, in tree/; what packaging/bro.spec takes
    Tree,
    /// The Debian package
    Deb,
    /// The RPM
    Rpm,
}

/// Distributions differ in where a few files are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Habits {
    /// Debian and what derives from it
    Debian,
    /// Fedora, openSUSE and their kin
    Rpm,
}

/// What every product is made from.
struct Release {
    /// The source's folder.
    source: PathBuf,
    out: PathBuf,
    version: &'static str,
    revision: u32,
    epoch: Epoch,
}

impl Release {
    /// Of this clone, into `out`.
    fn of(out: PathBuf, revision: u32) -> Result<Self> {
        let source = crate::build::workspace();
        std::fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
        Ok(Self { epoch: Epoch::of(&source)?, source, out, version: env!("CARGO_PKG_VERSION"), revision })
    }

    /// What `packaging` holds.
    fn packaging(&self, name: &str) -> PathBuf {
        self.source.join("packaging").join(name)
    }
}

fn default_out() -> Result<PathBuf> {
    Ok(target_folder()?.join("dist"))
}

/// The binary that packages hold, built where it is out of date.
pub fn binary() -> Result<PathBuf> {
    binary::build(&Release::of(default_out()?, 1)?)
}

/// The same one where it is installed: in the tree that packages are made of, laid out anew.
pub fn installed_binary() -> Result<PathBuf> {
    let release = Release::of(default_out()?, 1)?;
    let place = release.out.join("tree");
    tree::lay_out(&release, &binary::build(&release)?, Habits::Debian, &place)?;
    Ok(place.join("usr/bin/bro"))
}

/// The task.
pub fn run(args: &Args) -> Result<()> {
    let out = match &args.out {
        Some(out) => std::path::absolute(out)?,
        None => default_out()?,
    };
    let release = Release::of(out, args.revision)?;
    let wanted = |what| args.what.is_empty() || args.what.contains(&what);
    if wanted(What::Man) {
        let pages = man::pages(&release)?;
        let files: Vec<String> = pages.iter().map(man::Page::place).collect();
        let texts = pages.iter().map(|page| &*page.text);
        write_all(&release.out.join("man"), files.iter().map(String::as_str).zip(texts))?;
    }
    if wanted(What::Completions) {
        let scripts = completions::scripts();
        let files = scripts.iter().map(|script| (&*script.file, script.text.as_bytes()));
        write_all(&release.out.join("completions"), files)?;
    }
    if !(wanted(What::Tree) || wanted(What::Deb) || wanted(What::Rpm)) {
        return Ok(());
    }
    let binary = match &args.binary {
        Some(path) => binary::given(path, &release)?,
        None => binary::build(&release)?,
    };
    if wanted(What::Tree) {
        let place = release.out.join("tree");
        tree::lay_out(&release, &binary, args.habits, &place)?;
        say(&place)?;
    }
    if wanted(What::Deb) {
        say(&deb::build(&release, &binary)?)?;
    }
    if args.what.contains(&What::Rpm) || (args.what.is_empty() && rpm::can()) {
        for package in rpm::build(&release, &binary)? {
            say(&package)?;
        }
    } else if args.what.is_empty() {
        writeln!(std::io::stdout(), "no RPM: {}", rpm::MEND)?;
    }
    Ok(())
}

fn write_all<'a>(folder: &Path, files: impl Iterator<Item = (&'a str, &'a [u8])>) -> Result<()> {
    // Of an earlier run nothing stays that this one does not make.
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => std::fs::create_dir_all(folder)?,
    }
    for (name, text) in files {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap_or(folder))?;
        std::fs::write(path, text)?;
    }
    say(folder)
}

fn say(path: &Path) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{}", path.display())?)
}

/// A program of the system, with the line that installs it.
fn program(name: &str, package: &str, command: &mut std::process::Command) -> Result<Vec<u8>> {
    let output =
        command.output().with_context(|| format!("needs {name}: run `sudo apt-get install {package}`"))?;
    anyhow::ensure!(
        output.status.success(),
        "{name} failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(output.stdout)
}
