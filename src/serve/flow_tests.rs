//! The flow table, case by case: one table, and a clock that is moved by hand.

use std::num::NonZeroU32;

use super::*;
use crate::name::{ListenKey, ObjectName, Protocol, ServicePortName};
use crate::plan::ListenerKind;
use crate::serve::access::AccessTap;
use crate::serve::gate::FlowGate;

/// A table with one listener, and a clock that moves by hand.
struct Bench {
    table: FlowTable,
    listener: ListenerId,
    now: Instant,
    port: Arc<PortState>,
    closed: Vec<FlowId>,
}

/// The flow that made room.
fn evicted(verdict: Verdict) -> Option<FlowId> {
    match verdict {
        Verdict::Open { evicted, .. } => evicted,
        other => panic!("{other:?}"),
    }
}

impl Bench {
    fn new(flows: usize) -> Self {
        let now = Instant::now();
        let limits = FlowLimits::split(flows, 1).next().expect("one shard");
        let mut table = FlowTable::new(limits, 1, now);
        let listener = table.add_listener(IdleTimes::default());
        let name = ServicePortName::new(ObjectName::parse("dns"), "dns", Protocol::Udp);
        Self { table, listener, now, port: Arc::new(PortState::new(name)), closed: Vec::new() }
    }

    fn backend(id: u32) -> Arc<Backend> {
        let address = SocketAddr::from(([10, 0, 0, 1], 53));
        Arc::new(Backend::new(id, address))
    }

    fn choose(&self, backend: &Arc<Backend>) -> Choice {
        Choice { backend: Arc::clone(backend), port: Arc::clone(&self.port), entry: Entry::ClusterIp }
    }

    /// A datagram; a flow that it opens gets its socket.
    fn datagram(&mut self, from: &str, backend: &Arc<Backend>) -> Verdict {
        let choice = self.choose(backend);
        let client = from.parse().expect("an address");
        let verdict = self.table.on_datagram(self.listener, client, self.now, |_| Ok(choice.clone()));
        if let Verdict::Open { flow, .. } = verdict {
            self.table.opened(flow);
        }
        self.table.check();
        verdict
    }

    fn flow(&mut self, from: &str, backend: &Arc<Backend>) -> FlowId {
        match self.datagram(from, backend) {
            Verdict::Open { flow, .. } | Verdict::Forward(flow) => flow,
            Verdict::Drop(reason) => panic!("dropped: {reason}"),
        }
    }

    /// A flow whose client has spoken again after an answer.
    fn stream(&mut self, from: &str, backend: &Arc<Backend>) -> FlowId {
        let flow = self.flow(from, backend);
        self.reply(flow);
        self.flow(from, backend)
    }

    fn reply(&mut self, flow: FlowId) {
        assert!(self.table.on_reply(flow, self.now).is_some(), "the flow is alive");
        self.table.check();
    }

    /// The flows that it closes.
    fn sweep(&mut self, judge: impl Fn(&Choice) -> Fate) -> Vec<FlowId> {
        let mut closed = Vec::new();
        self.table.sweep(self.listener, self.now, |_, choice| judge(choice), |flow| closed.push(flow));
        self.table.check();
        closed
    }

    fn pass(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
        self.table.expire(self.now, |flow| self.closed.push(flow));
        self.table.check();
    }
}

#[test]
fn t181_given_a_flow_when_nobody_speaks_for_its_idle_time_then_it_ends_and_the_gauge_is_zero() {
    let (mut bench, backend) = (Bench::new(8), Bench::backend(1));
    let flow = bench.flow("10.9.0.1:1000", &backend);

    bench.pass(10);
    assert_eq!((bench.closed.len(), backend.stats.active_flows.get()), (0, 1), "not early");
    bench.pass(1);

    assert_eq!(bench.closed, [flow]);
    assert_eq!(backend.stats.active_flows.get(), 0);
    assert_eq!(backend.stats.closed.get(CloseReason::IdleUnreplied), 1);
    assert_eq!(bench.table.next_expiry(), None, "an empty table needs no clock");
}

