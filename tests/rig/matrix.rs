//! The whole matrix of whom backends see: every client at every entry under each policy, with each choice, of backends in every
//! place; and that this is what `status` tells.
//!
//! The words are those of `source_matrix`; what they mean for one client and one backend stands here once more. How it comes to
//! be so is in `preserve`.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kube_relay::name::{Family, Protocol, Scope};
use kube_relay::plan::{ListenerKind, SourceAddress};
use kube_relay::source_matrix::{ClientPlace, Row, Seen, named, rows, seen};
use kube_relay::status::Report;
use ppp::{HeaderResult, v1, v2};
use socket2::{Domain, SockRef, Socket, Type};

use crate::preserve::is_possible;
use crate::rig::{Case, FAMILIES, Namespace, Rig, Shape, skip};
use crate::stage::{PATIENCE, Stage, TCP_BACKEND_PORT, UDP_BACKEND_PORT, Web};

pub(crate) const CASES: &[Case] =
    cases![t113_t126_given_each_choice_when_everybody_asks_everywhere_then_backends_see_whom_status_tells];

/// What is asked of a Service about its clients' addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    /// Nothing.
    Plain,
    /// `kube-relay.dev/proxy-protocol`.
    Header,
    /// `kube-relay.dev/source-address: preserve`.
    Preserve,
}

const CHOICES: [Choice; 3] = [Choice::Plain, Choice::Header, Choice::Preserve];

/// A Service: one of each choice and each policy, which is both its internal and its external one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Site {
    choice: Choice,
    policy: Scope,
    /// Tells its addresses and node ports from those of the others.
    number: u8,
}

/// Where a backend is. Each has a port of its own at each Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// A pod of this node.
    Near,
    /// A pod of this node, on a bridge.
    Bridged,
    /// A pod of this node with `hostNetwork`.
    Host,
    /// A pod of another node.
    Far,
    /// A pod of another node with `hostNetwork`.
    FarHost,
}

const PLACES: [Place; 5] = [Place::Near, Place::Bridged, Place::Host, Place::Far, Place::FarHost];

impl Place {
    fn is_here(self) -> bool {
        matches!(self, Self::Near | Self::Bridged | Self::Host)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Near => "near",
            Self::Bridged => "bridged",
            Self::Host => "host",
            Self::Far => "far",
            Self::FarHost => "far-host",
        }
    }
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
struct Client<'a> {
    part: &'a Namespace,
    place: ClientPlace,
    /// True on the bridge.
    is_bridged: bool,
    /// True where its program chooses its own address as its source; else the kernel chooses.
    is_bound: bool,
}

/// Who is there, and the relay.
struct Scene {
    stage: Stage,
    /// Two, where the kernel knows bridges: the first one asks, the other one answers.
    bridged: Vec<Namespace>,
    sites: Vec<Site>,
    _running: Running,
}

/// What a backend tells a client.
#[derive(Clone, Copy, Debug)]
struct Told {
    /// Whom it sees.
    source: IpAddr,
    /// Whom the header before the question names; `None`: there is no header.
    named: Option<IpAddr>,
}

fn t113_t126_given_each_choice_when_everybody_asks_everywhere_then_backends_see_whom_status_tells() {
    let scene = Scene::set();

    let told: Vec<(Site, Vec<Row>)> = scene.sites.iter().map(|site| (*site, scene.told_by_status(*site))).collect();
    let wrong: Vec<String> = thread::scope(|scope| {
        let (scene, told) = (&scene, &told[..]);
        let ask = |client| scope.spawn(move || scene.ask_everywhere(client, told));
        let asking: Vec<_> = scene.clients().into_iter().map(ask).collect();
        asking.into_iter().flat_map(|thread| thread.join().expect("it does not panic")).collect()
    });

    assert!(wrong.is_empty(), "{} are not as `status` tells:\n{}", wrong.len(), wrong.join("\n"));
}

impl Scene {
    fn set() -> Self {
        let rig = Rig::build(Shape { nodes: 3, pods_per_node: 2, router: true }).expect("the rig builds");
        let bridged = rig.bridge(0, 2).unwrap_or_else(|error| {
            skip("bridge", &error.to_string());
            Vec::new()
        });
        let is_possible = is_possible(rig.node(0));
        let choices = CHOICES.into_iter().filter(|choice| *choice != Choice::Preserve || is_possible);
        let of_choice = choices.flat_map(|choice| [Scope::Cluster, Scope::Local].map(|policy| (choice, policy)));
        let sites: Vec<Site> =
            (0..).zip(of_choice).map(|(number, (choice, policy))| Site { choice, policy, number }).collect();
        let mut running = Running::default();
        let mut more = String::new();
        for place in PLACES {
            let Some(part) = backend(&rig, &bridged, place) else { continue };
            running.start(part);
            sites.iter().for_each(|site| more.push_str(&site.slices(place, part)));
        }
        let services: String = sites.iter().map(|site| site.service()).collect();
        let web = Web { more: services + &more, ..Web::default() };
        let stage = Stage::start_bare(rig, &web, |command| {
            command.args(["--nodeport-addresses", "primary"]);
        });
        Self { stage, bridged, sites, _running: running }
    }

