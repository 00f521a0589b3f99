//! Whether the proxy keeps up with what it is told, and whether its node may get traffic: behind `/healthz` and `/livez`.
//!
//! The rules are pure and take `now`. Who marks the work is `control`, who knows the Node is a source, and the answers
//! over HTTP are `admin`'s. Whether load balancers are to send a Service's traffic here is another thing: `health_port`.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::name::Family;

/// How old the oldest piece of work may be that is not done: twice kube-proxy's sync period, as there.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// With this taint the cluster autoscaler says that it is about to delete the Node (KEP-3836).
const ABOUT_TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// The health of a relay. Shared: control marks its work, a source tells of the Node, servers look.
#[derive(Clone, Debug)]
pub struct Health {
    state: Arc<watch::Sender<State>>,
}

#[derive(Clone, Copy, Debug)]
struct State {
    families: [Work; 2],
    node_eligible: bool,
    leaving: bool,
}

/// What one family has to do.
#[derive(Clone, Copy, Debug)]
struct Work {
    /// When something was last made true; the start, before that.
    updated: Instant,
    /// Since when the oldest piece of work waits; `None`: nothing waits.
    queued: Option<Instant>,
}

/// Health at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkup {
    /// In the order of [`Family::ALL`].
    pub families: [FamilyCheckup; 2],
    /// True where the node may get traffic. Always true without a cluster, which has no Node that could be deleted.
    pub node_eligible: bool,
    /// True once the process is about to end: it serves, but traffic should go elsewhere.
    pub leaving: bool,
}

/// Health of one family at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FamilyCheckup {
    /// True while nothing has waited for too long.
    pub healthy: bool,
    /// When something was last made true; the start, before that.
    pub updated: Instant,
}

impl Health {
    /// Healthy, with nothing to do, on an eligible node.
    pub fn new(now: Instant) -> Self {
        let families = [Work { updated: now, queued: None }; 2];
        Self { state: Arc::new(watch::Sender::new(State { families, node_eligible: true, leaving: false })) }
    }

    /// There is something to do for these families. Work that waits already is older, and stays what counts.
    pub fn queued(&self, families: &[Family], now: Instant) {
        self.each(families, |work| _ = work.queued.get_or_insert(now));
    }

    /// All that these families had to do is done, and something changed by it.
    pub fn updated(&self, families: &[Family], now: Instant) {
        self.each(families, |work| *work = Work { updated: now, queued: None });
    }

    /// These families have nothing to do, as it turned out.
    pub fn idle(&self, families: &[Family]) {
        self.each(families, |work| work.queued = None);
    }

    /// Whether the node may get traffic: see [`node_is_eligible`]. To be set by a source that knows the Node, from its
    /// start on: there, nothing known means no.
    pub fn set_node_eligible(&self, eligible: bool) {
        self.state.send_modify(|state| state.node_eligible = eligible);
    }

    /// The process is about to end: load balancers should look for another node, for good.
    pub fn leave(&self) {
        self.state.send_modify(|state| state.leaving = true);
    }

    /// Health at a moment.
    pub fn check(&self, now: Instant) -> Checkup {
        self.state.borrow().check(now, TIMEOUT)
    }

    fn each(&self, families: &[Family], change: impl Fn(&mut Work)) {
        self.state
            .send_modify(|state| families.iter().for_each(|family| change(&mut state.families[*family as usize])));
    }
}

impl State {
    fn check(&self, now: Instant, timeout: Duration) -> Checkup {
        let families = self.families.map(|Work { updated, queued }| FamilyCheckup {
            healthy: queued.is_none_or(|queued| now.saturating_duration_since(queued) < timeout),
            updated,
        });
        Checkup { families, node_eligible: self.node_eligible, leaving: self.leaving }
    }
}

impl Checkup {
    /// True while both families are healthy.
    pub fn is_healthy(&self) -> bool {
        self.families.iter().all(|family| family.healthy)
    }

    /// True where health ports may send a Service's traffic here. The Node does not count: the Service's pods leave it one
    /// by one, and their number tells.
    pub fn proxy_is_well(&self) -> bool {
        self.is_healthy() && !self.leaving
    }

    /// True where load balancers may choose this node.
    pub fn node_is_welcome(&self) -> bool {
        self.node_eligible && !self.leaving
    }

    /// When anything was last made true.
    pub fn updated(&self) -> Instant {
        let [v4, v6] = self.families;
        v4.updated.max(v6.updated)
    }
}

/// What a Node object says of its future.
#[derive(Clone, Copy, Debug, Default)]
pub struct NodeSigns<'n> {
    /// True with `metadata.deletionTimestamp`.
    pub deleting: bool,
    /// The keys of `spec.taints`.
    pub taints: &'n [&'n str],
}

