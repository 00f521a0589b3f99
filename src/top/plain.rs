//! What `top --once` prints: the same rows as text, for scripts and for terminals that are none.

use std::borrow::Cow;

use super::Top;
use super::column::{Column, OF_BACKENDS, OF_SERVICES, byte_rate, rate, short};
use crate::overview::columns;

/// A line of sums, then the Services or the backends of the one that is looked at; `None` where that is not there.
pub fn text(top: &Top) -> Option<String> {
    let table = match &top.view.service {
        None => table(OF_SERVICES, top.services.iter().filter_map(|place| top.board.services.get(*place))),
        Some(_) => table(OF_BACKENDS, top.closeup().filter(|closeup| closeup.is_there)?.backends.iter()),
    };
    Some(format!("{}{}\n\n{table}", sums(top), upgrade(top)))
}

/// `kube-relay 0.1.0 (pid 7) at 127.0.0.1:10249: 3 Services, 12 open, 34 new/s, 0 failed/s, 1.2 MiB/s up, 3.4 MiB/s down`.
pub fn sums(top: &Top) -> String {
    let board = &top.board;
    if board.at.is_none() {
        return format!("kube-relay at {}", top.server);
    }
    let services = match board.services.len() {
        1 => "1 Service".to_owned(),
        count => format!("{count} Services"),
    };
    format!(
        "kube-relay {} (pid {}) at {}: {services}, {} open, {} new/s, {} failed/s, {}/s up, {}/s down",
        board.version,
        board.pid,
        top.server,
        short(board.open as f64),
        rate(&board.rates, |rates| rates.begun),
        rate(&board.rates, |rates| rates.failed),
        byte_rate(&board.rates, |rates| rates.upstream_bytes),
        byte_rate(&board.rates, |rates| rates.downstream_bytes),
    )
}

/// `, upgraded 2026-01-02T03:04:05Z, stood still 7 ms`, for the end of that line; or that the next upgrade has failed; empty
/// where there was none.
pub fn upgrade(top: &Top) -> String {
    match (top.board.upgrade.as_str(), top.board.upgrade_failure.as_str()) {
        ("", "") => String::new(),
        (upgrade, "") => format!(", {upgrade}"),
        (_, failure) => format!(", {failure}"),
    }
}

/// All columns but the graph.
fn table<'a, T: 'static>(of: &'static [Column<T>], rows: impl Iterator<Item = &'a T>) -> String {
    let of: Vec<_> = of.iter().filter(|column| column.title != "TREND").collect();
    let header: Vec<Cow<'static, str>> = of.iter().map(|column| Cow::Borrowed(column.title)).collect();
    let row = |row: &T| of.iter().map(|column| Cow::Owned((column.text)(row))).collect::<Vec<_>>();
    columns(&std::iter::once(header).chain(rows.map(row)).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::{Duration, Instant, UNIX_EPOCH};

    use super::*;
    use crate::live::sample;
    use crate::name::ObjectName;
    use crate::stats::Entry;
    use crate::status::Status;
    use crate::summary::{Closeup, Summary};
    use crate::top::order::Sort;
    use crate::top::reading::{CloseReading, Reading};
    use crate::top::{DEFAULT_INTERVAL, TopOptions};

    fn top(service: Option<&str>) -> Top {
        let options = TopOptions {
            server: SocketAddr::from(([127, 0, 0, 1], 10249)),
            interval: DEFAULT_INTERVAL,
            sort: Sort::Name,
            filter: String::new(),
            service: service.map(ObjectName::parse),
        };
        let (mut top, status, start) = (Top::new(&options), sample::status(), Instant::now());
        let read = |status: &Status| {
            let mut reading = Reading::of(Summary::of(status, UNIX_EPOCH));
            reading.pid = 7;
            reading.version = "1.2.3".into();
            reading.upgrade_failure.clear(); // Other tests fail to upgrade this process.
            reading
        };
        let hear = |top: &mut Top, at| {
            top.hear(read(&status), at);
            if let Some(name) = top.wanted() {
                let closeup = Closeup::of(&status, &name, UNIX_EPOCH);
                top.hear_closely(&name, closeup.as_ref().map(CloseReading::of), at);
            }
        };
        hear(&mut top, start);
        let web = &status.services[&ObjectName::parse("default/web")].ports[0];
        web.backends[0].stats.connections.add(Entry::ClusterIp, 20);
        web.backends[0].stats.downstream_bytes.add(Entry::ClusterIp, 4 << 20);
        web.backends[1].stats.connections.add(Entry::ClusterIp, 10);
        hear(&mut top, start + Duration::from_secs(2));
        top
    }

    #[test]
    fn given_two_readings_when_printed_then_each_service_has_a_line_with_rates() {
        insta::assert_snapshot!(text(&top(None)).expect("all Services"), @r"
        kube-relay 1.2.3 (pid 7) at 127.0.0.1:10249: 3 Services, 1 open, 15 new/s, 0 failed/s, 0 B/s up, 2.0 MiB/s down

        SERVICE            STATE      BACKENDS   ACTIVE   NEW/S   FAIL/S   UP/S   DOWN/S
        default/dns        refusing   0          0        0       0        0 B    0 B
        default/headless   -          0          0        0       0        0 B    0 B
        default/web        failed     2          1        15      0        0 B    2.0 MiB
        ");
    }

    #[test]
    fn given_one_service_when_printed_then_each_backend_has_a_line_with_its_share() {
        insta::assert_snapshot!(text(&top(Some("web"))).expect("web is there"), @r"
        kube-relay 1.2.3 (pid 7) at 127.0.0.1:10249: 3 Services, 1 open, 15 new/s, 0 failed/s, 0 B/s up, 2.0 MiB/s down

        BACKEND           PORT   POD     STATE   SHARE   ACTIVE   NEW/S   FAIL/S   UP/S   DOWN/S
        10.244.0.2:8000   http   web-1   ready   71.4%   1        10      0        0 B    2.0 MiB
        10.244.0.3:8000   http   -       ready   28.6%   0        5       0        0 B    0 B
        ");
    }

    #[test]
    fn t234_given_a_process_that_has_taken_over_when_printed_then_the_line_of_sums_ends_with_when() {
        let mut top = top(None);
        top.board.upgrade = "upgraded 2026-01-02T03:04:05Z, stood still 7 ms".into();

        let first = |top: &Top| text(top).expect("all Services").lines().next().map(str::to_owned).unwrap_or_default();

        let upgraded = first(&top);
        top.board.upgrade_failure = "upgrade failed 2026-01-02T04:00:00Z (timeout)".into();
        let failed = first(&top);

        assert!(upgraded.ends_with("2.0 MiB/s down, upgraded 2026-01-02T03:04:05Z, stood still 7 ms"), "{upgraded}");
        assert!(failed.ends_with("2.0 MiB/s down, upgrade failed 2026-01-02T04:00:00Z (timeout)"), "{failed}");
    }

    #[test]
    fn given_a_service_that_is_not_there_when_printed_then_there_is_no_text() {
        assert_eq!(text(&top(Some("nobody"))), None);
    }
}
