//! Servers that fail: what is served stays, few requests are made, and the next good answer makes all of it true. Servers
//! that are away are in `away`, what is too much or no JSON in `nonsense`.

use std::time::Duration;

use kube_relay::stats::WatchFailure;

use crate::caller::Caller;
use crate::log::Log;
use crate::stage::{Setup, Stage, WATCH_SECONDS, api_address, node, service, slice, web};
use crate::support::api_server::{ApiServer, Mood};
use crate::support::full;
use crate::support::site::Site;

/// Fails in one way until some failures of the kinds together were counted, changes everything meanwhile, and sees it come true at once.
async fn outage(stage: &mut Stage, mood: Mood, reason: WatchFailure) {
    let (site, failed) = (stage.site, if full() { 6 } else { 4 });
    stage.server.put("services", service("gone", "127.0.1.99"));
    stage.until_known("gone", true).await;
    let (caller, before) = (Caller::start(site), stage.server.asked().len());
    let began = tokio::time::Instant::now();

    stage.server.mood(mood);
    stage.server.cut().await;
    stage.server.delete("services", "default/gone");
    stage.server.compact();
    stage
        .until("failures", |status| {
            let of_it = status.contact.failures().filter(|(_, why, _)| *why == reason);
            of_it.map(|(_, _, count)| count).sum::<u64>() >= failed
        })
        .await;
    let (asked, seconds) = (stage.server.asked().len() - before, began.elapsed().as_secs_f64());
    assert_eq!(crate::support::relay::picks(&stage.status(), "web"), [site.backend(1).to_string()]);
    assert!(!stage.status().contact.is_connected());

    stage.server.put("endpointslices", slice("web-1", &[site.backend(2)]));
    stage.server.mood(Mood::Well);
    stage.until_backends(&[site.backend(2)]).await;
    stage.until_known("gone", false).await;
    stage.until("contact", |status| status.contact.is_connected() && status.source.last_reload_successful).await;
    caller.end().await;
    // Of three kinds, each at most thrice at once and then more and more slowly.
    assert!(asked as f64 <= 9.0 + seconds, "{asked} requests in {seconds} s");
}

