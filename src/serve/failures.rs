//! Listeners that should run and could not be bound: why, and when to try again.
//!
//! Pure: errors and the time are arguments. Who binds is `listeners`, who tells people is `control`.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::{Duration, Instant};

use crate::name::{ListenKey, ServicePortName};
use crate::plan::Listener;
use crate::vips::Hold;

/// An address in use may have been ours until now: a child that is being started has copies of all sockets until it runs its
/// own program. That takes a millisecond or two, or longer where many others want the processors. So it is tried again after
/// each of these before anybody is told,
const UNTIL_CHILDREN_RUN: [Duration; 3] =
    [Duration::from_millis(5), Duration::from_millis(20), Duration::from_millis(80)];
/// where sockets were closed here so lately. Whatever else is in use is somebody else's.
const CLOSED_LATELY: Duration = Duration::from_secs(1);
/// A failed bind is tried again after this time at first,
const FIRST_RETRY: Duration = Duration::from_millis(500);
/// and never later than this: a port that becomes free is taken within 5 s.
const LAST_RETRY: Duration = Duration::from_secs(4);

/// An address could not be listened on. Its Service's other listeners are not affected.
#[derive(Debug, thiserror::Error)]
#[error("{service}: cannot listen on {key}")]
pub struct BindError {
    /// Whose listener it is.
    pub service: ServicePortName,
    /// Where it should be.
    pub key: ListenKey,
    /// What the kernel said.
    pub source: io::Error,
}

/// How long to wait for the next try to bind, after one that was `waited` for, or the first one.
pub(crate) fn next_wait(waited: Option<Duration>) -> Duration {
    waited.map_or(FIRST_RETRY, |waited| (waited * 2).clamp(FIRST_RETRY, LAST_RETRY))
}

/// How long to wait where a child of ours may have the address still; `None` where it has not.
fn wait_for_children(error: &io::Error, waited: Option<Duration>) -> Option<Duration> {
    if error.kind() != io::ErrorKind::AddrInUse {
        return None;
    }
    let Some(waited) = waited else { return UNTIL_CHILDREN_RUN.first().copied() };
    let mut waits = UNTIL_CHILDREN_RUN.into_iter().skip_while(|wait| *wait != waited);
    waits.nth(1)
}

/// All failed listeners. Owned by `Listeners`, by value.
#[derive(Debug, Default)]
pub(super) struct Failures {
    by_key: BTreeMap<ListenKey, Failure>,
    news: BTreeSet<ListenKey>,
    /// When a listener's sockets were last closed.
    last_closed: Option<Instant>,
}

#[derive(Debug)]
struct Failure {
    wanted: Listener,
    /// Its address stays required until it is bound or forgotten: who makes addresses local tries by times of its own, and
    /// counts those that are missing.
    hold: Option<Hold>,
    error: BindError,
    /// Nobody is told: the next try is soon, and may well go better.
    silent: bool,
    wait: Duration,
    due: Instant,
}

/// A listener whose time has come.
#[derive(Debug)]
pub(super) struct Due {
    pub(super) key: ListenKey,
    /// What it is to be by now.
    pub(super) wanted: Listener,
    /// What it holds of its address since the last try. To be kept until the next one has its own.
    pub(super) hold: Option<Hold>,
    /// How long it had to wait since the last try.
    pub(super) waited: Duration,
}

impl Failures {
    /// Notes that a listener could not be bound. One that has `waited` for this try waits twice as long for the next, and
    /// so long it has the `hold` of its address.
    pub(super) fn note(
        &mut self,
        key: ListenKey,
        wanted: Listener,
        hold: Option<Hold>,
        source: io::Error,
        waited: Option<Duration>,
        now: Instant,
    ) {
        let closed_lately = self.last_closed.is_some_and(|at| now.saturating_duration_since(at) < CLOSED_LATELY);
        let soon = wait_for_children(&source, waited).filter(|_| closed_lately);
        let (silent, wait) = (soon.is_some(), soon.unwrap_or_else(|| next_wait(waited)));
        let error = BindError { service: wanted.port.clone(), key, source };
        self.by_key.insert(key, Failure { wanted, hold, error, silent, wait, due: now + wait });
        self.news.insert(key);
    }

