//! What one Service asks for: its listeners, its balancers, and what is wrong with it by itself.
//!
//! Other Services do not exist here: who gets a listen key that two ask for is settled in `plan`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::admission;
use crate::endpoints::{self, Selection, Usable};
use crate::entries::{Entries, Entry};
use crate::layout::{Backends, Layout, Listener, ListenerKind, Side, Target, Verdict};
use crate::model::{ClusterIps, Service, ServiceKind, Slice, TrafficPolicy};
use crate::name::{BalancerKey, Family, Scope, ServicePortName};
use crate::plan::PlanOptions;
use crate::problem::Problem;

/// What is planned for one Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePlan {
    /// Why nothing of it is served, as a word; `None` where it is.
    pub skipped: Option<&'static str>,
    /// Its listeners and balancers, before conflicts with other Services are settled.
    pub wanted: Layout,
    /// What is wrong with it by itself.
    pub problems: Vec<Problem>,
    /// The addresses that it does not get, since another Service has them.
    pub conflicts: Vec<Problem>,
    /// From `metadata.creationTimestamp`: its rank among claimants.
    pub(crate) created: Arc<str>,
}

impl ServicePlan {
    /// Plans one Service from its slices.
    pub(crate) fn of<'a>(service: &Service, slices: impl Iterator<Item = &'a Slice>, options: &PlanOptions) -> Self {
        let mut plan = Self { skipped: skip_word(service, options), ..Self::default() };
        plan.created = Arc::clone(&service.created);
        if plan.skipped.is_some() {
            return plan;
        }
        let entries = Entries::of(service, options);
        plan.problems.extend(entries.problems);
        if entries.families.is_empty() {
            plan.skipped = Some("family");
            return plan;
        }
        let (slices, refused) = admission::admit(slices, options.allow_loopback_endpoints);
        plan.problems.extend(refused);
        let targets = plan.choose_backends(service, &entries.list, |port, family, external| {
            let slices = slices.iter().map(AsRef::as_ref);
            endpoints::usable(service, &service.ports[port], family, external, slices, &options.node)
        });
        plan.listen(service, &entries.list, &targets);
        plan
    }

    /// Chooses backends for each port and family that has an entry, and what follows for its listeners.
    fn choose_backends(
        &mut self,
        service: &Service,
        entries: &[Entry],
        select: impl Fn(usize, Family, bool) -> Selection,
    ) -> BTreeMap<(usize, Family), Targets> {
        let mut external = BTreeMap::<_, bool>::new();
        for entry in entries {
            *external.entry((entry.port, entry.family())).or_default() |= entry.kind != ListenerKind::ClusterIp;
        }
        let chosen = external.into_iter().map(|((port, family), external)| {
            let selection = select(port, family, external);
            let targets = Targets::of(service, &selection);
            self.add_balancers(service, port, family, selection);
            ((port, family), targets)
        });
        chosen.collect()
    }

    fn add_balancers(&mut self, service: &Service, port: usize, family: Family, selection: Selection) {
        for (scope, usable) in [(Scope::Cluster, selection.cluster), (Scope::Local, selection.local)] {
            if let Some(usable) = usable {
                let key = BalancerKey { port: port_name(service, port), family, scope };
                let backends = Backends { affinity_timeout: service.affinity_timeout, usable };
                self.wanted.balancers.insert(key, backends);
            }
        }
    }

    /// Makes a listener of each entry; of two on one key the first is served.
    fn listen(&mut self, service: &Service, entries: &[Entry], targets: &BTreeMap<(usize, Family), Targets>) {
        let mut taken = BTreeSet::new();
        for entry in entries {
            let port = port_name(service, entry.port);
            match self.wanted.listeners.get(&entry.key) {
                // Two ways to one port are none too many: a load-balancer IP may be an external IP, too.
                Some(first) if first.port == port => {}
                // Said once, on however many node addresses it happens.
                Some(first) => drop(taken.insert((entry.kind, entry.port, first.kind, first.port.port.clone()))),
                None => {
                    let targets = targets.get(&(entry.port, entry.family())).expect("chosen for every entry");
                    let target = targets.of_kind(entry.kind);
                    let listener = Listener { port, kind: entry.kind, allocated: entry.allocated, target };
                    self.wanted.listeners.insert(entry.key, listener);
                }
            }
        }
        self.problems.extend(taken.into_iter().map(|(kind, port, first_kind, first_port)| {
            let port = &service.ports[port];
            let number = if kind == ListenerKind::NodePort { port.node_port.unwrap_or_default() } else { port.port };
            let message = format!(
                "{} {number}/{} of port {:?} is taken by port {first_port:?} ({}): give one of them another number",
                kind.in_words(),
                port.protocol,
                port.name,
                first_kind.in_words(),
            );
            Problem::error(format_args!("Service {}", service.name), "conflict", message)
        }));
    }
}

fn skip_word(service: &Service, options: &PlanOptions) -> Option<&'static str> {
    if service.proxy_name.as_deref() != options.proxy_name.as_deref() {
        return Some("proxy_name");
    }
    if service.kind == ServiceKind::ExternalName {
        return Some("external_name");
    }
    match service.cluster_ips {
        ClusterIps::Headless => Some("headless"),
        ClusterIps::Unset => Some("unallocated"),
        ClusterIps::Addresses { .. } => None,
    }
}

fn port_name(service: &Service, port: usize) -> ServicePortName {
    let port = &service.ports[port];
    ServicePortName { service: service.name.clone(), port: Arc::clone(&port.name), protocol: port.protocol }
}

/// Where the listeners of one port and family lead.
#[derive(Clone, Copy, Debug)]
struct Targets {
    /// At the cluster IP.
    internal: Target,
    /// At all other addresses.
    external: Target,
}

impl Targets {
    fn of(service: &Service, selection: &Selection) -> Self {
        let internal = judge(selection, scope_of(service.internal_policy));
        let external = judge(selection, scope_of(service.external_policy));
        // This node and its pods need no second hop and no source address: they may use every endpoint.
        let from_inside = judge(selection, Scope::Cluster);
        Self {
            internal: Target { outside: internal, inside: internal },
            external: Target { outside: external, inside: from_inside },
        }
    }

    fn of_kind(&self, kind: ListenerKind) -> Target {
        if kind == ListenerKind::ClusterIp { self.internal } else { self.external }
    }
}

fn scope_of(policy: TrafficPolicy) -> Scope {
    match policy {
        TrafficPolicy::Cluster => Scope::Cluster,
        TrafficPolicy::Local => Scope::Local,
    }
}

/// Serve where the scope has an endpoint; else drop where only the policy forbids one, reject where there is none.
fn judge(selection: &Selection, scope: Scope) -> Side {
    let usable: &Option<Usable> = match scope {
        Scope::Cluster => &selection.cluster,
        Scope::Local => &selection.local,
    };
    let verdict = match usable {
        Some(usable) if !usable.picks.is_empty() => Verdict::Serve,
        _ if selection.any => Verdict::Drop,
        _ => Verdict::Reject,
    };
    Side { scope, verdict }
}
