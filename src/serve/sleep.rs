//! Timers of one thread: few are ever set, so a sorted map is enough.
//!
//! They are set where a backend does not answer at once, where one half of a connection is silent, where accepting
//! pauses. A connection that goes well sets none.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

/// The timers of a thread.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    set: RefCell<Set>,
}

#[derive(Debug, Default)]
struct Set {
    /// Two timers of the same instant differ by the number.
    wakers: BTreeMap<(Instant, u64), Waker>,
    last: u64,
}

impl Timers {
    /// A future that is ready at an instant.
    pub(crate) fn until(self: &Rc<Self>, deadline: Instant) -> Sleep {
        Sleep { deadline, timer: None, timers: Rc::clone(self) }
    }

    /// When the next one is due.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.set.borrow().wakers.first_key_value().map(|((deadline, _), _)| *deadline)
    }

    /// Wakes whose time has come.
    pub(crate) fn fire(&self, now: Instant) {
        while let Some(waker) = self.pop(now) {
            waker.wake();
        }
    }

    /// Forgets whom to wake, so that tasks which nobody else could wake come to their end.
    pub(crate) fn abandon(&self) {
        let wakers = std::mem::take(&mut self.set.borrow_mut().wakers);
        drop(wakers); // Their tasks may clear timers now.
    }

    fn pop(&self, now: Instant) -> Option<Waker> {
        let mut set = self.set.borrow_mut();
        let first = set.wakers.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }

    fn set(&self, deadline: Instant, waker: Waker) -> (Instant, u64) {
        let mut set = self.set.borrow_mut();
        set.last += 1;
        let timer = (deadline, set.last);
        set.wakers.insert(timer, waker);
        timer
    }

    /// Has a timer wake whoever polls it now; false where it has fired.
    fn renew(&self, timer: (Instant, u64), waker: &Waker) -> bool {
        let mut set = self.set.borrow_mut();
        let Some(known) = set.wakers.get_mut(&timer) else { return false };
        let other = (!known.will_wake(waker)).then(|| std::mem::replace(known, waker.clone()));
        drop(set);
        drop(other); // Its task may clear timers now.
        true
    }

    fn clear(&self, timer: (Instant, u64)) {
        let waker = self.set.borrow_mut().wakers.remove(&timer);
        drop(waker); // As above.
    }
}

/// Ready at its deadline. The timer is set at the first poll and cleared with the future.
#[derive(Debug)]
pub(crate) struct Sleep {
    deadline: Instant,
    timer: Option<(Instant, u64)>,
    timers: Rc<Timers>,
}

impl Sleep {
    /// Moves the deadline.
    pub(crate) fn reset(&mut self, deadline: Instant) {
        self.clear();
        self.deadline = deadline;
    }

    /// Which timer of the thread it is, once it was set.
    #[cfg(test)]
    pub(crate) fn number(&self) -> Option<u64> {
        self.timer.map(|(_, number)| number)
    }

    fn clear(&mut self) {
        if let Some(timer) = self.timer.take() {
            self.timers.clear(timer);
        }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.deadline {
            return Poll::Ready(());
        }
        if !self.timer.is_some_and(|timer| self.timers.renew(timer, cx.waker())) {
            self.timer = Some(self.timers.set(self.deadline, cx.waker().clone()));
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::Arc;
    use std::task::Wake;
    use std::time::Duration;

    use super::*;

    struct Bell;

    impl Wake for Bell {
        fn wake(self: Arc<Self>) {}
    }

    fn rung(bell: &Arc<Bell>) -> bool {
        Arc::strong_count(bell) == 1
    }

    #[test]
    fn given_timers_when_they_fire_then_those_that_are_due_wake_and_the_next_is_known() {
        let timers = Rc::<Timers>::default();
        let now = Instant::now();
        let [soon, late] = [60, 120].map(|seconds| now + Duration::from_secs(seconds));
        let bells = [(); 3].map(|()| Arc::new(Bell));
        let mut sleeps = [late, soon, soon].map(|deadline| timers.until(deadline));
        for (sleep, bell) in sleeps.iter_mut().zip(&bells) {
            let waker = Waker::from(Arc::clone(bell));
            assert!(Pin::new(sleep).poll(&mut Context::from_waker(&waker)).is_pending());
        }
        assert_eq!(timers.next(), Some(soon));

        timers.fire(soon);

        assert_eq!(bells.each_ref().map(rung), [false, true, true]);
        assert_eq!(timers.next(), Some(late));
    }

    #[test]
    fn given_a_sleep_when_it_is_moved_or_dropped_then_its_timer_goes() {
        let timers = Rc::<Timers>::default();
        let mut cx = Context::from_waker(Waker::noop());
        let hour = Instant::now() + Duration::from_secs(3_600);
        let mut sleep = timers.until(hour);
        assert!(Pin::new(&mut sleep).poll(&mut cx).is_pending());

        sleep.reset(hour + Duration::from_secs(1));
        assert_eq!(timers.next(), None);
        assert!(Pin::new(&mut sleep).poll(&mut cx).is_pending());
        assert!(timers.next() > Some(hour));
        drop(sleep);

        assert_eq!(timers.next(), None);
    }

    #[test]
    fn given_a_sleep_when_another_polls_it_then_that_one_is_woken() {
        let timers = Rc::<Timers>::default();
        let hour = Instant::now() + Duration::from_secs(3_600);
        let bells = [(); 2].map(|()| Arc::new(Bell));
        let mut sleep = timers.until(hour);
        for bell in &bells {
            let waker = Waker::from(Arc::clone(bell));
            assert!(Pin::new(&mut sleep).poll(&mut Context::from_waker(&waker)).is_pending());
        }
        assert_eq!(bells.each_ref().map(rung), [true, false], "the first is forgotten");

        timers.fire(hour);

        assert_eq!(bells.each_ref().map(rung), [true, true]);
        assert_eq!(timers.next(), None);
    }

    #[test]
    fn given_timers_when_they_are_abandoned_then_their_wakers_go() {
        let timers = Rc::<Timers>::default();
        let bell = Arc::new(Bell);
        let mut sleep = timers.until(Instant::now() + Duration::from_secs(3_600));
        let waker = Waker::from(Arc::clone(&bell));
        assert!(Pin::new(&mut sleep).poll(&mut Context::from_waker(&waker)).is_pending());
        drop(waker);

        timers.abandon();

        assert!(rung(&bell));
        assert_eq!(timers.next(), None);
    }

    #[test]
    fn given_a_deadline_in_the_past_when_polled_then_it_is_ready() {
        let timers = Rc::<Timers>::default();

        let sleep = pin!(timers.until(Instant::now()));

        assert!(sleep.poll(&mut Context::from_waker(Waker::noop())).is_ready());
    }
}
