//! Counters as words with numbers, so that no counter goes back when a process takes over from another.
//!
//! One walk names every counter of its kind, for whoever reads them and for whoever adds to them. A field of `stats` that
//! no walk knows does not compile. Numbers of what is open now do not travel: what comes over is counted as it comes.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::apply_stats::{APPLIED, ApplyStats};
use crate::contact::{Contact, EventCounts};
use crate::stats::{
    BackendStats, Counter, HealthAnswers, Histogram, PROCESS, PauseReason, ProcessStats, ServiceStats, SourceFallback,
    SourceStats, Tally, UpgradeResult, WatchFailure, WatchedKind, Word,
};

/// What was counted, by `counter` or `counter/word`; none that is 0.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Counts(BTreeMap<String, u64>);

impl Counts {
    /// What these have counted.
    pub(crate) fn of(counters: &impl Counters) -> Self {
        let mut counts = BTreeMap::new();
        counters.walk(&mut |name, counter| {
            let count = counter.get();
            if count > 0 {
                counts.insert(name.to_string(), count);
            }
        });
        Self(counts)
    }

    /// Has these count on from what is said here. Words that they do not have are left out.
    pub(crate) fn add_to(&self, counters: &impl Counters) {
        counters.walk(&mut |name, counter| {
            if let Some(count) = self.0.get(&name.to_string()) {
                counter.add(*count);
            }
        });
    }

    /// How much more was counted than before.
    pub(crate) fn beyond(&self, before: &Self) -> Self {
        let more = |(name, count): (&String, &u64)| {
            let more = count.saturating_sub(before.0.get(name).copied().unwrap_or(0));
            (more > 0).then(|| (name.clone(), more))
        };
        Self(self.0.iter().filter_map(more).collect())
    }

    /// True where nothing was counted.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The name of a counter, made to text only where it is asked for: most are 0.
#[derive(Clone, Copy)]
pub(crate) struct Name<'n>(&'n str, Of<'n>);

#[derive(Clone, Copy)]
enum Of<'n> {
    All,
    Word(&'n str),
    /// Two words: a kind, and what became of it.
    Words(&'n str, &'n str),
    Bound(u64),
}

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(name, of) = *self;
        match of {
            Of::All => f.write_str(name),
            Of::Word(word) => write!(f, "{name}/{word}"),
            Of::Words(kind, word) => write!(f, "{name}/{kind}/{word}"),
            Of::Bound(bound) => write!(f, "{name}/{bound}"),
        }
    }
}

