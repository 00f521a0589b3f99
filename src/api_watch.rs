//! The watch of one kind of objects: what a failure means, and when to try again.
//!
//! What is seen is passed on as it comes; what becomes of it is `kubernetes`. The way to the server, its time limits and
//! what it asks for are `api_client`.

use std::future::pending;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use kube::core::Status;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, DefaultBackoff, watcher};
use kube::{Api as Resources, Client};
use rand::RngExt;
use tokio::time::{Instant, sleep_until};

use crate::api_client::{Api, ApiError};
use crate::causes::causes;
use crate::contact::Contact;
use crate::heard::TooLong;
use crate::stats::{WatchFailure, WatchedKind};
use crate::watched::Watchable;
use crate::wire::Wire;

/// What a list has to bring in each second, over as long a time as a watch may live: a hundredth of what a slow network does.
const LIST_BYTES_PER_SECOND: u64 = 10_000;
/// After so many of those times a list is given up, however it moves.
const LIST_SPANS: u32 = 10;
/// Watches that a server refuses one after the other before all is listed anew: what it does not let us continue from, it
/// may not have any more, whatever it calls that.
const REFUSALS: u32 = 3;
/// The longest pause after failures.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Which objects of a kind are asked for, and for how long at a time.
#[derive(Clone, Debug)]
pub(crate) struct Selector {
    /// By labels, as the API writes it: `!a,b=c`.
    pub(crate) labels: Option<String>,
    /// By fields: `metadata.name=worker-1`.
    pub(crate) fields: Option<String>,
    /// Seconds for which the server lets a watch live: one of these.
    pub(crate) seconds: RangeInclusive<u32>,
}

/// What is seen of one kind, whose objects are read as `O`.
#[derive(Debug)]
pub(crate) enum Sighting<O> {
    /// A list begins.
    Begin,
    /// An object of the list.
    Listed(O),
    /// The list is complete.
    Complete,
    /// An object was added or changed.
    Put(O),
    /// An object is gone.
    Gone(O),
    /// A request or the watch failed; it is tried again.
    Failed(WatchFailure, String),
    /// A list failed, as there is no such kind (404): on this server, or where a proxy in between leads.
    Unknown,
}

type Stream<O> = BoxStream<'static, watcher::Result<Sighting<O>>>;

/// The watch of one kind, begun again after each failure.
pub(crate) struct Watch<O> {
    pub(crate) kind: WatchedKind,
    begin: Box<dyn Fn() -> Stream<O> + Send + Sync>,
    stream: Stream<O>,
    wire: Arc<Wire>,
    contact: Arc<Contact>,
    backoff: DefaultBackoff,
    /// Nothing is asked before.
    pause_until: Option<Instant>,
    /// The longest life of a watch: how long a list may take to move on, and how long the server may be away before all is
    /// listed anew.
    span: Duration,
    /// The list that is under way.
    list: Option<Listing>,
    /// True once a list was complete.
    listed: bool,
    /// Why all has to be listed again, until that is done.
    relist: Option<WatchFailure>,
    /// Watches that the server refused one after the other.
    refusals: u32,
    /// Since when no good answer has come, and why not.
    away: Option<(Instant, WatchFailure)>,
}

/// A list that is under way, in one of its spans.
#[derive(Clone, Copy, Debug)]
struct Listing {
    span_ends: Instant,
    spans_left: u32,
    /// What had been heard when the span began.
    heard_bytes: u64,
}