/// Waits until lists have come of it.
async fn listed_anew(stage: &Stage, reason: WatchFailure) {
    stage.until_relists(reason, if full() { 4 } else { 2 }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f3_given_a_storm_of_500_when_it_ends_then_nobody_noticed_and_what_was_deleted_is_gone() {
    let mut stage = Stage::serving(Site::new(21)).await;

    outage(&mut stage, Mood::Refuse(500), WatchFailure::Server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t225_f3_given_watches_that_expire_by_status_when_listed_anew_then_nobody_noticed() {
    let mut stage = Stage::serving(Site::new(22)).await;

    outage(&mut stage, Mood::ExpireStatus, WatchFailure::Expired).await;

    listed_anew(&stage, WatchFailure::Expired).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t225_f3_given_watches_that_expire_by_an_event_when_listed_anew_then_nobody_noticed() {
    let mut stage = Stage::serving(Site::new(23)).await;

    outage(&mut stage, Mood::ExpireEvent, WatchFailure::Expired).await;

    listed_anew(&stage, WatchFailure::Expired).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t225_f3_given_watches_that_expire_by_a_bare_status_when_listed_anew_then_nobody_noticed() {
    let mut stage = Stage::serving(Site::new(36)).await;

    outage(&mut stage, Mood::ExpireBare, WatchFailure::Expired).await;

    listed_anew(&stage, WatchFailure::Expired).await;
}

/// On one thread, so that all it logs is seen.
#[tokio::test]
async fn f3_given_watches_that_expire_by_an_event_and_by_status_when_listed_anew_then_the_log_takes_neither_for_a_fault()
 {
    let (site, (log, _logging)) = (Site::new(83), Log::of_this_thread());
    let server = ApiServer::start(api_address(site)).await;
    server.put("services", web(site));
    server.put("endpointslices", slice("web-1", &[site.backend(1)]));
    server.put("nodes", node(site.node_ip(), &[]));
    let stage = Stage::following(site, server).await;
    let kinds = ["services", "endpointslices", "nodes"];
    stage.until("watches", |_| kinds.iter().all(|kind| stage.server.count(kind, true) > 0)).await;

    stage.server.mood(Mood::ExpireStatus); // Of new watches.
    stage.server.expire(); // Those that are open, by an event.
    stage.until_relists(WatchFailure::Expired, 6).await;

    let told = log.lines_with("the watch has expired, listing anew");
    assert!(told.len() >= 6 && told.iter().all(|line| line.contains(" INFO ")), "{told:?}");
    assert_eq!([" WARN ", " ERROR "].map(|level| log.lines_with(level)), [const { Vec::<String>::new() }; 2]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f4_given_events_of_no_known_shape_when_watched_then_all_is_listed_anew_and_nothing_is_missed() {
    let mut stage = Stage::serving(Site::new(37)).await;

    outage(&mut stage, Mood::Misshape, WatchFailure::Decode).await;

    listed_anew(&stage, WatchFailure::Decode).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f3_given_a_server_that_refuses_each_watch_when_something_changes_then_a_list_brings_it() {
    let mut stage = Stage::serving(Site::new(39)).await;
    stage.until("a watch", |_| stage.server.count("endpointslices", true) > 0).await;
    let caller = Caller::start(stage.site);
    stage.server.mood(Mood::RefuseWatches(500));
    stage.server.cut().await;

    stage.server.put("endpointslices", slice("web-1", &[stage.site.backend(2)]));
    stage.until_backends(&[stage.site.backend(2)]).await;

    stage.until_relists(WatchFailure::Server, 1).await;
    assert!(stage.server.count("endpointslices", true) >= 4, "one good watch and three tries");
    caller.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f3_given_a_server_that_says_when_to_come_back_when_asked_then_nobody_comes_before() {
    let stage = Stage::serving(Site::new(24)).await;
    stage.server.mood(Mood::Throttle(3));
    let before = stage.server.asked().len();
    let mut stage = stage;
    stage.server.cut().await;
    stage.until("two refusals of each", |_| stage.server.asked().len() >= before + 6).await;

    let asked = stage.server.asked();
    for resource in ["services", "endpointslices"] {
        let times: Vec<_> =
            asked.iter().skip(before).filter(|asked| asked.resource == resource).map(|asked| asked.at).collect();
        assert!(times.windows(2).all(|pair| pair[1] - pair[0] >= Duration::from_secs(3)), "{times:?}");
    }
    stage.server.mood(Mood::Well);
    stage.until("contact", |status| status.contact.is_connected()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f4_given_answers_that_are_no_json_when_the_server_recovers_then_nobody_noticed() {
    let mut stage = Stage::serving(Site::new(25)).await;

    outage(&mut stage, Mood::Garble, WatchFailure::Decode).await;
}

/// How long a change may take to be served behind a watch that broke without a word: its end, 5 s more, and a new one.
const STALE: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 5 + 3);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f5_given_watches_that_fall_silent_when_their_time_is_over_then_new_ones_bring_what_was_missed() {
    let site = Site::new(28);
    let stage = Stage::serving_with(site, Setup::hasty()).await;
    stage
        .until("watches", |_| stage.server.count("services", true) + stage.server.count("endpointslices", true) >= 2)
        .await;
    let (caller, since) = (Caller::start(site), tokio::time::Instant::now());

    stage.server.freeze();
    stage.server.put("endpointslices", slice("web-1", &[site.backend(2)]));
    stage.until_backends(&[site.backend(2)]).await;

    assert!(since.elapsed() <= STALE, "{:?}", since.elapsed());
    assert!(stage.status().contact.is_connected());
    caller.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f5_given_a_byte_a_second_when_the_server_recovers_then_what_hung_is_given_up_in_time() {
    let site = Site::new(29);
    let mut stage = Stage::serving_with(site, Setup::hasty()).await;
    let caller = Caller::start(site);

    stage.server.mood(Mood::Trickle);
    stage.server.compact(); // So that everything has to be listed.
    stage.server.cut().await;
    stage.until("lists", |_| stage.server.count("endpointslices", false) >= 2).await;
    stage.server.mood(Mood::Well);
    stage.server.put("endpointslices", slice("web-1", &[site.backend(2)]));
    let since = tokio::time::Instant::now();
    stage.until_backends(&[site.backend(2)]).await;

    assert!(since.elapsed() <= STALE, "{:?}", since.elapsed());
    caller.end().await;
}
