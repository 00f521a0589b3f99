//! How long a connection may last when nobody ends it: silence, half of a silence, age.
//!
//! None of this is on by default but the limit of a half-closed connection, and a connection without limits has no timer.
//! There is one timer for all limits, and it is set anew when it fires, not at each progress.
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

use serde::{Deserialize, Serialize};

use crate::plan::TcpSettings;
use crate::serve::sleep::Sleep;
use crate::serve::worker::sleep_until;
use crate::stats::CloseReason;

/// How long connections may last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
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
    /// None longer than this.
    pub(crate) fn at_most(self, longest: Duration) -> Self {
        Self {
            half_close_timeout: self.half_close_timeout.min(longest),
            idle_timeout: self.idle_timeout.map(|timeout| timeout.min(longest)),
            max_connection_age: self.max_connection_age.map(|age| age.min(longest)),
        }
    }

    /// As a Service wants them.
    pub(crate) fn of_service(self, settings: &TcpSettings) -> Self {
        Self {
            half_close_timeout: settings.half_close_timeout.unwrap_or(self.half_close_timeout),
            idle_timeout: settings.idle_timeout.map_or(self.idle_timeout, |of_service| of_service.0),
            max_connection_age: settings.max_connection_age.map_or(self.max_connection_age, |of_service| of_service.0),
        }
    }
}

/// When bytes last moved.
#[derive(Clone, Copy, Debug)]
struct Progress {
    moved: u64,
    last: Instant,
}

impl Progress {
    /// `moved` is how many have by now. The clock is asked only where these are more.
    fn note(&mut self, moved: u64) {
        if moved != self.moved {
            *self = Self { moved, last: Instant::now() };
        }
    }
}

/// How far a connection is with its limits: what another process needs to end it when it would have ended.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Lived {
    /// Milliseconds since its begin,
    pub(crate) age_ms: u64,
    /// and since something has moved.
    pub(crate) silent_ms: u64,
    /// What it drew for its age (0 to 1).
    #[serde(default)]
    pub(crate) chance: Option<f64>,
}

/// What ends a connection of two peers who would go on. Kept by those that have such limits; all of these have one timer.
pub(crate) struct Limits {
    ends: Ends,
    progress: Progress,
    timer: Sleep,
}

impl Limits {
    /// For a connection that begins now; `None` where it has no limit. `chance` is from 0 to 1.
    pub(crate) fn begin(options: &LimitOptions, chance: impl FnOnce() -> f64) -> Option<Box<Self>> {
        let LimitOptions { idle_timeout, max_connection_age, .. } = *options;
        let span = max_connection_age.map(|limit| Span::new(limit, chance()));
        let begin = Instant::now();
        let ends = Ends { begin, idle_timeout, span };
        let (next, _) = ends.next(begin)?;
        Some(Box::new(Self { ends, progress: Progress { moved: 0, last: begin }, timer: sleep_until(next) }))
    }

    /// For one that has lived a while in another process, and has moved so much; `None` where it has no limit here.
    pub(crate) fn go_on(options: &LimitOptions, lived: Lived, moved: u64) -> Option<Box<Self>> {
        let now = Instant::now();
        let ago = |ms| now.checked_sub(Duration::from_millis(ms)).unwrap_or(now);
        let span = options.max_connection_age.map(|limit| Span::new(limit, lived.chance.unwrap_or_else(rand::random)));
        let ends = Ends { begin: ago(lived.age_ms), idle_timeout: options.idle_timeout, span };
        let progress = Progress { moved, last: ago(lived.silent_ms) };
        let (next, _) = ends.next(progress.last)?;
        Some(Box::new(Self { ends, progress, timer: sleep_until(next) }))
    }

    /// How far it is by now.
    pub(crate) fn lived(&self) -> Lived {
        Lived {
            age_ms: ms_since(self.ends.begin),
            silent_ms: ms_since(self.progress.last),
            chance: self.ends.span.map(|span| span.chance),
        }
    }

    /// Ready with the reason where the connection has to end; `moved` is how many bytes it has moved so far.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, moved: u64) -> Poll<CloseReason> {
        self.progress.note(moved);
        loop {
            ready!(Pin::new(&mut self.timer).poll(cx));
            let Some((end, reason)) = self.ends.next(self.progress.last) else { return Poll::Pending };
            if Instant::now() >= end {
                return Poll::Ready(reason);
            }
            self.timer.reset(end);
        }
    }
}

/// When a connection ends. Pure.
#[derive(Clone, Copy, Debug)]
struct Ends {
    begin: Instant,
    idle_timeout: Option<Duration>,
    span: Option<Span>,
}

impl Ends {
    /// When it ends and why, if nothing moves any more since the last time.
    fn next(&self, last: Instant) -> Option<(Instant, CloseReason)> {
        let idle = self.idle_timeout.map(|limit| (last + limit, CloseReason::Idle));
        let old = self.span.map(|span| (span.end_of(self.begin, last), CloseReason::MaxAge));
        idle.into_iter().chain(old).min_by_key(|(end, _)| *end)
    }
}

/// When a connection is old. Pure.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Span {
    /// What the rest was made of.
    chance: f64,
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
            chance,
            ripe: limit.mul_f64(0.9 + chance.clamp(0.0, 1.0) / 5.0),
            quiet: (limit / 10).min(Self::LONGEST_QUIET),
            end: limit + limit / 4,
        }
    }

    /// For a connection that began then, and has last moved something then.
    fn end_of(&self, begin: Instant, last: Instant) -> Instant {
        (begin + self.ripe).max(last + self.quiet).min(begin + self.end)
    }
}

