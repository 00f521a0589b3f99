//! Backends that are dead in different ways, and how long clients wait because of them.

use std::fs::File;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kube_relay::name::Family;

use crate::bursts::exchange;
use crate::rig::{FAMILIES, full, skip};
use crate::stage::{PORT, Relay, Stage, until};
use crate::workload::{Backend, Bulk};

/// Clients, one after the other: in less than the ten seconds after which a backend that is out is tried again.
const CLIENTS: usize = 3_000;
const FEW_CLIENTS: usize = 1_000;

/// Failures in a row after which a backend is out.
const FAILURES: u64 = 5;

/// A client that has met a dead backend waits no longer: a step of 250 ms, and a fifth. What there is beyond 252 ms is
/// waiting for a processor, on each of the six ways between client, relay and backend: beside the compilers that tests in
/// debug builds run next to, up to 150 ms were seen. There it is enough that nobody waits for the second step, too.
const LONGEST: Duration = Duration::from_millis(if cfg!(debug_assertions) { 750 } else { 300 });
/// Nor does anybody once it is ejected.
const LONGEST_AFTER: Duration = Duration::from_millis(if cfg!(debug_assertions) { 100 } else { 10 });

/// Nobody listens in the first pod: its kernel refuses.
pub(crate) fn one_refuses() {
    let stage = Stage::build();
    let _backends = others(&stage);
    let relay = stage.relay(&stage.backends(Family::V4), &[]);

    let asked = Asked::run(&stage, &relay);

    println!("{asked}");
    assert!(asked.median_of_those_who_met_it() < asked.median() + Duration::from_millis(5), "a retry adds too much");
    assert_eq!(failures(&stage, &relay, "refused"), FAILURES);
    assert_eq!(ejected(&relay), 1);
}

/// The first pod does not answer for its address any more, as one whose node is down.
pub(crate) fn one_is_a_black_hole() {
    let stage = Stage::build();
    let _backends = others(&stage);
    stage.pod(0).sysctl("net/ipv4/conf/all/arp_ignore", "8").expect("the namespace is ours");
    let relay = stage.relay(&stage.backends(Family::V4), &[]);

    let asked = Asked::run(&stage, &relay);

    println!("{asked}");
    assert!(asked.slowest() < LONGEST, "a client waited {:?}", asked.slowest());
    assert!(asked.p99() < LONGEST_AFTER, "p99 once it is ejected: {:?}", asked.p99());
    assert_eq!(failures(&stage, &relay, "timeout"), FAILURES);
    assert_eq!(ejected(&relay), 1);
}

/// The second is further away than the first step of the ladder allows for.
const FAR: [Duration; 2] = [Duration::from_millis(200), Duration::from_millis(400)];
/// More than a backend may fail in a row, and all of them at once.
const AT_ONCE: usize = 8;

/// Packets take that long indeed. An answer takes two round trips: one to connect, one for question and answer.
pub(crate) fn a_single_one_is_far() {
    if let Err(error) = File::options().read(true).write(true).open("/dev/net/tun") {
        return skip("tun", &format!("/dev/net/tun: {error}"));
    }
    for away in FAR {
        let stage = Stage::build();
        let (far, _cable) = stage.rig.far_from_node(0, away).expect("the cable is laid");
        let address = SocketAddr::new(far.address(Family::V4), PORT);
        let _backend = Backend::start(&far, &[address], &Arc::default()).expect("a backend starts");
        let relay = stage.relay(&[address], &[]);
        let service = stage.service(Family::V4);
        let ask = move || {
            let begin = Instant::now();
            exchange(service).map(|_| begin.elapsed())
        };
        let together = |count: usize| {
            let threads: Vec<_> = (0..count).map(|_| stage.client().thread(ask).expect("a thread starts")).collect();
            let asked = threads.into_iter().map(|thread| thread.join().expect("clients do not panic"));
            asked.map(|took| took.expect("no client fails")).collect::<Vec<_>>()
        };

        let first = together(AT_ONCE);
        let in_vain = relay.metric("kuberelay_connect_failures_total", &[]);
        let later = together(AT_ONCE);

        let longest = |times: &[Duration]| times.iter().max().copied().unwrap_or_default();
        println!(
            "{away:?} away: the first {AT_ONCE} clients had their answer after {:?}, with {in_vain} tries in vain; later ones after {:?}",
            longest(&first),
            longest(&later)
        );
        assert!(first.iter().chain(&later).all(|took| *took >= 2 * away), "it is not as far as it should be");
        assert_eq!((ejected(&relay), relay.dropped(None)), (0, 0));
        if cfg!(debug_assertions) {
            continue; // Who waits for a processor may be late for a step.
        }
        assert_eq!(in_vain, if away < Duration::from_millis(250) { 0 } else { AT_ONCE as u64 }, "once each at most");
        assert_eq!(relay.metric("kuberelay_connect_failures_total", &[]), in_vain, "it is known to be far");
    }
}