/// Whether load balancers should send traffic to a node; `None` where there is no such Node. Cordons and other taints
/// keep pods away, not traffic.
pub fn node_is_eligible(node: Option<NodeSigns<'_>>) -> bool {
    node.is_some_and(|node| !node.deleting && !node.taints.contains(&ABOUT_TO_BE_DELETED))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A relay whose work may wait for 10 s, at seconds after its start.
    struct Clock {
        health: Health,
        start: Instant,
    }

    impl Clock {
        fn start() -> Self {
            let start = Instant::now();
            Self { health: Health::new(start), start }
        }

        fn at(&self, second: u64) -> Instant {
            self.start + Duration::from_secs(second)
        }

        /// Health of both families.
        fn check(&self, second: u64) -> [bool; 2] {
            let checkup = self.health.state.borrow().check(self.at(second), Duration::from_secs(10));
            assert_eq!(checkup.is_healthy(), checkup.families.iter().all(|family| family.healthy));
            checkup.families.map(|family| family.healthy)
        }
    }

    #[test]
    fn t208_given_work_that_waits_when_checked_then_only_its_family_is_late_until_it_is_done() {
        let clock = Clock::start();
        assert_eq!(clock.check(0), [true, true], "at the start");
        clock.health.updated(&Family::ALL, clock.at(0));
        assert_eq!(clock.check(25), [true, true], "nothing to do for 25 s");

        clock.health.queued(&[Family::V4], clock.at(25));

        assert_eq!(clock.check(34), [true, true]);
        assert_eq!(clock.check(50), [false, true]);
        clock.health.updated(&[Family::V4], clock.at(50));
        assert_eq!(clock.check(50), [true, true]);
    }

    #[test]
    fn t209_given_both_families_late_when_one_is_done_then_it_takes_the_other_too() {
        let clock = Clock::start();
        clock.health.queued(&Family::ALL, clock.at(0));
        assert_eq!(clock.check(10), [false, false]);

        clock.health.updated(&[Family::V6], clock.at(11));
        assert_eq!(clock.check(11), [false, true]);
        clock.health.updated(&[Family::V6], clock.at(12));
        assert_eq!(clock.check(12), [false, true], "the other one's updates do not help");
        clock.health.updated(&[Family::V4], clock.at(13));

        assert_eq!(clock.check(13), [true, true]);
    }

    #[test]
    fn t210_given_work_at_0_s_and_at_9_s_when_checked_at_11_s_then_the_older_counts() {
        let clock = Clock::start();

        clock.health.queued(&Family::ALL, clock.at(0));
        clock.health.queued(&Family::ALL, clock.at(9));

        assert_eq!(clock.check(11), [false, false]);
    }

    #[test]
    fn t213_given_work_that_changed_nothing_when_checked_then_the_last_update_stays() {
        let clock = Clock::start();
        clock.health.updated(&[Family::V4], clock.at(3));
        clock.health.updated(&[Family::V6], clock.at(2));

        clock.health.queued(&Family::ALL, clock.at(5));
        clock.health.idle(&Family::ALL);

        assert_eq!(clock.check(90), [true, true]);
        assert_eq!(clock.health.check(clock.at(90)).updated(), clock.at(3));
    }

    #[test]
    fn f23_given_a_process_that_is_about_to_end_when_checked_then_it_keeps_up_and_traffic_should_go_elsewhere() {
        let clock = Clock::start();

        clock.health.leave();
        let checkup = clock.health.check(clock.at(1));

        assert!(checkup.is_healthy() && checkup.node_eligible);
        assert!(!checkup.proxy_is_well() && !checkup.node_is_welcome());
    }

    #[test]
    fn t204_given_a_node_that_is_to_be_deleted_when_checked_then_health_ports_leave_it_to_the_pods() {
        let clock = Clock::start();

        clock.health.set_node_eligible(false);
        let checkup = clock.health.check(clock.at(1));

        assert!(checkup.proxy_is_well() && !checkup.node_is_welcome());
    }

    #[test]
    fn t211_given_what_a_node_says_when_judged_then_only_its_end_keeps_traffic_away() {
        let with = |taints| node_is_eligible(Some(NodeSigns { deleting: false, taints }));

        assert!(with(&[]));
        assert!(with(&["node.kubernetes.io/unschedulable", "example.com/gpu"]));
        assert!(!with(&["example.com/gpu", "ToBeDeletedByClusterAutoscaler"]));
        assert!(!node_is_eligible(Some(NodeSigns { deleting: true, taints: &[] })));
        assert!(!node_is_eligible(None));
    }
}
