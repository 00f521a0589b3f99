//! Endpoints come and go under load, and no client notices.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::support::backend::Backend;
use crate::support::manifest::Manifest;
use crate::support::relay::Relay;
use crate::support::site::Site;
use crate::support::{client, full};

/// How often an endpoint leaves and another comes.
const EDITS: u8 = 20;
/// What a backend has to finish what it was given, once its endpoint has left the manifest.
const GRACE: Duration = Duration::from_millis(100);
/// How soon after the write a change is to be in use. A debug build has other tests beside it; `.ci/run` has the release build
/// judged alone.
const IN_USE: Duration = if cfg!(debug_assertions) { Duration::from_secs(1) } else { Duration::from_millis(100) };
const CLIENTS: u64 = 4;

/// Clients that never retry.
struct Load {
    clients: Vec<tokio::task::JoinHandle<()>>,
    answered: Arc<AtomicU64>,
    stop: CancellationToken,
}

impl Load {
    fn start(service: SocketAddr) -> Self {
        let (answered, stop) = (Arc::<AtomicU64>::default(), CancellationToken::new());
        let clients = (0..CLIENTS).map(|_| tokio::spawn(ask_on_and_on(service, Arc::clone(&answered), stop.clone())));
        Self { clients: clients.collect(), answered, stop }
    }

    fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Ends, and fails where one request has failed.
    async fn finish(self) -> u64 {
        self.stop.cancel();
        for client in self.clients {
            client.await.expect("no request fails");
        }
        self.answered.load(Ordering::Relaxed)
    }
}

async fn ask_on_and_on(service: SocketAddr, answered: Arc<AtomicU64>, stop: CancellationToken) {
    while !stop.is_cancelled() {
        let number = answered.load(Ordering::Relaxed);
        client::ask(service).await.unwrap_or_else(|error| panic!("request {number}: {error}"));
        answered.fetch_add(1, Ordering::Relaxed);
    }
}

/// Asks until a backend answers, and tells how long that took.
async fn until_in_use(service: SocketAddr, backend: SocketAddr, since: Instant) -> Duration {
    while client::ask(service).await.expect("no request fails") != backend {}
    since.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t233_given_clients_without_retry_when_the_manifest_is_edited_20_times_then_no_request_fails() {
    let site = Site::new(20);
    let requests_per_edit = if full() { 1000 } else { 100 };
    let mut backends = Vec::new();
    for number in 1..=3 {
        backends.push(Backend::named(site.backend(number)).await);
    }
    let manifest = |backends: &[Backend]| Manifest::new(site).tcp().endpoints(backends.iter().map(|it| it.address));
    let relay = Relay::start(site, manifest(&backends)).await;
    let load = Load::start(site.service());

    let mut delays = Vec::new();
    for edit in 0..EDITS {
        let asked = load.answered();
        let leaving = backends.remove(0);
        backends.push(Backend::named(site.backend(4 + edit)).await);
        let written = Instant::now();
        relay.edit(manifest(&backends));
        delays.push(until_in_use(site.service(), site.backend(4 + edit), written).await);
        tokio::time::sleep_until((written + GRACE).into()).await; // What happens next is part of the story, not a wait.
        drop(leaving);
        relay.until("more requests", |_| load.answered() >= asked + requests_per_edit).await;
    }

    let answered = load.finish().await;
    delays.sort_unstable();
    let (median, worst) = (delays[delays.len() / 2], delays[delays.len() - 1]);
    println!("{answered} requests, 0 failed; a change was in use after {median:?} (median), {worst:?} (worst)");
    assert!(answered >= u64::from(EDITS) * requests_per_edit);
    assert!(median <= IN_USE, "a change was in use after {median:?} (median), {worst:?} (worst)");
}
