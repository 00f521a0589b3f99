//! Listeners that follow objects: real sockets on loopback, plans made as `control` makes them.

use std::fs;
use std::io;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UdpSocket as AsyncUdpSocket};

use super::*;
use crate::endpoints::{Usable, UsableEndpoint};
use crate::model::{Endpoint, Event, Model, Service, Slice, TrafficPolicy};
use crate::name::{ObjectName, Scope};
use crate::plan::{Plan, PlanOptions};
use crate::serve::filter::tests::kernel_takes_filters;
use crate::serve::scripted::{LOOPBACK, expect_turned_away, named, read_all, soon, until};
use crate::serve::socket;
use crate::serve::tcp::TcpOptions;
use crate::serve::udp;
use crate::serve::udp::UdpOptions;
use crate::stats::{CloseReason, DropReason, Entry};

/// Listeners that follow objects, as `control` has them do.
struct Bench {
    model: Model,
    plan: Plan,
    options: PlanOptions,
    listeners: Listeners,
    now: Instant,
}

impl Bench {
    fn new() -> Self {
        let udp = UdpOptions { flow_limit: 64, ..UdpOptions::default() };
        let udp = UdpShards::start(1, udp).expect("a thread");
        let inside = Arc::from([IpNet::from(LOOPBACK)]);
        let node = crate::endpoints::Node { name: Some("here".into()), zone: None };
        Self {
            model: Model::default(),
            plan: Plan::default(),
            options: PlanOptions { node, allow_loopback_endpoints: true, ..PlanOptions::default() },
            listeners: Listeners::new(inside, Arc::new(TcpShared::new(TcpOptions::default()).expect("threads")), udp),
            now: Instant::now(),
        }
    }

    async fn take(&mut self, events: impl IntoIterator<Item = Event>) {
        let mut dirty = BTreeSet::new();
        events.into_iter().for_each(|event| self.model.apply(event, &mut dirty));
        let steps = self.plan.update(&self.model, &dirty, &self.options);
        self.listeners.apply(steps, self.now).await;
    }

    /// Leads a Service to an address that its plan would leave out: as it is for a moment while listeners come and go.
    async fn lead(&mut self, service: &Service, address: SocketAddr) {
        let port = &service.ports[0];
        let port = ServicePortName::new(service.name.clone(), Arc::clone(&port.name), port.protocol);
        let key = BalancerKey { port, family: Family::of(address.ip()), scope: Scope::Cluster };
        let endpoint =
            UsableEndpoint { ip: address.ip(), port: address.port(), local: false, terminating: false, pod: None };
        let usable = Usable { picks: [endpoint.clone()].into(), serving: [endpoint].into() };
        let backends = Backends { usable, ..Backends::default() };
        self.listeners.apply(vec![Step::Swap(key, backends)], self.now).await;
    }

    /// Lets the time of the next retry come.
    async fn retry(&mut self) {
        self.now = self.listeners.next_retry().expect("something has failed");
        self.listeners.retry(self.now).await;
    }

    fn backend(&self, service: &Service, address: SocketAddr) -> Arc<Backend> {
        let port = &service.ports[0];
        let (service, port, protocol) = (service.name.clone(), Arc::clone(&port.name), port.protocol);
        let found = self.listeners.backend(&ServicePortName::new(service, port, protocol), address);
        Arc::clone(found.expect("a backend"))
    }
}

fn ip(number: u8) -> IpAddr {
    [127, 84, 1, number].into()
}

fn tcp_key(number: u8) -> ListenKey {
    ListenKey::new(ip(number), 7400, Protocol::Tcp)
}

fn udp_key(number: u8) -> ListenKey {
    ListenKey::new(ip(number), 7400, Protocol::Udp)
}

fn web(name: &str, number: u8) -> Service {
    Service::new(name).cluster_ip(ip(number)).port("http", 7400)
}

fn dns(name: &str, number: u8) -> Service {
    Service::new(name).cluster_ip(ip(number)).udp_port("dns", 7400)
}

fn put(service: &Service) -> Event {
    Event::ApplyService(Arc::new(service.clone()))
}

fn delete(service: &Service) -> Event {
    Event::DeleteService(service.name.clone())
}

