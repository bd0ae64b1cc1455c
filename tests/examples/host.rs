//! A test host to look around in: `cargo run -p bro-tests --example host` boots one, says how to get in, and removes it at the
//! end of its standard input (Ctrl-D). With arguments it runs that command inside as root instead.
#![allow(clippy::print_stderr, reason = "it is a program for a terminal")]

use std::io::Read as _;

use bro_tests::host::Host;

fn main() -> anyhow::Result<()> {
    let host = Host::boot()?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.is_empty() {
        eprintln!(
            "booted in {:.1} s; to get in: nsenter --target {} --all",
            host.booted_in().as_secs_f64(),
            host.pid()
        );
        std::io::stdin().read_to_end(&mut Vec::new())?;
        return Ok(());
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let status = host.command(None, &arguments)?.status()?;
    drop(host);
    std::process::exit(status.code().unwrap_or(1));
}
