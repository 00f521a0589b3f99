//! What an API server was seen to say, as messages to the control task and as lines of the log.
//!
//! What is in use of each kind is in its `mirror`, what is said of the own Node in `node_report`; when something is seen is up
//! to `kubernetes`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::api_client::Api;
use crate::api_watch::Sighting;
use crate::catch_up::CatchUp;
use crate::causes::causes;
use crate::contact::Contact;
use crate::control::{Message, Relay};
use crate::decode::{Kind, Observed};
use crate::heap;
use crate::last_good::{self, Origin, Saved, State};
use crate::mirror::Mirror;
use crate::model::{Event, Objects};
use crate::name::ObjectName;
use crate::node_report::NodeReport;
use crate::outage::{News, Outage};
use crate::own_node::OwnNode;
use crate::plan::Problem;
use crate::stats::{WatchFailure, WatchedKind};
use crate::status::{SourceStatus, Status};
use crate::timestamp::rfc3339;

/// How long is waited until what was saved is served, at most.
const SAVED_SERVED: Duration = Duration::from_secs(1);
const UNKNOWN_KIND: &str = "the server does not know this kind (404)";

/// Who is asked.
#[derive(Debug)]
pub(crate) struct Server {
    /// For the log.
    pub(crate) name: String,
    /// The way to it.
    pub(crate) api: Api,
    /// Where the cluster takes the addresses of Services from, as far as that is known, and as far as this relay serves them.
    pub(crate) service_nets: Vec<IpNet>,
}

impl Server {
    /// True where it is asked at an address that its own cluster gives to Services, like 10.96.0.1: in place of
    /// kube-proxy, nobody serves that before this relay does.
    pub(crate) fn is_a_service(&self) -> bool {
        self.api.ip().is_some_and(|ip| self.service_nets.iter().any(|net| net.contains(&ip)))
    }
}

/// What was said to the control task, and to the log.
#[derive(Debug)]
pub(crate) struct Report {
    messages: mpsc::Sender<Message>,
    contact: Arc<Contact>,
    relay: watch::Receiver<Arc<Status>>,
    pub(crate) server: Server,
    /// Of Services and of endpoints.
    mirrors: [Mirror; 2],
    /// Which of them have been listed completely.
    listed: [bool; 2],
    node: NodeReport,
    /// The start.
    since: SystemTime,
    /// True once a first complete state of the server has been sent.
    synced: bool,
    status: SourceStatus,
    told_revision: u64,
    /// The server does not answer, or not what it was asked for.
    silence: Outage,
    /// It does not let us read what we ask for: that may last for ever, and must not hide the other.
    refusal: Outage,
    catch_up: CatchUp,
    /// True where something changed that waits for all else that changed during an outage.
    waits: bool,
    /// True where the server has come back since somebody asked.
    is_back: bool,
    /// True where the state changed since it was last to be saved.
    changed: bool,
}

/// Fails when nobody listens any more.
pub(crate) type Sent = Result<(), mpsc::error::SendError<Message>>;

impl Report {
    /// Nothing has been said yet.
    pub(crate) fn new(server: Server, relay: &Relay, node: NodeReport) -> Self {
        Self {
            messages: relay.messages(),
            contact: relay.contact(),
            relay: relay.status(),
            server,
            mirrors: [Kind::Service, Kind::EndpointSlice].map(Mirror::new),
            listed: [false; 2],
            node,
            since: SystemTime::now(),
            synced: false,
            status: SourceStatus { kind: "kubernetes".into(), ..SourceStatus::default() },
            told_revision: 0,
            silence: Outage::default(),
            refusal: Outage::default(),
            catch_up: CatchUp::default(),
            waits: false,
            is_back: false,
            changed: false,
        }
    }

    /// These kinds are asked for from now on.
    pub(crate) fn begin(&self, kinds: [WatchedKind; 3]) {
        tracing::info!(server = self.server.name, node = self.node.name(), "asking the API server");
        self.node.begin();
        kinds.into_iter().for_each(|kind| self.contact.watch(kind));
    }

    /// Endpoints come from another kind from now on.
    pub(crate) fn turn_to(&mut self, kind: Kind) {
        let server = &self.server.name;
        match kind {
            Kind::Endpoints => tracing::warn!(
                server,
                "the API server has no discovery.k8s.io/v1 (before 1.21): reading Endpoints, of which it cuts those with \
                 more than 1,000 addresses"
            ),
            _ => tracing::info!(server, "the API server has discovery.k8s.io/v1 now: reading EndpointSlices"),
        }
        let before = self.mirrors[1].kind().into();
        self.contact.forget(before);
        self.contact.watch(kind.into());
        self.silence.forget(before);
        self.refusal.forget(before);
        self.mirrors[1].turn_to(kind);
    }