/// Who has each counter looked at once.
type Visit<'v> = &'v mut dyn FnMut(Name<'_>, &Counter);

/// What has counters.
pub(crate) trait Counters {
    /// Each once, always by the same name.
    fn walk(&self, visit: Visit<'_>);
}

impl Counters for ServiceStats {
    fn walk(&self, visit: Visit<'_>) {
        let Self { accepted, open: _, dropped, retries } = self;
        one("accepted", accepted, visit);
        words::<crate::stats::DropReason, _>("dropped", dropped, visit);
        one("retries", retries, visit);
    }
}

impl Counters for SourceStats {
    fn walk(&self, visit: Visit<'_>) {
        let Self { preserved, fallbacks } = self;
        one("preserved", preserved, visit);
        words::<SourceFallback, _>("fallbacks", fallbacks, visit);
    }
}

impl Counters for BackendStats {
    fn walk(&self, visit: Visit<'_>) {
        let Self {
            connections,
            active_connections: _,
            flows,
            active_flows: _,
            upstream_bytes,
            downstream_bytes,
            upstream_datagrams,
            downstream_datagrams,
            connect_us: _, // It is no counter: whoever takes the backend over takes it as it is.
            ejections,
            connect_time,
            connect_failures,
            closed,
        } = self;
        use crate::stats::{CloseReason, ConnectFailure, Entry};
        words::<Entry, _>("connections", connections.tally(), visit);
        one("flows", flows, visit);
        words::<Entry, _>("upstream_bytes", upstream_bytes.tally(), visit);
        words::<Entry, _>("downstream_bytes", downstream_bytes.tally(), visit);
        one("upstream_datagrams", upstream_datagrams, visit);
        one("downstream_datagrams", downstream_datagrams, visit);
        one("ejections", ejections, visit);
        spans("connect_time", connect_time, visit);
        words::<ConnectFailure, _>("connect_failures", connect_failures, visit);
        words::<CloseReason, _>("closed", closed, visit);
    }
}

impl Counters for ProcessStats {
    fn walk(&self, visit: Visit<'_>) {
        let Self {
            splice_fallbacks,
            filter_fallbacks,
            vip_addresses: _,
            routes_repaired,
            host_read_errors,
            guarded_addresses: _,
            accept_paused,
            connections_limit: _,
            stalled: _,
            panics,
            log_lines_dropped,
            access_log_dropped,
            upgrades,
            upgrade_failure: _, // Of that process alone.
            kept_listeners: _,
            standstill,
            healthz,
            livez,
            network_programming,
        } = self;
        one("splice_fallbacks", splice_fallbacks, visit);
        one("filter_fallbacks", filter_fallbacks, visit);
        one("routes_repaired", routes_repaired, visit);
        one("host_read_errors", host_read_errors, visit);
        for reason in PauseReason::ALL {
            visit(Name("accept_paused_ms", Of::Word(reason.as_str())), accept_paused[usize::from(*reason)].sum_ms());
        }
        one("panics", panics, visit);
        one("log_lines_dropped/storm", &log_lines_dropped.storm, visit);
        one("log_lines_dropped/unread", &log_lines_dropped.unread, visit);
        one("access_log_dropped", access_log_dropped, visit);
        words::<UpgradeResult, _>("upgrades", upgrades, visit);
        spans("standstill", standstill, visit);
        answers("healthz", healthz, visit);
        answers("livez", livez, visit);
        spans("network_programming", network_programming, visit);
    }
}

impl Counters for Contact {
    fn walk(&self, visit: Visit<'_>) {
        let EventCounts { sent, dropped } = &self.events;
        visit(Name("events", Of::Word("sent")), sent);
        visit(Name("events", Of::Word("dropped")), dropped);
        for kind in WatchedKind::ALL {
            let (relists, failures) = self.line(*kind).tallies();
            for reason in WatchFailure::ALL {
                let of = Of::Words(kind.as_str(), reason.as_str());
                visit(Name("relists", of), relists.of(*reason));
                visit(Name("watch_errors", of), failures.of(*reason));
            }
        }
    }
}

/// What is counted once in a process.
pub(crate) struct Whole;

impl Counters for Whole {
    fn walk(&self, visit: Visit<'_>) {
        PROCESS.walk(visit);
        APPLIED.walk(visit);
    }
}

impl Counters for ApplyStats {
    fn walk(&self, visit: Visit<'_>) {
        let Self { swaps, time, services, slices, .. } = self; // All else says when, not how often.
        one("swaps", swaps, visit);
        spans("apply_time", time, visit);
        one("changes/services", &services.total, visit);
        one("changes/slices", &slices.total, visit);
    }
}

fn one(name: &str, counter: &Counter, visit: Visit<'_>) {
    visit(Name(name, Of::All), counter);
}

fn words<W: Word, const N: usize>(name: &str, tally: &Tally<N>, visit: Visit<'_>) {
    for word in W::ALL {
        visit(Name(name, Of::Word(word.as_str())), tally.of(*word));
    }
}

fn spans<const N: usize>(name: &str, histogram: &Histogram<N>, visit: Visit<'_>) {
    for (bound, count) in histogram.spans() {
        visit(Name(name, bound.map_or(Of::Word("beyond"), Of::Bound)), count);
    }
    visit(Name(name, Of::Word("sum_us")), histogram.sum_us());
}

fn answers(name: &str, answers: &HealthAnswers, visit: Visit<'_>) {
    visit(Name(name, Of::Word("healthy")), &answers.healthy);
    visit(Name(name, Of::Word("unhealthy")), &answers.unhealthy);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::live::sample;
    use crate::metrics::{Kind, METRICS, render_with};
    use crate::name::ObjectName;
    use crate::serve::balancer::Backend;
    use crate::stats::{CloseReason, DropReason, Entry};
    use crate::status::Status;

    #[test]
    fn t234_given_counters_when_another_process_goes_on_with_them_then_none_goes_back_and_gauges_begin_anew() {
        let (old, new) = (BackendStats::default(), BackendStats::default());
        old.connections.add(Entry::NodePort, 7);
        old.active_connections.increment();
        old.closed.count(CloseReason::Reset);
        old.connect_time.observe(Duration::from_millis(30));
        old.connect_time.observe(Duration::from_secs(60));
        new.connections.add(Entry::NodePort, 1);

        let counts = Counts::of(&old);
        counts.add_to(&new);

        assert_eq!((new.connections.of(Entry::NodePort), new.active_connections.get()), (8, 0));
        assert_eq!((new.closed.get(CloseReason::Reset), new.connect_time.count()), (1, 2));
        assert_eq!(new.connect_time.sum_seconds(), old.connect_time.sum_seconds());
        assert!(new.connect_time.cumulative().eq(old.connect_time.cumulative()));
    }

    #[test]
    fn given_counts_when_they_are_written_then_each_counter_has_a_name_of_its_own_and_none_is_0() {
        fn names(counters: &impl Counters) -> (usize, BTreeSet<String>) {
            let mut all = Vec::new();
            counters.walk(&mut |name, _| all.push(name.to_string()));
            (all.len(), all.into_iter().collect())
        }
        let stats = ServiceStats::default();
        stats.dropped.count(DropReason::Loop);

        let json = serde_json::to_string(&Counts::of(&stats)).expect("a map of texts");

        assert_eq!(json, r#"{"dropped/loop":1}"#);
        let sources = names(&SourceStats::default());
        let all = [names(&stats), sources, names(&BackendStats::default()), names(&Whole), names(&Contact::default())];
        for (count, names) in all {
            assert_eq!(count, names.len());
        }
        assert!(Counts::of(&ServiceStats::default()).is_empty());
    }

    /// Counters that are nobody's to hand over: one of the process, and one of the kernel.
    const OTHERS: [&str; 2] = ["process_cpu_seconds_total", "kuberelay_host_listen_overflows_total"];

    /// A relay with a Service of each protocol, and all that it counts.
    struct Counting {
        status: Status,
        process: ProcessStats,
        applied: ApplyStats,
    }

    impl Counting {
        fn new() -> Self {
            let mut status = sample::status();
            status.contact.watch(WatchedKind::Service);
            let dns = status.services.get_mut(&ObjectName::parse("dns")).expect("a Service");
            Arc::make_mut(dns).ports[0].backends = [Arc::new(Backend::new(1, ([10, 244, 0, 9], 53).into()))].into();
            Self { status, process: ProcessStats::new(), applied: ApplyStats::new() }
        }

        /// One more of all that another process is told of.
        fn count(&mut self) {
            fn one_more<C: Counters>(counters: &C) {
                counters.walk(&mut |_, counter| counter.increment());
            }
            one_more(&self.process);
            one_more(&self.applied);
            one_more(&*self.status.contact);
            self.status.source.rejections.count(Some("Service"), "decode");
            for port in self.status.services.values().flat_map(|service| &service.ports) {
                let Some(state) = &port.state else { continue };
                one_more::<ServiceStats>(&state.stats);
                one_more::<SourceStats>(&state.preserve.stats);
                state.affinity.evicted.increment();
                port.backends.iter().for_each(|backend| one_more::<BackendStats>(&backend.stats));
            }
        }

        fn page(&self) -> String {
            render_with(usize::MAX, &self.process, &self.applied, &self.status, true)
        }
    }

    /// The lines of a metric, as series and number.
    fn series<'p>(page: &'p str, metric: &str) -> BTreeMap<&'p str, f64> {
        let is_its = |series: &str| {
            let name = series.split('{').next().unwrap_or_default();
            let rest = name.strip_prefix(metric);
            rest.is_some_and(|rest| ["", "_bucket", "_sum", "_count"].contains(&rest))
        };
        let lines = page.lines().filter_map(|line| line.rsplit_once(' ')).filter(|(series, _)| is_its(series));
        lines.map(|(series, number)| (series, number.parse().expect("a number"))).collect()
    }

    #[test]
    fn t234_given_one_more_of_all_that_goes_over_when_rendered_then_each_counter_that_there_is_has_grown() {
        let mut counting = Counting::new();
        counting.count();
        let before = counting.page();

        counting.count();
        let after = counting.page();

        let counters = METRICS.iter().filter(|metric| matches!(metric.kind, Kind::Counter | Kind::Histogram));
        for metric in counters.filter(|metric| !OTHERS.contains(&metric.name)) {
            let (before, after) = (series(&before, metric.name), series(&after, metric.name));
            assert!(!before.is_empty(), "{} is not there", metric.name);
            let stuck: Vec<_> = before.iter().filter(|(series, count)| after[*series] <= **count).collect();
            assert!(stuck.is_empty(), "would begin anew in another process: {stuck:?}");
        }
    }

    #[test]
    fn t234_given_words_that_only_another_version_knows_when_added_then_the_others_count() {
        let counts: Counts =
            serde_json::from_str(r#"{"dropped/for_fun":3,"accepted":2,"dropped/drain":1}"#).expect("JSON");
        let stats = ServiceStats::default();

        counts.add_to(&stats);

        assert_eq!((stats.accepted.get(), stats.dropped.get(DropReason::Drain)), (2, 1));
    }
}
