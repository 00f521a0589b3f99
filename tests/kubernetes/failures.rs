//! Servers that fail: what is served stays, few requests are made, and the next good answer makes all of it true.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use kube_relay::stats::{WatchFailure, WatchedKind};
use tokio::task::JoinHandle;

use crate::log::Log;
use crate::stage::{Setup, Stage, api_address, service, slice, web};
use crate::support::api_server::{ApiServer, Mood};
use crate::support::client;
use crate::support::site::Site;

/// A client that asks again and again: how often it was answered, and what went wrong if anything did.
struct Caller {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Caller {
    fn start(site: Site) -> Self {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (until, count) = (Arc::clone(&stop), Arc::clone(&answered));
        let task = tokio::spawn(async move {
            while !until.load(Ordering::Relaxed) {
                client::ask(site.service()).await.expect("a backend answers all the time");
                count.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(2)).await; // Not a load, only somebody who would notice.
            }
        });
        Self { stop, answered, task }
    }

    async fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.expect("no client saw an error");
        self.answered.load(Ordering::Relaxed)
    }
}

/// Fails in one way until `failed` times were counted, changes everything meanwhile, and sees it come true at once.
async fn outage(stage: &mut Stage, mood: Mood, reason: WatchFailure, failed: u64) {
    let site = stage.site;
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
    assert!(caller.end().await > 0);
    // Of three kinds, each at most thrice at once and then more and more slowly.
    assert!(asked as f64 <= 9.0 + seconds, "{asked} requests in {seconds} s");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f3_given_a_storm_of_500_when_it_ends_then_nobody_noticed_and_what_was_deleted_is_gone() {
    let mut stage = Stage::serving(Site::new(21)).await;

    outage(&mut stage, Mood::Refuse(500), WatchFailure::Server, 6).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t225_f3_given_watches_that_expire_by_status_when_listed_anew_then_nobody_noticed() {
    let mut stage = Stage::serving(Site::new(22)).await;

    outage(&mut stage, Mood::ExpireStatus, WatchFailure::Expired, 6).await;

    stage.until_relists(WatchFailure::Expired, 4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t225_f3_given_watches_that_expire_by_an_event_when_listed_anew_then_nobody_noticed() {
    let mut stage = Stage::serving(Site::new(23)).await;

    outage(&mut stage, Mood::ExpireEvent, WatchFailure::Expired, 6).await;

    stage.until_relists(WatchFailure::Expired, 4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t225_f3_given_watches_that_expire_by_a_bare_status_when_listed_anew_then_nobody_noticed() {
    let mut stage = Stage::serving(Site::new(36)).await;

    outage(&mut stage, Mood::ExpireBare, WatchFailure::Expired, 6).await;

    stage.until_relists(WatchFailure::Expired, 4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f4_given_events_of_no_known_shape_when_watched_then_all_is_listed_anew_and_nothing_is_missed() {
    let mut stage = Stage::serving(Site::new(37)).await;

    outage(&mut stage, Mood::Misshape, WatchFailure::Decode, 6).await;

    stage.until_relists(WatchFailure::Decode, 4).await;
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
    assert!(caller.end().await > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t226_given_a_server_that_was_away_for_long_when_it_is_back_then_all_is_listed_anew() {
    let mut stage = Stage::serving_with(Site::new(40), Setup::hasty()).await;
    let kinds = ["services", "endpointslices", "nodes"];
    stage.until("watches", |_| kinds.iter().all(|kind| stage.server.count(kind, true) > 0)).await;

    stage.server.stop().await;
    stage.until("a long time", |_| age(&stage) > 8.0).await;
    stage.server.put("endpointslices", slice("web-1", &[stage.site.backend(2)]));
    stage.server.resume().await;

    stage.until_backends(&[stage.site.backend(2)]).await;
    stage.until_relists(WatchFailure::Unreachable, 3).await;
    assert_eq!(kinds.map(|kind| stage.server.count(kind, false)), [2; 3], "{:#?}", stage.server.asked());
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

    outage(&mut stage, Mood::Garble, WatchFailure::Decode, 5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f4_given_an_object_of_20_mb_when_it_comes_then_the_watch_is_given_up_and_all_is_listed() {
    let stage = Stage::serving(Site::new(42)).await;
    stage.until("a watch", |_| stage.server.count("services", true) > 0).await;
    let caller = Caller::start(stage.site);

    let mut huge = service("huge", "127.0.42.9");
    huge["metadata"]["annotations"] = serde_json::json!({"note": "x".repeat(20_000_000)});
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
    assert!(caller.end().await > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f4_given_answers_cut_at_any_byte_when_the_server_recovers_then_all_is_true_and_few_were_asked() {
    let mut stage = Stage::serving(Site::new(26)).await;
    let site = stage.site;
    let caller = Caller::start(site);

    for bytes in [0, 1, 17, 180] {
        stage.server.mood(Mood::Cut(bytes));
        stage.server.cut().await;
        let before = stage.server.asked().len();
        let (name, ip) = (format!("cut-{bytes}"), format!("127.0.26.{bytes}"));
        stage.server.put("services", service(&name, &ip));
        stage.until("requests", |_| stage.server.asked().len() > before + 1).await;
        stage.server.mood(Mood::Well);
        stage.until_known(&name, true).await;
    }

    assert!(caller.end().await > 0);
    assert!(stage.server.asked().len() < 60, "{:#?}", stage.server.asked());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t225_given_watches_that_drop_when_they_resume_then_nothing_is_listed_anew_and_one_change_is_one_batch() {
    let mut stage = Stage::serving(Site::new(225)).await;
    let kinds = ["services", "endpointslices", "nodes"];
    stage.until("watches", |_| kinds.iter().all(|kind| stage.server.count(kind, true) > 0)).await;
    let revision = stage.status().revision;

    stage.server.cut().await;
    stage.server.put("endpointslices", slice("web-1", &[stage.site.backend(2)]));
    stage.until_backends(&[stage.site.backend(2)]).await;
    stage.until("contact", |status| status.contact.is_connected()).await;

    assert_eq!(kinds.map(|kind| stage.server.count(kind, false)), [1; 3], "{:#?}", stage.server.asked());
    assert_eq!(stage.status().revision, revision + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t226_f1_given_a_server_that_is_gone_when_it_is_back_then_what_changed_comes_and_nobody_noticed() {
    let mut stage = Stage::serving(Site::new(226)).await;
    let site = stage.site;
    let caller = Caller::start(site);

    stage.server.stop().await;
    stage.until("the loss to be noticed", |status| !status.contact.is_connected()).await;
    stage.until("the loss to be shown", |status| !status.source.last_reload_successful).await;
    let before = age(&stage);
    stage.until("the age to grow", |_| age(&stage) > before + 0.5).await;
    stage.server.put("endpointslices", slice("web-1", &[site.backend(2)]));
    stage.server.resume().await;

    stage.until_backends(&[site.backend(2)]).await;
    stage.until("the return to be shown", |status| status.source.last_reload_successful).await;
    assert!(caller.end().await > 0);
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

/// Seconds since the server was heard.
fn age(stage: &Stage) -> f64 {
    stage.status().contact.report().expect("something is watched").age_seconds
}

/// How long a change may take to be served behind a watch of 6 s that broke without a word: its end, 5 s more, and a new one.
const STALE: Duration = Duration::from_secs(6 + 5 + 3);

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
    assert!(stage.status().contact.is_connected() && caller.end().await > 0);
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
    assert!(caller.end().await > 0);
}