    /// Everybody that there is.
    fn clients(&self) -> Vec<Client<'_>> {
        let rig = &self.stage.rig;
        let client = |part, place| Client { part, place, is_bridged: false, is_bound: false };
        let on_bridge =
            self.bridged.first().map(|pod| Client { is_bridged: true, ..client(pod, ClientPlace::PodHere) });
        let others = [
            client(rig.pod(0, 1), ClientPlace::PodHere),
            client(rig.pod(1, 1), ClientPlace::PodElsewhere), // The far backend is on its node.
            client(rig.pod(2, 0), ClientPlace::PodElsewhere),
            client(rig.client(), ClientPlace::Elsewhere),
            client(rig.node(1), ClientPlace::Elsewhere), // A pod with `hostNetwork` there, or a node that masquerades its pods.
            client(rig.node(0), ClientPlace::Node),
            Client { is_bound: true, ..client(rig.node(0), ClientPlace::Node) }, // Such a pod here.
        ];
        on_bridge.into_iter().chain(others).collect()
    }

    /// The rows that the relay's report has for a Service. All of them are there, once for each entry.
    fn told_by_status(&self, site: Site) -> Vec<Row> {
        let answer = self.stage.report_of(&format!("default/{}", site.name()));
        let (_, body) = answer.split_once("\r\n\r\n").expect("an answer");
        let report: Report = serde_json::from_str(body).expect("a report");
        let [service] = &report.services[..] else { panic!("one Service: {body}") };
        assert_eq!((service.source_address, &service.source_refusal), (site.source(), &None), "{site:?}");

        let rows = rows(service);

        for (place, entry) in ClientPlace::ALL.into_iter().flat_map(|place| ENTRIES.map(|entry| (place, entry))) {
            let is_of = |row: &&Row| row.client == place && row.entries.contains(&entry);
            assert_eq!(rows.iter().filter(is_of).count(), 1, "{site:?}: {place} at {entry:?}");
        }
        rows
    }

    /// Has a client ask each Service for each backend that it may get. What is not as told.
    fn ask_everywhere(&self, client: Client<'_>, told: &[(Site, Vec<Row>)]) -> Vec<String> {
        let ask = || {
            let of_client = |rows: &[Row]| rows.iter().filter(|row| row.client == client.place).cloned().collect();
            let told = told.iter().map(|(site, rows)| (*site, of_client(rows)));
            Ok(told.flat_map(|(site, rows): (Site, Vec<Row>)| self.ask_site(client, site, &rows)).collect())
        };
        client.part.run(ask).expect("the namespace is ours")
    }

    fn ask_site(&self, client: Client<'_>, site: Site, rows: &[Row]) -> Vec<String> {
        let of_row = |row: &Row| row.entries.iter().map(|entry| (*entry, row.scope)).collect::<Vec<_>>();
        let ways = rows.iter().flat_map(of_row);
        let ways = ways.flat_map(|(entry, scope)| self.backends(scope).map(move |place| (entry, scope, place)));
        let ways = ways.flat_map(|way| FAMILIES.map(|family| (way, family)));
        let ways = ways.flat_map(|way| [Protocol::Tcp, Protocol::Udp].map(|protocol| (way, protocol)));
        let wrong = ways.filter_map(|(((entry, scope, place), family), protocol)| {
            let to = self.at(site, entry, place, family);
            let expected = self.expected(client, site, scope, place, to, protocol);
            let told = ask_until(&expected, || ask(protocol, client.is_bound.then(|| client.part.address(family)), to));
            let told = told.err()?;
            Some(format!(
                "{client:?} at the {entry:?} of {site:?}, {protocol}/{family}, by a backend that is {place:?}: \
                 {expected:?}, and it tells {told}"
            ))
        });
        wrong.collect()
    }

    /// The places of backends in such a scope.
    fn backends(&self, scope: Scope) -> impl Iterator<Item = Place> {
        let has_bridge = !self.bridged.is_empty();
        let in_scope = move |place: &Place| scope == Scope::Cluster || place.is_here();
        PLACES.into_iter().filter(move |place| *place != Place::Bridged || has_bridge).filter(in_scope)
    }

    /// Where a Service has the port of a backend.
    fn at(&self, site: Site, entry: ListenerKind, place: Place, family: Family) -> SocketAddr {
        let ip = match entry {
            ListenerKind::NodePort => {
                return SocketAddr::new(self.stage.rig.node(0).address(family), site.node_port(place));
            }
            ListenerKind::ClusterIp => site.address(0, family),
            ListenerKind::ExternalIp => site.address(1, family),
            ListenerKind::LoadBalancerIp => site.address(2, family),
            ListenerKind::Exposed => panic!("nothing is exposed"),
        };
        SocketAddr::new(ip, port(place))
    }

    fn expected(
        &self,
        client: Client<'_>,
        site: Site,
        scope: Scope,
        place: Place,
        to: SocketAddr,
        protocol: Protocol,
    ) -> Expected {
        let family = Family::of(to.ip());
        let (words, own) = (seen(client.place, scope, site.source()), client.part.address(family));
        let node = self.node(family);
        let source = if shows_client(words, client, place) { vec![own] } else { node.clone() };
        let has_header = site.choice == Choice::Header && protocol == Protocol::Tcp;
        let named = has_header.then(|| match named(client.place) {
            Seen::Client => vec![own],
            Seen::NodeOrVip if client.is_bound => vec![own],
            // The kernel takes the address itself, and for IPv6 that of loopback.
            Seen::NodeOrVip => {
                node.iter().copied().chain([to.ip(), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1_u16])]).collect()
            }
            other => panic!("no header can say that: {other}"),
        });
        let at_first = if site.choice == Choice::Preserve { node } else { Vec::new() };
        Expected { words, source, at_first, named }
    }

    /// The addresses of the node that the relay is on: towards others, and its ends of the cables and the bridge to its pods.
    fn node(&self, family: Family) -> Vec<IpAddr> {
        let to_pods: [IpAddr; 2] = match family {
            Family::V4 => [[10, 82, 0, 1].into(), [10, 82, 100, 1].into()],
            Family::V6 => [0, 100].map(|network| IpAddr::from([0xfd82, network, 0, 0, 0, 0, 0, 1_u16])),
        };
        to_pods.into_iter().chain([self.stage.rig.node(0).address(family)]).collect()
    }
}

