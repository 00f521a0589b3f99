//! Desired state of all Services: what each asks for, who gets what two ask for, and the steps to get there.
//!
//! Pure: no clock, no socket. What one Service asks for is made in `service_plan` (where it is reached in
//! `entries`, with which endpoints in `endpoints`); layouts and steps are in `layout`; steps are carried
//! out in `serve`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::thread::available_parallelism;

use ipnet::IpNet;

use crate::claims::Claims;
use crate::endpoints::Node;
use crate::frozen::add_all;
use crate::model::{Endpoint, Model, ServicePort, Slice};
use crate::name::{ListenKey, ObjectName, Protocol};
use crate::parts::in_parts;
use crate::rare::Rare;
use crate::service_plan::Asked;

pub use crate::allow_from::AllowFrom;
pub use crate::balancing::{Balance, Balancing};
pub use crate::health_port::HealthPort;
pub use crate::layout::{Backends, Layout, Listener, ListenerKind, Side, Step, Target, Verdict, diff};
pub use crate::problem::{Problem, Severity};
pub use crate::proxy_protocol::{HeaderVersion, ProxyProtocol};
pub use crate::service_plan::{ServicePlan, Wanted};
pub use crate::source_address::SourceAddress;
pub use crate::tcp_settings::TcpSettings;
pub use crate::udp_settings::UdpSettings;

/// Services that one thread plans in about 10 ms; with fewer, more threads would not be noticed.
const SERVICES_PER_THREAD: usize = 1_000;

/// What shapes a plan besides the objects. Owned by `control`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// This node.
    pub node: Node,
    /// The addresses that node ports are served on: `--nodeport-addresses`, resolved by `host`.
    pub node_port_addresses: Vec<IpAddr>,
    /// The addresses that this node is reached at: what a wildcard `--expose` stands for, and what no external IP may
    /// take. Those that `lo` has for Services are not among them.
    pub node_addresses: Vec<IpAddr>,
    /// Those among them that this machine may have got for a Service: an external IP may be one of these, wherever
    /// `allowed_external_cidrs` lets it.
    pub lent_addresses: Vec<IpAddr>,
    /// The pods' networks; empty: unknown. From `--cluster-cidr`.
    pub cluster_cidrs: Vec<IpNet>,
    /// External IPs are served only inside these. From `--allowed-external-cidrs`; empty refuses all.
    pub allowed_external_cidrs: Vec<IpNet>,
    /// Endpoints are used only inside these; empty: anywhere. From `--endpoint-cidrs`.
    pub endpoint_cidrs: Vec<IpNet>,
    /// Only endpoints whose `targetRef` is a pod are used. From `--require-target-ref`. Default: false.
    pub require_target_ref: bool,
    /// Who may come from outside; `None`: everybody. From `--allow-from`.
    pub allow_from: Option<AllowFrom>,
    /// The balancers that are believed when they say who their clients are, networks of both families; empty: nobody. From
    /// `--accept-proxy-from`. They are asked where a Service says so.
    pub accept_proxy_from: Vec<IpNet>,
    /// Take exactly the Services that are labelled so; `None`: exactly those without the label. From `--proxy-name`.
    pub proxy_name: Option<String>,
    /// Extra listeners. From `--expose`.
    pub expose: Vec<Expose>,
    /// Take endpoints on loopback addresses: true in static mode, false with the API source (CVE-2021-25737).
    pub allow_loopback_endpoints: bool,
}

/// One `--expose LISTEN=NAMESPACE/SERVICE:PORT`: a Service port on one more local address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expose {
    /// The local address and port. A wildcard stands for each address of this node in its family.
    pub listen: SocketAddr,
    /// The Service.
    pub service: ObjectName,
    /// Name or number of its port; a number may name a TCP and a UDP port at once.
    pub port: String,
}

impl Expose {
    /// True where it means this port.
    pub(crate) fn names(&self, port: &ServicePort) -> bool {
        *self.port == *port.name || self.port.parse() == Ok(port.port)
    }
}

impl fmt::Display for Expose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}:{}", self.listen, self.service, self.port)
    }
}

/// The Services that are planned anew, with what they ask for; `None`: the object is gone.
type Anew<'a> = BTreeMap<ObjectName, Option<Asked<'a>>>;

/// The plan of all Services. Owned by `control`, by value.
#[derive(Debug, Default)]
pub struct Plan {
    /// Shared with the snapshots for those who read the status.
    services: BTreeMap<ObjectName, Arc<ServicePlan>>,
    claims: Claims,
    /// Services with a problem or a conflict.
    troubled: BTreeSet<ObjectName>,
    /// Services that the last update planned anew, or that won or lost something by it.
    touched: BTreeSet<ObjectName>,
    /// `--expose` of Services that are not there, or not served.
    unmet: Vec<Problem>,
}

impl Plan {
    /// Plans the dirty Services anew and returns the steps from the old plan to the new one.
    ///
    /// Work is proportional to the dirty Services and to who shares a listen key with them; where listeners come or
    /// go, slices are searched for endpoints there. Where the options have changed, all Services are dirty.
    pub fn update(&mut self, model: &Model, dirty: &BTreeSet<ObjectName>, options: &PlanOptions) -> Vec<Step> {
        let ask = |name: &ObjectName| (name.clone(), model.service(name).map(|service| Asked::of(service, options)));
        let mut asked: BTreeMap<_, _> = dirty.iter().map(ask).collect();
        asked.extend(self.met(model, &self.turned(&asked)).iter().map(ask));
        let names: BTreeSet<_> = asked.keys().cloned().collect();
        let keys = self.keys_of_both(&asked);
        let before = self.part(&names, &keys);
        self.touched = self.claimants(&keys);
        self.claim(&asked);
        if dirty.len() > self.services.len() / 2 {
            self.claims.pack();
        }
        self.replace(model, &asked);
        self.touched.extend(self.claimants(&keys));
        let steps = diff(&before, &self.part(&names, &keys));
        self.touched.extend(names);
        self.report_conflicts();
        self.report_unmet(options);
        steps
    }

