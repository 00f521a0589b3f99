//! What the backends that left a ServicePort have carried, so that its sums do not fall as one of them goes.
//!
//! Their own series end as they leave (`metrics`), and connections to them go on. Who leaves is decided in `ports`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::serve::balancer::Backend;
use crate::stats::BackendStats;

/// A client that was led to a backend just before it left may reach it so much later, and then it is counted there.
const LATEST: Duration = Duration::from_secs(60);

/// The backends that left one ServicePort. Never changed, but replaced with the list of those that stay: whoever sums up
/// both meets each backend once.
#[derive(Clone, Debug, Default)]
pub struct Departed {
    /// Those that may still count.
    ending: Vec<Ending>,
    /// The sum of all others; `None` where they have counted nothing.
    ended: Option<Arc<BackendStats>>,
}

/// A backend that has left.
#[derive(Clone, Debug)]
struct Ending {
    backend: Arc<Backend>,
    since: Instant,
}

impl Ending {
    fn is_over(&self, now: Instant) -> bool {
        self.backend.open_count() == 0 && now.saturating_duration_since(self.since) >= LATEST
    }
}

impl Departed {
    /// The counters of all of them. What is open is open at one that has left.
    pub fn stats(&self) -> impl Iterator<Item = &BackendStats> {
        let ending = self.ending.iter().filter_map(|ending| ending.backend.stats.made());
        self.ended.as_deref().into_iter().chain(ending)
    }

    /// One backend that has left.
    #[cfg(test)]
    pub(crate) fn of(backend: Arc<Backend>) -> Self {
        Self::default().with(&[backend], Instant::now())
    }

    /// The same with those that leave now. Backends that are over are summed up and forgotten.
    pub(super) fn with(&self, leaving: &[Arc<Backend>], now: Instant) -> Self {
        let new = leaving.iter().map(|backend| Ending { backend: Arc::clone(backend), since: now });
        let all = self.ending.iter().cloned().chain(new);
        let (over, ending): (Vec<_>, Vec<_>) = all.partition(|ending| ending.is_over(now));
        let mut over = over.iter().filter_map(|ending| ending.backend.stats.made()).peekable();
        if over.peek().is_none() {
            return Self { ending, ended: self.ended.clone() };
        }
        let ended = BackendStats::default();
        self.ended.as_deref().into_iter().chain(over).for_each(|stats| ended.absorb(stats));
        Self { ending, ended: Some(Arc::new(ended)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::{CloseReason, Entry};

    fn backend(id: u32) -> Arc<Backend> {
        Arc::new(Backend::new(id, ([10, 0, 0, 1], 80).into()))
    }

    fn sums(departed: &Departed) -> (u64, u64) {
        let add = |(connections, open), stats: &BackendStats| {
            (connections + stats.connections.get(), open + stats.active_connections.get())
        };
        departed.stats().fold((0, 0), add)
    }

    #[test]
    fn given_a_backend_that_left_when_its_connection_goes_on_then_it_is_counted_until_after_its_end_and_once() {
        let (busy, idle, now) = (backend(1), backend(2), Instant::now());
        busy.stats.connections.add(Entry::NodePort, 5);
        busy.stats.active_connections.increment();

        let departed = Departed::default().with(&[Arc::clone(&busy), idle], now);
        assert_eq!(sums(&departed), (5, 1));
        let departed = departed.with(&[], now + 2 * LATEST);
        assert_eq!((departed.ending.len(), departed.ended.is_none()), (1, true), "who counted nothing is forgotten");
        busy.stats.connections.add(Entry::ClusterIp, 1);
        busy.stats.closed.count(CloseReason::Finished);
        busy.stats.active_connections.decrement();
        assert_eq!(sums(&departed), (6, 0));

        let departed = departed.with(&[], now + 2 * LATEST);
        assert_eq!((departed.ending.len(), sums(&departed)), (0, (6, 0)));
        let ended = departed.stats().next().expect("a sum");
        assert_eq!((ended.connections.of(Entry::NodePort), ended.closed.get(CloseReason::Finished)), (5, 1));
    }

    #[test]
    fn given_a_backend_that_has_just_left_when_nothing_is_open_then_who_comes_late_is_counted() {
        let (left, now) = (backend(1), Instant::now());
        let departed = Departed::default().with(&[Arc::clone(&left)], now).with(&[], now + LATEST / 2);

        left.stats.connections.add(Entry::ClusterIp, 1);

        assert_eq!(sums(&departed), (1, 0));
        let departed = departed.with(&[backend(2)], now + LATEST);
        assert_eq!((departed.ending.len(), sums(&departed)), (1, (1, 0)));
    }
}