#[test]
fn t181_given_each_state_when_time_passes_then_its_own_idle_time_counts() {
    let (mut bench, backend) = (Bench::new(8), Bench::backend(1));
    let answered = bench.flow("10.9.0.1:1000", &backend);
    let stream = bench.flow("10.9.0.1:1001", &backend);
    bench.reply(answered);
    bench.reply(stream);
    bench.flow("10.9.0.1:1001", &backend);

    bench.pass(11);
    assert_eq!(bench.closed, [answered]);
    bench.pass(49);
    assert_eq!(bench.closed.len(), 1);
    bench.pass(1);

    assert_eq!(bench.closed, [answered, stream]);
    assert_eq!(backend.stats.closed.get(CloseReason::Idle), 2);
}

#[test]
fn t182_given_a_flow_when_either_side_speaks_then_its_idle_time_begins_anew() {
    let (mut bench, backend) = (Bench::new(8), Bench::backend(1));
    let flow = bench.flow("10.9.0.1:1000", &backend);

    for _ in 0..20 {
        bench.pass(9);
        assert_eq!(bench.datagram("10.9.0.1:1000", &backend), Verdict::Forward(flow));
    }
    for _ in 0..20 {
        bench.pass(9);
        bench.reply(flow);
    }

    assert!(bench.closed.is_empty());
    bench.pass(11);
    assert_eq!(bench.closed, [flow]);
}

#[test]
fn t183_given_two_clients_ports_and_scopes_when_they_send_then_each_has_its_own_flow() {
    let (mut bench, backend) = (Bench::new(32), Bench::backend(1));
    let clients = ["10.9.0.1:1000", "10.9.0.1:1001", "10.9.0.2:1000", "[fe80::1%1]:1000", "[fe80::1%2]:1000"];

    let flows: HashSet<_> = clients.iter().map(|client| bench.flow(client, &backend)).collect();

    assert_eq!(flows.len(), clients.len());
    assert_eq!(bench.port.stats.accepted.get(), clients.len() as u64);
}

#[test]
fn t191_given_a_backend_refuses_when_the_client_sends_again_then_another_backend_is_picked() {
    let (mut bench, [first, second]) = (Bench::new(8), [1, 2].map(Bench::backend));
    let flow = bench.flow("10.9.0.1:1000", &first);
    bench.table.on_refused(flow, CloseReason::Refused, bench.now);
    bench.table.check();
    let choices = [bench.choose(&first), bench.choose(&second)];
    let pick = |tried: &Tried| {
        choices.iter().find(|choice| !tried.contains(&choice.backend)).cloned().ok_or(DropReason::NoEndpoints)
    };

    let client = "10.9.0.1:1000".parse().expect("an address");
    let verdict = bench.table.on_datagram(bench.listener, client, bench.now, pick);
    bench.table.opened(flow);

    assert_eq!(verdict, Verdict::Open { flow, evicted: None });
    assert_eq!(bench.table.choice(flow).map(|choice| choice.backend.id), Some(2));
    assert_eq!((first.stats.active_flows.get(), second.stats.active_flows.get()), (0, 1));
    assert_eq!(first.stats.closed.get(CloseReason::Refused), 1);
    assert_eq!((bench.port.stats.accepted.get(), bench.port.stats.retries.get()), (1, 1));
}

#[test]
fn t191_given_the_only_backend_refuses_when_the_client_sends_again_then_it_is_tried_again() {
    let (mut bench, backend) = (Bench::new(8), Bench::backend(1));
    let flow = bench.flow("10.9.0.1:1000", &backend);
    bench.table.on_refused(flow, CloseReason::Refused, bench.now);
    let choice = bench.choose(&backend);

    let client = "10.9.0.1:1000".parse().expect("an address");
    let verdict = bench.table.on_datagram(bench.listener, client, bench.now, |tried| {
        if tried.contains(&choice.backend) { Err(DropReason::NoEndpoints) } else { Ok(choice.clone()) }
    });

    assert_eq!(verdict, Verdict::Open { flow, evicted: None });
}

