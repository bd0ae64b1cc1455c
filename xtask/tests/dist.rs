//! `cargo xtask dist`: man pages that man(1) has nothing to say about, completions in the shells they are for, and packages whose
//! contents are what they should be, the same bytes each time.
//!
//! Needs: groff, dpkg-dev, rpm, lintian, fish, zsh. Takes: seconds.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bro_tests::require;
use bro_tests::scratch::Scratch;
use bro_tests::tier::Need;

const MAN: Need = Need::Program("man", "man-db");
const GROFF: Need = Need::Program("groff", "groff");
const DEBIAN: Need = Need::Program("dpkg-shlibdeps", "dpkg-dev");
const LINTIAN: Need = Need::Program("lintian", "lintian");
const RPM: Need = Need::Program("rpmbuild", "rpm");

/// Line tables or symbols that come back would be far more.
const MOST_BYTES: usize = 16 << 20;

/// `cargo xtask dist WHAT`, of the binary under test.
fn dist(out: &Path, what: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("dist")
        .args(what)
        .arg("--out")
        .arg(out)
        .arg("--binary")
        .arg(bro_tests::bro::binary())
        .env("SOURCE_DATE_EPOCH", "1700000000")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {}: {}", arguments.join(" "), text(&output));
    text(&output)
}

fn shell(program: &str, arguments: &[&str], script: &str) -> String {
    run(program, &[arguments, &["-c", script]].concat())
}

#[test]
fn man_pages_are_clean_and_can_be_read() {
    require!(MAN, GROFF);
    let scratch = Scratch::new().unwrap();
    dist(scratch.path(), &["man"]);
    let root = scratch.path().join("man");
    let pages: Vec<PathBuf> =
        ["man5", "man8"].iter().flat_map(|section| files(&root.join(section))).collect();
    assert!(pages.len() >= 9, "{pages:?}");
    for page in pages {
        let shown = Command::new("man")
            .args(["--warnings=w", "--encoding=UTF-8", "--local-file", "-Tutf8"])
            .arg(&page)
            // Where `.so` begins.
            .current_dir(&root)
            .env("LC_ALL", "C.UTF-8")
            .env("MANWIDTH", "100")
            .output()
            .unwrap();
        let (out, complaints) =
            (String::from_utf8_lossy(&shown.stdout), String::from_utf8_lossy(&shown.stderr));
        assert!(shown.status.success() && complaints.is_empty(), "{}: {complaints}", page.display());
        // Bold is a letter over itself.
        let mut plain = String::new();
        for letter in out.chars() {
            if letter == '\u{8}' {
                plain.truncate(plain.len() - plain.chars().next_back().map_or(0, char::len_utf8))
            } else {
                plain.push(letter)
            }
        }
        assert!(plain.contains("SEE ALSO"), "{}: {plain}", page.display());
    }
}

/// Each with what follows `bro`, and one of the words that are to be offered.
const OFFERED: [(&str, &str); 3] =
    [("for", "forward"), ("activate --ext", "--external-port"), ("forward --idle-by ", "bytes")];

#[test]
fn bash_completes() {
    let scratch = Scratch::new().unwrap();
    dist(scratch.path(), &["completions"]);
    let script = |name: &str| scratch.path().join("completions").join(name).display().to_string();
    let complete = |name: &str, line: &str| {
        let words: Vec<String> =
            format!("{name} {line}").split(' ').map(|word| format!("'{word}'")).collect();
        let (last, previous) = (&words[words.len() - 1], &words[words.len() - 2]);
        let function = shell(
            "bash",
            &["--norc"],
            &format!("source {}; complete -p {name} | sed 's/.*-F \\([^ ]*\\).*/\\1/'", script(name)),
        );
        let ask = format!(
            "source {}; COMP_WORDS=({}); COMP_CWORD={}; {} {name} {last} {previous}; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            script(name),
            words.join(" "),
            words.len() - 1,
            function.trim(),
        );
        shell("bash", &["--norc"], &ask)
    };
    for (line, offered) in OFFERED {
        let offers = complete("bro", line);
        assert!(offers.lines().any(|offer| offer == offered), "bro {line}: {offers}");
    }
    for name in ["bro-activate", "bro-activator"] {
        let offers = complete(name, "--exter");
        assert!(offers.lines().any(|offer| offer == "--external-port"), "{name}: {offers}");
    }
}

