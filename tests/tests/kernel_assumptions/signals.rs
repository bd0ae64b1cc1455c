//! The reason for all the care about O_NONBLOCK: no signal makes a blocking socket fail.

use super::*;

/// SIGUSR1 is caught, with SA_RESTART, by a handler that does nothing.
fn harmless_signals() {
    extern "C" fn nothing(_: libc::c_int) {}
    let handler = nix::sys::signal::SigHandler::Handler(nothing);
    let flags = nix::sys::signal::SaFlags::SA_RESTART;
    let action = nix::sys::signal::SigAction::new(handler, flags, nix::sys::signal::SigSet::empty());
    // SAFETY: the handler does nothing at all.
    unsafe { nix::sys::signal::sigaction(nix::sys::signal::Signal::SIGUSR1, &action) }.unwrap();
}

type Reading = std::thread::JoinHandle<std::io::Result<(usize, [u8; 1])>>;

/// Reads one byte in a thread, and says which.
fn read_in_a_thread(mut from: TcpStream) -> (Reading, u32, i32) {
    let (told, thread) = std::sync::mpsc::channel();
    let reading = std::thread::spawn(move || {
        let id = (std::process::id(), nix::unistd::gettid().as_raw());
        told.send(id).expect("the test waits for it");
        let mut byte = [0];
        from.read(&mut byte).map(|count| (count, byte))
    });
    let (process, thread) = thread.recv().expect("the thread says who it is");
    (reading, process, thread)
}

/// Signals a thread again and again while it waits.
fn interrupt(process: u32, thread: i32) -> Result<()> {
    for _ in 0..20 {
        await_sleep(thread)?;
        // SAFETY: a signal with a handler, to a thread that exists until it is joined by the caller.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGUSR1) };
        ensure!(sent == 0, "the signal was not sent");
    }
    Ok(())
}

/// The reason for all the care about O_NONBLOCK: a signal with SA_RESTART must not make recv fail.
#[test]
fn an_unmodified_blocking_service_never_sees_eagain_from_a_signal() {
    require!(Need::Bpf);
    harmless_signals();
    let bench = Bench::new().unwrap();
    let backend = connect_nonblocking(bench.service.local_addr().unwrap()).unwrap();
    let (service, _) = bench.service.accept().unwrap();
    let (reading, process, thread) = read_in_a_thread(service);
    interrupt(process, thread).unwrap();
    (&backend).write_all(b"x").unwrap();
    assert_eq!(reading.join().unwrap().unwrap(), (1, *b"x"));
}

/// The same for a client that connected without blocking, has exchanged some messages, and then turned to blocking.
#[test]
fn a_client_that_turned_to_blocking_never_sees_eagain_from_a_signal() {
    require!(Need::Bpf);
    harmless_signals();
    let mut bench = Bench::new().unwrap();
    let ends = bench.connect().unwrap();
    let lane = bench.client_lane(&ends).unwrap();
    bench.pass(&ends, &lane, 1).unwrap();
    ends.client.set_nonblocking(false).unwrap();
    bench.pass(&ends, &lane, 2).unwrap();
    assert!(!bench.proved(Duration::from_millis(50)).unwrap());
    let kernel_relay::Ends { client, mut accepted, .. } = ends;
    let (reading, process, thread) = read_in_a_thread(client);
    interrupt(process, thread).unwrap();
    accepted.write_all(b"x").unwrap();
    assert_eq!(reading.join().unwrap().unwrap(), (1, *b"x"));
}

/// Waits until a thread of this process sleeps in a system call.
fn await_sleep(thread: i32) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat"))?;
        if stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('S')) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the thread never sleeps");
        std::thread::yield_now();
    }
}
