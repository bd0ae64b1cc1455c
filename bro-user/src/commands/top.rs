//! `bro top`: what is activated, in a terminal, again each second; wakes and puts to sleep by key.
//!
//! One thread draws and decides; each of the others waits for one thing: keys, signals, services' answers, a wake's outcome.

mod screen;
mod terminal;
mod view;

use std::io::IsTerminal as _;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use crossterm::event::{self, Event};
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::wake_sleep::Whom;
use crate::commands::status::list;
use crate::commands::wake_sleep;
use crate::exit::{self, Failure};
use crate::systemd::scope::RuntimeScope;
use view::{Doing, Row, View};

/// How often services are asked.
const STEP: Duration = Duration::from_secs(1);

/// How long a wake may take, as with `bro wake`.
const WAKE: Duration = Duration::from_secs(90);

/// What the drawing thread receives.
enum News {
    /// A key, or another size.
    Input(Event),
    /// The services that there are.
    Services(anyhow::Result<Vec<Row>>, Instant),
    /// A wake's or sleep's outcome.
    Done(Doing, anyhow::Result<String>),
    /// It is to end: by a signal, or since the terminal is gone.
    End,
}

/// Runs `bro top`.
///
/// # Errors
/// When there is no terminal.
pub fn run(options: &crate::cli::Top) -> anyhow::Result<()> {
    if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
        anyhow::bail!(Failure::Usage(
            "bro top needs a terminal for its input and output; `bro status --watch` and `bro metrics` need none".into()
        ));
    }
    let scope = RuntimeScope::choose(options.system, options.user);
    let (to, news) = channel();
    // Before the terminal is changed: from then on every signal has to restore it.
    hear_signals(to.clone())?;
    let mut screen = terminal::Screen::enter().context("the terminal cannot be used")?;
    let again = gather(scope, to.clone());
    hear_keys(to.clone());
    let mut view = View::default();
    loop {
        screen.draw(|frame| screen::draw(frame, &mut view))?;
        match news.recv()? {
            News::End => return Ok(()),
            News::Services(services, at) => view.services(services, at),
            News::Done(doing, outcome) => {
                view.done(&doing, outcome);
                again.send(()).ok();
            }
            News::Input(Event::Key(key)) => match view.key(key) {
                view::Next::Nothing => {}
                view::Next::Quit => return Ok(()),
                view::Next::Do(doing) => act(doing, options, to.clone()),
            },
            News::Input(_) => {}
        }
    }
}

/// Sends every key and change of size.
fn hear_keys(to: Sender<News>) {
    drop(std::thread::spawn(move || {
        loop {
            let news = event::read().map_or(News::End, News::Input);
            let ended = matches!(news, News::End);
            if to.send(news).is_err() || ended {
                return;
            }
        }
    }));
}

/// Sends an end when a signal comes.
fn hear_signals(to: Sender<News>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // From now on, not only once the thread runs.
    let (mut terminate, mut interrupt, mut hang_up) = {
        let _entered = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?)
    };
    drop(std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = hang_up.recv() => {}
            }
        });
        to.send(News::End).ok();
    }));
    Ok(())
}

/// Sends the list of services, each second, and at once when told to.
fn gather(scope: RuntimeScope, to: Sender<News>) -> Sender<()> {
    let (again, told): (Sender<()>, Receiver<()>) = channel();
    drop(std::thread::spawn(move || {
        loop {
            let services = look(scope);
            if to.send(News::Services(services, Instant::now())).is_err() {
                return;
            }
            if told.recv_timeout(STEP) == Err(RecvTimeoutError::Disconnected) {
                return;
            }
        }
    }));
    again
}

fn look(scope: RuntimeScope) -> anyhow::Result<Vec<Row>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let services = runtime.block_on(list::all(scope))?;
    Ok(services.iter().map(Row::of).collect())
}

/// Wakes or puts to sleep, in the background.
fn act(doing: Doing, options: &crate::cli::Top, to: Sender<News>) {
    let whom = Whom { name: doing.name.clone(), user: options.user, system: options.system };
    drop(std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let outcome = runtime.map_err(Into::into).and_then(|runtime| match doing.what {
            view::What::Wake => runtime.block_on(wake_sleep::wake_up(&whom, WAKE)),
            view::What::Sleep { force } => runtime.block_on(wake_sleep::put_away(&whom, force)),
        });
        to.send(News::Done(doing, outcome.map_err(|error| anyhow::anyhow!(exit::sentence(&error))))).ok();
    }));
}
