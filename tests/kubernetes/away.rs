//! A server that goes and comes back: what is served stays, metrics and log say so, and its return costs as much as changed
//! meanwhile. Servers that answer wrongly are in `failures`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Instant;

use kube_relay::metrics;
use kube_relay::stats::WatchFailure;

use crate::caller::Caller;
use crate::log::Log;
use crate::stage::{Setup, Stage, WATCH_SECONDS, api_address, node, service, slice, web};
use crate::support::api_server::ApiServer;
use crate::support::program::Program;
use crate::support::seen;
use crate::support::site::Site;

/// A pod that is nowhere: with an API server the program takes no backend on loopback.
const NOBODY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 135, 0, 1)), 8000);
const KINDS: [&str; 3] = ["services", "endpointslices", "nodes"];
const AGE: &str = "kuberelay_source_age_seconds";
const CONNECTED: &str = "kuberelay_source_connected";
const REVISION: &str = "kuberelay_config_revision";
const RELISTS: &str = "kuberelay_kube_relists_total";

/// True once each kind is watched for the `times`-th time.
fn watched(server: &ApiServer, times: usize) -> bool {
    KINDS.iter().all(|kind| server.count(kind, true) >= times)
}

/// A server with all three kinds of objects: the Service `web` with one backend among them.
async fn whole(site: Site, backend: SocketAddr) -> ApiServer {
    let server = ApiServer::start(api_address(site)).await;
    server.put("services", web(site));
    server.put("endpointslices", slice("web-1", &[backend]));
    server.put("nodes", node(site.node_ip(), &[]));
    server
}

/// Seconds since the server was heard, as a scrape would have it.
fn age(stage: &Stage) -> f64 {
    seen::gauge(&metrics::render(&stage.status(), true), AGE).expect("something is watched")
}

/// Another backend of `web`, and another Service.
fn change_both_kinds(stage: &Stage) {
    stage.server.put("endpointslices", slice("web-1", &[stage.site.backend(2)]));
    stage.server.put("services", service("other", &stage.site.client(7).to_string()));
}

