//! What it takes to make a change true, counted: how many came, how long they took, how many tables were swapped.
//!
//! Written by `control` alone, read by `metrics`. What connections and datagrams count is in `stats`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::model::{Event, Objects};
use crate::stats::{Counter, Histogram, Latest};

/// Of this process.
pub static APPLIED: ApplyStats = ApplyStats::new();

/// See [`APPLIED`].
#[derive(Debug)]
pub struct ApplyStats {
    /// Tables of backends that were stored in place of others, or as first ones.
    pub swaps: Counter,
    /// How long it took from a batch of changes, planning included, to its being served.
    pub time: Histogram<15>,
    /// When the last batch was served, in milliseconds since 1970; 0 before the first.
    applied_ms: Latest,
    /// When the last change came, in milliseconds since 1970; 0 before the first.
    queued_ms: Latest,
    /// Changes of Services.
    pub services: Changes,
    /// Changes of slices.
    pub slices: Changes,
}

/// Changes of objects of one kind.
#[derive(Debug)]
pub struct Changes {
    /// All so far.
    pub total: Counter,
    /// Those that came and are not served yet.
    pub pending: Latest,
}

impl Changes {
    const fn new() -> Self {
        Self { total: Counter::new(), pending: Latest::new() }
    }

    fn add(&self, count: usize) {
        self.total.add(count as u64);
        self.pending.set(self.pending.get() + count as u64); // Only control writes it.
    }
}

impl ApplyStats {
    pub(crate) const fn new() -> Self {
        Self {
            swaps: Counter::new(),
            // kube-proxy's own bounds: 1 ms, and twice as much each time.
            time: Histogram::new(&[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384]),
            applied_ms: Latest::new(),
            queued_ms: Latest::new(),
            services: Changes::new(),
            slices: Changes::new(),
        }
    }

    /// A change came.
    pub(crate) fn queue(&self, event: &Event, now: SystemTime) {
        match event {
            Event::Replace(Objects { services, slices }) => {
                self.services.add(services.len());
                self.slices.add(slices.len());
            }
            Event::ApplyService(_) | Event::DeleteService(_) => self.services.add(1),
            Event::ApplySlice(_) | Event::DeleteSlice(_) => self.slices.add(1),
        }
        self.queued_ms.set(milliseconds(now));
    }

    /// A batch was served, which took so long.
    pub(crate) fn apply(&self, swaps: usize, took: Duration, now: SystemTime) {
        self.swaps.add(swaps as u64);
        self.time.observe(took);
        self.applied_ms.set(milliseconds(now));
    }

    /// All changes that came are served, or made no difference.
    pub(crate) fn settle(&self) {
        self.services.pending.set(0);
        self.slices.pending.set(0);
    }

    /// When the last batch was served, in seconds since 1970; 0 before the first.
    pub fn applied_seconds(&self) -> f64 {
        Duration::from_millis(self.applied_ms.get()).as_secs_f64()
    }

    /// When the last change came, in seconds since 1970; 0 before the first.
    pub fn queued_seconds(&self) -> f64 {
        Duration::from_millis(self.queued_ms.get()).as_secs_f64()
    }
}

fn milliseconds(now: SystemTime) -> u64 {
    now.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Service, Slice};
    use crate::name::ObjectName;

    #[test]
    fn given_changes_when_they_come_and_are_served_then_none_is_pending_any_more() {
        let (stats, at) = (ApplyStats::new(), |seconds| UNIX_EPOCH + Duration::from_secs(seconds));
        let web = Service::new("web").port("http", 80);
        let slice = Slice::new("web-1", &web);

        stats.queue(&Event::Replace(Objects::new(vec![web], vec![slice])), at(100));
        stats.queue(&Event::DeleteService(ObjectName::parse("web")), at(101));
        assert_eq!((stats.services.pending.get(), stats.slices.pending.get()), (2, 1));
        stats.apply(3, Duration::from_millis(3), at(102));
        stats.settle();

        assert_eq!((stats.services.pending.get(), stats.slices.pending.get()), (0, 0));
        assert_eq!((stats.services.total.get(), stats.slices.total.get(), stats.swaps.get()), (2, 1, 3));
        assert_eq!((stats.queued_seconds(), stats.applied_seconds(), stats.time.count()), (101.0, 102.0, 1));
    }
}