impl<O> std::fmt::Debug for Watch<O> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl<O: 'static> Watch<O> {
    /// Of the objects that `selector` chooses, each reduced by `read` as soon as it is there. Sends nothing yet.
    pub(crate) fn new<K: Watchable>(
        api: &Api,
        selector: &Selector,
        contact: &Arc<Contact>,
        read: fn(K) -> O,
    ) -> Result<Self, ApiError> {
        let (client, wire) = api.client(K::watched(), contact)?;
        let (kind, span) = (K::watched(), Duration::from_secs((*selector.seconds.end()).into()));
        let selector = selector.clone();
        let begin = Box::new(move || stream(client.clone(), &selector, read));
        Ok(Self::of(kind, begin, wire, Arc::clone(contact), span))
    }

    fn of(
        kind: WatchedKind,
        begin: Box<dyn Fn() -> Stream<O> + Send + Sync>,
        wire: Arc<Wire>,
        contact: Arc<Contact>,
        span: Duration,
    ) -> Self {
        Self {
            kind,
            stream: begin(),
            begin,
            wire,
            contact,
            backoff: DefaultBackoff::default(),
            pause_until: None,
            span,
            list: None,
            listed: false,
            relist: None,
            refusals: 0,
            away: None,
        }
    }

    /// What is seen next. May be dropped and called again at any time: nothing is lost.
    pub(crate) async fn next(&mut self) -> Sighting<O> {
        if let Some(until) = self.pause_until {
            sleep_until(until).await;
            self.pause_until = None;
            self.begin_anew_after_an_outage(Instant::now());
        }
        let item = loop {
            tokio::select! {
                biased;
                item = self.stream.next() => break item,
                () = at(self.list.map(|list| list.span_ends)) => {
                    self.list = self.next_span();
                    if self.list.is_none() {
                        return self.give_up(WatchFailure::Timeout, "the list does not come to its end");
                    }
                }
            }
        };
        match item {
            Some(Ok(sighting)) => {
                self.note(&sighting);
                sighting
            }
            Some(Err(error)) => self.fail(&error),
            None => self.give_up(WatchFailure::Decode, "the watch has ended"),
        }
    }

    /// The server is back, as another watch has seen: what waits because nobody answered is asked at once. A server that
    /// has refused is asked when it is to be.
    pub(crate) fn hurry(&mut self) {
        let nobody = matches!(self.away, Some((_, WatchFailure::Unreachable | WatchFailure::Timeout)));
        if let Some(until) = self.pause_until.as_mut().filter(|_| nobody) {
            *until = (*until).min(Instant::now().max(self.wire.retry_at()));
        }
    }

    /// Where the server was away for long, it may be another one that comes back, with a past of its own: the next question
    /// is what there is, not what is new.
    fn begin_anew_after_an_outage(&mut self, now: Instant) {
        let span = self.span;
        if let Some((_, reason)) = self.away.take_if(|(since, _)| now.saturating_duration_since(*since) >= span) {
            self.begin_anew(reason);
        }
    }

    /// With a list.
    fn begin_anew(&mut self, reason: WatchFailure) {
        self.stream = (self.begin)();
        self.relist.get_or_insert(reason);
        self.list = None;
        self.refusals = 0;
    }

    /// The next span of a list that moved on in the last.
    fn next_span(&self) -> Option<Listing> {
        let Listing { spans_left, heard_bytes: before, .. } = self.list?;
        let heard_bytes = self.wire.heard_bytes();
        let moves = heard_bytes - before >= LIST_BYTES_PER_SECOND * self.span.as_secs();
        let span_ends = Instant::now() + self.span;
        (moves && spans_left > 0).then(|| Listing { span_ends, spans_left: spans_left - 1, heard_bytes })
    }

    fn note(&mut self, sighting: &Sighting<O>) {
        match sighting {
            Sighting::Begin => {
                let (span_ends, heard_bytes) = (Instant::now() + self.span, self.wire.heard_bytes());
                self.list = Some(Listing { span_ends, spans_left: LIST_SPANS - 1, heard_bytes });
            }
            Sighting::Complete => {
                self.list = None;
                if let Some(reason) = self.relist.take().filter(|_| self.listed) {
                    self.contact.line(self.kind).relist(reason);
                }
                self.listed = true;
            }
            // A list alone is no sign of health: whatever ends each watch at once would be asked for lists for ever.
            Sighting::Put(_) | Sighting::Gone(_) => {
                self.backoff.reset();
                self.refusals = 0;
            }
            Sighting::Listed(_) | Sighting::Failed(..) | Sighting::Unknown => {}
        }
    }

    fn fail(&mut self, error: &watcher::Error) -> Sighting<O> {
        let (reason, message) = (reason(error), causes(error));
        self.count_refusal(error, reason);
        // After these the watch would go on as if nothing were missing: it passes over text that it cannot read, or that is
        // no event, and asks for ever to continue from where it cannot.
        let lost = match error {
            watcher::Error::WatchFailed(kube::Error::Api(_)) => true,
            watcher::Error::WatchFailed(_) => reason == WatchFailure::Decode,
            watcher::Error::WatchStartFailed(_) => matches!(reason, WatchFailure::Expired | WatchFailure::Decode),
            _ => false,
        };
        if lost || self.refusals >= REFUSALS {
            return self.give_up(reason, &message);
        }
        self.put_off(reason);
        if is_listed_anew(error) {
            self.relist.get_or_insert(reason);
        }
        match error {
            watcher::Error::InitialListFailed(kube::Error::Api(status)) if status.code == 404 => Sighting::Unknown,
            _ => Sighting::Failed(reason, message),
        }
    }

    /// Counts a watch that was refused with a status. One that the server knows a better word for has its own remedy.
    fn count_refusal(&mut self, error: &watcher::Error, reason: WatchFailure) {
        let is_refusal = match error {
            watcher::Error::WatchStartFailed(kube::Error::Api(_)) => {
                if self.contact.line(self.kind).is_connected() {
                    self.refusals = 0; // The one before was answered well.
                }
                true
            }
            watcher::Error::WatchError(_) => true,
            _ => false,
        };
        if is_refusal && reason == WatchFailure::Server {
            self.refusals += 1;
        }
    }

    /// Begins anew, with a list.
    fn give_up(&mut self, reason: WatchFailure, message: &str) -> Sighting<O> {
        self.begin_anew(reason);
        self.put_off(reason);
        Sighting::Failed(reason, message.to_owned())
    }

    fn put_off(&mut self, reason: WatchFailure) {
        let (line, now, span) = (self.contact.line(self.kind), Instant::now(), self.span);
        if line.is_connected() {
            self.away = None;
        }
        if matches!(reason, WatchFailure::Throttled | WatchFailure::Forbidden) {
            // Who refuses is there: the outage is over, and only a long one is remembered.
            self.away.take_if(|(since, _)| now.saturating_duration_since(*since) < span);
        } else {
            self.away.get_or_insert((now, reason));
        }
        line.fail(reason);
        self.list = None;
        let pause = Instant::now() + self.backoff.next().unwrap_or(LONGEST_PAUSE);
        self.pause_until = Some(pause.max(self.wire.retry_at()));
    }
}