/// It is reached again by a client's own connection, ten seconds after it went.
pub(crate) fn one_comes_back() {
    if !full() {
        println!("nothing to wait for in the short form: it takes ten seconds");
        return;
    }
    let stage = Stage::build();
    let mut backends = others(&stage);
    let relay = stage.relay(&stage.backends(Family::V4), &[]);
    Asked::run(&stage, &relay);
    assert_eq!(ejected(&relay), 1);

    backends.push(start(&stage, 0));
    let gone = Instant::now();
    until("it to be in again", || {
        stage.client().run(|| exchange(stage.service(Family::V4))).expect("no client fails");
        (ejected(&relay) == 0).then_some(())
    });

    println!("back {:?} after it could be reached", gone.elapsed());
    assert!(gone.elapsed() < Duration::from_secs(11), "{:?}", gone.elapsed());
    assert_eq!(failures(&stage, &relay, "refused"), FAILURES);
}

/// All but that of the first pod.
fn others(stage: &Stage) -> Vec<Backend> {
    (1..crate::stage::PODS).map(|number| start(stage, number)).collect()
}

fn start(stage: &Stage, number: u8) -> Backend {
    let addresses = FAMILIES.map(|family| stage.backend(number, family));
    Backend::start(stage.pod(number), &addresses, &Arc::new(Bulk::default())).expect("a backend starts")
}

fn dead(stage: &Stage) -> SocketAddr {
    stage.backend(0, Family::V4)
}

fn failures(stage: &Stage, relay: &Relay<'_>, reason: &str) -> u64 {
    let labels = [format!(r#"backend="{}""#, dead(stage)), format!(r#"reason="{reason}""#)];
    relay.metric("kuberelay_connect_failures_total", &labels.each_ref().map(String::as_str))
}

fn ejected(relay: &Relay<'_>) -> u64 {
    relay.metric("kuberelay_backend_ejected", &[])
}

/// How long clients waited, one after the other; none has failed.
struct Asked {
    /// Those who came until the dead backend was ejected, in which it was met.
    before: Vec<Duration>,
    after: Vec<Duration>,
}

impl Asked {
    fn run(stage: &Stage, relay: &Relay<'_>) -> Self {
        let service = stage.service(Family::V4);
        let ask = |count: usize| {
            let times = stage.client().run(|| {
                let ask = |_| {
                    let begin = Instant::now();
                    exchange(service).map(|_| begin.elapsed())
                };
                (0..count).map(ask).collect::<Result<Vec<_>, _>>()
            });
            let mut times = times.expect("no client fails");
            times.sort_unstable();
            times
        };
        // Of three backends each third client meets the dead one, and more as those who do take a second turn.
        let before = ask(3 * FAILURES as usize);
        let after = ask(if full() { CLIENTS } else { FEW_CLIENTS });
        assert_eq!(relay.dropped(None), 0);
        Self { before, after }
    }

    /// They are the slowest.
    fn median_of_those_who_met_it(&self) -> Duration {
        self.before[self.before.len() - 1 - FAILURES as usize / 2]
    }

    fn slowest(&self) -> Duration {
        self.before.iter().chain(&self.after).max().copied().unwrap_or_default()
    }

    fn median(&self) -> Duration {
        self.after[self.after.len() / 2]
    }

    fn p99(&self) -> Duration {
        self.after[self.after.len() * 99 / 100]
    }
}

impl std::fmt::Display for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} clients, 0 failed; who met the dead backend waited {:?} (median), the slowest {:?}; afterwards p50 {:?}, p99 {:?}",
            self.before.len() + self.after.len(),
            self.median_of_those_who_met_it(),
            self.slowest(),
            self.median(),
            self.p99(),
        )
    }
}
