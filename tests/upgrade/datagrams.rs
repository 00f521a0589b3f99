//! Datagrams that come all the time while processes change: each arrives once and in its place, or is counted as
//! dropped.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket as BlockingSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::interval;

use crate::relay::House;
use crate::support::manifest::Manifest;
use crate::support::site::Site;
use crate::support::{full, within};

/// How many clients there are (F25).
const FLOWS: usize = 64;
/// How often each says something.
const PACE: Duration = Duration::from_millis(20);
/// How often a backend looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);
/// Bytes of a datagram of which few have room in a socket's queue.
const LARGE: usize = 8_000;

/// A backend that hears the numbers that each client says, on a thread of its own: it is to lose none by itself.
struct Hearer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<BTreeMap<SocketAddr, u64>>,
}

impl Hearer {
    fn start(address: SocketAddr) -> Self {
        let socket = BlockingSocket::bind(address).expect("the test's own address is free");
        socket.set_read_timeout(Some(LOOK)).expect("an option");
        let stop = Arc::<AtomicBool>::default();
        let is_over = Arc::clone(&stop);
        Self { stop, thread: thread::spawn(move || hear(&socket, &is_over)) }
    }

    /// How many each client has said, by where its datagrams came from.
    fn end(self) -> BTreeMap<SocketAddr, u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("none is lost, doubled or out of its place")
    }
}

fn hear(socket: &BlockingSocket, is_over: &AtomicBool) -> BTreeMap<SocketAddr, u64> {
    let (mut heard, mut bytes) = (BTreeMap::new(), [0; 8]);
    loop {
        match socket.recv_from(&mut bytes) {
            Ok((_, client)) => {
                let next = heard.entry(client).or_insert(0);
                assert_eq!(u64::from_ne_bytes(bytes), *next, "the next number of {client}");
                *next += 1;
                socket.send_to(&bytes, client).expect("loopback is reachable");
            }
            Err(_) if is_over.load(Ordering::Relaxed) => return heard,
            Err(_) => {}
        }
    }
}

/// Says number after number, whether or not the last was answered, and hears each once and in its place. How many these
/// were.
async fn count(service: SocketAddr, mut over: watch::Receiver<bool>, all: Arc<AtomicU64>) -> u64 {
    let socket = UdpSocket::bind("0.0.0.0:0").await.expect("a source port is free");
    socket.connect(service).await.expect("loopback is reachable");
    let (mut said, mut heard, mut bytes, mut pace) = (0_u64, 0_u64, [0; 8], interval(PACE));
    while !*over.borrow() || heard < said {
        tokio::select! {
            biased;
            received = socket.recv(&mut bytes) => {
                received.expect("it is served");
                assert_eq!(u64::from_ne_bytes(bytes), heard, "the next answer");
                heard += 1;
                all.fetch_add(1, Ordering::Relaxed);
            }
            _ = pace.tick(), if !*over.borrow() => {
                socket.send(&said.to_ne_bytes()).await.expect("it is served");
                said += 1;
            }
            _ = over.changed(), if !*over.borrow() => {}
        }
    }
    said
}

/// Upgrades as often as is asked for, each time when so many more were counted.
async fn upgrade(house: &mut House, counted: &AtomicU64, more: u64) {
    for _ in 0..if full() { 20 } else { 3 } {
        let wanted = counted.load(Ordering::Relaxed) + more;
        house.until("some have come", |_| counted.load(Ordering::Relaxed) >= wanted).await;
        let output = house.upgrade(&[]).await;
        assert!(output.status.success(), "{output:?}\n{}", house.log());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t192_f25_given_flows_that_never_wait_when_upgraded_again_and_again_then_each_datagram_comes_once_and_in_its_place()
 {
    let site = Site::new(60);
    let backends = [site.backend(1), site.backend(2), site.backend(3)];
    let hearers = backends.map(Hearer::start);
    let (mut house, _) = House::serving(site, &Manifest::new(site).udp().endpoints(backends)).await;
    let (over, is_over) = watch::channel(false);
    let (answers, mut clients) = (Arc::<AtomicU64>::default(), JoinSet::new());
    for _ in 0..FLOWS {
        clients.spawn(count(site.service(), is_over.clone(), Arc::clone(&answers)));
    }

    upgrade(&mut house, &answers, 10 * FLOWS as u64).await;
    over.send_replace(true);
    let said: u64 = within("all answers", clients.join_all()).await.into_iter().sum();

    let heard: Vec<_> = hearers.into_iter().map(Hearer::end).collect();
    let by_source = || heard.iter().flat_map(BTreeMap::values);
    println!("{said} datagrams of {FLOWS} flows, and as many answers");
    assert_eq!((by_source().count(), by_source().sum()), (FLOWS, said), "each flow keeps its backend and its socket");
    let total = |house: &House, name: &str, label: &str| house.metric(&format!("kuberelay_{name}_total"), &[label]);
    house.until("all is counted", |house| total(house, "datagrams", "direction=\"downstream\"") >= said).await;
    for direction in ["direction=\"upstream\"", "direction=\"downstream\""] {
        assert_eq!(total(&house, "datagrams", direction), said, "{direction}");
    }
    assert_eq!((total(&house, "flows", ""), total(&house, "service_dropped", "")), (FLOWS as u64, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f25_given_more_datagrams_than_there_is_room_for_when_upgraded_then_each_is_relayed_or_counted_as_dropped() {
    let site = Site::new(61);
    let sink = BlockingSocket::bind(site.backend(1)).expect("the test's own address is free");
    let (mut house, _) = House::serving(site, &Manifest::new(site).udp().endpoints([site.backend(1)])).await;
    let (sent, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
    let client = BlockingSocket::bind("0.0.0.0:0").expect("a source port is free");
    client.connect(site.service()).expect("loopback is reachable");
    let flood = thread::spawn({
        let (sent, stop) = (Arc::clone(&sent), Arc::clone(&stop));
        move || {
            while !stop.load(Ordering::Relaxed) {
                client.send(&[0; LARGE]).expect("it is served");
                sent.fetch_add(1, Ordering::Relaxed);
            }
            client
        }
    });

    upgrade(&mut house, &sent, 5_000).await;
    stop.store(true, Ordering::Relaxed);
    let client = flood.join().expect("no panic");

    let sum = |house: &House| {
        let relayed = house.metric("kuberelay_datagrams_total", &["direction=\"upstream\""]);
        (relayed, house.metric("kuberelay_service_dropped_total", &[]))
    };
    // What was dropped is told with the next one that was not.
    let more = |house: &mut House| {
        client.send(&[0]).expect("it is served");
        let sent = sent.fetch_add(1, Ordering::Relaxed) + 1;
        let (relayed, dropped) = sum(house);
        relayed + dropped + 1 >= sent
    };
    house.until("all is counted", more).await;
    let all = sent.load(Ordering::Relaxed);
    house.until("the last one is counted", |house| sum(house).0 + sum(house).1 >= all).await;
    let (relayed, dropped) = sum(&house);
    println!("of {all} datagrams {relayed} were relayed and {dropped} dropped");
    assert_eq!(relayed + dropped, all);
    assert!(dropped > 0, "there was room for all");
    drop(sink);
}
