//! What listens on all addresses of a node, beside a relay that has made addresses of Services local there: who gets an
//! answer where, while the guard comes, is taken away, and goes.
//!
//! What the rules are is in `guard_message`, and what is changed when in `guard_table`; here a kernel is asked. The same
//! without nf_tables is in `guard_filters`.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kube_relay::config::{DEFAULT_ROUTE_PROTOCOL, DEFAULT_VIP_ROUTES_LINGER};
use kube_relay::guard::{self, CHECK_INTERVAL, Guard, VipGuard};
use kube_relay::name::Family;
use kube_relay::stats::PROCESS;
use kube_relay::vips::{AtExit, VipOptions, Vips, Wanted};
use rustix::process::Signal;
use rustix::thread::CapabilitySet;
use socket2::SockRef;
use tokio::time::timeout;

use crate::rig::{Case, FAMILIES, Namespace, Rig, skip, with_only};
use crate::stage::{
    Backends, ClusterIp, ExternalIp, Outcome, Stage, Web, ask_on, ask_tcp, ask_udp, expect_at, serve_tcp, serve_udp,
    until,
};
use crate::verdicts::{LOCAL, backends, local, rig};
use crate::vips::{SOON, VIPS};

pub(crate) const CASES: &[Case] = cases![
    given_a_guard_that_somebody_removes_when_looked_at_then_it_is_back_and_streams_go_on,
    t236_given_a_listener_of_all_addresses_when_an_address_of_a_service_is_asked_then_it_is_refused_there_alone,
    t236_given_no_guard_when_an_address_of_a_service_is_asked_then_a_listener_of_all_addresses_answers,
    given_a_client_on_the_node_that_connects_no_socket_when_it_asks_over_udp_then_it_gets_the_answer,
    given_a_client_on_the_node_with_a_port_of_no_client_when_it_asks_over_udp_then_it_gets_the_answer,
    given_a_transparent_listener_of_all_addresses_when_an_address_of_a_service_is_asked_then_it_answers,
    given_a_guarded_address_when_it_becomes_the_nodes_own_then_it_is_guarded_no_more_until_it_is_not,
    given_a_relay_that_was_killed_when_its_routes_stay_then_so_does_the_guard_until_both_are_cleaned_up,
    given_routes_that_go_at_exit_when_the_relay_ends_then_the_guard_goes_too,
    given_no_right_to_guard_when_routes_of_the_last_run_are_there_then_that_is_said,
];

pub(crate) const MEASURING: &[Case] = cases![
    given_the_port_of_a_listener_that_has_ended_when_a_service_gets_it_then_it_is_served_within_a_second,
    given_ten_thousand_addresses_when_required_then_they_are_guarded_soon,
];

/// Where sshd would listen.
pub(crate) const WILDCARD_PORT: u16 = 2222;
/// As it calls itself.
const MACHINE: &str = "machine";

/// Something that listens on all addresses of a node, of both families, over TCP and UDP. Ends when dropped.
pub(crate) struct Everywhere {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Everywhere {
    pub(crate) fn start(node: &Namespace) -> Self {
        Self::start_with(node, |_| Ok(()))
    }

    /// As [`start`](Self::start), with more options on the socket that listens for connections.
    fn start_with(node: &Namespace, prepare: impl FnOnce(SockRef<'_>) -> io::Result<()> + Send) -> Self {
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, WILDCARD_PORT)); // Of IPv4, too: as the kubelet's.
        let listener = node.run(|| {
            let listener = TcpListener::bind(any)?;
            prepare(SockRef::from(&listener))?;
            Ok(listener)
        });
        let listener = listener.expect("the port is free");
        let socket = node.run(|| UdpSocket::bind(any)).expect("the port is free");
        let stop = Arc::new(AtomicBool::new(false));
        let (for_tcp, for_udp) = (Arc::clone(&stop), Arc::clone(&stop));
        let threads = vec![
            thread::spawn(move || serve_tcp(&listener, MACHINE, &for_tcp)),
            thread::spawn(move || serve_udp(&socket, MACHINE, &for_udp)),
        ];
        Self { stop, threads }
    }
}