/// The Service's only slice: all its ports lead to these addresses, of one port number.
fn endpoints(service: &Service, backends: &[SocketAddr]) -> Event {
    let number = backends.first().map_or(1, SocketAddr::port);
    let mut slice = Slice::new(&format!("{}-1", service.name.name), service);
    for port in &service.ports {
        slice = match port.protocol {
            Protocol::Udp => slice.udp_port(&port.name, number),
            Protocol::Tcp | Protocol::Sctp => slice.port(&port.name, number),
        };
    }
    let slice = backends.iter().fold(slice, |slice, backend| slice.endpoint(Endpoint::new(backend.ip())));
    Event::ApplySlice(Arc::new(slice))
}

async fn ask(key: ListenKey) -> String {
    let mut stream = soon(TcpStream::connect(key.address())).await.expect("a listener");
    stream.shutdown().await.expect("a connection");
    String::from_utf8(read_all(&mut stream).await.0).expect("a name")
}

async fn is_refused(key: ListenKey) -> bool {
    let outcome = soon(TcpStream::connect(key.address())).await;
    outcome.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Answers each datagram with its name.
async fn named_udp(name: &'static str) -> SocketAddr {
    let socket = AsyncUdpSocket::bind((LOOPBACK, 0)).await.expect("a free port");
    let address = socket.local_addr().expect("a bound socket");
    tokio::spawn(async move {
        while let Ok((_, client)) = socket.recv_from(&mut [0; 16]).await {
            let _ = socket.send_to(name.as_bytes(), client).await;
        }
    });
    address
}

async fn udp_client(key: ListenKey) -> AsyncUdpSocket {
    let client = AsyncUdpSocket::bind((LOOPBACK, 0)).await.expect("a free port");
    client.connect(key.address()).await.expect("an address");
    client
}

/// Asks until somebody answers: a datagram that crosses a change may be lost.
async fn ask_udp(client: &AsyncUdpSocket) -> io::Result<String> {
    let mut answer = [0; 16];
    soon(async {
        loop {
            client.send(b"?").await?;
            let received = tokio::time::timeout(Duration::from_millis(100), client.recv(&mut answer)).await;
            if let Ok(length) = received {
                return Ok(String::from_utf8_lossy(&answer[..length?]).into_owned());
            }
        }
    })
    .await
}

/// The kernel's number of the socket that is bound to an address.
fn inode(key: ListenKey) -> Option<String> {
    let IpAddr::V4(ip) = key.ip() else { return None };
    let local = format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), key.port());
    let table = format!("/proc/self/net/{}", key.protocol.as_str().to_lowercase());
    let table = fs::read_to_string(table).expect("procfs");
    let sockets = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut bound = sockets.filter(|words| words[1] == local && (key.protocol == Protocol::Udp || words[3] == "0A"));
    bound.next().map(|words| words[9].to_owned())
}

#[tokio::test]
async fn t094_given_a_listener_when_its_endpoints_go_and_come_then_it_refuses_holds_its_port_and_serves_again() {
    let (mut bench, web) = (Bench::new(), web("default/web", 1));
    let one = named("one").await;
    bench.take([put(&web), endpoints(&web, &[one])]).await;
    let socket = inode(tcp_key(1));

    for _ in 0..2 {
        bench.take([endpoints(&web, &[])]).await;
        assert!(is_refused(tcp_key(1)).await);
        socket::listen_tcp(tcp_key(1)).expect_err("the port is held");
        bench.take([endpoints(&web, &[one])]).await;
        assert_eq!(ask(tcp_key(1)).await, "one");
    }

    assert_eq!(inode(tcp_key(1)), socket, "the same socket all along");
}

#[tokio::test]
async fn t093_given_a_service_without_endpoints_when_it_comes_then_its_port_is_parked_at_once() {
    let (mut bench, web) = (Bench::new(), web("default/web", 2));

    bench.take([put(&web)]).await;

    assert!(is_refused(tcp_key(2)).await);
    socket::listen_tcp(tcp_key(2)).expect_err("the port is held");
    bench.take([delete(&web)]).await;
    socket::listen_tcp(tcp_key(2)).expect("free");
}