/// What the words of `status` mean for one client and one backend.
fn shows_client(words: Seen, client: Client<'_>, place: Place) -> bool {
    let is_on_link = client.is_bridged && place == Place::Bridged;
    match words {
        Seen::Client => true,
        Seen::ClientOffHost => place != Place::Host,
        Seen::ClientOffLink => place != Place::Host && !is_on_link,
        // Nobody's answers to others come by this node here, but those of its pods.
        Seen::ClientIfWayBack => place.is_here() && place != Place::Host,
        Seen::Node | Seen::NodeOrVip => false,
    }
}

/// What a backend is to tell.
#[derive(Debug)]
struct Expected {
    #[expect(dead_code, reason = "printed where it is something else")]
    words: Seen,
    /// Whom it sees: one of these.
    source: Vec<IpAddr>,
    /// Whom it may see until the way back is known.
    at_first: Vec<IpAddr>,
    /// Whom the header names, if there is to be one: one of these.
    named: Option<Vec<IpAddr>>,
}

impl Expected {
    fn is_met_by(&self, told: Told) -> bool {
        let names = match (&self.named, told.named) {
            (Some(expected), Some(named)) => expected.contains(&named),
            (expected, named) => expected.is_none() && named.is_none(),
        };
        names && self.source.contains(&told.source)
    }
}

/// Asks until the answer is right, or is one that may never come.
fn ask_until(expected: &Expected, ask: impl Fn() -> io::Result<Told>) -> Result<(), String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let told = ask();
        let may_change = match &told {
            Ok(told) if expected.is_met_by(*told) => return Ok(()),
            Ok(told) => expected.at_first.contains(&told.source),
            Err(_) => true,
        };
        if !may_change || Instant::now() > deadline {
            return Err(format!("{told:?}"));
        }
    }
}

/// What hears nothing for so long asks again.
const SILENCE: Duration = Duration::from_millis(500);