impl Drop for Everywhere {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// By what a kernel guards. Whom it keeps from an answer, and when it is there, is the same for each.
pub(crate) struct Means {
    /// False, and says why, where this kernel cannot. Leaves nothing behind.
    pub(crate) is_possible: fn(&Rig) -> bool,
    /// Has a relay guard so.
    pub(crate) ask_for: fn(&mut Command),
    /// Takes it away, of addresses that routes with a number make local. False where there is none.
    pub(crate) remove: fn(u8) -> io::Result<bool>,
    /// What becomes of those whom it keeps from what listens on all addresses.
    pub(crate) is_kept_away: fn(&Outcome) -> bool,
}

/// A table of nf_tables, as long as nobody asks for anything else.
pub(crate) const TABLE: Means =
    Means { is_possible: has_nf_tables, ask_for: |_| (), remove: guard::remove, is_kept_away: is_refused };

impl Means {
    /// Starts a relay that guards so, and waits until it does at each address. `prepare` may change how it is started.
    pub(crate) fn start(&self, rig: Rig, web: &Web, prepare: impl FnOnce(&mut Command)) -> Stage {
        let stage = Stage::start_bare(rig, web, |command| {
            (self.ask_for)(command);
            prepare(command);
        });
        until("each address is guarded", || stage.metric("kuberelay_guarded_addresses", "") == 6);
        stage
    }

    /// At each address of the Service, what listens on all addresses does not answer. All are asked at once: who gets no
    /// answer waits for it.
    pub(crate) fn guards(&self, stage: &Stage, from: &Namespace) {
        thread::scope(|scope| {
            for (entry, family) in VIPS.into_iter().flat_map(|entry| FAMILIES.map(|family| (entry, family))) {
                let to = trap(stage.at(entry, family));
                scope.spawn(move || expect_at(from, to, ask_tcp, "kept away over TCP", self.is_kept_away));
                scope.spawn(move || expect_at(from, to, ask_udp, "kept away over UDP", self.is_kept_away));
            }
        });
    }
}

/// A relay that has guarded each address of its Service, beside what listens on all addresses of the node.
pub(crate) struct Guarded {
    pub(crate) stage: Stage,
    means: &'static Means,
    sshd: Everywhere,
    _running: Backends,
}

impl Guarded {
    /// `None`, and says why, where this kernel cannot guard. `prepare` may change how the relay is started.
    pub(crate) fn start(means: &'static Means, prepare: impl FnOnce(&mut Command)) -> Option<Self> {
        let rig = rig();
        if !(means.is_possible)(&rig) {
            return None;
        }
        let _running = backends(&rig);
        let sshd = Everywhere::start(rig.node(0));
        let web = Web::default().with(local(&rig));
        let stage = means.start(rig, &web, prepare);
        Some(Self { stage, means, sshd, _running })
    }

    /// Whoever asks: the Service answers at its addresses, and what listens on all of them at the node's own alone.
    pub(crate) fn keeps_them_apart(&self) {
        let Self { stage, means, .. } = self;
        let rig = &stage.rig;
        for from in [rig.client(), rig.pod(0, 1), rig.pod(1, 0), rig.node(0), rig.node(1)] {
            means.guards(stage, from);
            for family in FAMILIES {
                expect_at(from, of_the_node(rig, family), ask_tcp, "the node's own address", is_machine);
            }
            for entry in VIPS {
                stage.served(from, entry, &LOCAL);
            }
        }
        // From elsewhere: a socket that is bound to no address answers with the one that the way back begins with.
        for family in FAMILIES {
            expect_at(rig.client(), of_the_node(rig, family), ask_udp, "the node's own address", is_machine);
        }
    }

    /// Once a relay has ended the guard stays, and the next one finds it as it should be. The last one is killed.
    pub(crate) fn outlives_its_relays(&mut self) {
        let Self { stage, means, .. } = self;
        for signal in [Signal::KILL, Signal::TERM] {
            stage.end(signal);
            means.guards(stage, stage.rig.client());
            stage.start_again(means.ask_for);
            means.guards(stage, stage.rig.client());
            assert_is_as_it_was_made(stage);
        }
        stage.end(Signal::KILL);
    }