async fn until_both_changed(stage: &Stage) {
    stage.until_backends(&[stage.site.backend(2)]).await;
    stage.until_known("other", true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t225_given_watches_that_drop_when_they_resume_then_nothing_is_listed_anew_and_one_change_is_one_batch() {
    let mut stage = Stage::serving(Site::new(225)).await;
    stage.until("watches", |_| watched(&stage.server, 1)).await;
    let (caller, revision) = (Caller::start(stage.site), stage.status().revision);

    stage.server.cut().await;
    stage.server.put("endpointslices", slice("web-1", &[stage.site.backend(2)]));
    stage.until_backends(&[stage.site.backend(2)]).await;
    stage.until("contact", |status| status.contact.is_connected()).await;

    assert_eq!(KINDS.map(|kind| stage.server.count(kind, false)), [1; 3], "{:#?}", stage.server.asked());
    assert_eq!(stage.status().revision, revision + 1);
    caller.end().await;
}

/// On one thread, so that all it logs is seen.
#[tokio::test]
async fn t225_given_watches_that_are_cut_and_expire_when_nothing_changed_then_nothing_is_done_and_each_listener_stays()
{
    let (site, (log, _logging)) = (Site::new(81), Log::of_this_thread());
    let mut stage = Stage::following(site, whole(site, site.backend(1)).await).await;
    stage.until_backends(&[site.backend(1)]).await;
    stage.until("watches", |_| watched(&stage.server, 1)).await;
    let (caller, revision) = (Caller::start(site), stage.status().revision);

    stage.server.cut().await;
    stage.until("the same watches again", |_| watched(&stage.server, 2)).await;
    stage.server.compact(); // So that everything has to be listed.
    stage.server.expire();
    stage.until_relists(WatchFailure::Expired, 3).await;
    stage.until("new watches", |_| watched(&stage.server, 3)).await;

    let status = stage.status();
    assert_eq!((status.revision, status.source.config_revision), (revision, 1), "there is nothing new");
    stage.server.put("endpointslices", slice("web-1", &[site.backend(2)]));
    stage.until_backends(&[site.backend(2)]).await;
    assert_eq!(stage.status().revision, revision + 1);
    assert_eq!(["listening", "no longer listening"].map(|words| log.lines_with(words).len()), [1, 0]);
    caller.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t226_f1_given_a_server_that_is_gone_when_it_is_back_then_what_changed_is_one_diff_and_nobody_noticed() {
    let mut stage = Stage::serving(Site::new(226)).await;
    let site = stage.site;
    let (caller, revision) = (Caller::start(site), stage.status().revision);

    stage.server.stop().await;
    stage.until("the loss to be noticed", |status| !status.contact.is_connected()).await;
    stage.until("the loss to be shown", |status| !status.source.last_reload_successful).await;
    let before = age(&stage);
    stage.until("the age to grow", |_| age(&stage) > before + 0.5).await;
    change_both_kinds(&stage);
    stage.server.resume().await;

    until_both_changed(&stage).await;
    stage.until("the return to be shown", |status| status.source.last_reload_successful).await;
    assert_eq!(stage.status().revision, revision + 1);
    caller.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t226_given_a_server_that_was_away_for_long_when_it_is_back_then_all_is_listed_anew_and_is_one_diff() {
    let mut stage = Stage::serving_with(Site::new(40), Setup::hasty()).await;
    stage.until("watches", |_| watched(&stage.server, 1)).await;
    let (caller, revision) = (Caller::start(stage.site), stage.status().revision);
    let relists = |stage: &Stage| {
        let metrics = metrics::render(&stage.status(), true);
        seen::sum(&metrics, RELISTS, &["reason=\"unreachable\""])
    };
    assert_eq!(relists(&stage), 0);

    stage.server.stop().await;
    // The first failure, from which on it is away, comes a while after it was last heard.
    stage.until("a long time", |_| age(&stage) > f64::from(WATCH_SECONDS + 4)).await;
    change_both_kinds(&stage);
    stage.server.resume().await;

    until_both_changed(&stage).await;
    stage.until("lists", |_| relists(&stage) == 3).await;
    assert_eq!(KINDS.map(|kind| stage.server.count(kind, false)), [2; 3], "{:#?}", stage.server.asked());
    assert_eq!(stage.status().revision, revision + 1);
    caller.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t226_f1_given_the_program_when_its_server_goes_and_comes_back_then_metrics_and_readiness_tell_of_it() {
    let site = Site::new(82);
    let mut server = whole(site, NOBODY).await;
    let program = Program::following(site, &server.kubeconfig()).await;
    let is_connected = |program: &Program| program.metric(CONNECTED, &[]) == 1;
    program.until("watches", |program| watched(&server, 1) && is_connected(program)).await;
    let sockets = seen::listening(site.service());

    server.stop().await;
    program.until("the loss", |program| !is_connected(program)).await;
    let before = program.gauge(AGE);
    program.until("the age to grow", |program| program.gauge(AGE) > before + 1.0).await;
    assert_eq!(program.page("/readyz").expect("still ready"), "ok (degraded: source)\n");
    assert!(program.metric("kuberelay_kube_watch_errors_total", &["reason=\"unreachable\""]) > 0);

    let resumed = Instant::now();
    server.resume().await;
    program.until("the return", is_connected).await;
    let age = program.gauge(AGE);
    assert!(age < resumed.elapsed().as_secs_f64() + 0.001, "each kind was heard since, to the millisecond: {age} s");
    assert_eq!(program.page("/readyz").expect("ready"), "ok");

    let expired = |program: &Program| program.metric(RELISTS, &["reason=\"expired\""]);
    assert_eq!(expired(&program), 0);
    server.expire();
    program.until("lists", |program| expired(program) == 3).await;
    assert_eq!(program.metric(REVISION, &[]), 1, "nothing changed");
    assert_eq!((sockets.len(), seen::listening(site.service())), (1, sockets));
}

/// On one thread, so that all it logs is seen.
#[tokio::test]
async fn f1_given_nodes_that_nobody_may_read_when_the_server_goes_and_comes_back_then_the_log_says_so_all_the_same() {
    let (site, (log, _logging)) = (Site::new(41), Log::of_this_thread());
    let server = ApiServer::start(api_address(site)).await;
    server.put("services", web(site));
    server.put("endpointslices", slice("web-1", &[site.backend(1)]));
    server.forbid("nodes");
    let mut stage = Stage::following(site, server).await;
    stage.until_backends(&[site.backend(1)]).await;
    let kinds = ["services", "endpointslices"];
    stage.until("watches", |_| kinds.iter().all(|kind| stage.server.count(kind, true) > 0)).await;
    stage.until("refusals", |_| stage.server.count("nodes", false) > 1).await;
    assert_eq!(log.lines_with("does not let us read this").len(), 1);

    stage.server.stop().await;
    stage.until("a line of the loss", |_| !log.lines_with("does not answer").is_empty()).await;
    stage.server.resume().await;
    stage.until("a line of the return", |_| !log.lines_with("answers again").is_empty()).await;

    assert_eq!(["does not answer", "answers again"].map(|words| log.lines_with(words).len()), [1, 1]);
    assert!(log.lines_with("lets us read everything again").is_empty());
}