fn stream<K: Watchable, O: 'static>(client: Client, selector: &Selector, read: fn(K) -> O) -> Stream<O> {
    let seconds = rand::rng().random_range(selector.seconds.clone());
    // From the server's cache: a quorum read for each node at once is what a large cluster does not live through.
    // Only a list without a limit is one: with pages, `kube` leaves out the `resourceVersion=0` that asks for the cache.
    let mut options = watcher::Config { page_size: None, ..watcher::Config::default() }.any_semantic().timeout(seconds);
    options.label_selector = selector.labels.clone();
    options.field_selector = selector.fields.clone();
    let sighting = move |event| match event {
        watcher::Event::Init => Sighting::Begin,
        watcher::Event::InitApply(object) => Sighting::Listed(read(object)),
        watcher::Event::InitDone => Sighting::Complete,
        watcher::Event::Apply(object) => Sighting::Put(read(object)),
        watcher::Event::Delete(object) => Sighting::Gone(read(object)),
    };
    watcher(Resources::<K>::all(client), options).map(move |event| event.map(sighting)).boxed()
}

/// True where `kube` goes on with a list by itself.
fn is_listed_anew(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(_) | watcher::Error::NoResourceVersion => true,
        watcher::Error::WatchError(status) => reason_of_status(status) == WatchFailure::Expired,
        watcher::Error::WatchStartFailed(_) | watcher::Error::WatchFailed(_) => false,
    }
}

/// The word for a failure.
fn reason(error: &watcher::Error) -> WatchFailure {
    if is_too_long(error) {
        return WatchFailure::Decode;
    }
    match error {
        watcher::Error::WatchError(status) => reason_of_status(status),
        watcher::Error::NoResourceVersion => WatchFailure::Decode,
        // To `kube`, any object that is no event is a status, of which each field may be missing.
        watcher::Error::WatchFailed(kube::Error::Api(status)) if status.code == 0 => WatchFailure::Decode,
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => reason_of_request(error),
    }
}