    /// Somebody takes the guard away: it is made again, and no stream ends by that, nor by the end of its Service.
    pub(crate) fn comes_back_when_removed(&self) {
        let Self { stage, means, .. } = self;
        let mut open = FAMILIES.map(|family| {
            let to = stage.at(ClusterIp, family);
            stage.rig.client().run(|| TcpStream::connect_timeout(&to, Duration::from_secs(5))).expect("it is served")
        });
        let mut goes_on = || {
            for stream in &mut open {
                let outcome = ask_on(stream).expect("the stream goes on");
                assert!(outcome.pod().is_some(), "{outcome:?}");
            }
        };
        goes_on();

        let removed = stage.rig.node(0).run(|| (means.remove)(DEFAULT_ROUTE_PROTOCOL));
        assert!(removed.expect("it may be removed"), "there is one");
        let began = Instant::now();
        goes_on();

        until("that is told", || stage.log().contains("it is made again"));
        println!("made again after {:?}", began.elapsed());
        assert!(began.elapsed() < CHECK_INTERVAL + Duration::from_secs(1), "{:?}", began.elapsed());
        means.guards(stage, stage.rig.client());
        goes_on();
        stage.write("apiVersion: v1\nkind: List\nitems: []\n");
        until("only what the streams hold is guarded", || stage.metric("kuberelay_guarded_addresses", "") == 2);
        goes_on();
    }
}

/// The relay found what it has made, whenever it looked.
pub(crate) fn assert_is_as_it_was_made(stage: &Stage) {
    assert!(!stage.log().contains("it is made again"), "nobody has changed it: {}", stage.log());
}

/// The address of an entry, at the port where the machine listens.
pub(crate) fn trap(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip(), WILDCARD_PORT)
}

fn of_the_node(rig: &Rig, family: Family) -> SocketAddr {
    SocketAddr::new(rig.node(0).address(family), WILDCARD_PORT)
}

/// True where the kernel of this machine has nf_tables.
pub(crate) fn has_nf_tables(rig: &Rig) -> bool {
    let probe = rig.node(0).run(|| guard::remove(DEFAULT_ROUTE_PROTOCOL));
    probe.inspect_err(|error| skip("nf_tables", &error.to_string())).is_ok()
}

fn is_machine(outcome: &Outcome) -> bool {
    outcome.pod() == Some(MACHINE)
}

fn is_refused(outcome: &Outcome) -> bool {
    *outcome == Outcome::Refused
}

fn t236_given_a_listener_of_all_addresses_when_an_address_of_a_service_is_asked_then_it_is_refused_there_alone() {
    let of_a_pod = CapabilitySet::NET_ADMIN | CapabilitySet::NET_BIND_SERVICE;
    let Some(guarded) = Guarded::start(&TABLE, |command| with_only(of_a_pod, command)) else { return };
    let stage = &guarded.stage;
    let Stage { rig, .. } = stage;

    guarded.keeps_them_apart();

    let mine = trap(stage.at(ClusterIp, Family::V4));
    let bound =
        rig.node(0).run(|| UdpSocket::bind(SocketAddr::new(mine.ip(), WILDCARD_PORT + 1))).expect("it is local");
    let to = bound.local_addr().expect("it is bound");
    let others = thread::spawn(move || {
        let mut buffer = [0; 256];
        bound.recv_from(&mut buffer).and_then(|(_, peer)| bound.send_to(b"others 127.0.0.1", peer))
    });
    expect_at(rig.client(), to, ask_udp, "what others have bound there", |outcome| outcome.pod() == Some("others"));
    others.join().expect("it does not panic").expect("it answers");
}

fn t236_given_no_guard_when_an_address_of_a_service_is_asked_then_a_listener_of_all_addresses_answers() {
    let rig = rig();
    let _running = backends(&rig);
    let _sshd = Everywhere::start(rig.node(0));
    let web = Web::default().with(local(&rig));
    let mut stage = Stage::start_bare(rig, &web, |_| ());
    let to = trap(stage.at(ClusterIp, Family::V4));
    stage.end(Signal::TERM);

    stage.start_again(|command| {
        command.args(["--vip-guard", "none"]);
    });

    for from in [stage.rig.client(), stage.rig.node(0)] {
        expect_at(from, to, ask_tcp, "the trap", is_machine);
    }
    assert_eq!(stage.metric("kuberelay_guarded_addresses", ""), 0);
}

fn given_a_client_on_the_node_that_connects_no_socket_when_it_asks_over_udp_then_it_gets_the_answer() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let stage = Stage::start_bare(rig, &web, |_| ());
    let node = stage.rig.node(0);
    until("each address is guarded, or none can be", || {
        stage.metric("kuberelay_guarded_addresses", "") == 6 || stage.log().contains("no guard")
    });

    for family in FAMILIES {
        let to = stage.at(ClusterIp, family);
        let ask = |to| ask_unconnected(0, to);
        expect_at(node, to, ask, "as a resolver asks", |outcome| outcome.pod().is_some());
    }
}

