//! How long a connection may last when nobody ends it: silence, half of a silence, age.
//!
//! None of this is on by default but the limit of a half-closed connection, and a connection without limits has no timer.
//! A timer is set anew when it fires, not at each progress.
//!
//! *Age* is for connections that would stay where they are for ever, though more backends have come: their clients connect
//! anew and are spread. So it ends a connection at a moment of quiet, as far as there is one within a quarter of its
//! age more; and each at another age, so that not all come back at once.
//!
//! Whatever the reason, the end is a reset: bytes that may be on the way never look complete. Who asks is `relay`.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use crate::plan::TcpSettings;
use crate::serve::sleep::Sleep;
use crate::serve::worker::sleep_until;
use crate::stats::CloseReason;

/// How long connections may last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitOptions {
    /// How long one side of a half-closed connection may keep silent. Default 1 h. From `--half-close-timeout`.
    pub half_close_timeout: Duration,
    /// How long both sides may keep silent; `None`, the default: for ever. From `--idle-timeout`.
    pub idle_timeout: Option<Duration>,
    /// How old a connection may get, a tenth more or less; `None`, the default: as old as it likes. From
    /// `--max-connection-age`.
    pub max_connection_age: Option<Duration>,
}

impl Default for LimitOptions {
    fn default() -> Self {
        Self { half_close_timeout: Duration::from_secs(3_600), idle_timeout: None, max_connection_age: None }
    }
}

impl LimitOptions {
    /// As a Service wants them.
    pub(crate) fn of_service(self, settings: &TcpSettings) -> Self {
        Self {
            half_close_timeout: settings.half_close_timeout.unwrap_or(self.half_close_timeout),
            idle_timeout: settings.idle_timeout.map_or(self.idle_timeout, |of_service| of_service.0),
            max_connection_age: settings.max_connection_age.map_or(self.max_connection_age, |of_service| of_service.0),
        }
    }
}

/// What ends a connection of two peers who would go on. Kept by those that have such limits.
pub(crate) struct Limits {
    idle: Option<Silence>,
    age: Option<Age>,
}

impl Limits {
    /// For a connection that begins now; `None` where it has no limit. `chance` is from 0 to 1.
    pub(crate) fn begin(options: &LimitOptions, chance: impl FnOnce() -> f64) -> Option<Box<Self>> {
        let LimitOptions { idle_timeout, max_connection_age, .. } = *options;
        if idle_timeout.is_none() && max_connection_age.is_none() {
            return None;
        }
        let idle = idle_timeout.map(|limit| Silence::new(limit, 0));
        let age = max_connection_age.map(|limit| Age::new(Span::new(limit, chance()), Instant::now()));
        Some(Box::new(Self { idle, age }))
    }

    /// Ready with the reason where the connection has to end; `moved` is how many bytes it has moved so far.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, moved: u64) -> Poll<CloseReason> {
        if let Some(idle) = &mut self.idle
            && idle.poll(cx, moved).is_ready()
        {
            return Poll::Ready(CloseReason::Idle);
        }
        match &mut self.age {
            Some(age) => age.poll(cx, moved).map(|()| CloseReason::MaxAge),
            None => Poll::Pending,
        }
    }
}

/// Waits for a time without progress.
pub(crate) struct Silence {
    limit: Duration,
    moved: u64,
    since: Instant,
    timer: Sleep,
}

impl Silence {
    /// Counts from now on, where so many bytes have moved.
    pub(crate) fn new(limit: Duration, moved: u64) -> Self {
        let since = Instant::now();
        Self { limit, moved, since, timer: sleep_until(since + limit) }
    }

    /// Ready when the time has passed.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, moved: u64) -> Poll<()> {
        if moved != self.moved {
            self.moved = moved;
            self.since = Instant::now();
        }
        loop {
            ready!(Pin::new(&mut self.timer).poll(cx));
            if self.since.elapsed() >= self.limit {
                return Poll::Ready(());
            }
            self.timer.reset(self.since + self.limit);
        }
    }
}

/// When a connection is old. Pure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    /// From then on it ends when it is quiet,
    ripe: Duration,
    /// which is when nothing has moved for so long,
    quiet: Duration,
    /// and now it ends anyway.
    end: Duration,
}

impl Span {
    const LONGEST_QUIET: Duration = Duration::from_secs(1);

    /// `chance` from 0 to 1 makes it a tenth shorter to a tenth longer.
    fn new(limit: Duration, chance: f64) -> Self {
        Self {
            ripe: limit.mul_f64(0.9 + chance.clamp(0.0, 1.0) / 5.0),
            quiet: (limit / 10).min(Self::LONGEST_QUIET),
            end: limit + limit / 4,
        }
    }
}

/// Waits until a connection is old, and then for quiet.
struct Age {
    span: Span,
    begin: Instant,
    /// Until it is ripe; then until its end.
    timer: Sleep,
    quiet: Option<Silence>,
}