#[tokio::test]
async fn t095_given_a_udp_listener_when_its_endpoints_go_and_come_then_senders_are_told_and_served_again() {
    let (mut bench, dns) = (Bench::new(), dns("default/dns", 3));
    let one = named_udp("one").await;
    bench.take([put(&dns), endpoints(&dns, &[one])]).await;
    let client = udp_client(udp_key(3)).await;

    for _ in 0..2 {
        assert_eq!(ask_udp(&client).await.expect("an answer"), "one");
        bench.take([endpoints(&dns, &[])]).await;
        assert_eq!(ask_udp(&client).await.expect_err("port unreachable").kind(), io::ErrorKind::ConnectionRefused);
        udp::bind_udp(udp_key(3).address()).expect_err("the port is held");
        bench.take([endpoints(&dns, &[one])]).await;
    }
}

#[tokio::test]
async fn f32_given_a_held_port_when_it_is_freed_then_the_next_retry_takes_it_and_others_were_served_meanwhile() {
    let (mut bench, both) = (Bench::new(), web("default/web", 4).port("other", 7401));
    let stranger = std::net::TcpListener::bind(tcp_key(4).address()).expect("a free address");
    bench.take([put(&both), endpoints(&both, &[named("one").await])]).await;
    assert_eq!(ask(ListenKey::new(ip(4), 7401, Protocol::Tcp)).await, "one");
    let error = bench.listeners.failure(&tcp_key(4)).expect("held by another").to_string();
    assert_eq!(error, "default/web:http: cannot listen on 127.84.1.4:7400/TCP");

    bench.retry().await;
    assert!(bench.listeners.failure(&tcp_key(4)).is_some(), "still held");
    drop(stranger);
    bench.retry().await;

    assert!(bench.listeners.next_retry().is_none());
    assert_eq!(ask(tcp_key(4)).await, "one");
}

#[tokio::test]
async fn given_a_failed_listener_when_its_service_changes_then_it_comes_up_as_it_should_be_by_then() {
    let (mut bench, [web, other]) = (Bench::new(), [web("default/web", 5), web("default/other", 5)]);
    let stranger = std::net::TcpListener::bind(tcp_key(5).address()).expect("a free address");
    bench.take([put(&web), endpoints(&web, &[named("one").await])]).await;

    bench.take([endpoints(&web, &[])]).await;
    bench.take([delete(&web), put(&other)]).await;
    let error = bench.listeners.failure(&tcp_key(5)).expect("still held");
    assert_eq!(error.service.service, other.name);
    drop(stranger);
    bench.retry().await;

    assert!(is_refused(tcp_key(5)).await, "no endpoint: parked");
    bench.take([endpoints(&other, &[named("two").await])]).await;
    assert_eq!(ask(tcp_key(5)).await, "two");
}

#[tokio::test]
async fn given_a_failed_listener_when_its_service_goes_then_it_is_not_tried_any_more() {
    let (mut bench, web) = (Bench::new(), web("default/web", 6));
    let _stranger = std::net::TcpListener::bind(tcp_key(6).address()).expect("a free address");
    bench.take([put(&web)]).await;
    bench.listeners.take_failure_news();

    bench.take([delete(&web)]).await;

    assert!(bench.listeners.next_retry().is_none());
    assert_eq!(bench.listeners.take_failure_news(), [tcp_key(6)].into());
}

#[tokio::test]
async fn given_a_parked_socket_that_cannot_be_revived_when_retried_then_another_one_serves() {
    let (mut bench, web) = (Bench::new(), web("default/web", 7));
    bench.take([put(&web)]).await;
    let not_a_socket = fs::File::open("/dev/null").expect("a file");
    let running = bench.listeners.listeners.get_mut(&tcp_key(7)).expect("parked");
    let Bound::ParkedTcp(bound) = &mut running.bound else { panic!("not parked") };
    bound.socket = Arc::new(not_a_socket.into());

    bench.take([endpoints(&web, &[named("one").await])]).await;
    assert!(bench.listeners.failure(&tcp_key(7)).is_some());
    bench.retry().await;

    assert_eq!(ask(tcp_key(7)).await, "one");
}