/// The word for a request that failed.
pub(crate) fn reason_of_request(error: &kube::Error) -> WatchFailure {
    match error {
        kube::Error::Api(status) => reason_of_status(status),
        kube::Error::SerdeError(_) | kube::Error::FromUtf8(_) | kube::Error::LinesCodecMaxLineLengthExceeded => {
            WatchFailure::Decode
        }
        kube::Error::Auth(_) => WatchFailure::Forbidden,
        kube::Error::Service(error) if error.is::<tokio::time::error::Elapsed>() => WatchFailure::Timeout,
        _ => WatchFailure::Unreachable,
    }
}

fn is_too_long(error: &watcher::Error) -> bool {
    let mut causes = std::iter::successors(std::error::Error::source(error), |&cause| cause.source());
    causes.any(|cause| cause.is::<TooLong>())
}

fn reason_of_status(status: &Status) -> WatchFailure {
    match status.code {
        410 => WatchFailure::Expired,
        429 => WatchFailure::Throttled,
        401 | 403 => WatchFailure::Forbidden,
        _ => WatchFailure::Server,
    }
}

/// Waits for ever where there is nothing to wait for.
pub(crate) async fn at(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => pending().await,
    }
}

#[cfg(test)]
mod tests {
    use hyper::body::Frame;

    use super::*;

    fn status(code: u16) -> Box<Status> {
        Box::new(Status { code, ..Status::failure("no", "No") })
    }

    #[test]
    fn given_failures_when_named_then_each_has_the_word_that_an_operator_looks_for() {
        let cases = [
            (410, WatchFailure::Expired),
            (429, WatchFailure::Throttled),
            (403, WatchFailure::Forbidden),
            (500, WatchFailure::Server),
        ];

        for (code, word) in cases {
            assert_eq!(reason(&watcher::Error::WatchError(status(code))), word);
            assert_eq!(reason(&watcher::Error::WatchStartFailed(kube::Error::Api(status(code)))), word);
        }
        assert_eq!(reason(&watcher::Error::NoResourceVersion), WatchFailure::Decode);
        assert_eq!(reason(&watcher::Error::WatchFailed(kube::Error::Api(status(0)))), WatchFailure::Decode);
        assert_eq!(reason(&watcher::Error::WatchFailed(kube::Error::Api(status(410)))), WatchFailure::Expired);
    }

    fn watch() -> Watch<()> {
        let contact = Arc::new(Contact::default());
        let wire = Arc::new(Wire::new(WatchedKind::Service, Arc::clone(&contact)));
        let begin = Box::new(|| futures_util::stream::pending().boxed());
        Watch::of(WatchedKind::Service, begin, wire, contact, Duration::from_secs(60))
    }

    /// How often a server is asked in ten minutes that lets each try get as far as `seen` and then fails, and the longest
    /// pause.
    fn tries_in_ten_minutes(seen: &[Sighting<()>], error: &watcher::Error) -> (u32, Duration) {
        let (mut watch, mut tries, mut time, mut longest) = (watch(), 0, Duration::ZERO, Duration::ZERO);
        while time < Duration::from_secs(600) {
            seen.iter().for_each(|sighting| watch.note(sighting));
            watch.fail(error);
            let pause = watch.pause_until.expect("a pause after a failure").saturating_duration_since(Instant::now());
            (tries, time, longest) = (tries + 1, time + pause, longest.max(pause));
        }
        (tries, longest)
    }

    #[test]
    fn f1_f3_given_a_server_that_goes_on_failing_when_asked_then_it_is_less_and_less_often() {
        let storm = watcher::Error::InitialListFailed(kube::Error::Api(status(500)));
        let expired = watcher::Error::WatchError(status(410));

        for (seen, error) in [(&[Sighting::Begin][..], storm), (&[Sighting::Begin, Sighting::Complete], expired)] {
            let (tries, longest) = tries_in_ten_minutes(seen, &error);
            assert!((15..100).contains(&tries), "{tries}: of three kinds that is less than one in 2 s; {error}");
            assert!(longest <= 2 * LONGEST_PAUSE, "{longest:?}; {error}");
        }
    }

    #[test]
    fn f3_given_changes_that_come_when_a_watch_fails_then_it_is_tried_again_soon() {
        let mut watch = watch();
        let error = watcher::Error::WatchError(status(500));
        (0..10).for_each(|_| drop(watch.fail(&error)));

        watch.note(&Sighting::Put(()));
        watch.fail(&error);

        let pause = watch.pause_until.expect("a pause after a failure").saturating_duration_since(Instant::now());
        assert!(pause < Duration::from_secs(2), "{pause:?}");
    }