#[test]
fn t190_given_an_endpoint_leaves_when_swept_then_answered_flows_end_waiting_ones_part_and_others_stay() {
    let (mut bench, [gone, kept]) = (Bench::new(8), [1, 2].map(Bench::backend));
    let [answered, waiting] = [1, 2].map(|host| bench.flow(&format!("10.9.0.{host}:1000"), &gone));
    let stream = bench.stream("10.9.0.3:1000", &gone);
    let other = bench.flow("10.9.0.4:1000", &kept);
    bench.reply(answered);

    let closed = bench.sweep(|choice| if choice.backend.id == 2 { Fate::Stays } else { Fate::Parts });

    assert_eq!(closed, [answered]);
    for flow in [waiting, stream] {
        bench.reply(flow); // it was on its way
    }
    for host in 1..=3 {
        assert!(matches!(bench.datagram(&format!("10.9.0.{host}:1000"), &kept), Verdict::Open { evicted: None, .. }));
    }
    assert_eq!(bench.datagram("10.9.0.4:1000", &kept), Verdict::Forward(other));
    assert_eq!(gone.stats.closed.get(CloseReason::EndpointRemoved), 3);
    assert_eq!((gone.stats.active_flows.get(), kept.stats.active_flows.get()), (0, 4));
    assert_eq!((bench.port.stats.accepted.get(), bench.port.stats.retries.get()), (7, 0));
}

#[test]
fn t190_given_a_flow_that_parts_when_its_client_says_no_more_then_answers_do_not_make_it_last() {
    let (mut bench, gone) = (Bench::new(8), Bench::backend(1));
    let stream = bench.stream("10.9.0.1:1000", &gone);
    bench.sweep(|_| Fate::Parts);

    for _ in 0..10 {
        bench.reply(stream);
        bench.pass(1);
        bench.sweep(|_| Fate::Parts); // again and again, as other endpoints come and go
    }
    assert!(bench.closed.is_empty());
    bench.pass(1);

    assert_eq!(bench.closed, [stream]);
    assert_eq!(gone.stats.closed.get(CloseReason::EndpointRemoved), 1);
}

#[test]
fn t190_given_a_flow_that_parts_when_nobody_is_left_or_its_pod_is_gone_then_it_waits_or_ends() {
    let (mut bench, gone) = (Bench::new(8), Bench::backend(1));
    let flow = bench.flow("10.9.0.1:1000", &gone);
    bench.sweep(|_| Fate::Parts);

    let client = "10.9.0.1:1000".parse().expect("an address");
    let verdict = bench.table.on_datagram(bench.listener, client, bench.now, |_| Err(DropReason::NoEndpoints));
    assert_eq!(verdict, Verdict::Drop(DropReason::NoEndpoints));
    bench.reply(flow);
    bench.table.on_refused(flow, CloseReason::Refused, bench.now);
    bench.table.check();

    assert_eq!((bench.table.count(), gone.stats.active_flows.get()), (0, 0));
    assert_eq!(gone.stats.closed.get(CloseReason::EndpointRemoved), 1);
}

#[test]
fn t190_given_an_access_log_when_a_flow_parts_and_its_client_asks_again_then_two_flows_are_told_of() {
    let (mut bench, [gone, kept]) = (Bench::new(8), [1, 2].map(Bench::backend));
    let (tap, records) = AccessTap::new(8, NonZeroU32::MIN, 0);
    let listen = ListenKey::new([10, 96, 0, 10].into(), 53, Protocol::Udp);
    let client = ([10, 9, 0, 1], 1000).into();
    let draft = |port: &Arc<PortState>| Some(tap.draft(client, listen, ListenerKind::ClusterIp, port));
    let flow = bench.flow("10.9.0.1:1000", &gone);
    bench.table.tell(flow, draft(&bench.port));
    bench.sweep(|_| Fate::Parts);

    bench.flow("10.9.0.1:1000", &kept);
    bench.table.tell(flow, draft(&bench.port));
    bench.pass(11);

    let told = records.try_iter().flatten().map(|record| (record.tries, record.reason));
    assert_eq!(told.collect::<Vec<_>>(), [(1, "endpoint_removed"), (1, "idle_unreplied")]);
}

