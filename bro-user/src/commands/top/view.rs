//! What is shown and what is chosen, without a terminal.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use crate::commands::status::ServiceState;
use crate::commands::status::list::{self, ListedService};
use crate::exit::on_one_line;

/// One service, as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    pub name: String,
    pub state: ServiceState,
    /// In seconds since 1970.
    pub since: Option<u64>,
    pub connections: u64,
    pub held: u64,
    pub relay: String,
    /// Bytes since the host was booted, to the service and to clients.
    pub bytes: (u64, u64),
    /// The sentence of `bro status` about it.
    pub sentence: String,
}

impl Row {
    pub fn of(service: &ListedService) -> Self {
        let now = service.forwarders.iter().flat_map(|report| &report.listeners);
        let mut relays: Vec<&str> =
            service.forwarders.iter().map(|report| report.relay.name.as_str()).collect();
        relays.sort_unstable();
        relays.dedup();
        let tallies = service.counts.listeners.values();
        let bytes = tallies.fold((0, 0), |(up, down), tally| {
            (up + tally.to_service.total(), down + tally.to_clients().total())
        });
        Self {
            name: on_one_line(&service.name),
            state: service.state,
            since: service.since,
            connections: service.connections,
            held: now.map(|listener| listener.tally.held).sum(),
            relay: on_one_line(&relays.join("+")),
            bytes,
            sentence: on_one_line(&list::sentence(service)),
        }
    }
}

/// What a key has asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Next {
    Nothing,
    Quit,
    Do(Doing),
}

/// A wake or a sleep of one service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Doing {
    pub name: String,
    pub what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Wake,
    Sleep { force: bool },
}

/// What the bottom says.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) enum Said {
    #[default]
    Nothing,
    /// It waits for a yes or no about a service that is in use.
    Asks { name: String, connections: u64 },
    /// In the bottom line until the next key.
    Told(String),
}

/// Bytes of each service by its name, to it and to clients.
type BytesOf = BTreeMap<String, (u64, u64)>;

/// Bytes in a second, to the service and to clients.
pub(super) type Rates = (u64, u64);

/// What is shown.
#[derive(Debug, Default)]
pub(super) struct View {
    pub rows: Vec<Row>,
    /// An answer has come.
    pub known: bool,
    /// Why no more answers come.
    pub lost: Option<String>,
    rates: BTreeMap<String, Rates>,
    /// The bytes at the last look, and when that was.
    before: Option<(Instant, BytesOf)>,
    /// The name of the chosen service.
    chosen: Option<String>,
    pub said: Said,
    /// What is under way.
    pub underway: Vec<Doing>,
}

impl View {
    /// The row of the chosen service.
    pub fn place(&self) -> Option<usize> {
        self.rows.iter().position(|row| Some(&row.name) == self.chosen.as_ref())
    }

    pub fn chosen(&self) -> Option<&Row> {
        self.rows.get(self.place()?)
    }

    pub fn rates(&self, name: &str) -> Option<Rates> {
        self.rates.get(name).copied()
    }

    /// Takes over the services of that moment.
    pub fn services(&mut self, rows: anyhow::Result<Vec<Row>>, at: Instant) {
        let rows = match rows {
            Ok(rows) => rows,
            Err(error) => {
                self.lost = Some(crate::exit::sentence(&error));
                return self.rates.clear();
            }
        };
        (self.lost, self.known) = (None, true);
        let bytes: BytesOf = rows.iter().map(|row| (row.name.clone(), row.bytes)).collect();
        self.rates.clear();
        if let Some((then, before)) = &self.before {
            let span = at.saturating_duration_since(*then);
            for (name, now) in &bytes {
                if let Some(rates) = before.get(name).and_then(|before| rates(*before, *now, span)) {
                    self.rates.insert(name.clone(), rates);
                }
            }
        }
        self.before = Some((at, bytes));
        let place = self.place().unwrap_or(0);
        self.rows = rows;
        if self.place().is_none() {
            // The chosen one is gone, or none was: the one in its place.
            self.choose(place);
        }
    }

    fn choose(&mut self, place: usize) {
        let last = self.rows.len().saturating_sub(1);
        self.chosen = self.rows.get(place.min(last)).map(|row| row.name.clone());
    }