/// One question, by a connection or a flow of its own.
fn ask(protocol: Protocol, source: Option<IpAddr>, to: SocketAddr) -> io::Result<Told> {
    let kind = if protocol == Protocol::Tcp { Type::STREAM } else { Type::DGRAM };
    let socket = Socket::new(Domain::for_address(to), kind, None)?;
    if let Some(source) = source {
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    socket.connect_timeout(&to.into(), SILENCE)?;
    socket.set_read_timeout(Some(if protocol == Protocol::Tcp { PATIENCE } else { SILENCE }))?;
    socket.send(QUESTION)?;
    let mut buffer = [0; 256];
    let length = (&socket).read(&mut buffer)?;
    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
    let words = text.split_once(' ').and_then(|(source, named)| Some((source.parse().ok()?, named)));
    match words {
        Some((source, NOBODY_NAMED)) => Ok(Told { source, named: None }),
        Some((source, named)) if let Ok(named) = named.parse() => Ok(Told { source, named: Some(named) }),
        _ => Err(io::Error::other(format!("answered {text:?}"))),
    }
}

const QUESTION: &[u8] = b"?\n";
/// What a backend says where a question comes without a header.
const NOBODY_NAMED: &str = "-";

fn backend<'a>(rig: &'a Rig, bridged: &'a [Namespace], place: Place) -> Option<&'a Namespace> {
    match place {
        Place::Near => Some(rig.pod(0, 0)),
        Place::Bridged => bridged.get(1),
        Place::Host => Some(rig.node(0)),
        Place::Far => Some(rig.pod(1, 0)),
        Place::FarHost => Some(rig.node(1)),
    }
}

/// The number of the port that leads to a backend.
fn port(place: Place) -> u16 {
    80 + place as u16
}

/// All entries that there are here.
const ENTRIES: [ListenerKind; 4] =
    [ListenerKind::ClusterIp, ListenerKind::NodePort, ListenerKind::ExternalIp, ListenerKind::LoadBalancerIp];

impl Site {
    fn name(self) -> String {
        format!("{:?}-{:?}", self.choice, self.policy).to_lowercase()
    }

    fn source(self) -> SourceAddress {
        if self.choice == Choice::Preserve { SourceAddress::Preserve } else { SourceAddress::Node }
    }

    fn address(self, which: u8, family: Family) -> IpAddr {
        Rig::vip_address(10 + 3 * self.number + which).of(family)
    }

    fn node_port(self, place: Place) -> u16 {
        30_100 + 10 * u16::from(self.number) + place as u16
    }

    /// Its manifest, with a port of each protocol for each backend.
    fn service(self) -> String {
        let annotations = match (self.choice, self.policy) {
            (Choice::Plain, _) => "",
            (Choice::Header, Scope::Cluster) => "kube-relay.dev/proxy-protocol: v1",
            (Choice::Header, Scope::Local) => "kube-relay.dev/proxy-protocol: v2",
            (Choice::Preserve, _) => "kube-relay.dev/source-address: preserve",
        };
        let both = |which| FAMILIES.map(|family| format!("'{}'", self.address(which, family))).join(", ");
        let [balancer_v4, balancer_v6] = FAMILIES.map(|family| self.address(2, family));
        let ports: String = PLACES.into_iter().map(|place| self.ports(place)).collect();
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, annotations: {{{annotations}}}}}\nspec:\n  \
             type: LoadBalancer\n  clusterIP: {first}\n  clusterIPs: [{cluster}]\n  ipFamilies: [IPv4, IPv6]\n  \
             ipFamilyPolicy: RequireDualStack\n  externalIPs: [{external}]\n  internalTrafficPolicy: {policy:?}\n  \
             externalTrafficPolicy: {policy:?}\n  ports:\n{ports}status: {{loadBalancer: {{ingress: \
             [{{ip: {balancer_v4}}}, {{ip: '{balancer_v6}'}}]}}}}\n",
            name = self.name(),
            first = self.address(0, Family::V4),
            cluster = both(0),
            external = both(1),
            policy = self.policy,
        )
    }

    fn ports(self, place: Place) -> String {
        let of = |protocol: Protocol, target: u16| {
            let (name, port, node_port) = (port_name(place, protocol), port(place), self.node_port(place));
            format!(
                "  - {{name: {name}, protocol: {protocol}, port: {port}, targetPort: {target}, nodePort: {node_port}}}\n"
            )
        };
        of(Protocol::Tcp, TCP_BACKEND_PORT) + &of(Protocol::Udp, UDP_BACKEND_PORT)
    }

    /// The slices with its backend in a place: each has its own, as each has its own ports.
    fn slices(self, place: Place, part: &Namespace) -> String {
        let node = if place.is_here() { "node0" } else { "node1" };
        let slice = |family: Family| {
            format!(
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}-{place}-{suffix}, labels: \
                 {{kubernetes.io/service-name: {name}}}}}\naddressType: {family}\nports:\n\
                 - {{name: {tcp}, port: {TCP_BACKEND_PORT}}}\n\
                 - {{name: {udp}, protocol: UDP, port: {UDP_BACKEND_PORT}}}\n\
                 endpoints: [{{addresses: ['{address}'], nodeName: {node}, conditions: {{ready: true}}}}]\n",
                name = self.name(),
                place = place.name(),
                suffix = format!("{family}").to_lowercase(),
                tcp = port_name(place, Protocol::Tcp),
                udp = port_name(place, Protocol::Udp),
                address = part.address(family),
            )
        };
        FAMILIES.map(slice).concat()
    }
}