#[test]
fn t188_given_a_flow_whose_backend_refuses_when_it_has_another_then_it_did_not_begin_again() {
    let (mut bench, [gone, next]) = (Bench::new(8), [1, 2].map(Bench::backend));
    let client = "10.9.0.1:1000".parse().expect("an address");
    let choice = bench.choose(&gone);
    let verdict = bench.table.on_datagram(bench.listener, client, bench.now, |_| Ok(choice.clone()));
    let Verdict::Open { flow, .. } = verdict else { panic!("{verdict:?}") };
    assert!(bench.table.opened(flow));

    bench.table.on_refused(flow, CloseReason::Refused, bench.now);
    let choice = bench.choose(&next);
    bench.table.on_datagram(bench.listener, client, bench.now, |_| Ok(choice.clone()));

    assert!(!bench.table.opened(flow), "a sample has decided about it before");
}

#[test]
fn given_flows_that_may_not_be_when_swept_then_they_end_though_they_wait_for_an_answer() {
    let (mut bench, backend) = (Bench::new(8), Bench::backend(1));
    let (unreplied, stream) = (bench.flow("10.9.0.1:1000", &backend), bench.stream("10.9.0.1:1001", &backend));

    assert_eq!(bench.sweep(|_| Fate::Ends), [unreplied, stream]);

    assert_eq!(backend.stats.closed.get(CloseReason::EndpointRemoved), 2);
}

#[test]
fn t194_given_a_full_table_when_new_clients_come_then_the_oldest_unreplied_flow_goes_first() {
    let (mut bench, backend) = (Bench::new(4), Bench::backend(1));
    let flows: Vec<_> = (1..=4).map(|host| bench.flow(&format!("10.9.0.{host}:1000"), &backend)).collect();
    bench.reply(flows[0]);

    assert_eq!(evicted(bench.datagram("10.9.1.1:1000", &backend)), Some(flows[1]));
    assert_eq!(evicted(bench.datagram("10.9.1.2:1000", &backend)), Some(flows[2]));

    assert_eq!(backend.stats.closed.get(CloseReason::Evicted), 2);
    assert_eq!(backend.stats.active_flows.get(), 4);
}

#[test]
fn t194_given_a_full_table_of_finished_exchanges_when_new_clients_come_then_one_under_way_is_kept() {
    let (mut bench, backend) = (Bench::new(4), Bench::backend(1));
    let flows: Vec<_> = (1..=4).map(|host| bench.flow(&format!("10.9.0.{host}:1000"), &backend)).collect();
    flows[1..].iter().for_each(|flow| bench.reply(*flow));

    let verdict = bench.datagram("10.9.1.1:1000", &backend);

    assert!(matches!(verdict, Verdict::Open { evicted, .. } if evicted == Some(flows[1])), "{verdict:?}");
    bench.reply(flows[0]);
}

#[test]
fn t194_given_a_table_full_of_busy_streams_when_a_client_comes_then_it_is_refused_until_one_falls_silent() {
    let (mut bench, backend) = (Bench::new(4), Bench::backend(1));
    for host in 1..=4 {
        bench.stream(&format!("10.9.0.{host}:1000"), &backend);
    }

    assert_eq!(bench.datagram("10.9.1.1:1000", &backend), Verdict::Drop(DropReason::FlowLimit));
    bench.pass(11);

    assert!(matches!(bench.datagram("10.9.1.1:1000", &backend), Verdict::Open { evicted: Some(_), .. }));
}

#[test]
fn t194_given_a_gateway_full_of_streams_when_it_opens_another_then_the_one_silent_for_longest_makes_room() {
    let (mut bench, backend) = (Bench::new(16), Bench::backend(1));
    let streams: Vec<_> = (1..=4).map(|port| bench.stream(&format!("10.9.0.1:{port}"), &backend)).collect();
    let other = bench.stream("10.9.0.2:1000", &backend);
    assert_eq!(bench.datagram("10.9.0.1:5", &backend), Verdict::Drop(DropReason::FlowLimit), "all of them are busy");
    bench.pass(1);
    for port in [1, 3, 4] {
        bench.flow(&format!("10.9.0.1:{port}"), &backend);
    }

    bench.pass(1);

    assert_eq!(evicted(bench.datagram("10.9.0.1:5", &backend)), Some(streams[1]));
    assert!(bench.table.choice(other).is_some(), "somebody else's stream stays, however silent");
}

