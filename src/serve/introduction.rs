//! Who a client is: the peer of its connection, or whom a balancer in front names in a header (PROXY protocol).
//!
//! Where a Service has balancers in front, the peer's address alone decides what its connection begins with, so nobody has
//! to guess:
//!
//! | peer | its connection |
//! |---|---|
//! | one of the balancers | begins with a header; without one, with a wrong or a late one it is reset |
//! | anybody else | is reset; its first bytes are not even looked at |
//!
//! From the header on, its client is *the* client: for source ranges and allow-lists, inside or outside, session affinity,
//! logs, and the header towards the backend. A balancer that names nobody (its health check, `LOCAL`, `UNKNOWN`) is the client
//! itself, and has to be in the lists as one. A client cannot forge its address: the header of a stranger is never read, and
//! what follows a balancer's header is payload. That is as good as the balancer's address: who can send from it is believed.
//!
//! The lists are asked when the header is there, as they are then, and so is whether the balancer is one still and the listener
//! the same Service's. The kernel's `filter` knows the balancer's address alone, so whom the lists do not have is reset here,
//! where others get no answer. But where clients from outside get none (`externalTrafficPolicy: Local` without an endpoint
//! here), balancers get none either: one that is let in takes this node for one that serves.
//!
//! A balancer that waits with its header holds what any connection holds, a place among those that are open included, and
//! for [`TcpOptions::header_timeout`](crate::serve::tcp::TcpOptions) at most.
//!
//! Which peer is which is the rule of `entrance`; how a header is taken apart is `header_decoder`.

use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tracing::debug;

use crate::entrance::Arrival;
use crate::plan::HeaderVersion;
use crate::serve::balancer::{Balancer, PortState};
use crate::serve::deadline::{before, within_a_turn};
use crate::serve::header_decoder::{Decoder, Header};
use crate::serve::proxy_header::{Parties, Preface};
use crate::serve::stream::Stream;
use crate::serve::{Target, TargetCell, Verdict};
use crate::stats::DropReason;

/// How much is looked at in one go: more than a header has that names no certificates.
const GLANCE_BYTES: usize = 512;

/// What follows from a peer's address alone, for one that is not turned away for it.
#[derive(Debug)]
pub(super) enum Admission {
    /// It is the client, and this balancer serves it.
    Granted {
        /// Who chooses its backend.
        balancer: Arc<Balancer>,
        /// The header that its backend gets.
        send: Option<HeaderVersion>,
    },
    /// It is a balancer in front: its header says who the client is, and then the listener's target judges.
    Announced(TargetCell),
}

/// A client that is served, and as who.
#[derive(Debug)]
pub(super) struct Introduced {
    /// Who chooses its backend.
    pub(super) balancer: Arc<Balancer>,
    /// What its backend gets before its first byte.
    pub(super) preface: Option<Box<Preface>>,
}

impl Introduced {
    fn new(balancer: Arc<Balancer>, send: Option<HeaderVersion>, parties: &Parties) -> Self {
        Self { balancer, preface: send.map(|version| Box::new(Preface::of(version, parties))) }
    }
}

impl Admission {
    /// Judges a peer by its address. `target` is what the listener's cell holds now.
    ///
    /// # Errors
    /// Why it has to be turned away.
    pub(super) fn of(cell: &TargetCell, target: &Target, peer: SocketAddr) -> Result<Self, DropReason> {
        match Arrival::of(peer.ip(), target.balancers_in_front()) {
            Arrival::Announced if matches!(target.outside, Verdict::Drop) => Err(DropReason::NoLocalEndpoints),
            Arrival::Announced => Ok(Self::Announced(Arc::clone(cell))),
            Arrival::Unannounced => Err(DropReason::UnknownBalancer),
            Arrival::InPerson => {
                let balancer = Arc::clone(target.balancer_for(peer.ip())?);
                Ok(Self::Granted { balancer, send: target.header_to_backends() })
            }
        }
    }

    /// Finds out who the client is, and where it wanted to go. `parties`: the two ends of the connection as the kernel has
    /// them; `limit`: how long a header may take to its last byte.
    ///
    /// # Errors
    /// Why it has to be turned away.
    pub(super) async fn parties(
        &self,
        stream: &Stream,
        parties: Parties,
        limit: Duration,
    ) -> Result<Parties, DropReason> {
        match self {
            Self::Granted { .. } => Ok(parties),
            // In a box, as few have it.
            Self::Announced(_) => Ok(match Box::pin(ask(stream, parties.client, limit)).await? {
                Header::Own => parties, // The balancer's own connection.
                Header::Passed(passed) => passed,
            }),
        }
    }

