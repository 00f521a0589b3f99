//! Who is served, refused or left without an answer, at the sockets of one process: what any user can try.
//!
//! The same under real packets, with silence by the kernel for sure, is in the rig (`tests/rig/verdicts.rs`). Without
//! CAP_NET_ADMIN a kernel may take no filter of TCP sockets: then a reset stands for silence, and it is counted.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use kube_relay::control::RelayOptions;
use kube_relay::plan::AllowFrom;
use kube_relay::stats::{CloseReason, DropReason, PROCESS};
use tokio::net::{TcpSocket, TcpStream};

use crate::support::backend::{Backend, Talker};
use crate::support::client::{self, Caller};
use crate::support::relay::{Relay, problems, service_of};
use crate::support::site::{BACKEND_PORT, NODE_PORT, SERVICE_PORT, Site};

/// On a machine that does nothing else, an answer takes a thousandth of it.
const SILENCE: Duration = Duration::from_millis(300);

/// What came of a connect from a chosen source.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Answer(SocketAddr),
    Refused,
    /// No answer, or the reset that stands for it.
    Nobody,
}

async fn connect_from(source: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(source, 0))?;
    tokio::time::timeout(SILENCE, socket.connect(to)).await?
}

async fn ask_from(source: IpAddr, to: SocketAddr) -> Outcome {
    let outcome = async { client::ask_on(&mut connect_from(source, to).await?).await };
    match outcome.await {
        Ok(backend) => Outcome::Answer(backend),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Outcome::Refused,
        Err(error) => {
            let is_silence = matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::ConnectionReset);
            assert!(is_silence, "from {source} to {to}: {error}");
            Outcome::Nobody
        }
    }
}

/// The backend that answers a datagram; `None` where nobody does for a while.
async fn ask_udp_from(source: IpAddr, to: SocketAddr) -> Option<SocketAddr> {
    let caller = Caller::from_address(source, to).await;
    tokio::time::timeout(SILENCE, caller.ask()).await.ok().map(|answer| answer.backend)
}

/// A Service at the site's cluster IP, node port and a load-balancer IP, with more fields, and ready endpoints by node.
fn balanced(site: Site, fields: &str, endpoints: &[(SocketAddr, &str)]) -> String {
    let endpoints = endpoints.iter().map(|(address, node)| {
        format!("- {{addresses: ['{}'], nodeName: {node}, conditions: {{ready: true}}}}\n", address.ip())
    });
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web}}\nspec:\n  type: LoadBalancer\n  clusterIP: {cluster_ip}\n\
         {fields}  ports:\n\
         \x20 - {{name: tcp, port: {SERVICE_PORT}, nodePort: {NODE_PORT}}}\n\
         \x20 - {{name: udp, protocol: UDP, port: {SERVICE_PORT}, nodePort: {NODE_PORT}}}\n\
         status: {{loadBalancer: {{ingress: [{{ip: {balancer}}}]}}}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: web-1, labels: {{kubernetes.io/service-name: web}}}}\naddressType: IPv4\n\
         ports: [{{name: tcp, port: {BACKEND_PORT}}}, {{name: udp, protocol: UDP, port: {BACKEND_PORT}}}]\n\
         endpoints:\n{endpoints}",
        cluster_ip = site.cluster_ip(),
        balancer = load_balancer(site).ip(),
        endpoints = endpoints.collect::<String>(),
    )
}

fn load_balancer(site: Site) -> SocketAddr {
    SocketAddr::new(site.client(50), SERVICE_PORT)
}

/// This node is `here`; the site's first client is one of its pods, all others come from elsewhere.
fn options(site: Site) -> RelayOptions {
    let mut options = RelayOptions { inside: vec![site.client(1).into()], ..RelayOptions::default() };
    options.plan.node.name = Some("here".into());
    options
}

/// Changes the manifest and waits until it is in use.
async fn change(relay: &Relay, manifest: &str) {
    let before = relay.status().revision;
    relay.edit(manifest);
    relay.until("the change", |status| status.revision > before).await;
}

