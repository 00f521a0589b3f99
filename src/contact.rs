//! How an API source does: whether it hears from its server, since when it does not, and how often it began anew.
//!
//! Written by the source (`kubernetes`), read at `/metrics`, `/status` and `/readyz`. Atomics, as those read at any time.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::decode::Kind;
use crate::stats::{Counter, WatchFailure, WatchFailureTally, WatchedKind};
use crate::timestamp::rfc3339;

/// The contact of one relay with its API server. Owned by the source, shared with whoever reads it.
#[derive(Debug)]
pub struct Contact {
    since: Instant,
    /// What the server was told in Events.
    pub events: EventCounts,
    /// When the state was written that is served in place of what the server says, in seconds since 1970; 0: none is.
    saved_at: AtomicU64,
    /// In the order of [`WatchedKind::ALL`].
    lines: [Line; WatchedKind::ALL.len()],
}

/// Events that the cluster was to be told, for people.
#[derive(Debug, Default)]
pub struct EventCounts {
    /// Taken by the server: new ones, and new counts of old ones.
    pub sent: Counter,
    /// Told to nobody: there were too many, or the server refused them.
    pub dropped: Counter,
}

/// What is heard of one kind.
#[derive(Debug, Default)]
pub struct Line {
    /// True where this kind is watched here: a server has either EndpointSlices or Endpoints.
    watched: AtomicBool,
    /// True from the first good answer after a failure to the next failure.
    connected: AtomicBool,
    /// When the server last said something, in milliseconds since the contact was made.
    heard_ms: AtomicU64,
    /// Why everything was listed again.
    relists: WatchFailureTally,
    failures: WatchFailureTally,
}

/// How the contact is at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContactReport {
    /// True where the last thing heard of each kind was no failure.
    pub connected: bool,
    /// How old what is served may be, in seconds: since the server last said something, of the kind where that is longest
    /// ago, or since `saved_at`.
    pub age_seconds: f64,
    /// When the state of an earlier run was written that is served until the server answers, in RFC 3339; absent else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved_at: Option<String>,
}

impl From<Kind> for WatchedKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Service => Self::Service,
            Kind::EndpointSlice => Self::EndpointSlice,
            Kind::Endpoints => Self::Endpoints,
        }
    }
}

impl Default for Contact {
    fn default() -> Self {
        let events = EventCounts::default();
        Self { since: Instant::now(), events, saved_at: AtomicU64::new(0), lines: Default::default() }
    }
}

impl Contact {
    /// The line of a kind.
    pub fn line(&self, kind: WatchedKind) -> &Line {
        &self.lines[usize::from(kind)]
    }

    /// Says that a kind is watched from now on.
    pub fn watch(&self, kind: WatchedKind) {
        let line = self.line(kind);
        line.heard_ms.store(self.now_ms(), Ordering::Relaxed);
        line.watched.store(true, Ordering::Relaxed);
    }

    /// Says that a kind is not watched any more.
    pub fn forget(&self, kind: WatchedKind) {
        self.line(kind).watched.store(false, Ordering::Relaxed);
    }

