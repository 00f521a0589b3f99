//! Scripted backends: each does one thing that real ones do, at a known address.

use std::io;
use std::net::{SocketAddr, TcpStream as BlockingStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::within;

/// What a TCP backend does with each connection.
#[derive(Clone, Copy, Debug)]
pub enum Script {
    /// Gives back every byte, and the end of the stream.
    Echo,
    /// Answers each line with its own address.
    Name,
    /// Reads everything, says nothing.
    Silent,
    /// Resets the connection at the first byte.
    Reset,
    /// Reads to the end, then tells how many bytes came.
    CountThenAnswer,
    /// Says a word, closes its writing side, then echoes nothing and reads to the end.
    HalfClose,
}

/// A TCP backend. Stops, with all its connections, when dropped.
pub struct Backend {
    /// Where it listens.
    pub address: SocketAddr,
    ended: mpsc::UnboundedReceiver<io::Result<()>>,
    stop: CancellationToken,
}

impl Backend {
    /// Starts a backend.
    pub async fn start(address: SocketAddr, script: Script) -> Self {
        Self::on(TcpListener::bind(address).await.expect("the test's own address is free"), script)
    }

    fn on(listener: TcpListener, script: Script) -> Self {
        let address = listener.local_addr().expect("it is bound");
        let stop = CancellationToken::new();
        let (report, ended) = mpsc::unbounded_channel();
        tokio::spawn(serve(listener, script, report, stop.clone()));
        Self { address, ended, stop }
    }

    /// Starts a backend that tells its name.
    pub async fn named(address: SocketAddr) -> Self {
        Self::start(address, Script::Name).await
    }

    /// How the next of its connections ended: an error where the peer reset it.
    pub async fn end_of_connection(&mut self) -> io::Result<()> {
        within("a connection to end at the backend", self.ended.recv()).await.expect("the backend runs")
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn serve(
    listener: TcpListener,
    script: Script,
    report: mpsc::UnboundedSender<io::Result<()>>,
    stop: CancellationToken,
) {
    let mut connections = JoinSet::new(); // Dropped at the end, and the connections with it.
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                let report = report.clone();
                connections.spawn(async move {
                    // Nobody listens where a test is not interested in ends.
                    let _ = report.send(play(script, stream).await);
                });
            }
        }
    }
}

async fn play(script: Script, mut stream: TcpStream) -> io::Result<()> {
    match script {
        Script::Echo => {
            let (mut read, mut write) = stream.split();
            tokio::io::copy(&mut read, &mut write).await?;
            write.shutdown().await
        }
        Script::Name => answer_lines(stream).await,
        Script::Silent => read_to_end(&mut stream).await.map(drop),
        Script::Reset => {
            stream.read_u8().await?;
            reset_on_drop(&stream)
        }
        Script::CountThenAnswer => {
            let count = read_to_end(&mut stream).await?;
            stream.write_all(format!("{count} bytes").as_bytes()).await?;
            stream.shutdown().await
        }
        Script::HalfClose => {
            stream.write_all(b"that was all").await?;
            stream.shutdown().await?;
            read_to_end(&mut stream).await.map(drop)
        }
    }
}

async fn answer_lines(mut stream: TcpStream) -> io::Result<()> {
    let name = format!("{}\n", stream.local_addr()?);
    let mut buffer = [0; 256];
    loop {
        let length = stream.read(&mut buffer).await?;
        if length == 0 {
            return stream.shutdown().await;
        }
        for _ in buffer[..length].iter().filter(|byte| **byte == b'\n') {
            stream.write_all(name.as_bytes()).await?;
        }
    }
}

async fn read_to_end(stream: &mut TcpStream) -> io::Result<u64> {
    tokio::io::copy(stream, &mut tokio::io::sink()).await
}

/// Makes the close of this socket a reset.
pub fn reset_on_drop(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).set_linger(Some(Duration::ZERO))
}

/// An address that refuses connections, and that nobody else can take meanwhile.
pub fn refusing(address: SocketAddr) -> Socket {
    let socket = tcp_socket(address);
    socket.bind(&address.into()).expect("the test's own address is free");
    socket
}

