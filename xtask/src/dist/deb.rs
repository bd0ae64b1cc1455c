//! The Debian package, packed by dpkg-deb from the tree. What runs on the installing system is in packaging/debian.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::{Habits, Release, program, tree};

const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];

const DESCRIPTION: &str = "\
start containers on their first connection, and relay it
 systemd listens; bro starts the container (a Podman quadlet, rootful or
 rootless) when the first client connects, waits until its service really
 listens, and relays every connection into the container's own network
 namespace: in the kernel where it may load a program there, with splice(2)
 elsewhere, half-close for half-close and reset for reset. The container is
 stopped again when no client has been connected for a while.
 .
 It takes the place of systemd-socket-proxyd for containers, also for those
 without a network of their own.
";

/// Who the package is from, named as Debian's own tools do.
pub fn maintainer() -> String {
    let name = std::env::var("DEBFULLNAME").unwrap_or_else(|_| "The bro contributors".into());
    // Debian wants an address. This one is reserved (RFC 2606); the publisher of a package sets DEBEMAIL.
    let address = std::env::var("DEBEMAIL").unwrap_or_else(|_| "bro@example.org".into());
    format!("{name} <{address}>")
}

/// Makes it; its path.
pub fn build(release: &Release, binary: &Path) -> Result<PathBuf> {
    let place = release.out.join("deb");
    tree::lay_out(release, binary, Habits::Debian, &place)?;
    let architecture =
        String::from_utf8(program("dpkg", "dpkg", Command::new("dpkg").arg("--print-architecture"))?)?;
    let architecture = architecture.trim();

    let control = place.join("DEBIAN");
    std::fs::create_dir(&control)?;
    let text = control_file(release, architecture, &dependencies(release, &place)?, size(&place)?)?;
    write(&control.join("control"), text.as_bytes(), 0o644)?;
    write(&control.join("md5sums"), &checksums(&place)?, 0o644)?;
    for script in SCRIPTS {
        let text =
            std::fs::read(release.packaging("debian").join(script)).with_context(|| script.to_owned())?;
        write(&control.join(script), &text, 0o755)?;
    }

    let package =
        release.out.join(format!("bro_{}-{}_{architecture}.deb", release.version, release.revision));
    let mut pack = Command::new("dpkg-deb");
    pack.args(["--build", "--root-owner-group", "-Zxz"])
        .arg(&place)
        .arg(&package)
        .env("SOURCE_DATE_EPOCH", release.epoch.0.to_string());
    program("dpkg-deb", "dpkg", &mut pack)?;
    std::fs::remove_dir_all(&place)?;
    Ok(package)
}

fn write(path: &Path, contents: &[u8], mode: u32) -> Result<()> {
    std::fs::write(path, contents)?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode))?;
    Ok(())
}

fn control_file(release: &Release, architecture: &str, depends: &str, kibibytes: u64) -> Result<String> {
    let (version, revision) = (release.version, release.revision);
    Ok(format!(
        "Package: bro\n\
         Version: {version}-{revision}\n\
         Architecture: {architecture}\n\
         Maintainer: {}\n\
         Installed-Size: {kibibytes}\n\
         Depends: {depends}\n\
         Recommends: podman, systemd (>= 236)\n\
         Section: admin\n\
         Priority: optional\n\
         Description: {DESCRIPTION}",
        maintainer()
    ))
}

/// What the binary's libraries are called and how new they have to be: dpkg-shlibdeps knows, and wants a source package's folder
/// to work in.
fn dependencies(release: &Release, place: &Path) -> Result<String> {
    let source = release.out.join("shlibdeps");
    std::fs::create_dir_all(source.join("debian"))?;
    std::fs::write(source.join("debian/control"), "Source: bro\n\nPackage: bro\nArchitecture: any\n")?;
    let mut ask = Command::new("dpkg-shlibdeps");
    ask.arg("-O").arg(place.join("usr/bin/bro")).current_dir(&source);
    let answer = String::from_utf8(program("dpkg-shlibdeps", "dpkg-dev", &mut ask)?)?;
    std::fs::remove_dir_all(&source)?;
    let depends =
        answer.trim().strip_prefix("shlibs:Depends=").context("dpkg-shlibdeps has another way to say it")?;
    Ok(depends.to_owned())
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_symlink() || path.ends_with("DEBIAN") {
            continue;
        }
        if path.is_dir() { files(&path, found)? } else { found.push(path) }
    }
    found.sort();
    Ok(())
}

/// As Debian Policy counts: each file in whole KiB, each folder and link 1.
fn size(place: &Path) -> Result<u64> {
    let mut found = Vec::new();
    files(place, &mut found)?;
    let sizes: Vec<u64> =
        found.iter().map(|path| Ok(std::fs::metadata(path)?.len())).collect::<Result<_>>()?;
    Ok(sizes.iter().map(|size| size.div_ceil(1024)).sum())
}

fn checksums(place: &Path) -> Result<Vec<u8>> {
    let mut found = Vec::new();
    files(place, &mut found)?;
    let mut sums = Command::new("md5sum");
    sums.current_dir(place);
    for path in &found {
        sums.arg(path.strip_prefix(place)?);
    }
    program("md5sum", "coreutils", &mut sums)
}
