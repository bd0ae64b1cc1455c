//! No system call of the program's leaves the upper half of an argument undefined (`bro-user/src/words.rs`): a seccomp filter that
//! looks at whole words, like systemd's, would see what was left in the register.
//!
//! Needs: a network namespace; root, nm for some tests. Takes: seconds.
#![allow(clippy::tests_outside_test_module, reason = "this is a test target")]

use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::Setup;
use bro_tests::loader::{ALICE, Stage};
use bro_tests::netns::Namespace;
use bro_tests::notify::Notify;
use bro_tests::peers::{Family, PATIENCE};
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::scratch::Scratch;
use bro_tests::suite::{Lane, Legs, Rig};
use bro_tests::tier::{Need, met};
use bro_tests::{behaviours, bro, process, require_namespaces, words};
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;

/// What lies above an int that an optimised caller has taken from a pair of them.
const LEFT: u64 = 1 << 32;

/// Runs a command under the filter.
fn strictly(program: &std::path::Path, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(bro::helper());
    command.arg("strict").arg(program).args(arguments);
    Ok(command.output()?)
}

fn expect_alive(what: &str, output: &Output) -> Result<()> {
    ensure!(output.status.signal().is_none(), "{what} was killed: {output:?}");
    Ok(())
}

/// One question, with this first word.
fn asked(call: libc::c_long, words: [u64; 3]) -> Result<Output> {
    let words: Vec<String> =
        std::iter::once(call.cast_unsigned()).chain(words).map(|word| format!("{word:x}")).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    strictly(&bro::helper(), &[&["ask"], &words[..]].concat())
}

#[test]
fn the_filter_kills_what_it_is_to_kill_and_nothing_else() -> Result<()> {
    let (unix, stream) = (libc::AF_UNIX as u64, libc::SOCK_STREAM as u64);
    let fine = [
        (libc::SYS_socket, [unix, stream, 0]),
        (libc::SYS_close, [-1_i64 as u64, 0, 0]),
        (libc::SYS_close, [u64::from(u32::MAX), 0, 0]),
        // No descriptors of 64 bits, and not arguments at all.
        (libc::SYS_getpid, [LEFT, LEFT, LEFT]),
        (libc::SYS_lseek, [0, LEFT, 0]),
        (libc::SYS_fcntl, [2, libc::F_SETFD as u64, 0]),
        (libc::SYS_fcntl, [2, libc::F_GETFD as u64, LEFT]),
        (libc::SYS_listen, [2, libc::F_SETFL as u64, LEFT]),
    ];
    for (call, words) in fine {
        expect_alive(&format!("{call} of {words:x?}"), &asked(call, words)?)?;
    }
    let half = [
        (libc::SYS_socket, [LEFT | unix, stream, 0]),
        (libc::SYS_socket, [unix, LEFT | stream, 0]),
        (libc::SYS_socket, [unix, stream, LEFT]),
        // Not as a negative number is widened.
        (libc::SYS_close, [u64::from(u32::MAX) << 32, 0, 0]),
        (libc::SYS_close, [LEFT | u64::from(u32::MAX), 0, 0]),
        (libc::SYS_lseek, [0, 0, LEFT]),
        (libc::SYS_fcntl, [2, LEFT | libc::F_SETFD as u64, 0]),
        (libc::SYS_fcntl, [2, libc::F_SETFD as u64, LEFT]),
    ];
    for (call, words) in half {
        let ended = asked(call, words)?.status;
        ensure!(ended.signal() == Some(libc::SIGSYS), "{call} of {words:x?}: {ended:?}");
    }
    Ok(())
}

/// What the running kernel says of its own system calls.
#[test]
fn the_filter_looks_at_what_the_kernel_has_32_bits_of() -> Result<()> {
    bro_tests::require_or_ok!(Need::Root);
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    let place = "/sys/kernel/tracing";
    let mounted = mount(Some("tracefs"), place, Some("tracefs"), MsFlags::empty(), None::<&str>);
    let formats = std::path::Path::new(place).join("events/syscalls");
    if mounted.is_err() || !formats.is_dir() {
        println!("this kernel does not describe its system calls");
        return Ok(());
    }
    let mut compared = 0;
    for (name, (_, arguments)) in words::calls() {
        let name = name.trim_start_matches("SYS_");
        // Not by the names of the functions that they are in the kernel.
        let there = match name {
            "stat" | "lstat" | "fstat" | "uname" => format!("new{name}"),
            "sendfile" => "sendfile64".into(),
            "umount2" => "umount".into(),
            name => name.into(),
        };
        let Ok(format) = std::fs::read_to_string(formats.join(format!("sys_enter_{there}/format"))) else {
            continue;
        };
        let mut small: Vec<usize> = Vec::new();
        let fields = format.lines().filter_map(|line| line.trim().strip_prefix("field:"));
        // The first fields are of every event, and the number.
        for (index, field) in fields.skip(5).enumerate() {
            let declared = field.split(';').next().unwrap_or_default();
            let kind = declared.rsplit_once(' ').map_or(declared, |(kind, _)| kind);
            if is_small(kind) {
                small.push(index);
            }
        }
        let wanted: &[usize] = match name {
            // As the table says of itself.
            "futex" => &[1, 2, 5],
            "mmap" | "mprotect" => &[],
            _ => arguments,
        };
        ensure!(small == wanted, "{name}: the kernel says {small:?}, the table {arguments:?}\n{format}");
        compared += 1;
    }
    ensure!(compared > 200, "only {compared} are described");
    Ok(())
}