    /// The server has said something about a kind.
    pub fn hear(&self, kind: WatchedKind) {
        self.line(kind).heard_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// True while what was saved is served.
    pub(crate) fn serves_saved(&self) -> bool {
        self.saved_at.load(Ordering::Relaxed) != 0
    }

    /// What was saved at a moment is served in place of what the server says.
    pub fn serve_saved(&self, at: SystemTime) {
        let seconds = at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.saved_at.store(seconds.max(1), Ordering::Relaxed);
    }

    /// What the server says is served.
    pub fn serve_heard(&self) {
        self.saved_at.store(0, Ordering::Relaxed);
    }

    /// How the contact is now; `None` where nothing is watched.
    pub fn report(&self) -> Option<ContactReport> {
        self.report_at(SystemTime::now())
    }

    fn report_at(&self, wall: SystemTime) -> Option<ContactReport> {
        let watched = || self.lines.iter().filter(|line| line.watched.load(Ordering::Relaxed));
        let oldest_ms = watched().map(|line| line.heard_ms.load(Ordering::Relaxed)).min()?;
        let saved_at = match self.saved_at.load(Ordering::Relaxed) {
            0 => None,
            seconds => Some(UNIX_EPOCH + Duration::from_secs(seconds)),
        };
        let age = match saved_at {
            None => Duration::from_millis(self.now_ms().saturating_sub(oldest_ms)),
            Some(at) => wall.duration_since(at).unwrap_or_default(), // A clock that was set back.
        };
        let connected = watched().all(Line::is_connected);
        Some(ContactReport { connected, age_seconds: age.as_secs_f64(), saved_at: saved_at.map(rfc3339) })
    }

    /// True where the last thing heard of each watched kind was no failure.
    pub fn is_connected(&self) -> bool {
        self.report().is_some_and(|report| report.connected)
    }

    /// True where a kind is watched, and the last thing heard of it was a failure, or nothing yet.
    pub fn is_away(&self, kind: WatchedKind) -> bool {
        let line = self.line(kind);
        line.watched.load(Ordering::Relaxed) && !line.is_connected()
    }

    /// How often each kind was listed again, by reason; reasons that never were are left out.
    pub fn relists(&self) -> impl Iterator<Item = (WatchFailure, u64)> {
        WatchFailure::ALL
            .iter()
            .map(|reason| (*reason, self.lines.iter().map(|line| line.relists.get(*reason)).sum()))
            .filter(|(_, count)| *count > 0)
    }

    /// How often a request or a watch failed, by kind and reason; what never happened is left out.
    pub fn failures(&self) -> impl Iterator<Item = (WatchedKind, WatchFailure, u64)> {
        WatchedKind::ALL
            .iter()
            .flat_map(|kind| WatchFailure::ALL.iter().map(|reason| (*kind, *reason)))
            .map(|(kind, reason)| (kind, reason, self.line(kind).failures.get(reason)))
            .filter(|(_, _, count)| *count > 0)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Line {
    /// A list or a watch was answered well.
    pub fn connect(&self) {
        self.connected.store(true, Ordering::Relaxed);
    }

    /// A request or a watch failed.
    pub fn fail(&self, reason: WatchFailure) {
        self.connected.store(false, Ordering::Relaxed);
        self.failures.count(reason);
    }

    /// Everything was listed again, for this reason.
    pub fn relist(&self, reason: WatchFailure) {
        self.relists.count(reason);
    }

    /// True where the last thing heard was no failure.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// All that is counted: lists that had to be made again, and failures.
    pub(crate) fn tallies(&self) -> (&WatchFailureTally, &WatchFailureTally) {
        let Self { watched: _, connected: _, heard_ms: _, relists, failures } = self;
        (relists, failures)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_two_kinds_when_one_fails_then_nobody_is_connected_until_it_answers_again() {
        let contact = Contact::default();
        assert!(!contact.is_connected(), "nothing is watched yet");
        for kind in [WatchedKind::Service, WatchedKind::EndpointSlice] {
            contact.watch(kind);
            contact.line(kind).connect();
        }
        assert!(contact.is_connected());

        contact.line(WatchedKind::EndpointSlice).fail(WatchFailure::Server);
        assert!(!contact.is_connected());
        contact.line(WatchedKind::EndpointSlice).connect();

        assert!(contact.is_connected());
        assert_eq!(contact.failures().collect::<Vec<_>>(), [(WatchedKind::EndpointSlice, WatchFailure::Server, 1)]);
    }

    #[test]
    fn f2_given_a_saved_state_when_it_is_served_then_its_age_counts_until_the_server_is_heard() {
        let contact = Contact::default();
        contact.watch(WatchedKind::Service);
        let saved = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let report = |wall| contact.report_at(wall).expect("a kind is watched");

        contact.serve_saved(saved);
        let served = report(saved + Duration::from_secs(3_600));
        assert_eq!((served.age_seconds, served.saved_at.as_deref()), (3_600.0, Some("2027-01-15T08:00:00Z")));
        assert_eq!(report(saved - Duration::from_secs(5)).age_seconds, 0.0, "saved in the future");
        contact.serve_heard();

        let heard = report(saved + Duration::from_secs(3_600));
        assert!(heard.age_seconds < 3_000.0 && heard.saved_at.is_none(), "{heard:?}");
    }

    #[test]
    fn given_relists_of_two_kinds_when_read_then_reasons_are_summed() {
        let contact = Contact::default();

        contact.line(WatchedKind::Service).relist(WatchFailure::Expired);
        contact.line(WatchedKind::EndpointSlice).relist(WatchFailure::Expired);

        assert_eq!(contact.relists().collect::<Vec<_>>(), [(WatchFailure::Expired, 2)]);
    }
}
