//! Draws what `top` shows. Only rows in sight are made, however many there are.

use std::time::Instant;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Clear, Paragraph, Row, Sparkline, Table};

use super::board::{BackendLine, Closeup, ServiceLine};
use super::column::{Column, OF_BACKENDS, OF_SERVICES, fitting};
use super::history::History;
use super::reading::{BackendState, ServiceReading, word};
use super::{Link, Top, plain};
use crate::summary::ServiceState;

/// From this height on there is room for a graph.
const HEIGHT_WITH_GRAPH: u16 = 20;
const GRAPH_HEIGHT: u16 = 4;
/// Listeners of a Service that are told one by one.
const LISTENERS_SHOWN: usize = 4;

/// What each key does.
const KEYS: [(&str, &str); 13] = [
    ("q, Ctrl-C", "quit"),
    ("Esc", "back; without a filter; quit"),
    ("↑ ↓, k j", "move"),
    ("PgUp PgDn", "a page"),
    ("Home End, g G", "first, last"),
    ("Enter", "the backends of a Service"),
    ("/", "filter: words of name, type, state, address"),
    ("s S", "next, previous order"),
    ("r", "the other way around"),
    ("p, space", "pause"),
    ("Ctrl-Z", "the shell; fg comes back"),
    ("?", "this help"),
    ("NO_COLOR=1", "in the environment: no colours"),
];

/// Draws one picture, and tells how many rows of the list were in sight: what a page is.
pub(super) fn draw(frame: &mut Frame<'_>, top: &mut Top, now: Instant) -> usize {
    let area = frame.area();
    let news = news(top, now);
    let graph = if area.height >= HEIGHT_WITH_GRAPH { GRAPH_HEIGHT } else { 0 };
    let [head, notice, chart, body, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(u16::from(news.is_some())),
        Constraint::Length(graph),
        Constraint::Fill(1),
        Constraint::Length(1),
    ])
    .areas(area);
    let sums = Span::styled(plain::sums(top), Modifier::BOLD);
    frame.render_widget(Line::from(vec![sums, Span::styled(plain::upgrade(top), Modifier::DIM)]), head);
    if let Some(news) = news {
        frame.render_widget(news, notice);
    }
    let page = match top.view.service.clone() {
        None => {
            draw_graph(frame, &top.board.history, chart);
            draw_services(frame, top, body)
        }
        Some(name) => draw_service(frame, top, &name, [chart, body]),
    };
    frame.render_widget(footer(top), foot);
    if top.view.help {
        draw_help(frame, area);
    }
    page
}

/// What a reader has to know before all numbers.
fn news(top: &Top, now: Instant) -> Option<Line<'static>> {
    let bad = Style::new().fg(Color::Red).add_modifier(Modifier::BOLD);
    match &top.link {
        Link::Waiting => Some(Line::raw("asking…")),
        Link::Away { since, why } => {
            let seconds = now.saturating_duration_since(*since).as_secs();
            let old = if top.board.at.is_some() { ", these are old" } else { "" };
            Some(Line::styled(format!("no answer for {seconds} s{old}: {why}"), bad))
        }
        Link::Up if top.view.paused => Some(Line::styled("paused: p goes on", Color::Yellow)),
        Link::Up if !top.board.synced => Some(Line::styled("its source has not delivered its first state", bad)),
        Link::Up => match top.board.problem_count {
            0 => None,
            1 => Some(Line::styled("1 problem: `kube-relay status` tells it", Color::Yellow)),
            count => Some(Line::styled(format!("{count} problems: `kube-relay status` tells them"), Color::Yellow)),
        },
    }
}

fn draw_graph(frame: &mut Frame<'_>, history: &History, area: Rect) {
    if area.is_empty() {
        return;
    }
    let points: Vec<u64> = history.points().rev().take(area.width.into()).collect();
    let highest = points.iter().max().copied().unwrap_or_default();
    let title = format!("new a second, up to {highest}");
    let block = Block::new().title(Span::styled(title, Modifier::DIM));
    // The newest at the right, and what came before to the left of it.
    let room = usize::from(area.width) - points.len();
    let points = std::iter::repeat_n(0, room).chain(points.into_iter().rev());
    frame.render_widget(Sparkline::default().block(block).data(points).style(Color::Green), area);
}

