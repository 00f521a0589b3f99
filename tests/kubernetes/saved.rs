//! A start without the server: the state of the last run is served, where it is whole and this cluster's.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::log::Log;
use crate::stage::{Setup, Stage, api_address, node, service, slice, web};
use crate::support::api_server::ApiServer;
use crate::support::client;
use crate::support::relay::service_of;
use crate::support::site::Site;

const FILE: &str = "last-known-good.json";
/// From a start without the server to the first answer of a backend. Half a second of it is the server's to answer. Debug
/// builds have other tests beside them, as many as the machine has processors.
const SERVED: Duration = if cfg!(debug_assertions) { Duration::from_secs(5) } else { Duration::from_secs(1) };

/// A server that a relay has followed and that is away now, with the Service `web` and its first backend.
async fn after_a_run(site: Site, setup: &Setup, more: impl FnOnce(&ApiServer)) -> ApiServer {
    let server = ApiServer::start(api_address(site)).await;
    server.put("services", web(site));
    server.put("endpointslices", slice("web-1", &[site.backend(1)]));
    server.put("nodes", node(site.node_ip(), &[]));
    more(&server);
    let first = Stage::following_with(site, server, setup.clone()).await;
    first.until_backends(&[site.backend(1)]).await;
    let folder = setup.selection.state_dir.clone().expect("it keeps its state");
    first.until("the state to be saved", |_| folder.join(FILE).exists()).await;
    let mut server = first.end().await;
    server.stop().await;
    server
}

