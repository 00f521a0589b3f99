//! What a row of `top` says: the columns of Services and of backends, and how numbers are written.

use super::board::{BackendLine, Rates, ServiceLine};
use super::reading::word;
use crate::overview::bytes;

/// Bars of the small graph in a row.
const TREND_WIDTH: usize = 20;

/// One column of a table whose rows are made of `T`.
#[derive(Debug)]
pub struct Column<T> {
    /// What is above it.
    pub title: &'static str,
    /// How many characters it needs; of the first, the fewest that are of use.
    pub width: u16,
    /// Where there is no room for all: the lower, the longer it stays. The first column always does.
    pub rank: u8,
    /// Numbers are easier to compare at the right.
    pub at_right: bool,
    /// What it says of a row.
    pub text: fn(&T) -> String,
}

const fn left<T>(title: &'static str, width: u16, rank: u8, text: fn(&T) -> String) -> Column<T> {
    Column { title, width, rank, at_right: false, text }
}

const fn right<T>(title: &'static str, width: u16, rank: u8, text: fn(&T) -> String) -> Column<T> {
    Column { title, width, rank, at_right: true, text }
}

/// Of a Service.
pub static OF_SERVICES: &[Column<ServiceLine>] = &[
    left("SERVICE", 16, 0, |service| service.reading.name.clone()),
    left("STATE", 8, 2, |service| word(service.reading.state).to_owned()),
    right("BACKENDS", 8, 6, |service| service.reading.ready.to_string()),
    right("ACTIVE", 7, 3, |service| short(service.reading.counts.open as f64)),
    right("NEW/S", 7, 1, |service| rate(&service.rates, |rates| rates.begun)),
    right("FAIL/S", 7, 4, |service| rate(&service.rates, |rates| rates.failed)),
    right("UP/S", 8, 7, |service| byte_rate(&service.rates, |rates| rates.upstream_bytes)),
    right("DOWN/S", 8, 5, |service| byte_rate(&service.rates, |rates| rates.downstream_bytes)),
    left("TREND", TREND_WIDTH as u16, 8, |service| service.history.bars(TREND_WIDTH)),
];

/// Of a backend.
pub static OF_BACKENDS: &[Column<BackendLine>] = &[
    left("BACKEND", 21, 0, |backend| backend.reading.address.clone()),
    left("PORT", 8, 9, |backend| backend.reading.port.clone()),
    left("POD", 16, 8, |backend| or_dash(&backend.reading.pod)),
    left("STATE", 8, 2, |backend| backend.reading.state.as_str().to_owned()),
    right("SHARE", 6, 4, |backend| backend.share.map_or_else(|| "-".into(), |share| format!("{share:.1}%"))),
    right("ACTIVE", 7, 3, |backend| short(backend.reading.counts.open as f64)),
    right("NEW/S", 7, 1, |backend| rate(&backend.rates, |rates| rates.begun)),
    right("FAIL/S", 7, 5, |backend| rate(&backend.rates, |rates| rates.failed)),
    right("UP/S", 8, 7, |backend| byte_rate(&backend.rates, |rates| rates.upstream_bytes)),
    right("DOWN/S", 8, 6, |backend| byte_rate(&backend.rates, |rates| rates.downstream_bytes)),
    left("TREND", TREND_WIDTH as u16, 10, |backend| backend.history.bars(TREND_WIDTH)),
];

/// The columns that fit side by side with one character between them, in their order; the first in any case.
pub fn fitting<T>(columns: &'static [Column<T>], room: u16) -> Vec<&'static Column<T>> {
    let mut by_rank: Vec<_> = columns.iter().collect();
    by_rank.sort_by_key(|column| column.rank);
    let (mut room, mut last_rank) = (u32::from(room) + 1, 0);
    for column in by_rank {
        let needed = u32::from(column.width) + 1;
        if column.rank > 0 && needed > room {
            break; // A less important one that happens to fit would look chosen.
        }
        (room, last_rank) = (room.saturating_sub(needed), column.rank);
    }
    columns.iter().filter(|column| column.rank <= last_rank).collect()
}

/// A number in four characters or so: `0`, `0.3`, `12`, `12.3k`, `4.5M`.
pub fn short(number: f64) -> String {
    const UNITS: [&str; 5] = ["k", "M", "G", "T", "P"];
    if number < 9.95 && number.fract() != 0.0 {
        return format!("{number:.1}");
    }
    if number < 9_999.5 {
        return format!("{number:.0}");
    }
    let (mut amount, mut units) = (number / 1_000.0, UNITS.into_iter());
    let mut unit = units.next().unwrap_or_default();
    while amount >= 999.5
        && let Some(next) = units.next()
    {
        (amount, unit) = (amount / 1_000.0, next);
    }
    if amount < 99.95 { format!("{amount:.1}{unit}") } else { format!("{amount:.0}{unit}") }
}

/// A rate, `-` where there is none yet.
pub fn rate(rates: &Option<Rates>, of: fn(&Rates) -> f64) -> String {
    rates.as_ref().map_or_else(|| "-".into(), |rates| short(of(rates)))
}

/// A rate of bytes, `-` where there is none yet.
pub fn byte_rate(rates: &Option<Rates>, of: fn(&Rates) -> f64) -> String {
    rates.as_ref().map_or_else(|| "-".into(), |rates| bytes(of(rates) as u64))
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn titles(room: u16) -> Vec<&'static str> {
        fitting(OF_SERVICES, room).iter().map(|column| column.title).collect()
    }

    #[test]
    fn given_less_and_less_room_when_chosen_then_the_least_important_columns_go_first() {
        assert_eq!(titles(200).len(), OF_SERVICES.len());
        assert_eq!(titles(80), ["SERVICE", "STATE", "BACKENDS", "ACTIVE", "NEW/S", "FAIL/S", "UP/S", "DOWN/S"]);
        assert_eq!(titles(42), ["SERVICE", "STATE", "ACTIVE", "NEW/S"]);
        assert_eq!(titles(40), ["SERVICE", "STATE", "NEW/S"]);
        assert_eq!(titles(1), ["SERVICE"]);
    }

    #[test]
    fn given_columns_when_chosen_then_they_fit_whatever_the_room() {
        for room in 16..300 {
            let needed: u16 = fitting(OF_SERVICES, room).iter().map(|column| column.width + 1).sum();
            assert!(needed <= room + 1, "{room}");
        }
    }

    #[test]
    fn given_numbers_when_written_then_they_are_short() {
        let written = [0.0, 0.25, 7.0, 9.96, 250.4, 9_999.0, 12_345.0, 250_000.0, 999_600.0, 5e6, 3e20].map(short);

        assert_eq!(written, ["0", "0.2", "7", "10", "250", "9999", "12.3k", "250k", "1.0M", "5.0M", "300000P"]);
    }
}
