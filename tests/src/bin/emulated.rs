//! PID 1 of the machines that the suite `emulator` boots, and with an argument what that starts.

use bro_tests::emulator::inside;

fn main() {
    let everything = std::env::args().nth(1).is_some_and(|word| word == inside::EVERYTHING);
    let init = if everything { std::os::unix::process::parent_id() } else { std::process::id() };
    // Anywhere else it would mount over a host's own folders and then restart the host.
    assert!(init == 1, "this is the init of an emulated machine, and not to be run elsewhere");
    if everything {
        inside::everything();
    } else {
        inside::main();
    }
}
