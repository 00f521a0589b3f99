//! Two readings make rates: how fast the counters of each Service and each backend grow.
//!
//! A counter that is lower than before has begun anew, and so have all of another process: then what it shows is what
//! was added since. No rate is ever below 0. The rate of a Service is the sum of those of its backends, so that one that
//! leaves takes nothing away.

use std::collections::HashMap;
use std::mem;
use std::ops::AddAssign;
use std::time::Instant;

use super::history::History;
use super::reading::{BackendReading, Counts, Reading, ServiceReading};

/// The last reading, with what it says about the time since the one before.
#[derive(Debug, Default)]
pub struct Board {
    /// When it was read; `None` before the first.
    pub at: Option<Instant>,
    /// Version of the program that answered.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// True once its source has delivered the first complete state.
    pub synced: bool,
    /// How many problems it tells of.
    pub problem_count: usize,
    /// Its Services.
    pub services: Vec<ServiceLine>,
    /// Of all of them together; `None` before the second reading.
    pub rates: Option<Rates>,
    /// Open connections and flows of all of them.
    pub open: u64,
    /// New connections and flows a second, of all of them.
    pub history: History,
}

/// One Service.
#[derive(Debug, Default)]
pub struct ServiceLine {
    /// What was read.
    pub reading: ServiceReading,
    /// The sum over its backends.
    pub counts: Counts,
    /// How fast that grows; `None` before the second reading.
    pub rates: Option<Rates>,
    /// New connections and flows a second.
    pub history: History,
    /// Its backends, in the order of the reading.
    pub backends: Vec<BackendLine>,
}

/// One backend.
#[derive(Debug, Default)]
pub struct BackendLine {
    /// What was read.
    pub reading: BackendReading,
    /// How many of a hundred connections and flows of its port it got; `None` where there were none.
    pub share: Option<f64>,
    /// How fast it grows; `None` before the second reading.
    pub rates: Option<Rates>,
    /// New connections and flows a second.
    pub history: History,
}

/// Growth of counters, a second. Never below 0.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// New connections and flows.
    pub begun: f64,
    /// Payload bytes to backends.
    pub upstream_bytes: f64,
    /// Payload bytes from backends.
    pub downstream_bytes: f64,
    /// Failed tries to reach a backend, and clients turned away.
    pub failed: f64,
}

impl Rates {
    /// Payload bytes, both ways.
    pub fn bytes(&self) -> f64 {
        self.upstream_bytes + self.downstream_bytes
    }

    fn between(before: Option<&Counts>, after: &Counts, seconds: f64) -> Self {
        let rate = |count: fn(&Counts) -> u64| growth(before.map(count), count(after)) as f64 / seconds;
        Self {
            begun: rate(|counts| counts.begun),
            upstream_bytes: rate(|counts| counts.upstream_bytes),
            downstream_bytes: rate(|counts| counts.downstream_bytes),
            failed: rate(|counts| counts.failed),
        }
    }
}

impl AddAssign for Rates {
    fn add_assign(&mut self, other: Self) {
        self.begun += other.begun;
        self.upstream_bytes += other.upstream_bytes;
        self.downstream_bytes += other.downstream_bytes;
        self.failed += other.failed;
    }
}

/// What was added to a counter; `before` is `None` where there was none.
fn growth(before: Option<u64>, after: u64) -> u64 {
    match before {
        Some(before) if before <= after => after - before,
        // It has begun anew in between.
        Some(_) | None => after,
    }
}

impl Board {
    /// Replaces what was read before.
    pub fn take(&mut self, reading: Reading, at: Instant) {
        let Reading { version, pid, synced, problem_count, services } = reading;
        // Two answers at one moment say nothing of the time between them.
        let seconds = self.at.map(|before| at.saturating_duration_since(before).as_secs_f64()).filter(|it| *it > 0.0);
        let is_same_process = self.pid == pid;
        let before = mem::take(&mut self.services).into_iter();
        let mut before: HashMap<_, _> = before.map(|service| (service.reading.name.clone(), service)).collect();
        let services = services.into_iter().map(|service| {
            let before = before.remove(&service.name).unwrap_or_default();
            ServiceLine::after(before, service, seconds, is_same_process)
        });
        let services: Vec<_> = services.collect();
        let rates = seconds.map(|_| sum(services.iter().filter_map(|service| service.rates)));
        self.history.push(rates.map_or(0.0, |rates| rates.begun));
        let (open, history) = (services.iter().map(|service| service.counts.open).sum(), mem::take(&mut self.history));
        *self = Self { at: Some(at), version, pid, synced, problem_count, services, rates, open, history };
    }
}

impl ServiceLine {
    fn after(before: Self, reading: ServiceReading, seconds: Option<f64>, is_same_process: bool) -> Self {
        let mut reading = reading;
        let Self { reading: ServiceReading { turned_away, .. }, backends, mut history, .. } = before;
        let key = |reading: &BackendReading| (reading.port.clone(), reading.address.clone());
        let mut known: HashMap<_, _> = backends.into_iter().map(|backend| (key(&backend.reading), backend)).collect();
        let backends = mem::take(&mut reading.backends).into_iter().map(|backend| {
            let before = known.remove(&key(&backend));
            BackendLine::after(before, backend, seconds, is_same_process)
        });
        let mut backends: Vec<_> = backends.collect();
        share(&mut backends);
        let mut counts = Counts::default();
        backends.iter().for_each(|backend| counts += backend.reading.counts);
        let rates = seconds.map(|seconds| {
            let turned_away = growth(is_same_process.then_some(turned_away), reading.turned_away) as f64 / seconds;
            let mut rates = sum(backends.iter().filter_map(|backend| backend.rates));
            rates.failed += turned_away;
            rates
        });
        history.push(rates.map_or(0.0, |rates| rates.begun));
        Self { reading, counts, rates, history, backends }
    }
}

