//! What goes on over upgrades in a row: connections, UDP flows, pins and counters.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::net::TcpSocket;
use tokio::sync::watch;

use crate::counters::{counted, fallen};
use crate::is_measured;
use crate::load::Load;
use crate::relay::{House, descriptors, lasting_descriptors};
use crate::support::backend::{Backend, Talker};
use crate::support::client::{Answer, Caller, ask_on};
use crate::support::manifest::Manifest;
use crate::support::site::{SERVICE_PORT, Site};
use crate::support::{full, seen, within};
use crate::talk::Talks;

/// Descriptors of idle pipes that the threads of a relay may keep: two of each of eight pipes, on two threads.
const IDLE_PIPES: usize = 32;
/// Connections that are really made, of those that are asked for.
const LEAST_MADE: f64 = 0.9;
/// Memory after all upgrades, of that before the first one.
const MOST_RESIDENT: f64 = 1.25;

/// All pauses of talks but a hundredth are shorter by what an upgrade adds, where it is measured.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);
/// The same where other tests run at the same time, and nothing is optimised.
const LONGEST_STANDSTILL: Duration = Duration::from_secs(5);

/// How large it is.
struct Size {
    upgrades: usize,
    talks: u64,
    callers: usize,
    pinned: u8,
    connections_per_second: u32,
}

