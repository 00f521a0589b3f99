//! The API source: Services and their endpoints as an API server tells them, for as long as it takes.
//!
//! Here is what is watched, what a failure means and when to try again. The way to the server is `api_client`, what of its
//! objects is in use `mirror`, how it does is read in `contact`. Nothing is taken out of use because the server is away: the
//! last state stays until a complete new one is there.

use std::future::pending;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use kube::core::Status;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, DefaultBackoff, watcher};
use kube::{Api as Resources, Client};
use rand::RngExt;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::api_client::{Api, ApiError, Wire};
use crate::contact::Contact;
use crate::control::Message;
use crate::decode::{Kind, Observed};
use crate::last_good;
use crate::mirror::Mirror;
use crate::model::{Event, Objects};
use crate::plan::Problem;
use crate::stats::WatchFailure;
use crate::status::SourceStatus;
use crate::watched::{EndpointSlices, Endpoints, Services, Watchable, Watched};

/// Seconds for which a server lets a watch live. Drawn for each, so that a thousand nodes do not come back at once; short,
/// as a connection that broke without a word is noticed 5 s later.
const WATCH_SECONDS: std::ops::RangeInclusive<u32> = 48..=60;
/// From the beginning of a list to its end.
const LIST_TIMEOUT: Duration = Duration::from_secs(120);
/// How often a log line says that the server is still away.
const OUTAGE_NEWS: Duration = Duration::from_secs(60);
/// How often it is looked whether the server is back: a watch that goes on without news says nothing by itself.
const OUTAGE_LOOK: Duration = Duration::from_secs(1);

/// How long the server may take at the start before the state of the last run is served.
const SAVED_AFTER: Duration = Duration::from_millis(500);
/// How often the state is saved, where it changed.
const SAVE_INTERVAL: Duration = Duration::from_secs(10);

/// Which objects are taken, and where the last of them are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Folder of the state that is served when the server is away at the start; `None`: no such state. From `--state-dir`.
    pub state_dir: Option<PathBuf>,
    /// Services with this value of the label `service.kubernetes.io/service-proxy-name`; `None`: those without the label.
    /// From `--proxy-name`.
    pub proxy_name: Option<String>,
}

/// The source, ready to begin. Owned by the task of [`run`].
#[derive(Debug)]
pub struct Source {
    /// Of Services and of EndpointSlices.
    watches: [Watch; 2],
    /// In place of slices, where the server has none.
    old_endpoints: Option<Watch>,
    contact: Arc<Contact>,
    server: String,
    /// The file with the last state.
    saved: Option<PathBuf>,
}

impl Source {
    /// Prepares the watches of Services and EndpointSlices. Sends nothing.
    ///
    /// # Errors
    /// Where the credentials cannot be used.
    pub fn new(api: &Api, selection: &Selection, contact: Arc<Contact>) -> Result<Self, ApiError> {
        let services = labels_of_services(selection);
        let endpoints = || "!service.kubernetes.io/headless".to_owned();
        let watches = [
            Watch::new::<Services>(api, services, &contact)?,
            Watch::new::<EndpointSlices>(api, endpoints(), &contact)?,
        ];
        let old_endpoints = Some(Watch::new::<Endpoints>(api, endpoints(), &contact)?);
        Ok(Self {
            watches,
            old_endpoints,
            contact,
            server: api.server(),
            saved: selection.state_dir.as_deref().map(last_good::path),
        })
    }
}

fn labels_of_services(selection: &Selection) -> String {
    const LABEL: &str = "service.kubernetes.io/service-proxy-name";
    match &selection.proxy_name {
        Some(name) => format!("{LABEL}={name}"),
        None => format!("!{LABEL}"),
    }
}

/// Follows the API server until `cancel`.
///
/// Sends `Synced` once Services and endpoints have both been listed, then each change; what was deleted while the server
/// could not be reached, together with all else that changed, when it can.
pub async fn run(source: Source, messages: mpsc::Sender<Message>, cancel: CancellationToken) {
    tokio::select! {
        biased;
        () = cancel.cancelled() => {}
        () = follow(source, messages) => {}
    }
}

