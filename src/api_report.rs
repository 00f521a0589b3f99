//! What an API server was seen to say, as messages to the control task and as lines of the log.
//!
//! What is in use of each kind is in its `mirror`; when something is seen is up to `kubernetes`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::api_watch::Sighting;
use crate::contact::Contact;
use crate::control::Message;
use crate::decode::Kind;
use crate::last_good;
use crate::mirror::Mirror;
use crate::model::{Event, Objects};
use crate::plan::Problem;
use crate::stats::WatchFailure;
use crate::status::SourceStatus;

/// How often a log line says that the server is still away.
const OUTAGE_NEWS: Duration = Duration::from_secs(60);

/// What was said to the control task, and to the log.
pub(crate) struct Report {
    messages: mpsc::Sender<Message>,
    contact: Arc<Contact>,
    pub(crate) server: String,
    /// Of Services and of endpoints.
    pub(crate) mirrors: [Mirror; 2],
    /// Which of them have been listed completely.
    listed: [bool; 2],
    status: SourceStatus,
    outage: Option<Outage>,
    /// True where objects changed since they were last to be saved.
    pub(crate) changed: bool,
}

/// A time without contact.
struct Outage {
    since: Instant,
    told: Instant,
    failures: u64,
    error: String,
}

pub(crate) type Sent = Result<(), mpsc::error::SendError<Message>>;

impl Report {
    /// Nothing has been said yet. The kinds are those of Services and of endpoints.
    pub(crate) fn new(
        messages: mpsc::Sender<Message>,
        contact: Arc<Contact>,
        server: String,
        kinds: [Kind; 2],
    ) -> Self {
        Self {
            messages,
            contact,
            server,
            mirrors: kinds.map(Mirror::new),
            listed: [false; 2],
            status: SourceStatus { kind: "kubernetes".into(), ..SourceStatus::default() },
            outage: None,
            changed: false,
        }
    }

    /// True while the server does not answer.
    pub(crate) fn is_away(&self) -> bool {
        self.outage.is_some()
    }

    pub(crate) async fn take(&mut self, place: usize, sighting: Sighting) -> Sent {
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
    pub(crate) fn objects(&self) -> Objects {
        let mut objects = Objects::default();
        self.mirrors.iter().for_each(|mirror| mirror.add_to(&mut objects));
        objects
    }

    /// Serves what the last run did, until the server says what is so now.
    pub(crate) async fn serve_saved(&mut self, path: Option<PathBuf>) -> Sent {
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

    pub(crate) fn synced(&self) -> bool {
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

    pub(crate) async fn look(&mut self) -> Sent {
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