fn given_a_client_on_the_node_with_a_port_of_no_client_when_it_asks_over_udp_then_it_gets_the_answer() {
    let Some(guarded) = Guarded::start(&TABLE, |_| ()) else { return };
    let stage = &guarded.stage;
    let node = stage.rig.node(0);

    for family in FAMILIES {
        let to = stage.at(ClusterIp, family);
        for port in [2_000, 61_001] {
            let ask = |to| ask_unconnected(port, to);
            expect_at(node, to, ask, "as NTP asks", |outcome| outcome.pod().is_some());
        }
        expect_at(node, trap(to), ask_udp, "what listens on all addresses", is_refused);
    }
}

/// A datagram from a socket that is bound to no address, and connected to none. Port 0 is one that the kernel chooses.
pub(crate) fn ask_unconnected(port: u16, to: SocketAddr) -> Outcome {
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], port).into() } else { ([0_u16; 8], port).into() };
    let exchange = || {
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        socket.send_to(b"?", to)?;
        let mut buffer = [0; 256];
        socket.recv_from(&mut buffer)
    };
    match exchange() {
        Ok((_, from)) if from == to => Outcome::Answer { pod: "some".into(), source: from.ip() },
        Ok((_, from)) => Outcome::Other(format!("answered by {from}")),
        Err(error) => Outcome::Other(error.to_string()),
    }
}

fn given_a_transparent_listener_of_all_addresses_when_an_address_of_a_service_is_asked_then_it_answers() {
    let Some(guarded) = Guarded::start(&TABLE, |_| ()) else { return };
    let Guarded { stage, sshd, .. } = guarded;
    let from = stage.rig.client();
    TABLE.guards(&stage, from);
    drop(sshd);

    let _mesh = Everywhere::start_with(stage.rig.node(0), |socket| socket.set_ip_transparent_v6(true));

    for family in FAMILIES {
        let to = trap(stage.at(ClusterIp, family));
        expect_at(from, to, ask_tcp, "what takes all connections", is_machine);
    }
}

fn given_a_guarded_address_when_it_becomes_the_nodes_own_then_it_is_guarded_no_more_until_it_is_not() {
    let Some(guarded) = Guarded::start(&TABLE, |_| ()) else { return };
    let stage = &guarded.stage;
    let from = stage.rig.client();

    for family in FAMILIES {
        let to = trap(stage.at(ExternalIp, family));
        expect_at(from, to, ask_tcp, "an address of a Service", is_refused);
        stage.rig.add_address(0, to.ip()).expect("an address can be added");
        expect_at(from, to, ask_tcp, "the node's own address", is_machine);
        expect_at(from, trap(stage.at(ClusterIp, family)), ask_tcp, "another one", is_refused);

        stage.rig.remove_address(0, to.ip()).expect("it is there");
        expect_at(from, to, ask_tcp, "an address of a Service again", is_refused);
    }
}

