//! Who a client is: what backends are told of it, and what balancers in front tell us.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::time::Duration;

use kube_relay::access_log::{AccessFormat, AccessLog, AccessLogOptions};
use kube_relay::control::RelayOptions;
use kube_relay::serve::tcp::TcpOptions;
use kube_relay::stats::{CloseReason, ConnectFailure, DropReason, PROCESS, PauseReason};
use serde_json::Value;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::support::backend::{Backend, Script, refusing};
use crate::support::manifest::Manifest;
use crate::support::relay::{Relay, problems, service_of};
use crate::support::site::{SERVICE_PORT, Site};
use crate::support::within;

/// On a machine that does nothing else, an answer takes a thousandth of it.
const SILENCE: Duration = Duration::from_millis(300);

async fn connect_from(source: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(source, 0))?;
    within("a connection", socket.connect(to)).await
}

/// Says all, and what comes back until the end; with the port that it came from.
async fn say_from(source: IpAddr, to: SocketAddr, bytes: &[u8]) -> io::Result<(u16, Vec<u8>)> {
    let mut stream = connect_from(source, to).await?;
    let port = stream.local_addr()?.port();
    stream.write_all(bytes).await?;
    stream.shutdown().await?;
    let mut answer = Vec::new();
    within("an end", stream.read_to_end(&mut answer)).await?;
    Ok((port, answer))
}

/// Says something and expects a reset, be it while it still says it.
async fn expect_reset(source: IpAddr, to: SocketAddr, bytes: &[u8]) {
    let error = say_from(source, to, bytes).await.expect_err("a reset");
    let is_reset = matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::NotConnected
    );
    assert!(is_reset, "from {source}: {error}");
}

fn dropped(relay: &Relay, reason: DropReason) -> u64 {
    let status = relay.status();
    let service = service_of(&status, "web").expect("the Service is known");
    service.ports.iter().filter_map(|port| port.state.as_ref()).map(|state| state.stats.dropped.get(reason)).sum()
}

/// The site's first client is a balancer in front.
fn behind_a_balancer(site: Site) -> RelayOptions {
    let mut options = RelayOptions::default();
    options.plan.accept_proxy_from = vec![site.client(1).into()];
    options
}

fn echoing(site: Site) -> Manifest {
    Manifest::new(site).tcp().endpoints([site.backend(1)])
}

/// The header of version 2 for a connection over IPv4.
fn binary(client: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let octets = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => ip.octets(),
        IpAddr::V6(_) => panic!("not of a site"),
    };
    let ports = [client.port().to_be_bytes(), destination.port().to_be_bytes()];
    [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c"[..], &octets(client), &octets(destination), ports.as_flattened()].concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t126_given_a_service_with_a_header_when_a_client_speaks_then_its_backend_hears_first_who_it_is() {
    let site = Site::new(126);
    let _backend = Backend::start(site.backend(1), Script::Echo).await;
    let (client, service) = (site.client(2), site.service());
    let relay = Relay::start(site, echoing(site).annotation("proxy-protocol", "v1")).await;

    let (port, answer) = say_from(client, service, b"hello").await.expect("an answer");

    let line = format!("PROXY TCP4 {client} {} {port} {}\r\nhello", service.ip(), service.port());
    assert_eq!(String::from_utf8(answer).expect("text"), line);
    let backend = relay.backend("web", site.backend(1));
    relay.until("its end", |_| backend.stats.closed.get(CloseReason::Finished) == 1).await;
    assert_eq!(backend.stats.upstream_bytes.get(), 5, "the header is no payload");

    let before = relay.status().revision;
    relay.edit(echoing(site).annotation("proxy-protocol", "v2"));
    relay.until("the change", |status| status.revision > before).await;
    let (port, answer) = say_from(client, service, b"hello").await.expect("an answer");

    let header = binary(SocketAddr::new(client, port), service);
    assert_eq!(answer, [&header[..], b"hello"].concat());
}