#[test]
fn what_is_hidden_is_not_offered() {
    let scratch = Scratch::new().unwrap();
    dist(scratch.path(), &["completions"]);
    let scripts = files(&scratch.path().join("completions"));
    assert!(scripts.len() >= 9, "{scripts:?}");
    for script in scripts {
        let text = std::fs::read_to_string(&script).unwrap();
        assert!(!text.contains("netns-agent") && !text.contains("after-upgrade"), "{}", script.display());
    }
}

#[test]
fn fish_completes() {
    require!(Need::Program("fish", "fish"));
    let scratch = Scratch::new().unwrap();
    dist(scratch.path(), &["completions"]);
    let complete = |name: &str, line: &str| {
        let script = scratch.path().join("completions").join(format!("{name}.fish"));
        let ask = format!("source {}; complete -C '{name} {line}'", script.display());
        let output = Command::new("fish")
            .args(["--no-config", "-c", &ask])
            // fish keeps files of its own.
            .env("HOME", scratch.path())
            .output()
            .unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output));
        text(&output)
    };
    for (line, offered) in OFFERED {
        let offers = complete("bro", line);
        let is_it = |offer: &str| offer.split('\t').next() == Some(offered);
        assert!(offers.lines().any(is_it), "bro {line}: {offers}");
    }
    assert!(complete("bro-activator", "--exter").contains("--external-port"));
}

#[test]
fn zsh_loads_the_completions() {
    require!(Need::Program("zsh", "zsh"));
    let scratch = Scratch::new().unwrap();
    dist(scratch.path(), &["completions"]);
    let folder = scratch.path().join("completions");
    for name in ["bro", "bro-activate", "bro-activator"] {
        // What `_arguments` is given is what zsh offers; the line editor itself wants a terminal.
        let script = format!(
            "fpath=({} $fpath); autoload -U compinit; compinit -D -u; print -r -- $_comps[{name}]; \
             _arguments() {{ print -rl -- \"$@\" }}; _describe() {{ print -rl -- ${{(P)4}} }}; \
             words=({name} ''); CURRENT=2; _{name}",
            folder.display()
        );
        let shown = shell("zsh", &["-f"], &script);
        assert!(shown.starts_with(&format!("_{name}\n")), "{shown}");
        let offered = if name == "bro" { "_bro_commands" } else { "--external-port" };
        assert!(shown.contains(offered), "{name}: {shown}");
    }
}

/// In a real line editor, on a terminal of its own.
const ZSH: &str = r#"
zmodload zsh/zpty
zpty inner zsh -f -i
tell() { zpty -w inner "$1" }
tell "PROMPT= RPROMPT= fpath=($FOLDER \$fpath); autoload -U compinit; compinit -D -u"
tell 'show() { print -r -- "<<$BUFFER>>"; BUFFER= }; zle -N show; bindkey "^X" show; print rea""dy'
zpty -r inner said '*ready*'
zpty -w -n inner "$LINE"$'\t\x18'
zpty -r inner said '*<<*>>*'
print -r -- "$said"
zpty -d inner
"#;

#[test]
fn zsh_completes() {
    require!(Need::Program("zsh", "zsh"));
    let scratch = Scratch::new().unwrap();
    dist(scratch.path(), &["completions"]);
    for (line, offered) in OFFERED {
        let output = Command::new("timeout")
            .args(["60", "zsh", "-f", "-c", ZSH])
            .env("FOLDER", scratch.path().join("completions"))
            .env("LINE", format!("bro {}", if offered == "bytes" { "forward --idle-by by" } else { line }))
            .env("TERM", "dumb")
            .output()
            .unwrap();
        let said = text(&output);
        assert!(output.status.success(), "{said}");
        let completed = said.rsplit("<<").next().unwrap();
        assert!(completed.contains(offered), "bro {line}: {said}");
    }
}

