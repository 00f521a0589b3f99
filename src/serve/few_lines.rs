//! How often one thing may be said: a log that repeats itself ten thousand times a second tells nobody anything.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::serve::moment::Moment;

/// Lines of one kind that are told within a second.
const A_SECOND: u64 = 10;

/// One thing that all threads may have to say: ten times in a second, and then how often it was not said.
#[derive(Debug)]
pub(crate) struct FewLines {
    /// The second of the last line, and how many there were in it, told or not.
    second_and_count: AtomicU64,
    untold: AtomicU64,
}

impl FewLines {
    /// For a `static` beside the line.
    pub(crate) const fn new() -> Self {
        Self { second_and_count: AtomicU64::new(0), untold: AtomicU64::new(0) }
    }

    /// Whether to say it now, and how often that was not done since the last line.
    pub(crate) fn ask(&self, now: Instant) -> Option<u64> {
        let second = Moment::of(now).0 / 1_000;
        let next = |word: u64| match word >> 32 == second & u64::from(u32::MAX) {
            true => word.saturating_add(1),
            false => second << 32 | 1,
        };
        let before = self.second_and_count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |word| Some(next(word)));
        let count = next(before.unwrap_or_else(|word| word)) & u64::from(u32::MAX);
        if count > A_SECOND {
            self.untold.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(self.untold.swap(0, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn f30_given_a_storm_when_it_is_told_then_ten_lines_a_second_are_and_the_next_says_how_many_were_not() {
        let lines = FewLines::new();
        let now = Moment::of(Instant::now()).after(Duration::from_secs(1)).0 / 1_000 * 1_000;
        let at = |ms| Moment(now + ms).instant();

        let told: Vec<_> = (0..100).filter_map(|ms| lines.ask(at(ms))).collect();

        assert_eq!(told, [0; 10]);
        assert_eq!(lines.ask(at(999)), None);
        assert_eq!(lines.ask(at(1_000)), Some(91));
        assert_eq!(lines.ask(at(5_000)), Some(0));
    }
}
