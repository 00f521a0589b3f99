//! Answers that are no JSON, not what was asked for, or too much of it: what is served stays, and so does memory.

use kube_relay::stats::{WatchFailure, WatchedKind};
use serde_json::{Value, json};

use crate::caller::Caller;
use crate::many::{self, ENDPOINTS};
use crate::stage::{Stage, api_address, node, service, slice};
use crate::support::api_server::{ApiServer, Mood};
use crate::support::program::Program;
use crate::support::site::Site;
use crate::support::{full, seen};

const KINDS: [&str; 3] = ["services", "endpointslices", "nodes"];
/// After how many bytes answers break off, each in its turn.
static LENGTHS: [usize; 12] = [0, 1, 2, 17, 60, 180, 31, 400, 1_500, 4_096, 16_384, 1_000_000];
/// So many of them are within each event here, and so within what any watch has to say.
const WITHIN_EVENTS: usize = 6;
/// Numbers that no other test here gives to Services.
const FIRST: u64 = 20_000;
const SERVICES: u64 = 100;
/// Of wrong objects, of which each replaces the one before.
const VERSIONS: usize = 300;
/// Of one object, more than a watch may bring.
const HUGE: usize = 20_000_000;
/// What all of it together may add to the program's memory.
const MEMORY_BYTES: u64 = 64_000_000;