fn is_small(kind: &str) -> bool {
    let kind = kind.trim_start_matches("const ").trim();
    const SMALL: [&str; 18] = [
        "int",
        "unsigned int",
        "unsigned",
        "umode_t",
        "pid_t",
        "uid_t",
        "gid_t",
        "key_serial_t",
        "clockid_t",
        "u32",
        "__u32",
        "s32",
        "__s32",
        "qid_t",
        "rwf_t",
        "timer_t",
        "mqd_t",
        "key_t",
    ];
    SMALL.contains(&kind) || kind.starts_with("enum ")
}

/// A forwarder's life as systemd leads it: a client wakes it, another one comes after a reload, and it leaves when it is idle.
fn live(scene: &mut Scene, setup: Setup) -> Result<()> {
    let mut notify = Notify::new()?;
    let first = scene.client()?;
    let setup = setup.strict().socket(&scene.front).env("NOTIFY_SOCKET", notify.name());
    let target = scene.target().replace("127.0.0.1:", "localhost:");
    let mut forwarder = setup.arg("--exit-idle-time=500ms").arg(target).start()?;
    notify.wait(PATIENCE, |line| line == "READY=1")?;
    scene.expect_held(&forwarder, 1)?;
    let service = scene.serve()?;
    let served = service.accept()?;
    expect_relayed(&first, &served)?;
    ensure!(forwarder.report()?.pid.cast_signed() == forwarder.pid(), "{:?}", forwarder.report()?);

    forwarder.signal(Signal::SIGHUP)?;
    let old = format!("MAINPID={}", forwarder.pid());
    let line = notify.wait(PATIENCE, |line| line.starts_with("MAINPID=") && line != old)?;
    let successor: i32 = line.trim_start_matches("MAINPID=").parse()?;
    // Until then both accept.
    forwarder.log().line(PATIENCE, |line| line.contains("no more clients are accepted"))?;
    let second = (scene.client()?, service.accept()?);
    expect_relayed(&second.0, &second.1).context("through the successor")?;
    expect_relayed(&first, &served).context("through the old process")?;
    drop((first, served));
    let ended = forwarder.wait(PATIENCE)?.context("the old process goes on")?;
    ensure!(ended.code() == Some(0), "the old process: {ended:?}");
    drop(second);
    ensure!(process::ends(successor, PATIENCE)?, "the successor does not leave when it is idle");
    forwarder.expect_nothing_left()?;
    forwarder.expect_no_panic()?;
    let killed = forwarder.log().lines().into_iter().find(|line| line.contains("SIGSYS"));
    ensure!(killed.is_none(), "{killed:?}");
    Ok(())
}

#[test]
fn a_forwarders_life_with_splice() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let setup = Setup::new().netns(&scene.namespace).arg("--relay=splice");
    live(&mut scene, setup)
}

#[test]
fn a_forwarders_life_with_copy_by_process() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::of(Family::Tcp6)?;
    let setup = Setup::new().pid(&scene.namespace).arg("--relay=copy");
    live(&mut scene, setup)
}

#[test]
fn a_forwarders_life_with_unix_sockets() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::of(Family::Unix)?;
    let setup = Setup::new().netns(&scene.namespace);
    live(&mut scene, setup)
}

/// Everything that relaying takes, half-closes, aborts and back-pressure among it.
fn relay(lane: Lane, legs: Legs) -> Result<()> {
    if !met(std::thread::current().name().unwrap_or("?"), &lane.needs()) {
        return Ok(());
    }
    let rig = Rig::with(lane, legs, Setup::strict)?;
    behaviours::client_abort_under_back_pressure(&rig)?;
    behaviours::mixed_torture(&rig)?;
    rig.finish()
}

#[test]
fn bytes_by_splice() -> Result<()> {
    relay(Lane::Splice, Legs::TCP4)
}

#[test]
fn bytes_by_copy() -> Result<()> {
    relay(Lane::Copy, Legs::TCP6)
}

#[test]
fn bytes_by_the_kernel_relay() -> Result<()> {
    relay(Lane::BothLanes, Legs::TCP4)
}

/// As root: what it takes to become a user's forwarder is loaded and pinned beforehand.
#[test]
fn a_set_for_another_user() -> Result<()> {
    bro_tests::require_or_ok!(Need::Root, Need::Bpf);
    let stage = Stage::new()?;
    let cgroup = stage.cgroup().to_str().context("a cgroup's path")?;
    let user = ALICE.to_string();
    for arguments in [&["loader", &user, "--cgroup", cgroup][..], &["loader", &user, "--remove"]] {
        let ran = strictly(bro::binary(), arguments)?;
        ensure!(ran.status.success(), "bro {arguments:?}: {ran:?}");
    }
    Ok(())
}