    /// The plan of one Service; `None` where there is no such object.
    pub fn service(&self, name: &ObjectName) -> Option<&Arc<ServicePlan>> {
        self.services.get(name)
    }

    /// The listeners that a Service really gets, by key.
    pub fn listeners(&self, name: &ObjectName) -> impl Iterator<Item = (&ListenKey, &Listener)> {
        self.services.get(name).into_iter().flat_map(|plan| plan.listeners())
    }

    /// The listener at a key.
    pub fn listener(&self, key: &ListenKey) -> Option<&Listener> {
        self.services.get(self.claims.winner(key)?)?.wanted.listeners.get(key)
    }

    /// Steps that give each listener that asks who is inside its target anew: who that is is not in a plan.
    pub(crate) fn points_of_two_sides(&self) -> impl Iterator<Item = Step> {
        let listeners = self.services.values().flat_map(|plan| plan.listeners());
        let two_sided = listeners.filter(|(_, listener)| listener.is_two_sided());
        two_sided.map(|(key, listener)| Step::Point(*key, listener.clone()))
    }

    /// All that is wrong, by Service.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        let troubled = self.troubled.iter().filter_map(|name| self.services.get(name));
        troubled.flat_map(|plan| plan.own_problems()).chain(&self.unmet)
    }

    /// The Services whose plan or standing the last [`update`](Self::update) looked at: whose reports to make anew.
    pub fn touched(&self) -> &BTreeSet<ObjectName> {
        &self.touched
    }

    /// The whole desired state, conflicts settled. Copies everything: for tests and tools.
    pub fn layout(&self) -> Layout {
        let names: BTreeSet<_> = self.services.keys().cloned().collect();
        let keys = self.services.values().flat_map(|plan| plan.wanted.listeners.keys()).copied().collect();
        self.part(&names, &keys)
    }

    /// The keys that the Services ask for now, and those that they will ask for.
    fn keys_of_both(&self, asked: &Anew<'_>) -> BTreeSet<ListenKey> {
        asked.values().flatten().flat_map(Asked::keys).chain(self.keys_of(asked)).collect()
    }

    /// The keys that the Services ask for now.
    fn keys_of(&self, asked: &Anew<'_>) -> impl Iterator<Item = ListenKey> {
        asked.keys().filter_map(|name| self.services.get(name)).flat_map(|plan| plan.keys())
    }

    /// The keys at which this process listens from now on and did not before, or the other way round.
    fn turned(&self, asked: &Anew<'_>) -> BTreeSet<ListenKey> {
        let wanted: BTreeSet<_> = asked.values().flatten().flat_map(Asked::keys).collect();
        let nobodys =
            |key: &ListenKey| !wanted.contains(key) && self.claims.claimants(key).all(|name| asked.contains_key(name));
        let new = wanted.iter().copied().filter(|key| self.claims.winner(key).is_none());
        new.chain(self.keys_of(asked).filter(nobodys)).collect()
    }

    /// The Services with an endpoint at one of the keys. A walk over all slices, so only where listeners came or went;
    /// nearly all have no port of such a number.
    fn met(&self, model: &Model, turned: &BTreeSet<ListenKey>) -> Vec<ObjectName> {
        let numbers: BTreeSet<_> = turned.iter().map(|key| (key.port(), key.protocol)).collect();
        let meets = |slice: &Slice| {
            let mut ports = slice.ports.iter().filter(|port| numbers.contains(&(port.port, port.protocol)));
            ports.any(|port| {
                let key = |endpoint: &Endpoint| ListenKey::new(endpoint.address, port.port, port.protocol);
                slice.endpoints.iter().any(|endpoint| turned.contains(&key(endpoint)))
            })
        };
        let all = if turned.is_empty() { None } else { Some(self.services.keys()) };
        let met = all.into_iter().flatten().filter(|name| model.slices(name).any(|slice| meets(slice)));
        met.cloned().collect()
    }

    /// The part of the desired state that these Services and these keys make up.
    fn part(&self, services: &BTreeSet<ObjectName>, keys: &BTreeSet<ListenKey>) -> Layout {
        let plans = services.iter().filter_map(|name| self.services.get(name));
        let balancers = plans.flat_map(|plan| &plan.wanted.balancers);
        let listeners = keys.iter().filter_map(|key| Some((*key, self.listener(key)?.clone())));
        Layout {
            balancers: balancers.map(|(key, backends)| (key.clone(), backends.clone())).collect(),
            listeners: listeners.collect(),
        }
    }

    fn claimants(&self, keys: &BTreeSet<ListenKey>) -> BTreeSet<ObjectName> {
        keys.iter().flat_map(|key| self.claims.claimants(key)).cloned().collect()
    }

    /// Takes back what the Services claim by their old plans, and claims what they ask for now.
    fn claim(&mut self, asked: &Anew<'_>) {
        for (name, asked) in asked {
            if let Some(old) = self.services.get(name) {
                old.keys().for_each(|key| self.claims.release(&key, name));
            }
            if let Some(asked) = asked {
                let claimant = asked.claimant();
                asked.keys().for_each(|key| self.claims.claim(key, claimant.clone()));
            }
        }
    }

    /// All claims are known: an endpoint at a cluster IP of any Service is a loop.
    fn replace(&mut self, model: &Model, asked: &Anew<'_>) {
        let plans = plans_of(model, asked, |key| self.is_cluster_ip(key, asked));
        let mut planned = Vec::with_capacity(plans.len());
        for (name, plan) in plans {
            match plan {
                Some(plan) => planned.push((name.clone(), Arc::new(plan))),
                None => drop(self.services.remove(name)),
            }
        }
        add_all(&mut self.services, planned);
    }

    /// True where a key is a cluster IP's. No pod has that address, whether the listener can be bound or not. A node's
    /// address is another matter: a pod on the host network may hold the very port, and then our listener fails. What
    /// is bound in the end, and a backend all the same, is for `Listeners` to find.
    fn is_cluster_ip(&self, key: &ListenKey, asked: &Anew<'_>) -> bool {
        let Some(winner) = self.claims.winner(key) else { return false };
        let kind = match asked.get(winner) {
            Some(asked) => asked.as_ref().and_then(|asked| asked.kind(key)),
            None => self.services.get(winner).and_then(|plan| Some(plan.wanted.listeners.get(key)?.kind)),
        };
        kind == Some(ListenerKind::ClusterIp)
    }

    fn report_conflicts(&mut self) {
        for name in &self.touched {
            self.troubled.remove(name);
            let Some(plan) = self.services.get_mut(name) else { continue };
            let lost = lost(name, plan, &self.claims);
            let conflicts = conflicts(name, &lost);
            if plan.conflicts != conflicts {
                let keys = lost.values().flatten().copied().collect();
                let plan = Arc::make_mut(plan);
                (plan.lost, plan.conflicts) = (keys, conflicts);
            }
            if plan.own_problems().next().is_some() {
                self.troubled.insert(name.clone());
            }
        }
    }

    fn report_unmet(&mut self, options: &PlanOptions) {
        let why = |expose: &Expose| match self.services.get(&expose.service) {
            None => Some("there is no such Service".into()),
            Some(plan) => plan.skipped.map(|word| format!("the Service is skipped ({word})")),
        };
        let problem = |expose: &Expose| {
            let object = format_args!("Service {}", expose.service);
            Some(Problem::error(object, "expose", format!("--expose {expose} opens nothing: {}", why(expose)?)))
        };
        self.unmet = options.expose.iter().filter_map(problem).collect();
    }
}

