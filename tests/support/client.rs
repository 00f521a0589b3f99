//! Clients: who answers, over TCP and UDP.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UdpSocket};

use super::within;

/// A new connection.
pub async fn connect(service: SocketAddr) -> io::Result<TcpStream> {
    within("a connection", TcpStream::connect(service)).await
}

/// The backend that answers a new connection.
pub async fn ask(service: SocketAddr) -> io::Result<SocketAddr> {
    let mut stream = connect(service).await?;
    ask_on(&mut stream).await
}

/// The backend that answers on an open connection.
pub async fn ask_on(stream: &mut TcpStream) -> io::Result<SocketAddr> {
    stream.write_all(b"who?\n").await?;
    let mut line = String::new();
    within("an answer", BufReader::new(stream).read_line(&mut line)).await?;
    line.trim_end().parse().map_err(|_| io::Error::new(io::ErrorKind::UnexpectedEof, format!("answered {line:?}")))
}

/// The backends that answer `count` new connections, one after the other.
pub async fn ask_times(count: usize, service: SocketAddr) -> Vec<SocketAddr> {
    let mut backends = Vec::with_capacity(count);
    for _ in 0..count {
        backends.push(ask(service).await.expect("a backend answers"));
    }
    backends
}

/// True where a new connection is refused.
pub async fn refused(service: SocketAddr) -> bool {
    connect(service).await.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// A client of a UDP Service, with one source port. It takes datagrams from the Service's address alone.
pub struct Caller(UdpSocket);

/// What a UDP backend of script `Name` answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The backend.
    pub backend: SocketAddr,
    /// The source port that it saw: the same as long as the flow is.
    pub source_port: u16,
}

impl Caller {
    /// A client with any source address.
    pub async fn new(service: SocketAddr) -> Self {
        let any: IpAddr = if service.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        Self::from_address(any, service).await
    }

    /// A client with a given source address.
    pub async fn from_address(source: IpAddr, service: SocketAddr) -> Self {
        let socket = UdpSocket::bind((source, 0)).await.expect("a source port is free");
        socket.connect(service).await.expect("loopback is reachable");
        Self(socket)
    }

    /// Sends a datagram. An error tells of an earlier one: nobody listens there.
    pub async fn send(&self, payload: &[u8]) -> io::Result<()> {
        self.0.send(payload).await.map(drop)
    }

    /// The next datagram.
    pub async fn receive(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; 65_536];
        let length = within("a datagram", self.0.recv(&mut buffer)).await?;
        buffer.truncate(length);
        Ok(buffer)
    }

    /// Sends a datagram and takes the answer.
    pub async fn exchange(&self, payload: &[u8]) -> io::Result<Vec<u8>> {
        self.send(payload).await?;
        self.receive().await
    }

    /// Who answers.
    pub async fn ask(&self) -> Answer {
        let answer = self.exchange(b"who?").await.expect("a backend answers");
        parse(&answer).expect("a backend of script `Name`")
    }

    /// Sends until somebody answers: what a client does that never stops.
    pub async fn ask_until_answered(&self) -> Answer {
        let mut pause = tokio::time::interval(std::time::Duration::from_millis(5));
        let mut buffer = [0; 256];
        within("an answer", async {
            loop {
                tokio::select! {
                    biased;
                    Ok(length) = self.0.recv(&mut buffer) => {
                        if let Some(answer) = parse(&buffer[..length]) {
                            return answer;
                        }
                    }
                    // Errors say that nobody listens yet.
                    _ = pause.tick() => { let _ = self.send(b"who?").await; }
                }
            }
        })
        .await
    }

    /// Sends until the port is unreachable: from then on nobody gets what is sent.
    pub async fn send_until_refused(&self, payload: &[u8]) {
        let mut pause = tokio::time::interval(std::time::Duration::from_millis(5));
        within("the port to be unreachable", async {
            loop {
                pause.tick().await;
                if self.send(payload).await.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
                    return;
                }
            }
        })
        .await;
    }
}

fn parse(answer: &[u8]) -> Option<Answer> {
    let (backend, port) = std::str::from_utf8(answer).ok()?.split_once(' ')?;
    Some(Answer { backend: backend.parse().ok()?, source_port: port.parse().ok()? })
}
