//! UDP flows that go from one process to another, through real sockets.

use super::*;

/// A UDP listener that several processes have, and a client of it.
struct Datagrams {
    key: ListenKey,
    socket: UdpSocket,
}

impl Datagrams {
    fn at(number: u8) -> Self {
        let key = ListenKey::new([127, 86, 1, number].into(), 7600, Protocol::Udp);
        Self { key, socket: crate::serve::udp::bind_udp(key.address()).expect("a free address") }
    }

    fn serve(&self, process: &Process) -> UdpServer {
        let copy = self.socket.try_clone().expect("a descriptor");
        let server = process.udp.add(self.key, vec![copy], Arc::clone(&process.target), &UdpSettings::default());
        process.udp.flush();
        server
    }

    fn client(&self) -> UdpSocket {
        let client = plain();
        client.connect(self.key.address()).expect("an address");
        client
    }
}

fn plain() -> UdpSocket {
    let socket = UdpSocket::bind((LOOPBACK, 0)).expect("a free port");
    socket.set_read_timeout(Some(Duration::from_secs(20))).expect("an option");
    socket
}

fn heard(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut bytes = [0; 64];
    let (count, from) = socket.recv_from(&mut bytes).expect("a datagram");
    (bytes[..count].to_vec(), from)
}

/// A listener with clients, each of which has a flow, and their backends.
struct Flows {
    listener: Datagrams,
    clients: Vec<UdpSocket>,
    backends: [UdpSocket; 3],
    /// Where each client's datagrams come from, as its backend sees it.
    sources: Vec<SocketAddr>,
}

impl Flows {
    fn begin(number: u8) -> (Self, Process, Process) {
        let backends = [plain(), plain(), plain()];
        let addresses: Vec<_> = backends.iter().map(|backend| backend.local_addr().expect("bound")).collect();
        let (old, new) = (Process::serving(&addresses), Process::serving(&addresses));
        let listener = Datagrams::at(number);
        listener.serve(&old);
        let clients: Vec<_> = (0..12).map(|_| listener.client()).collect();
        let first = |(number, client): (usize, &UdpSocket)| {
            client.send(b"first").expect("sent");
            heard(&backends[number % 3]).1
        };
        let sources = clients.iter().enumerate().map(first).collect();
        (Self { listener, clients, backends, sources }, old, new)
    }

    fn ask(&self, word: &str) {
        for (number, client) in self.clients.iter().enumerate() {
            client.send(format!("{word} {number}").as_bytes()).expect("sent");
        }
    }

    fn answer(&self) {
        for (number, source) in self.sources.iter().enumerate() {
            self.backends[number % 3].send_to(format!("answer {number}").as_bytes(), source).expect("sent");
        }
    }

    /// Each backend hears its own clients, from where it has heard them before.
    fn assert_asked(&self, word: &str) {
        for (place, backend) in self.backends.iter().enumerate() {
            let asked: BTreeSet<_> = (0..4).map(|_| heard(backend)).collect();
            let its = self.sources.iter().enumerate().filter(|(number, _)| number % 3 == place);
            let expected = its.map(|(number, source)| (format!("{word} {number}").into_bytes(), *source)).collect();
            assert_eq!(asked, expected);
        }
    }

    fn assert_answered(&self) {
        for (number, client) in self.clients.iter().enumerate() {
            assert_eq!(heard(client), (format!("answer {number}").into_bytes(), self.listener.key.address()));
        }
    }
}

fn flows(process: &Process) -> (u64, u64) {
    let stats = || process.backends.iter().map(|backend| &backend.stats);
    (stats().map(|stats| stats.flows.get()).sum(), stats().map(|stats| stats.active_flows.get()).sum())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t192_f25_given_udp_flows_when_they_are_handed_over_then_they_keep_backend_and_port_and_lose_no_datagram() {
    let (talk, old, new) = Flows::begin(1);

    let exporter = Exporter::freeze(old.estate(), Instant::now()).expect("threads that answer");
    talk.answer(); // On their way while nobody looks.
    talk.ask("question");
    let (importer, _) = take(&exporter, new.estate());
    let committed = importer.commit();
    exporter.release().expect("threads that answer");
    talk.listener.serve(&new);
    let taken = committed.finish();

    assert_eq!((taken.streams, taken.flows), (0, 12));
    talk.assert_answered();
    talk.assert_asked("question");
    talk.ask("again");
    talk.assert_asked("again");
    talk.answer();
    talk.assert_answered();
    assert_eq!((flows(&new), flows(&old).1), ((12, 12), 0), "none began anew");
    assert_eq!(new.balancer.port.stats.accepted.get(), 12);
    old.assert_that_nothing_broke();
    new.assert_that_nothing_broke();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f25_given_udp_flows_when_a_hand_over_fails_then_they_go_on_in_the_old_process() {
    let (talk, old, new) = Flows::begin(2);

    let exporter = Exporter::freeze(old.estate(), Instant::now()).expect("threads that answer");
    talk.answer();
    talk.ask("question");
    drop(take(&exporter, new.estate()));
    drop(exporter);

    talk.assert_answered();
    talk.assert_asked("question");
    assert_eq!((flows(&old), flows(&new)), ((12, 12), (0, 0)));
    old.assert_that_nothing_broke();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t192_given_udp_flows_whose_listener_does_not_come_when_handed_over_then_they_end() {
    let (talk, old, new) = Flows::begin(3);

    let (taken, _) = hand_over(&old, &new);

    assert_eq!((taken.flows, flows(&new)), (0, (12, 0)));
    assert_eq!(new.closed(CloseReason::Drain), 12);
    let port = talk.sources[0].port();
    until(|| UdpSocket::bind((LOOPBACK, port)).is_ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t192_given_a_flow_whose_endpoint_has_left_when_handed_over_then_its_answer_comes_and_then_it_goes_elsewhere() {
    let (talk, old, _) = Flows::begin(4);
    let remaining = talk.backends[1].local_addr().expect("bound");
    let new = Process::serving(&[remaining]);

    let exporter = Exporter::freeze(old.estate(), Instant::now()).expect("threads that answer");
    let (importer, _) = take(&exporter, new.estate());
    let committed = importer.commit();
    exporter.release().expect("threads that answer");
    talk.listener.serve(&new);
    assert_eq!(committed.finish().flows, 12);

    talk.answer();
    talk.assert_answered();
    talk.clients[0].send(b"elsewhere").expect("sent");
    assert_eq!(heard(&talk.backends[1]).0, b"elsewhere");
}