/// The plans of some Services, in their order. Each is made for itself, so that several threads can share thousands.
fn plans_of<'n>(
    model: &Model,
    asked: &'n Anew<'_>,
    is_cluster_ip: impl Fn(&ListenKey) -> bool + Sync,
) -> Vec<(&'n ObjectName, Option<ServicePlan>)> {
    let plan = |(name, asked): (&'n ObjectName, &Option<Asked<'_>>)| {
        let slices = model.slices(name).map(AsRef::as_ref);
        (name, asked.as_ref().map(|asked| asked.plan(slices, &is_cluster_ip)))
    };
    if asked.len() < 2 * SERVICES_PER_THREAD {
        return asked.iter().map(plan).collect();
    }
    let threads = available_parallelism().map_or(1, usize::from).min(asked.len() / SERVICES_PER_THREAD);
    let asked: Vec<_> = asked.iter().collect();
    let parts = in_parts(&asked, threads, |part| part.iter().map(|one| plan(*one)).collect::<Vec<_>>());
    parts.into_iter().flatten().collect()
}

/// What a Service asks for a key for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Purpose {
    Listener(ListenerKind),
    HealthPort,
}

/// What an older Service has taken from this one, by port and rival.
type Lost<'a> = BTreeMap<(Purpose, u16, Protocol, &'a ObjectName), Vec<ListenKey>>;

fn lost<'a>(name: &ObjectName, plan: &ServicePlan, claims: &'a Claims) -> Lost<'a> {
    let listeners = plan.wanted.listeners.iter().map(|(key, listener)| (*key, Purpose::Listener(listener.kind)));
    let health = plan.health_port.iter().flat_map(|port| port.keys()).map(|key| (key, Purpose::HealthPort));
    let mut lost = Lost::new();
    for (key, purpose) in listeners.chain(health) {
        match claims.winner(&key) {
            Some(winner) if winner != name => {
                lost.entry((purpose, key.port(), key.protocol, winner)).or_default().push(key);
            }
            _ => {}
        }
    }
    lost
}