    /// The outcome of what was begun.
    pub fn done(&mut self, doing: &Doing, outcome: anyhow::Result<String>) {
        self.underway.retain(|other| other != doing);
        let name = &doing.name;
        let told = match outcome {
            Ok(message) => format!("{name}: {message}"),
            Err(error) => crate::exit::sentence(&error),
        };
        self.tell(told);
    }

    fn tell(&mut self, text: String) {
        // A question stays, whatever comes meanwhile.
        if !matches!(self.said, Said::Asks { .. }) {
            self.said = Said::Told(on_one_line(&text));
        }
    }

    pub fn key(&mut self, key: KeyEvent) -> Next {
        if key.kind == KeyEventKind::Release {
            return Next::Nothing;
        }
        if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
            return Next::Quit;
        }
        if let Said::Asks { name, .. } = std::mem::take(&mut self.said) {
            if matches!(key.code, KeyCode::Char('y' | 'Y')) {
                return self.begin(Doing { name, what: What::Sleep { force: true } });
            }
            self.tell(format!("{name}: left as it is"));
            return Next::Nothing;
        }
        let place = self.place().unwrap_or(0);
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Next::Quit,
            KeyCode::Up | KeyCode::Char('k') => self.choose(place.saturating_sub(1)),
            KeyCode::Down | KeyCode::Char('j') => self.choose(place.saturating_add(1)),
            KeyCode::PageUp => self.choose(place.saturating_sub(10)),
            KeyCode::PageDown => self.choose(place.saturating_add(10)),
            KeyCode::Home => self.choose(0),
            KeyCode::End => self.choose(usize::MAX),
            KeyCode::Char('w') => return self.wake(),
            KeyCode::Char('s') => return self.sleep(),
            _ => {}
        }
        Next::Nothing
    }

    fn wake(&mut self) -> Next {
        match self.chosen() {
            Some(row) => {
                let name = row.name.clone();
                self.begin(Doing { name, what: What::Wake })
            }
            None => Next::Nothing,
        }
    }

    fn sleep(&mut self) -> Next {
        let Some(row) = self.chosen() else { return Next::Nothing };
        let name = row.name.clone();
        if row.connections > 0 {
            self.said = Said::Asks { name, connections: row.connections };
            return Next::Nothing;
        }
        self.begin(Doing { name, what: What::Sleep { force: false } })
    }

    fn begin(&mut self, doing: Doing) -> Next {
        if self.underway.iter().any(|other| other.name == doing.name) {
            self.tell(format!("{}: something is being done about it already", doing.name));
            return Next::Nothing;
        }
        let verb = if doing.what == What::Wake { "waking it" } else { "putting it to sleep" };
        self.tell(format!("{}: {verb} …", doing.name));
        self.underway.push(doing.clone());
        Next::Do(doing)
    }
}