#[test]
fn t194_given_a_gateway_that_opens_all_its_flows_anew_when_two_seconds_have_passed_then_each_is_served() {
    let (mut bench, backend) = (Bench::new(64), Bench::backend(1));
    let busy = bench.stream("10.9.0.2:1000", &backend);

    for round in 1..=20 {
        for port in 0..16 {
            bench.stream(&format!("10.9.0.1:{}", round * 100 + port), &backend);
        }
        bench.pass(2);
        bench.flow("10.9.0.2:1000", &backend);
    }

    assert!(bench.table.choice(busy).is_some());
    assert_eq!(bench.table.count(), 17);
}

#[test]
fn t194_f18_given_a_flood_fills_the_table_when_a_gateway_opens_flows_then_the_flood_makes_room_before_its_streams() {
    let (mut bench, backend) = (Bench::new(64), Bench::backend(1));
    let streams: Vec<_> = (1..=8).map(|port| bench.stream(&format!("10.8.0.1:{port}"), &backend)).collect();
    bench.pass(3);
    for spoofed in 1..=100 {
        bench.flow(&format!("10.9.0.{spoofed}:1000"), &backend);
    }

    for port in 11..=14 {
        bench.stream(&format!("10.8.0.1:{port}"), &backend);
    }

    assert!(streams.iter().all(|flow| bench.table.choice(*flow).is_some()));
}

#[test]
fn t195_given_one_client_sweeps_its_source_ports_when_others_have_flows_then_it_evicts_only_its_own() {
    let (mut bench, backend) = (Bench::new(64), Bench::backend(1));
    let others: Vec<_> = (1..=8).map(|host| bench.flow(&format!("10.9.0.{host}:1000"), &backend)).collect();

    for port in 1..=2000 {
        bench.flow(&format!("10.9.1.1:{port}"), &backend);
    }

    assert_eq!(bench.table.count(), others.len() + 16, "a quarter of 64, and the others'");
    assert!(others.iter().all(|flow| bench.table.choice(*flow).is_some()));
}

#[test]
fn given_a_flood_from_many_sources_when_a_light_client_opens_more_flows_then_it_never_evicts_its_own() {
    let (mut bench, backend) = (Bench::new(256), Bench::backend(1));
    let stream = bench.flow("10.8.0.1:1000", &backend);
    bench.reply(stream);
    bench.flow("10.8.0.1:1000", &backend);

    for round in 0..200_u32 {
        let (a, aaaa) = (format!("10.8.0.1:{}", 2000 + 2 * round), format!("10.8.0.1:{}", 2001 + 2 * round));
        let queries = [bench.flow(&a, &backend), bench.flow(&aaaa, &backend)];
        for spoofed in 0..32 {
            bench.flow(&format!("10.9.{round}.{spoofed}:1000"), &backend);
        }
        queries.into_iter().for_each(|flow| bench.reply(flow)); // both are alive
        if round % 20 == 0 {
            bench.pass(1);
            bench.reply(stream);
        }
    }

    assert_eq!(bench.table.count(), 256);
}