fn dropped(relay: &Relay, reason: DropReason) -> u64 {
    let status = relay.status();
    let service = service_of(&status, "web").expect("the Service is known");
    service.ports.iter().filter_map(|port| port.state.as_ref()).map(|state| state.stats.dropped.get(reason)).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t113_t114_given_external_policy_local_when_asked_then_pods_and_others_get_what_is_theirs() {
    let site = Site::new(114);
    let (near, far) = (site.backend(1), site.backend(2));
    let _tcp = [Backend::named(near).await, Backend::named(far).await];
    let _udp = [Talker::named(near).await, Talker::named(far).await];
    let (pod, other) = (site.client(1), site.client(2));
    let policy = "  externalTrafficPolicy: Local\n";
    let both = balanced(site, policy, &[(near, "here"), (far, "there")]);
    let relay = Relay::start_with(site, both, options(site)).await;

    for entry in [site.node_port(), load_balancer(site)] {
        for _ in 0..3 {
            assert_eq!(ask_from(other, entry).await, Outcome::Answer(near));
            assert_eq!(ask_udp_from(other, entry).await, Some(near));
        }
    }
    change(&relay, &balanced(site, policy, &[(far, "there")])).await;
    for entry in [site.node_port(), load_balancer(site)] {
        assert_eq!(ask_from(other, entry).await, Outcome::Nobody);
        assert_eq!(ask_udp_from(other, entry).await, None);
        assert_eq!(ask_from(pod, entry).await, Outcome::Answer(far));
        assert_eq!(ask_udp_from(pod, entry).await, Some(far));
    }
    assert_eq!(ask_from(other, site.service()).await, Outcome::Answer(far), "the cluster IP has no sides");
    // What the kernel has dropped of datagrams is told with the next one that it did not.
    assert!(dropped(&relay, DropReason::NoLocalEndpoints) >= 2);

    change(&relay, &balanced(site, policy, &[])).await;
    for source in [pod, other] {
        assert_eq!(ask_from(source, site.node_port()).await, Outcome::Refused);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t107_t108_t109_t111_given_source_ranges_when_they_change_then_new_clients_are_judged_and_old_ones_stay() {
    let site = Site::new(107);
    let backend = site.backend(1);
    let (_tcp, _udp) = (Backend::named(backend).await, Talker::named(backend).await);
    let [first, second] = [site.client(1), site.client(2)];
    let ranges =
        |source: IpAddr| balanced(site, &format!("  loadBalancerSourceRanges: [{source}/32]\n"), &[(backend, "here")]);
    let relay = Relay::start_with(site, ranges(first), options(site)).await;
    let entry = load_balancer(site);
    let mut before = connect_from(first, entry).await.expect("in the range");
    assert_eq!(client::ask_on(&mut before).await.expect("an answer"), backend);
    let flow = Caller::from_address(first, entry).await;
    flow.ask().await;

    assert_eq!(ask_from(second, entry).await, Outcome::Nobody);
    assert_eq!(ask_udp_from(second, entry).await, None);
    for open in [site.service(), site.node_port()] {
        assert_eq!(ask_from(second, open).await, Outcome::Answer(backend), "ranges are not for {open}");
        assert_eq!(ask_udp_from(second, open).await, Some(backend), "ranges are not for {open}");
    }
    flow.ask().await; // It brings the number of those that were dropped before it.
    relay.until("a denied source is counted", |_| dropped(&relay, DropReason::DeniedAddress) >= 1).await;

    change(&relay, &ranges(second)).await;
    assert_eq!(ask_from(first, entry).await, Outcome::Nobody);
    assert_eq!(ask_from(second, entry).await, Outcome::Answer(backend));
    assert_eq!(ask_udp_from(second, entry).await, Some(backend));
    assert_eq!(client::ask_on(&mut before).await.expect("it goes on"), backend);
    // Datagrams have no connection to go on with.
    let stats = &relay.backend("web", backend).stats;
    assert_eq!(ask_udp_from(first, entry).await, None);
    relay.until("its flow to end", |_| udp_ends(&relay, backend, CloseReason::EndpointRemoved) == 1).await;
    assert_eq!(stats.closed.get(CloseReason::Reset), 0);
}

/// The Service of [`balanced`], with an allow-list.
fn allowing(site: Site, list: impl std::fmt::Display, fields: &str, backend: SocketAddr) -> String {
    let annotation = format!("annotations: {{kube-relay.dev/allow-from: '{list}'}}");
    let manifest = balanced(site, fields, &[(backend, "here")]);
    manifest.replacen("metadata: {name: web}", &format!("metadata: {{name: web, {annotation}}}"), 1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t104_t111_given_an_allow_list_when_clients_come_then_it_holds_at_all_addresses_and_pods_are_not_asked() {
    let site = Site::new(104);
    let backend = site.backend(1);
    let (_tcp, _udp) = (Backend::named(backend).await, Talker::named(backend).await);
    let [pod, first, second] = [site.client(1), site.client(2), site.client(3)];
    let relay = Relay::start_with(site, allowing(site, first, "", backend), options(site)).await;
    let entries = [site.service(), site.node_port(), load_balancer(site)];
    let mut before = connect_from(first, site.service()).await.expect("in the list");
    assert_eq!(client::ask_on(&mut before).await.expect("an answer"), backend);
    let flow = Caller::from_address(first, site.service()).await;
    flow.ask().await;

    for entry in entries {
        for allowed in [pod, first, entry.ip()] {
            assert_eq!(ask_from(allowed, entry).await, Outcome::Answer(backend), "{allowed} at {entry}");
            assert_eq!(ask_udp_from(allowed, entry).await, Some(backend), "{allowed} at {entry}");
        }
        assert_eq!(ask_from(second, entry).await, Outcome::Nobody, "{entry}");
        assert_eq!(ask_udp_from(second, entry).await, None, "{entry}");
    }
    flow.ask().await; // It brings the number of those that were dropped before it.
    relay.until("a denied source is counted", |_| dropped(&relay, DropReason::DeniedAddress) >= 1).await;

    change(&relay, &allowing(site, second, "", backend)).await;
    for entry in entries {
        assert_eq!(ask_from(first, entry).await, Outcome::Nobody, "{entry}");
        assert_eq!(ask_from(second, entry).await, Outcome::Answer(backend), "{entry}");
        assert_eq!(ask_udp_from(second, entry).await, Some(backend), "{entry}");
    }
    assert_eq!(client::ask_on(&mut before).await.expect("it goes on"), backend);
    assert_eq!(ask_udp_from(first, site.service()).await, None);
    relay.until("its flows to end", |_| udp_ends(&relay, backend, CloseReason::EndpointRemoved) >= 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t107_given_an_allow_list_beside_source_ranges_when_clients_come_to_the_balancer_then_both_must_allow() {
    let site = Site::new(108);
    let backend = site.backend(1);
    let _tcp = Backend::named(backend).await;
    let [in_both, in_list, in_ranges] = [site.client(2), site.client(3), site.client(4)];
    let ranges = format!("  loadBalancerSourceRanges: [{in_both}/32, {in_ranges}/32]\n");
    let list = format!("{in_both}, {in_list}");

    let _relay = Relay::start_with(site, allowing(site, list, &ranges, backend), options(site)).await;

    assert_eq!(ask_from(in_both, load_balancer(site)).await, Outcome::Answer(backend));
    for other in [in_list, in_ranges, site.client(1)] {
        assert_eq!(ask_from(other, load_balancer(site)).await, Outcome::Nobody, "{other}");
    }
    assert_eq!(ask_from(in_list, site.service()).await, Outcome::Answer(backend));
    assert_eq!(ask_from(in_ranges, site.service()).await, Outcome::Nobody);
    assert_eq!(ask_from(site.client(1), site.service()).await, Outcome::Answer(backend), "a pod");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_list_of_the_process_when_the_pods_networks_change_then_who_is_inside_follows() {
    let site = Site::new(109);
    let backend = site.backend(1);
    let _tcp = Backend::named(backend).await;
    let [pod, client, wrong] = [site.client(1), site.client(2), site.client(3)];
    let mut options = options(site);
    options.plan.allow_from = Some(AllowFrom::new(&[client.into()]));
    let relay = Relay::start_with(site, allowing(site, "nonsense", "", backend), options).await;
    assert_eq!(ask_from(client, site.service()).await, Outcome::Nobody, "its own list is of nobody");
    assert!(problems(&relay.status()).contains("\"nonsense\" is not used"));
    change(&relay, &balanced(site, "", &[(backend, "here")])).await;
    for allowed in [pod, client] {
        assert_eq!(ask_from(allowed, site.service()).await, Outcome::Answer(backend), "{allowed}");
    }
    assert_eq!(ask_from(wrong, site.service()).await, Outcome::Nobody);

    relay.set_inside(vec![wrong.into()]).await;

    assert_eq!(ask_from(pod, site.service()).await, Outcome::Nobody);
    assert_eq!(ask_from(wrong, site.service()).await, Outcome::Answer(backend), "one of the pods now");
}

/// Ends of flows at a backend: TCP and UDP ports have one each at this address.
fn udp_ends(relay: &Relay, address: SocketAddr, reason: CloseReason) -> u64 {
    let status = relay.status();
    let service = service_of(&status, "web").expect("the Service is known");
    let backends = service.ports.iter().flat_map(|port| port.backends.iter());
    backends.filter(|backend| backend.address() == address).map(|backend| backend.stats.closed.get(reason)).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t111_given_more_ranges_than_a_filter_holds_when_asked_then_the_process_judges_and_counts_that() {
    let site = Site::new(111);
    let backend = site.backend(1);
    let _tcp = Backend::named(backend).await;
    let far = (0..1_100_u32).map(|number| format!("{}/32", std::net::Ipv4Addr::from(number * 3_900_001)));
    let many: Vec<String> = far.chain([format!("{}/32", site.client(1))]).collect();
    let fields = format!("  loadBalancerSourceRanges: [{}]\n", many.join(", "));
    let before = PROCESS.filter_fallbacks.get();

    let relay = Relay::start_with(site, balanced(site, &fields, &[(backend, "here")]), options(site)).await;

    assert_eq!(ask_from(site.client(1), load_balancer(site)).await, Outcome::Answer(backend));
    // It is judged after accept: whether that is before or after its question is a matter of luck.
    let denied = async { client::ask_on(&mut connect_from(site.client(2), load_balancer(site)).await?).await };
    assert_eq!(denied.await.expect_err("not in a range").kind(), io::ErrorKind::ConnectionReset);
    assert!(PROCESS.filter_fallbacks.get() >= before + 2, "over TCP and UDP");
    drop(relay);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t094_t112_given_open_connections_when_their_listener_is_parked_made_silent_and_revived_then_they_go_on() {
    let site = Site::new(96);
    let backend = site.backend(1);
    let _tcp = Backend::named(backend).await;
    let policy = "  internalTrafficPolicy: Local\n";
    let [served, silent, refused] = [&[(backend, "here")][..], &[(backend, "there")][..], &[]]
        .map(|endpoints: &[(SocketAddr, &str)]| balanced(site, policy, endpoints));
    let relay = Relay::start_with(site, &served, options(site)).await;
    let mut open = Vec::new();

    for _ in 0..2 {
        for state in [&silent, &served, &refused, &silent, &refused, &served] {
            change(&relay, state).await;
            let outcome = ask_from(site.client(2), site.service()).await;
            let expected = match () {
                () if state == &served => Outcome::Answer(backend),
                () if state == &silent => Outcome::Nobody,
                () => Outcome::Refused,
            };
            assert_eq!(outcome, expected);
            if state == &served {
                open.push(connect_from(site.client(2), site.service()).await.expect("served"));
            }
            for stream in &mut open {
                assert_eq!(client::ask_on(stream).await.expect("it goes on"), backend);
            }
        }
    }
    assert_eq!(open.len(), 4);
}