    /// Judges the client by what is known of it now. `peer` and `port`: whose connection it is, and to which ServicePort it
    /// came.
    ///
    /// # Errors
    /// Why it has to be turned away.
    pub(super) fn judge(
        self,
        peer: IpAddr,
        port: &Arc<PortState>,
        parties: &Parties,
    ) -> Result<Introduced, DropReason> {
        match self {
            Self::Granted { balancer, send } => Ok(Introduced::new(balancer, send, parties)),
            Self::Announced(cell) => {
                let target = cell.load();
                let asks = Arrival::of(peer, target.balancers_in_front()) == Arrival::Announced;
                if !asks || !Arc::ptr_eq(&target.port, port) {
                    // Since it came, the listener has become another Service's, or asks nobody any more.
                    return Err(DropReason::UnknownBalancer);
                }
                let balancer = Arc::clone(target.balancer_for(parties.client.ip())?);
                Ok(Introduced::new(balancer, target.header_to_backends(), parties))
            }
        }
    }
}

/// Waits for a header, for so long. Most come with the connection, and then no timer has to be set and cleared.
async fn ask(stream: &Stream, peer: SocketAddr, limit: Duration) -> Result<Header, DropReason> {
    let end = Instant::now() + limit;
    let mut reading = pin!(read_header(stream, peer));
    let header = match within_a_turn(reading.as_mut()).await {
        Some(header) => Some(header),
        None => before(end, reading).await,
    };
    header.unwrap_or(Err(DropReason::ProxyHeader))
}

/// Reads a header and nothing behind it.
async fn read_header(stream: &Stream, peer: SocketAddr) -> Result<Header, DropReason> {
    let mut decoder = Decoder::default();
    poll_fn(|cx| poll_header(cx, stream, &mut decoder, peer)).await
}

/// What comes is looked at first, and taken as far as it belongs to the header: the rest stays where it is, for the relay.
fn poll_header(
    cx: &mut Context<'_>,
    stream: &Stream,
    decoder: &mut Decoder,
    peer: SocketAddr,
) -> Poll<Result<Header, DropReason>> {
    let mut shown = [0; GLANCE_BYTES]; // Only within a poll: a connection that waits holds what the decoder does.
    loop {
        let count = match ready!(stream.poll_peek(cx, &mut shown)) {
            // Some balancers look whether somebody listens, and say nothing.
            Ok(0) if decoder.has_begun() => return Poll::Ready(Err(DropReason::ProxyHeader)),
            Ok(0) | Err(_) => return Poll::Ready(Err(DropReason::ClientAbort)),
            Ok(count) => count,
        };
        let decoded = match decoder.decode(&shown[..count]) {
            Ok(decoded) => decoded,
            Err(error) => {
                debug!(%peer, %error, "balancer not understood");
                return Poll::Ready(Err(DropReason::ProxyHeader));
            }
        };
        debug_assert!(decoded.header.is_some() || decoded.taken > 0, "else this would never end");
        if stream.take_shown(&mut shown[..decoded.taken]).is_err() {
            return Poll::Ready(Err(DropReason::ClientAbort));
        }
        if let Some(header) = decoded.header {
            return Poll::Ready(Ok(header));
        }
    }
}

#[cfg(test)]
mod tests {
    use arc_swap::ArcSwap;
    use ipnet::IpNet;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpStream;

    use super::*;
    use crate::plan::ProxyProtocol;
    use crate::serve::scripted::{backends, balancer, on_worker, pair, registered, reset, soon};

    const BALANCER: [u8; 4] = [10, 0, 0, 9];
    const STRANGER: [u8; 4] = [198, 51, 100, 66];
    const POD: [u8; 4] = [10, 244, 0, 5];

    fn at(ip: [u8; 4], port: u16) -> SocketAddr {
        (ip, port).into()
    }

    fn net(text: &str) -> IpNet {
        text.parse().expect("a network")
    }

    /// Behind one balancer in front: for a network of clients, and for pods.
    fn target() -> Target {
        let balancer = balancer(&backends([at([192, 0, 2, 1], 80)]));
        let protocol = ProxyProtocol { send: Some(HeaderVersion::V1), accept_from: Some([net("10.0.0.9/32")].into()) };
        Target {
            inside_of: [net("10.244.0.0/16")].into(),
            allow_from: Some([net("203.0.113.0/24"), net("2001:db8::/32")].into()),
            proxy_protocol: Some(Arc::new(protocol)),
            ..Target::serving(&balancer)
        }
    }