/// Waits for a time without progress.
pub(crate) struct Silence {
    limit: Duration,
    progress: Progress,
    timer: Sleep,
}

impl Silence {
    /// Counts from now on, where so many bytes have moved.
    pub(crate) fn new(limit: Duration, moved: u64) -> Self {
        let last = Instant::now();
        Self { limit, progress: Progress { moved, last }, timer: sleep_until(last + limit) }
    }

    /// Where nothing has moved for so long already.
    pub(crate) fn go_on(limit: Duration, moved: u64, silent: Duration) -> Self {
        let now = Instant::now();
        let last = now.checked_sub(silent).unwrap_or(now);
        Self { limit, progress: Progress { moved, last }, timer: sleep_until(last + limit) }
    }

    /// For how long nothing has moved.
    pub(crate) fn lasts(&self) -> Duration {
        self.progress.last.elapsed()
    }

    /// Ready when the time has passed.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, moved: u64) -> Poll<()> {
        self.progress.note(moved);
        loop {
            ready!(Pin::new(&mut self.timer).poll(cx));
            let end = self.progress.last + self.limit;
            if Instant::now() >= end {
                return Poll::Ready(());
            }
            self.timer.reset(end);
        }
    }
}

fn ms_since(then: Instant) -> u64 {
    u64::try_from(then.elapsed().as_millis()).unwrap_or(u64::MAX)
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
    fn t234_given_a_connection_of_another_process_when_it_goes_on_then_its_limits_end_when_they_would_have() {
        on_worker(async {
            let options =
                LimitOptions { idle_timeout: Some(600 * MS), max_connection_age: Some(900 * MS), ..Default::default() };
            let moved = Limits::begin(&options, || 0.75).expect("limits");
            let lived = Lived { age_ms: moved.lived().age_ms + 500, silent_ms: 560, ..moved.lived() };
            assert_eq!(lived.chance, Some(0.75));

            let mut limits = Limits::go_on(&options, lived, 7).expect("limits");
            let (reason, took) = end(false, |cx, _| limits.poll(cx, 7)).await;
            assert_eq!(reason, CloseReason::Idle);
            assert!(took < 500 * MS, "{took:?}");

            let mut limits = Limits::go_on(&options, lived, 7).expect("limits");
            let (reason, took) = end(true, |cx, moved| limits.poll(cx, moved)).await;
            assert_eq!(reason, CloseReason::MaxAge);
            assert!(took < 1_000 * MS, "it is half a second old already: {took:?}");

            let mut silence = Silence::go_on(600 * MS, 7, 560 * MS);
            assert!(silence.lasts() >= 560 * MS);
            let ((), took) = end(false, |cx, _| silence.poll(cx, 7)).await;
            assert!(took < 500 * MS, "{took:?}");
            assert!(Limits::go_on(&LimitOptions::default(), lived, 7).is_none());
        });
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
            assert!((100 * MS..125 * MS).contains(&took) || cfg!(debug_assertions) && took >= 100 * MS, "{took:?}");
        });
    }

    #[test]
    fn t172_given_an_old_connection_when_it_is_never_quiet_then_it_ends_all_the_same() {
        on_worker(async {
            let options = LimitOptions {
                idle_timeout: Some(Duration::from_secs(60)),
                max_connection_age: Some(1_000 * MS), // Quiet is a tenth of it, more than a thread waits for a processor.
                ..LimitOptions::default()
            };
            let mut limits = Limits::begin(&options, || 0.0).expect("limits");

            let (reason, took) = end(true, |cx, moved| limits.poll(cx, moved)).await;

            assert_eq!(reason, CloseReason::MaxAge);
            assert!(took >= 1_250 * MS, "{took:?}");
        });
    }

    #[test]
    fn t172_t173_given_both_limits_when_bytes_have_last_moved_then_the_sooner_end_counts() {
        let begin = Instant::now();
        let seconds = |seconds| begin + Duration::from_secs(seconds);
        let hour = Duration::from_secs(3_600);
        let ends = |idle_seconds: Option<u64>| Ends {
            begin,
            idle_timeout: idle_seconds.map(Duration::from_secs),
            span: Some(Span::new(hour, 0.5)),
        };

        assert_eq!(ends(Some(60)).next(begin), Some((seconds(60), CloseReason::Idle)));
        assert_eq!(ends(Some(60)).next(seconds(3_590)), Some((seconds(3_600), CloseReason::MaxAge)), "quiet by then");
        assert_eq!(ends(None).next(begin), Some((seconds(3_600), CloseReason::MaxAge)));
        assert_eq!(ends(None).next(seconds(3_800)), Some((seconds(3_801), CloseReason::MaxAge)), "a second of quiet");
        assert_eq!(ends(None).next(seconds(4_500)), Some((seconds(4_500), CloseReason::MaxAge)), "busy to the end");
        assert_eq!(Ends { begin, idle_timeout: None, span: None }.next(begin), None);
    }

    #[test]
    fn given_a_connection_with_limits_when_it_is_polled_again_and_again_then_its_timer_stays_the_same() {
        on_worker(async {
            let options = LimitOptions { idle_timeout: Some(Duration::from_secs(60)), ..LimitOptions::default() };
            let mut limits = Limits::begin(&options, || 0.0).expect("limits");

            let mut poll = async |moved| {
                let outcome = poll_fn(|cx| Poll::Ready(limits.poll(cx, moved))).await;
                (outcome.is_pending(), limits.timer.number())
            };

            let first = poll(0).await;
            for moved in 1..100 {
                assert_eq!(poll(moved).await, first);
            }

            assert!(first.0 && first.1.is_some());
        });
    }
}
