//! A state of listeners and balancers, and the ordered steps from one to another.
//!
//! Pure data. Who decides what a layout holds is `plan`; who carries steps out is `serve`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::balancing::Balancing;
use crate::endpoints::Usable;
use crate::name::{BalancerKey, Family, ListenKey, Scope, ServicePortName};
use crate::proxy_protocol::ProxyProtocol;
use crate::source_address::SourceAddress;
use crate::stats::Entry;
use crate::tcp_settings::TcpSettings;
use crate::udp_settings::UdpSettings;

/// Why a listener exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ListenerKind {
    /// `spec.clusterIPs` and `ports[].port`.
    #[serde(rename = "clusterIP")]
    ClusterIp,
    /// A node address and `ports[].nodePort`.
    NodePort,
    /// `spec.externalIPs` and `ports[].port`.
    #[serde(rename = "externalIP")]
    ExternalIp,
    /// `status.loadBalancer.ingress[].ip` and `ports[].port`.
    #[serde(rename = "loadBalancerIP")]
    LoadBalancerIp,
    /// `--expose`.
    Exposed,
}

impl ListenerKind {
    /// The word in reports: `clusterIP`, `nodePort`, `externalIP`, `loadBalancerIP` or `exposed`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ClusterIp => "clusterIP",
            Self::NodePort => "nodePort",
            Self::ExternalIp => "externalIP",
            Self::LoadBalancerIp => "loadBalancerIP",
            Self::Exposed => "exposed",
        }
    }

    /// The word in labels and in the access log: `cluster_ip`, `node_port`, `external_ip`, `lb_vip` or `exposed`.
    pub fn as_label(self) -> &'static str {
        self.entry().as_str()
    }

    /// What its clients are counted under.
    pub fn entry(self) -> Entry {
        match self {
            Self::ClusterIp => Entry::ClusterIp,
            Self::NodePort => Entry::NodePort,
            Self::ExternalIp => Entry::ExternalIp,
            Self::LoadBalancerIp => Entry::LoadBalancerIp,
            Self::Exposed => Entry::Exposed,
        }
    }

    /// The kind whose clients are counted under this.
    pub(crate) fn of(entry: Entry) -> Self {
        match entry {
            Entry::ClusterIp => Self::ClusterIp,
            Entry::NodePort => Self::NodePort,
            Entry::ExternalIp => Self::ExternalIp,
            Entry::LoadBalancerIp => Self::LoadBalancerIp,
            Entry::Exposed => Self::Exposed,
        }
    }

    /// The words in sentences: `cluster IP`, `node port`…
    pub fn in_words(self) -> &'static str {
        match self {
            Self::ClusterIp => "cluster IP",
            Self::NodePort => "node port",
            Self::ExternalIp => "external IP",
            Self::LoadBalancerIp => "load-balancer IP",
            Self::Exposed => "exposed address",
        }
    }
}

/// What happens to new traffic on one side of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// A backend of the scope gets it.
    Serve,
    /// Nobody can: connection refused, port unreachable.
    Reject,
    /// Somebody on another node could, but policy Local forbids it: no answer at all.
    Drop,
}

/// One side of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Side {
    /// The endpoints that the traffic policy allows.
    pub scope: Scope,
    /// What follows from them.
    pub verdict: Verdict,
}

/// Where a listener's traffic goes. *Inside* is a source on this node or in one of its pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// For everybody else.
    pub outside: Side,
    /// For this node and its pods. Differs from `outside` only under externalTrafficPolicy Local.
    pub inside: Side,
}

impl Target {
    /// True where no side serves and none drops: the port is held, and connections are refused.
    pub fn parked(&self) -> bool {
        self.outside.verdict == Verdict::Reject && self.inside.verdict == Verdict::Reject
    }
}

