//! What has to last: clients under load while the server is away. Memory over many lists is in `tests/relists.rs`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kube_relay::metrics;
use kube_relay::status::Status;
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};

use crate::stage::{Stage, slice};
use crate::support::relay::picks;
use crate::support::site::Site;
use crate::support::{client, full, seen};

/// How long the server is away: in the long form and else.
const OUTAGE: [Duration; 2] = [Duration::from_secs(60), Duration::from_secs(3)];
/// How stale anything may be after it: a pause, its jitter, and a new list. Pauses grow to 30 s.
const STALE: [Duration; 2] = [Duration::from_secs(65), Duration::from_secs(15)];
const CLIENTS: usize = 8;
/// Of a client, before it connects anew: load on connections as well as on what is open.
const QUESTIONS_PER_CONNECTION: usize = 20;
/// Of a client, after each answer: some thousand questions a second in all leave other tests their share of the machine.
const PAUSE: Duration = Duration::from_millis(1);

/// Clients that ask again and again.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    clients: JoinSet<()>,
}

impl Load {
    fn start(site: Site) -> Self {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            clients.spawn(ask_on_and_on(site, Arc::clone(&stop), Arc::clone(&answered)));
        }
        Self { stop, answered, clients }
    }

    fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// All answers, none of them an error.
    async fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(client) = self.clients.join_next().await {
            client.expect("no client saw an error");
        }
        self.answered()
    }
}

async fn ask_on_and_on(site: Site, stop: Arc<AtomicBool>, answered: Arc<AtomicU64>) {
    while !stop.load(Ordering::Relaxed) {
        let mut stream = client::connect(site.service()).await.expect("a connection all the time");
        for _ in 0..QUESTIONS_PER_CONNECTION {
            client::ask_on(&mut stream).await.expect("a backend answers all the time");
            answered.fetch_add(1, Ordering::Relaxed);
            sleep(PAUSE).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t226_f1_given_load_when_the_server_is_killed_for_a_minute_then_no_client_sees_an_error() {
    let mut stage = Stage::serving(Site::new(96)).await;
    let site = stage.site;
    let (load, revision) = (Load::start(site), stage.status().revision);
    let [outage, stale] = [OUTAGE, STALE].map(|forms| forms[usize::from(!full())]);

    let killed = tokio::time::Instant::now();
    stage.server.stop().await;
    stage.until("the loss to be noticed", |status| !status.contact.is_connected()).await;
    let before = load.answered();
    sleep_until(killed + outage).await; // Time itself is what is tried here.
    assert!(!stage.status().contact.is_connected() && load.answered() > before);
    let age = seen::gauge(&metrics::render(&stage.status(), true), "kuberelay_source_age_seconds");
    assert!(age.is_some_and(|age| age >= outage.as_secs_f64() - 0.1), "{age:?} s at /metrics after {outage:?}");
    assert_eq!(picks(&stage.status(), "web"), [site.backend(1).to_string()]);

    stage.server.put("endpointslices", slice("web-1", &[site.backend(2)]));
    stage.server.resume().await;
    let (resumed, after) = (Instant::now(), [site.backend(2).to_string()]);
    let followed = async {
        let is_back = |status: &Status| status.contact.is_connected() && picks(status, "web") == after;
        while !is_back(&stage.status()) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(stale, followed).await.expect("what changed is served");
    let late = resumed.elapsed();
    assert_eq!(stage.status().revision, revision + 1, "one diff");
    println!(
        "{} answers without an error over an outage of {outage:?}; followed {late:?} after its end",
        load.end().await
    );
}
