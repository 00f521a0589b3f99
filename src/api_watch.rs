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

use crate::api_client::{Api, ApiError, Wire};
use crate::contact::Contact;
use crate::stats::{WatchFailure, WatchedKind};
use crate::watched::Watchable;

/// From the beginning of a list to its end.
const LIST_TIMEOUT: Duration = Duration::from_secs(120);

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
    /// The server does not know this kind, before it ever listed any.
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
    /// When a list that is under way is given up.
    list_ends: Option<Instant>,
    /// True once a list was complete.
    listed: bool,
    /// Why the next list is not the first.
    relist: Option<WatchFailure>,
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
        let selector = selector.clone();
        let begin = Box::new(move || stream(client.clone(), &selector, read));
        Ok(Self {
            kind: K::watched(),
            stream: begin(),
            begin,
            wire,
            contact: Arc::clone(contact),
            backoff: DefaultBackoff::default(),
            pause_until: None,
            list_ends: None,
            listed: false,
            relist: None,
        })
    }

    /// What is seen next. May be dropped and called again at any time: nothing is lost.
    pub(crate) async fn next(&mut self) -> Sighting<O> {
        if let Some(until) = self.pause_until {
            sleep_until(until).await;
            self.pause_until = None;
        }
        let item = tokio::select! {
            biased;
            item = self.stream.next() => item,
            () = at(self.list_ends) => return self.give_up(WatchFailure::Timeout, "the list does not come to its end"),
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

    fn note(&mut self, sighting: &Sighting<O>) {
        self.backoff.reset();
        match sighting {
            Sighting::Begin => {
                self.list_ends = Some(Instant::now() + LIST_TIMEOUT);
                if let Some(reason) = self.relist.take() {
                    self.contact.line(self.kind).relist(reason);
                }
            }
            Sighting::Complete => {
                self.list_ends = None;
                self.listed = true;
            }
            _ => {}
        }
    }

    fn fail(&mut self, error: &watcher::Error) -> Sighting<O> {
        let reason = reason(error);
        // After these the watch would go on as if nothing were missing: it passes over text that it cannot read, and asks
        // for ever to continue from where it cannot.
        let lost = match error {
            watcher::Error::WatchFailed(_) => reason == WatchFailure::Decode,
            watcher::Error::WatchStartFailed(_) => matches!(reason, WatchFailure::Expired | WatchFailure::Decode),
            _ => false,
        };
        let message = message(error);
        if lost {
            return self.give_up(reason, &message);
        }
        self.put_off(reason);
        match error {
            watcher::Error::InitialListFailed(kube::Error::Api(status)) if status.code == 404 && !self.listed => {
                Sighting::Unknown
            }
            _ => Sighting::Failed(reason, message),
        }
    }

    /// Begins anew, with a list.
    fn give_up(&mut self, reason: WatchFailure, message: &str) -> Sighting<O> {
        self.stream = (self.begin)();
        self.put_off(reason);
        Sighting::Failed(reason, message.to_owned())
    }

    fn put_off(&mut self, reason: WatchFailure) {
        self.contact.line(self.kind).fail(reason);
        self.relist = Some(reason);
        self.list_ends = None;
        let pause = Instant::now() + self.backoff.next().unwrap_or(LIST_TIMEOUT);
        self.pause_until = Some(pause.max(self.wire.retry_at()));
    }
}

fn stream<K: Watchable, O: 'static>(client: Client, selector: &Selector, read: fn(K) -> O) -> Stream<O> {
    let seconds = rand::rng().random_range(selector.seconds.clone());
    // From the server's cache: a quorum read for each node at once is what a large cluster does not live through.
    let mut options = watcher::Config::default().any_semantic().timeout(seconds);
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

/// The word for a failure.
fn reason(error: &watcher::Error) -> WatchFailure {
    match error {
        watcher::Error::WatchError(status) => reason_of_status(status),
        watcher::Error::NoResourceVersion => WatchFailure::Decode,
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => match error {
            kube::Error::Api(status) => reason_of_status(status),
            kube::Error::SerdeError(_) | kube::Error::FromUtf8(_) | kube::Error::LinesCodecMaxLineLengthExceeded => {
                WatchFailure::Decode
            }
            kube::Error::Auth(_) => WatchFailure::Forbidden,
            kube::Error::Service(error) if error.is::<tokio::time::error::Elapsed>() => WatchFailure::Timeout,
            _ => WatchFailure::Unreachable,
        },
    }
}

fn reason_of_status(status: &Status) -> WatchFailure {
    match status.code {
        410 => WatchFailure::Expired,
        429 => WatchFailure::Throttled,
        401 | 403 => WatchFailure::Forbidden,
        _ => WatchFailure::Server,
    }
}

/// The error with its causes, each once: some of kube's name theirs themselves.
fn message(error: &watcher::Error) -> String {
    const LONGEST: usize = 500; // A proxy in between may answer with a page.
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    if let Some((end, _)) = text.char_indices().nth(LONGEST) {
        text.truncate(end);
        text.push('…');
    }
    text
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
    }

    #[test]
    fn given_a_page_as_an_error_when_told_then_it_is_cut() {
        let long = Box::new(Status::failure(&"é".repeat(2_000), "Page"));

        assert!(message(&watcher::Error::WatchError(long)).chars().count() <= 501);
    }
}