/// `None` where a number has become smaller: its count has begun anew.
fn rates(before: (u64, u64), now: (u64, u64), span: Duration) -> Option<Rates> {
    let ms = u64::try_from(span.as_millis()).ok().filter(|ms| *ms > 0)?;
    let rate = |before: u64, now: u64| now.checked_sub(before).map(|more| more.saturating_mul(1000) / ms);
    Some((rate(before.0, now.0)?, rate(before.1, now.1)?))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn row(name: &str, state: ServiceState, connections: u64, bytes: (u64, u64)) -> Row {
        let (relay, sentence) = ("splice".into(), format!("{name}: {}; at 127.0.0.1:8080", state.word()));
        Row { name: name.into(), state, since: None, connections, held: 0, relay, bytes, sentence }
    }

    fn press(view: &mut View, key: KeyCode) -> Next {
        view.key(KeyEvent::new(key, KeyModifiers::NONE))
    }

    fn two() -> View {
        let mut view = View::default();
        let rows = vec![
            row("db", ServiceState::Asleep, 0, (0, 0)),
            row("web", ServiceState::Awake, 2, (1000, 5000)),
        ];
        view.services(Ok(rows), Instant::now());
        view
    }

    #[test]
    fn rates_are_of_the_time_between_two_looks() {
        let (mut view, start) = (View::default(), Instant::now());
        let rows = |bytes| Ok(vec![row("web", ServiceState::Awake, 1, bytes)]);
        view.services(rows((1000, 5000)), start);
        assert_eq!(view.rates("web"), None, "of one look there is no rate");
        view.services(rows((2000, 9000)), start + Duration::from_secs(2));
        assert_eq!(view.rates("web"), Some((500, 2000)));
        // It counts anew.
        view.services(rows((10, 20)), start + Duration::from_secs(3));
        assert_eq!(view.rates("web"), None);
        view.services(Err(anyhow::anyhow!("no bus")), start + Duration::from_secs(4));
        assert_eq!((view.rows.len(), view.lost.as_deref()), (1, Some("no bus")));
        view.services(rows((10, 520)), start + Duration::from_secs(5));
        assert_eq!((view.rates("web"), &view.lost), (Some((0, 250)), &None));
    }

    #[test]
    fn the_chosen_one_stays_chosen_and_is_never_beyond_the_last() {
        let mut view = two();
        assert_eq!(view.chosen().unwrap().name, "db");
        for _ in 0..3 {
            assert_eq!(press(&mut view, KeyCode::Down), Next::Nothing);
        }
        assert_eq!(view.chosen().unwrap().name, "web");
        let rows = ["a", "db", "web", "z"].map(|name| row(name, ServiceState::Asleep, 0, (0, 0)));
        view.services(Ok(rows.into()), Instant::now());
        assert_eq!((view.chosen().unwrap().name.as_str(), view.place()), ("web", Some(2)));
        view.services(Ok(vec![row("a", ServiceState::Asleep, 0, (0, 0))]), Instant::now());
        assert_eq!(view.chosen().unwrap().name, "a");
        view.services(Ok(Vec::new()), Instant::now());
        assert_eq!(view.chosen(), None);
        for key in ['w', 's', 'j', 'k'] {
            assert_eq!(press(&mut view, KeyCode::Char(key)), Next::Nothing);
        }
    }

    #[test]
    fn one_in_use_is_put_to_sleep_only_after_a_yes() {
        let mut view = two();
        press(&mut view, KeyCode::End);
        assert_eq!(press(&mut view, KeyCode::Char('s')), Next::Nothing);
        assert_eq!(view.said, Said::Asks { name: "web".into(), connections: 2 });
        // Another outcome does not remove the question.
        view.done(&Doing { name: "db".into(), what: What::Wake }, Ok("awake".into()));
        assert_eq!(press(&mut view, KeyCode::Enter), Next::Nothing, "no is what is not yes");
        assert_eq!(press(&mut view, KeyCode::Char('y')), Next::Nothing, "nothing is asked any more");
        press(&mut view, KeyCode::Char('s'));
        let doing = Doing { name: "web".into(), what: What::Sleep { force: true } };
        assert_eq!(press(&mut view, KeyCode::Char('y')), Next::Do(doing.clone()));
        // Only one at a time.
        assert_eq!(press(&mut view, KeyCode::Char('w')), Next::Nothing);
        view.done(&doing, Err(anyhow::anyhow!("no\u{1b}[2J")));
        assert_eq!(view.said, Said::Told("no\\u{1b}[2J".into()));
        assert!(matches!(press(&mut view, KeyCode::Char('w')), Next::Do(_)));
    }

    #[test]
    fn one_without_clients_is_put_to_sleep_at_once_and_not_by_force() {
        let mut view = two();
        let doing = Doing { name: "db".into(), what: What::Sleep { force: false } };
        assert_eq!(press(&mut view, KeyCode::Char('s')), Next::Do(doing));
    }

    #[test]
    fn ends_by_q_escape_and_control_c_also_in_a_question() {
        let mut view = two();
        assert_eq!(press(&mut view, KeyCode::Char('q')), Next::Quit);
        assert_eq!(press(&mut view, KeyCode::Esc), Next::Quit);
        press(&mut view, KeyCode::End);
        press(&mut view, KeyCode::Char('s'));
        assert_eq!(view.key(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)), Next::Quit);
    }
}