/// Ends when nobody listens any more.
async fn follow(source: Source, messages: mpsc::Sender<Message>) {
    let Source { watches: [mut services, mut endpoints], mut old_endpoints, contact, server, saved } = source;
    tracing::info!(server, "asking the API server");
    [&services, &endpoints].into_iter().for_each(|watch| contact.watch(watch.kind));
    let mirrors = [&services, &endpoints].map(|watch| Mirror::new(watch.kind));
    let (status, outage) = (SourceStatus { kind: "kubernetes".into(), ..SourceStatus::default() }, None);

    let mut report = Report {
        messages,
        contact: Arc::clone(&contact),
        server,
        mirrors,
        listed: [false; 2],
        status,
        outage,
        changed: false,
    };
    let (mut save, start) = (Keeper { path: saved, due: None, running: None }, Instant::now());
    let mut serve_saved = save.path.clone();
    loop {
        let took = tokio::select! {
            sighting = services.next() => report.take(0, sighting).await,
            sighting = endpoints.next() => match (sighting, old_endpoints.take()) {
                (Sighting::Unknown, Some(old)) => {
                    tracing::warn!(
                        server = report.server,
                        "the API server has no discovery.k8s.io/v1 (before 1.21): reading Endpoints, of which it cuts \
                         those with more than 1,000 addresses"
                    );
                    contact.forget(endpoints.kind);
                    contact.watch(old.kind);
                    (endpoints, report.mirrors[1]) = (old, Mirror::new(Kind::Endpoints));
                    Ok(())
                }
                (sighting, old) => {
                    old_endpoints = old;
                    report.take(1, sighting).await
                }
            },
            () = tokio::time::sleep(OUTAGE_LOOK), if report.outage.is_some() => report.look().await,
            () = sleep_until(start + SAVED_AFTER), if serve_saved.is_some() => {
                report.serve_saved(serve_saved.take()).await
            }
            () = at(save.due) => {
                save.save(report.objects());
                Ok(())
            }
        };
        if took.is_err() {
            return;
        }
        if report.synced() {
            serve_saved = None;
            save.note(std::mem::take(&mut report.changed));
        }
    }
}

/// What is seen of one kind.
#[derive(Debug)]
enum Sighting {
    /// A list begins.
    Begin,
    /// An object of the list.
    Listed(Observed),
    /// The list is complete.
    Complete,
    /// An object was added or changed.
    Put(Observed),
    /// An object is gone.
    Gone(Observed),
    /// A request or the watch failed; it is tried again.
    Failed(WatchFailure, String),
    /// The server does not know this kind, before it ever listed any.
    Unknown,
}

type Stream = BoxStream<'static, watcher::Result<Sighting>>;