/// A listener as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Whose traffic arrives there. With the key's family and a side's scope this names the balancer.
    pub port: ServicePortName,
    /// Why it exists.
    pub kind: ListenerKind,
    /// True where the static source chose the address or the number.
    pub allocated: bool,
    /// Where its traffic goes.
    pub target: Target,
    /// Who may come at all; all others, pods and this node too, get no answer. Empty: everybody.
    ///
    /// From `spec.loadBalancerSourceRanges`, of the listener's family, for load-balancer addresses only. Where a
    /// range holds an address of this node, the listener's own is there, too: it is what a program on this node has
    /// as its source.
    pub source_ranges: Arc<[IpNet]>,
    /// Who may come from outside; all others get no answer. `None`: everybody, empty: nobody.
    ///
    /// From the annotation `kube-relay.dev/allow-from` and `--allow-from`, of the listener's family.
    pub allow_from: Option<Arc<[IpNet]>>,
    /// How its connections say who their clients are; `None`: not at all, as hardly any Service says otherwise.
    ///
    /// Where balancers in front tell who a client is, the lists above are judged by what they tell, and so have networks
    /// of both families: a client may reach a balancer by another family than the balancer reaches us.
    pub proxy_protocol: Option<Arc<ProxyProtocol>>,
    /// How its datagrams are served; `None`: as the flags say. Hardly any Service says otherwise.
    pub udp: Option<Arc<UdpSettings>>,
}

impl Listener {
    /// How its datagrams are served.
    pub fn udp_settings(&self) -> &UdpSettings {
        static AS_THE_FLAGS_SAY: UdpSettings =
            UdpSettings { shards: None, unreplied: None, answered: None, stream: None };
        self.udp.as_deref().unwrap_or(&AS_THE_FLAGS_SAY)
    }

    /// True where it matters for a client whether it is inside.
    pub(crate) fn is_two_sided(&self) -> bool {
        self.target.outside != self.target.inside || self.allow_from.is_some()
    }

    /// The balancers that its sides name, whatever their verdicts: outside, then inside.
    pub fn balancers(&self, key: &ListenKey) -> [BalancerKey; 2] {
        let family = Family::of(key.ip());
        [self.target.outside, self.target.inside].map(|side| BalancerKey {
            port: self.port.clone(),
            family,
            scope: side.scope,
        })
    }
}

/// A balancer as it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backends {
    /// How long a client stays with its backend; `None` without affinity.
    pub affinity_timeout: Option<Duration>,
    /// How it chooses.
    pub balancing: Balancing,
    /// Whose address its backends see.
    pub source: SourceAddress,
    /// How its connections are served; `None`: as the flags say. Hardly any Service says otherwise.
    pub tcp: Option<Arc<TcpSettings>>,
    /// Its endpoints.
    pub usable: Usable,
}

/// A state of listeners and balancers, ordered by their keys.
///
/// Each side of each listener names a balancer of the same layout, whatever its verdict: counters and
/// tables are there before the first endpoint comes. A balancer may be there without a listener: its
/// Service lost all of them to older ones, and is ready to take over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// What to choose from.
    pub balancers: BTreeMap<BalancerKey, Backends>,
    /// Where to listen.
    pub listeners: BTreeMap<ListenKey, Listener>,
}

/// One change of the running state. A list of steps is carried out in its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Store a balancer's table; make the balancer where it is new.
    Swap(BalancerKey, Backends),
    /// Give a listener another target or owner. It stays as it is: bound, or parked where both targets are.
    Point(ListenKey, Listener),
    /// A parked listener serves (or drops) again.
    Revive(ListenKey, Listener),
    /// Close a listener; its open connections go on.
    Unbind(ListenKey),
    /// Open a listener (parked at once where its target says so).
    Bind(ListenKey, Listener),
    /// Hold the port, refuse what comes.
    Park(ListenKey, Listener),
    /// No listener needs this balancer any more.
    Retire(BalancerKey),
}

impl Layout {
    /// Carries steps out, in their order: what `serve` does with sockets, done with the description.
    pub fn apply(&mut self, steps: &[Step]) {
        for step in steps {
            match step {
                Step::Swap(key, backends) => {
                    self.balancers.insert(key.clone(), backends.clone());
                }
                Step::Point(key, listener)
                | Step::Revive(key, listener)
                | Step::Bind(key, listener)
                | Step::Park(key, listener) => {
                    self.listeners.insert(*key, listener.clone());
                }
                Step::Unbind(key) => {
                    self.listeners.remove(key);
                }
                Step::Retire(key) => {
                    self.balancers.remove(key);
                }
            }
        }
    }
}

