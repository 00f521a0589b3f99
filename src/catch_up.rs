//! When it is taken what changed while the API server was away: all of it together, once Services and endpoints can both be
//! read again.
//!
//! Their watches come back one by one, and what one says of a Service belongs to what the other says of its endpoints.
//! Pure: which of them cannot be read is seen by `api_report`, which also keeps what waits.

use std::time::Duration;

use tokio::time::Instant;

/// Services and endpoints.
const KINDS: usize = 2;
/// How long the kind that is back waits for the other one: a list of a large cluster takes a second or two. What cannot be
/// read for longer is away for a reason of its own, and holds up nothing.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long changes wait once both can be read: a watch that goes on tells at once what it has missed.
const SETTLED: Duration = Duration::from_millis(100);

/// Whether changes wait, and until when. Owned by the report of the API source.
#[derive(Debug, Default)]
pub(crate) struct CatchUp {
    /// True while neither kind can be read.
    lost: bool,
    until: Option<Instant>,
}

impl CatchUp {
    /// So many kinds cannot be read now, or are being listed. True where the server has just come back.
    pub(crate) fn see(&mut self, missing: usize, now: Instant) -> bool {
        if missing == KINDS {
            self.lost = true;
            return false;
        }
        let is_back = std::mem::take(&mut self.lost);
        if is_back {
            // A server that comes and goes all the time does not put off what waits already.
            self.until.get_or_insert(now + PATIENCE);
        }
        if missing == 0 {
            self.until = self.until.map(|until| until.min(now + SETTLED));
        }
        is_back
    }

    /// True while changes are to wait.
    pub(crate) fn holds(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// When what has waited is to be taken; `None` where nothing waits.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.until
    }

    /// It is taken.
    pub(crate) fn end(&mut self) {
        self.until = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t226_given_both_kinds_away_when_they_come_back_one_by_one_then_changes_wait_for_the_second_and_a_little_more() {
        let (mut catch_up, start) = (CatchUp::default(), Instant::now());
        assert!(!catch_up.see(1, start) && !catch_up.see(2, start) && !catch_up.holds(start), "nothing is back yet");

        assert!(catch_up.see(1, start));
        assert!(!catch_up.see(1, start), "told once");
        assert!(catch_up.holds(start + PATIENCE / 2));
        let both = start + PATIENCE / 2;
        catch_up.see(0, both);
        catch_up.see(0, both + SETTLED / 2);

        assert!(catch_up.holds(both + SETTLED / 2));
        assert_eq!(catch_up.due(), Some(both + SETTLED), "from the first moment on");
        catch_up.end();
        assert!(!catch_up.holds(both) && catch_up.due().is_none());
    }

    #[test]
    fn t226_given_one_kind_that_stays_away_when_the_other_is_back_then_its_changes_wait_once_and_not_for_long() {
        let (mut catch_up, start) = (CatchUp::default(), Instant::now());
        catch_up.see(2, start);
        catch_up.see(1, start);

        assert_eq!(catch_up.due(), Some(start + PATIENCE));
        catch_up.end();
        catch_up.see(1, start + PATIENCE);

        assert_eq!(catch_up.due(), None, "whatever it says from now on is taken at once");
    }

    #[test]
    fn t226_given_a_server_that_comes_and_goes_when_changes_wait_then_they_do_so_from_its_first_return_on() {
        let (mut catch_up, start) = (CatchUp::default(), Instant::now());
        catch_up.see(2, start);
        assert!(catch_up.see(1, start));

        for seconds in 1..=2 {
            let now = start + Duration::from_secs(seconds);
            assert!(!catch_up.see(2, now) && catch_up.see(1, now), "it is back once more");
        }

        assert_eq!(catch_up.due(), Some(start + PATIENCE));
    }

    #[test]
    fn given_one_kind_that_fails_by_itself_when_the_other_changes_then_nothing_waits() {
        let (mut catch_up, now) = (CatchUp::default(), Instant::now());

        for missing in [0, 1, 1, 0] {
            assert!(!catch_up.see(missing, now) && !catch_up.holds(now));
        }
    }
}
