//! Kubernetes Events (`events.k8s.io/v1`) on Services and the own Node, for what a person must know: `kubectl describe`
//! shows them where the person looks.
//!
//! Read from the snapshots that everybody reads: control knows nothing of this, and waits for none of it. A snapshot that
//! comes while a request is under way replaces the one before. What is news is in `event_news`, when it is told in
//! `event_ledger`.

use std::collections::BTreeMap;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ObjectReference, Service};
use k8s_openapi::api::events::v1::{Event, EventSeries};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api as Resources, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::admin::Unbound;
use crate::allocate::fnv1a;
use crate::api_client::{Api, ApiError};
use crate::api_watch::at;
use crate::contact::Contact;
use crate::control::Relay;
use crate::event_ledger::{Ledger, News, Order, Outcome};
use crate::event_news::{Reason, Regarding, Topic, beginning, news};
use crate::name::{ListenKey, ObjectName};
use crate::plan::Problem;
use crate::status::{ListenerState, Status};

/// Who tells, as `kubectl describe` shows it under *From*.
const CONTROLLER: &str = "kube-relay";
/// The longest name of a reporting instance that a server takes.
const INSTANCE_BYTES: usize = 128;
/// As much of an object's name as is in the name of its Event, which has 253 bytes.
const NAME_BYTES: usize = 200;
/// From a request to its answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Tells the cluster what is wrong with its objects here. Owned by the task of the API source.
pub(crate) struct Herald {
    client: Client,
    /// The Node that this relay runs on.
    node: Arc<str>,
    status: watch::Receiver<Arc<Status>>,
    unbound: watch::Receiver<Vec<Unbound>>,
    contact: Arc<Contact>,
    seen: Seen,
    ledger: Ledger,
    /// Topics that there was no room for.
    crowd: usize,
    /// True from an Event that the server did not take to the next that it takes: said once.
    unwelcome: bool,
}

/// Where there could be news.
#[derive(Default, PartialEq)]
struct Seen {
    problems: Arc<Vec<Problem>>,
    failed: Arc<BTreeMap<ListenKey, ListenerState>>,
    failed_health_ports: Arc<BTreeMap<ObjectName, ListenerState>>,
    unbound: Vec<Unbound>,
}

impl std::fmt::Debug for Herald {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Herald").field("node", &self.node).field("ledger", &self.ledger).finish_non_exhaustive()
    }
}

impl Herald {
    /// For a relay on a node. What is wrong is told after `delay`. Sends nothing yet.
    ///
    /// # Errors
    /// Where the credentials cannot be used.
    pub(crate) fn new(api: &Api, node: Arc<str>, relay: &Relay, delay: Duration) -> Result<Self, ApiError> {
        let mut status = relay.status();
        status.mark_changed();
        Ok(Self {
            client: api.plain_client()?,
            node,
            status,
            unbound: watch::Sender::new(Vec::new()).subscribe(),
            contact: relay.contact(),
            seen: Seen::default(),
            ledger: Ledger::new(delay, Instant::now()),
            crowd: 0,
            unwelcome: false,
        })
    }

    /// Tells of these on the Node, too.
    pub(crate) fn watch_unbound(&mut self, unbound: watch::Receiver<Vec<Unbound>>) {
        self.unbound = unbound;
    }

    /// Tells until the relay is gone.
    pub(crate) async fn run(mut self) {
        loop {
            tokio::select! {
                biased;
                changed = self.status.changed() => match changed {
                    Ok(()) => self.look(),
                    Err(_) => return,
                },
                () = change_of(&mut self.unbound) => self.look(),
                () = at(self.ledger.due(Instant::now())) => self.tell().await,
            }
        }
    }

    /// Takes what is wrong now, where that has changed. A Service that was deleted and made anew since the last look, with the
    /// same fault, is taken for the old one until its Event is renewed.
    fn look(&mut self) {
        let status = Arc::clone(&self.status.borrow_and_update());
        let seen = Seen {
            problems: Arc::clone(&status.problems),
            failed: Arc::clone(&status.failed),
            failed_health_ports: Arc::clone(&status.failed_health_ports),
            unbound: self.unbound.borrow_and_update().clone(),
        };
        if !status.synced || status.stopping || seen == self.seen {
            return;
        }
        let crowd = self.ledger.observe(news(&status, &seen.unbound, &self.node), Instant::now());
        self.note_crowd(crowd);
        self.seen = seen;
    }

    fn note_crowd(&mut self, crowd: usize) {
        let before = std::mem::replace(&mut self.crowd, crowd);
        self.contact.events.dropped.add(crowd.saturating_sub(before) as u64);
        if before == 0 && crowd > 0 {
            tracing::warn!("more is wrong than the cluster is told in Events: `kube-relay status` lists all");
        }
    }