/// The steps from one layout to another.
///
/// Order: swaps, points, revives, binds, parks, unbinds, retirements. So every target exists before a
/// listener is pointed at it, no listener is ever without one, and a Service that moves is reached at
/// its new place before it leaves the old one. No bind waits for an unbind: a key is never a wildcard,
/// so two different keys never stand in each other's way.
pub fn diff(from: &Layout, to: &Layout) -> Vec<Step> {
    let mut stages = Stages::default();
    for change in changes(&from.balancers, &to.balancers) {
        match change {
            Change::Added(key, backends) | Change::Changed(key, _, backends) => {
                stages.swaps.push(Step::Swap(key.clone(), backends.clone()));
            }
            Change::Removed(key) => stages.retirements.push(Step::Retire(key.clone())),
        }
    }
    for change in changes(&from.listeners, &to.listeners) {
        match change {
            Change::Added(key, listener) => stages.binds.push(Step::Bind(*key, listener.clone())),
            Change::Changed(key, before, after) => stages.turn(*key, before, after.clone()),
            Change::Removed(key) => stages.unbinds.push(Step::Unbind(*key)),
        }
    }
    stages.in_order()
}

/// Steps by kind, while they are collected.
#[derive(Default)]
struct Stages {
    swaps: Vec<Step>,
    points: Vec<Step>,
    revives: Vec<Step>,
    binds: Vec<Step>,
    parks: Vec<Step>,
    unbinds: Vec<Step>,
    retirements: Vec<Step>,
}

impl Stages {
    /// A listener that stays bound.
    fn turn(&mut self, key: ListenKey, before: &Listener, after: Listener) {
        match (before.target.parked(), after.target.parked()) {
            (true, false) => self.revives.push(Step::Revive(key, after)),
            (false, true) => self.parks.push(Step::Park(key, after)),
            (true, true) | (false, false) => self.points.push(Step::Point(key, after)),
        }
    }

    fn in_order(self) -> Vec<Step> {
        let Self { swaps, points, revives, binds, parks, unbinds, retirements } = self;
        [swaps, points, revives, binds, parks, unbinds, retirements].into_iter().flatten().collect()
    }
}