impl Size {
    fn of_this_run() -> Self {
        match full() {
            true => Self { upgrades: 20, talks: 200, callers: 64, pinned: 20, connections_per_second: 1_000 },
            false => Self { upgrades: 3, talks: 20, callers: 8, pinned: 4, connections_per_second: 200 },
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f25_f33_t150_t192_t234_given_streams_flows_and_pins_when_upgraded_again_and_again_then_all_go_on_and_no_counter_falls()
 {
    let (site, size) = (Site::new(16), Size::of_this_run());
    let _backends = [Backend::named(site.backend(1)).await, Backend::named(site.backend(2)).await];
    let _talkers = [Talker::named(site.backend(1)).await, Talker::named(site.backend(2)).await];
    let web = Manifest::new(site).tcp().udp().endpoints([site.backend(1), site.backend(2)]);
    let talks = Manifest::new(site).named("talks").cluster_ip(site.client(1)).tcp().endpoints([site.backend(3)]);
    let sticky = Manifest::new(site).named("sticky").cluster_ip(site.client(2)).tcp().sticky(3_600);
    let sticky = sticky.endpoints([site.backend(1), site.backend(2)]);
    let (mut house, mut serving) = House::serving_all(site, &[&web, &talks, &sticky]).await;
    let callers = callers(size.callers, site.service()).await;
    ask_all(&callers).await;
    // Who asks again may be silent for a minute; after one question and its answer it would be ten seconds.
    let (answers, pins) = (ask_all(&callers).await, pins(site, size.pinned).await);
    let asking = Caller::new(site.service()).await;
    asking.ask().await;
    house
        .until("who is answered has gone", |house| house.metric("kuberelay_service_open", &["protocol=\"TCP\""]) == 0)
        .await;
    let before = (descriptors(serving), lasting_descriptors(serving), seen::resident_bytes(serving)[0]);
    let talks = Talks::begin(size.talks, SocketAddr::new(site.client(1), SERVICE_PORT), site.backend(3)).await;
    let load = Load::start(site.service(), size.connections_per_second);
    let (over, is_over) = watch::channel(());
    let datagrams = tokio::spawn(ask_all_the_time(asking, is_over));
    let (mut waits_between, mut waits) = (Vec::new(), Vec::new());
    talks.longest_waits().await; // As they began.

    for _ in 0..size.upgrades {
        load.answered(50).await;
        let before = counted(&house);
        waits_between.extend(talks.longest_waits().await);
        let output = house.upgrade(&[]).await;
        waits.extend(talks.longest_waits().await);

        let told = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{told}\n{}", house.log());
        let last = std::mem::replace(&mut serving, house.serves().expect("somebody serves"));
        // It has nothing to wait for, though all talks go on.
        house.until("the last one ends", |house| house.has_ended(last)).await;
        assert_eq!(ask_all(&callers).await, answers, "the same backends, and the same sockets to them");
        assert_eq!(self::pins(site, size.pinned).await, pins);
        assert_eq!(fallen(&before, &counted(&house)), Vec::<String>::new());
    }

    drop(over);
    println!("{} datagrams were answered", datagrams.await.expect("none was lost"));
    let outcome = load.end().await;
    assert_eq!(outcome.failed, Vec::<String>::new(), "{:?}", house.losses());
    let bytes = talks.end().await;
    println!("{} upgrades, {bytes} bytes of {} talks: {outcome:?}", size.upgrades, size.talks);
    assert!(!full() || outcome.per_second >= LEAST_MADE * f64::from(size.connections_per_second), "{outcome:?}");
    // What talks wait for anyway, as the clients have the same processors, is not the upgrade's.
    let base = Pauses(waits_between).tell("without an upgrade").at(99);
    let pause = Pauses(waits).tell("with an upgrade").at(99);
    let standstill = seen::gauge(&metrics(&house), "kuberelay_upgrade_standstill_seconds_sum").unwrap_or_default();
    println!("standstill of each upgrade: {:.1} ms on average", standstill * 1_000.0 / size.upgrades as f64);
    let limit = if is_measured() { LONGEST_PAUSE } else { LONGEST_STANDSTILL };
    assert!(pause < limit + base, "{pause:?}, without an upgrade {base:?}");
    // A second more would be that of a client whose first packet was lost.
    assert!(!is_measured() || outcome.slowest < Duration::from_secs(1), "{:?}", outcome.slowest);
    let finished = ["service=\"talks\"", "reason=\"finished\""];
    let ends = |house: &House, labels: &[&str]| house.metric("kuberelay_service_closed_total", labels);
    house.until("all talks have ended", |house| ends(house, &finished[..1]) == size.talks).await;
    assert_eq!(ends(&house, &finished), size.talks, "none was cut off");
    // A backend that lets nobody in for a moment is no loss: another one was asked. Nor is a flow that nobody has used for long.
    let ends_well = [finished[1], "connect_failures", "protocol=\"UDP\",reason=\"idle\""];
    let is_loss = |line: &String| !ends_well.iter().any(|end| line.contains(end));
    assert_eq!(house.losses().into_iter().filter(is_loss).collect::<Vec<_>>(), Vec::<String>::new(), "of no Service");
    assert_eq!(house.metric("kuberelay_upgrades_total", &["result=\"success\""]), size.upgrades as u64);
    assert_eq!(house.metric("kuberelay_upgrade_standstill_seconds_count", &[]), size.upgrades as u64);
    let short = if is_measured() { "le=\"0.05\"" } else { "le=\"5\"" };
    assert_eq!(house.metric("kuberelay_upgrade_standstill_seconds_bucket", &[short]), size.upgrades as u64);
    let status = seen::page(house.admin(), "/status").expect("it answers");
    assert!(status.contains("\"standstillMs\":"), "{status}");
    let has_as_many = |pid| lasting_descriptors(pid) <= before.1 && descriptors(pid) <= before.0 + IDLE_PIPES;
    house.until("no more is open than before", |_| has_as_many(serving)).await;
    let after = seen::resident_bytes(serving)[0];
    println!("descriptors: {} before, {} after, {} of them no pipes", before.0, descriptors(serving), before.1);
    println!("resident: {} bytes before, {after} after", before.2);
    assert!(after as f64 <= MOST_RESIDENT * before.2 as f64, "{} bytes before, {after} after", before.2);
}

async fn callers(count: usize, service: SocketAddr) -> Vec<Caller> {
    let mut callers = Vec::with_capacity(count);
    for _ in 0..count {
        callers.push(Caller::new(service).await);
    }
    callers
}

async fn ask_all(callers: &[Caller]) -> Vec<Answer> {
    let mut answers = Vec::with_capacity(callers.len());
    for caller in callers {
        answers.push(caller.ask().await);
    }
    answers
}

/// One datagram after the other, each with its answer, and all from the same backend. How many that were.
async fn ask_all_the_time(caller: Caller, mut is_over: watch::Receiver<()>) -> u64 {
    let (first, mut count) = (caller.ask().await, 1);
    while is_over.changed().now_or_never().is_none() {
        assert_eq!(caller.ask().await, first);
        count += 1;
        tokio::time::sleep(Duration::from_millis(5)).await; // Its pace: nobody waits for this.
    }
    count
}

/// Whom session affinity leads each of some clients to.
async fn pins(site: Site, count: u8) -> Vec<SocketAddr> {
    let service = SocketAddr::new(site.client(2), SERVICE_PORT);
    let mut backends = Vec::new();
    for number in 0..count {
        backends.push(ask_from(site.client(20 + number), service).await);
    }
    backends
}

async fn ask_from(client: IpAddr, service: SocketAddr) -> SocketAddr {
    let socket = TcpSocket::new_v4().expect("descriptors are left");
    socket.bind(SocketAddr::new(client, 0)).expect("a port is free");
    let mut stream = within("a connection", socket.connect(service)).await.expect("it serves");
    ask_on(&mut stream).await.expect("a backend answers")
}

fn metrics(house: &House) -> String {
    seen::page(house.admin(), "/metrics").expect("it answers")
}

/// How long each talk has waited for an answer at most, each time that was looked at.
struct Pauses(Vec<Duration>);

impl Pauses {
    /// So many in a hundred were not longer.
    fn at(&self, percent: usize) -> Duration {
        self.0[(self.0.len() * percent / 100).min(self.0.len() - 1)]
    }

    /// Prints them.
    fn tell(mut self, when: &str) -> Self {
        self.0.sort_unstable();
        println!("longest wait of each talk, {when}: median {:?}, p99 {:?}", self.at(50), self.at(99));
        self
    }
}