    /// Makes the request whose turn it is.
    async fn tell(&mut self) {
        let Some(order) = self.ledger.take(Instant::now()) else { return };
        let outcome = match timeout(ANSWER_TIMEOUT, self.carry_out(&order)).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => {
                let outcome = meaning(&error);
                self.log(&outcome, &order, &error);
                outcome
            }
            Err(_) => {
                tracing::debug!("the API server does not answer in time, and is not told an Event");
                Outcome::Away
            }
        };
        self.count(&outcome);
        self.ledger.settle(&order, outcome, Instant::now());
    }

    async fn carry_out(&self, order: &Order) -> kube::Result<Outcome> {
        let news = order.news();
        let Some(uid) = self.uid(&news.topic.regarding).await? else { return Ok(Outcome::Gone) };
        let name = event_name(news, &uid);
        match order {
            // A Service of that name that was made anew has Events of its own.
            Order::Count { event, count, .. } if *event == name => self.renew(news, name, *count).await,
            _ => self.create(news, name, uid).await,
        }
    }

    /// Where all nodes see the same they mean the same Event: the first one makes it.
    async fn create(&self, news: &News, name: String, uid: String) -> kube::Result<Outcome> {
        let event = event(news, name.clone(), uid, &self.node, began(news));
        match self.events(news).create(&PostParams::default(), &event).await {
            Ok(_) => Ok(Outcome::Told(name)),
            Err(kube::Error::Api(answer)) if answer.code == 409 => Ok(Outcome::Known),
            Err(error) => Err(error),
        }
    }

    async fn renew(&self, news: &News, name: String, count: u32) -> kube::Result<Outcome> {
        let count = i32::try_from(count).unwrap_or(i32::MAX);
        let series = EventSeries { count, last_observed_time: MicroTime(Timestamp::now()) };
        let patch = Patch::Merge(json!({"series": series}));
        match self.events(news).patch(&name, &PatchParams::default(), &patch).await {
            Ok(_) => Ok(Outcome::Told(name)),
            Err(kube::Error::Api(answer)) if answer.code == 404 => Ok(Outcome::Forgotten),
            Err(error) => Err(error),
        }
    }

    /// `kubectl describe service` shows Events with the Service's UID alone; nothing else here needs it, so it is asked
    /// for. Those of a Node have its name in that place: so kubelets write them, and so they are looked for.
    async fn uid(&self, regarding: &Regarding) -> kube::Result<Option<String>> {
        match regarding {
            Regarding::Node(name) => Ok(Some(name.to_string())),
            Regarding::Service(name) => {
                let services: Resources<Service> = Resources::namespaced(self.client.clone(), &name.namespace);
                let service = services.get_metadata_opt(&name.name).await?;
                Ok(service.map(|service| service.metadata.uid.unwrap_or_default()))
            }
        }
    }

    fn events(&self, news: &News) -> Resources<Event> {
        Resources::namespaced(self.client.clone(), news.topic.regarding.namespace())
    }

    /// Says once what somebody has to mend, until an Event is taken. Whether the server is there is told by the source.
    fn log(&mut self, outcome: &Outcome, order: &Order, error: &kube::Error) {
        let Topic { regarding: object, reason: Reason(reason, _) } = &order.news().topic;
        let is_unwelcome = matches!(outcome, Outcome::Refused | Outcome::Rejected);
        let is_first = is_unwelcome && !std::mem::replace(&mut self.unwelcome, true);
        match outcome {
            Outcome::Refused if is_first => tracing::warn!(
                %object, reason, %error,
                "the API server takes no Events: get of services, create and patch of events.events.k8s.io are needed; \
                 tried again in an hour, and what is served does not depend on it"
            ),
            Outcome::Rejected if is_first => {
                tracing::warn!(%object, reason, %error, "the API server does not take this Event");
            }
            _ => tracing::debug!(%object, reason, %error, ?outcome, "an Event was not told"),
        }
    }

    fn count(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Told(_) => self.contact.events.sent.increment(),
            Outcome::Refused | Outcome::Rejected => return self.contact.events.dropped.increment(),
            Outcome::Known => {}
            Outcome::Forgotten | Outcome::Gone | Outcome::Away => return,
        }
        self.unwelcome = false;
    }
}

/// Waits for another value; for ever where there will be none.
async fn change_of<T>(value: &mut watch::Receiver<T>) {
    if value.changed().await.is_err() {
        pending().await
    }
}

/// What an error means for this Event and for others.
fn meaning(error: &kube::Error) -> Outcome {
    let kube::Error::Api(answer) = error else { return Outcome::Away };
    // A namespace that ends takes nothing new. That is nobody's fault.
    let mut causes = answer.details.iter().flat_map(|details| &details.causes);
    let is_ending = causes.any(|cause| cause.reason == "NamespaceTerminating");
    match answer.code {
        403 if is_ending => Outcome::Gone,
        404 if answer.reason == "NotFound" => Outcome::Gone, // The namespace; an API that is not there has no such word.
        403..=405 => Outcome::Refused,
        401 | 408 | 409 | 429 => Outcome::Away,
        400..500 => Outcome::Rejected,
        _ => Outcome::Away,
    }
}

