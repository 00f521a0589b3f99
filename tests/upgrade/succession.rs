//! Hand-overs that succeed: by hand, by order, many in a row.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use tokio::task::spawn_blocking;

use crate::load::Load;
use crate::relay::{House, descriptors};
use crate::support::backend::{Backend, Talker};
use crate::support::client::{Caller, ask_on, ask_times, connect, refused};
use crate::support::manifest::Manifest;
use crate::support::site::Site;
use crate::support::{full, seen};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t234_given_a_thousand_new_connections_a_second_when_another_process_takes_over_then_none_fails() {
    let site = Site::new(10);
    let [one, two] = [Backend::named(site.backend(1)).await, Backend::named(site.backend(2)).await];
    let manifest = Manifest::new(site).tcp().endpoints([one.address, two.address]);
    let (mut house, first) = House::serving(site, &manifest).await;
    let mut long = connect(site.service()).await.expect("it serves");
    let backend = ask_on(&mut long).await.expect("a backend answers");
    let load = Load::start(site.service(), 1_000);
    load.answered(300).await;

    let second = house.start(|command| _ = command.arg("--take-over"));
    house.until("the second one serves", |house| house.serves() == Some(second)).await;
    load.answered(300).await;

    let outcome = load.end().await;
    println!("{outcome:?}");
    assert_eq!(outcome.failed, Vec::<String>::new(), "{:?}", house.losses());
    assert!(house.is_ready());
    assert_eq!(house.metric("kuberelay_upgrades_total", &["result=\"success\""]), 1);
    house.until("the first one ends by itself", |house| house.has_ended(first)).await;
    assert_eq!(ask_on(&mut long).await.expect("it goes on"), backend);
    house.until_told("handed over").await;
    house.until_told(r#""message":"taken over""#).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f25_given_upgrades_in_a_row_under_load_when_ordered_then_none_fails_and_no_descriptor_is_left() {
    let site = Site::new(11);
    let backend = Backend::named(site.backend(1)).await;
    let manifest = Manifest::new(site).tcp().udp().endpoints([backend.address]);
    let (mut house, mut serving) = House::serving(site, &manifest).await;
    // As many as a machine bears that runs other tests at the same time, or as many as there are to be.
    let (rounds, per_second) = if full() { (20, 1_000) } else { (3, 200) };
    let (before, load) = (descriptors(serving), Load::start(site.service(), per_second));

    for _ in 0..rounds {
        load.answered(50).await;
        let output = house.upgrade(&[]).await;

        let told = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{told}\n{}", house.log());
        let last = std::mem::replace(&mut serving, house.serves().expect("somebody serves"));
        assert!(told.contains(&format!("pid {serving} serves now")), "{told}");
        assert_ne!(serving, last);
        house.until("the last one ends", |house| house.has_ended(last)).await;
    }

    let outcome = load.end().await;
    println!("{rounds} upgrades: {outcome:?}");
    assert_eq!(outcome.failed, Vec::<String>::new(), "{:?}", house.losses());
    house.until("as many are open as before", |_| descriptors(serving) <= before).await;
    // Those among them that were on their way to a backend have ended in a process that is gone.
    let count =
        |house: &House, name: &str| house.metric(&format!("kuberelay_service_{name}_total"), &["protocol=\"TCP\""]);
    house.until("the last of them is counted", |house| count(house, "closed") >= outcome.answered).await;
    for name in ["accepted", "connections", "closed"] {
        assert_eq!(count(&house, name), outcome.answered, "{name}");
    }
}

#[tokio::test]
async fn t234_given_udp_and_parked_listeners_when_another_process_takes_over_then_each_is_what_it_was() {
    let site = Site::new(12);
    let backend = Backend::named(site.backend(1)).await;
    let _talker = Talker::named(site.backend(1)).await;
    let manifest = Manifest::new(site).tcp().udp().endpoints([backend.address]);
    let empty = Manifest::new(site).named("empty").cluster_ip(site.client(1)).tcp().udp();
    let (mut house, first) = House::serving(site, &manifest).await;
    fs::write(house.manifest(), format!("{manifest}\n---\n{empty}")).expect("the test's folder can be written");
    House::signal(first, Signal::HUP);
    house
        .until("it knows both", |house| seen::page(house.admin(), "/status").is_ok_and(|page| page.contains("empty")))
        .await;
    let caller = Caller::new(site.service()).await;
    let answer = caller.ask().await;

    let second = house.start(|command| _ = command.arg("--take-over"));
    house.until("the second one serves", |house| house.serves() == Some(second)).await;
    house.until("the first one ends", |house| house.has_ended(first)).await;

    assert_eq!(caller.ask().await, answer, "the same flow");
    assert_eq!(ask_times(1, site.service()).await, [backend.address]);
    let parked = SocketAddr::new(site.client(1), site.service().port());
    assert!(refused(parked).await);
    house.until_told(r#""adopted":4,"differing":0,"unwanted":0,"streams":0,"flows":1"#).await;
    assert!(!house.log().contains("cannot listen"), "{}", house.log());
}

#[tokio::test]
async fn t234_given_services_that_changed_meanwhile_when_upgraded_then_each_port_is_as_the_new_one_has_planned_it() {
    let site = Site::new(37);
    let backend = Backend::named(site.backend(1)).await;
    let _talker = Talker::named(site.backend(1)).await;
    let other = |manifest: Manifest| manifest.named("other").cluster_ip(site.client(1)).tcp().udp();
    let [web, other] = [Manifest::new(site).tcp().udp(), other(Manifest::new(site))];
    let (mut house, _) = House::serving_all(site, &[&web.clone().endpoints([backend.address]), &other]).await;
    let there = SocketAddr::new(site.client(1), site.service().port());
    assert!(refused(there).await);

    fs::write(house.manifest(), format!("{web}\n---\n{}", other.endpoints([backend.address])))
        .expect("the test's folder can be written");
    let output = house.upgrade(&[]).await;

    assert!(output.status.success(), "{output:?}\n{}", house.log());
    assert!(refused(site.service()).await);
    assert_eq!(ask_times(1, there).await, [backend.address]);
    assert_eq!(Caller::new(there).await.ask_until_answered().await.backend, backend.address);
    assert!(!house.log().contains("cannot listen"), "{}", house.log());
    house.until("it is ready", |house| house.is_ready()).await;
}

#[tokio::test]
async fn t192_t234_given_a_port_that_threads_share_when_the_next_one_has_fewer_for_it_then_all_flows_go_on() {
    let site = Site::new(38);
    let _talkers = [Talker::named(site.backend(1)).await, Talker::named(site.backend(2)).await];
    let mut house = House::new(site, &Manifest::new(site).udp().endpoints([site.backend(1), site.backend(2)]));
    let first = house.start(|command| _ = command.args(["--udp-shards", "2"]));
    house.until("it is ready", |house| house.serves() == Some(first) && house.is_ready()).await;
    let mut callers = Vec::new();
    for _ in 0..16 {
        let caller = Caller::new(site.service()).await;
        callers.push((caller.ask().await, caller));
    }

    let second = house.start(|command| _ = command.arg("--take-over"));
    house.until("the second one serves", |house| house.serves() == Some(second)).await;

    for (answer, caller) in callers {
        assert_eq!(caller.ask().await, answer);
    }
    house.until_told(r#""adopted":1,"differing":0,"unwanted":0,"streams":0,"flows":16"#).await;
}

#[tokio::test]
async fn t205_f25_given_a_load_balancer_that_asks_all_the_time_when_upgraded_then_it_is_never_refused() {
    let site = Site::new(36);
    let backend = Backend::named(site.backend(1)).await;
    let asked = free_node_port();
    let balanced = Manifest::new(site).tcp().local_to("here").health_port(asked.port()).endpoints([backend.address]);
    let mut house = House::new(site, &balanced).with_node_addresses("127.0.0.1/32");
    let first = house.start(|command| _ = command.args(["--node-name", "here"]));
    house.until("it is ready", |house| house.serves() == Some(first) && house.is_ready()).await;
    let over = Arc::new(AtomicBool::new(false));
    seen::page(asked, "/").expect("it is told that there is an endpoint");
    let _over_in_any_case = Over(Arc::clone(&over));
    let asking = spawn_blocking({
        let over = Arc::clone(&over);
        move || {
            let (mut asked_times, mut refused) = (0, 0);
            while !over.load(Relaxed) {
                asked_times += 1;
                refused += u32::from(TcpStream::connect(asked).is_err_and(is_refusal));
                thread::sleep(Duration::from_millis(1)); // Its pace: of too many at once some are cut off.
            }
            (asked_times, refused)
        }
    });

    for _ in 0..3 {
        let output = house.upgrade(&[]).await;
        assert!(output.status.success(), "{output:?}\n{}", house.log());
        seen::page(asked, "/").expect("it is told as before");
    }

    over.store(true, Relaxed);
    let (asked_times, refused): (u32, u32) = asking.await.expect("no panic");
    println!("asked {asked_times} times");
    assert_eq!(refused, 0);
    assert!(!house.log().contains("cannot answer health checks"), "{}", house.log());
}

/// Says when it is dropped that it is over, also where a test fails.
struct Over(Arc<AtomicBool>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// A port of this machine that nobody has.
fn free_node_port() -> SocketAddr {
    let mut all = (30_000..32_768).map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    all.find(|address| TcpListener::bind(address).is_ok()).expect("one is free")
}

fn is_refusal(error: io::Error) -> bool {
    error.kind() == io::ErrorKind::ConnectionRefused
}

#[tokio::test]
async fn t234_given_a_process_that_is_about_to_end_when_it_is_upgraded_then_the_next_one_drains_and_ends_with_it() {
    let site = Site::new(14);
    let backend = Backend::named(site.backend(1)).await;
    let manifest = Manifest::new(site).tcp().endpoints([backend.address]);
    let mut house = House::new(site, &manifest);
    let first = house.start(|command| _ = command.args(["--shutdown-delay", "2s", "--drain-timeout", "60s"]));
    house.until("it is ready", |house| house.is_ready()).await;
    let mut long = connect(site.service()).await.expect("it serves");
    assert_eq!(ask_on(&mut long).await.expect("a backend answers"), backend.address);

    House::signal(first, Signal::TERM);
    house.until("it is about to end", |house| !house.is_ready()).await;
    let output = house.upgrade(&[]).await;
    house.until("the first one ends", |house| house.has_ended(first)).await;
    house.until("nobody is let in", |house| house.log().contains("draining")).await;

    assert!(output.status.success(), "{output:?}");
    assert_eq!(ask_on(&mut long).await.expect("it goes on there"), backend.address);
    drop(long);
    house.until("the next one ends", |house| house.relays().is_empty()).await;
}

#[tokio::test]
async fn given_nobody_to_take_over_from_when_one_starts_so_then_it_serves_as_ever_and_hands_over_in_its_turn() {
    let site = Site::new(13);
    let backend = Backend::named(site.backend(1)).await;
    let mut house = House::new(site, &Manifest::new(site).tcp().endpoints([backend.address]));

    let first = house.start(|command| _ = command.arg("--take-over"));
    house.until("it serves", |house| house.serves() == Some(first) && house.is_ready()).await;

    assert_eq!(ask_times(2, site.service()).await, [backend.address; 2]);
    let output = house.upgrade(&[]).await;
    assert!(output.status.success(), "{output:?}");
}
