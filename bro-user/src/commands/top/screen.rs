//! How the list is drawn.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Paragraph, Row as Cells, Table, TableState, Wrap};

use super::view::{Row, Said, View};
use crate::commands::status::ServiceState;
use crate::commands::status::list::age;
use crate::systemd::time_span::roughly;

/// The columns beside the name, which gets the rest, and their widths: 80 columns leave 18 for the name.
const COLUMNS: [(&str, u16); 7] =
    [("STATE", 14), ("SINCE", 9), ("CONN", 5), ("HELD", 4), ("IN/s", 8), ("OUT/s", 8), ("RELAY", 7)];

const KEYS: &str = "↑↓ choose   w wake   s sleep   q quit";

pub(super) fn draw(frame: &mut Frame<'_>, view: &mut View) {
    let rows = [
        Constraint::Length(1),
        Constraint::Min(2),
        Constraint::Length(2),
        Constraint::Length(1),
        Constraint::Length(1),
    ];
    let [title, table, detail, said, keys] = Layout::vertical(rows).areas(frame.area());
    frame.render_widget(Line::styled(heading(view), Modifier::BOLD), title);
    services(frame, table, view);
    let sentence = view.chosen().map_or("", |row| row.sentence.as_str());
    frame.render_widget(Paragraph::new(sentence).wrap(Wrap { trim: true }), detail);
    frame.render_widget(bottom(view), said);
    frame.render_widget(Line::styled(KEYS, Modifier::DIM), keys);
}

fn heading(view: &View) -> String {
    if !view.known {
        return "bro: looking …".into();
    }
    let count = |number: usize, word: &str| format!("{number} {word}{}", if number == 1 { "" } else { "s" });
    let awake =
        view.rows.iter().filter(|row| matches!(row.state, ServiceState::Awake | ServiceState::Busy)).count();
    let connections: u64 = view.rows.iter().map(|row| row.connections).sum();
    let connections = usize::try_from(connections).unwrap_or(usize::MAX);
    format!("bro: {}, {awake} awake, {}", count(view.rows.len(), "service"), count(connections, "connection"))
}

fn services(frame: &mut Frame<'_>, area: Rect, view: &View) {
    if view.known && view.rows.is_empty() {
        let none = "Nothing is activated, and no forwarder of this user is running.";
        return frame.render_widget(Paragraph::new(none).wrap(Wrap { trim: true }), area);
    }
    let names = std::iter::once("NAME").chain(COLUMNS.iter().map(|(name, _)| *name));
    let header = Cells::new(names.map(Cell::from)).style(Modifier::REVERSED);
    let widths = std::iter::once(Constraint::Min(8))
        .chain(COLUMNS.iter().map(|(_, width)| Constraint::Length(*width)));
    let table = Table::new(view.rows.iter().map(|row| cells(view, row)), widths)
        .header(header)
        .column_spacing(1)
        .row_highlight_style(Style::new().bg(Color::DarkGray).add_modifier(Modifier::BOLD));
    let mut state = TableState::new().with_selected(view.place());
    frame.render_stateful_widget(table, area, &mut state);
}

fn cells<'a>(view: &View, row: &'a Row) -> Cells<'a> {
    let color = match row.state {
        ServiceState::Asleep => Color::Reset,
        ServiceState::Awake | ServiceState::Busy => Color::Green,
        ServiceState::Frozen => Color::Cyan,
        ServiceState::Starting | ServiceState::Stopping => Color::Yellow,
        ServiceState::Deaf | ServiceState::Failed => Color::Red,
    };
    let rates = view.rates(&row.name);
    let rate = |rate: Option<u64>| Cell::from(rate.map_or_else(String::new, bytes));
    Cells::new([
        Cell::from(row.name.as_str()),
        Cell::from(row.state.word()).style(color),
        Cell::from(age(row.since).map(roughly).unwrap_or_default()),
        Cell::from(row.connections.to_string()),
        Cell::from(row.held.to_string()),
        rate(rates.map(|(to_service, _)| to_service)),
        rate(rates.map(|(_, to_clients)| to_clients)),
        Cell::from(row.relay.as_str()),
    ])
}