fn given_the_port_of_a_listener_that_has_ended_when_a_service_gets_it_then_it_is_served_within_a_second() {
    let Some(guarded) = Guarded::start(&TABLE, |_| ()) else { return };
    let Guarded { stage, sshd, .. } = guarded;
    TABLE.guards(&stage, stage.rig.client());

    drop(sshd);
    let began = Instant::now();
    is_served_at_its_port(&stage);

    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

/// The Service gets the port of what listened on all addresses, and answers there.
pub(crate) fn is_served_at_its_port(stage: &Stage) {
    let web = Web::default().with(local(&stage.rig)).to_string();
    stage.write(&web.replace("{name: only, port: 81,", &format!("{{name: only, port: {WILDCARD_PORT},")));
    for family in FAMILIES {
        let (from, to) = (stage.rig.client(), trap(stage.at(ClusterIp, family)));
        expect_at(from, to, ask_tcp, "the Service", |outcome| outcome.pod().is_some_and(|pod| LOCAL.contains(&pod)));
    }
}

fn given_a_guard_that_somebody_removes_when_looked_at_then_it_is_back_and_streams_go_on() {
    let Some(guarded) = Guarded::start(&TABLE, |_| ()) else { return };

    guarded.comes_back_when_removed();
}

fn given_a_relay_that_was_killed_when_its_routes_stay_then_so_does_the_guard_until_both_are_cleaned_up() {
    let Some(mut guarded) = Guarded::start(&TABLE, |_| ()) else { return };

    guarded.outlives_its_relays();

    let node = guarded.stage.rig.node(0);
    let mut cleanup = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
    let output = node.run(|| cleanup.arg("cleanup").output()).expect("it starts");
    assert!(output.status.success(), "{output:?}");
    expect_gone(&guarded.stage);
}

/// No route of ours, and nothing to guard any.
pub(crate) fn expect_gone(stage: &Stage) {
    let node = stage.rig.node(0);
    assert_eq!(Rig::local_networks(node, DEFAULT_ROUTE_PROTOCOL).expect("routes are listed"), []);
    assert!(!node.run(|| guard::remove(DEFAULT_ROUTE_PROTOCOL)).expect("it may be asked for"), "there is none left");
}

fn given_routes_that_go_at_exit_when_the_relay_ends_then_the_guard_goes_too() {
    let started = Guarded::start(&TABLE, |command| {
        command.args(["--vip-routes-at-exit", "remove"]);
    });
    let Some(mut guarded) = started else { return };

    guarded.stage.end(Signal::TERM);

    expect_gone(&guarded.stage);
}

fn given_no_right_to_guard_when_routes_of_the_last_run_are_there_then_that_is_said() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let mut stage = Stage::start_bare(rig, &web, |_| ());
    stage.end(Signal::KILL);

    stage.start_again(|command| with_only(CapabilitySet::NET_BIND_SERVICE, command));

    let is_said = |log: &str| log.lines().any(|line| line.contains("no guard") && line.contains("CAP_NET_ADMIN"));
    until("it is said, with the remedy", || is_said(&stage.log()));
    stage.served(stage.rig.client(), ClusterIp, &LOCAL);
}

fn given_ten_thousand_addresses_when_required_then_they_are_guarded_soon() {
    let rig = rig();
    if !has_nf_tables(&rig) {
        return;
    }

    // A machine that has other things to do as well gets another try.
    let mut tries = (0..3).map(|_| guard_and_remove(rig.node(0), VipGuard::Auto, 10_000));

    assert!(tries.any(|guarded| guarded < SOON), "never within {SOON:?}");
}

/// How long it takes to make so many addresses local, and to guard them from what listens on all. All goes after that.
pub(crate) fn guard_and_remove(node: &Namespace, how: VipGuard, count: u16) -> Duration {
    let address = |number: u16| -> IpAddr {
        let [high, low] = number.to_be_bytes();
        if number.is_multiple_of(2) { [10, 97, high, low].into() } else { [0xfd97, 0, 0, 0, 0, 0, 0, number].into() }
    };
    let _sshd = Everywhere::start(node);
    let wanted = (0..count).map(|number| Wanted { address: address(number), announced: false }).collect();

    let (local, guarded) = in_runtime(node, async move {
        let (protocol, linger) = (DEFAULT_ROUTE_PROTOCOL, DEFAULT_VIP_ROUTES_LINGER);
        PROCESS.guarded_addresses.set(0); // Of the last try, until the guard has looked.
        let guard = Guard::start(how, protocol);
        let vips = Vips::start(VipOptions { protocol, linger, at_exit: AtExit::Remove, tune_sysctls: false });
        let began = Instant::now();
        let _granted = vips.require(wanted).await;
        let local = began.elapsed();
        while PROCESS.guarded_addresses.get() < u64::from(count) {
            assert!(began.elapsed() < Duration::from_secs(20), "{} are guarded", PROCESS.guarded_addresses.get());
            tokio::task::yield_now().await;
        }
        let guarded = began.elapsed();
        for trap in [0, 1, count - 2, count - 1].map(|number| SocketAddr::new(address(number), WILDCARD_PORT)) {
            let asked = timeout(Duration::from_millis(200), tokio::net::TcpStream::connect(trap)).await;
            assert!(!matches!(asked, Ok(Ok(_))), "nobody answers at {trap}");
        }
        vips.end().await;
        guard.end().await;
        (local, guarded)
    });

    println!("{count} addresses are local after {local:?}, guarded after {guarded:?}");
    assert!(!node.run(|| guard::remove(DEFAULT_ROUTE_PROTOCOL)).expect("it may be asked for"), "all went at the end");
    guarded
}

fn in_runtime<T: Send>(node: &Namespace, work: impl Future<Output = T> + Send) -> T {
    let outcome = node.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(work))
    });
    outcome.expect("the namespace is ours")
}