#[test]
fn t195_f18_given_a_sweep_of_spoofed_sources_when_they_flood_the_table_then_it_keeps_its_limit_and_who_is_known() {
    const FLOWS: usize = 4096;
    let sources = if simulation::full() { 1_000_000_u32 } else { 50_000 };
    let (mut bench, backend) = (Bench::new(FLOWS), Bench::backend(1));
    let known: Vec<_> = (1..=100).map(|host| format!("10.9.0.{host}:1000")).collect();
    for client in &known {
        let flow = bench.flow(client, &backend);
        bench.reply(flow);
        bench.flow(client, &backend); // a stream from here on
    }
    let choice = bench.choose(&backend);
    let (listener, mut most) = (bench.listener, 0);

    for source in 0..sources {
        let client = SocketAddr::from(((0x0b00_0000 + source / 4).to_be_bytes(), 1 + (source % 4) as u16));
        bench.now += Duration::from_micros(10); // 10⁶ in 10 s
        if source % 1000 == 0 {
            bench.table.expire(bench.now, |_| {});
        }
        match bench.table.on_datagram(listener, client, bench.now, |_| Ok(choice.clone())) {
            Verdict::Open { flow, .. } => _ = bench.table.opened(flow),
            verdict => panic!("{client}: {verdict:?}"),
        }
        most = most.max(bench.table.count());
    }

    assert_eq!(most, FLOWS);
    for client in &known {
        assert!(matches!(bench.datagram(client, &backend), Verdict::Forward(_)), "{client} kept its flow");
    }
    bench.pass(15);
    assert_eq!(bench.table.count(), known.len(), "back to base");
}

#[test]
fn given_live_flows_when_their_listener_gets_other_idle_times_then_they_end_by_these() {
    let (mut bench, backend) = (Bench::new(8), Bench::backend(1));
    let [unreplied, answered] = ["10.9.0.1:1000", "10.9.0.2:1000"].map(|client| bench.flow(client, &backend));
    bench.reply(answered);
    let times = |seconds: [u64; 3]| {
        let [unreplied, answered, stream] = seconds.map(Duration::from_secs);
        IdleTimes { unreplied, answered, stream }
    };

    bench.table.set_idle(bench.listener, times([3, 100, 60]));
    bench.table.check();

    bench.pass(3);
    assert_eq!(bench.closed, []);
    bench.pass(1);
    assert_eq!(bench.closed, [unreplied]);
    bench.pass(96);
    assert_eq!(bench.table.count(), 1);
    bench.table.set_idle(bench.listener, times([3, 20, 60])); // over already
    bench.pass(1);
    assert_eq!(bench.closed, [unreplied, answered]);
}

/// A flow takes this much of our memory besides its sockets': an entry of the slab, one of the map, one of the
/// shell's sockets, and where each client has one flow, one of the clients' map. Maps are half full at worst.
#[test]
fn given_a_flow_when_its_memory_is_added_up_then_it_is_less_than_1_kib() {
    let map_entries = size_of::<(FlowKey, FlowId)>() + size_of::<(IpAddr, Ages)>() + 2;
    let slab_entry = size_of::<(Flow, [Chain; LANES], u64)>();
    let socket = 2 * size_of::<u64>();
    let worst = 2 * (slab_entry + socket) + 16 * map_entries / 7;

    println!("a flow takes {worst} bytes at most: {slab_entry} in the slab, {map_entries} in maps, before growth");
    assert!(worst <= 1024, "{worst} bytes");
}

#[test]
fn t200_given_a_source_that_no_sender_has_when_it_sends_then_the_datagram_is_dropped() {
    let (mut bench, backend) = (Bench::new(8), Bench::backend(1));

    for source in ["255.255.255.255:9", "224.0.0.1:9", "0.0.0.0:9", "10.0.0.1:0", "[ff02::1]:9", "[::]:9"] {
        assert_eq!(bench.datagram(source, &backend), Verdict::Drop(DropReason::DeniedAddress), "{source}");
    }
    assert_eq!(bench.table.count(), 0);
}

#[test]
fn given_a_source_that_is_a_listener_of_ours_when_it_sends_then_the_loop_ends_here() {
    let (mut bench, backend) = (Bench::new(8), Bench::backend(1));
    let listener = "10.96.0.10:53";
    bench.table.add_own_address(listener.parse().expect("an address"));

    assert_eq!(bench.datagram(listener, &backend), Verdict::Drop(DropReason::Loop));
}