fn draw_services(frame: &mut Frame<'_>, top: &mut Top, area: Rect) -> usize {
    let page = usize::from(area.height.saturating_sub(1)); // Below the header.
    let first = top.view.services.scroll(page, top.services.len());
    let places = top.services.iter().skip(first).take(page);
    let rows: Vec<_> = places.filter_map(|place| top.board.services.get(*place)).collect();
    let cursor = top.view.services.row - first;
    draw_table(frame, OF_SERVICES, &rows, cursor, |service| of_service(service.reading.state), area);
    page
}

fn draw_service(frame: &mut Frame<'_>, top: &mut Top, name: &str, [chart, area]: [Rect; 2]) -> usize {
    let service = top.board.services.iter().find(|service| service.reading.name == name);
    let closeup = match top.closeup() {
        Some(closeup) if closeup.is_there => closeup,
        Some(_) => {
            frame.render_widget(Paragraph::new(format!("{name}: there is no such Service (Esc: back)")), area);
            return 0;
        }
        None => {
            frame.render_widget(Paragraph::new(format!("{name}: asking… (Esc: back)")), area);
            return 0;
        }
    };
    if let Some(service) = service {
        draw_graph(frame, &service.history, chart);
    }
    let about = about(closeup, service);
    let [above, list, below] = Layout::vertical([
        Constraint::Length(u16::try_from(about.len()).unwrap_or(u16::MAX).min(area.height / 3)),
        Constraint::Fill(1),
        Constraint::Length(u16::from(area.height > 4)),
    ])
    .areas(area);
    frame.render_widget(Paragraph::new(about), above);
    let page = usize::from(list.height.saturating_sub(1));
    let mut cursor = top.view.backends.clone();
    let first = cursor.scroll(page, closeup.backends.len());
    let rows: Vec<_> = closeup.backends.iter().skip(first).take(page).collect();
    draw_table(frame, OF_BACKENDS, &rows, cursor.row - first, |backend| of_backend(backend.reading.state), list);
    if let Some(backend) = closeup.backends.get(cursor.row) {
        frame.render_widget(Line::raw(in_full(backend)), below);
    }
    top.view.backends = cursor;
    page
}

/// What a Service is and where it listens. The line about it comes with another answer: it may not be there yet.
fn about<'a>(closeup: &'a Closeup, service: Option<&'a ServiceLine>) -> Vec<Line<'a>> {
    let mut title = vec![Span::styled(closeup.name.as_str(), Modifier::BOLD)];
    if let Some(ServiceLine { reading: ServiceReading { kind, state, .. }, .. }) = service {
        title.extend([Span::raw(format!("  {kind}  ")), Span::styled(word(*state), of_service(*state))]);
    }
    let mut lines = vec![Line::from(title)];
    lines.extend(closeup.listeners.iter().take(LISTENERS_SHOWN).map(|listener| Line::raw(format!("  {listener}"))));
    let more = closeup.listeners.len().saturating_sub(LISTENERS_SHOWN);
    if more > 0 {
        lines.push(Line::raw(format!("  and {more} more")));
    }
    lines
}

/// What a row has no room for.
fn in_full(backend: &BackendLine) -> String {
    let reading = &backend.reading;
    let or_none = |text: &str| if text.is_empty() { "none".to_owned() } else { text.to_owned() };
    format!("{}: failed tries: {}; ended: {}", reading.address, or_none(&reading.failures), or_none(&reading.ends))
}

