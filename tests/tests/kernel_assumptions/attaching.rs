//! Attaching to a cgroup, the rights of the process that does, and what is left when it is killed.

use super::*;

#[test]
fn the_sixty_fifth_program_of_a_cgroup_is_refused_as_full() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let name = bench.cgroup.path().file_name().unwrap().to_owned();
    let mut path = bench.cgroup.path().to_path_buf();
    for attached in 1.. {
        // Another way to write the same folder.
        path = path.join("..").join(&name);
        match bench.kernel.attach(&path) {
            Ok(()) => assert!(attached < 64, "more than 64"),
            Err(Unavailable::CgroupFull(_)) => break,
            Err(error) => panic!("{error:?}"),
        }
    }
}

#[test]
fn a_program_that_was_attached_exclusively_is_reported_as_that() {
    require!(Need::Bpf, BPFTOOL);
    let bench = Bench::new().unwrap();
    let other = bench.cgroup.sibling().unwrap();
    let [_, watch, _] = bench.kernel.program_ids().unwrap();
    let id = watch.to_string();
    let attach = ["cgroup", "attach", other.to_str().unwrap(), "sock_ops", "id", &id];
    assert!(Command::new("bpftool").args(attach).status().unwrap().success());
    let mut late = Kernel::load(&CONFIG).unwrap();
    let refused = late.attach(&other).unwrap_err();
    std::fs::remove_dir(&other).unwrap();
    assert!(matches!(refused, Unavailable::CgroupExclusive(_)), "{refused:?}");
}

/// What a forwarder does for each connection, it may do after it dropped its capabilities.
#[test]
fn lanes_need_no_capability_once_everything_is_loaded() {
    require!(Need::Bpf, Need::Root);
    let mut bench = Bench::new().unwrap();
    std::thread::scope(|scope| {
        let ordinary = scope.spawn(|| {
            const NOBODY: libc::uid_t = 65534;
            // SAFETY: the bare system call changes this thread alone, which ends with this closure. All capabilities go.
            let changed = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
            ensure!(changed == 0, "setresuid");
            let ends = bench.connect()?;
            let lane = bench.hooked_lane(&ends)?.0;
            send(&ends.service, &mut Stream::new(1), 100)?;
            receive(&ends.client, &mut Stream::new(1), 100)?;
            ensure!(lane.bytes() == 100, "{:?}", lane.snapshot());
            drop(lane);
            ensure!(bench.kernel.totals().open_lanes == 0);
            match Kernel::load(&CONFIG) {
                Err(Unavailable::NotPermitted(..)) => Ok(()),
                other => anyhow::bail!("loading as nobody: {other:?}"),
            }
        });
        ordinary.join().expect("the thread ends by itself").unwrap();
    });
}

/// What `kill_9` starts again as its child: a forwarder's kernel side that waits to be killed.
#[test]
#[ignore = "a part of another test"]
fn child_that_loads_and_waits() {
    let mut kernel = Kernel::load(&CONFIG).unwrap();
    kernel.attach(std::env::var_os("BRO_TEST_CGROUP").unwrap().as_ref()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (netns, port) = (netns_cookie(listener.as_fd()).unwrap(), listener.local_addr().unwrap().port());
    kernel.watch(netns, port, SenderRole::Service).unwrap();
    let [send, watch, _] = kernel.program_ids().unwrap();
    println!("ready {port} {send} {watch}");
    listener.accept().unwrap();
    loop {
        std::thread::park();
    }
}

#[test]
fn kill_9_leaves_no_program_and_sockets_go_back_to_plain_tcp() {
    require!(Need::Bpf, BPFTOOL);
    let bench = Bench::new().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "attaching::child_that_loads_and_waits"])
        .env("BRO_TEST_CGROUP", bench.cgroup.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    let ready = lines.find_map(|line| Some(line.ok()?.split_once("ready ")?.1.to_owned())).unwrap();
    let ids: Vec<u32> = ready.split(' ').map(|id| id.parse().unwrap()).collect();
    let loaded = |id: u32| {
        let shown = Command::new("bpftool").args(["prog", "show", "id", &id.to_string()]).output();
        shown.is_ok_and(|shown| shown.status.success())
    };
    assert!(loaded(ids[1]) && loaded(ids[2]));
    // A socket of ours that the child's programs hooked outlives the child.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let survivor = pair(&listener).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while loaded(ids[1]) || loaded(ids[2]) {
        assert!(Instant::now() < deadline, "a program stayed");
    }
    send(&survivor.0, &mut Stream::new(1), 1000).unwrap();
    receive(&survivor.1, &mut Stream::new(1), 1000).unwrap();
    assert!(matches!((&survivor.1).read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock));
}