fn port_name(place: Place, protocol: Protocol) -> String {
    format!("{}-{protocol}", place.name()).to_lowercase()
}

/// Backends that tell whom they see, and whom a header names. They end when dropped.
#[derive(Default)]
struct Running {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// How soon a backend sees that it is to end.
const TICK: Duration = Duration::from_millis(50);

impl Running {
    fn start(&mut self, part: &Namespace) {
        for family in FAMILIES {
            let [tcp, udp] =
                [TCP_BACKEND_PORT, UDP_BACKEND_PORT].map(|port| SocketAddr::new(part.address(family), port));
            let listener = part.run(|| TcpListener::bind(tcp)).expect("the address is free");
            let socket = part.run(|| UdpSocket::bind(udp)).expect("the address is free");
            let stop = Arc::clone(&self.stop);
            self.threads.push(thread::spawn(move || serve_tcp(&listener, &stop)));
            let stop = Arc::clone(&self.stop);
            self.threads.push(thread::spawn(move || serve_udp(&socket, &stop)));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // A panic has been printed.
        }
    }
}

/// One question for each connection.
fn serve_tcp(listener: &TcpListener, stop: &AtomicBool) {
    SockRef::from(listener).set_read_timeout(Some(TICK)).expect("an option"); // It limits accept, too.
    thread::scope(|scope| {
        while !stop.load(Ordering::Relaxed) {
            let Ok((mut stream, peer)) = listener.accept() else { continue };
            scope.spawn(move || {
                let asked = heard(&mut stream, stop).unwrap_or_default();
                let _ = stream.write_all(tell(peer.ip(), &asked).as_bytes()); // The client sees that.
            });
        }
    });
}

/// All that is said, until the question is asked.
fn heard(stream: &mut TcpStream, stop: &AtomicBool) -> io::Result<Vec<u8>> {
    let (mut all, mut buffer) = (Vec::new(), [0; 256]);
    stream.set_read_timeout(Some(TICK))?;
    while !all.ends_with(QUESTION) && !stop.load(Ordering::Relaxed) {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => all.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

/// The same, datagram by datagram.
fn serve_udp(socket: &UdpSocket, stop: &AtomicBool) {
    let mut buffer = [0; 256];
    socket.set_read_timeout(Some(TICK)).expect("an option");
    while !stop.load(Ordering::Relaxed) {
        if let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(tell(peer.ip(), &buffer[..length]).as_bytes(), peer);
        }
    }
}

/// Whom a backend sees, and whom what comes before the question names.
fn tell(peer: IpAddr, asked: &[u8]) -> String {
    let before = asked.strip_suffix(QUESTION).unwrap_or(asked);
    let named = if before.is_empty() { Some(NOBODY_NAMED.to_owned()) } else { named_in(before) };
    format!("{peer} {}", named.unwrap_or_else(|| format!("{before:?}")))
}

/// Whom a header of either version names, if it is one and nothing else.
fn named_in(before: &[u8]) -> Option<String> {
    let (header, source): (_, IpAddr) = match HeaderResult::parse(before) {
        HeaderResult::V1(Ok(header)) => match header.addresses {
            v1::Addresses::Tcp4(addresses) => (header.header.len(), addresses.source_address.into()),
            v1::Addresses::Tcp6(addresses) => (header.header.len(), addresses.source_address.into()),
            v1::Addresses::Unknown => return None,
        },
        HeaderResult::V2(Ok(header)) => match header.addresses {
            v2::Addresses::IPv4(addresses) => (header.len(), addresses.source_address.into()),
            v2::Addresses::IPv6(addresses) => (header.len(), addresses.source_address.into()),
            _ => return None,
        },
        _ => return None,
    };
    (header == before.len()).then(|| source.to_string())
}