    /// Notes that a listener's sockets were closed here.
    pub(super) fn note_closed(&mut self, now: Instant) {
        self.last_closed = Some(now);
    }

    /// Has a failed listener come up in another way than it failed; gives `wanted` back where it has not failed.
    pub(super) fn want(&mut self, key: &ListenKey, wanted: Listener) -> Option<Listener> {
        let Some(failure) = self.by_key.get_mut(key) else { return Some(wanted) };
        failure.error.service = wanted.port.clone();
        failure.wanted = wanted;
        self.news.insert(*key);
        None
    }

    /// Nobody wants this listener any more.
    pub(super) fn forget(&mut self, key: &ListenKey) {
        if self.by_key.remove(key).is_some() {
            self.news.insert(*key);
        }
    }

    /// Nobody wants any of them any more.
    pub(super) fn forget_all(&mut self) {
        self.news.extend(std::mem::take(&mut self.by_key).into_keys());
    }

    /// The error of the last try; `None` also where the next one comes so soon that nobody is told.
    pub(super) fn get(&self, key: &ListenKey) -> Option<&BindError> {
        self.by_key.get(key).filter(|failure| !failure.silent).map(|failure| &failure.error)
    }

    /// When the next one is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.by_key.values().map(|failure| failure.due).min()
    }

    /// What these listeners failed for is mended, it seems: they are due, and if they fail again it is a new case.
    pub(super) fn hasten(&mut self, concerns: impl Fn(&ListenKey) -> bool, now: Instant) {
        for (_, failure) in self.by_key.iter_mut().filter(|(key, _)| concerns(key)) {
            (failure.due, failure.wait) = (now, Duration::ZERO);
        }
    }

    /// Takes those out that are due: each is to be bound, or noted again.
    pub(super) fn take_due(&mut self, now: Instant) -> Vec<Due> {
        let keys: Vec<_> = self.by_key.iter().filter(|(_, failure)| failure.due <= now).map(|(key, _)| *key).collect();
        self.news.extend(&keys);
        let take = |key| {
            let Failure { wanted, hold, wait, .. } = self.by_key.remove(&key)?;
            Some(Due { key, wanted, hold, waited: wait })
        };
        keys.into_iter().filter_map(take).collect()
    }

    /// The keys that failed, failed again or do not fail any more since this was asked last.
    pub(super) fn take_news(&mut self) -> BTreeSet<ListenKey> {
        std::mem::take(&mut self.news)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::name::{ObjectName, Protocol, Scope};
    use crate::plan::{ListenerKind, Side, Target, Verdict};
    use crate::vips::Lease;

    fn key(host: u8) -> ListenKey {
        ListenKey::new([127, 0, 0, host].into(), 80, Protocol::Tcp)
    }

    fn listener(service: &str) -> Listener {
        let side = Side { scope: Scope::Cluster, verdict: Verdict::Serve };
        Listener {
            port: ServicePortName::new(ObjectName::parse(service), "http", Protocol::Tcp),
            kind: ListenerKind::ClusterIp,
            allocated: false,
            target: Target { outside: side, inside: side },
            source_ranges: Default::default(),
            allow_from: None,
            proxy_protocol: None,
            udp: Default::default(),
        }
    }

    fn failed() -> io::Error {
        io::ErrorKind::AddrNotAvailable.into()
    }

    #[test]
    fn f32_given_a_listener_that_fails_again_and_again_when_tried_then_waits_double_to_four_seconds() {
        let (mut failures, mut now) = (Failures::default(), Instant::now());
        failures.note(key(1), listener("web"), None, failed(), None, now);
        let mut waits = Vec::new();

        for _ in 0..5 {
            now = failures.next_due().expect("one failed");
            for Due { key, wanted, hold, waited } in failures.take_due(now) {
                waits.push(waited.as_millis());
                failures.note(key, wanted, hold, failed(), Some(waited), now);
            }
        }

        assert_eq!(waits, [500, 1_000, 2_000, 4_000, 4_000]);
    }

    #[test]
    fn f32_given_an_address_that_was_ours_when_it_is_in_use_then_it_is_tried_three_times_before_anybody_is_told() {
        let (mut failures, mut now) = (Failures::default(), Instant::now());
        let in_use = || io::Error::from(io::ErrorKind::AddrInUse);
        failures.note(key(2), listener("other"), None, in_use(), None, now);
        assert!(failures.get(&key(2)).is_some(), "it was never ours");
        failures.forget(&key(2));
        failures.note_closed(now);
        failures.note(key(1), listener("web"), None, in_use(), None, now);
        let mut waits = Vec::new();

        for _ in 0..5 {
            let is_told = failures.get(&key(1)).is_some();
            now = failures.next_due().expect("one failed");
            for Due { key, wanted, hold, waited } in failures.take_due(now) {
                waits.push((waited.as_millis(), is_told));
                failures.note(key, wanted, hold, in_use(), Some(waited), now);
            }
        }

        assert_eq!(waits, [(5, false), (20, false), (80, false), (500, true), (1_000, true)]);
    }

    #[test]
    fn given_two_failures_when_one_is_due_then_it_alone_is_tried() {
        let (mut failures, now) = (Failures::default(), Instant::now());
        failures.note(key(1), listener("web"), None, failed(), None, now);
        failures.note(key(2), listener("web"), None, failed(), Some(FIRST_RETRY), now);

        let due: Vec<_> = failures.take_due(now + FIRST_RETRY).into_iter().map(|due| due.key).collect();

        assert_eq!(due, [key(1)]);
        assert_eq!(failures.next_due(), Some(now + 2 * FIRST_RETRY));
    }

    #[test]
    fn f31_given_a_failure_that_waits_long_when_its_address_comes_then_it_is_due_and_waits_as_at_first() {
        let (mut failures, now) = (Failures::default(), Instant::now());
        failures.note(key(1), listener("web"), None, failed(), Some(LAST_RETRY), now);
        failures.note(key(2), listener("web"), None, failed(), Some(LAST_RETRY), now);

        failures.hasten(|failed| *failed == key(1), now);

        let [Due { key, wanted, hold, waited }] = failures.take_due(now).try_into().expect("one is due");
        failures.note(key, wanted, hold, failed(), Some(waited), now);
        assert_eq!(failures.next_due(), Some(now + FIRST_RETRY));
    }

    #[test]
    fn given_changes_of_failures_when_asked_for_news_then_each_key_is_told_once() {
        let mut failures = Failures::default();
        failures.note(key(1), listener("web"), None, failed(), None, Instant::now());
        failures.note(key(2), listener("web"), None, failed(), None, Instant::now());
        assert_eq!(failures.take_news(), [key(1), key(2)].into());
        assert!(failures.take_news().is_empty());

        assert!(failures.want(&key(1), listener("other")).is_none());
        assert!(failures.want(&key(3), listener("other")).is_some());
        failures.forget(&key(2));
        failures.forget(&key(3));

        assert_eq!(failures.take_news(), [key(1), key(2)].into());
        assert_eq!(
            failures.get(&key(1)).expect("failed").to_string(),
            "default/other:http: cannot listen on 127.0.0.1:80/TCP"
        );
    }

    #[test]
    fn given_failures_that_hold_their_addresses_when_tried_or_forgotten_then_only_the_first_is_still_held() {
        let (mut failures, now) = (Failures::default(), Instant::now());
        let holds = [1, 2, 3].map(|host| Lease::of_nobody([10, 96, 0, host].into()));
        let held: Vec<_> = holds.iter().map(Arc::downgrade).collect();
        let is_held = || held.iter().map(|hold| hold.strong_count() > 0).collect::<Vec<_>>();
        for (host, hold) in (1..).zip(holds) {
            failures.note(key(host), listener("web"), Some(hold), failed(), None, now);
        }
        assert_eq!(is_held(), [true; 3]);
        assert!(failures.want(&key(1), listener("other")).is_none());

        failures.forget(&key(2));
        let now = now + FIRST_RETRY;
        for Due { key, wanted, hold, waited } in failures.take_due(now) {
            if key == self::key(1) {
                failures.note(key, wanted, hold, failed(), Some(waited), now);
            }
        }
        assert_eq!(is_held(), [true, false, false]);

        failures.forget_all();
        assert_eq!(is_held(), [false; 3]);
    }
}
