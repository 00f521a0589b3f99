//! Desired state of all Services: what each asks for, who gets what two ask for, and the steps to get there.
//!
//! Pure: no clock, no socket. What one Service asks for is made in `service_plan` (where it is reached in
//! `entries`, with which endpoints in `endpoints`); layouts and steps are in `layout`; steps are carried
//! out in `serve`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::claims::{Claimant, Claims};
use crate::endpoints::Node;
use crate::model::{Model, ServicePort};
use crate::name::{ListenKey, ObjectName};

pub use crate::layout::{Backends, Layout, Listener, ListenerKind, Side, Step, Target, Verdict, diff};
pub use crate::problem::{Problem, Severity};
pub use crate::service_plan::ServicePlan;

/// What shapes a plan besides the objects. Owned by `control`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// This node.
    pub node: Node,
    /// The addresses that node ports are served on: `--nodeport-addresses`, resolved by `host`.
    pub node_port_addresses: Vec<IpAddr>,
    /// All addresses of this node: what a wildcard `--expose` stands for, and what no external IP may take.
    pub node_addresses: Vec<IpAddr>,
    /// External IPs are served only inside these. From `--allowed-external-cidrs`; empty refuses all.
    pub allowed_external_cidrs: Vec<IpNet>,
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

/// The plan of all Services. Owned by `control`, by value.
#[derive(Debug, Default)]
pub struct Plan {
    services: BTreeMap<ObjectName, ServicePlan>,
    claims: Claims,
    /// Services with a problem or a conflict.
    troubled: BTreeSet<ObjectName>,
    /// Services that the last update planned anew, or that won or lost something by it.
    touched: BTreeSet<ObjectName>,
    /// `--expose` of Services that are not there.
    unmet: Vec<Problem>,
}

impl Plan {
    /// Plans the dirty Services anew and returns the steps from the old plan to the new one.
    ///
    /// Work is proportional to the dirty Services and to who shares a listen key with them. Where the
    /// options have changed, all Services are dirty.
    pub fn update(&mut self, model: &Model, dirty: &BTreeSet<ObjectName>, options: &PlanOptions) -> Vec<Step> {
        let anew: Vec<_> = dirty.iter().map(|name| (name, plan_of(model, name, options))).collect();
        let keys = self.keys_of_both(&anew);
        let before = self.part(dirty, &keys);
        self.touched = self.claimants(&keys);
        for (name, plan) in anew {
            self.replace(name, plan);
        }
        self.touched.extend(self.claimants(&keys));
        self.touched.extend(dirty.iter().cloned());
        self.report_conflicts();
        self.report_unmet(options);
        diff(&before, &self.part(dirty, &keys))
    }

    /// The plan of one Service; `None` where there is no such object.
    pub fn service(&self, name: &ObjectName) -> Option<&ServicePlan> {
        self.services.get(name)
    }

    /// The listeners that a Service really gets, by key.
    pub fn listeners(&self, name: &ObjectName) -> impl Iterator<Item = (&ListenKey, &Listener)> {
        let wanted = self.services.get(name).into_iter().flat_map(|plan| &plan.wanted.listeners);
        wanted.filter(move |(key, _)| self.claims.winner(key).is_some_and(|winner| winner == name))
    }

    /// The listener at a key.
    pub fn listener(&self, key: &ListenKey) -> Option<&Listener> {
        self.services.get(self.claims.winner(key)?)?.wanted.listeners.get(key)
    }

    /// All that is wrong, by Service.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        let troubled = self.troubled.iter().filter_map(|name| self.services.get(name));
        troubled.flat_map(|plan| plan.problems.iter().chain(&plan.conflicts)).chain(&self.unmet)
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
    fn keys_of_both(&self, anew: &[(&ObjectName, Option<ServicePlan>)]) -> BTreeSet<ListenKey> {
        let old = anew.iter().filter_map(|(name, _)| self.services.get(*name));
        let new = anew.iter().filter_map(|(_, plan)| plan.as_ref());
        old.chain(new).flat_map(|plan| plan.wanted.listeners.keys()).copied().collect()
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

    fn replace(&mut self, name: &ObjectName, plan: Option<ServicePlan>) {
        if let Some(old) = self.services.remove(name) {
            old.wanted.listeners.keys().for_each(|key| self.claims.release(key, name));
        }
        let Some(plan) = plan else { return };
        for key in plan.wanted.listeners.keys() {
            let claimant = Claimant { created: plan.created.clone(), service: name.clone() };
            self.claims.claim(*key, claimant);
        }
        self.services.insert(name.clone(), plan);
    }

    fn report_conflicts(&mut self) {
        for name in &self.touched {
            self.troubled.remove(name);
            let Some(plan) = self.services.get_mut(name) else { continue };
            plan.conflicts = conflicts(name, plan, &self.claims);
            if !plan.problems.is_empty() || !plan.conflicts.is_empty() {
                self.troubled.insert(name.clone());
            }
        }
    }

    fn report_unmet(&mut self, options: &PlanOptions) {
        let unmet = options.expose.iter().filter(|expose| !self.services.contains_key(&expose.service));
        let problem = |expose: &Expose| {
            let object = format!("Service {}", expose.service);
            Problem::error(object, "expose", format!("--expose {expose} opens nothing: there is no such Service"))
        };
        self.unmet = unmet.map(problem).collect();
    }
}

fn plan_of(model: &Model, name: &ObjectName, options: &PlanOptions) -> Option<ServicePlan> {
    let service = model.service(name)?;
    Some(ServicePlan::of(service, model.slices(name).map(AsRef::as_ref), options))
}

/// What an older Service has taken from this one: one problem for each port and rival.
fn conflicts(name: &ObjectName, plan: &ServicePlan, claims: &Claims) -> Vec<Problem> {
    let mut lost = BTreeMap::<_, Vec<&ListenKey>>::new();
    for (key, listener) in &plan.wanted.listeners {
        match claims.winner(key) {
            Some(winner) if winner != name => {
                let port = (listener.kind, key.address.port(), key.protocol, winner);
                lost.entry(port).or_default().push(key);
            }
            _ => {}
        }
    }
    let problem = |((kind, number, protocol, winner), keys): ((ListenerKind, u16, _, _), Vec<&ListenKey>)| {
        let addresses = keys.iter().map(|key| key.address.ip().to_string()).collect::<Vec<_>>().join(", ");
        let what = match (kind, keys.as_slice()) {
            (ListenerKind::NodePort, _) => format!("node port {number}/{protocol} ({addresses})"),
            (_, [key]) => format!("{} {key}", kind.in_words()),
            _ => format!("{} {number}/{protocol} ({addresses})", kind.in_words()),
        };
        let remedy = "the older object keeps it; give one of them another number or address";
        let message = format!("{what} is taken by Service {winner}: {remedy}");
        Problem::error(format_args!("Service {name}"), "conflict", message)
    };
    lost.into_iter().map(problem).collect()
}
