//! A program on a terminal of its own: what it shows, keys that are pressed, and how the terminal is left.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, ensure};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{Termios, tcgetattr};
use nix::unistd::Pid;
use vt100::Parser;

use crate::peers::PATIENCE;
use crate::process;

/// Dropping it kills the program.
#[derive(Debug)]
pub struct Pty {
    child: Child,
    master: File,
    /// Held, so that the terminal outlives the program.
    slave: OwnedFd,
    screen: Arc<Mutex<Screen>>,
    before: Termios,
}

struct Screen(Parser);

impl std::fmt::Debug for Screen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.screen().contents())
    }
}

impl Pty {
    /// Runs `command` (through `setsid --ctty`, say, so that the terminal is its own) on a terminal of so many lines and columns.
    pub fn start(mut command: Command, lines: u16, columns: u16) -> Result<Self> {
        let size = Winsize { ws_row: lines, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(&size, None)?;
        let before = tcgetattr(&pair.slave)?;
        command
            .stdin(pair.slave.try_clone()?)
            .stdout(pair.slave.try_clone()?)
            .stderr(pair.slave.try_clone()?);
        command.env("TERM", "xterm-256color");
        let child = command.spawn().context("starting a program on a terminal")?;
        drop(command);
        let screen = Arc::new(Mutex::new(Screen(Parser::new(lines, columns, 0))));
        let master = File::from(pair.master);
        let (mut reader, shown) = (master.try_clone()?, screen.clone());
        drop(std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                shown.lock().unwrap_or_else(PoisonError::into_inner).0.process(&bytes[..count]);
            }
        }));
        Ok(Self { child, master, slave: pair.slave, screen, before })
    }

    fn screen(&self) -> MutexGuard<'_, Screen> {
        self.screen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lines that are shown, without what is blank at their ends.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.screen().0.screen().contents().lines().map(|line| line.trim_end().to_owned()).collect()
    }

    /// Waits until a line is shown that is wanted, and gives it.
    pub fn expect(&self, what: &str, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let find = || self.lines().into_iter().find(|line| wanted(line));
        process::eventually(PATIENCE, || find().is_some());
        find().with_context(|| format!("{what} is not shown:\n{}", self.lines().join("\n")))
    }

    /// Waits until the whole screen is as wanted: a single line may be one of before.
    pub fn expect_screen(&self, what: &str, wanted: impl Fn(&[String]) -> bool) -> Result<()> {
        let shown = process::eventually(PATIENCE, || wanted(&self.lines()));
        ensure!(shown, "{what} is not shown:\n{}", self.lines().join("\n"));
        Ok(())
    }

    /// Presses keys.
    pub fn press(&mut self, keys: &str) -> Result<()> {
        Ok(self.master.write_all(keys.as_bytes())?)
    }

    /// Gives the terminal another size.
    pub fn resize(&self, lines: u16, columns: u16) -> Result<()> {
        self.screen().0.screen_mut().set_size(lines, columns);
        let (rows, cols) = (lines.to_string(), columns.to_string());
        let mut stty = Command::new("stty");
        stty.args(["rows", &rows, "cols", &cols]).stdin(self.slave.try_clone()?);
        ensure!(stty.status()?.success(), "the terminal cannot have another size");
        Ok(())
    }

    /// Sends the program a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().cast_signed()), signal)?)
    }

    /// Waits for its end; the terminal has to be as it was, but for what it said last.
    pub fn expect_restored(&mut self) -> Result<ExitStatus> {
        let ended = process::eventually(PATIENCE, || matches!(self.child.try_wait(), Ok(Some(_)) | Err(_)));
        ensure!(ended, "it does not end:\n{}", self.lines().join("\n"));
        ensure!(tcgetattr(&self.slave)? == self.before, "the terminal's settings are other ones");
        let as_before = || {
            let shown = self.screen();
            let screen = shown.0.screen();
            !screen.alternate_screen() && !screen.hide_cursor()
        };
        ensure!(process::eventually(PATIENCE, as_before), "the screen is not the one of before");
        Ok(self.child.wait()?)
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
