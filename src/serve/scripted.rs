//! Peers for the tests of this folder: backends that follow a script, and waiting with one deadline.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::time::Duration;

use async_task::Task;
use socket2::{Domain, SockRef, Socket, Type};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};

use crate::name::{BalancerKey, Family, ObjectName, Protocol, Scope, ServicePortName};
use crate::serve::balancer::{Backend, Balancer, PortState, Table};
use crate::serve::stream::Stream;
use crate::serve::worker;

/// No test waits longer for anything.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// Where backends and plain peers live.
pub(crate) const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Waits for a future.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, what).await.expect("in time")
}

/// Waits for a condition.
pub(crate) async fn until(mut condition: impl FnMut() -> bool) {
    soon(async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

/// Reads to the end of stream or to the error that stands in its place.
pub(crate) async fn read_all(stream: &mut TcpStream) -> (Vec<u8>, io::Result<()>) {
    let mut bytes = Vec::new();
    let outcome = soon(stream.read_to_end(&mut bytes)).await.map(|_| ());
    (bytes, outcome)
}

/// Waits for the reset of a connection, whatever comes before it.
pub(crate) async fn expect_reset(stream: &mut TcpStream) {
    let (_, outcome) = read_all(stream).await;
    assert_eq!(outcome.expect_err("a reset, not an end of stream").kind(), io::ErrorKind::ConnectionReset);
}

/// Waits for the reset that a client gets which is turned away, be it while it still connects.
pub(crate) async fn expect_turned_away(address: SocketAddr) {
    match soon(TcpStream::connect(address)).await {
        Ok(mut stream) => expect_reset(&mut stream).await,
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
    }
}

/// Closes a connection by reset.
pub(crate) fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("an option");
}

/// Two ends of one connection.
pub(crate) async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((LOOPBACK, 0)).await.expect("a free port");
    let address = listener.local_addr().expect("a bound socket");
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    (near.expect("a listener"), far.expect("a connection").0)
}

/// Runs a test on a thread that is a worker. Its peers are on a runtime beside it.
pub(crate) fn on_worker<T: 'static>(test: impl Future<Output = T> + 'static) -> T {
    static PEERS: LazyLock<Runtime> =
        LazyLock::new(|| Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads"));
    let _peers = PEERS.enter();
    worker::run_until_done(test)
}

/// A task of this worker that goes on when nobody waits for it.
pub(crate) struct Spawned<T>(Option<Task<T>>);

/// Begins a task on this worker.
pub(crate) fn spawn<T: 'static>(task: impl Future<Output = T> + 'static) -> Spawned<T> {
    Spawned(Some(worker::current().spawn_task(task)))
}

impl<T> Spawned<T> {
    /// Ends it where it stands.
    pub(crate) fn cancel(mut self) {
        drop(self.0.take());
    }
}

impl<T> Future for Spawned<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        Pin::new(self.0.as_mut().expect("not cancelled")).poll(cx)
    }
}

impl<T> Drop for Spawned<T> {
    fn drop(&mut self) {
        if let Some(task) = self.0.take() {
            task.detach();
        }
    }
}

/// A socket as the relay has it.
pub(crate) fn registered(stream: TcpStream) -> Stream {
    Stream::new(stream.into_std().expect("a registered socket").into()).expect("an event loop")
}

/// A backend that does the same for each connection.
pub(crate) async fn backend<S>(script: impl Fn(TcpStream) -> S + Send + 'static) -> SocketAddr
where
    S: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind((LOOPBACK, 0)).await.expect("a free port");
    let address = listener.local_addr().expect("a bound socket");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(script(stream));
        }
    });
    address
}

/// A backend that sends back what it gets, and its end of stream after the client's.
pub(crate) async fn echo() -> SocketAddr {
    backend(async |mut stream| {
        let (mut read, mut write) = stream.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
    })
    .await
}

/// A backend that says its name and closes.
pub(crate) async fn named(name: &'static str) -> SocketAddr {
    backend(async move |mut stream| {
        let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, name.as_bytes()).await;
        let _ = stream.read(&mut [0]).await;
    })
    .await
}

/// An address where nobody listens, for as long as the socket is held.
pub(crate) fn refusing() -> (Socket, SocketAddr) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.bind(&SocketAddr::new(LOOPBACK, 0).into()).expect("a free port");
    let address = socket.local_addr().expect("a bound socket").as_socket().expect("an IP address");
    (socket, address)
}

/// An address that does not answer, for as long as the sockets are held: its queue of one is full, and Linux drops
/// what comes then.
pub(crate) fn black_hole() -> (Vec<Socket>, SocketAddr) {
    let (listener, address) = refusing();
    listener.listen(0).expect("a bound socket");
    let mut held = vec![listener];
    for _ in 0..10 {
        let client = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        let silent = client.connect_timeout(&address.into(), Duration::from_millis(100)).is_err();
        held.push(client);
        if silent {
            return (held, address);
        }
    }
    panic!("a queue of one does not fill up");
}

/// A backend with an id that is its place in the list, from 0.
pub(crate) fn backends<const N: usize>(addresses: [SocketAddr; N]) -> [Arc<Backend>; N] {
    let mut ids = 0..;
    addresses.map(|address| Arc::new(Backend::new(ids.next().expect("enough numbers"), address)))
}

/// A balancer over backends.
pub(crate) fn balancer(backends: &[Arc<Backend>]) -> Arc<Balancer> {
    let service = ObjectName::new("default", "web");
    let name = ServicePortName::new(service, "http", Protocol::Tcp);
    let port = Arc::new(PortState::new(name.clone()));
    let key = BalancerKey { port: name, family: Family::V4, scope: Scope::Cluster };
    Arc::new(Balancer::new(key, port, Table::new(backends.to_vec().into(), &[])))
}
