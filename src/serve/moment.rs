//! Instants that fit into a word, so that threads can share them without a lock.
//!
//! The clock is the monotonic one: who sets the wall clock moves nothing here.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Milliseconds since a fixed instant, which is a little before the first that anybody asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(pub(crate) u64);

/// A caller may have read its clock before the first use of this: keep that after the beginning.
static BEGINNING: LazyLock<Instant> = LazyLock::new(|| {
    let now = Instant::now();
    now.checked_sub(Duration::from_secs(3_600)).unwrap_or(now)
});

impl Moment {
    /// The moment of an instant; the beginning for one before.
    pub(crate) fn of(instant: Instant) -> Self {
        Self(instant.saturating_duration_since(*BEGINNING).as_millis() as u64)
    }

    /// The instant, to the millisecond.
    pub(crate) fn instant(self) -> Instant {
        *BEGINNING + Duration::from_millis(self.0)
    }

    /// So much later.
    pub(crate) fn after(self, time: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(time.as_millis()).unwrap_or(u64::MAX)))
    }

    /// The time since an earlier one; none since a later one.
    pub(crate) fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_instants_when_they_become_moments_and_back_then_less_than_a_millisecond_is_lost() {
        let now = Instant::now();
        let later = now + Duration::from_secs(3);

        assert!(Moment::of(now) > Moment::default());
        assert!((2_999..=3_001).contains(&Moment::of(later).since(Moment::of(now)).as_millis()));
        assert!(later.saturating_duration_since(Moment::of(later).instant()) < Duration::from_millis(1));
        assert_eq!(Moment::of(now).since(Moment::of(later)), Duration::ZERO);
        assert_eq!(Moment(u64::MAX).after(Duration::MAX), Moment(u64::MAX));
    }
}