fn draw_table<T>(
    frame: &mut Frame<'_>,
    columns: &'static [Column<T>],
    rows: &[&T],
    cursor: usize,
    style: fn(&T) -> Style,
    area: Rect,
) {
    let columns = fitting(columns, area.width);
    let header = columns.iter().map(|column| cell(column, column.title.to_owned()));
    let header = Row::new(header.collect::<Vec<_>>()).style(Modifier::UNDERLINED);
    let rows = rows.iter().enumerate().map(|(number, row)| {
        let cells = columns.iter().map(|column| cell(column, (column.text)(row)));
        let chosen = if number == cursor { Modifier::REVERSED } else { Modifier::empty() };
        Row::new(cells.collect::<Vec<_>>()).style(style(row).add_modifier(chosen))
    });
    let widths = columns.iter().map(|column| match column.rank {
        0 => Constraint::Fill(1),
        _ => Constraint::Length(column.width),
    });
    frame.render_widget(Table::new(rows, widths).header(header).column_spacing(1), area);
}

fn cell<T>(column: &Column<T>, text: String) -> Cell<'static> {
    let line = Line::raw(text);
    Cell::new(if column.at_right { line.right_aligned() } else { line })
}

fn of_service(state: ServiceState) -> Style {
    match state {
        ServiceState::Failed => Style::new().fg(Color::Red),
        ServiceState::Refusing | ServiceState::Closed => Style::new().fg(Color::Yellow),
        ServiceState::Serving => Style::new(),
        ServiceState::Unserved => Style::new().add_modifier(Modifier::DIM),
    }
}

fn of_backend(state: BackendState) -> Style {
    match state {
        BackendState::Ready => Style::new(),
        BackendState::Draining => Style::new().add_modifier(Modifier::DIM),
        BackendState::Ejected => Style::new().fg(Color::Red),
    }
}

/// The keys, the most needed first: a narrow terminal shows as many as it can.
fn footer(top: &Top) -> Line<'static> {
    let view = &top.view;
    if view.typing {
        return Line::raw(format!("filter: {}▏  Enter keep  Esc all", view.filter));
    }
    let around = if view.reversed { " reversed" } else { "" };
    let filter = if view.filter.is_empty() { "filter".to_owned() } else { format!("filter: {}", view.filter) };
    let keys = match view.service {
        Some(_) => vec![("q", "quit".into()), ("?", "help".into()), ("Esc", "back".into()), ("p", "pause".into())],
        None => vec![
            ("q", "quit".to_owned()),
            ("?", "help".into()),
            ("Enter", "open".into()),
            ("/", filter),
            ("s", format!("sort: {}{around}", view.sort.as_str())),
            ("r", "reverse".into()),
            ("p", "pause".into()),
        ],
    };
    let spans = keys
        .into_iter()
        .flat_map(|(key, what)| [Span::styled(key, Modifier::BOLD), Span::styled(format!(" {what}  "), Modifier::DIM)]);
    spans.collect()
}

