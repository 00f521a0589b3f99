//! What the cluster is told of problems with its objects: on which object, in what words, how often, and what it costs.

use std::collections::BTreeSet;

use kube_relay::admin::{Surface, Unbound};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::log::Log;
use crate::stage::{Setup, Stage, api_address, service, slice, web};
use crate::support::api_server::ApiServer;
use crate::support::client;
use crate::support::site::{SERVICE_PORT, Site};

/// Events that may be told at once.
const BURST: usize = 10;
/// Topics that are kept, told or to be told.
const KEPT: u64 = 50;

/// A Service that wants the address of `web`, and came later.
pub(crate) fn rival(site: Site) -> Value {
    let mut rival = service("rival", &site.cluster_ip().to_string());
    rival["metadata"]["creationTimestamp"] = "2026-02-02T00:00:00Z".into();
    rival["metadata"]["uid"] = "of-the-rival".into();
    rival
}

/// A Service that has nothing but a port of a kind that nobody relays.
fn sctp(number: usize) -> Value {
    let [high, low] = u16::try_from(number).expect("a small number").to_be_bytes();
    let mut sctp = service(&format!("sctp-{number}"), &format!("127.1.{high}.{low}"));
    sctp["spec"]["ports"] = json!([{"name": "sigtran", "protocol": "SCTP", "port": 2905}]);
    sctp
}

impl Stage {
    /// The Events, once there are so many.
    async fn events(&self, count: usize) -> Vec<Value> {
        self.until("Events", |_| self.server.objects("events").len() >= count).await;
        self.server.objects("events")
    }

    /// Ends a conflict, and waits until that was seen: the Event of what came after it shows it.
    pub(crate) async fn end_conflict(&self, number: usize) {
        self.server.delete("services", "default/rival");
        self.server.put("services", sctp(number));
        let name = format!("sctp-{number}");
        let is_there = || self.server.objects("events").iter().any(|event| event["regarding"]["name"] == *name);
        self.until("a later Event", |_| is_there()).await;
    }

    /// The Events of the Service that loses.
    pub(crate) fn of_rival(&self) -> Vec<Value> {
        let events = self.server.objects("events").into_iter();
        events.filter(|event| event["regarding"]["name"] == "rival").collect()
    }

    fn dropped(&self) -> u64 {
        self.status().contact.events.dropped.get()
    }

