//! `cargo xtask build-ebpf`: makes the kernel relay's programs from source and checks them in, so that a stable Rust alone
//! builds bro. `--check` makes them anew and compares.
//!
//! Building needs what few people have: a compiler whose library source is at hand (Debian's rustc-web with rust-web-src, or
//! a nightly with rust-src) and bpf-linker. The object is reproducible for one version of these; the versions are written
//! down beside it.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

/// The programs, with the checked-in object of each and what made it, below the workspace.
const OBJECTS: [(&str, &str, &str); 2] = [
    ("bro-ebpf", "bro-user/sockmap/src/bro.bpf.o", "bro-user/sockmap/src/bro.bpf.txt"),
    ("bro-fence", "bro-user/sockmap/src/fence.bpf.o", "bro-user/sockmap/src/fence.bpf.txt"),
];

const MEND: &str = "no compiler for the kernel's programs: on Debian `sudo apt-get install rustc-web cargo-web rust-web-src`, \
    elsewhere `rustup toolchain install nightly --component rust-src`";
const MEND_LINKER: &str = "bpf-linker is missing: `cargo install bpf-linker` (with rustc-web: `sudo apt-get install llvm-22-dev \
    libpolly-22-dev zlib1g-dev libzstd-dev`, then `LLVM_PREFIX=/usr/lib/llvm-22 LLVM_SYS_221_PREFIX=/usr/lib/llvm-22 cargo \
    install bpf-linker --no-default-features --features llvm-22`)";

/// `cargo xtask build-ebpf`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Do not write: fail if the checked-in programs are not what the source makes (with another compiler than the recorded
    /// one, only say what differs)
    #[arg(long)]
    check: bool,
}

/// Builds, and checks in or compares.
pub fn run(args: &Args) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace's folder")?;
    let (_, _, record) = OBJECTS[0];
    let recorded = std::fs::read_to_string(root.join(record)).unwrap_or_default();
    let tools = Tools::find(&recorded)?;
    say(&format!("with {}", tools.described.trim_end().replace('\n', ", ")))?;
    tools.build(root)?;
    for (program, object, record) in OBJECTS {
        let made = strip(&built(root, program)?)?;
        ensure!(!leaks(&made, root), "{object} would name folders of this machine");
        let path = root.join(object);
        if args.check {
            let checked_in = std::fs::read(&path).with_context(|| format!("reading {object}"))?;
            let recorded = std::fs::read_to_string(root.join(record)).unwrap_or_default();
            compare(object, &checked_in, &made, recorded.starts_with(&tools.described))?;
            continue;
        }
        std::fs::write(&path, &made).with_context(|| format!("writing {object}"))?;
        let written = format!("{}sha256 {}\n", tools.described, sha256(&path)?);
        std::fs::write(root.join(record), written).with_context(|| format!("writing {record}"))?;
        say(&format!("{object}: {} bytes", made.len()))?;
    }
    Ok(())
}

fn say(line: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "build-ebpf: {line}")?)
}

/// A compiler with its library's source, and the linker.
struct Tools {
    cargo: Vec<String>,
    rustc: Option<&'static str>,
    sysroot: PathBuf,
    linker: PathBuf,
    described: String,
}

