//! Two readings make rates: how fast the counters of each Service and each backend grow.
//!
//! A counter that is lower than before has begun anew, and so have all of another process, unless that one has taken over
//! from the last: then what it shows is what was added since. No rate is ever below 0. The counters of a Service are the relay's own sums, of which a backend that
//! leaves takes nothing away; those of its backends are asked for while somebody looks at them.

use std::collections::HashMap;
use std::mem;
use std::ops::AddAssign;
use std::time::Instant;

use super::history::History;
use super::reading::{BackendReading, CloseReading, Counts, Reading, ServiceReading};

/// The last reading, with what it says about the time since the one before.
#[derive(Debug, Default)]
pub struct Board {
    /// When it was read; `None` before the first.
    pub at: Option<Instant>,
    /// Version of the program that answered.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// When it has taken over from another process, in a few words; empty where it has not.
    pub upgrade: String,
    /// When another one has last failed to take over from it; empty where none has.
    pub upgrade_failure: String,
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
    /// The one that is looked at; `None` until it was asked for.
    pub closeup: Option<Closeup>,
}

/// One Service.
#[derive(Debug, Default)]
pub struct ServiceLine {
    /// What was read.
    pub reading: ServiceReading,
    /// How fast its counters grow; `None` before the second reading.
    pub rates: Option<Rates>,
    /// New connections and flows a second.
    pub history: History,
}

/// One Service with its backends.
#[derive(Debug, Default)]
pub struct Closeup {
    /// Its name.
    pub name: String,
    /// False where the relay has no such Service.
    pub is_there: bool,
    /// Where it listens.
    pub listeners: Vec<String>,
    /// Its backends, in the order of the reading.
    pub backends: Vec<BackendLine>,
    /// When it was read, and from which process.
    read: Option<(Instant, u32)>,
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
        let Reading { version, pid, upgrade, upgrade_failure, synced, problem_count, services } = reading;
        let seconds = self.at.and_then(|before| seconds_between(before, at));
        let was_upgraded = !upgrade.is_empty() && upgrade != self.upgrade;
        let is_same_process = self.pid == pid || was_upgraded;
        if let Some((_, read)) =
            self.closeup.as_mut().and_then(|closeup| closeup.read.as_mut()).filter(|_| was_upgraded)
        {
            *read = pid;
        }
        let before = mem::take(&mut self.services).into_iter();
        let mut before: HashMap<_, _> = before.map(|service| (service.reading.name.clone(), service)).collect();
        let services = services.into_iter().map(|service| {
            let before = before.remove(&service.name);
            ServiceLine::after(before, service, seconds, is_same_process)
        });
        self.services = services.collect();
        (self.at, self.version, self.pid, self.upgrade) = (Some(at), version, pid, upgrade);
        (self.synced, self.problem_count, self.upgrade_failure) = (synced, problem_count, upgrade_failure);
        self.rates = seconds.map(|_| sum(self.services.iter().filter_map(|service| service.rates)));
        self.open = self.services.iter().map(|service| service.reading.counts.open).sum();
        self.history.push(self.rates.map_or(0.0, |rates| rates.begun));
    }

    /// Replaces what was read before about one Service, or about another one; `None`: the relay has none of that name.
    pub fn take_closely(&mut self, name: &str, reading: Option<CloseReading>, at: Instant) {
        let before = self.closeup.take().filter(|before| before.name == name).unwrap_or_default();
        self.closeup = Some(Closeup::after(before, name, reading, (at, self.pid)));
    }
}

/// Two answers at one moment say nothing of the time between them.
fn seconds_between(before: Instant, at: Instant) -> Option<f64> {
    Some(at.saturating_duration_since(before).as_secs_f64()).filter(|seconds| *seconds > 0.0)
}

impl ServiceLine {
    fn after(before: Option<Self>, reading: ServiceReading, seconds: Option<f64>, is_same_process: bool) -> Self {
        let known = before.as_ref().map(|before| &before.reading).filter(|_| is_same_process);
        let rates = seconds.map(|seconds| {
            let mut rates = Rates::between(known.map(|known| &known.counts), &reading.counts, seconds);
            let turned_away = growth(known.map(|known| known.turned_away), reading.turned_away);
            rates.failed += turned_away as f64 / seconds;
            rates
        });
        let mut history = before.map(|before| before.history).unwrap_or_default();
        history.push(rates.map_or(0.0, |rates| rates.begun));
        Self { reading, rates, history }
    }
}