/// True where the last thing that was asked of each kind was a watch.
fn is_watched(server: &ApiServer) -> bool {
    let asked = server.asked();
    KINDS.iter().all(|kind| asked.iter().rfind(|asked| asked.resource == *kind).is_some_and(|last| last.watch))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f4_given_an_object_of_20_mb_when_it_comes_then_the_watch_is_given_up_and_all_is_listed() {
    let stage = Stage::serving(Site::new(42)).await;
    stage.until("a watch", |_| stage.server.count("services", true) > 0).await;
    let caller = Caller::start(stage.site);

    let mut huge = service("huge", "127.0.42.9");
    huge["metadata"]["annotations"] = json!({"note": "x".repeat(HUGE)});
    stage.server.put("services", huge);

    stage.until_relists(WatchFailure::Decode, 1).await;
    stage.until_known("huge", true).await;
    let failures: Vec<_> = stage.status().contact.failures().collect();
    assert_eq!(failures, [(WatchedKind::Service, WatchFailure::Decode, 1)]);
    assert_eq!(stage.server.count("services", false), 2);
    stage.server.put("endpointslices", slice("web-1", &[stage.site.backend(2)]));
    stage.until_backends(&[stage.site.backend(2)]).await;
    stage.server.put("services", service("more", "127.0.42.8"));
    stage.until_known("more", true).await;
    caller.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f4_given_watches_and_lists_cut_at_a_dozen_places_when_the_server_recovers_then_all_is_true_and_nobody_noticed()
{
    let mut stage = Stage::serving(Site::new(26)).await;
    let (site, mut round) = (stage.site, 0);
    let change = |server: &ApiServer, round: u8| {
        server.put("services", service(&format!("cut-{round}"), &format!("127.0.26.{round}")));
        server.put("endpointslices", slice("web-1", &[site.backend(1 + round % 2)]));
        server.put("nodes", node(site.node_ip(), &[]));
    };
    let caller = Caller::start(site);

    let (of_watches, of_lists) = LENGTHS.split_at(WITHIN_EVENTS);
    for lengths in [of_watches, of_lists] {
        for _ in 0..if full() { lengths.len() / KINDS.len() } else { 1 } {
            round += 1;
            let cuts = stage.server.cuts() + KINDS.len();
            stage.server.mood(Mood::CutInTurn(lengths));
            if lengths == of_watches {
                stage.server.cut().await;
            } else {
                expire(&stage.server);
            }
            change(&stage.server, round);
            stage.until("cuts", |_| stage.server.cuts() >= cuts).await;
            stage.server.mood(Mood::Well);
            stage.until_backends(&[site.backend(1 + round % 2)]).await;
            stage.until_known(&format!("cut-{round}"), true).await;
            // That something changes behind a list lets the relay ask soon when it fails the next time.
            stage.until("watches", |_| is_watched(&stage.server)).await;
            round += 1;
            change(&stage.server, round);
            stage.until_backends(&[site.backend(1 + round % 2)]).await;
        }
    }

    assert!(stage.server.asked().len() < 60, "{:#?}", stage.server.asked());
    caller.end().await;
}

/// Has everything listed.
fn expire(server: &ApiServer) {
    server.compact();
    server.expire();
}

/// A program that follows a server, and how many Services it serves.
struct Trial {
    site: Site,
    server: ApiServer,
    program: Program,
    served: u64,
}

impl Trial {
    async fn start(site: Site) -> Self {
        let server = ApiServer::start(api_address(site)).await;
        for number in FIRST..FIRST + SERVICES {
            server.put("services", many::service(number));
            server.put("endpointslices", many::slice(number, ENDPOINTS));
        }
        server.put("nodes", node(site.node_ip(), &[]));
        let program = Program::following(site, &server.kubeconfig()).await;
        let mut trial = Self { site, server, program, served: SERVICES };
        trial.recover().await;
        trial
    }

    /// Has the server answer well, until all kinds are watched and what changes then is served.
    async fn recover(&mut self) {
        self.server.mood(Mood::Well);
        self.program.until("watches", |_| is_watched(&self.server)).await;
        self.serve_one_more("").await;
    }

    /// Changes something of each kind, which also lets the program ask soon when it fails the next time.
    async fn serve_one_more(&mut self, note: &str) {
        let mut service = many::service(FIRST + self.served);
        service["metadata"]["annotations"] = json!({"note": note});
        self.server.put("nodes", node(self.site.node_ip(), &[]));
        self.server.put("endpointslices", many::slice(FIRST + self.served, ENDPOINTS));
        self.server.put("services", service);
        self.served += 1;
        let serving = |program: &Program| program.metric("kuberelay_listeners", &["state=\"serving\""]);
        self.program.until("one more Service", |program| serving(program) == self.served).await;
    }

    fn undecoded(&self) -> u64 {
        self.program.metric("kuberelay_kube_watch_errors_total", &["reason=\"decode\""])
    }
}

/// A Service and a slice of which nothing can be used.
fn wrong(version: usize) -> [(&'static str, Value); 2] {
    let name = format!("wrong-{}", version % 10);
    let mut service = service(&name, "127.0.86.9");
    service["metadata"]["annotations"] = json!({"version": version.to_string()});
    service["spec"] = match version % 4 {
        0 => json!(null),
        1 => json!({"type": "Sideways", "clusterIPs": null, "ports": null}),
        2 => json!({"clusterIP": 7, "sessionAffinity": "Sometimes", "ports": [{"port": "http", "protocol": "QUIC"}]}),
        _ => json!([["spec"]]),
    };
    let endpoints = json!([{"addresses": null, "conditions": []}]);
    let mut slice = match version % 3 {
        0 => json!({"addressType": "IPv9", "endpoints": null, "ports": null}),
        1 => json!({"addressType": "IPv4", "endpoints": endpoints, "ports": [{"port": -1}]}),
        _ => json!({"addressType": "IPv4", "endpoints": "none", "ports": {}}),
    };
    slice["metadata"] = json!({"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": name}});
    [("services", service), ("endpointslices", slice)]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f4_given_wrong_and_partial_answers_when_the_program_reads_them_then_its_memory_stays_within_64_mb() {
    let mut trial = Trial::start(Site::new(86)).await;
    let [before, _] = seen::resident_bytes(trial.program.pid());

    while trial.server.cuts() < if full() { LENGTHS.len() } else { KINDS.len() } {
        let cuts = trial.server.cuts() + KINDS.len();
        trial.server.mood(Mood::CutInTurn(&LENGTHS));
        expire(&trial.server);
        trial.program.until("cuts", |_| trial.server.cuts() >= cuts).await;
        trial.recover().await;
    }
    for mood in [Mood::Garble, Mood::Misshape].into_iter().take(if full() { 2 } else { 1 }) {
        let undecoded = trial.undecoded();
        trial.server.mood(mood);
        expire(&trial.server);
        trial.program.until("failures", |_| trial.undecoded() >= undecoded + KINDS.len() as u64).await;
        trial.recover().await;
    }
    for (resource, object) in (0..VERSIONS).flat_map(wrong) {
        trial.server.put(resource, object);
    }
    trial.serve_one_more(&"x".repeat(HUGE)).await;
    trial.serve_one_more("").await;

    let [after, peak] = seen::resident_bytes(trial.program.pid());
    println!("{before} bytes before, {peak} at most, {after} in the end");
    assert!(trial.program.metric("kuberelay_objects_rejected_total", &[]) > 0);
    assert_eq!(trial.program.metric("kuberelay_panics_total", &[]), 0);
    assert!(peak < before + MEMORY_BYTES, "{before} bytes before, {peak} at most");
}