    fn refused(code: u16) -> watcher::Error {
        watcher::Error::WatchStartFailed(kube::Error::Api(status(code)))
    }

    #[test]
    fn f3_given_watches_that_are_refused_when_it_is_the_third_in_a_row_then_all_is_listed_anew() {
        for (codes, anew) in [([500; 3], true), ([429; 3], false), ([403; 3], false), ([500, 429, 500], false)] {
            let mut watch = watch();

            codes.into_iter().for_each(|code| drop(watch.fail(&refused(code))));

            assert_eq!(watch.relist.is_some(), anew, "{codes:?}");
        }
        let mut watch = watch();
        for _ in 0..6 {
            watch.contact.line(watch.kind).connect();
            watch.fail(&refused(500));
        }
        assert_eq!(watch.relist, None, "not in a row");
    }

    #[test]
    fn t226_given_an_outage_when_it_was_as_long_as_a_watch_may_live_then_all_is_listed_anew() {
        let gone = || watcher::Error::WatchStartFailed(kube::Error::Service("refused".into()));
        let later = |seconds| Instant::now() + Duration::from_secs(seconds);
        let mut watch = watch();
        watch.fail(&gone());
        watch.fail(&gone());

        watch.begin_anew_after_an_outage(later(58));
        assert_eq!(watch.relist, None);
        watch.contact.line(watch.kind).connect();
        watch.fail(&gone());
        watch.begin_anew_after_an_outage(later(58));
        assert_eq!(watch.relist, None, "it was back");
        watch.fail(&refused(429));
        watch.begin_anew_after_an_outage(later(61));
        assert_eq!(watch.relist, None, "it is there, and has too much to do");
        watch.fail(&gone());
        watch.begin_anew_after_an_outage(later(61));

        assert_eq!(watch.relist, Some(WatchFailure::Unreachable));
    }

    #[test]
    fn t226_given_a_pause_when_the_server_is_back_then_it_is_over_where_nobody_had_answered() {
        let gone = || watcher::Error::WatchStartFailed(kube::Error::Service("refused".into()));
        for (error, over) in [(gone(), true), (refused(500), false), (refused(429), false), (refused(403), false)] {
            let mut watch = watch();
            watch.fail(&error);

            watch.hurry();

            let until = watch.pause_until.expect("a pause after a failure");
            assert_eq!(until <= Instant::now(), over, "{error}");
        }
        let mut watch = watch();
        watch.hurry();
        assert_eq!(watch.pause_until, None, "there is no pause to end");
    }

    #[test]
    fn given_lists_when_they_fail_and_then_come_to_their_end_then_only_that_counts_with_what_made_it_necessary() {
        let mut watch = watch();
        let relists = |watch: &Watch<()>| watch.contact.relists().collect::<Vec<_>>();
        let list_failed = || watcher::Error::InitialListFailed(kube::Error::Api(status(500)));
        watch.fail(&list_failed());
        watch.note(&Sighting::Complete);
        assert!(relists(&watch).is_empty(), "the first is not again");

        watch.fail(&watcher::Error::WatchError(status(410)));
        watch.note(&Sighting::Begin);
        watch.fail(&list_failed());
        assert!(relists(&watch).is_empty());
        watch.note(&Sighting::Begin);
        watch.note(&Sighting::Complete);

        assert_eq!(relists(&watch), [(WatchFailure::Expired, 1)]);
    }

    #[test]
    fn f5_given_a_list_when_a_minute_is_over_then_it_goes_on_while_it_moves_but_not_for_ever() {
        let mut watch = watch();
        assert!(watch.next_span().is_none(), "there is no list");
        watch.note(&Sighting::Begin);
        assert!(watch.next_span().is_none(), "nothing came");

        for _ in 1..LIST_SPANS {
            watch.wire.hear(&Frame::data(vec![0; 600_000].into()));
            watch.list = watch.next_span();
            assert!(watch.list.is_some(), "it moves");
        }
        watch.wire.hear(&Frame::data(vec![0; 600_000].into()));
        assert!(watch.next_span().is_none(), "ten minutes");
    }
}