/// One that keeps its state, of a server that an authority vouches for.
fn keeping_in(folder: &Path, authority: &'static str) -> Setup {
    Setup { authority: Some(authority), ..Setup::keeping_in(folder) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t227_f2_given_a_saved_state_when_the_server_is_away_at_the_start_then_it_is_served_until_the_server_is_back() {
    let site = Site::new(227);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let setup = keeping_in(folder.path(), "authority-1.pem");
    let server = after_a_run(site, &setup, |_| {}).await;

    let begin = Instant::now();
    let mut stage = Stage::following_with(site, server, setup).await;
    stage.until_backends(&[site.backend(1)]).await;
    assert_eq!(client::ask(site.service()).await.expect("a backend answers"), site.backend(1));
    let took = begin.elapsed();
    println!("served from the saved state after {took:?}, at most {SERVED:?}");
    assert!(took < SERVED, "served after {took:?}");
    assert!(stage.status().synced && !stage.status().contact.is_connected());
    assert!(stage.is_eligible(), "the Node is in the file, too");
    let saved_at = |stage: &Stage| stage.status().contact.report().and_then(|report| report.saved_at);
    let head = fs::read_to_string(folder.path().join(FILE)).expect("the state");
    let told = saved_at(&stage).expect("a saved state is served");
    assert!(head.starts_with('{') && head.lines().next().is_some_and(|head| head.contains(&told)), "{told}: {head}");

    stage.server.put("endpointslices", slice("web-1", &[site.backend(2)]));
    stage.server.resume().await;
    stage.until_backends(&[site.backend(2)]).await;
    stage.until("contact", |status| status.contact.is_connected()).await;
    assert_eq!(saved_at(&stage), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f25_given_a_folder_that_is_still_another_process_s_when_the_server_is_followed_then_nothing_is_written_there()
{
    let (site, folder_taken) = (Site::new(85), CancellationToken::new());
    let folder = tempfile::tempdir().expect("a folder can be made");
    let mut setup = keeping_in(folder.path(), "authority-1.pem");
    setup.selection.folder_taken = Some(folder_taken.clone());
    let server = ApiServer::start(api_address(site)).await;
    server.put("services", web(site));
    server.put("endpointslices", slice("web-1", &[site.backend(1)]));
    let stage = Stage::following_with(site, server, setup).await;
    stage.until_backends(&[site.backend(1)]).await;
    assert!(!folder.path().join(FILE).exists());

    folder_taken.cancel();

    stage.until("the state to be saved", |_| folder.path().join(FILE).exists()).await;
}

/// On one thread, so that all it logs is seen.
#[tokio::test]
async fn f2_given_a_state_saved_three_hours_ago_when_it_is_served_then_one_line_says_of_when_it_is_and_how_old() {
    let (site, (log, _logging)) = (Site::new(89), Log::of_this_thread());
    let folder = tempfile::tempdir().expect("a folder can be made");
    let setup = Setup::keeping_in(folder.path());
    let server = after_a_run(site, &setup, |_| {}).await;
    let saved_at = Timestamp::now() - Duration::from_secs(3 * 3_600);
    date(&folder.path().join(FILE), saved_at);

    let stage = Stage::following_with(site, server, setup).await;
    stage.until_backends(&[site.backend(1)]).await;

    let told = log.lines_with("serving the saved state");
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains(" WARN ") && told[0].contains(&format!("saved_at=\"{saved_at:.0}\"")), "{told:?}");
    let age = told[0].split_whitespace().find_map(|word| word.strip_prefix("age_seconds=")?.parse::<u64>().ok());
    assert!(age.is_some_and(|age| (3 * 3_600..3 * 3_600 + 60).contains(&age)), "{told:?}");
}

/// Gives a saved state another date.
fn date(file: &Path, at: Timestamp) {
    let text = fs::read_to_string(file).expect("the state");
    let (head, rest) = text.split_once('\n').expect("a head");
    let mut head: Value = serde_json::from_str(head).expect("JSON");
    head["savedAt"] = format!("{at:.0}").into();
    fs::write(file, format!("{head}\n{rest}")).expect("the test's folder can be written");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f2_given_no_saved_state_when_the_server_is_away_at_the_start_then_the_relay_waits_for_it() {
    let site = Site::new(27);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let setup = Setup::keeping_in(folder.path());
    let mut server = ApiServer::start(api_address(site)).await;
    server.stop().await;
    server.put("services", web(site));

    let mut stage = Stage::following_with(site, server, setup).await;
    stage.until("two tries", |status| status.contact.failures().any(|(_, _, count)| count >= 2)).await;
    assert!(!stage.status().synced);

    stage.server.resume().await;
    stage.until("the first state", |status| status.synced).await;
}

/// On one thread, so that all it logs is seen.
#[tokio::test]
async fn f2_given_the_state_of_another_cluster_when_the_server_is_away_then_it_is_not_served_and_soon_replaced() {
    let (site, (log, _logging)) = (Site::new(70), Log::of_this_thread());
    let folder = tempfile::tempdir().expect("a folder can be made");
    let server = after_a_run(site, &keeping_in(folder.path(), "authority-1.pem"), |_| {}).await;
    let before = fs::read(folder.path().join(FILE)).expect("the state");

    let mut stage = Stage::following_with(site, server, keeping_in(folder.path(), "authority-2.pem")).await;
    stage.until("a word on it", |_| !log.lines_with("the saved state is of another cluster").is_empty()).await;
    stage.until("two tries", |status| status.contact.failures().any(|(_, _, count)| count >= 2)).await;
    assert!(!stage.status().synced);
    let told = log.lines_with("the saved state is of another cluster");
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains(" WARN ") && told[0].contains("saved_from=\"http://"), "{told:?}");

    stage.server.resume().await;
    stage.until_backends(&[site.backend(1)]).await;
    let replaced = || fs::read(folder.path().join(FILE)).is_ok_and(|now| now != before);
    stage.until("the state to be this cluster's", |_| replaced()).await;
}

/// On one thread, so that all it logs is seen.
#[tokio::test]
async fn f2_given_a_saved_state_that_is_cut_off_when_the_server_is_away_then_nothing_of_it_is_served() {
    let (site, (log, _logging)) = (Site::new(71), Log::of_this_thread());
    let folder = tempfile::tempdir().expect("a folder can be made");
    let setup = Setup::keeping_in(folder.path());
    let server = after_a_run(site, &setup, |_| {}).await;
    let whole = fs::read(folder.path().join(FILE)).expect("the state");
    fs::write(folder.path().join(FILE), &whole[..whole.len() - 40]).expect("the test's folder can be written");

    let mut stage = Stage::following_with(site, server, setup).await;
    stage.until("a word on it", |_| !log.lines_with("the saved state cannot be used").is_empty()).await;
    assert!(log.lines_with("the saved state cannot be used")[0].contains("it is cut off"));
    assert!(!stage.status().synced);

    stage.server.resume().await;
    stage.until_backends(&[site.backend(1)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f2_given_a_saved_service_at_the_servers_own_address_when_served_then_the_way_to_the_server_stays_free() {
    let site = Site::new(72);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let setup = Setup::keeping_in(folder.path());
    let usurper = |server: &ApiServer| server.put("services", service("usurper", &api_address(site).ip().to_string()));
    let server = after_a_run(site, &setup, usurper).await;

    let mut stage = Stage::following_with(site, server, setup).await;
    stage.until_backends(&[site.backend(1)]).await;
    assert!(stage.status().contact.report().is_some_and(|report| report.saved_at.is_some()));
    assert!(service_of(&stage.status(), "usurper").is_none());

    stage.server.resume().await;
    stage.until_known("usurper", true).await; // What the server says now counts as it is.
}