#[tokio::test]
async fn t029_given_two_claimants_when_the_winner_goes_then_the_other_takes_over_on_the_same_socket() {
    let (mut bench, [first, second]) = (Bench::new(), [web("default/a", 8), web("default/b", 8)]);
    let events = [endpoints(&first, &[named("a").await]), endpoints(&second, &[named("b").await])];
    bench.take([put(&first), put(&second)].into_iter().chain(events)).await;
    assert_eq!(ask(tcp_key(8)).await, "a");
    let socket = inode(tcp_key(8));

    bench.take([delete(&first)]).await;

    assert_eq!(ask(tcp_key(8)).await, "b");
    assert!(socket.is_some() && inode(tcp_key(8)) == socket);
    assert_eq!(bench.listeners.owner(&tcp_key(8)).map(|owner| &owner.service), Some(&second.name));
}

#[tokio::test]
async fn t029_given_a_udp_flow_when_another_service_takes_its_listener_over_then_its_next_datagram_goes_there() {
    let (mut bench, [first, second]) = (Bench::new(), [dns("default/a", 9), dns("default/b", 9)]);
    let (a, b) = (named_udp("a").await, named_udp("b").await);
    let events = [endpoints(&first, &[a]), endpoints(&second, &[b])];
    bench.take([put(&first), put(&second)].into_iter().chain(events)).await;
    let client = udp_client(udp_key(9)).await;
    assert_eq!(ask_udp(&client).await.expect("an answer"), "a");
    let (socket, left) = (inode(udp_key(9)), bench.backend(&first, a));

    bench.take([delete(&first)]).await;

    assert_eq!(ask_udp(&client).await.expect("an answer"), "b");
    assert!(socket.is_some() && inode(udp_key(9)) == socket);
    assert_eq!(left.stats.closed.get(CloseReason::EndpointRemoved), 1);
}

#[tokio::test]
async fn given_a_backend_when_tables_are_swapped_then_it_is_the_same_until_it_was_away() {
    let (mut bench, web) = (Bench::new(), web("default/web", 10));
    let [one, two] = [1, 2].map(|host| SocketAddr::from(([127, 84, 2, host], 80)));
    bench.take([put(&web), endpoints(&web, &[one, two])]).await;
    let before = bench.backend(&web, one);

    bench.take([endpoints(&web, &[one])]).await;
    assert!(Arc::ptr_eq(&before, &bench.backend(&web, one)));
    bench.take([endpoints(&web, &[two])]).await;
    bench.take([endpoints(&web, &[one, two])]).await;

    assert_ne!(before.id, bench.backend(&web, one).id, "what was pinned to it is not pinned any more");
}

#[tokio::test]
async fn given_a_backend_that_carried_something_when_it_leaves_and_comes_again_then_the_sums_of_its_port_do_not_fall() {
    let (mut bench, web) = (Bench::new(), web("default/web", 41));
    let [one, two] = [1, 2].map(|host| SocketAddr::from(([127, 84, 2, host], 80)));
    let port = ServicePortName::new(web.name.clone(), "http", Protocol::Tcp);
    let sum = |bench: &Bench| {
        let left = bench.listeners.departed(&port).unwrap_or_default();
        let backends = bench.listeners.backends(&port);
        let stats = backends.iter().filter_map(|backend| backend.stats.made()).chain(left.stats());
        stats.map(|stats| stats.connections.get()).sum::<u64>()
    };
    bench.take([put(&web), endpoints(&web, &[one, two])]).await;
    bench.backend(&web, one).stats.connections.add(Entry::ClusterIp, 5);
    bench.backend(&web, two).stats.connections.add(Entry::NodePort, 2);

    let mut sums = vec![sum(&bench)];
    for backends in [&[two] as &[SocketAddr], &[one], &[one, two], &[]] {
        bench.take([endpoints(&web, backends)]).await;
        sums.push(sum(&bench));
    }

    assert_eq!(sums, [7; 5]);
}