    fn cell() -> TargetCell {
        Arc::new(ArcSwap::from_pointee(target()))
    }

    fn admission(cell: &TargetCell, peer: impl Into<IpAddr>) -> Result<Admission, DropReason> {
        Admission::of(cell, &cell.load(), SocketAddr::new(peer.into(), 40_000))
    }

    /// What becomes of a balancer's connection to which this is done, and the client's end of it.
    async fn introduced(
        limit: Duration,
        script: impl AsyncFnOnce(&mut TcpStream),
    ) -> (Result<(Introduced, Parties), DropReason>, TcpStream, Stream) {
        let (mut far, near) = pair().await;
        near.set_nodelay(true).expect("an option");
        let (stream, cell) = (registered(near), cell());
        let port = Arc::clone(&cell.load().port);
        let admission = admission(&cell, BALANCER).expect("a balancer");
        let hearing = admission.parties(&stream, ends(), limit);
        let (heard, ()) = soon(async { tokio::join!(hearing, script(&mut far)) }).await;
        let judged = heard.and_then(|parties| Ok((admission.judge(BALANCER.into(), &port, &parties)?, parties)));
        (judged, far, stream)
    }

    /// The ends of a balancer's connection.
    fn ends() -> Parties {
        Parties { client: at(BALANCER, 40_000), destination: at([10, 96, 0, 10], 80) }
    }

    const LONG: Duration = Duration::from_secs(3_600);

    async fn judged(bytes: &[u8]) -> Result<SocketAddr, DropReason> {
        let sent = async |far: &mut TcpStream| far.write_all(bytes).await.expect("a connection");
        introduced(LONG, sent).await.0.map(|(_, parties)| parties.client)
    }

    #[test]
    fn given_peers_when_judged_then_balancers_are_asked_for_a_header_and_all_others_are_turned_away() {
        let cell = cell();

        assert!(matches!(admission(&cell, BALANCER), Ok(Admission::Announced(_))));
        for stranger in [STRANGER, [203, 0, 113, 7], POD] {
            let reason = admission(&cell, stranger).expect_err("no balancer");
            assert_eq!(reason, DropReason::UnknownBalancer, "{stranger:?}, in the lists or not");
        }
    }

    #[test]
    fn given_a_service_without_balancers_when_judged_then_the_peer_is_the_client() {
        let protocol = ProxyProtocol { send: Some(HeaderVersion::V2), accept_from: None };
        let target = Target { proxy_protocol: Some(Arc::new(protocol)), ..target() };
        let cell = Arc::new(ArcSwap::from_pointee(target));

        let granted = admission(&cell, POD).expect("a pod");

        assert!(matches!(granted, Admission::Granted { send: Some(HeaderVersion::V2), .. }));
        assert_eq!(admission(&cell, STRANGER).expect_err("in no list"), DropReason::DeniedAddress);
    }

    #[test]
    fn given_a_node_that_may_not_serve_those_outside_when_balancers_come_then_they_are_not_let_in() {
        let cell = Arc::new(ArcSwap::from_pointee(Target { outside: Verdict::Drop, ..target() }));

        assert_eq!(admission(&cell, BALANCER).expect_err("no endpoint here"), DropReason::NoLocalEndpoints);
    }

    #[test]
    fn given_a_listener_that_changes_when_the_header_comes_then_it_is_judged_as_it_is_now() {
        let (before, client) = (target(), at([203, 0, 113, 7], 40_000));
        let port = Arc::clone(&before.port);
        let other_list = Some([net("192.0.2.0/24")].into());
        let changes = [
            (Target { port: Arc::clone(&port), ..target() }, None),
            (Target { port: Arc::clone(&port), allow_from: other_list, ..target() }, Some(DropReason::DeniedAddress)),
            (
                Target { port: Arc::clone(&port), proxy_protocol: None, ..target() },
                Some(DropReason::UnknownBalancer), // It asks nobody any more.
            ),
            (target(), Some(DropReason::UnknownBalancer)), // Another ServicePort's.
        ];
        let cell = Arc::new(ArcSwap::from_pointee(before));
        for (after, expected) in changes {
            let admission = admission(&cell, BALANCER).expect("a balancer");

            let before = cell.swap(Arc::new(after));
            let judged = admission.judge(BALANCER.into(), &port, &Parties { client, ..ends() });

            assert_eq!(judged.err(), expected);
            cell.store(before);
        }
    }

