//! What load balancers hear at a Service's `healthCheckNodePort`, over real sockets, while the Service changes.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};

use kube_relay::control::RelayOptions;
use kube_relay::health;
use kube_relay::name::Family;
use kube_relay::status::{ListenerState, Status};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::support::backend::Backend;
use crate::support::relay::{Relay, problems, service_of};
use crate::support::site::{BACKEND_PORT, NODE_PORT, SERVICE_PORT, Site};
use crate::support::{client, skip, within};

/// Beside the one of the Service.
const HEALTH_PORT: u16 = 31_000;

/// A Service behind a load balancer that asks at a number, and the slice of its endpoints.
#[derive(Clone)]
struct Balanced {
    name: &'static str,
    cluster_ip: IpAddr,
    health_port: u16,
    node_port: Option<u16>,
    endpoints: String,
}

impl Balanced {
    fn new(site: Site) -> Self {
        let (name, cluster_ip) = ("web", site.cluster_ip());
        Self { name, cluster_ip, health_port: HEALTH_PORT, node_port: None, endpoints: String::new() }
    }

    fn named(self, name: &'static str, health_port: u16) -> Self {
        Self { name, health_port, ..self }
    }

    /// So many ready endpoints on this node, and one elsewhere.
    fn local(mut self, count: u8) -> Self {
        self.endpoints = (1..=count).map(|host| endpoint(IpAddr::from([10, 1, 0, host]), "here", "")).collect();
        self.endpoints += &endpoint(IpAddr::from([10, 2, 0, 1]), "there", "");
        self
    }

    fn endpoint(mut self, ip: IpAddr, node: &str, conditions: &str) -> Self {
        self.endpoints += &endpoint(ip, node, conditions);
        self
    }

    fn manifest(&self) -> String {
        let Self { name, cluster_ip, health_port, endpoints, .. } = self;
        let node_port = self.node_port.map(|number| format!(", nodePort: {number}")).unwrap_or_default();
        let endpoints = if endpoints.is_empty() { " []\n".to_owned() } else { format!("\n{endpoints}") };
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  type: LoadBalancer\n\
             \x20 clusterIP: '{cluster_ip}'\n  externalTrafficPolicy: Local\n  healthCheckNodePort: {health_port}\n\
             \x20 allocateLoadBalancerNodePorts: false\n\
             \x20 ports: [{{name: tcp, port: {SERVICE_PORT}{node_port}}}]\n---\n\
             apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: {name}-1, labels: {{kubernetes.io/service-name: {name}}}}}\naddressType: IPv4\n\
             ports: [{{name: tcp, port: {BACKEND_PORT}}}]\nendpoints:{endpoints}---\n"
        )
    }
}

fn endpoint(ip: IpAddr, node: &str, conditions: &str) -> String {
    format!("- {{addresses: ['{ip}'], nodeName: {node}, conditions: {{{conditions}}}}}\n")
}

/// Serves them on this node, which is `here`, with node ports at one address.
async fn start(site: Site, services: &[&Balanced]) -> Relay {
    start_at(site, services, vec![site.node_ip()]).await
}

async fn start_at(site: Site, services: &[&Balanced], addresses: Vec<IpAddr>) -> Relay {
    let mut options = RelayOptions::default();
    options.plan.node.name = Some("here".into());
    options.plan.node_port_addresses = addresses;
    Relay::start_with(site, manifests(services), options).await
}

fn manifests(services: &[&Balanced]) -> String {
    services.iter().map(|service| service.manifest()).collect()
}

/// Changes the manifest and waits until it is in use.
async fn change(relay: &Relay, services: &[&Balanced]) {
    let before = relay.status().revision;
    relay.edit(manifests(services));
    relay.until("the change", |status| status.revision > before).await;
}

fn health_port(site: Site) -> SocketAddr {
    SocketAddr::new(site.node_ip(), HEALTH_PORT)
}

/// What is answered to this request, to the last byte before the connection ends.
async fn say(to: SocketAddr, request: &str) -> io::Result<String> {
    let mut stream = client::connect(to).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    within("an answer", stream.read_to_string(&mut answer)).await?;
    Ok(answer)
}