#[tokio::test]
async fn given_a_local_policy_when_a_program_here_connects_to_the_listeners_own_address_then_it_is_inside() {
    let (mut bench, web) = (Bench::new(), web("default/web", 11));
    bench.options.node_port_addresses = vec![ip(12)];
    let web = Service { external_policy: TrafficPolicy::Local, ..web.node_port(30000) };
    let node_port = ListenKey::new(ip(12), 30000, Protocol::Tcp);
    bench.take([put(&web), endpoints(&web, &[named("elsewhere").await])]).await;

    assert_eq!(
        ask_from(ip(12), node_port).await.expect("served"),
        "elsewhere",
        "the source of a program that names none, at a routed address"
    );
    ask_from(ip(13), node_port).await.expect_err("outside: dropped");
    // Where the kernel drops what comes, nobody counts it.
    let port = bench.listeners.listeners[&node_port].target.load_full();
    assert_eq!(port.port.stats.dropped.get(DropReason::NoLocalEndpoints), u64::from(!kernel_takes_filters()));
}

/// Who answers a client with this source; an error where it hears nothing for a while, or a reset.
async fn ask_from(source: IpAddr, key: ListenKey) -> io::Result<String> {
    let socket = tokio::net::TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(source, 0))?;
    let mut stream = tokio::time::timeout(Duration::from_millis(200), socket.connect(key.address())).await??;
    stream.shutdown().await?;
    let (name, outcome) = read_all(&mut stream).await;
    outcome.map(|()| String::from_utf8_lossy(&name).into_owned())
}

#[tokio::test]
async fn given_a_filter_that_is_not_taken_when_a_target_needs_none_then_what_is_served_is_heard() {
    let (mut bench, web) = (Bench::new(), web("default/web", 40));
    let ranges = |nets: &[IpNet]| Service {
        load_balancer_ips: vec![ip(41)].into(),
        source_ranges: nets.to_vec().into(),
        ..web.clone()
    };
    let balanced = ListenKey::new(ip(41), 7400, Protocol::Tcp);
    let far = (0..1_100).map(|number: u32| IpAddr::from((number * 3_900_001).to_be_bytes()).into());
    let too_many: Vec<IpNet> = far.collect();
    let before = crate::stats::PROCESS.filter_fallbacks.get();

    bench.take([put(&ranges(&[ip(42).into()])), endpoints(&web, &[named("one").await])]).await;
    ask_from(ip(43), balanced).await.expect_err("not in the range");
    bench.take([put(&ranges(&[too_many, vec![ip(43).into()]].concat()))]).await;

    // The filter of before is gone, and the process judges.
    assert_eq!(ask_from(ip(43), balanced).await.expect("in a range"), "one");
    let error = ask_from(ip(42), balanced).await.expect_err("in none any more");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert!(crate::stats::PROCESS.filter_fallbacks.get() > before);
}

#[tokio::test]
async fn given_backends_that_are_our_own_listeners_when_clients_come_then_they_are_refused_until_it_is_none() {
    let (mut bench, own) = (Bench::new(), tcp_key(21).address());
    let [own_web, first, second] = [web("default/web", 21), web("default/a", 22), web("default/b", 23)];
    // First the listener, then the backend; and the other way round, over two Services.
    bench.take([put(&own_web), endpoints(&own_web, &[own])]).await;
    let [a, b] = [tcp_key(22), tcp_key(23)];
    bench.take([put(&first), endpoints(&first, &[b.address()])]).await;
    bench.take([put(&second), endpoints(&second, &[a.address()])]).await;

    for key in [tcp_key(21), a, b] {
        assert!(is_refused(key).await, "{key}");
    }
    bench.take([delete(&first)]).await;
    let other = tokio::net::TcpListener::bind(a.address()).await.expect("nobody listens there now");
    let client = tokio::spawn(async move { TcpStream::connect(b.address()).await.map(drop) });
    soon(other.accept()).await.expect("a connection by way of the second Service");
    soon(client).await.expect("no panic").expect("a listener");
}

