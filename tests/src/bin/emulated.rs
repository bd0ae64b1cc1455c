//! PID 1 of the machines that the suite `emulator` boots.

fn main() {
    // Anywhere else it would mount over a host's own folders and then restart the host.
    assert!(std::process::id() == 1, "this is the init of an emulated machine, and not to be run elsewhere");
    bro_tests::emulator::inside::main();
}