/// The gap of policy Local in a proxy without transparency: the source is this node's, and the header tells the client's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t113_t126_given_external_policy_local_when_a_client_comes_to_a_node_port_then_the_header_tells_who_and_where()
{
    let site = Site::new(113);
    let _backend = Backend::start(site.backend(1), Script::Echo).await;
    let (client, entry) = (site.client(2), site.node_port());
    let mut options = RelayOptions::default();
    options.plan.node.name = Some("here".into());
    let manifest = echoing(site).node_port().local_to("here").annotation("proxy-protocol", "v1");
    let _relay = Relay::start_with(site, manifest, options).await;

    let (port, answer) = say_from(client, entry, b"hello").await.expect("an answer");

    let line = format!("PROXY TCP4 {client} {} {port} {}\r\nhello", entry.ip(), entry.port());
    assert_eq!(String::from_utf8(answer).expect("text"), line);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_backend_that_speaks_first_when_it_wants_a_header_then_it_need_not_wait_for_the_client() {
    let site = Site::new(41);
    let _backend = Backend::start(site.backend(1), Script::Echo).await;
    let _relay = Relay::start(site, echoing(site).annotation("proxy-protocol", "v2")).await;
    let mut silent = connect_from(site.client(2), site.service()).await.expect("a listener");

    let mut header = [0; 28];
    within("the header alone", silent.read_exact(&mut header)).await.expect("an echo");

    assert_eq!(header[..], binary(silent.local_addr().expect("a connection"), site.service()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_backend_that_refuses_when_another_is_reached_then_that_one_gets_the_header_too() {
    let site = Site::new(42);
    let _refusing = refusing(site.backend(1));
    let _backend = Backend::start(site.backend(2), Script::Echo).await;
    let manifest = echoing(site).endpoints([site.backend(2)]).annotation("proxy-protocol", "v2");
    let relay = Relay::start(site, manifest).await;

    for _ in 0..2 {
        let (port, answer) = say_from(site.client(2), site.service(), b"hello").await.expect("an answer");

        let header = binary(SocketAddr::new(site.client(2), port), site.service());
        assert_eq!(answer, [&header[..], b"hello"].concat());
    }
    let refused = relay.backend("web", site.backend(1)).stats.connect_failures.get(ConnectFailure::Refused);
    assert_ne!(refused, 0, "one at least began there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_balancer_in_front_when_its_header_names_a_client_then_lists_judge_that_client_and_backends_hear_of_it()
{
    let site = Site::new(43);
    let _backend = Backend::start(site.backend(1), Script::Echo).await;
    let manifest = echoing(site)
        .annotation("accept-proxy", "true")
        .annotation("allow-from", "203.0.113.0/24, 2001:db8::/32")
        .annotation("proxy-protocol", "v1");
    let relay = Relay::start_with(site, manifest, behind_a_balancer(site)).await;
    let (balancer, service) = (site.client(1), site.service());

    for line in ["PROXY TCP4 203.0.113.7 192.0.2.80 40000 443\r\n", "PROXY TCP6 2001:db8::7 2001:db8::80 40000 443\r\n"]
    {
        let said = format!("{line}hello");
        let (_, answer) = say_from(balancer, service, said.as_bytes()).await.expect("an answer");
        assert_eq!(String::from_utf8(answer).expect("text"), said, "onwards as it came");
    }
    expect_reset(balancer, service, b"PROXY TCP4 198.51.100.7 192.0.2.80 40000 443\r\nhello").await;
    relay.until("a denied client", |_| dropped(&relay, DropReason::DeniedAddress) == 1).await;

    // Its health check is its own connection: it is the client, and in no list.
    expect_reset(balancer, service, b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00").await;
    relay.until("a denied balancer", |_| dropped(&relay, DropReason::DeniedAddress) == 2).await;
}

/// A Service with a load-balancer IP, where the ranges hold, and these annotations.
fn balanced(site: Site, annotations: &str, ranges: &str) -> String {
    let ip = load_balancer(site).ip();
    let service = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web, annotations: {{{annotations}}}}}\nspec:\n  type: LoadBalancer\n  \
         clusterIP: {}\n  loadBalancerSourceRanges: [{ranges}]\n  ports: [{{name: on-tcp, port: {SERVICE_PORT}}}]\n\
         status: {{loadBalancer: {{ingress: [{{ip: {ip}}}]}}}}\n---\n",
        site.cluster_ip()
    );
    let slice = echoing(site).to_string();
    service + slice.split_once("---\n").expect("two documents").1
}

fn load_balancer(site: Site) -> SocketAddr {
    SocketAddr::new(site.client(50), SERVICE_PORT)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t107_t126_given_source_ranges_when_a_balancer_names_clients_then_these_are_judged_and_not_the_balancer() {
    let site = Site::new(55);
    let _backend = Backend::start(site.backend(1), Script::Echo).await;
    let (balancer, in_range, entry) = (site.client(1), site.client(2), load_balancer(site));
    let ranges = format!("203.0.113.0/24, '2001:db8::/32', {in_range}/32");
    let manifest = balanced(site, "kube-relay.dev/accept-proxy: 'true'", &ranges);
    let relay = Relay::start_with(site, manifest, behind_a_balancer(site)).await;
    let outsider = b"PROXY TCP4 198.51.100.7 192.0.2.80 40000 443\r\nhello";

    for line in ["PROXY TCP4 203.0.113.7 192.0.2.80 40000 443\r\n", "PROXY TCP6 2001:db8::7 2001:db8::80 40000 443\r\n"]
    {
        let (_, answer) = say_from(balancer, entry, format!("{line}hello").as_bytes()).await.expect("an answer");
        assert_eq!(answer, b"hello", "{line}");
    }
    expect_reset(balancer, entry, outsider).await;
    expect_reset(balancer, entry, b"PROXY UNKNOWN\r\nhello").await; // The balancer itself, which is in no range.
    relay.until("two denied clients", |_| dropped(&relay, DropReason::DeniedAddress) == 2).await;
    let (_, answer) = say_from(balancer, site.service(), outsider).await.expect("ranges do not hold there");
    assert_eq!(answer, b"hello");

    // Who is in a range, but no balancer, is not asked: neither for whom it comes, nor who it is.
    expect_reset(in_range, entry, b"PROXY TCP4 203.0.113.7 192.0.2.80 40000 443\r\nhello").await;
    expect_reset(in_range, entry, b"hello").await;
    relay.until("two strangers", |_| dropped(&relay, DropReason::UnknownBalancer) == 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t107_t126_given_a_service_that_asks_nobody_when_clients_send_headers_then_lists_judge_the_sockets_address() {
    let site = Site::new(56);
    let _backend = Backend::start(site.backend(1), Script::Echo).await;
    let [balancer, allowed, denied] = [1, 2, 3].map(|number| site.client(number));
    let manifest = balanced(site, &format!("kube-relay.dev/allow-from: {allowed}"), &format!("{allowed}/32"));
    let _relay = Relay::start_with(site, manifest, behind_a_balancer(site)).await;

    // By the list at the cluster IP, by the ranges at the load balancer's.
    for entry in [site.service(), load_balancer(site)] {
        let naming = |client: IpAddr| format!("PROXY TCP4 {client} 192.0.2.80 40000 443\r\nhello").into_bytes();
        let (_, answer) = say_from(allowed, entry, &naming(denied)).await.expect("an answer");
        assert_eq!(answer, naming(denied), "payload, like all that it says");
        // Nor is the balancer believed that other Services ask.
        for stranger in [denied, balancer] {
            let outcome = tokio::time::timeout(SILENCE, say_from(stranger, entry, &naming(allowed))).await;
            assert!(!matches!(outcome, Ok(Ok(_))), "{stranger} at {entry}: {outcome:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_balancer_in_front_when_it_speaks_version_2_in_pieces_then_it_is_understood_and_the_rest_is_payload() {
    let site = Site::new(44);
    let _backend = Backend::start(site.backend(1), Script::Echo).await;
    let manifest = echoing(site).annotation("accept-proxy", "true").annotation("proxy-protocol", "v1");
    let _relay = Relay::start_with(site, manifest, behind_a_balancer(site)).await;
    let mut header = binary(([203, 0, 113, 7], 40_000).into(), ([192, 0, 2, 80], 443).into());
    header[15] += 7;
    header.extend_from_slice(b"\x04\x00\x04\x00\x00\x00\x00"); // A field of no meaning.

    let mut stream = connect_from(site.client(1), site.service()).await.expect("a listener");
    stream.set_nodelay(true).expect("an option");
    for byte in [&header[..], b"hello"].concat() {
        stream.write_all(&[byte]).await.expect("a connection");
        tokio::task::yield_now().await;
    }
    stream.shutdown().await.expect("a connection");

    let mut answer = String::new();
    within("an end", stream.read_to_string(&mut answer)).await.expect("an answer");
    assert_eq!(answer, "PROXY TCP4 203.0.113.7 192.0.2.80 40000 443\r\nhello");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_service_behind_balancers_when_others_come_then_nobody_can_say_who_he_is_and_all_are_reset_and_counted()
{
    let site = Site::new(45);
    let _backend = Backend::start(site.backend(1), Script::Echo).await;
    let mut options = behind_a_balancer(site);
    options.inside = vec![site.client(3).into()];
    let relay = Relay::start_with(site, echoing(site).node_port().annotation("accept-proxy", "true"), options).await;
    let ([balancer, stranger, pod], service) = ([1, 2, 3].map(|number| site.client(number)), site.service());
    let line = b"PROXY TCP4 203.0.113.7 192.0.2.80 40000 443\r\n";

    // With a header or without one, from outside or from this node's pods, at each of its addresses.
    expect_reset(stranger, service, line).await;
    expect_reset(stranger, site.node_port(), line).await;
    expect_reset(stranger, service, b"hello").await;
    expect_reset(pod, service, line).await;
    relay.until("strangers", |_| dropped(&relay, DropReason::UnknownBalancer) == 4).await;

    // What a client says behind the balancer's header is payload, whatever it looks like.
    let forged = [&line[..], b"PROXY TCP4 198.51.100.66 192.0.2.80 1 2\r\n"].concat();
    let (_, answer) = say_from(balancer, service, &forged).await.expect("an answer");
    assert_eq!(answer, &forged[line.len()..]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_balancer_in_front_when_its_header_is_missing_wrong_or_late_then_it_is_reset_and_counted() {
    let site = Site::new(46);
    let _backend = Backend::start(site.backend(1), Script::Echo).await;
    let mut options = behind_a_balancer(site);
    options.tcp = TcpOptions { header_timeout: Duration::from_millis(100), ..TcpOptions::default() };
    let relay = Relay::start_with(site, echoing(site).annotation("accept-proxy", "true"), options).await;
    let (balancer, service) = (site.client(1), site.service());

    expect_reset(balancer, service, b"hello").await;
    expect_reset(balancer, service, b"PROXY TCP4 203.0.113.7\r\nhello").await;
    for beginning in [&b""[..], b"PROXY TCP4 203.0.113.7 192"] {
        let mut slow = connect_from(balancer, service).await.expect("a listener");
        slow.write_all(beginning).await.expect("a connection");
        let outcome = within("a reset", slow.read(&mut [0])).await;
        assert_eq!(outcome.expect_err("a reset").kind(), io::ErrorKind::ConnectionReset);
    }
    relay.until("headers", |_| dropped(&relay, DropReason::ProxyHeader) == 4).await;

    // One that looks whether somebody listens has made no mistake.
    assert_eq!(say_from(balancer, service, b"").await.expect_err("a reset").kind(), io::ErrorKind::ConnectionReset);
    relay.until("its end", |_| dropped(&relay, DropReason::ClientAbort) == 1).await;
}

/// Half a header: its connection waits for the rest.
async fn begun(site: Site) -> TcpStream {
    let mut stream = connect_from(site.client(1), site.service()).await.expect("a listener");
    stream.write_all(&WHOLE[..20]).await.expect("a connection");
    stream
}

/// A header and what a client says.
const WHOLE: &[u8] = b"PROXY TCP4 203.0.113.7 192.0.2.80 40000 443\r\nhello";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_balancer_that_has_begun_a_header_when_the_relay_ends_then_it_is_reset_and_counted() {
    let site = Site::new(52);
    let _backend = Backend::start(site.backend(1), Script::Echo).await;
    let relay =
        Relay::start_with(site, echoing(site).annotation("accept-proxy", "true"), behind_a_balancer(site)).await;
    let mut waiting = begun(site).await;
    let status = relay.status();
    let state = service_of(&status, "web").and_then(|web| web.ports[0].state.clone()).expect("it is served");
    relay.until("it to be accepted", |_| state.stats.accepted.get() == 1).await;

    relay.drain(Duration::ZERO).await;

    let end = within("an end", waiting.read(&mut [0])).await;
    assert_eq!(end.expect_err("a reset").kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(state.stats.dropped.get(DropReason::Drain), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_service_that_allows_one_connection_when_a_header_is_waited_for_then_it_is_that_one() {
    let site = Site::new(53);
    let _backend = Backend::start(site.backend(1), Script::Echo).await;
    let manifest = echoing(site).annotation("accept-proxy", "true").annotation("max-connections", "1");
    let relay = Relay::start_with(site, manifest, behind_a_balancer(site)).await;
    let paused = &PROCESS.accept_paused[usize::from(PauseReason::ServiceLimit)];
    let before = paused.seconds();
    let waiting = begun(site).await;

    let mut next = connect_from(site.client(1), site.service()).await.expect("a place in the queue");
    next.write_all(WHOLE).await.expect("a place in the queue");
    relay.until("nobody to be accepted", |_| paused.seconds() > before).await;
    let status = relay.status();
    let state = service_of(&status, "web").and_then(|web| web.ports[0].state.clone()).expect("it is served");
    assert_eq!(state.stats.accepted.get(), 1);
    drop(waiting);

    let mut answer = [0; 5];
    within("there is room", next.read_exact(&mut answer)).await.expect("an answer");
    assert_eq!(&answer, b"hello");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_an_urgent_byte_within_a_header_when_read_then_it_is_none_of_it() {
    let site = Site::new(54);
    let _backend = Backend::start(site.backend(1), Script::Echo).await;
    let _relay =
        Relay::start_with(site, echoing(site).annotation("accept-proxy", "true"), behind_a_balancer(site)).await;
    let mut stream = begun(site).await;

    SockRef::from(&stream).send_out_of_band(b"!").expect("a connection");
    stream.write_all(&WHOLE[20..]).await.expect("a connection");

    let mut answer = [0; 5];
    within("an answer", stream.read_exact(&mut answer)).await.expect("an answer");
    assert_eq!(&answer, b"hello");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_clients_behind_one_balancer_when_they_stick_then_each_does_to_a_backend_of_its_own() {
    let site = Site::new(47);
    let addresses = [1, 2].map(|number| site.backend(number));
    let _backends = [Backend::named(addresses[0]).await, Backend::named(addresses[1]).await];
    let manifest = Manifest::new(site).tcp().sticky(600).annotation("accept-proxy", "true").endpoints(addresses);
    let _relay = Relay::start_with(site, manifest, behind_a_balancer(site)).await;
    let ask = async |client: &str| {
        let said = format!("PROXY TCP4 {client} 192.0.2.80 40000 443\r\nwho\n");
        say_from(site.client(1), site.service(), said.as_bytes()).await.expect("an answer").1
    };

    let (one, other) = (ask("203.0.113.7").await, ask("203.0.113.8").await);

    assert_ne!(one, other, "each in its turn");
    for _ in 0..3 {
        assert_eq!((ask("203.0.113.7").await, ask("203.0.113.8").await), (one.clone(), other.clone()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_an_access_log_when_a_balancer_names_a_client_then_the_line_has_both_served_or_not() {
    let site = Site::new(48);
    let _backend = Backend::start(site.backend(1), Script::Echo).await;
    let folder = tempfile::tempdir().expect("a folder can be made");
    let path = folder.path().join("access.log");
    let log = AccessLogOptions { output: path.clone().into(), format: AccessFormat::Json, sample: NonZeroU32::MIN };
    let log = AccessLog::start(&log).expect("the test's folder can be written");
    let options = RelayOptions { access_log: Some(log.tap()), ..behind_a_balancer(site) };
    let manifest = echoing(site).annotation("accept-proxy", "true").annotation("allow-from", "203.0.113.0/24");
    let relay = Relay::start_with(site, manifest, options).await;
    let (balancer, service) = (site.client(1), site.service());

    let served = b"PROXY TCP4 203.0.113.7 192.0.2.80 40000 443\r\nhello";
    let (port, _) = say_from(balancer, service, served).await.expect("an answer");
    expect_reset(balancer, service, b"PROXY TCP4 198.51.100.7 192.0.2.80 40001 443\r\n").await;
    expect_reset(site.client(2), service, b"hello").await;

    let read = || fs::read_to_string(&path).unwrap_or_default();
    relay.until("three lines", |_| read().lines().count() == 3).await;
    let lines: Vec<Value> = read().lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let line = |reason: &str| lines.iter().find(|line| line["reason"] == reason).expect("a line");
    let peer = SocketAddr::new(balancer, port).to_string();
    let finished = line("finished");
    assert_eq!((finished["client"].as_str(), finished["peer"].as_str()), (Some("203.0.113.7:40000"), Some(&*peer)));
    assert_eq!(finished["upstream_bytes"], 5, "the header is no payload");
    assert_eq!(line("denied_address")["client"], "198.51.100.7:40001");
    let stranger = line("unknown_balancer");
    assert!(stranger["client"].as_str().is_some_and(|client| client.starts_with(&site.client(2).to_string())));
    assert_eq!(stranger["peer"], Value::Null, "it is nobody's");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_service_behind_balancers_when_the_process_believes_none_then_nobody_is_served_and_that_is_said() {
    let site = Site::new(49);
    let _backend = Backend::start(site.backend(1), Script::Echo).await;

    let relay = Relay::start(site, echoing(site).annotation("accept-proxy", "true")).await;

    assert!(problems(&relay.status()).contains("--accept-proxy-from names nobody"));
    expect_reset(site.client(1), site.service(), b"PROXY UNKNOWN\r\n").await;
    assert_eq!(dropped(&relay, DropReason::UnknownBalancer), 1);
}
