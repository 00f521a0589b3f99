//! What goes over the connections to an API server: when it last said something, when it wants to be asked again, how soon
//! a watch may follow another, and how long an answer may be.
//!
//! Each watched kind has a [`Client`] of its own, whose [`Wire`] sees all of its traffic. Who we are to the server is `login`,
//! what a body may hold `heard`, what is asked `kubernetes`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use hyper::body::{Bytes, Frame};
use hyper::header::RETRY_AFTER;
use hyper::{Request, Response, Uri};
use kube::Client;
use kube::client::Body;
use rand::RngExt;
use tokio::time::{Instant, sleep_until, timeout};
use tower::{BoxError, Service};

use crate::contact::Contact;
use crate::heard::{Heard, Limit};
use crate::login::Login;
use crate::stats::WatchedKind;

/// From a request to the first byte of its answer. A list of a hundred thousand endpoints takes a server seconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Watches that may follow each other at once; then one in [`WATCH_PACE`]. A proxy in between may cut each as soon as it begins.
const WATCH_BURST: u32 = 3;
/// Time in which one more watch may begin. A server lets them live for about a minute.
const WATCH_PACE: Duration = Duration::from_secs(6);
/// The longest time that a server can make us wait, but for [`RETRY_JITTER`].
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);
/// A server tells all nodes the same time: this part of it may be added, so that they do not come back as one.
const RETRY_JITTER: f64 = 0.2;
/// One event of a watch. A server takes objects of 3 MB, and the largest slice, of a thousand endpoints, is a fifth of that.
const MAX_EVENT_BYTES: usize = 8 << 20;
/// One list. The endpoints of the largest cluster that is supported, 150,000 pods, are a third of that.
const MAX_LIST_BYTES: usize = 256 << 20;
/// One answer that says why not.
const MAX_REFUSAL_BYTES: usize = 1 << 20;

/// A client for one kind of requests: heard by its wire, where it has one, and bounded in time and size.
pub(crate) fn client(login: &Arc<Login>, wire: Option<&Arc<Wire>>) -> Client {
    let (login, wire) = (Arc::clone(login), wire.map(Arc::clone));
    Client::new(Tapped { login, wire, watches: Pace::new(Instant::now()) }, "default")
}

/// What is known of the connection of one kind. Shared by its client and its watch.
#[derive(Debug)]
pub(crate) struct Wire {
    kind: WatchedKind,
    contact: Arc<Contact>,
    since: Instant,
    /// Until when the server wants to be left alone, in milliseconds after `since`.
    retry_ms: AtomicU64,
    heard_bytes: AtomicU64,
}

impl Wire {
    pub(crate) fn new(kind: WatchedKind, contact: Arc<Contact>) -> Self {
        Self { kind, contact, since: Instant::now(), retry_ms: AtomicU64::new(0), heard_bytes: AtomicU64::new(0) }
    }

    /// When the server may be asked again, as far as it has said so.
    pub(crate) fn retry_at(&self) -> Instant {
        self.since + Duration::from_millis(self.retry_ms.load(Ordering::Relaxed))
    }

    /// Bytes of answers so far.
    pub(crate) fn heard_bytes(&self) -> u64 {
        self.heard_bytes.load(Ordering::Relaxed)
    }

    /// A part of a good answer has come.
    pub(crate) fn hear(&self, frame: &Frame<Bytes>) {
        self.contact.hear(self.kind);
        self.heard_bytes.fetch_add(frame.data_ref().map_or(0, |data| data.len() as u64), Ordering::Relaxed);
    }

    /// Keeps to what the answer asks for.
    fn note<B>(&self, response: &Response<B>) {
        if response.status().is_success() {
            self.contact.hear(self.kind);
            self.contact.line(self.kind).connect();
        }
        let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        if let Some(seconds) = seconds.filter(|_| !response.status().is_success()) {
            let until = self.since.elapsed() + patience(seconds, rand::rng().random());
            self.retry_ms.store(u64::try_from(until.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
    }
}

/// How long nothing is asked when the server wants to be left alone for some seconds. `share` of the jitter, 0 to 1.
fn patience(seconds: u64, share: f64) -> Duration {
    Duration::from_secs(seconds).min(MAX_RETRY_AFTER).mul_f64(1.0 + RETRY_JITTER * share)
}

/// Watches that may begin: some at once, then one after the other.
#[derive(Debug)]
struct Pace {
    /// When all of [`WATCH_BURST`] are free again.
    full_at: Instant,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { full_at: now }
    }

    /// When the next one may begin, which is counted as begun.
    fn take(&mut self, now: Instant) -> Instant {
        self.full_at = self.full_at.max(now) + WATCH_PACE;
        (self.full_at - WATCH_PACE * WATCH_BURST).max(now)
    }
}

/// The requests of a client.
struct Tapped {
    login: Arc<Login>,
    wire: Option<Arc<Wire>>,
    watches: Pace,
}

impl Service<Request<Body>> for Tapped {
    type Response = Response<Heard<Body>>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let now = Instant::now();
        let (turn, limit) = if is_watch(request.uri()) {
            (self.watches.take(now), Limit::Line(MAX_EVENT_BYTES))
        } else {
            (now, Limit::Whole(MAX_LIST_BYTES))
        };
        let (login, wire) = (Arc::clone(&self.login), self.wire.clone());
        Box::pin(async move {
            sleep_until(turn).await;
            let response = timeout(ANSWER_TIMEOUT, login.send(request)).await??;
            if let Some(wire) = &wire {
                wire.note(&response);
            }
            let good = response.status().is_success();
            let (wire, limit) = if good { (wire, limit) } else { (None, Limit::Whole(MAX_REFUSAL_BYTES)) };
            Ok(response.map(|body| Heard::new(body, wire, limit)))
        })
    }
}

fn is_watch(uri: &Uri) -> bool {
    uri.query().is_some_and(|query| query.split('&').any(|pair| matches!(pair, "watch=true" | "watch=1")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f3_given_watches_that_end_at_once_when_they_begin_again_then_three_go_and_then_one_in_six_seconds() {
        let start = Instant::now();
        let mut pace = Pace::new(start);

        let waits: Vec<u64> = (0..5).map(|_| (pace.take(start) - start).as_secs()).collect();

        assert_eq!(waits, [0, 0, 0, 6, 12]);
        assert_eq!(pace.take(start + Duration::from_secs(60)), start + Duration::from_secs(60), "forgiven");
    }

    #[test]
    fn f3_given_a_time_to_wait_when_jittered_then_it_is_never_shorter_and_has_an_end() {
        assert_eq!(patience(10, 0.0), Duration::from_secs(10));
        assert_eq!(patience(10, 1.0), Duration::from_secs(12));
        assert_eq!(patience(u64::MAX, 1.0), Duration::from_secs(72));
    }

    #[test]
    fn given_requests_when_looked_at_then_watches_are_told_from_lists() {
        let is_watch = |text: &str| is_watch(&text.parse().expect("an address"));

        assert!(is_watch("/api/v1/services?&watch=true&resourceVersion=1"));
        assert!(!is_watch("/api/v1/services?labelSelector=watch"));
    }
}