/// When it began, by the clock of the wall.
fn began(news: &News) -> Timestamp {
    let now = Timestamp::now();
    now.checked_sub(news.since.elapsed()).unwrap_or(now)
}

impl Regarding {
    /// Where its Events are.
    fn namespace(&self) -> &str {
        match self {
            Self::Service(name) => &name.namespace,
            Self::Node(_) => "default", // Where servers want Events of what is in no namespace.
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Service(name) => &name.name,
            Self::Node(name) => name,
        }
    }

    fn reference(&self, uid: String) -> ObjectReference {
        let (kind, namespace) = match self {
            Self::Service(name) => ("Service", Some(name.namespace.to_string())),
            Self::Node(_) => ("Node", None),
        };
        ObjectReference {
            api_version: Some("v1".into()),
            kind: Some(kind.into()),
            name: Some(self.name().into()),
            namespace,
            uid: Some(uid).filter(|uid| !uid.is_empty()),
            ..ObjectReference::default()
        }
    }
}

fn event(news: &News, name: String, uid: String, node: &str, begin: Timestamp) -> Event {
    let News { topic, note, .. } = news;
    let Reason(reason, action) = topic.reason;
    let instance = if node.is_empty() { CONTROLLER } else { beginning(node, INSTANCE_BYTES) };
    Event {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: Some(topic.regarding.namespace().into()),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(begin)),
        type_: Some("Warning".into()),
        reason: Some(reason.into()),
        action: Some(action.into()),
        note: Some(note.clone()),
        regarding: Some(topic.regarding.reference(uid)),
        reporting_controller: Some(CONTROLLER.into()),
        reporting_instance: Some(instance.into()),
        ..Event::default()
    }
}

/// The same on each node for the same news, and after a restart: neither a thousand nodes nor one that starts again and
/// again make more than one Event of it.
fn event_name(news: &News, uid: &str) -> String {
    let News { topic, note, .. } = news;
    let Reason(reason, action) = topic.reason;
    let parts = [topic.regarding.namespace(), topic.regarding.name(), uid, reason, action, note];
    let object = beginning(topic.regarding.name(), NAME_BYTES).trim_end_matches(['.', '-']);
    format!("{object}.{:016x}", fnv1a(&parts.map(str::as_bytes)))
}

#[cfg(test)]
mod tests {
    use kube::core::Status as Answer;
    use kube::core::response::StatusDetails;

    use super::*;
    use crate::name::ObjectName;

    fn web(note: &str) -> News {
        let regarding = Regarding::Service(ObjectName::parse("default/web"));
        let topic = Topic { regarding, reason: Reason("PortConflict", "Serve") };
        News { topic, note: note.into(), since: Instant::now() }
    }

    #[test]
    fn given_the_same_news_on_all_nodes_when_named_then_it_is_one_event_and_other_news_another() {
        let one = event_name(&web("a"), "u");

        assert_eq!(one, "web.9efed882a3a61f08", "for ever: relays of two versions run side by side");
        assert_ne!(one, event_name(&web("b"), "u"));
        assert_ne!(one, event_name(&web("a"), "v"), "another Service of that name");
    }

    #[test]
    fn given_a_long_name_of_a_node_when_its_event_is_named_then_a_server_takes_the_name() {
        let mut news = web("a");
        let long = format!("{}.{}", "n".repeat(199), "o".repeat(53));
        news.topic.regarding = Regarding::Node(long.into());

        let name = event_name(&news, "u");

        assert!(name.starts_with("nnn") && !name.contains(".."), "{name}");
        assert_eq!(name.len(), 199 + 1 + 16);
    }

    #[test]
    fn given_refusals_when_read_then_those_of_one_event_of_all_events_and_of_the_moment_differ() {
        let answer = |code, reason: &str| Answer::failure("", reason).with_code(code);
        let mean = |answer: Answer| meaning(&kube::Error::Api(answer.boxed()));
        let ending = json!({"causes": [{"reason": "NamespaceTerminating", "field": "metadata.namespace"}]});
        let ending: StatusDetails = serde_json::from_value(ending).expect("as servers send it");

        assert_eq!(mean(answer(403, "Forbidden")), Outcome::Refused);
        assert_eq!(mean(answer(403, "Forbidden").with_details(ending)), Outcome::Gone);
        assert_eq!(mean(answer(404, "NotFound")), Outcome::Gone);
        assert_eq!(mean(answer(404, "Failed to parse error data")), Outcome::Refused, "no such API");
        assert_eq!(mean(answer(422, "Invalid")), Outcome::Rejected);
        for (code, reason) in [(401, "Unauthorized"), (429, "TooManyRequests"), (500, "InternalError"), (503, "")] {
            assert_eq!(mean(answer(code, reason)), Outcome::Away, "{code}");
        }
        assert_eq!(meaning(&kube::Error::Service("no route".into())), Outcome::Away);
    }
}