#[test]
fn what_is_asked_by_hand() -> Result<()> {
    let scratch = Scratch::new()?;
    let quadlets = scratch.join("etc/containers/systemd");
    std::fs::create_dir_all(&quadlets)?;
    std::fs::write(quadlets.join("web.container"), "[Container]\nImage=localhost/web\nNetwork=none\n")?;
    let root = format!("--root={}", scratch.path().display());
    let activate = ["activate", "web", "--system", "--external-port=8080", &root];
    for more in [&["--dry-run"][..], &[], &["--exit-idle-time=5min"]] {
        let ran = strictly(bro::binary(), &[&activate[..], more].concat())?;
        ensure!(ran.status.success(), "bro activate {more:?}: {ran:?}");
    }
    // What they find here is another matter.
    for arguments in [&["status"][..], &["doctor"], &["doctor", "web"], &["wake", "web"], &["--help"]] {
        let ran = strictly(bro::binary(), arguments)?;
        ensure!(
            ran.status.code().is_some() && !ran.stdout.is_empty() | !ran.stderr.is_empty(),
            "{arguments:?}: {ran:?}"
        );
    }
    Ok(())
}

#[test]
fn another_commands_network() -> Result<()> {
    require_namespaces!();
    let namespace = Namespace::new()?;
    let pid = namespace.pid().to_string();
    let ran = strictly(bro::binary(), &["helper", "--pid", &pid, "--", "readlink", "/proc/self/ns/net"])?;
    let there = std::fs::read_link(format!("/proc/{pid}/ns/net"))?;
    ensure!(String::from_utf8_lossy(&ran.stdout).trim() == there.to_string_lossy(), "{ran:?}");
    Ok(())
}

/// What the program may take from glibc (and from gcc's library): whatever is not here is either in `words.rs`, or has to be looked
/// at. Each line says why it may.
const LEFT_TO_GLIBC: &[&str] = &[
    // No system call, or one that has nothing of the caller's in it.
    "__errno_location __gcc_personality_v0 __libc_current_sigrtmax __res_init __stack_chk_fail __tls_get_addr \
     __umodti3 __udivti3 __xpg_strerror_r bcmp calloc dl_iterate_phdr dlsym environ free freeaddrinfo freeifaddrs gai_strerror getauxval getenv \
     gnu_get_libc_version malloc malloc_trim posix_memalign realloc setenv sigaddset sigemptyset strlen sysconf unsetenv \
     __gmon_start__",
    "__libc_start_main abort fork getegid geteuid getgid getpid getppid gettid getuid pause sched_yield setsid",
    // By places in memory and whole words alone.
    "chdir chroot execvp getcwd getxattr lstat64 mount munmap opendir readlink realpath rename rmdir setgroups sigaltstack stat stat64 \
     statfs64 symlink uname unlink",
    // With the descriptor that they have opened themselves.
    "closedir dirfd getifaddrs readdir64",
    // The names of hosts and users: by sockets and files of their own.
    "getaddrinfo getgrouplist getpwnam_r getpwuid_r initgroups",
    // The time comes without a system call.
    "clock_gettime",
    // Other users' rights: glibc's, because all threads have to follow. The first two are for children with another user, of which
    // bro has none; the others move their argument, and so widen it.
    "setgid setuid setegid seteuid",
    // Weak: std's spawn and pidfd take them where glibc has them (2.39). In glibc they are C, which widens what it passes on.
    "pidfd_getpid pidfd_spawnp",
    // By second names, which words.rs calls with whole words.
    "__sigaction euidaccess sigprocmask ssignal",
];

/// How the names begin that many functions of the first kind share. (Of pthread_sigmask(3) there is an own one.)
const FAMILIES: &[&str] = &["_Unwind_", "_ITM_", "__cxa_", "mem", "posix_spawn", "pthread_"];

#[test]
fn the_installed_program_takes_nothing_else_from_libc() -> Result<()> {
    bro_tests::require_or_ok!(Need::Packaged, Need::Program("nm", "binutils"));
    let listed = Command::new("nm").args(["--dynamic", "--undefined-only"]).arg(bro::binary()).output()?;
    ensure!(listed.status.success(), "{listed:?}");
    let listed = String::from_utf8(listed.stdout)?;
    let names: Vec<&str> =
        listed.lines().filter_map(|line| line.split_whitespace().last()?.split('@').next()).collect();
    ensure!(names.contains(&"malloc"), "{names:?}");
    let known: Vec<&str> = LEFT_TO_GLIBC.iter().flat_map(|line| line.split_whitespace()).collect();
    let own = ["pthread_sigmask", "pthread_kill", "memfd_create"];
    let is_known = |name: &&str| {
        let of_a_family = FAMILIES.iter().any(|family| name.starts_with(family));
        known.contains(name) || of_a_family && !own.contains(name)
    };
    let new: Vec<&str> = names.into_iter().filter(|name| !is_known(name)).collect();
    ensure!(
        new.is_empty(),
        "does each of these pass on an int of its caller's as it is? Then it belongs into words.rs, else here: {new:?}"
    );
    Ok(())
}