/// The watch of one kind, begun again after each failure.
struct Watch {
    kind: Kind,
    begin: Box<dyn Fn() -> Stream + Send + Sync>,
    stream: Stream,
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

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl Watch {
    fn new<T: Watchable>(api: &Api, labels: String, contact: &Arc<Contact>) -> Result<Self, ApiError> {
        let (client, wire) = api.client(T::KIND, contact)?;
        let begin = Box::new(move || stream::<T>(client.clone(), &labels));
        Ok(Self {
            kind: T::KIND,
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
    async fn next(&mut self) -> Sighting {
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

    fn note(&mut self, sighting: &Sighting) {
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

    fn fail(&mut self, error: &watcher::Error) -> Sighting {
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
    fn give_up(&mut self, reason: WatchFailure, message: &str) -> Sighting {
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

fn stream<T: Watchable>(client: Client, labels: &str) -> Stream {
    let seconds = rand::rng().random_range(WATCH_SECONDS);
    // From the server's cache: a quorum read for each node at once is what a large cluster does not live through.
    let options = watcher::Config::default().labels(labels).any_semantic().timeout(seconds);
    watcher(Resources::<Watched<T>>::all(client), options).map(|event| event.map(Sighting::from)).boxed()
}

impl<T> From<watcher::Event<Watched<T>>> for Sighting {
    fn from(event: watcher::Event<Watched<T>>) -> Self {
        match event {
            watcher::Event::Init => Self::Begin,
            watcher::Event::InitApply(object) => Self::Listed(object.observed),
            watcher::Event::InitDone => Self::Complete,
            watcher::Event::Apply(object) => Self::Put(object.observed),
            watcher::Event::Delete(object) => Self::Gone(object.observed),
        }
    }
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
async fn at(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => pending().await,
    }
}

/// What was said to the control task, and to the log.
struct Report {
    messages: mpsc::Sender<Message>,
    contact: Arc<Contact>,
    server: String,
    /// Of Services and of endpoints.
    mirrors: [Mirror; 2],
    /// Which of them have been listed completely.
    listed: [bool; 2],
    status: SourceStatus,
    outage: Option<Outage>,
    /// True where objects changed since they were last to be saved.
    changed: bool,
}

/// A time without contact.
struct Outage {
    since: Instant,
    told: Instant,
    failures: u64,
    error: String,
}

type Sent = Result<(), mpsc::error::SendError<Message>>;

impl Report {
    async fn take(&mut self, place: usize, sighting: Sighting) -> Sent {
        let mirror = &mut self.mirrors[place];
        let events = match sighting {
            Sighting::Begin => {
                mirror.begin();
                return Ok(());
            }
            Sighting::Listed(observed) => {
                mirror.list(observed);
                return Ok(());
            }
            Sighting::Failed(reason, error) => {
                self.fail(place, reason, error);
                return self.tell().await;
            }
            Sighting::Unknown => {
                self.fail(place, WatchFailure::Server, "the server does not know this kind (404)".to_owned());
                return self.tell().await;
            }
            Sighting::Complete => return self.complete(place).await,
            Sighting::Put(observed) => mirror.put(observed),
            Sighting::Gone(observed) => observed.name.map_or(Vec::new(), |name| mirror.remove(&name)),
        };
        self.restore();
        if self.synced() {
            self.status.config_revision += u64::from(!events.is_empty());
            self.changed |= !events.is_empty();
            for event in events {
                self.messages.send(Message::Event(event)).await?;
            }
        }
        self.tell().await
    }

    /// Both kinds in one message: a Service and the slices that came with it belong to one moment.
    async fn complete(&mut self, place: usize) -> Sent {
        let was_synced = self.synced();
        let changed = self.mirrors[place].complete();
        self.listed[place] = true;
        self.restore();
        if self.synced() && (changed || !was_synced) {
            self.status.config_revision += 1;
            self.changed = true;
            let objects = self.objects();
            let [services, endpoints] = [0, 1].map(|place| self.mirrors[place].len());
            tracing::info!(
                services,
                endpoints,
                revision = self.status.config_revision,
                "state of the API server taken"
            );
            self.messages.send(Message::Event(Event::Replace(objects))).await?;
        }
        self.tell().await?;
        if self.synced() && !was_synced {
            self.messages.send(Message::Synced).await?;
        }
        Ok(())
    }

    /// All that is in use.
    fn objects(&self) -> Objects {
        let mut objects = Objects::default();
        self.mirrors.iter().for_each(|mirror| mirror.add_to(&mut objects));
        objects
    }

    /// Serves what the last run did, until the server says what is so now.
    async fn serve_saved(&mut self, path: Option<PathBuf>) -> Sent {
        let Some(path) = path else { return Ok(()) };
        let name = path.display().to_string();
        let loaded = tokio::task::spawn_blocking(move || last_good::load(&path)).await;
        let saved = match loaded.unwrap_or_else(|panic| Err(panic.into())) {
            Ok(Some(saved)) => saved,
            Ok(None) => {
                tracing::info!(file = name, "no saved state; nothing is served before the API server answers");
                return Ok(());
            }
            Err(error) => {
                tracing::warn!(file = name, %error, "the saved state cannot be read");
                return Ok(());
            }
        };
        let age_seconds = SystemTime::now().duration_since(saved.at).map_or(0, |age| age.as_secs());
        tracing::warn!(
            server = self.server,
            saved_at = crate::timestamp::rfc3339(saved.at),
            age_seconds,
            services = saved.objects.services.len(),
            "the API server does not answer yet: serving the saved state"
        );
        self.messages.send(Message::Event(Event::Replace(saved.objects))).await?;
        self.messages.send(Message::Synced).await
    }

    fn synced(&self) -> bool {
        self.listed.iter().all(|listed| *listed)
    }

    /// Says what is new about the source, and what is wrong with its objects.
    async fn tell(&mut self) -> Sent {
        let connected = self.contact.is_connected();
        let news = self.mirrors.iter_mut().fold(false, |news, mirror| mirror.take_news() | news);
        if !news && connected == self.status.last_reload_successful {
            return Ok(());
        }
        self.status.last_reload_successful = connected;
        self.status.rejections = Default::default();
        self.mirrors.iter().for_each(|mirror| self.status.rejections.add(mirror.rejections.clone()));
        let problems: Vec<Problem> = self.mirrors.iter().flat_map(Mirror::problems).cloned().collect();
        self.messages.send(Message::Source { status: self.status.clone(), problems }).await
    }

    fn fail(&mut self, place: usize, reason: WatchFailure, error: String) {
        let (kind, server) = (self.mirrors[place].kind(), &self.server);
        let now = Instant::now();
        match &mut self.outage {
            // Every few minutes in the life of a cluster, and mended by a list.
            None if reason == WatchFailure::Expired => tracing::info!(%kind, "the watch has expired, listing anew"),
            None => {
                tracing::warn!(%kind, server, %reason, error, "the API server does not answer; the last state stays in use");
                self.outage = Some(Outage { since: now, told: now, failures: 1, error });
            }
            Some(outage) => {
                outage.failures += 1;
                outage.error = error;
            }
        }
    }

    fn restore(&mut self) {
        if self.outage.is_some() && self.contact.is_connected() {
            let away_seconds = self.outage.take().map_or(0, |outage| outage.since.elapsed().as_secs());
            tracing::info!(server = self.server, away_seconds, "the API server answers again");
        }
    }

    async fn look(&mut self) -> Sent {
        self.restore();
        self.tell_outage();
        self.tell().await
    }

    fn tell_outage(&mut self) {
        if let Some(outage) = self.outage.as_mut().filter(|outage| outage.told.elapsed() >= OUTAGE_NEWS) {
            outage.told = Instant::now();
            let (away_seconds, Outage { failures, error, .. }) = (outage.since.elapsed().as_secs(), outage);
            tracing::warn!(server = self.server, away_seconds, failures, error, "the API server still does not answer");
        }
    }
}

/// Who keeps the last state in its file.
struct Keeper {
    path: Option<PathBuf>,
    /// When to save next.
    due: Option<Instant>,
    running: Option<tokio::task::JoinHandle<()>>,
}

impl Keeper {
    /// The first change is saved at once, others with those that follow it.
    fn note(&mut self, changed: bool) {
        if changed && self.path.is_some() && self.due.is_none() {
            let wait = if self.running.is_some() { SAVE_INTERVAL } else { Duration::ZERO };
            self.due = Some(Instant::now() + wait);
        }
    }

    /// On a thread of its own, as disks may be slow.
    fn save(&mut self, objects: Objects) {
        self.due = None;
        let Some(path) = self.path.clone() else { return };
        if self.running.as_ref().is_some_and(|running| !running.is_finished()) {
            self.due = Some(Instant::now() + SAVE_INTERVAL);
            return;
        }
        self.running = Some(tokio::task::spawn_blocking(move || {
            if let Err(error) = last_good::save(&path, &objects) {
                tracing::warn!(file = %path.display(), %error, "the state cannot be saved for the next start");
            }
        }));
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
    fn given_a_proxy_name_when_selected_then_its_services_are_asked_for_and_else_those_of_nobody() {
        let own = Selection { proxy_name: Some("kube-relay".into()), ..Selection::default() };

        assert_eq!(labels_of_services(&own), "service.kubernetes.io/service-proxy-name=kube-relay");
        assert_eq!(labels_of_services(&Selection::default()), "!service.kubernetes.io/service-proxy-name");
    }

    #[test]
    fn given_a_page_as_an_error_when_told_then_it_is_cut() {
        let long = Box::new(Status::failure(&"é".repeat(2_000), "Page"));

        assert!(message(&watcher::Error::WatchError(long)).chars().count() <= 501);
    }
}