enum Change<'a, K, V> {
    Added(&'a K, &'a V),
    Changed(&'a K, &'a V, &'a V),
    Removed(&'a K),
}

/// What differs between two ordered maps: one walk over both, by key.
fn changes<'a, K: Ord, V: PartialEq>(
    from: &'a BTreeMap<K, V>,
    to: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = Change<'a, K, V>> {
    let mut old = from.iter().peekable();
    let mut new = to.iter().peekable();
    std::iter::from_fn(move || {
        loop {
            let order = match (old.peek(), new.peek()) {
                (Some((old_key, _)), Some((new_key, _))) => old_key.cmp(new_key),
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, _) => std::cmp::Ordering::Greater,
            };
            match order {
                std::cmp::Ordering::Less => return old.next().map(|(key, _)| Change::Removed(key)),
                std::cmp::Ordering::Greater => return new.next().map(|(key, value)| Change::Added(key, value)),
                std::cmp::Ordering::Equal => {
                    let ((key, before), (_, after)) = (old.next()?, new.next()?);
                    if before != after {
                        return Some(Change::Changed(key, before, after));
                    }
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::endpoints::UsableEndpoint;
    use crate::name::{ObjectName, Protocol};

    fn side() -> impl Strategy<Value = Side> {
        let scope = prop_oneof![Just(Scope::Cluster), Just(Scope::Local)];
        let verdict = prop_oneof![Just(Verdict::Serve), Just(Verdict::Reject), Just(Verdict::Drop)];
        (scope, verdict).prop_map(|(scope, verdict)| Side { scope, verdict })
    }

    fn listener() -> impl Strategy<Value = (ListenKey, Listener)> {
        // Few values of each kind, so that two layouts often meet in a key.
        ((0_u8..6, any::<bool>()), 0_u8..4, (side(), side()), any::<bool>()).prop_map(
            |((host, v6), owner, (outside, inside), allocated)| {
                let address = if v6 { format!("[fd00::{host}]:80") } else { format!("10.96.0.{host}:80") };
                let key = ListenKey::at(address.parse().expect("an address"), Protocol::Tcp);
                let service = ObjectName::new("default", format!("web-{owner}"));
                let port = ServicePortName::new(service, "http", Protocol::Tcp);
                let kind = ListenerKind::ClusterIp;
                let target = Target { outside, inside };
                let (source_ranges, allow_from, proxy_protocol, udp) = (Arc::default(), None, None, None);
                (key, Listener { port, kind, allocated, target, source_ranges, allow_from, proxy_protocol, udp })
            },
        )
    }

    fn backends(host: u8) -> Backends {
        let address = std::net::SocketAddr::from(([10, 244, 0, host], 8000));
        let endpoint =
            UsableEndpoint { ip: address.ip(), port: address.port(), local: false, terminating: false, pod: None };
        let usable = Usable { picks: [endpoint.clone()].into(), serving: [endpoint].into() };
        Backends { usable, ..Backends::default() }
    }

    /// Layouts that keep the rule: each side of each listener names a balancer.
    fn layout() -> impl Strategy<Value = Layout> {
        (prop::collection::vec(listener(), 0..12), prop::collection::vec(0_u8..3, 48)).prop_map(|(listeners, hosts)| {
            let listeners: BTreeMap<_, _> = listeners.into_iter().collect();
            let named = listeners.iter().flat_map(|(key, listener)| listener.balancers(key));
            let balancers = named.zip(hosts).map(|(key, host)| (key, backends(host))).collect();
            Layout { balancers, listeners }
        })
    }

    fn orphan(layout: &Layout) -> Option<ListenKey> {
        let has_target = |key: &BalancerKey| layout.balancers.contains_key(key);
        let mut listeners = layout.listeners.iter();
        listeners.find(|(key, listener)| !listener.balancers(key).iter().all(has_target)).map(|(key, _)| *key)
    }

    proptest! {
        #[test]
        fn given_two_layouts_when_the_steps_between_them_are_applied_then_the_first_becomes_the_second(
            a in layout(),
            b in layout(),
        ) {
            let mut state = a.clone();

            state.apply(&diff(&a, &b));

            prop_assert_eq!(state, b);
        }

        #[test]
        fn given_one_layout_twice_when_compared_then_there_is_nothing_to_do(a in layout()) {
            prop_assert_eq!(diff(&a, &a), vec![]);
        }

        #[test]
        fn given_two_layouts_when_the_steps_are_applied_one_by_one_then_no_listener_is_ever_without_a_balancer(
            a in layout(),
            b in layout(),
        ) {
            let mut state = a.clone();
            prop_assert_eq!(orphan(&state), None);

            for step in diff(&a, &b) {
                state.apply(std::slice::from_ref(&step));

                prop_assert_eq!(orphan(&state), None, "after {:?}", step);
            }
        }

        #[test]
        fn given_two_layouts_when_compared_then_each_step_fits_the_state_it_finds(a in layout(), b in layout()) {
            let mut state = a.clone();

            for step in diff(&a, &b) {
                let parked = |key: &ListenKey| state.listeners.get(key).map(|listener| listener.target.parked());
                let fits = match &step {
                    Step::Swap(..) => true,
                    Step::Point(key, to) => parked(key) == Some(to.target.parked()),
                    Step::Revive(key, to) => parked(key) == Some(true) && !to.target.parked(),
                    Step::Park(key, to) => parked(key) == Some(false) && to.target.parked(),
                    Step::Bind(key, _) => parked(key).is_none(),
                    Step::Unbind(key) => parked(key).is_some(),
                    Step::Retire(key) => state.balancers.contains_key(key),
                };
                prop_assert!(fits, "{:?}", step);
                state.apply(std::slice::from_ref(&step));
            }
        }
    }
}