impl BackendLine {
    fn after(before: Option<Self>, reading: BackendReading, seconds: Option<f64>, is_same_process: bool) -> Self {
        let counts = before.as_ref().map(|before| before.reading.counts).filter(|_| is_same_process);
        let rates = seconds.map(|seconds| Rates::between(counts.as_ref(), &reading.counts, seconds));
        let mut history = before.map(|before| before.history).unwrap_or_default();
        history.push(rates.map_or(0.0, |rates| rates.begun));
        Self { reading, share: None, rates, history }
    }
}

/// Tells each backend its share of its port.
fn share(backends: &mut [BackendLine]) {
    for port in backends.chunk_by_mut(|one, next| one.reading.port == next.reading.port) {
        let all: u64 = port.iter().map(|backend| backend.reading.counts.begun).sum();
        for backend in port {
            backend.share = (all > 0).then(|| backend.reading.counts.begun as f64 * 100.0 / all as f64);
        }
    }
}

fn sum(rates: impl Iterator<Item = Rates>) -> Rates {
    let mut sum = Rates::default();
    rates.for_each(|one| sum += one);
    sum
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn backend(address: &str, begun: u64) -> BackendReading {
        let counts = Counts { open: 1, begun, upstream_bytes: begun * 100, downstream_bytes: 0, failed: begun / 10 };
        BackendReading { port: "http".into(), address: address.into(), counts, ..BackendReading::default() }
    }

    fn reading(pid: u32, turned_away: u64, backends: &[BackendReading]) -> Reading {
        let service = ServiceReading {
            name: "default/web".into(),
            turned_away,
            backends: backends.to_vec(),
            ..Default::default()
        };
        Reading { pid, services: vec![service], ..Reading::default() }
    }

    /// The board after readings that are two seconds apart.
    fn board(readings: impl IntoIterator<Item = Reading>) -> Board {
        let (mut board, start) = (Board::default(), Instant::now());
        for (number, reading) in readings.into_iter().enumerate() {
            board.take(reading, start + Duration::from_secs(2 * number as u64));
        }
        board
    }

    fn begun(board: &Board) -> Vec<f64> {
        board.services[0].backends.iter().filter_map(|backend| Some(backend.rates?.begun)).collect()
    }

    #[test]
    fn given_one_reading_when_taken_then_there_is_no_rate_yet() {
        let board = board([reading(1, 5, &[backend("a", 100)])]);

        assert_eq!((board.rates, board.services[0].rates), (None, None));
        assert_eq!((board.services[0].counts.begun, board.open), (100, 1));
    }

    #[test]
    fn given_two_readings_when_taken_then_counters_make_rates() {
        let board = board([reading(1, 5, &[backend("a", 100)]), reading(1, 9, &[backend("a", 120)])]);

        let rates = Rates { begun: 10.0, upstream_bytes: 1_000.0, downstream_bytes: 0.0, failed: 1.0 + 2.0 };
        assert_eq!((board.rates, board.services[0].rates), (Some(rates), Some(rates)));
        assert_eq!(board.services[0].backends[0].rates.map(|rates| rates.failed), Some(1.0));
    }

    #[test]
    fn given_a_counter_that_went_back_when_taken_then_it_has_begun_anew_and_no_rate_is_negative() {
        let board = board([reading(1, 90, &[backend("a", 100)]), reading(1, 4, &[backend("a", 6)])]);

        assert_eq!(begun(&board), [3.0]);
        assert_eq!(board.services[0].rates.map(|rates| rates.failed), Some(2.0));
    }

    #[test]
    fn given_another_process_when_taken_then_all_counters_have_begun_anew_even_higher_ones() {
        let board = board([reading(1, 0, &[backend("a", 100)]), reading(2, 0, &[backend("a", 120)])]);

        assert_eq!(begun(&board), [60.0]);
    }

    #[test]
    fn given_backends_that_come_and_go_when_taken_then_the_service_has_the_sum_of_those_that_are_there() {
        let board = board([
            reading(1, 0, &[backend("gone", 5_000), backend("stays", 10)]),
            reading(1, 0, &[backend("new", 8), backend("stays", 20)]),
        ]);

        assert_eq!(begun(&board), [4.0, 5.0]);
        assert_eq!(board.services[0].rates.map(|rates| rates.begun), Some(9.0));
    }

    #[test]
    fn given_backends_of_two_ports_when_taken_then_each_has_its_share_of_its_own() {
        let other = BackendReading { port: "admin".into(), ..backend("a", 7) };
        let idle = BackendReading { port: "idle".into(), ..backend("a", 0) };

        let board = board([reading(1, 0, &[backend("a", 30), backend("b", 10), other, idle])]);

        let shares: Vec<_> = board.services[0].backends.iter().map(|backend| backend.share).collect();
        assert_eq!(shares, [Some(75.0), Some(25.0), Some(100.0), None]);
    }

    #[test]
    fn given_two_readings_of_one_moment_when_taken_then_there_is_no_rate() {
        let (mut board, now) = (Board::default(), Instant::now());

        board.take(reading(1, 0, &[backend("a", 1)]), now);
        board.take(reading(1, 0, &[backend("a", 9)]), now);

        assert_eq!(board.rates, None);
    }

    #[test]
    fn given_rates_when_taken_then_each_line_remembers_its_own() {
        let board = board([0, 4, 4, 20].map(|begun| reading(1, 0, &[backend("a", begun)])));

        assert_eq!(board.services[0].history.points().collect::<Vec<_>>(), [2, 0, 8]);
        assert_eq!(board.history.points().collect::<Vec<_>>(), [2, 0, 8]);
    }
}