    /// Other things go on: `web` gets its second backend, and a client is served.
    async fn serves_on(&self) {
        let second = self.site.backend(2);
        self.server.put("endpointslices", slice("web-1", &[second]));
        self.until_backends(&[second]).await;
        assert_eq!(client::ask(self.site.service()).await.expect("a backend answers"), second);
        assert!(self.status().contact.is_connected(), "Events are not what is meant by it");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t029_given_two_services_that_want_one_address_when_planned_then_the_loser_has_an_event_that_names_the_winner()
{
    let stage = Stage::serving(Site::new(43)).await;

    stage.server.put("services", rival(stage.site));

    let events = stage.events(1).await;
    let event = &events[0];
    assert_eq!(event["reason"], "PortConflict");
    assert_eq!((&event["regarding"]["kind"], &event["regarding"]["name"]), (&json!("Service"), &json!("rival")));
    assert_eq!(event["regarding"]["uid"], "of-the-rival", "kubectl describe looks for it");
    assert_eq!((&event["type"], &event["reportingInstance"]), (&json!("Warning"), &json!("node-1")));
    let note = event["note"].as_str().expect("a note");
    assert!(note.contains("is taken by Service default/web"), "{note}");
    stage.until("it to be counted", |status| status.contact.events.sent.get() == 1).await;
    assert_eq!(stage.server.objects("events").len(), 1);
    stage.serves_on().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_conflict_that_goes_and_comes_back_when_told_then_it_is_the_same_event_once_more() {
    let stage = Stage::serving(Site::new(44)).await;
    stage.server.put("services", rival(stage.site));
    stage.until("the first", |status| status.contact.events.sent.get() == 1).await;

    stage.end_conflict(1).await;
    stage.server.put("services", rival(stage.site));

    stage.until("the count", |_| stage.of_rival()[0]["series"]["count"] == 2).await;
    assert_eq!((stage.of_rival().len(), stage.dropped()), (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_service_that_is_made_anew_when_its_conflict_comes_back_then_the_new_one_has_an_event() {
    let stage = Stage::serving(Site::new(54)).await;
    stage.server.put("services", rival(stage.site));
    stage.until("the first", |status| status.contact.events.sent.get() == 1).await;

    stage.end_conflict(1).await;
    let mut second = rival(stage.site);
    second["metadata"]["uid"] = "of-the-second".into();
    stage.server.put("services", second);

    stage.until("its Event", |_| stage.of_rival().len() == 2).await;
    let events = stage.of_rival();
    let uids: BTreeSet<_> = events.iter().filter_map(|event| event["regarding"]["uid"].as_str()).collect();
    assert_eq!(uids, ["of-the-rival", "of-the-second"].into());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_relay_that_starts_again_when_a_conflict_lasts_then_it_is_the_event_that_is_there() {
    let site = Site::new(45);
    let server = ApiServer::start(api_address(site)).await;
    server.put("services", web(site));
    server.put("services", rival(site));
    let stage = Stage::following(site, server).await;
    stage.until("the first", |status| status.contact.events.sent.get() == 1).await;

    let stage = Stage::following(site, stage.end().await).await;

    stage.until("it to be told again", |_| stage.server.count_of("events", "create") == 2).await;
    assert_eq!(stage.server.objects("events").len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_ten_thousand_services_with_a_problem_when_planned_at_once_then_a_few_are_told_and_the_rest_is_counted() {
    let site = Site::new(47);
    let server = ApiServer::start(api_address(site)).await;
    server.put("services", web(site));
    server.put("endpointslices", slice("web-1", &[site.backend(1)]));
    (0..10_000).for_each(|number| server.put("services", sctp(number)));
    server.compact();

    let stage = Stage::following(site, server).await;
    stage.until("the rest to be counted", |status| status.contact.events.dropped.get() > 0).await;
    stage.events(BURST).await;

    assert_eq!(stage.dropped(), 10_000 - KEPT);
    // One more in half a minute.
    assert!(stage.server.count_of("events", "create") <= BURST + 1);
    assert!(stage.server.count_of("services", "get") <= BURST + 1);
    stage.serves_on().await;
}

/// On one thread, so that all it logs is seen.
#[tokio::test]
async fn given_a_server_that_takes_no_events_when_there_is_news_then_one_line_says_so_and_serving_goes_on() {
    for (site, code) in [(Site::new(48), 403), (Site::new(49), 404)] {
        let (log, _logging) = Log::of_this_thread();
        let stage = Stage::serving(site).await;
        match code {
            403 => stage.server.forbid("events"),
            _ => stage.server.unknown("events"),
        }

        (0..3).for_each(|number| stage.server.put("services", sctp(number)));

        stage.until("a refusal", |_| stage.dropped() == 1).await;
        let told = log.lines_with("takes no Events");
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].contains(" WARN "), "{told:?}");
        stage.serves_on().await;
        assert_eq!(stage.server.count_of("events", "create"), 1, "the others wait for an hour");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f4_given_a_server_that_is_silent_about_events_when_there_is_news_then_nothing_else_waits_for_it() {
    let stage = Stage::serving(Site::new(51)).await;
    stage.server.silence("events");
    stage.server.put("services", rival(stage.site));
    stage.until("the request", |_| stage.server.count_of("events", "create") == 1).await;

    stage.serves_on().await;

    assert_eq!((stage.server.count_of("events", "create"), stage.dropped()), (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t169_given_a_port_that_somebody_holds_when_it_cannot_be_bound_then_the_service_has_an_event_with_the_node() {
    let site = Site::new(52);
    let _stranger = std::net::TcpListener::bind((site.cluster_ip(), SERVICE_PORT)).expect("a free address");
    let server = ApiServer::start(api_address(site)).await;
    server.put("services", web(site));

    let stage = Stage::following(site, server).await;

    let events = stage.events(1).await;
    assert_eq!((&events[0]["reason"], &events[0]["regarding"]["name"]), (&json!("FailedToListen"), &json!("web")));
    let note = events[0]["note"].as_str().expect("a note");
    assert!(note.starts_with("node node-1: default/web:http: cannot listen on "), "{note}");
    assert!(note.contains("ss -lnp"), "{note}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_health_address_that_is_taken_when_told_then_the_node_has_an_event_as_kubelets_write_them() {
    let site = Site::new(53);
    let server = ApiServer::start(api_address(site)).await;
    let address = std::net::SocketAddr::new(site.node_ip(), 10256);
    let failures = watch::Sender::new(Vec::new());
    let setup = Setup { unbound: failures.subscribe(), ..Setup::default() };
    let stage = Stage::following_with(site, server, setup).await;

    failures.send_replace(vec![Unbound { surface: Surface::Health, address, error: "taken".into() }]);

    let events = stage.events(1).await;
    let regarding = &events[0]["regarding"];
    assert_eq!((&regarding["kind"], &regarding["name"]), (&json!("Node"), &json!("node-1")));
    assert_eq!(regarding["uid"], "node-1", "kubectl describe looks for it");
    assert_eq!(events[0]["metadata"]["namespace"], "default");
    assert_eq!(
        (&events[0]["reason"], &events[0]["note"]),
        (&json!("FailedToStartProxierHealthcheck"), &json!("taken"))
    );
}