impl Tools {
    /// The compiler that made the checked-in object if it is here, else any that can.
    fn find(recorded: &str) -> Result<Self> {
        let linker = find_linker().context(MEND_LINKER)?;
        let linker_version = output(Command::new(&linker).arg("--version")).context(MEND_LINKER)?;
        let mut found = Vec::new();
        let debian = (["/usr/bin/cargo"].as_slice(), ["/usr/bin/rustc"].as_slice(), Some("/usr/bin/rustc"));
        let nightly = (
            ["rustup", "run", "nightly", "cargo"].as_slice(),
            ["rustup", "run", "nightly", "rustc"].as_slice(),
            None,
        );
        for (cargo, rustc, env) in [debian, nightly] {
            let ask = |arguments: &[&str]| output(tool(rustc).args(arguments));
            let (Ok(sysroot), Ok(version)) = (ask(&["--print", "sysroot"]), ask(&["-vV"])) else { continue };
            let sysroot = PathBuf::from(sysroot.trim());
            if !sysroot.join("lib/rustlib/src/rust/library/Cargo.lock").exists() {
                continue;
            }
            let mut described = String::new();
            for line in version.lines().enumerate().filter(|(at, line)| *at == 0 || line.starts_with("LLVM"))
            {
                writeln!(described, "{}", line.1)?;
            }
            writeln!(described, "{}", linker_version.trim())?;
            let cargo = cargo.iter().map(ToString::to_string).collect();
            found.push(Self { cargo, rustc: env, sysroot, linker: linker.clone(), described });
        }
        let recorded = found.iter().position(|tools| recorded.starts_with(&tools.described)).unwrap_or(0);
        ensure!(!found.is_empty(), MEND);
        Ok(found.swap_remove(recorded))
    }

    /// Compiles the programs.
    fn build(&self, root: &Path) -> Result<()> {
        let target = root.join(BUILT);
        let registry = registry().context("cargo's folder of crates")?;
        let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
        let mut flags = vec![
            format!("-Clinker={}", self.linker.display()),
            "-Clink-arg=--btf".into(),
            // v3 (Linux 5.12) has the atomic additions that the programs use.
            "-Ctarget-cpu=v3".into(),
            remap(root, "bro"),
            remap(&self.sysroot.join("lib/rustlib/src/rust"), "rust"),
        ];
        flags.extend(registry.iter().map(|folder| remap(folder, "crates")));
        let mut cargo = tool(&self.cargo);
        cargo.args(["build", "--release", "--locked", "--package", "bro-ebpf", "--bins"]);
        cargo.args(["--features", "programs", "-Zbuild-std=core", "--target", "bpfel-unknown-none"]);
        // BTF is made from the full debug information; the linker optimises across crates by itself.
        let settings = [
            "debug=2",
            "lto=false",
            "strip=\"none\"",
            "codegen-units=1",
            "panic=\"abort\"",
            "incremental=false",
        ];
        for setting in settings {
            cargo.arg("--config").arg(format!("profile.release.{setting}"));
        }
        cargo.arg("--target-dir").arg(&target).current_dir(root);
        cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")).env("RUSTC_BOOTSTRAP", "1");
        if let Some(rustc) = self.rustc {
            cargo.env("RUSTC", rustc);
        }
        ensure!(cargo.status().context("starting cargo")?.success(), "the programs did not compile");
        Ok(())
    }
}

/// Where they are compiled, below the workspace.
const BUILT: &str = "target/ebpf";

/// A program's object as the linker leaves it.
fn built(root: &Path, program: &str) -> Result<Vec<u8>> {
    let object = root.join(BUILT).join("bpfel-unknown-none/release").join(program);
    std::fs::read(&object).with_context(|| format!("reading {}", object.display()))
}

/// A tool free of what `cargo xtask` itself was started with: another toolchain's settings.
fn tool<S: AsRef<str>>(command: &[S]) -> Command {
    let mut words = command.iter().map(AsRef::as_ref);
    let mut tool = Command::new(words.next().unwrap_or_default());
    tool.args(words);
    for name in
        ["RUSTUP_TOOLCHAIN", "RUSTC", "RUSTC_WRAPPER", "RUSTDOC", "RUSTFLAGS", "CARGO", "CARGO_TARGET_DIR"]
    {
        tool.env_remove(name);
    }
    tool
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::null()).output()?;
    ensure!(output.status.success(), "{command:?} failed");
    Ok(String::from_utf8(output.stdout)?)
}

fn cargo_home() -> Option<PathBuf> {
    std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| Some(std::env::home_dir()?.join(".cargo")))
}

fn find_linker() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(Some(cargo_home()?.join("bin")));
    folders.map(|folder| folder.join("bpf-linker")).find(|linker| linker.is_file())
}