fn bottom(view: &View) -> Line<'_> {
    match (&view.said, &view.lost) {
        (Said::Asks { name, connections }, _) => {
            let plural = if *connections == 1 { "" } else { "s" };
            let question =
                format!("{name} has {connections} connection{plural}, to be reset. Put it to sleep? (y/n)");
            Line::styled(question, Style::new().fg(Color::Yellow).add_modifier(Modifier::BOLD))
        }
        (_, Some(lost)) => Line::styled(format!("not up to date: {lost}"), Color::Red),
        (Said::Told(text), None) => Line::raw(text.as_str()),
        (Said::Nothing, None) => Line::default(),
    }
}

/// In the unit that leaves at most three digits before the point.
fn bytes(number: u64) -> String {
    const UNITS: [(u64, &str); 4] =
        [(1_000_000_000_000, "TB"), (1_000_000_000, "GB"), (1_000_000, "MB"), (1000, "kB")];
    match UNITS.iter().find(|(size, _)| number >= *size) {
        Some((size, unit)) => format!("{}.{} {unit}", number / size, number % size * 10 / size),
        None => format!("{number} B"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::view::tests::row;
    use super::*;

    /// The lines of the screen.
    fn shown(view: &mut View, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, view)).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
        (0..height).map(line).collect()
    }

    fn two() -> View {
        let (mut view, start) = (View::default(), Instant::now());
        let rows = |bytes| {
            Ok(vec![row("db", ServiceState::Asleep, 0, (0, 0)), row("web", ServiceState::Awake, 2, bytes)])
        };
        view.services(rows((1000, 5000)), start);
        view.services(rows((1500, 1_505_000)), start + Duration::from_secs(1));
        view
    }

    #[test]
    fn an_ordinary_terminal_shows_everything() {
        let lines = shown(&mut two(), 80, 24);
        assert_eq!(lines[0], "bro: 2 services, 1 awake, 2 connections");
        assert_eq!(
            lines[1],
            "NAME               STATE          SINCE     CONN  HELD IN/s     OUT/s    RELAY"
        );
        assert_eq!(
            lines[2],
            "db                 asleep                   0     0    0 B      0 B      splice"
        );
        assert_eq!(
            lines[3],
            "web                awake                    2     0    500 B    1.5 MB   splice"
        );
        assert_eq!(lines[20], "db: asleep; at 127.0.0.1:8080");
        assert_eq!(lines[23], KEYS);
    }

    #[test]
    fn asks_in_the_line_above_the_keys() {
        let mut view = two();
        for key in [KeyCode::Down, KeyCode::Char('s')] {
            let _next = view.key(KeyEvent::new(key, KeyModifiers::NONE));
        }
        let lines = shown(&mut view, 80, 24);
        assert_eq!(lines[22], "web has 2 connections, to be reset. Put it to sleep? (y/n)");
    }

    #[test]
    fn the_chosen_one_is_seen_however_many_there_are() {
        let mut view = View::default();
        let rows =
            (0..100).map(|number| row(&format!("s{number:02}"), ServiceState::Asleep, 0, (0, 0))).collect();
        view.services(Ok(rows), Instant::now());
        let _next = view.key(KeyEvent::new(KeyCode::End, KeyModifiers::NONE));
        assert!(shown(&mut view, 80, 24).iter().any(|line| line.starts_with("s99 ")));
    }

    #[test]
    fn no_size_is_too_small() {
        for (width, height) in [(1, 1), (10, 3), (40, 6), (79, 5), (300, 100)] {
            shown(&mut two(), width, height);
            shown(&mut View::default(), width, height);
        }
    }

    #[test]
    fn says_that_there_is_nothing_and_what_is_lost() {
        let mut view = View::default();
        assert_eq!(shown(&mut view, 80, 24)[0], "bro: looking …");
        view.services(Ok(Vec::new()), Instant::now());
        assert!(shown(&mut view, 80, 24)[1].starts_with("Nothing is activated"));
        view.services(Err(anyhow::anyhow!("no bus")), Instant::now());
        assert_eq!(shown(&mut view, 80, 24)[22], "not up to date: no bus");
    }

    #[test]
    fn bytes_are_said_in_fitting_units() {
        for (number, said) in
            [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_999, "999.9 kB"), (2_500_000_000, "2.5 GB")]
        {
            assert_eq!(bytes(number), said);
        }
        assert!(bytes(u64::MAX).ends_with(" TB"));
    }
}