#[test]
fn the_debian_package_holds_what_it_should_and_is_reproducible() {
    require!(DEBIAN);
    let (one, other) = (Scratch::new().unwrap(), Scratch::new().unwrap());
    dist(one.path(), &["deb"]);
    dist(other.path(), &["deb"]);
    let package = only(one.path(), "deb");
    assert!(
        std::fs::read(&package).unwrap() == std::fs::read(only(other.path(), "deb")).unwrap(),
        "two builds of the same source differ"
    );
    let package = package.display().to_string();
    assert!(run("dpkg-deb", &["--field", &package, "Version"]).starts_with(env!("CARGO_PKG_VERSION")));
    assert!(run("dpkg-deb", &["--field", &package, "Depends"]).contains("libc6 (>="));
    let listed = run("dpkg-deb", &["--contents", &package]);
    for line in listed.lines() {
        assert!(line.contains(" root/root "), "{line}");
    }
    for path in [
        "./usr/bin/bro",
        "./usr/bin/bro-activate -> bro",
        "./usr/bin/bro-activator -> bro",
        "./usr/lib/systemd/system-preset/80-bro.preset",
        "./usr/share/man/man8/bro-forward.8.gz",
        "./usr/share/man/man5/bro.unit.5.gz",
        "./usr/share/bash-completion/completions/bro",
        "./usr/share/zsh/vendor-completions/_bro",
        "./usr/share/fish/vendor_completions.d/bro.fish",
        "./usr/share/doc/bro/README.md.gz",
        "./usr/share/doc/bro/docs/guide.md.gz",
        "./usr/share/doc/bro/docs/reference.md.gz",
        "./usr/share/doc/bro/docs/clients.md.gz",
        "./usr/share/doc/bro/copyright",
        "./usr/share/doc/bro/third-party.txt.gz",
    ] {
        assert!(listed.lines().any(|line| line.ends_with(&format!(" {path}"))), "no {path} in\n{listed}");
    }
    let unpacked = one.path().join("unpacked");
    run("dpkg-deb", &["--extract", &package, unpacked.to_str().unwrap()]);
    let third_party =
        run("gzip", &["-dc", unpacked.join("usr/share/doc/bro/third-party.txt.gz").to_str().unwrap()]);
    for dependency in ["tokio ", "aya ", "zbus ", "aya-ebpf "] {
        assert!(third_party.lines().any(|line| line.starts_with(dependency)), "no licence of {dependency}");
    }
    assert!(!third_party.contains("proptest "), "of what only tests need");
    if bro_tests::bro::is_packaged() {
        assert!(
            std::fs::read(unpacked.join("usr/bin/bro")).unwrap()
                == std::fs::read(bro_tests::bro::binary()).unwrap(),
            "the package's binary is not the one that is tested"
        );
    }
}

/// `cargo xtask dist` as it is typed: no binary is named.
#[test]
fn what_is_packaged_is_what_is_tested_stripped_and_of_no_folder_of_this_machine() {
    require!(DEBIAN, RPM, Need::Program("nm", "binutils"), Need::Packaged);
    let scratch = Scratch::new().unwrap();
    let made = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["dist", "tree", "deb", "rpm", "--habits", "rpm", "--out"])
        .arg(scratch.path())
        .env_remove("BRO_BIN")
        .status()
        .unwrap();
    assert!(made.success());
    let bytes = std::fs::read(bro_tests::bro::binary()).unwrap();
    let (deb, rpm) = (only(scratch.path(), "deb"), only(scratch.path(), "rpm"));
    let (from_deb, from_rpm) = (scratch.path().join("from-deb"), scratch.path().join("from-rpm"));
    run("dpkg-deb", &["--extract", deb.to_str().unwrap(), from_deb.to_str().unwrap()]);
    std::fs::create_dir(&from_rpm).unwrap();
    let unpack = format!("cd {} && rpm2archive - <{} | tar -xz", from_rpm.display(), rpm.display());
    run("sh", &["-c", &unpack]);
    for place in [&scratch.path().join("tree"), &from_deb, &from_rpm] {
        let packaged = std::fs::read(place.join("usr/bin/bro")).unwrap();
        assert!(packaged == bytes, "{} holds another binary than the one that is tested", place.display());
    }

    let binary = scratch.path().join("tree/usr/bin/bro");
    let version = Command::new(&binary).arg("--version").output().unwrap();
    assert!(String::from_utf8_lossy(&version.stdout).contains(env!("CARGO_PKG_VERSION")), "{version:?}");
    let symbols = Command::new("nm").arg(&binary).output().unwrap();
    assert!(symbols.stdout.is_empty(), "it is not stripped");
    assert!(bytes.len() < MOST_BYTES, "it has grown to {} bytes", bytes.len());
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let home = std::env::var_os("CARGO_HOME").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cargo"),
        PathBuf::from,
    );
    for folder in [workspace, &home] {
        let folder = folder.to_str().unwrap().as_bytes();
        assert!(!bytes.windows(folder.len()).any(|window| window == folder), "it names {folder:?}");
    }
}

#[test]
fn lintian_finds_no_error() {
    require!(DEBIAN, LINTIAN);
    let scratch = Scratch::new().unwrap();
    dist(scratch.path(), &["deb"]);
    let package = only(scratch.path(), "deb");
    let mut lintian = Command::new("lintian");
    lintian.args(["--allow-root", "--fail-on", "error"]).arg(&package);
    let output = lintian.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let said = text(&output);
    assert!(!said.lines().any(|line| line.starts_with("E:")), "{said}");
}