/// Code, weight and whether the proxy is well, as a load balancer reads them.
#[derive(Debug, PartialEq, Eq)]
struct Heard(u16, usize, bool);

async fn hear(at: SocketAddr) -> Heard {
    let answer = say(at, "GET /healthz HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").await;
    heard(&answer.expect("a health port answers"))
}

fn heard(answer: &str) -> Heard {
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a code");
    let weight = head.lines().find_map(|line| line.strip_prefix("x-load-balancing-endpoint-weight: "));
    let weight = weight.and_then(|weight| weight.parse().ok()).expect("a weight");
    let document: serde_json::Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(document["localEndpoints"], weight);
    Heard(code, weight, document["serviceProxyHealthy"] == true)
}

/// The state of the health port of `web`.
fn state(status: &Status) -> Option<ListenerState> {
    let web = status.report().services.into_iter().find(|service| service.name == "web")?;
    web.health_port?.state
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t201_given_endpoints_of_an_unknown_service_when_synced_then_there_is_no_health_port_until_it_comes() {
    let site = Site::new(201);
    let web = Balanced::new(site).local(2);
    let manifest = web.manifest();
    let (_, slice) = manifest.split_once("---\n").expect("two documents");
    let mut options = RelayOptions::default();
    options.plan.node.name = Some("here".into());

    let relay = Relay::start_with(site, slice, options).await;
    assert!(client::refused(health_port(site)).await);
    change(&relay, &[&web]).await;

    assert_eq!(hear(health_port(site)).await, Heard(200, 2, true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t202_given_a_health_port_when_endpoints_come_and_go_then_code_and_weight_follow() {
    let site = Site::new(202);
    let web = Balanced::new(site);
    let relay = start(site, &[&web]).await;
    assert_eq!(hear(health_port(site)).await, Heard(503, 0, true), "no endpoint yet");

    for count in [18, 0, 7] {
        change(&relay, &[&web.clone().local(count)]).await;
        let code = if count == 0 { 503 } else { 200 };
        assert_eq!(hear(health_port(site)).await, Heard(code, count.into(), true));
    }
    let manifest = web.manifest();
    let (service, _) = manifest.split_once("---\n").expect("two documents");
    relay.edit(service);
    let is_empty = |status: &Status| service_of(status, "web").is_some_and(|web| web.ports[0].backends.is_empty());
    relay.until("the slice to go", is_empty).await;

    assert_eq!(hear(health_port(site)).await, Heard(503, 0, true), "no slice any more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t203_given_three_health_ports_when_services_come_go_and_move_then_ports_open_and_close_exactly() {
    let site = Site::new(203);
    let at = |number| SocketAddr::new(site.node_ip(), number);
    let cluster_ip = |service: Balanced, number| Balanced { cluster_ip: site.client(number), ..service };
    let a = cluster_ip(Balanced::new(site).named("a", 31_001), 1).local(9);
    let b = cluster_ip(Balanced::new(site).named("b", 31_002), 2).local(3);
    let c = cluster_ip(Balanced::new(site).named("c", 31_003), 3).local(7);
    let relay = start(site, &[&a, &b, &c]).await;
    for (number, count) in [(31_001, 9), (31_002, 3), (31_003, 7)] {
        assert_eq!(hear(at(number)).await, Heard(200, count, true));
    }
    let mut kept = client::connect(at(31_002)).await.expect("it listens");
    assert_eq!(ask_again(&mut kept).await, Heard(200, 3, true));

    let moved = c.clone().named("c", 31_004);
    let d = cluster_ip(Balanced::new(site).named("d", 31_005), 4).local(6);
    change(&relay, &[&b, &moved, &d]).await;

    for (number, count) in [(31_002, 3), (31_004, 7), (31_005, 6)] {
        assert_eq!(hear(at(number)).await, Heard(200, count, true));
    }
    for closed in [31_001, 31_003] {
        assert!(client::refused(at(closed)).await, "{closed}");
    }
    assert_eq!(ask_again(&mut kept).await, Heard(200, 3, true), "what did not change was not touched");
    // Two numbers change hands at once, and the first one is free again.
    let (b, d) = (b.named("b", 31_005), d.named("d", 31_002));
    change(&relay, &[&a.clone().local(0), &b, &moved, &d]).await;
    for (number, code, count) in [(31_001, 503, 0), (31_002, 200, 6), (31_004, 200, 7), (31_005, 200, 3)] {
        assert_eq!(hear(at(number)).await, Heard(code, count, true), "{number}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t203_given_a_number_that_moves_between_a_health_port_and_a_node_port_when_changed_then_each_has_it_in_turn() {
    let site = Site::new(213);
    let _backend = Backend::named(site.backend(1)).await;
    let web = Balanced::new(site).endpoint(site.backend(1).ip(), "here", "ready: true");
    let web = Balanced { node_port: Some(NODE_PORT), ..web };
    let relay = start(site, &[&web]).await;
    assert_eq!(client::ask(site.node_port()).await.expect("the node port"), site.backend(1));

    let swapped = Balanced { node_port: Some(HEALTH_PORT), health_port: NODE_PORT, ..web.clone() };
    for (service, health_port, node_port) in
        [(swapped, site.node_port(), health_port(site)), (web, health_port(site), site.node_port())]
    {
        change(&relay, &[&service]).await;

        assert!(relay.status().failed.is_empty(), "neither stands in the way of the other");
        assert_eq!(hear(health_port).await, Heard(200, 1, true));
        assert_eq!(client::ask(node_port).await.expect("the node port"), site.backend(1));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t204_f23_given_a_proxy_that_is_not_well_or_about_to_end_when_asked_then_all_are_503_with_their_counts() {
    let site = Site::new(204);
    let _backend = Backend::named(site.backend(1)).await;
    let web = Balanced::new(site).endpoint(site.backend(1).ip(), "here", "ready: true");
    let other = Balanced { cluster_ip: site.client(1), ..Balanced::new(site) }.named("other", HEALTH_PORT + 1);
    let relay = start(site, &[&web, &other]).await;
    let other_port = SocketAddr::new(site.node_ip(), HEALTH_PORT + 1);

    let late = Instant::now().checked_sub(health::TIMEOUT).expect("the machine runs for longer");
    let unwell = async {
        // The relay itself says that nothing waits, at the end of its start.
        while hear(health_port(site)).await != Heard(503, 1, false) {
            relay.health().queued(&[Family::V6], late);
        }
    };
    within("the proxy to be late", unwell).await;
    assert_eq!(hear(other_port).await, Heard(503, 0, false));
    relay.health().updated(&Family::ALL, Instant::now());
    assert_eq!(hear(health_port(site)).await, Heard(200, 1, true));
    relay.health().set_node_eligible(false);
    assert_eq!(hear(health_port(site)).await, Heard(200, 1, true), "the pods of a Node that goes leave one by one");

    relay.health().leave();

    assert_eq!(hear(health_port(site)).await, Heard(503, 1, false));
    assert_eq!(client::ask(site.service()).await.expect("all is served"), site.backend(1));
    relay.stop_accepting().await;
    assert!(client::refused(health_port(site)).await);
    assert_eq!(state(&relay.status()), Some(ListenerState::Closed));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t205_given_any_path_and_method_when_asked_then_headers_and_body_are_exact() {
    let site = Site::new(205);
    let _relay = start(site, &[&Balanced::new(site).local(2)]).await;
    let body = "{\n\t\"service\": {\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"web\"\n\t},\n\
                \t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}";

    for request in ["GET /healthz", "GET /", "GET /any/path?at=all", "POST /healthz", "OPTIONS *", "HEAD /healthz"] {
        let request =
            format!("{request} HTTP/1.1\r\nHost: lb.example\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
        let answer = say(health_port(site), &request).await.expect("an answer");

        let (head, answered) = answer.split_once("\r\n\r\n").expect("a head and a body");
        let mut lines: Vec<&str> = head.lines().filter(|line| !line.starts_with("date: ")).collect();
        lines.sort_unstable();
        let length = format!("content-length: {}", body.len());
        assert_eq!(
            lines,
            [
                "HTTP/1.1 200 OK",
                "connection: close",
                length.as_str(),
                "content-type: application/json",
                "x-content-type-options: nosniff",
                "x-load-balancing-endpoint-weight: 2",
            ],
            "{request}"
        );
        assert_eq!(answered, if request.starts_with("HEAD") { "" } else { body }, "{request}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t206_given_the_addresses_of_node_ports_when_asked_then_it_is_answered_there_alone_in_both_families() {
    let site = Site::new(206);
    if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_err() {
        skip("ipv6", "this machine has no IPv6 loopback");
        return;
    }
    // ::1 is one address for all tests and checkouts: this one alone uses the number.
    let IpAddr::V4(ip) = site.node_ip() else { panic!("not in 127/8") };
    let number = 31_200 + u16::from(ip.octets()[1]);
    let addresses = vec![site.node_ip(), Ipv6Addr::LOCALHOST.into()];
    let web = Balanced { health_port: number, ..Balanced::new(site).local(1) };

    let relay = start_at(site, &[&web], addresses.clone()).await;

    for ip in addresses {
        assert_eq!(hear(SocketAddr::new(ip, number)).await, Heard(200, 1, true), "{ip}");
    }
    for ip in [site.client(1), site.cluster_ip()] {
        assert!(client::refused(SocketAddr::new(ip, number)).await, "{ip}");
    }
    let report = service_of(&relay.status(), "web").expect("the Service is known").report();
    let told = report.health_port.expect("a health port").addresses;
    assert_eq!(told, [format!("{}:{number}", site.node_ip()), format!("[::1]:{number}")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t206_given_no_address_of_node_ports_when_planned_then_the_health_port_is_a_problem_and_the_service_is_served()
{
    let site = Site::new(216);
    let _backend = Backend::named(site.backend(1)).await;
    let web = Balanced::new(site).endpoint(site.backend(1).ip(), "here", "ready: true");
    let relay = start_at(site, &[&web], vec![site.client(1)]).await;
    assert_eq!(hear(SocketAddr::new(site.client(1), HEALTH_PORT)).await, Heard(200, 1, true));

    relay.set_node_port_addresses(vec![]).await;
    relay.until("the problem", |status| problems(status).contains("health port 31000 is not answered")).await;

    assert!(client::refused(SocketAddr::new(site.client(1), HEALTH_PORT)).await);
    assert_eq!(client::ask(site.service()).await.expect("the Service is served"), site.backend(1));
    relay.set_node_port_addresses(vec![site.client(1), site.client(2)]).await;
    relay.until("it to be answered", |status| state(status) == Some(ListenerState::Serving)).await;
    for number in [1, 2] {
        assert_eq!(hear(SocketAddr::new(site.client(number), HEALTH_PORT)).await, Heard(200, 1, true));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t207_given_a_port_that_is_taken_at_one_address_when_opened_then_none_is_open_until_it_is_free() {
    let site = Site::new(207);
    let [free, taken] = [1, 2].map(|number| SocketAddr::new(site.client(number), HEALTH_PORT));
    let stranger = TcpListener::bind(taken).expect("the test's own address is free");
    let web = Balanced::new(site).local(1);
    let other = Balanced { cluster_ip: site.client(3), ..Balanced::new(site) }.named("other", HEALTH_PORT + 1).local(4);

    let relay = start_at(site, &[&web, &other], vec![free.ip(), taken.ip()]).await;

    assert!(client::refused(free).await, "not at half of the addresses");
    assert_eq!(hear(SocketAddr::new(free.ip(), HEALTH_PORT + 1)).await, Heard(200, 4, true), "nobody else is affected");
    let Some(ListenerState::Failed { reason, message }) = state(&relay.status()) else { panic!("it has failed") };
    assert_eq!(reason, "in_use");
    let said = format!("default/web: cannot answer health checks at {taken}/TCP: ");
    assert!(message.starts_with(&said) && message.contains("ss -lnp 'sport = :31000'"), "{message}");
    change(&relay, &[&web.clone().local(3), &other]).await;
    drop(stranger);

    relay.until("it to be answered", |status| state(status) == Some(ListenerState::Serving)).await;
    for address in [free, taken] {
        assert_eq!(hear(address).await, Heard(200, 3, true), "what is so by now");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t207_given_an_open_port_when_an_address_joins_that_is_taken_then_the_others_are_released() {
    let site = Site::new(217);
    let [old, taken] = [1, 2].map(|number| SocketAddr::new(site.client(number), HEALTH_PORT));
    let relay = start_at(site, &[&Balanced::new(site).local(1)], vec![old.ip()]).await;
    assert_eq!(hear(old).await, Heard(200, 1, true));
    let stranger = TcpListener::bind(taken).expect("the test's own address is free");

    relay.set_node_port_addresses(vec![old.ip(), taken.ip()]).await;
    relay.until("it to fail", |status| matches!(state(status), Some(ListenerState::Failed { .. }))).await;
    assert!(client::refused(old).await);
    drop(stranger);
    relay.until("it to be answered", |status| state(status) == Some(ListenerState::Serving)).await;

    for address in [old, taken] {
        assert_eq!(hear(address).await, Heard(200, 1, true));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t214_given_only_endpoints_that_end_when_asked_then_it_is_503_while_the_node_port_is_served() {
    let site = Site::new(214);
    let _backend = Backend::named(site.backend(1)).await;
    let ready = Balanced { node_port: Some(NODE_PORT), ..Balanced::new(site) };
    let ending = ready.clone().endpoint(site.backend(1).ip(), "here", "ready: false, serving: true, terminating: true");
    let ready = ready.endpoint(site.backend(1).ip(), "here", "ready: true");
    let relay = start(site, &[&ready]).await;
    assert_eq!(hear(health_port(site)).await, Heard(200, 1, true));

    change(&relay, &[&ending]).await;

    assert_eq!(hear(health_port(site)).await, Heard(503, 0, true));
    assert_eq!(client::ask(site.node_port()).await.expect("it still serves"), site.backend(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_balancer_that_keeps_its_connection_when_the_service_goes_then_it_hears_so() {
    let site = Site::new(218);
    let [web, other] = [Balanced::new(site).local(1), Balanced::new(site).named("other", HEALTH_PORT + 1)];
    let other = Balanced { cluster_ip: site.client(1), ..other };
    let relay = start(site, &[&web, &other]).await;
    let mut stream = client::connect(health_port(site)).await.expect("it listens");
    assert_eq!(ask_again(&mut stream).await, Heard(200, 1, true));

    change(&relay, &[&other]).await;
    assert!(client::refused(health_port(site)).await);
    change(&relay, &[&web, &other]).await;

    assert_eq!(ask_again(&mut stream).await, Heard(503, 0, true), "that port is no more");
    let end = within("the connection to end", stream.read(&mut [0; 1])).await;
    assert_eq!(end.expect("an orderly end"), 0, "so that the balancer asks at the new one");
    assert_eq!(hear(health_port(site)).await, Heard(200, 1, true));
}

/// Asks on a connection that stays open.
async fn ask_again(stream: &mut TcpStream) -> Heard {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: node\r\n\r\n").await.expect("it is open");
    let mut answer = Vec::new();
    while !answer.ends_with(b"\n}") {
        let read = within("an answer", stream.read_buf(&mut answer)).await.expect("it is open");
        assert!(read > 0, "closed after {:?}", String::from_utf8_lossy(&answer));
    }
    heard(&String::from_utf8(answer).expect("text"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_hundreds_of_connections_that_say_nothing_when_a_balancer_asks_at_another_port_then_it_is_answered() {
    let site = Site::new(219);
    let other = Balanced { cluster_ip: site.client(1), ..Balanced::new(site) }.named("other", HEALTH_PORT + 1).local(2);
    let _relay = start(site, &[&Balanced::new(site), &other]).await;
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(client::connect(health_port(site)).await.expect("it listens"));
    }

    let heard = hear(SocketAddr::new(site.node_ip(), HEALTH_PORT + 1)).await;

    assert_eq!(heard, Heard(200, 2, true));
    let newest = silent.pop().expect("the last of them");
    let oldest = within("the oldest to make room", silent[0].read(&mut [0; 1])).await;
    assert!(oldest.is_ok_and(|count| count == 0), "closed");
    let error = newest.try_read(&mut [0; 1]).expect_err("not closed for its silence yet");
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
}