#[tokio::test]
async fn given_a_udp_backend_that_is_our_own_listener_when_a_datagram_comes_then_its_sender_is_told() {
    let (mut bench, dns) = (Bench::new(), dns("default/dns", 24));
    bench.take([put(&dns), endpoints(&dns, &[udp_key(24).address()])]).await;
    let client = udp_client(udp_key(24)).await;

    let outcome = ask_udp(&client).await;

    assert_eq!(outcome.expect_err("port unreachable").kind(), io::ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn given_a_table_that_leads_to_our_own_listener_when_clients_come_then_no_connection_makes_another() {
    let mut bench = Bench::new();
    let services @ [own, first, second] = &[web("default/web", 25), web("default/a", 26), web("default/b", 27)];
    let nobody = SocketAddr::from(([127, 84, 2, 25], 80));
    bench.take(services.iter().flat_map(|service| [put(service), endpoints(service, &[nobody])])).await;

    // To itself, and round over two Services.
    for (service, leads_to) in [(own, 25), (first, 27), (second, 26)] {
        bench.lead(service, tcp_key(leads_to).address()).await;
    }

    for key in [25, 26, 27].map(tcp_key) {
        expect_turned_away(key.address()).await;
        let stats = &bench.listeners.listeners[&key].target.load_full().port.stats;
        assert_eq!(stats.accepted.get(), 1, "{key}");
    }
    bench.take([delete(first)]).await;
    assert!(!bench.backend(second, tcp_key(26).address()).is_own(), "nobody listens there now");
}

#[tokio::test]
async fn given_a_table_that_leads_to_our_own_udp_listener_when_a_datagram_comes_then_it_does_not_go_round() {
    let (mut bench, dns) = (Bench::new(), dns("default/dns", 28));
    bench.take([put(&dns), endpoints(&dns, &[SocketAddr::from(([127, 84, 2, 28], 80))])]).await;
    bench.lead(&dns, udp_key(28).address()).await;
    let client = udp_client(udp_key(28)).await;
    let port = Arc::clone(&bench.listeners.listeners[&udp_key(28)].target.load_full().port);

    client.send(b"?").await.expect("sent");

    until(|| port.stats.dropped.get(DropReason::NoEndpoints) == 1).await;
    assert_eq!(port.stats.accepted.get(), 0);
}

#[tokio::test]
async fn given_listeners_of_each_kind_when_closed_then_all_is_free_and_nothing_opens_any_more() {
    let mut bench = Bench::new();
    let services = [web("default/a", 14), dns("default/b", 15), web("default/c", 16), dns("default/d", 17)];
    let stranger = std::net::TcpListener::bind(tcp_key(18).address()).expect("a free address");
    bench.take(services.iter().chain([&web("default/e", 18)]).map(put)).await;
    bench.take([endpoints(&services[0], &[named("a").await]), endpoints(&services[1], &[named_udp("b").await])]).await;

    bench.listeners.close().await;
    drop(stranger);
    bench.take([put(&web("default/f", 19)), endpoints(&services[2], &[named("c").await])]).await;

    assert_eq!((bench.listeners.bound_count(), bench.listeners.next_retry()), (0, None));
    for number in [14, 16, 18, 19] {
        socket::listen_tcp(tcp_key(number)).expect("free");
    }
    for number in [15, 17] {
        udp::bind_udp(udp_key(number).address()).expect("free");
    }
}

#[tokio::test]
async fn given_hundreds_of_listeners_when_opened_at_once_then_each_serves_its_own_but_those_whose_address_is_held() {
    let (mut bench, one) = (Bench::new(), named("one").await);
    let address = |number: u8| IpAddr::from([127, 84, 3, number]);
    let key = |number, protocol| ListenKey::new(address(number), 7400, protocol);
    let service = |number: u8| {
        let service = Service::new(&format!("default/s{number}")).cluster_ip(address(number));
        service.port("http", 7400).udp_port("dns", 7400)
    };
    let held = [key(5, Protocol::Tcp), key(99, Protocol::Udp)];
    let _tcp = std::net::TcpListener::bind(held[0].address()).expect("a free address");
    let _udp = std::net::UdpSocket::bind(held[1].address()).expect("a free address");
    bench.listeners.binders = 3;

    let services: Vec<_> = (1..=100).map(service).collect();
    bench.take(services.iter().flat_map(|service| [put(service), endpoints(service, &[one])])).await;

    assert_eq!(bench.listeners.bound_count(), 198);
    assert_eq!(bench.listeners.take_failure_news(), BTreeSet::from(held));
    for (number, service) in (1..=100).zip(&services) {
        for key in [Protocol::Tcp, Protocol::Udp].map(|protocol| key(number, protocol)) {
            let owner = bench.listeners.owner(&key).map(|owner| &owner.service);
            assert_eq!(owner, (!held.contains(&key)).then_some(&service.name), "{key}");
        }
    }
    for number in [1, 6, 50, 100] {
        assert_eq!(ask(key(number, Protocol::Tcp)).await, "one");
    }
}

#[tokio::test]
async fn t061_t158_given_services_that_come_and_go_when_the_last_is_gone_then_nothing_is_left() {
    let mut bench = Bench::new();

    for round in 0..1_000 {
        let name = format!("default/s{}", round % 7);
        let affinity_timeout = (round % 50 == 0).then_some(Duration::from_secs(9));
        let service = Service { affinity_timeout, ..web(&name, 20).udp_port("dns", 7400) };
        let slice = endpoints(&service, &[SocketAddr::from(([127, 84, 2, round as u8], 80))]);
        let Event::ApplySlice(gone) = &slice else { panic!("a slice") };
        let gone = Event::DeleteSlice(gone.name.clone());
        bench.take([put(&service), slice]).await;
        while bench.listeners.bound_count() < 2 {
            // A child that another test is starting has copies of the sockets of the round before.
            let due = bench.listeners.next_retry().expect("it is tried again");
            bench.listeners.retry(due).await;
        }
        bench.take([gone]).await;
        bench.take([delete(&service)]).await;
    }

    let Listeners { listeners, failures, ports, .. } = &bench.listeners;
    assert_eq!((listeners.len(), ports.len()), (0, 0));
    assert!(failures.next_due().is_none());
    assert!(bench.plan.service(&ObjectName::parse("default/s1")).is_none());
}

#[tokio::test]
async fn f21_given_a_listener_that_others_have_copies_of_when_its_service_goes_then_nobody_is_let_in() {
    let backend = named("one").await;
    let (mut bench, service) = (Bench::new(), web("default/web", 60));
    bench.take([put(&service), endpoints(&service, &[backend])]).await;
    let copies = bench.listeners.lend().await.expect("descriptors are left");

    bench.take([delete(&service)]).await;
    assert!(is_refused(tcp_key(60)).await);
    bench.take([put(&service), endpoints(&service, &[backend])]).await;

    assert_eq!(ask(tcp_key(60)).await, "one");
    assert_eq!((copies.len(), bench.listeners.bound_count()), (1, 1));
}

#[tokio::test]
async fn f21_given_sockets_that_were_open_before_when_begun_then_each_is_served_on_or_closed_for_good() {
    let backend = named("one").await;
    let (mut bench, kept, differs) = (Bench::new(), web("default/kept", 61), dns("default/differs", 62));
    let listen = |number| Arc::new(socket::listen_tcp(tcp_key(number)).expect("a free address"));
    let group = udp::bind_udp_group(udp_key(62).address(), 2).expect("a free address");
    let group = group.into_iter().map(|socket| Arc::new(socket.into())).collect();
    let (wanted, unwanted) = (listen(61), listen(63));
    let waiting = soon(TcpStream::connect(tcp_key(61).address())).await.expect("a listener");
    let passed = |key, sockets| Passed { key, parked: false, sockets };

    bench.listeners.hold_back();
    bench.take([put(&kept), endpoints(&kept, &[backend]), put(&differs), endpoints(&differs, &[backend])]).await;
    let passed = vec![
        passed(tcp_key(61), vec![wanted]),
        passed(udp_key(62), group),
        passed(tcp_key(63), vec![Arc::clone(&unwanted)]),
    ];
    let fresh = Fresh::look().expect("descriptors are left");
    let inherited = bench.listeners.begin(passed, &fresh, bench.now).await;

    assert_eq!(inherited, Inherited { adopted: 1, differing: 1, unwanted: 1 });
    assert_eq!(bench.listeners.bound_count(), 2);
    let mut waiting = waiting;
    waiting.shutdown().await.expect("a connection");
    assert_eq!(read_all(&mut waiting).await.0, b"one", "who has waited is served");
    assert!(is_refused(tcp_key(63)).await, "though a copy is open here");
}
