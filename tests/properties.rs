//! What holds for any objects and any history of them: one plan for one state, steps that lead to it, and a
//! target for each listener at each step.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use kube_relay::endpoints::Node;
use kube_relay::model::{Endpoint, Event, Model, Service, ServiceKind, Slice, TrafficPolicy};
use kube_relay::name::{ListenKey, ObjectName, Protocol};
use kube_relay::plan::{AllowFrom, Expose, Layout, Plan, PlanOptions, diff};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use support::full;

#[path = "support/mod.rs"]
mod support;

/// Services and slices that meet in names, addresses and numbers: few of each, so that they often do.
const NAMES: [&str; 4] = ["default/a", "default/b", "shop/a", "shop/c"];

/// A relay without sockets.
#[derive(Default)]
struct Relay {
    model: Model,
    plan: Plan,
    running: Layout,
}

impl Relay {
    /// Takes a batch in and carries the steps out one by one. No listener may ever be without a target.
    fn batch(&mut self, events: impl IntoIterator<Item = Event>) -> Result<(), TestCaseError> {
        let mut dirty = BTreeSet::new();
        events.into_iter().for_each(|event| self.model.apply(event, &mut dirty));
        for step in self.plan.update(&self.model, &dirty, &options()) {
            self.running.apply(std::slice::from_ref(&step));
            prop_assert_eq!(without_target(&self.running), None, "after {:?}", step);
        }
        prop_assert_eq!(&self.running, &self.plan.layout());
        prop_assert_eq!(diff(&self.running, &self.running), vec![]);
        Ok(())
    }

    /// All that people see of it.
    fn problems(&self) -> BTreeSet<String> {
        self.plan.problems().map(ToString::to_string).collect()
    }
}

fn without_target(layout: &Layout) -> Option<ListenKey> {
    let has_both = |key: &ListenKey| {
        let listener = &layout.listeners[key];
        listener.balancers(key).iter().all(|balancer| layout.balancers.contains_key(balancer))
    };
    layout.listeners.keys().copied().find(|key| !has_both(key))
}

fn options() -> PlanOptions {
    let own: Vec<IpAddr> = vec![[192, 0, 2, 1].into(), Ipv6Addr::LOCALHOST.into()];
    let listen = ([192, 0, 2, 1], 8080).into();
    PlanOptions {
        cluster_cidrs: vec![],
        node: Node { name: Some("node-1".into()), zone: Some("zone-a".into()) },
        node_port_addresses: own.clone(),
        lent_addresses: vec![],
        node_addresses: own,
        allowed_external_cidrs: vec!["203.0.113.0/24".parse().expect("a net")],
        endpoint_cidrs: vec![],
        require_target_ref: false,
        allow_from: Some(AllowFrom::new(&["10.0.0.0/8".parse().expect("a net")])),
        accept_proxy_from: vec!["10.0.0.9/32".parse().expect("a net")],
        proxy_name: None,
        expose: vec![Expose { listen, service: ObjectName::parse("shop/a"), port: "80".into() }],
        allow_loopback_endpoints: false,
    }
}

fn service() -> impl Strategy<Value = Service> {
    let identity = (
        select(&NAMES),
        select(vec!["", "2024-01-01T00:00:00Z", "2024-01-01T00:00:00+01:00"]),
        proptest::option::weighted(0.1, Just("mesh")),
    );
    let addresses = (0_u8..3, proptest::option::of(0_u16..3), vec(0_u8..3, 0..2), vec(0_u8..3, 0..2));
    let ports = vec((select(vec!["", "http", "dns"]), 80_u16..83, 0_u16..3, protocol()), 0..3);
    let lists = (any::<bool>(), proptest::option::of(select(vec!["10.1.0.0/16, fd00::/8", "nonsense"])));
    let policies = (policy(), policy(), lists, proptest::option::of(1_u64..100));
    let kinds = select(vec![ServiceKind::ClusterIp, ServiceKind::LoadBalancer, ServiceKind::ExternalName]);
    (identity, addresses, ports, policies, kinds).prop_map(|(identity, addresses, ports, policies, kind)| {
        let (name, created, proxy_name) = identity;
        let (v4, v6, external, balanced) = addresses;
        let (internal_policy, external_policy, (guarded, allow_from), affinity) = policies;
        let mut service = Service::new(name);
        if v4 > 0 {
            service = service.cluster_ip([10, 96, 0, v4]);
        }
        if let Some(host) = v6 {
            service = service.cluster_ip(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, host));
        }
        for (name, number, node_port, protocol) in ports {
            service = match protocol {
                Protocol::Udp => service.udp_port(name, number),
                _ => service.port(name, number),
            };
            if node_port > 0 {
                service = service.node_port(30_000 + node_port);
            }
        }
        Service {
            created: created.into(),
            proxy_name: proxy_name.map(Arc::from),
            kind,
            external_ips: external.into_iter().map(|host| [203, 0, 113, host].into()).collect(),
            load_balancer_ips: balanced.into_iter().map(|host| [198, 51, 100, host].into()).collect(),
            source_ranges: guarded.then(|| "10.0.0.0/8".parse().expect("a net")).into_iter().collect(),
            internal_policy,
            external_policy,
            affinity_timeout: affinity.map(Duration::from_secs),
            annotations: allow_from.map(|list| ("allow-from".into(), list.into())).into_iter().collect(),
            ..service
        }
    })
}