    #[test]
    fn given_headers_when_read_then_their_clients_are_judged_by_the_lists() {
        on_worker(async {
            let line = |client: &str| format!("PROXY TCP4 {client} 192.0.2.80 40000 80\r\n").into_bytes();

            assert_eq!(judged(&line("203.0.113.7")).await, Ok(at([203, 0, 113, 7], 40_000)));
            assert_eq!(judged(&line("10.244.0.5")).await, Ok(at(POD, 40_000)), "a pod that took the way round");
            assert_eq!(judged(&line("198.51.100.66")).await, Err(DropReason::DeniedAddress));
            let v6 = b"PROXY TCP6 2001:db8::7 2001:db8::80 40000 80\r\n";
            assert_eq!(judged(v6).await, Ok("[2001:db8::7]:40000".parse().expect("an address")), "of the other family");
            assert_eq!(judged(b"PROXY UNKNOWN\r\n").await, Err(DropReason::DeniedAddress), "as the balancer itself");
        });
    }

    #[test]
    fn given_a_balancer_without_a_header_when_read_then_it_is_turned_away() {
        on_worker(async {
            assert_eq!(judged(b"GET / HTTP/1.1\r\n").await, Err(DropReason::ProxyHeader));
            assert_eq!(judged(b"PROXY TCP4 203.0.113.7\r\n").await, Err(DropReason::ProxyHeader));
        });
    }

    #[test]
    fn given_a_balancer_that_says_nothing_or_too_slowly_when_the_time_is_over_then_it_is_turned_away() {
        on_worker(async {
            let limit = Duration::from_millis(20);

            let (silent, ..) = introduced(limit, async |_| {}).await;
            let (slow, ..) = introduced(limit, async |far| far.write_all(b"PROXY TC").await.expect("sent")).await;

            assert_eq!(silent.expect_err("nothing"), DropReason::ProxyHeader);
            assert_eq!(slow.expect_err("a half"), DropReason::ProxyHeader);
        });
    }

    #[test]
    fn given_a_balancer_that_ends_when_read_then_it_is_an_abort_and_within_its_header_a_mistake() {
        on_worker(async {
            let ended = async |far: &mut TcpStream| far.shutdown().await.expect("a connection");
            let torn = async |far: &mut TcpStream| {
                far.write_all(b"PROXY TC").await.expect("a connection");
                far.shutdown().await.expect("a connection");
            };

            assert_eq!(introduced(LONG, ended).await.0.expect_err("an end"), DropReason::ClientAbort);
            assert_eq!(introduced(LONG, torn).await.0.expect_err("an end"), DropReason::ProxyHeader);
        });
    }

    #[test]
    fn given_a_header_in_pieces_when_read_then_not_one_byte_behind_it_is_taken() {
        on_worker(async {
            let sent = async |far: &mut TcpStream| {
                far.set_nodelay(true).expect("an option");
                for piece in b"PROXY TCP4 203.0.113.7 192.0.2.80 40000 80\r\nPROXY payload".chunks(5) {
                    far.write_all(piece).await.expect("a connection");
                    tokio::task::yield_now().await;
                }
            };

            let (outcome, far, stream) = introduced(LONG, sent).await;

            let (introduced, parties) = outcome.expect("a client");
            assert_eq!(parties.destination, at([192, 0, 2, 80], 80), "where the client wanted to go");
            let preface = introduced.preface.expect("backends want one");
            assert_eq!(preface.as_bytes(), b"PROXY TCP4 203.0.113.7 192.0.2.80 40000 80\r\n", "onwards");
            let mut payload = [0; 13];
            let mut read = 0;
            while read < payload.len() {
                read += soon(poll_fn(|cx| stream.poll_receive(cx, &mut payload[read..]))).await.expect("the payload");
            }
            assert_eq!(&payload, b"PROXY payload");
            drop(far);
        });
    }

    #[test]
    fn given_a_balancer_that_resets_when_read_then_it_is_an_abort() {
        on_worker(async {
            let (far, near) = pair().await;
            let stream = registered(near);
            let admission = admission(&cell(), BALANCER).expect("a balancer");
            reset(far);

            let heard = soon(admission.parties(&stream, ends(), LONG)).await;

            assert_eq!(heard.expect_err("a reset"), DropReason::ClientAbort);
        });
    }
}