impl Closeup {
    fn after(before: Self, name: &str, reading: Option<CloseReading>, (at, pid): (Instant, u32)) -> Self {
        let (is_there, reading) = (reading.is_some(), reading.unwrap_or_default());
        let seconds = before.read.and_then(|(before, _)| seconds_between(before, at));
        let is_same_process = before.read.is_some_and(|(_, before)| before == pid);
        let key = |reading: &BackendReading| (reading.port.clone(), reading.address.clone());
        let known = before.backends.into_iter().map(|backend| (key(&backend.reading), backend));
        let mut known: HashMap<_, _> = known.collect();
        let backends = reading.backends.into_iter().map(|backend| {
            let before = known.remove(&key(&backend));
            BackendLine::after(before, backend, seconds, is_same_process)
        });
        let mut backends: Vec<_> = backends.collect();
        share(&mut backends);
        Self { name: name.to_owned(), is_there, listeners: reading.listeners, backends, read: Some((at, pid)) }
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

    fn counts(begun: u64) -> Counts {
        Counts { open: 1, begun, upstream_bytes: begun * 100, downstream_bytes: 0, failed: begun / 10 }
    }

    fn reading(pid: u32, turned_away: u64, begun: u64) -> Reading {
        let name = "default/web".to_owned();
        let service = ServiceReading { name, turned_away, counts: counts(begun), ..ServiceReading::default() };
        Reading { pid, services: vec![service], ..Reading::default() }
    }

    fn backend(address: &str, begun: u64) -> BackendReading {
        BackendReading {
            port: "http".into(),
            address: address.into(),
            counts: counts(begun),
            ..BackendReading::default()
        }
    }

    /// The board after readings that are two seconds apart.
    fn board(readings: impl IntoIterator<Item = Reading>) -> Board {
        let (mut board, start) = (Board::default(), Instant::now());
        for (number, reading) in readings.into_iter().enumerate() {
            board.take(reading, start + Duration::from_secs(2 * number as u64));
        }
        board
    }

    /// The backends of one Service after readings that are two seconds apart, each by a process.
    fn closeup<const N: usize>(readings: [(u32, &[BackendReading]); N]) -> Closeup {
        let (mut board, start) = (Board::default(), Instant::now());
        for (number, (pid, backends)) in readings.into_iter().enumerate() {
            board.pid = pid;
            let reading = CloseReading { backends: backends.to_vec(), ..CloseReading::default() };
            board.take_closely("default/web", Some(reading), start + Duration::from_secs(2 * number as u64));
        }
        board.closeup.expect("it was read")
    }

    fn begun(closeup: &Closeup) -> Vec<f64> {
        closeup.backends.iter().filter_map(|backend| Some(backend.rates?.begun)).collect()
    }

    #[test]
    fn given_one_reading_when_taken_then_there_is_no_rate_yet() {
        let board = board([reading(1, 5, 100)]);

        assert_eq!((board.rates, board.services[0].rates), (None, None));
        assert_eq!((board.services[0].reading.counts.begun, board.open), (100, 1));
        assert!(begun(&closeup([(1, &[backend("a", 100)])])).is_empty());
    }

    #[test]
    fn given_two_readings_when_taken_then_counters_make_rates() {
        let board = board([reading(1, 5, 100), reading(1, 9, 120)]);

        let rates = Rates { begun: 10.0, upstream_bytes: 1_000.0, downstream_bytes: 0.0, failed: 1.0 + 2.0 };
        assert_eq!((board.rates, board.services[0].rates), (Some(rates), Some(rates)));
    }

    #[test]
    fn given_a_counter_that_went_back_when_taken_then_it_has_begun_anew_and_no_rate_is_negative() {
        let board = board([reading(1, 90, 100), reading(1, 4, 6)]);

        let rates = board.services[0].rates.expect("two readings");
        assert_eq!((rates.begun, rates.failed), (3.0, 2.0));
        assert_eq!(begun(&closeup([(1, &[backend("a", 100)]), (1, &[backend("a", 6)])])), [3.0]);
    }

    #[test]
    fn given_another_process_when_taken_then_all_counters_have_begun_anew_even_higher_ones() {
        let board = board([reading(1, 0, 100), reading(2, 0, 120)]);

        assert_eq!(board.rates.map(|rates| rates.begun), Some(60.0));
        assert_eq!(begun(&closeup([(1, &[backend("a", 100)]), (2, &[backend("a", 120)])])), [60.0]);
    }

    #[test]
    fn t234_given_a_process_that_has_taken_over_when_taken_then_its_counters_go_on_from_those_of_the_last() {
        let after = |begun| Reading { upgrade: "upgraded now".into(), ..reading(2, 0, begun) };
        let (mut board, start) = (Board::default(), Instant::now());
        let seconds = |count| start + Duration::from_secs(count);
        let backends = |begun| CloseReading { backends: vec![backend("a", begun)], ..CloseReading::default() };

        board.take(reading(1, 0, 100), start);
        board.take_closely("default/web", Some(backends(100)), start);
        board.take(after(120), seconds(2));
        board.take_closely("default/web", Some(backends(120)), seconds(2));

        assert_eq!(board.rates.map(|rates| rates.begun), Some(10.0));
        assert_eq!(begun(board.closeup.as_ref().expect("it was read")), [10.0]);
        board.take(Reading { pid: 3, ..after(130) }, seconds(4));
        assert_eq!(board.rates.map(|rates| rates.begun), Some(65.0), "it says nothing new: this one has begun anew");
    }

    #[test]
    fn given_backends_that_come_and_go_when_taken_then_those_that_are_there_have_their_own_rates() {
        let before = [backend("gone", 5_000), backend("stays", 10)];
        let after = [backend("new", 8), backend("stays", 20)];

        assert_eq!(begun(&closeup([(1, &before), (1, &after)])), [4.0, 5.0]);
    }

    #[test]
    fn given_another_service_when_taken_then_nothing_of_the_one_before_is_left() {
        let (mut board, now) = (Board::default(), Instant::now());
        let reading = |begun| CloseReading { backends: vec![backend("a", begun)], ..CloseReading::default() };

        board.take_closely("default/web", Some(reading(5)), now);
        board.take_closely("default/dns", Some(reading(9)), now + Duration::from_secs(2));
        let closeup = board.closeup.as_ref().expect("it was read");
        assert_eq!((closeup.name.as_str(), begun(closeup)), ("default/dns", vec![]));
        board.take_closely("default/dns", None, now + Duration::from_secs(4));

        let closeup = board.closeup.as_ref().expect("it was read");
        assert_eq!((closeup.is_there, closeup.backends.len()), (false, 0));
    }

    #[test]
    fn given_backends_of_two_ports_when_taken_then_each_has_its_share_of_its_own() {
        let other = BackendReading { port: "admin".into(), ..backend("a", 7) };
        let idle = BackendReading { port: "idle".into(), ..backend("a", 0) };

        let closeup = closeup([(1, &[backend("a", 30), backend("b", 10), other, idle])]);

        let shares: Vec<_> = closeup.backends.iter().map(|backend| backend.share).collect();
        assert_eq!(shares, [Some(75.0), Some(25.0), Some(100.0), None]);
    }

    #[test]
    fn given_two_readings_of_one_moment_when_taken_then_there_is_no_rate() {
        let (mut board, now) = (Board::default(), Instant::now());

        board.take(reading(1, 0, 1), now);
        board.take(reading(1, 0, 9), now);

        assert_eq!(board.rates, None);
    }

    #[test]
    fn given_rates_when_taken_then_each_line_remembers_its_own() {
        let board = board([0, 4, 4, 20].map(|begun| reading(1, 0, begun)));
        let closeup = closeup([0, 4, 4, 20].map(|begun| [backend("a", begun)]).each_ref().map(|it| (1, &it[..])));

        for history in [&board.history, &board.services[0].history, &closeup.backends[0].history] {
            assert_eq!(history.points().collect::<Vec<_>>(), [2, 0, 8]);
        }
    }
}