/// An address that does not answer SYNs: a listener whose queue is full for ever.
pub struct BlackHole {
    listener: Socket,
    queue: Vec<BlockingStream>,
}

impl BlackHole {
    /// Opens a black hole.
    pub fn open(address: SocketAddr) -> Self {
        let listener = tcp_socket(address);
        listener.bind(&address.into()).expect("the test's own address is free");
        listener.listen(0).expect("a bound socket can listen");
        let connect = || BlockingStream::connect_timeout(&address, Duration::from_millis(100)).ok();
        let queue: Vec<_> = std::iter::from_fn(connect).take(16).collect();
        assert!(queue.len() < 16, "the queue of {address} does not fill");
        Self { listener, queue }
    }

    /// Has a backend answer from now on: who has waited until then is let in as it tries again.
    pub fn open_up(self, script: Script) -> Backend {
        let Self { listener, queue } = self;
        drop(queue); // First: who ends first keeps its port for a minute, and this one is to be free for the next test.
        listener.set_nonblocking(true).expect("an option");
        while listener.accept().is_ok() {}
        listener.listen(128).expect("it listens");
        Backend::on(TcpListener::from_std(listener.into()).expect("a listener"), script)
    }
}

fn tcp_socket(address: SocketAddr) -> Socket {
    Socket::new(Domain::for_address(address), Type::STREAM, None).expect("a socket can be made")
}

/// What a UDP backend does with each datagram.
#[derive(Clone, Copy, Debug)]
pub enum Talk {
    /// Gives it back.
    Echo,
    /// Answers with its own address and the source port that it saw.
    Name,
    /// Keeps it.
    Silent,
    /// Gives it back after a pause.
    Late(Duration),
    /// Gives it back many times, with a pause before each.
    Repeat {
        /// How often.
        times: u32,
        /// The pause.
        pause: Duration,
    },
}

/// A UDP backend. Stops when dropped.
pub struct Talker {
    /// Where it listens.
    pub address: SocketAddr,
    received: Arc<Mutex<Vec<Vec<u8>>>>,
    stop: CancellationToken,
}

impl Talker {
    /// Starts a backend.
    pub async fn start(address: SocketAddr, talk: Talk) -> Self {
        let socket = Arc::new(UdpSocket::bind(address).await.expect("the test's own address is free"));
        let received = Arc::default();
        let stop = CancellationToken::new();
        tokio::spawn(listen(socket, talk, Arc::clone(&received), stop.clone()));
        Self { address, received, stop }
    }

    /// Starts a backend that tells its name.
    pub async fn named(address: SocketAddr) -> Self {
        Self::start(address, Talk::Name).await
    }

    /// True once a datagram with this payload has come.
    pub fn has_received(&self, payload: &[u8]) -> bool {
        self.received.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|received| received == payload)
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn listen(socket: Arc<UdpSocket>, talk: Talk, received: Arc<Mutex<Vec<Vec<u8>>>>, stop: CancellationToken) {
    let mut answers = JoinSet::new();
    let mut buffer = vec![0; 65_536];
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            Some(_) = answers.join_next() => {}
            datagram = socket.recv_from(&mut buffer) => {
                // An error tells of a port that closed behind an earlier answer.
                let Ok((length, peer)) = datagram else { continue };
                let payload = buffer[..length].to_vec();
                received.lock().unwrap_or_else(PoisonError::into_inner).push(payload.clone());
                answers.spawn(answer(Arc::clone(&socket), talk, payload, peer));
            }
        }
    }
}

async fn answer(socket: Arc<UdpSocket>, talk: Talk, payload: Vec<u8>, peer: SocketAddr) -> io::Result<()> {
    let (answer, times, pause) = match talk {
        Talk::Silent => return Ok(()),
        Talk::Echo => (payload, 1, Duration::ZERO),
        Talk::Name => (format!("{} {}", socket.local_addr()?, peer.port()).into_bytes(), 1, Duration::ZERO),
        Talk::Late(pause) => (payload, 1, pause),
        Talk::Repeat { times, pause } => (payload, times, pause),
    };
    for _ in 0..times {
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        socket.send_to(&answer, peer).await?;
    }
    Ok(())
}