fn policy() -> impl Strategy<Value = TrafficPolicy> {
    select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local])
}

fn protocol() -> impl Strategy<Value = Protocol> {
    select(vec![Protocol::Tcp, Protocol::Udp])
}

fn slice() -> impl Strategy<Value = Slice> {
    let ports = vec((select(vec!["", "http", "dns"]), 80_u16..82, protocol()), 0..3);
    (select(&NAMES), 0_u8..3, ports, vec(endpoint(), 0..4)).prop_map(|(service, number, ports, endpoints)| {
        let slice = Slice::new(&format!("slice-{number}"), &Service::new(service));
        let slice = ports.into_iter().fold(slice, |slice, (name, port, protocol)| match protocol {
            Protocol::Udp => slice.udp_port(name, port),
            _ => slice.port(name, port),
        });
        endpoints.into_iter().fold(slice, Slice::endpoint)
    })
}

fn endpoint() -> impl Strategy<Value = Endpoint> {
    // The second net is that of the cluster IPs: a listener of ours may be somebody's backend.
    let address = (select(vec![244_u8, 96]), 0_u8..4);
    let conditions = (any::<bool>(), any::<bool>(), any::<bool>());
    let places =
        (select(vec![None, Some("node-1"), Some("node-2")]), hint("zone-a", "zone-b"), hint("node-1", "node-2"));
    (address, conditions, places).prop_map(|((net, host), (ready, serving, terminating), (node, zones, nodes))| {
        Endpoint {
            ready,
            serving,
            terminating,
            node: node.map(Arc::from),
            zone_hints: zones.into_iter().map(Arc::from).collect(),
            node_hints: nodes.into_iter().map(Arc::from).collect(),
            ..Endpoint::new([10, net, 0, host])
        }
    })
}

fn hint(one: &'static str, other: &'static str) -> impl Strategy<Value = Vec<&'static str>> {
    subsequence(vec![one, other], 0..=2)
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => service().prop_map(|service| Event::ApplyService(Arc::new(service))),
        4 => slice().prop_map(|slice| Event::ApplySlice(Arc::new(slice))),
        1 => service().prop_map(|service| Event::DeleteService(service.name)),
        1 => slice().prop_map(|slice| Event::DeleteSlice(slice.name)),
    ]
}

/// Objects of different names, in an order and in another one.
fn shuffled() -> impl Strategy<Value = (Vec<Event>, Vec<Event>)> {
    let objects = (vec(service(), 0..6), vec(slice(), 0..6)).prop_map(|(services, slices)| {
        let (mut known, mut names) = (BTreeSet::new(), BTreeSet::new());
        let services = services.into_iter().filter(move |service| known.insert(service.name.clone()));
        let slices = slices.into_iter().filter(move |slice| names.insert(slice.name.clone()));
        let services = services.map(|service| Event::ApplyService(Arc::new(service)));
        services.chain(slices.map(|slice| Event::ApplySlice(Arc::new(slice)))).collect::<Vec<_>>()
    });
    objects.prop_flat_map(|events| (Just(events.clone()), Just(events).prop_shuffle()))
}

fn cases() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(if full() { 20_000 } else { 300 }) }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn given_any_history_when_followed_step_by_step_then_the_state_is_that_of_a_plan_made_at_once(
        batches in vec(vec(event(), 1..4), 1..12),
    ) {
        let mut relay = Relay::default();
        for batch in batches {
            relay.batch(batch)?;
        }

        let mut anew = Relay::default();
        let mut events: Vec<_> = relay.model.services().map(|service| Event::ApplyService(Arc::clone(service))).collect();
        for service in NAMES.map(ObjectName::parse) {
            events.extend(relay.model.slices(&service).map(|slice| Event::ApplySlice(Arc::clone(slice))));
        }
        anew.batch(events)?;

        prop_assert_eq!(&relay.running, &anew.running);
        prop_assert_eq!(relay.problems(), anew.problems());
    }

    #[test]
    fn given_the_same_objects_when_they_come_in_another_order_then_the_plan_is_the_same(
        (in_order, shuffled) in shuffled(),
        batch in 1_usize..4,
    ) {
        let (mut one, mut other) = (Relay::default(), Relay::default());

        one.batch(in_order)?;
        other.batch([])?; // The first state may be empty; what is said of it is said once anything is planned.
        for events in shuffled.chunks(batch) {
            other.batch(events.to_vec())?;
        }

        prop_assert_eq!(&one.running, &other.running);
        prop_assert_eq!(one.problems(), other.problems());
    }

    #[test]
    fn given_two_states_when_one_replaces_the_other_then_the_steps_lead_there_and_the_same_again_is_none(
        a in vec(event(), 0..8),
        b in vec(event(), 0..8),
    ) {
        let (mut from, mut to) = (Relay::default(), Relay::default());
        from.batch(a)?;
        to.batch(b)?;
        let mut state = from.running.clone();

        state.apply(&diff(&from.running, &to.running));

        prop_assert_eq!(&state, &to.running);
        prop_assert_eq!(diff(&state, &to.running), vec![]);
    }
}