/// One problem for each port and rival.
fn conflicts(name: &ObjectName, lost: &Lost<'_>) -> Rare<Problem> {
    let problem = |((purpose, number, protocol, winner), keys): (&(Purpose, u16, _, _), &Vec<ListenKey>)| {
        let addresses = keys.iter().map(|key| key.ip().to_string()).collect::<Vec<_>>().join(", ");
        let what = match (purpose, keys.as_slice()) {
            // Without addresses, which are others on each node: what is said is true of all.
            (Purpose::Listener(ListenerKind::NodePort), _) => format!("node port {number}/{protocol}"),
            (Purpose::HealthPort, _) => format!("health port {number}/{protocol}"),
            (Purpose::Listener(kind), [key]) => format!("{} {key}", kind.in_words()),
            (Purpose::Listener(kind), _) => format!("{} {number}/{protocol} ({addresses})", kind.in_words()),
        };
        let remedy = "the older, then the first by name, keeps it; give this one another number or address";
        let message = format!("{what} is taken by Service {winner}: {remedy}");
        Problem::error(format_args!("Service {name}"), "conflict", message)
    };
    lost.iter().map(problem).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::model::{ClusterIps, Event, Objects, Service, ServiceKind, TrafficPolicy};

    /// A model, its plan and the running state that follows it, as `control` keeps them.
    #[derive(Default)]
    struct Control {
        model: Model,
        plan: Plan,
        running: Layout,
        options: PlanOptions,
    }

    impl Control {
        fn new() -> Self {
            let node_port_addresses = vec![[127, 0, 0, 1].into(), "::1".parse().expect("an address")];
            Self { options: PlanOptions { node_port_addresses, ..PlanOptions::default() }, ..Self::default() }
        }

        /// Applies one batch. The steps must lead from what runs to what a plan made from nothing would want.
        fn batch(&mut self, events: impl IntoIterator<Item = Event>) -> Vec<Step> {
            let mut dirty = BTreeSet::new();
            events.into_iter().for_each(|event| self.model.apply(event, &mut dirty));
            let steps = self.plan.update(&self.model, &dirty, &self.options);
            self.running.apply(&steps);
            let anew = self.made_anew();
            assert_eq!(self.running, self.plan.layout());
            assert_eq!(self.running, anew.layout());
            assert_eq!(health_ports(&self.plan), health_ports(&anew));
            steps
        }

        fn made_anew(&self) -> Plan {
            let all = self.model.services().map(|service| service.name.clone()).collect();
            let mut plan = Plan::default();
            plan.update(&self.model, &all, &self.options);
            plan
        }

        fn problems(&self) -> Vec<String> {
            self.plan.problems().map(ToString::to_string).collect()
        }

        /// Who is served at an address: `service:port`.
        fn at(&self, address: &str) -> Option<String> {
            let address = address.parse().expect("an address");
            let found = self.running.listeners.iter().find(|(key, _)| key.address() == address);
            found.map(|(_, listener)| listener.port.to_string())
        }
    }

    /// Those that are to be answered: `service number count`.
    fn health_ports(plan: &Plan) -> Vec<String> {
        let open = plan.services.iter().filter_map(|(name, plan)| Some((name, plan.open_health_port()?)));
        open.map(|(name, port)| format!("{name} {} {}", port.number, port.local_endpoints)).collect()
    }

    fn web() -> Service {
        Service::new("default/web").cluster_ip([10, 96, 0, 10]).port("http", 80)
    }

    /// As a load balancer's, which asks at this number.
    fn balanced(service: Service, number: u16) -> Service {
        let (kind, external_policy) = (ServiceKind::LoadBalancer, TrafficPolicy::Local);
        Service { kind, external_policy, health_check_node_port: Some(number), ..service }
    }

    fn slice(name: &str, hosts: &[u8]) -> Slice {
        let slice = Slice::new(name, &web()).port("http", 8000);
        hosts.iter().fold(slice, |slice, host| slice.endpoint(Endpoint::new([10, 0, 0, *host])))
    }

    fn put(service: &Service) -> Event {
        Event::ApplyService(Arc::new(service.clone()))
    }

    fn put_slice(slice: &Slice) -> Event {
        Event::ApplySlice(Arc::new(slice.clone()))
    }

    fn delete(service: &Service) -> Event {
        Event::DeleteService(service.name.clone())
    }

    /// The kinds of steps, in order: `swap point bind`…
    fn kinds(steps: &[Step]) -> String {
        let kind = |step: &Step| match step {
            Step::Swap(..) => "swap",
            Step::Point(..) => "point",
            Step::Revive(..) => "revive",
            Step::Unbind(..) => "unbind",
            Step::Bind(..) => "bind",
            Step::Park(..) => "park",
            Step::Retire(..) => "retire",
        };
        steps.iter().map(kind).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn given_a_service_when_endpoints_come_and_go_then_its_listener_is_parked_and_revived_but_never_closed() {
        let mut control = Control::new();

        assert_eq!(kinds(&control.batch([put(&web())])), "swap bind");
        assert_eq!(kinds(&control.batch([put_slice(&slice("web-1", &[1]))])), "swap revive");
        assert_eq!(kinds(&control.batch([put_slice(&slice("web-1", &[1, 2]))])), "swap");
        assert_eq!(kinds(&control.batch([put_slice(&slice("web-1", &[]))])), "swap park");
        assert_eq!(kinds(&control.batch([delete(&web())])), "unbind retire");
        assert_eq!(control.running, Layout::default());
    }

    #[test]
    fn t005_t007_given_a_live_service_when_it_becomes_headless_or_an_alias_then_all_listeners_go() {
        let mut control = Control::new();
        let node_port = web().node_port(30000);
        let headless = Service { cluster_ips: ClusterIps::Headless, ..web() };
        let alias = Service { kind: ServiceKind::ExternalName, ..node_port.clone() };

        assert_eq!(kinds(&control.batch([put(&headless)])), "");
        assert_eq!(kinds(&control.batch([put(&web())])), "swap bind");
        assert_eq!(kinds(&control.batch([put(&node_port)])), "bind");
        assert_eq!(kinds(&control.batch([put(&alias)])), "unbind unbind retire");
        assert_eq!(kinds(&control.batch([put(&web())])), "swap bind");
        assert_eq!(kinds(&control.batch([put(&headless)])), "unbind retire");
    }

    #[test]
    fn t009_t010_t011_given_changes_that_cancel_out_when_they_come_in_one_batch_then_there_is_nothing_to_do() {
        let mut control = Control::new();
        assert_eq!(kinds(&control.batch([put(&web()), delete(&web())])), "");
        control.batch([put(&web()), put_slice(&slice("web-1", &[1, 2]))]);

        assert_eq!(kinds(&control.batch([put(&web()), put_slice(&slice("web-1", &[1, 2]))])), "");
        assert_eq!(kinds(&control.batch([put(&web().port("https", 443)), put(&web())])), "");
        assert_eq!(kinds(&control.batch([delete(&web()), put(&web())])), "");
    }

    #[test]
    fn t012_given_a_service_made_anew_elsewhere_when_planned_then_the_new_address_opens_and_the_old_closes() {
        let mut control = Control::new();
        control.batch([put(&web())]);
        let moved = Service::new("default/web").cluster_ip([10, 96, 0, 11]).port("http", 80);

        assert_eq!(kinds(&control.batch([delete(&web()), put(&moved)])), "bind unbind");
        assert_eq!(control.at("10.96.0.11:80").as_deref(), Some("default/web:http"));
    }

    #[test]
    fn t013_given_a_port_when_it_is_renamed_then_its_socket_stays_and_points_to_the_new_name() {
        let mut control = Control::new();
        control.batch([put(&web().port("admin", 81))]);
        let renamed = web().port("operator", 81);

        assert_eq!(kinds(&control.batch([put(&renamed)])), "swap point retire");
        assert_eq!(control.at("10.96.0.10:81").as_deref(), Some("default/web:operator"));
    }

    #[test]
    fn t014_given_two_ports_when_they_swap_numbers_then_nothing_is_closed_and_nothing_bound() {
        let mut control = Control::new();
        let before = Service::new("default/web").cluster_ip([10, 96, 0, 10]).port("a", 80).port("b", 81);
        let after = Service::new("default/web").cluster_ip([10, 96, 0, 10]).port("a", 81).port("b", 80);
        control.batch([put(&before)]);

        assert_eq!(kinds(&control.batch([put(&after)])), "point point");
        assert_eq!(control.at("10.96.0.10:80").as_deref(), Some("default/web:b"));
    }

    #[test]
    fn t015_given_a_port_when_its_number_changes_then_the_new_one_opens_before_the_old_one_closes() {
        let mut control = Control::new();
        control.batch([put(&web())]);
        let renumbered = Service::new("default/web").cluster_ip([10, 96, 0, 10]).port("http", 99);

        assert_eq!(kinds(&control.batch([put(&renumbered)])), "bind unbind");
    }

    #[test]
    fn t023_given_a_load_balancer_ip_when_it_is_not_to_be_captured_any_more_then_its_listener_closes() {
        let mut control = Control::new();
        let load_balancer_ips = Rare::from(vec![[198, 51, 100, 1].into()]);
        control.batch([put(&Service { load_balancer_ips, ..web() })]);
        assert_eq!(control.at("198.51.100.1:80").as_deref(), Some("default/web:http"));

        assert_eq!(kinds(&control.batch([put(&web())])), "unbind");
    }

    #[test]
    fn t111_given_source_ranges_when_they_change_then_the_load_balancer_ip_alone_is_pointed_anew() {
        let mut control = Control::new();
        let balanced = Service { load_balancer_ips: vec![[198, 51, 100, 1].into()].into(), ..web().node_port(30000) };
        control.batch([put(&balanced)]);
        let source_ranges = Rare::from(vec!["203.0.113.0/24".parse().expect("a net")]);

        let steps = control.batch([put(&Service { source_ranges: source_ranges.clone(), ..balanced })]);

        let [Step::Point(key, listener)] = steps.as_slice() else { panic!("not one point: {steps:?}") };
        assert_eq!((key.to_string().as_str(), listener.kind), ("198.51.100.1:80/TCP", ListenerKind::LoadBalancerIp));
        assert_eq!(*listener.source_ranges, *source_ranges);
    }

    #[test]
    fn t029_given_two_services_on_one_node_port_when_planned_then_the_older_has_it_and_the_other_takes_over() {
        let mut control = Control::new();
        let service = |name: &str, host: u8, created: &str| {
            let service = Service::new(name).cluster_ip([10, 96, 0, host]).port("http", 80).node_port(30000);
            Service { created: created.into(), ..service }
        };
        let (a, b) = (service("default/a", 1, "2024-01-02T00:00:00Z"), service("default/b", 2, "2024-01-01T00:00:00Z"));

        control.batch([put(&a)]);
        assert_eq!(control.at("127.0.0.1:30000").as_deref(), Some("default/a:http"));
        assert_eq!(kinds(&control.batch([put(&b)])), "swap point bind");
        assert_eq!(control.at("127.0.0.1:30000").as_deref(), Some("default/b:http"));
        assert_eq!(control.at("10.96.0.1:80").as_deref(), Some("default/a:http"), "the rest of the loser is served");
        let remedy = "the older, then the first by name, keeps it; give this one another number or address";
        let said = format!("Service default/a: node port 30000/TCP is taken by Service default/b: {remedy}");
        assert_eq!(control.problems(), [said]);
        assert_eq!(control.plan.listeners(&a.name).count(), 1);

        assert_eq!(kinds(&control.batch([delete(&b)])), "point unbind retire");
        assert_eq!(control.at("127.0.0.1:30000").as_deref(), Some("default/a:http"));
        assert_eq!(control.problems(), [] as [&str; 0]);
        assert!(control.plan.touched().contains(&a.name), "its report is to be made anew");
    }

    #[test]
    fn t029_given_a_conflict_on_many_addresses_when_reported_then_it_is_one_problem() {
        let mut control = Control::new();
        control.options.node_port_addresses = (1..=9).map(|host| [192, 0, 2, host].into()).collect();
        let service =
            |name: &str, host| Service::new(name).cluster_ip([10, 96, 0, host]).port("http", 80).node_port(30000);

        control.batch([put(&service("default/a", 1)), put(&service("default/b", 2))]);

        assert_eq!(control.problems().len(), 1);
    }

    #[test]
    fn t124_given_one_external_ip_for_two_services_when_ports_differ_then_both_are_served() {
        let mut control = Control::new();
        control.options.allowed_external_cidrs = vec!["203.0.113.0/24".parse().expect("a net")];
        let service = |name: &str, host, port| {
            let service = Service::new(name).cluster_ip([10, 96, 0, host]).port("http", port);
            Service { external_ips: vec![[203, 0, 113, 1].into()].into(), ..service }
        };

        control.batch([put(&service("default/a", 1, 80)), put(&service("default/b", 2, 81))]);
        assert_eq!(control.problems(), [] as [&str; 0]);
        control.batch([put(&service("default/b", 2, 80))]);

        assert_eq!(control.at("203.0.113.1:80").as_deref(), Some("default/a:http"));
        assert!(control.problems()[0].contains("external IP 203.0.113.1:80/TCP is taken by Service default/a"));
    }

    #[test]
    fn t029_given_a_health_port_that_an_older_service_has_when_planned_then_it_is_answered_nowhere_until_that_goes() {
        let mut control = Control::new();
        let older = Service::new("default/a").cluster_ip([10, 96, 0, 1]).port("http", 80).node_port(31000);
        let younger = Service { created: "2024-01-01T00:00:00Z".into(), ..balanced(web(), 31000) };

        control.batch([put(&younger)]);
        assert_eq!(health_ports(&control.plan), ["default/web 31000 0"]);
        control.batch([put(&older)]); // Of one family: on ::1 nobody has it.
        assert_eq!(health_ports(&control.plan), [] as [&str; 0]);
        assert_eq!(control.at("127.0.0.1:31000").as_deref(), Some("default/a:http"));
        assert_eq!(control.at("10.96.0.10:80").as_deref(), Some("default/web:http"), "the Service is served");
        let said = &control.problems()[0];
        assert!(
            said.starts_with("Service default/web: health port 31000/TCP is taken by Service default/a: "),
            "{said}"
        );

        control.batch([delete(&older)]);
        assert_eq!(health_ports(&control.plan), ["default/web 31000 0"]);
        assert!(control.plan.touched().contains(&younger.name), "it is to be opened");
        assert_eq!(control.problems(), [] as [&str; 0]);
    }

    #[test]
    fn t029_given_a_node_port_that_an_older_health_port_has_when_planned_then_it_is_the_node_port_that_waits() {
        let mut control = Control::new();
        let younger = Service::new("default/a").cluster_ip([10, 96, 0, 1]).port("http", 80).node_port(31000);
        let younger = Service { created: "2024-01-01T00:00:00Z".into(), ..younger };
        control.batch([put(&balanced(web(), 31000)), put(&younger)]);

        assert_eq!(health_ports(&control.plan), ["default/web 31000 0"]);
        assert_eq!(control.at("127.0.0.1:31000"), None);
        assert!(control.problems()[0].starts_with("Service default/a: node port 31000/TCP is taken by"));
        assert_eq!(kinds(&control.batch([put(&balanced(web(), 31001))])), "bind");
        assert_eq!(health_ports(&control.plan), ["default/web 31001 0"]);
    }

    #[test]
    fn given_two_services_on_one_health_port_when_planned_then_the_older_alone_is_answered_for() {
        let mut control = Control::new();
        let service = |name: &str, created: &str| {
            let service = Service::new(name).cluster_ip([10, 96, 0, 1]).port(name, 80);
            Service { created: created.into(), ..balanced(service, 31000) }
        };

        control.batch([put(&service("a", "2024-01-01T00:00:00Z")), put(&service("b", "2023-01-01T00:00:00Z"))]);

        assert_eq!(health_ports(&control.plan), ["default/b 31000 0"]);
    }

    #[test]
    fn t059_given_local_endpoints_when_they_come_and_go_then_a_load_balancer_is_told_of_those_that_are_used() {
        let mut control = Control::new();
        control.options.node.name = Some("here".into());
        let web = balanced(web(), 31000);
        let here = |address: [u8; 4]| Endpoint { node: Some("here".into()), ..Endpoint::new(address) };
        let slice = slice("web-1", &[1]).endpoint(here([10, 0, 0, 2])).endpoint(here([10, 96, 0, 20]));
        control.batch([put(&web), put_slice(&slice)]);
        assert_eq!(health_ports(&control.plan), ["default/web 31000 2"]);

        let front = Service::new("default/front").cluster_ip([10, 96, 0, 20]).port("http", 8000);
        control.batch([put(&front)]);
        assert_eq!(health_ports(&control.plan), ["default/web 31000 1"], "one of them is a cluster IP now");
        assert!(control.plan.touched().contains(&web.name), "its number is to be told");
        control.batch([delete(&front)]);

        assert_eq!(health_ports(&control.plan), ["default/web 31000 2"]);
    }

    #[test]
    fn given_a_winner_when_it_only_changes_elsewhere_then_the_loser_is_left_alone() {
        let mut control = Control::new();
        let service = |name: &str| Service::new(name).cluster_ip([10, 96, 0, 1]).port("http", 80);
        control.batch([put(&service("default/a")), put(&service("default/b"))]);

        assert_eq!(kinds(&control.batch([put(&service("default/a").port("https", 443))])), "swap bind");
        assert_eq!(control.problems().len(), 1);
    }

    #[test]
    fn t052_t054_t055_given_an_endpoint_when_it_moves_between_slices_then_the_table_is_not_swapped() {
        let mut control = Control::new();
        control.batch([put(&web()), put_slice(&slice("a", &[1, 2])), put_slice(&slice("b", &[3]))]);

        let gone_first = [put_slice(&slice("a", &[1])), put_slice(&slice("b", &[2, 3]))];
        assert_eq!(kinds(&control.batch(gone_first)), "");
        let there_first = [put_slice(&slice("a", &[2, 1])), put_slice(&slice("b", &[3]))];
        assert_eq!(kinds(&control.batch(there_first)), "");
        assert_eq!(kinds(&control.batch([put_slice(&slice("a", &[1, 2]))])), "", "order alone is no change");
    }

    #[test]
    fn t063_given_ten_thousand_services_when_one_endpoint_changes_then_one_table_is_swapped_and_no_other_looked_at() {
        let mut control = Control::new();
        let service = |n: u16| {
            let [high, low] = n.to_be_bytes();
            Service::new(&format!("default/s{n}")).cluster_ip([10, 97, high, low]).port("http", 80)
        };
        let services: Vec<_> = (0..10_000).map(service).collect();
        let slice = |service: &Service, hosts: u8| {
            let name = format!("{}-1", service.name.name);
            let slice = Slice::new(&name, service).port("http", 8000);
            (0..hosts).fold(slice, |slice, host| slice.endpoint(Endpoint::new([10, 0, 0, host])))
        };
        let slices = services.iter().map(|service| slice(service, 10)).collect();
        control.batch([Event::Replace(Objects::new(services.clone(), slices))]);
        let changed = put_slice(&slice(&services[5_000], 9));

        let mut dirty = BTreeSet::new();
        control.model.apply(changed, &mut dirty);
        let steps = control.plan.update(&control.model, &dirty, &control.options);

        assert_eq!(kinds(&steps), "swap");
        assert_eq!(control.plan.touched(), &BTreeSet::from([services[5_000].name.clone()]));
    }

    #[test]
    fn t143_given_affinity_or_balance_when_they_change_live_then_tables_are_swapped_and_no_socket_is_touched() {
        let mut control = Control::new();
        control.batch([put(&web()), put_slice(&slice("web-1", &[1, 2]))]);
        let sticky = |seconds| Service { affinity_timeout: Some(Duration::from_secs(seconds)), ..web() };
        let annotated = |key: &str, value: &str| {
            let annotations = [(key.into(), value.into())].into();
            Service { annotations, ..web() }
        };

        assert_eq!(kinds(&control.batch([put(&sticky(600))])), "swap");
        assert_eq!(kinds(&control.batch([put(&sticky(60))])), "swap");
        assert_eq!(kinds(&control.batch([put(&web())])), "swap");
        assert_eq!(kinds(&control.batch([put(&annotated("balance", "p2c"))])), "swap");
        assert_eq!(kinds(&control.batch([put(&annotated("balance", "fastest"))])), "swap", "the default");
        assert_eq!(control.problems().len(), 1);
        assert_eq!(kinds(&control.batch([put(&annotated("affinity-ipv6-prefix", "64"))])), "swap");
    }

    #[test]
    fn given_a_zone_when_it_changes_then_tables_follow_without_a_change_of_the_service() {
        let mut control = Control::new();
        let hinted =
            |host, zone: &str| Endpoint { zone_hints: vec![zone.into()].into(), ..Endpoint::new([10, 0, 0, host]) };
        let slice = slice("web-1", &[]).endpoint(hinted(1, "zone-a")).endpoint(hinted(2, "zone-b"));
        control.options.node.zone = Some("zone-a".into());
        control.batch([put(&web()), put_slice(&slice)]);

        control.options.node.zone = Some("zone-b".into());
        let steps = control.plan.update(&control.model, &BTreeSet::from([web().name]), &control.options);

        let [Step::Swap(_, backends)] = steps.as_slice() else { panic!("not one swap: {steps:?}") };
        assert_eq!(backends.usable.picks[0].address().to_string(), "10.0.0.2:8000");
        assert_eq!(backends.usable.serving.len(), 2);
    }

    #[test]
    fn given_a_service_to_expose_that_is_not_there_when_it_comes_then_the_problem_goes() {
        let mut control = Control::new();
        let listen = "127.0.0.1:8080".parse().expect("an address");
        control.options.expose = vec![Expose { listen, service: web().name, port: "http".into() }];
        control.batch([]);
        assert!(control.problems()[0].contains("--expose 127.0.0.1:8080=default/web:http opens nothing"));

        control.batch([put(&web())]);

        assert_eq!(control.problems(), [] as [&str; 0]);
        assert_eq!(control.at("127.0.0.1:8080").as_deref(), Some("default/web:http"));
    }

    #[test]
    fn given_a_service_to_expose_that_is_skipped_when_planned_then_the_reason_is_said() {
        let mut control = Control::new();
        let listen = "127.0.0.1:8080".parse().expect("an address");
        control.options.expose = vec![Expose { listen, service: web().name, port: "http".into() }];

        control.batch([put(&Service { cluster_ips: ClusterIps::Headless, ..web() })]);

        assert_eq!(control.problems().len(), 1);
        assert!(control.problems()[0].contains("opens nothing: the Service is skipped (headless)"));
        control.batch([put(&web())]);
        assert_eq!(control.problems(), [] as [&str; 0]);
    }

    #[test]
    fn given_a_dual_stack_service_when_planned_then_its_node_port_is_on_both_localhost_addresses() {
        let mut control = Control::new();
        let v6: IpAddr = "fd00::10".parse().expect("an address");

        control.batch([put(&web().cluster_ip(v6).node_port(30000))]);

        assert_eq!(control.at("127.0.0.1:30000").as_deref(), Some("default/web:http"));
        assert_eq!(control.at("[::1]:30000").as_deref(), Some("default/web:http"));
    }

    #[test]
    fn given_a_backend_that_is_a_listener_of_ours_when_planned_then_it_is_a_problem_as_long_as_both_are_there() {
        let mut control = Control::new();
        let front = Service::new("default/front").cluster_ip([10, 96, 0, 20]).port("http", 8000);
        let calls_itself = slice("web-1", &[1]).endpoint(Endpoint::new([10, 96, 0, 20]));

        control.batch([put(&web()), put_slice(&calls_itself)]);
        assert_eq!(control.problems(), [] as [&str; 0]);
        assert_eq!(kinds(&control.batch([put(&front)])), "swap swap bind", "before it listens, nobody is sent there");

        let said = "endpoint 10.96.0.20:8000/TCP is not used: it is the cluster IP of a Service";
        assert_eq!(control.problems(), [format!("Service default/web: {said}")]);
        assert!(control.plan.touched().contains(&web().name), "its report is to be made anew");
        control.batch([put_slice(&slice("web-1", &[1]))]);
        assert_eq!(control.problems(), [] as [&str; 0]);
        control.batch([put_slice(&calls_itself)]);
        assert_eq!(control.problems().len(), 1);
        control.batch([delete(&front)]);
        assert_eq!(control.problems(), [] as [&str; 0]);
    }

    #[test]
    fn t093_t095_given_no_backend_but_listeners_of_ours_when_planned_then_it_is_as_if_there_were_none() {
        let mut control = Control::new();
        let web = web().udp_port("dns", 53);
        let own = |slice: &Slice| slice.clone().endpoint(Endpoint::new([10, 96, 0, 20]));
        let slices =
            [slice("a", &[]), Slice::new("b", &web).udp_port("dns", 5353)].map(|slice| put_slice(&own(&slice)));
        let front = Service::new("default/front").cluster_ip([10, 96, 0, 20]).port("http", 8000).udp_port("dns", 5353);
        control.batch(slices.into_iter().chain([put(&web)]));
        let verdicts = |control: &Control| {
            let sides = control.plan.listeners(&web.name).map(|(_, listener)| listener.target.outside.verdict);
            sides.collect::<Vec<_>>()
        };
        assert_eq!(verdicts(&control), [Verdict::Serve; 2]);

        assert_eq!(kinds(&control.batch([put(&front)])), "swap swap swap swap bind bind park park");

        assert_eq!(verdicts(&control), [Verdict::Reject; 2]);
        assert!(control.running.balancers.values().all(|backends| backends.usable.serving.is_empty()));
        assert_eq!(control.problems().len(), 2);
        assert_eq!(kinds(&control.batch([delete(&front)])), "swap swap revive revive unbind unbind retire retire");
        assert_eq!(verdicts(&control), [Verdict::Serve; 2]);
    }

    #[test]
    fn t112_given_no_local_backend_but_a_listener_of_ours_when_planned_then_policy_local_drops_for_the_remote_one() {
        let mut control = Control::new();
        control.options.node.name = Some("here".into());
        let web = Service { internal_policy: TrafficPolicy::Local, ..web() };
        let here = Endpoint { node: Some("here".into()), ..Endpoint::new([10, 96, 0, 10]) };
        let itself = Slice::new("web-1", &web).port("http", 80).endpoint(here);
        let verdict = |control: &Control| {
            control.plan.listeners(&web.name).map(|(_, listener)| listener.target.outside.verdict).next()
        };

        control.batch([put(&web), put_slice(&itself)]);
        assert_eq!(verdict(&control), Some(Verdict::Reject));
        control.batch([put_slice(&itself.endpoint(Endpoint::new([10, 0, 0, 1])))]);

        assert_eq!(verdict(&control), Some(Verdict::Drop));
        assert_eq!(control.problems().len(), 1);
    }

    #[test]
    fn given_a_loop_when_another_takes_the_listener_over_then_it_is_one_all_the_same() {
        let mut control = Control::new();
        let front = |name: &str| Service::new(name).cluster_ip([10, 96, 0, 20]).port("http", 8000);
        let calls_itself = slice("web-1", &[]).endpoint(Endpoint::new([10, 96, 0, 20]));
        control.batch([put(&web()), put_slice(&calls_itself), put(&front("default/a")), put(&front("default/b"))]);

        assert_eq!(kinds(&control.batch([delete(&front("default/a"))])), "point retire");

        assert_eq!(control.problems().len(), 1);
        assert!(!control.plan.touched().contains(&web().name));
    }

    #[test]
    fn given_a_listener_of_the_other_protocol_when_a_backend_has_its_number_then_it_is_no_loop() {
        let mut control = Control::new();
        let front = Service::new("default/front").cluster_ip([10, 96, 0, 20]).udp_port("quic", 8000);

        let there = slice("web-1", &[]).endpoint(Endpoint::new([10, 96, 0, 20]));
        control.batch([put(&front), put(&web()), put_slice(&there)]);

        assert_eq!(control.problems(), [] as [&str; 0]);
    }

    /// A few Services that meet in addresses, numbers and ages, and come and go.
    fn event() -> impl Strategy<Value = Event> {
        (0_u8..4, 0_u8..3, 0_u8..3, 0_u8..3, any::<bool>()).prop_map(|(name, host, number, age, gone)| {
            let service = Service::new(&format!("default/s{name}")).cluster_ip([10, 96, 0, host]).port("http", 80);
            let service = Service { created: format!("202{age}-05-01T00:00:00Z").into(), ..service };
            let service = if number == 0 { service } else { service.node_port(30000 + u16::from(number)) };
            // Some ask for a number that others have as a node port.
            let service = if host == 2 { balanced(service, 30001) } else { service };
            match (gone, age) {
                (true, 0) => delete(&service),
                (true, _) => put_slice(&Slice::new(&format!("s{name}-1"), &service).port("http", 8000)),
                // Where somebody's cluster IP is, now and then.
                (false, 0) => {
                    let (network, port) = if number == 0 { (96, 80) } else { (0, 8000) };
                    let slice = Slice::new(&format!("s{name}-1"), &service).port("http", port);
                    put_slice(&slice.endpoint(Endpoint::new([10, network, 0, host])))
                }
                (false, _) => put(&service),
            }
        })
    }

    proptest! {
        /// `batch` compares with a plan made anew: only the objects count, not the way that led to them.
        #[test]
        fn given_any_history_when_planned_step_by_step_then_the_state_is_that_of_a_plan_made_at_once(
            batches in prop::collection::vec(prop::collection::vec(event(), 1..4), 1..16),
        ) {
            let mut control = Control::new();
            for batch in batches {
                control.batch(batch);
            }
        }
    }
}