/// The folders that cargo unpacks crates into: one for each registry.
fn registry() -> Option<Vec<PathBuf>> {
    let sources = std::fs::read_dir(cargo_home()?.join("registry/src")).ok()?;
    Some(sources.flatten().map(|entry| entry.path()).collect())
}

/// Leaves out the debug information for debuggers (DWARF); the kernel's own (BTF) stays.
fn strip(object: &[u8]) -> Result<Vec<u8>> {
    let mut builder = object::build::elf::Builder::read(object).context("reading the object")?;
    for section in &mut builder.sections {
        let name = String::from_utf8_lossy(&section.name).into_owned();
        section.delete =
            name.starts_with(".debug") || name.starts_with(".rel.debug") || name == ".llvm_addrsig";
    }
    // LLVM keeps the sections' names among the symbols' names; the writer wants a table for each.
    let names = builder.sections.add();
    names.name = (b".shstrtab" as &[u8]).into();
    names.sh_type = object::elf::SHT_STRTAB;
    names.data = object::build::elf::SectionData::SectionString;
    builder.delete_orphans();
    builder.delete_unused_versions();
    let mut stripped = Vec::new();
    builder.write(&mut stripped).context("writing the object")?;
    Ok(stripped)
}

/// Whether the object names a folder of the machine that built it.
fn leaks(object: &[u8], root: &Path) -> bool {
    let folders = [Some(root.to_path_buf()), cargo_home(), std::env::home_dir()];
    folders.into_iter().flatten().any(|folder| {
        let name = folder.as_os_str().as_encoded_bytes();
        // A home directory of `/` names nothing.
        name.len() > 1 && object.windows(name.len()).any(|window| window == name)
    })
}

/// Compares what runs in the kernel, section by section.
fn compare(object: &str, checked_in: &[u8], made: &[u8], same_tools: bool) -> Result<()> {
    if checked_in == made {
        return say(&format!("{object} is exactly what the source makes"));
    }
    let (old, new) = (sections(checked_in)?, sections(made)?);
    let names: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let differ: Vec<&str> =
        names.into_iter().filter(|name| old.get(*name) != new.get(*name)).map(String::as_str).collect();
    match (differ.is_empty(), same_tools) {
        (true, _) => say(&format!("the programs in {object} are what the source makes")),
        (false, true) => {
            bail!("the programs in {object} differ from what the source makes in {}", differ.join(", "))
        }
        (false, false) => {
            say("the recorded compiler is not here; what this one makes differs, as is to be expected, in")?;
            say(&differ.join(", "))
        }
    }
}

/// The sections that the kernel gets to see, with the names that their relocations refer to.
fn sections(object: &[u8]) -> Result<std::collections::BTreeMap<String, Vec<u8>>> {
    use object::{Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget};
    const SEEN: [&str; 8] =
        ["sk_msg", "sockops", "classifier", "maps", ".text", ".rodata", ".maps", "license"];
    // The fence has a section for each program.
    const OF_GROUPS: &str = "cgroup/";
    let file = object::File::parse(object)?;
    let mut sections = std::collections::BTreeMap::new();
    for section in file.sections() {
        let name = section.name()?.to_owned();
        if !SEEN.contains(&name.as_str()) && !name.starts_with(OF_GROUPS) {
            continue;
        }
        let mut content = section.data()?.to_vec();
        for (at, relocation) in section.relocations() {
            content.extend(at.to_le_bytes());
            if let RelocationTarget::Symbol(symbol) = relocation.target() {
                content.extend(file.symbol_by_index(symbol)?.name_bytes()?);
            }
        }
        sections.insert(name, content);
    }
    Ok(sections)
}

fn sha256(file: &Path) -> Result<String> {
    let sum = output(Command::new("sha256sum").arg("-b").arg("--").arg(file))?;
    sum.split_whitespace().next().map(Into::into).context("sha256sum said nothing")
}