#[test]
fn given_no_way_to_a_backend_when_the_client_sends_again_then_another_backend_is_picked() {
    let (mut bench, [first, second]) = (Bench::new(8), [1, 2].map(Bench::backend));
    let (client, listener) = ("10.9.0.1:1000".parse().expect("an address"), bench.listener);
    let choices = [bench.choose(&first), bench.choose(&second)];
    // As session affinity does: the same backend, unless it was tried.
    let pick = |tried: &Tried| {
        choices.iter().find(|choice| !tried.contains(&choice.backend)).cloned().ok_or(DropReason::NoEndpoints)
    };
    let verdict = bench.table.on_datagram(listener, client, bench.now, pick);
    let Verdict::Open { flow, .. } = verdict else { panic!("{verdict:?}") };
    bench.table.failed(flow, ConnectFailure::Unreachable);
    bench.table.check();

    let verdict = bench.table.on_datagram(listener, client, bench.now, pick);
    bench.table.opened(flow);

    assert_eq!(verdict, Verdict::Open { flow, evicted: None });
    assert_eq!(bench.table.choice(flow).map(|choice| choice.backend.id), Some(2));
    assert_eq!((bench.port.stats.accepted.get(), bench.port.stats.retries.get()), (1, 1));
    assert_eq!((first.stats.flows.get(), second.stats.active_flows.get()), (0, 1));
    assert_eq!(first.stats.connect_failures.get(ConnectFailure::Unreachable), 1);
}

#[test]
fn given_a_socket_cannot_be_opened_when_reported_then_the_flow_never_was() {
    let (mut bench, backend) = (Bench::new(8), Bench::backend(1));
    let (client, choice) = ("10.9.0.1:1000".parse().expect("an address"), bench.choose(&backend));
    let verdict = bench.table.on_datagram(bench.listener, client, bench.now, |_| Ok(choice.clone()));
    let Verdict::Open { flow, .. } = verdict else { panic!("{verdict:?}") };

    bench.table.failed(flow, ConnectFailure::FdLimit);
    bench.table.check();

    assert_eq!((bench.table.count(), bench.port.stats.accepted.get(), backend.stats.flows.get()), (0, 0, 0));
    assert_eq!(backend.stats.connect_failures.get(ConnectFailure::FdLimit), 1);
    assert!(CloseReason::ALL.iter().all(|reason| backend.stats.closed.get(*reason) == 0));
}

#[test]
fn f25_given_more_flows_than_there_is_room_for_when_imported_then_each_has_its_place_until_it_ends() {
    let (mut old, backend) = (Bench::new(8), Bench::backend(1));
    for client in ["10.9.0.1:1000", "10.9.0.2:1000", "10.9.0.3:1000", "10.9.0.4:1000"] {
        old.flow(client, &backend);
    }
    let mut new = Bench::new(1);

    for (_, record) in old.table.export(old.now) {
        let choice = new.choose(&backend);
        new.table.import(new.listener, &record, choice, new.now).expect("its place");
        new.table.check();
    }

    assert_eq!(new.table.count(), 4);
    new.pass(11);
    new.table.check();
    assert_eq!(new.table.count(), 0, "and given back");
}

#[test]
fn t192_given_exported_flows_when_imported_then_backend_state_and_silence_are_kept() {
    let (mut old, backend) = (Bench::new(8), Bench::backend(1));
    let stream = old.flow("10.9.0.1:1000", &backend);
    old.reply(stream);
    old.flow("10.9.0.1:1000", &backend);
    old.pass(7);
    old.flow("10.9.0.2:1000", &backend);

    let records = old.table.export(old.now);
    let mut new = Bench::new(8);
    for (flow, record) in &records {
        let choice = new.choose(&backend);
        new.table.import(new.listener, record, choice, new.now).expect("room");
        new.table.check();
        old.table.release(*flow);
        old.table.check();
    }

    assert_eq!(records.iter().map(|(_, record)| record.silent.as_secs()).collect::<Vec<_>>(), [7, 0]);
    let of = |records: Vec<(_, FlowRecord)>| records.into_iter().map(|(_, record)| record).collect::<Vec<_>>();
    assert_eq!(of(new.table.export(new.now)), of(records));
    assert_eq!(old.table.count(), 0);
    drop(old);
    assert_eq!((backend.stats.active_flows.get(), backend.stats.flows.get()), (2, 2), "none began, and none ended");
    assert!(CloseReason::ALL.iter().all(|reason| backend.stats.closed.get(*reason) == 0));
    new.pass(53);
    assert_eq!((new.table.count(), new.closed.len()), (1, 1), "unreplied is over, the stream has a second left");
    new.pass(1);
    assert_eq!(new.table.count(), 0);
}

