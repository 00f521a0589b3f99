//! A Service that comes and goes many times. A program of its own: descriptors are counted for the whole process, and a child
//! has copies of all of them until it runs.

use std::fs;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use kube_relay::control::{Message, Relay, RelayOptions};
use kube_relay::model::{Endpoint, Event, Objects, Service, Slice};
use kube_relay::plan::PlanOptions;
use kube_relay::status::Status;
use tokio::sync::Mutex;

use crate::support::backend::{Backend, Talker};
use crate::support::site::Site;
use crate::support::{client, full, within};

#[path = "support/mod.rs"]
mod support;

/// In the long form. A round takes three batches of events; without waiting for them `serve::listeners` has as many.
const ROUNDS: usize = 1_000;
const SHORT_ROUNDS: usize = 50;

/// Descriptors are everybody's here: one test at a time.
static ALONE: Mutex<()> = Mutex::const_new(());

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t158_given_a_service_that_comes_and_goes_when_it_is_gone_then_all_descriptors_are_back() {
    let _alone = ALONE.lock().await;
    let site = Site::new(158);
    let _backends = (Backend::named(site.backend(1)).await, Talker::named(site.backend(1)).await);
    let relay = start(site).await;
    round(&relay, site).await; // What is opened once for all is open now.
    let before = descriptors();

    for _ in 0..if full() { ROUNDS } else { SHORT_ROUNDS } {
        round(&relay, site).await;
    }

    let back = async {
        while descriptors() > before {
            tokio::task::yield_now().await; // The peers' ends of the last connections are closing.
        }
    };
    within("descriptors to be closed", back).await;
    assert_eq!(relay.open_connections(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t158_given_children_that_are_being_started_when_a_service_comes_and_goes_then_each_address_is_free_at_once() {
    let _alone = ALONE.lock().await;
    let site = Site::new(159);
    let _backends = (Backend::named(site.backend(1)).await, Talker::named(site.backend(1)).await);
    let relay = start(site).await;
    let _children = Children::start();

    for _ in 0..SHORT_ROUNDS {
        round(&relay, site).await;
    }
}

/// Children that are started one after another until this is dropped.
struct Children {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Children {
    fn start() -> Self {
        let over = Arc::<AtomicBool>::default();
        let is_over = Arc::clone(&over);
        let start_them = move || {
            while !is_over.load(Ordering::Relaxed) {
                assert!(Command::new("true").status().expect("it is in the path").success());
            }
        };
        Self { over, thread: Some(thread::spawn(start_them)) }
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(thread::panicking() || ended.is_some_and(|ended| ended.is_ok()), "each child runs");
    }
}

async fn start(site: Site) -> Relay {
    let node_port_addresses = vec![site.node_ip()];
    let plan = PlanOptions { node_port_addresses, allow_loopback_endpoints: true, ..PlanOptions::default() };
    let relay = Relay::start(RelayOptions { plan, udp_shards: NonZeroUsize::new(2), ..RelayOptions::default() });
    let relay = relay.expect("a relay can be started");
    send(&relay, [Message::Event(Event::Replace(Objects::default())), Message::Synced]).await;
    relay
}

/// The Service comes with its endpoint, carries a connection and a flow, loses the endpoint, and goes.
async fn round(relay: &Relay, site: Site) {
    let service = Service::new("web").cluster_ip(site.cluster_ip());
    let service = service.port("http", site.service().port()).node_port(30_000).udp_port("dns", site.service().port());
    let backend = site.backend(1);
    let slice = Slice::new("web-1", &service).port("http", backend.port()).udp_port("dns", backend.port());
    let with_backend = slice.clone().endpoint(Endpoint::new(backend.ip()));

    let slice_name = slice.name.clone();
    let put = |slice| Message::Event(Event::ApplySlice(Arc::new(slice)));
    send(relay, [Message::Event(Event::ApplyService(Arc::new(service.clone()))), put(with_backend)]).await;
    until(relay, "the Service to be served", |status| serves(status, backend)).await;
    assert_eq!(client::ask(site.service()).await.expect("the backend answers"), backend);
    assert_eq!(client::Caller::new(site.service()).await.ask_until_answered().await.backend, backend);
    send(relay, [put(slice)]).await;
    until(relay, "the Service to be parked", |status| !serves(status, backend)).await;
    let gone = [Event::DeleteSlice(slice_name), Event::DeleteService(service.name)];
    send(relay, gone.map(Message::Event)).await;
    until(relay, "the Service to be gone", |status| status.services.is_empty()).await;
}

async fn send(relay: &Relay, messages: impl IntoIterator<Item = Message>) {
    for message in messages {
        relay.messages().send(message).await.expect("the control task runs");
    }
}

/// Waits for a status; none of those until then tells of a listener that could not be bound.
async fn until(relay: &Relay, what: &str, condition: impl Fn(&Arc<Status>) -> bool) {
    let mut status = relay.status();
    let comes = |status: &Arc<Status>| {
        assert!(status.failed.is_empty(), "{what}: {:?}", status.failed);
        condition(status)
    };
    within(what, status.wait_for(comes)).await.expect("the control task runs");
}

fn serves(status: &Status, backend: SocketAddr) -> bool {
    let ports = status.services.values().flat_map(|service| service.report().ports);
    let mut picks = ports.filter_map(|port| port.backends.cluster).flatten();
    picks.any(|pick| pick == backend.to_string())
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").expect("procfs").count()
}