#[test]
fn the_rpm_holds_the_same() {
    require!(RPM);
    let spec = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("packaging/bro.spec");
    let spec = spec.to_str().unwrap();
    let parsed = run("rpmspec", &["--parse", spec]);
    assert!(
        parsed.lines().any(|line| line.split_whitespace().eq(["Version:", env!("CARGO_PKG_VERSION")])),
        "the spec is of another version"
    );
    let scratch = Scratch::new().unwrap();
    // As a distribution would build it, as far as that goes without the source archive.
    let top = format!("_topdir {}", scratch.path().join("top").display());
    run("rpmbuild", &["--define", &top, "--define", "staged /", "--nodeps", "--nobuild", "-bp", spec]);
    dist(scratch.path(), &["rpm", "tree", "--habits", "rpm"]);
    let package = only(scratch.path(), "rpm").display().to_string();
    let listed = run("rpm", &["-qp", "--qf", "[%{FILENAMES}\n]", &package]);
    let listed: BTreeSet<&str> = listed.lines().collect();
    let tree = scratch.path().join("tree");
    for path in files(&tree) {
        let path = format!("/{}", path.strip_prefix(&tree).unwrap().display());
        assert!(listed.contains(path.as_str()), "no {path} in {listed:#?}");
    }
    let scripts = run("rpm", &["-qp", "--scripts", &package]);
    assert!(scripts.contains("bro after-upgrade"), "{scripts}");
}

#[test]
fn the_rpm_can_be_installed_and_erased() {
    require!(RPM, Need::Root);
    let scratch = Scratch::new().unwrap();
    dist(scratch.path(), &["rpm"]);
    let package = only(scratch.path(), "rpm").display().to_string();
    let root = scratch.path().join("root");
    std::fs::create_dir(&root).unwrap();
    let rpm = |words: &[&str]| {
        let place = ["--root", root.to_str().unwrap(), "--dbpath", "/var/lib/rpm"];
        run("rpm", &[&place[..], words].concat())
    };
    rpm(&["--initdb"]);
    // An empty root has neither what the package depends on nor a shell for its scripts.
    rpm(&["--install", "--nodeps", "--noscripts", &package]);
    let version = run(root.join("usr/bin/bro").to_str().unwrap(), &["--version"]);
    assert!(version.starts_with(&format!("bro {}", env!("CARGO_PKG_VERSION"))), "{version}");
    let called = run(root.join("usr/bin/bro-activate").to_str().unwrap(), &["--help"]);
    assert!(called.contains("--external-port"), "{called}");
    assert_eq!(rpm(&["--verify", "--nodeps", "bro"]), "", "something is not as it was packed");
    let listed = rpm(&["--query", "--list", "--verbose", "bro"]);
    for line in listed.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[2..4], ["root", "root"], "{line}");
        let mode = match (line.as_bytes()[0], words.last().unwrap().starts_with("/usr/bin/")) {
            (b'l', _) => "lrwxrwxrwx",
            (b'd', _) => "drwxr-xr-x",
            (_, true) => "-rwxr-xr-x",
            (_, false) => "-rw-r--r--",
        };
        assert_eq!(words[0].trim_end_matches('.'), mode, "{line}");
    }
    assert!(listed.contains("/usr/lib/systemd/system/bro-loader@.service"), "{listed}");
    // It would verify nothing if anything passed.
    std::fs::write(root.join("usr/lib/systemd/system-preset/80-bro.preset"), "").unwrap();
    let changed = Command::new("rpm")
        .args(["--root", root.to_str().unwrap(), "--dbpath", "/var/lib/rpm", "--verify", "--nodeps", "bro"])
        .output()
        .unwrap();
    assert!(text(&changed).contains("80-bro.preset"), "{}", text(&changed));
    rpm(&["--erase", "--noscripts", "bro"]);
    let left: Vec<PathBuf> =
        files(&root).into_iter().filter(|path| !path.starts_with(root.join("var/lib/rpm"))).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn the_maintainer_scripts_are_sound() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("packaging/debian");
    for script in files(&folder) {
        run("sh", &["-n", script.to_str().unwrap()]);
        let text = std::fs::read_to_string(&script).unwrap();
        assert!(text.starts_with("#!/bin/sh\nset -e\n"), "{}", script.display());
        assert!(!text.contains(" restart "), "{}: a restart drops connections", script.display());
    }
}

/// Every file below `folder`.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

fn only(folder: &Path, kind: &str) -> PathBuf {
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.extension().is_some_and(|extension| extension == kind));
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}