    /// True while something cannot be read.
    pub(crate) fn is_away(&self) -> bool {
        self.silence.is_on() || self.refusal.is_on()
    }

    /// Takes what was seen of Services (place 0) or of endpoints (place 1).
    pub(crate) async fn take(&mut self, place: usize, sighting: Sighting<Observed>) -> Sent {
        let mirror = &mut self.mirrors[place];
        let kind = mirror.kind().into();
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
                self.fail(kind, reason, error);
                return self.tell().await;
            }
            Sighting::Unknown => {
                self.fail(kind, WatchFailure::Server, UNKNOWN_KIND.to_owned());
                return self.tell().await;
            }
            Sighting::Complete => return self.complete(place).await,
            Sighting::Put(observed) => mirror.put(observed),
            Sighting::Gone(observed) => observed.name.map_or(Vec::new(), |name| mirror.remove(&name)),
        };
        self.restore();
        if self.synced {
            self.changed |= !events.is_empty();
            self.send_changes(events).await?;
        }
        self.tell().await
    }

    async fn send_changes(&mut self, events: Vec<Event>) -> Sent {
        if self.catch_up.holds(Instant::now()) {
            self.waits |= !events.is_empty();
            return Ok(());
        }
        for event in events {
            self.messages.send(Message::Event(event)).await?;
        }
        self.send_triggers().await
    }

    /// When to [catch up](Self::catch_up).
    pub(crate) fn catch_up_due(&self) -> Option<Instant> {
        self.catch_up.due()
    }

    /// Sends as one what has waited.
    pub(crate) async fn catch_up(&mut self) -> Sent {
        self.catch_up.end();
        let waited = std::mem::take(&mut self.waits);
        self.send_state(waited).await
    }

    /// True where the server has come back since this was asked last.
    pub(crate) fn take_return(&mut self) -> bool {
        std::mem::take(&mut self.is_back)
    }

    /// Takes what was seen of the own Node.
    pub(crate) async fn take_node(&mut self, sighting: Sighting<OwnNode>) -> Sent {
        match &sighting {
            Sighting::Failed(reason, error) => self.fail(WatchedKind::Node, *reason, error.clone()),
            Sighting::Unknown => self.fail(WatchedKind::Node, WatchFailure::Server, UNKNOWN_KIND.to_owned()),
            Sighting::Begin | Sighting::Listed(_) => {}
            Sighting::Complete | Sighting::Put(_) | Sighting::Gone(_) => self.restore(),
        }
        if let Some(setting) = self.node.take(sighting) {
            self.changed = true;
            self.messages.send(Message::Setting(setting)).await?;
        }
        self.send_state(false).await
    }

    /// This machine is another one than before.
    pub(crate) async fn move_host(&mut self) -> Sent {
        self.messages.send(Message::Setting(self.node.moved())).await
    }

    async fn complete(&mut self, place: usize) -> Sent {
        let changed = self.mirrors[place].complete();
        heap::give_back(); // A list is the most that is read at once.
        self.listed[place] = true;
        self.restore();
        let waits = self.synced && self.catch_up.holds(Instant::now());
        self.waits |= changed && waits;
        self.send_state(changed && !waits).await
    }

    /// Sends all as one message, where it `changed` and as soon as there is all of it: a Service and the slices that came
    /// with it belong to one moment.
    async fn send_state(&mut self, changed: bool) -> Sent {
        let first = !self.synced && self.node.was_asked_for() && self.listed.iter().all(|listed| *listed);
        if first || changed && self.synced {
            self.status.config_revision += 1;
            self.changed = true;
            let [services, endpoints] = [0, 1].map(|place| self.mirrors[place].len());
            let revision = self.status.config_revision;
            tracing::info!(services, endpoints, revision, "state of the API server taken");
            self.messages.send(Message::Event(Event::Replace(self.objects()))).await?;
            self.send_triggers().await?;
        }
        self.tell().await?;
        if first {
            self.synced = true;
            self.catch_up.end(); // All of it was taken.
            self.contact.serve_heard();
            self.messages.send(Message::Synced).await?;
        }
        Ok(())
    }

    /// Behind the changes themselves, so that these are carried out by then. What came about before the start has waited for
    /// somebody else.
    async fn send_triggers(&mut self) -> Sent {
        let mut triggers: Vec<_> = self.mirrors.iter_mut().flat_map(Mirror::take_triggers).collect();
        triggers.retain(|trigger| *trigger >= self.since);
        if triggers.is_empty() {
            return Ok(());
        }
        self.messages.send(Message::Triggered(triggers)).await
    }

    fn objects(&self) -> Objects {
        let mut objects = Objects::default();
        self.mirrors.iter().for_each(|mirror| mirror.add_to(&mut objects));
        objects
    }

    /// All that is in use.
    pub(crate) fn state(&self) -> State {
        let cluster = (*self.server.api.cluster()).clone();
        let origin = Origin { server: self.server.name.clone(), cluster };
        State { origin, objects: self.objects(), node: self.node.known().cloned() }
    }

    /// True where the state changed since this was asked last.
    pub(crate) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// True once a first complete state of the server has been sent.
    pub(crate) fn is_synced(&self) -> bool {
        self.synced
    }

    /// Serves what the last run did, until the server says what is so now.
    pub(crate) async fn serve_saved(&mut self, path: Option<PathBuf>) -> Sent {
        let Some(path) = path else { return Ok(()) };
        let Some(Saved { mut state, at }) = self.load(path).await else { return Ok(()) };
        if let Some(ip) = self.server.api.ip() {
            self.clear_the_way(&mut state, ip);
        }
        let age_seconds = SystemTime::now().duration_since(at).map_or(0, |age| age.as_secs());
        tracing::warn!(
            server = self.server.name,
            saved_at = rfc3339(at),
            age_seconds,
            services = state.objects.services.len(),
            "the API server has not answered yet: serving the saved state"
        );
        if let Some(setting) = state.node.and_then(|node| self.node.recall(node)) {
            self.messages.send(Message::Setting(setting)).await?;
        }
        self.contact.serve_saved(at);
        self.messages.send(Message::Event(Event::Replace(state.objects))).await?;
        self.messages.send(Message::Synced).await?;
        let served = self.relay.wait_for(|status| status.synced);
        let _ = tokio::time::timeout(SAVED_SERVED, served).await; // It may lead to the server.
        Ok(())
    }

    /// The saved state, where there is one of this cluster.
    async fn load(&self, path: PathBuf) -> Option<Saved> {
        let (file, server) = (path.display().to_string(), &self.server.name);
        let loaded = tokio::task::spawn_blocking(move || last_good::load(&path)).await;
        let saved = match loaded {
            Ok(Ok(Some(saved))) => saved,
            Ok(Ok(None)) => {
                tracing::info!(file, "no saved state; nothing is served before the API server answers");
                return None;
            }
            Ok(Err(error)) => {
                tracing::warn!(file, error = causes(&error), "the saved state cannot be used");
                return None;
            }
            Err(error) => {
                tracing::warn!(file, %error, "the saved state cannot be used");
                return None;
            }
        };
        if saved.state.origin.cluster.is_not(&self.server.api.cluster()) {
            tracing::warn!(
                file,
                server,
                saved_from = saved.state.origin.server,
                saved_at = rfc3339(saved.at),
                "the saved state is of another cluster, as other authorities vouch for its API server: it is not \
                 served, and replaced once this one answers"
            );
            return None;
        }
        Some(saved)
    }

    /// What is saved may be wrong by now. So it must not take the server's own address from us, where the way there does not
    /// lead through this relay anyway: nobody could set it right any more.
    fn clear_the_way(&self, state: &mut State, ip: IpAddr) {
        let server = &self.server.name;
        state.objects.services.retain(|service| {
            let leads_to_it = service.name == ObjectName::new("default", "kubernetes");
            let stands_in_the_way = service.addresses().any(|address| address == ip) && !leads_to_it;
            if stands_in_the_way {
                tracing::warn!(
                    service = %service.name,
                    server,
                    "a saved Service has the address of the API server: it is not served before the server answers"
                );
            }
            !stands_in_the_way
        });
    }

    /// Says what is new about the source, and what is wrong with its objects.
    async fn tell(&mut self) -> Sent {
        let connected = self.contact.is_connected();
        let news = self.mirrors.iter_mut().fold(false, |news, mirror| mirror.take_news() | news);
        let revised = self.told_revision != self.status.config_revision;
        if !news && !revised && connected == self.status.last_reload_successful {
            return Ok(());
        }
        self.status.last_reload_successful = connected;
        self.told_revision = self.status.config_revision;
        self.status.rejections = Default::default();
        self.mirrors.iter().for_each(|mirror| self.status.rejections.add(mirror.rejections.clone()));
        let problems: Vec<Problem> = self.mirrors.iter().flat_map(Mirror::problems).cloned().collect();
        self.messages.send(Message::Source { status: self.status.clone(), problems }).await
    }

    fn fail(&mut self, kind: WatchedKind, reason: WatchFailure, error: String) {
        let (server, now) = (&self.server.name, Instant::now());
        if reason == WatchFailure::Forbidden {
            if !self.refusal.has(kind) {
                tracing::warn!(
                    %kind, server, %reason, error,
                    "the API server does not let us read this: it wants credentials that it knows (401), or list and watch \
                     for them (403); the last state stays in use"
                );
            }
            return self.refusal.fail(kind, error, now);
        }
        self.refusal.forget(kind);
        if !self.silence.is_on() {
            // Every few minutes in the life of a cluster, and mended by a list.
            if reason == WatchFailure::Expired {
                return tracing::info!(%kind, "the watch has expired, listing anew");
            }
            self.tell_of_silence(kind, reason, &error);
        }
        self.silence.fail(kind, error, now);
        self.look_for_missing(now);
    }

    fn look_for_missing(&mut self, now: Instant) {
        let is_missing = |mirror: &&Mirror| {
            let kind = mirror.kind().into();
            // A refusal may last for ever; the list that it broke off is not complete either.
            !self.refusal.has(kind) && (mirror.is_arriving() || self.silence.has(kind))
        };
        let missing = self.mirrors.iter().filter(is_missing).count();
        self.is_back |= self.catch_up.see(missing, now);
    }

    fn tell_of_silence(&self, kind: WatchedKind, reason: WatchFailure, error: &str) {
        let server = &self.server.name;
        let nobody = matches!(reason, WatchFailure::Unreachable | WatchFailure::Timeout);
        if !nobody || self.synced || !self.server.is_a_service() {
            tracing::warn!(%kind, server, %reason, error, "the API server does not answer; the last state stays in use");
        } else if self.leads_to_the_server() {
            tracing::warn!(
                %kind, server, %reason, error,
                "the API server is asked at an address of the service range, which this relay serves from the saved \
                 state, and does not answer behind it: where it has another address by now, give that with --master (in \
                 the DaemonSet apiServer of the ConfigMap kube-relay-cluster)"
            );
        } else {
            tracing::warn!(
                %kind, server, %reason, error,
                "the API server is asked at an address of the service range, which this relay does not serve before it \
                 knows more, and nobody answers there: unless another proxy on this node serves it, give the server's \
                 own address with --master (in the DaemonSet apiServer of the ConfigMap kube-relay-cluster)"
            );
        }
    }

    /// True where this relay listens at the address that the server is asked at.
    fn leads_to_the_server(&self) -> bool {
        let (Some(ip), status) = (self.server.api.ip(), self.relay.borrow()) else { return false };
        let mut listeners = status.services.values().flat_map(|service| service.plan.listeners());
        listeners.any(|(key, _)| key.address().ip() == ip && !status.failed.contains_key(key))
    }

    fn restore(&mut self) {
        let (server, now, contact, refusal) = (&self.server.name, Instant::now(), &self.contact, &self.refusal);
        let is_silent = |kind| contact.is_away(kind) && !refusal.has(kind); // Who refuses answers.
        if let Some(length) = self.silence.keep(is_silent, now) {
            tracing::info!(server, away_seconds = length.as_secs(), "the API server answers again");
        }
        if let Some(length) = self.refusal.keep(|kind| contact.is_away(kind), now) {
            tracing::info!(server, refused_seconds = length.as_secs(), "the API server lets us read everything again");
        }
        self.look_for_missing(now);
    }

    /// Looks whether the server is back: a watch that goes on says nothing by itself.
    pub(crate) async fn look(&mut self) -> Sent {
        self.restore();
        self.tell_outages();
        self.tell().await
    }

    fn tell_outages(&mut self) {
        let (server, now) = (&self.server.name, Instant::now());
        if let Some(News { seconds: away_seconds, failures, error, kinds }) = self.silence.news(now) {
            tracing::warn!(server, kinds, away_seconds, failures, error, "the API server still does not answer");
        }
        if let Some(News { seconds: refused_seconds, failures, error, kinds }) = self.refusal.news(now) {
            tracing::warn!(
                server,
                kinds,
                refused_seconds,
                failures,
                error,
                "the API server still does not let us read this: it wants credentials that it knows (401), or list and \
                 watch for them (403)"
            );
        }
    }
}