#[test]
fn given_two_shards_when_one_is_flooded_then_the_other_keeps_its_guaranteed_places() {
    let mut limits = FlowLimits::split(64, 2);
    let (mut flooded, mut quiet, backend) = (Bench::new(1), Bench::new(1), Bench::backend(1));
    for bench in [&mut flooded, &mut quiet] {
        bench.table = FlowTable::new(limits.next().expect("two shards"), 1, bench.now);
        bench.listener = bench.table.add_listener(IdleTimes::default());
    }

    for host in 0..200 {
        flooded.flow(&format!("10.9.0.{host}:1000"), &backend);
    }
    for host in 0..200 {
        quiet.flow(&format!("10.9.0.{host}:1000"), &backend);
    }

    assert_eq!((flooded.table.count(), quiet.table.count()), (48, 16));
    flooded.pass(11);
    quiet.flow("10.9.1.1:1000", &backend);
    assert_eq!(quiet.table.count(), 17, "shared places come back");
}

#[test]
fn f22_given_no_room_for_more_flows_when_a_client_comes_then_the_least_one_makes_room_until_there_is() {
    let (mut bench, backend, gate) = (Bench::new(1), Bench::backend(1), Arc::<FlowGate>::default());
    let limits = FlowLimits::split(64, 2).next().expect("two shards").behind(&gate);
    bench.table = FlowTable::new(limits, 1, bench.now);
    bench.listener = bench.table.add_listener(IdleTimes::default());
    gate.allow(10);
    let first = bench.flow("10.9.0.1:1000", &backend);
    for host in 2..=10 {
        bench.stream(&format!("10.9.0.{host}:1000"), &backend);
    }

    assert_eq!(evicted(bench.datagram("10.9.0.11:1000", &backend)), Some(first), "a stream stays");
    assert_eq!((gate.open(), bench.table.count()), (10, 10));
    gate.allow(11);
    assert_eq!(evicted(bench.datagram("10.9.0.12:1000", &backend)), None);
    assert_eq!(gate.open(), 11);

    bench.pass(70);
    assert_eq!(gate.open(), 0, "they have expired");
    bench.flow("10.9.0.13:1000", &backend);
    drop(bench.table);
    assert_eq!(gate.open(), 0, "none is there any more");
}

#[test]
fn f22_f14_given_others_that_hold_all_there_is_when_the_clients_of_an_empty_table_come_then_a_few_are_served() {
    let (mut bench, backend, gate) = (Bench::new(1), Bench::backend(1), Arc::<FlowGate>::default());
    let limits = FlowLimits::split(64, 2).next().expect("two shards").behind(&gate);
    bench.table = FlowTable::new(limits, 1, bench.now);
    bench.listener = bench.table.add_listener(IdleTimes::default());
    gate.allow(0);

    let evictions =
        (1..=100).filter(|host| evicted(bench.datagram(&format!("10.9.0.{host}:1000"), &backend)).is_some());

    assert_eq!(evictions.count(), 92);
    assert_eq!((gate.open(), bench.table.count()), (8, 8));
}

#[test]
fn f35_given_a_panic_between_two_chains_when_the_table_begins_anew_then_each_flow_is_counted_out_once() {
    let (mut bench, backend) = (Bench::new(8), Bench::backend(1));
    bench.flow("10.9.0.1:1000", &backend);
    bench.flow("10.9.0.1:1001", &backend);
    bench.table.ages = Ages::default(); // as if it had happened there

    bench.table.reset(CloseReason::Panic, 2, bench.now);
    drop(bench.table);

    assert_eq!(backend.stats.active_flows.get(), 0);
    assert_eq!(backend.stats.closed.get(CloseReason::Panic), 2);
}