fn draw_help(frame: &mut Frame<'_>, area: Rect) {
    let lines: Vec<_> = KEYS.iter().map(|(key, what)| Line::raw(format!(" {key:<14} {what}"))).collect();
    let (width, height) = (62_u16.min(area.width), (KEYS.len() as u16 + 2).min(area.height));
    let place = area.centered(Constraint::Length(width), Constraint::Length(height));
    frame.render_widget(Clear, place);
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" Keys ")), place);
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::{Duration, UNIX_EPOCH};

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::buffer::Buffer;

    use super::*;
    use crate::live::sample;
    use crate::name::ObjectName;
    use crate::status::UpgradeStatus;
    use crate::summary::{self, Summary};
    use crate::top::order::Sort;
    use crate::top::reading::{CloseReading, Counts, Reading};
    use crate::top::view::Key;
    use crate::top::{DEFAULT_INTERVAL, TopOptions};

    fn top() -> Top {
        let server = SocketAddr::from(([127, 0, 0, 1], 10249));
        let (sort, filter, service) = (Sort::Name, String::new(), None);
        Top::new(&TopOptions { server, interval: DEFAULT_INTERVAL, sort, filter, service })
    }

    fn sampled() -> Top {
        let mut top = top();
        top.hear(Reading::of(Summary::of(&sample::status(), UNIX_EPOCH)), Instant::now());
        top
    }

    /// Has it asked for the Service that it wants, if any.
    fn look_closely(top: &mut Top) {
        let Some(name) = top.wanted() else { return };
        let closeup = summary::Closeup::of(&sample::status(), &name, UNIX_EPOCH);
        top.hear_closely(&name, closeup.as_ref().map(CloseReading::of), Instant::now());
    }

    fn picture(top: &mut Top, width: u16, height: u16) -> Buffer {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a picture in memory");
        let now = Instant::now();
        let draw = |frame: &mut Frame<'_>| {
            draw(frame, top, now);
        };
        terminal.draw(draw).expect("a picture in memory").buffer.clone()
    }

    fn lines(top: &mut Top, width: u16, height: u16) -> Vec<String> {
        let buffer = picture(top, width, height);
        let line = |row: u16| (0..width).map(|column| buffer[(column, row)].symbol()).collect::<String>();
        (0..height).map(|row| line(row).trim_end().to_owned()).collect()
    }

    #[test]
    fn given_services_when_drawn_then_each_has_a_row_and_the_keys_are_below() {
        let lines = lines(&mut sampled(), 100, 12);

        assert!(lines[0].starts_with("kube-relay 0.1.0 (pid "), "{lines:#?}");
        assert_eq!(lines[1], "1 problem: `kube-relay status` tells it");
        assert!(lines[2].starts_with("SERVICE ") && lines[2].contains("  NEW/S  FAIL/S"), "{lines:#?}");
        assert!(lines[3].starts_with("default/dns ") && lines[3].contains(" refusing "), "{lines:#?}");
        assert!(lines[5].starts_with("default/web ") && lines[5].contains(" failed "), "{lines:#?}");
        assert!(lines[11].starts_with("q quit  ? help  Enter open  / filter  s sort: name  r reverse"), "{lines:#?}");
    }

    #[test]
    fn t234_given_a_relay_that_was_upgraded_when_drawn_then_that_is_said_where_there_is_room() {
        let mut summary = Summary::of(&sample::status(), UNIX_EPOCH);
        let (at, standstill_ms) = ("2026-01-02T03:04:05Z".into(), 7);
        summary.upgrade = Some(UpgradeStatus { at, standstill_ms, ..UpgradeStatus::default() });
        summary.upgrade_failure = None; // Other tests fail to upgrade this process.
        let mut top = top();
        top.hear(Reading::of(summary), Instant::now());

        let [wide, narrow] = [200, 60].map(|width| lines(&mut top, width, 12));

        assert!(wide[0].ends_with(" down, upgraded 2026-01-02T03:04:05Z, stood still 7 ms"), "{wide:#?}");
        assert!(narrow[0].starts_with("kube-relay 0.1.0 (pid ") && !narrow[0].contains("upgraded"), "{narrow:#?}");
    }

    #[test]
    fn given_one_service_when_drawn_then_its_listeners_and_backends_are_there() {
        let mut top = sampled();
        top.press(Key::End, 10);
        top.press(Key::Enter, 10);
        assert!(lines(&mut top, 100, 24).join("\n").contains("default/web: asking"));
        look_closely(&mut top);

        let all = lines(&mut top, 100, 24).join("\n");

        for part in
            ["default/web  NodePort  failed", "127.96.0.10:80/TCP clusterIP serving", "10.244.0.2:8000", "web-1"]
        {
            assert!(all.contains(part), "{part}: {all}");
        }
        assert!(all.contains("10.244.0.2:8000: failed tries: none; ended: finished 1"), "{all}");
        top.view.service = Some("default/nobody".into());
        look_closely(&mut top);
        assert!(self::lines(&mut top, 100, 24).join("\n").contains("default/nobody: there is no such Service"));
    }

    #[test]
    fn given_a_narrow_terminal_when_drawn_then_what_matters_is_there() {
        let lines = lines(&mut sampled(), 40, 10);

        assert_eq!(lines[2], "SERVICE                 STATE      NEW/S");
        assert!(lines[5].starts_with("default/web") && lines[5].contains("failed"), "{lines:#?}");
        assert!(lines[9].starts_with("q quit  ? help"), "{lines:#?}");
    }

    #[test]
    fn given_any_size_when_drawn_then_nothing_panics() {
        for (width, height) in [(0, 0), (1, 0), (0, 1), (1, 1), (2, 3), (40, 4), (5, 60), (1_000, 300), (80, 21)] {
            let mut top = sampled();
            for key in
                [Key::Char('?'), Key::Char('x'), Key::Char('/'), Key::Char('w'), Key::Enter, Key::End, Key::Enter]
            {
                let page = usize::from(height);
                top.press(key, page);
                picture(&mut top, width, height);
                look_closely(&mut top);
                picture(&mut top, width, height);
            }
        }
    }

    #[test]
    fn given_ten_thousand_services_when_drawn_then_the_cursor_is_in_sight_and_no_other_rows_are_made() {
        let mut top = top();
        let service =
            |number: u32| ServiceReading { name: format!("shop/web-{number:05}"), ..ServiceReading::default() };
        let services = (0..10_000).map(service).collect();
        top.hear(Reading { services, synced: true, ..Reading::default() }, Instant::now());

        top.press(Key::End, 10);
        let lines = lines(&mut top, 80, 12);

        assert!(lines[10].starts_with("shop/web-09999"), "{lines:#?}");
        assert!(lines[2].starts_with("shop/web-09991"), "{lines:#?}");
    }

    #[test]
    fn given_names_that_steer_terminals_when_drawn_then_no_control_character_is_in_any_cell() {
        let mut summary = Summary::of(&sample::status(), UNIX_EPOCH);
        summary.services[2].name = "web\u{1b}[2J\u{7}\r\n\u{9b}31m".into();
        let mut top = top();
        top.hear(Reading::of(summary), Instant::now());
        top.miss("\u{1b}]0;x\u{7}".into(), Instant::now());

        let buffer = picture(&mut top, 120, 12);

        let all: String = buffer.content().iter().map(|cell| cell.symbol()).collect();
        assert!(!all.chars().any(char::is_control), "{all:?}");
        assert!(all.contains("default/web\u{fffd}[2J"), "{all:?}");
        top.press(Key::End, 10);
        top.press(Key::Enter, 10);
        top.hear_closely(&ObjectName::parse("default/web\u{fffd}[2J"), None, Instant::now());
        let all: String = picture(&mut top, 120, 12).content().iter().map(|cell| cell.symbol()).collect();
        assert!(!all.chars().any(char::is_control), "{all:?}");
    }

    #[test]
    fn given_a_relay_that_is_away_when_drawn_then_it_says_since_when_and_the_numbers_stay() {
        let mut top = sampled();
        let since = Instant::now().checked_sub(Duration::from_secs(75)).expect("the machine runs for longer");
        top.miss("nothing answers".into(), since);

        let lines = lines(&mut top, 100, 12);

        assert!(lines[1].starts_with("no answer for 75 s, these are old: nothing answers"), "{lines:#?}");
        assert!(lines[5].starts_with("default/web "), "{lines:#?}");
    }

    #[test]
    fn given_a_relay_that_never_answered_when_drawn_then_no_number_is_made_up() {
        let mut top = top();
        top.miss("nothing answers".into(), Instant::now());

        let lines = lines(&mut top, 100, 12);

        assert_eq!(lines[..2], ["kube-relay at 127.0.0.1:10249", "no answer for 0 s: nothing answers"]);
    }

    #[test]
    fn given_rates_when_drawn_on_a_tall_terminal_then_the_newest_bar_is_at_the_right() {
        let mut top = top();
        let start = Instant::now();
        for (second, begun) in [(0, 0), (1, 8), (2, 24)] {
            let counts = Counts { begun, ..Counts::default() };
            let service = ServiceReading { name: "default/web".into(), counts, ..Default::default() };
            let reading = Reading { services: vec![service], synced: true, ..Reading::default() };
            top.hear(reading, start + Duration::from_secs(second));
        }

        let lines = lines(&mut top, 120, 24);

        assert_eq!(lines[1], "new a second, up to 16");
        assert!(lines[4].ends_with("██"), "{lines:#?}");
        assert!(lines[6].contains("▅█"), "{lines:#?}");
    }
}