impl Age {
    fn new(span: Span, begin: Instant) -> Self {
        Self { span, begin, timer: sleep_until(begin + span.ripe), quiet: None }
    }

    fn poll(&mut self, cx: &mut Context<'_>, moved: u64) -> Poll<()> {
        if self.quiet.is_none() {
            ready!(Pin::new(&mut self.timer).poll(cx));
            self.timer.reset(self.begin + self.span.end);
        }
        let quiet = self.quiet.get_or_insert_with(|| Silence::new(self.span.quiet, moved));
        if quiet.poll(cx, moved).is_ready() {
            return Poll::Ready(());
        }
        Pin::new(&mut self.timer).poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::num::NonZeroU8;
    use std::pin::pin;

    use super::*;
    use crate::serve::deadline::before;
    use crate::serve::scripted::{on_worker, soon};
    use crate::value::OrNone;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn given_the_defaults_when_a_connection_begins_then_it_has_no_limit_and_no_timer() {
        assert!(Limits::begin(&LimitOptions::default(), || panic!("nobody asks for chance")).is_none());
        assert_eq!(LimitOptions::default().half_close_timeout, Duration::from_secs(3_600));
    }

    #[test]
    fn given_a_service_with_limits_when_asked_then_its_own_count_and_the_others_stay() {
        let flags = LimitOptions { idle_timeout: Some(5 * MS), max_connection_age: Some(6 * MS), ..Default::default() };
        let settings = TcpSettings {
            half_close_timeout: Some(7 * MS),
            idle_timeout: Some(OrNone(None)),
            eject_after: Some(OrNone(NonZeroU8::new(1))),
            ..TcpSettings::default()
        };

        let of_service = flags.of_service(&settings);

        let expected =
            LimitOptions { half_close_timeout: 7 * MS, idle_timeout: None, max_connection_age: Some(6 * MS) };
        assert_eq!(of_service, expected);
        assert_eq!(flags.of_service(&TcpSettings::default()), flags);
    }

    #[test]
    fn t172_given_an_age_when_connections_begin_then_each_is_a_tenth_off_at_most_and_ends_at_a_quarter_more() {
        let hour = Duration::from_secs(3_600);
        let ripe = |chance| Span::new(hour, chance).ripe.as_secs();

        assert_eq!((ripe(0.0), ripe(0.5), ripe(1.0)), (3_240, 3_600, 3_960));
        assert_eq!(Span::new(hour, 0.3).end, Duration::from_secs(4_500));
        assert_eq!(Span::new(hour, 0.3).quiet, Duration::from_secs(1));
        assert_eq!(Span::new(Duration::from_secs(2), 0.3).quiet, Duration::from_millis(200));
    }

    /// Looks at limits again and again until they end a connection, on which a byte moves each time or none at all.
    async fn end<T>(is_busy: bool, mut poll: impl FnMut(&mut Context<'_>, u64) -> Poll<T>) -> (T, Duration) {
        let (begin, mut moved) = (Instant::now(), 0);
        let ended = async {
            loop {
                moved += u64::from(is_busy);
                let look = Instant::now() + 2 * MS;
                let end = before(look, pin!(poll_fn(|cx| poll(cx, moved)))).await;
                if let Some(end) = end {
                    return end;
                }
            }
        };
        (soon(ended).await, begin.elapsed())
    }

    #[test]
    fn t173_given_an_idle_limit_when_nothing_moves_then_it_ends_a_connection() {
        on_worker(async {
            let options = LimitOptions { idle_timeout: Some(50 * MS), ..LimitOptions::default() };
            let mut limits = Limits::begin(&options, || panic!("nobody asks for chance")).expect("limits");

            let (reason, took) = end(false, |cx, moved| limits.poll(cx, moved)).await;

            assert_eq!(reason, CloseReason::Idle);
            assert!(took >= 50 * MS, "{took:?}");
        });
    }

    #[test]
    fn t172_given_an_age_limit_when_a_connection_is_quiet_then_it_ends_at_its_age() {
        on_worker(async {
            let options = LimitOptions { max_connection_age: Some(100 * MS), ..LimitOptions::default() };
            let mut limits = Limits::begin(&options, || 0.5).expect("limits");

            let (reason, took) = end(false, |cx, moved| limits.poll(cx, moved)).await;

            assert_eq!(reason, CloseReason::MaxAge);
            assert!(took >= 110 * MS, "ripe, and a moment of quiet: {took:?}");
        });
    }

    #[test]
    fn t172_given_an_old_connection_when_it_is_never_quiet_then_it_ends_all_the_same() {
        on_worker(async {
            let span = Span { ripe: 20 * MS, quiet: Duration::from_secs(60), end: 100 * MS };
            let mut age = Age::new(span, Instant::now());

            let ((), took) = end(true, |cx, moved| age.poll(cx, moved)).await;

            assert!(took >= 100 * MS, "{took:?}");
        });
    }
}
