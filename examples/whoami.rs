//! Three whoami servers behind one Service: proves the rotation, then serves until Ctrl-C.
//!
//! `cargo run --release --example whoami`, with `-- --once` to stop after the proof (exit code 0 or 1).
//! The Service is `examples/whoami.yaml`; the three servers run in this process, on loopback, without root.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use kube_relay::admin::{self, AdminOptions};
use kube_relay::allocate::Ranges;
use kube_relay::control::{Relay, RelayOptions};
use kube_relay::lifecycle::Readiness;
use kube_relay::manifest::{self, Source};
use kube_relay::name::{ObjectName, Protocol};
use kube_relay::plan::{ListenerKind, PlanOptions};
use kube_relay::status::Status;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/whoami.yaml");
/// The endpoints of the manifest, in its order: `whoami-1` and so on.
const BACKENDS: [Ipv4Addr; 3] =
    [Ipv4Addr::new(127, 244, 1, 1), Ipv4Addr::new(127, 244, 1, 2), Ipv4Addr::new(127, 244, 1, 3)];
const BACKEND_PORT: u16 = 8000;
const ROUNDS: usize = 6;
/// Everything here is on loopback: what takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let once = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => false,
        ["--once"] => true,
        _ => {
            eprintln!("usage: whoami [--once]");
            return ExitCode::from(64);
        }
    };
    match run(once).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("whoami: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(once: bool) -> Result<()> {
    for (index, address) in BACKENDS.into_iter().enumerate() {
        start_backend(format!("whoami-{}", index + 1), SocketAddr::from((address, BACKEND_PORT))).await?;
    }
    let relay = start_relay().await?;
    let entries = entries(&relay).await?;
    let admin = admin::start(AdminOptions::default(), relay.status(), Readiness::default(), relay.health()).await;

    prove(&entries).await?;
    if once {
        return Ok(());
    }
    match &admin {
        Ok(_) => {}
        Err(error) => println!("\n(no /status and /metrics: {error})"),
    }
    println!("{}", what_to_try(&entries, admin.is_ok()));
    tokio::signal::ctrl_c().await.context("cannot wait for Ctrl-C")
}

/// One server of both protocols that tells its name.
async fn start_backend(name: String, address: SocketAddr) -> Result<()> {
    let hint = || {
        let port = address.port();
        format!("{name} cannot listen on {address}; `ss -tulnp sport = :{port}` shows who does (another whoami?)")
    };
    let listener = TcpListener::bind(address).await.with_context(hint)?;
    let socket = UdpSocket::bind(address).await.with_context(hint)?;
    let name: Arc<str> = name.into();
    tokio::spawn(answer_requests(listener, Arc::clone(&name)));
    tokio::spawn(answer_datagrams(socket, name));
    Ok(())
}

async fn answer_requests(listener: TcpListener, name: Arc<str>) {
    while let Ok((stream, _)) = listener.accept().await {
        let body = Bytes::from(format!("I'm {name}\n"));
        tokio::spawn(async move {
            let answer = service_fn(|_request| {
                let body = body.clone();
                async move { Ok::<_, Infallible>(hyper::Response::new(Full::new(body))) }
            });
            // A client that goes away early is no news to a web server.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
        });
    }
}

async fn answer_datagrams(socket: UdpSocket, name: Arc<str>) {
    let mut buffer = vec![0; 65_536];
    while let Ok((length, client)) = socket.recv_from(&mut buffer).await {
        let answer = [name.as_bytes(), b": ", &buffer[..length]].concat();
        let _ = socket.send_to(&answer, client).await; // Lost like any datagram, if it is.
    }
}

/// The relay, fed from the manifest file as `kube-relay run -f` would feed it.
async fn start_relay() -> Result<Relay> {
    let localhost = vec![IpAddr::from(Ipv4Addr::LOCALHOST)];
    let plan = PlanOptions { node_port_addresses: localhost, allow_loopback_endpoints: true, ..PlanOptions::default() };
    let relay = Relay::start(RelayOptions { plan, ..RelayOptions::default() }).context("cannot start the relay")?;
    let source = Source::new(vec![MANIFEST.into()], Ranges::default());
    tokio::spawn(manifest::run(source, relay.messages(), Arc::new(Notify::new()), CancellationToken::new()));
    Ok(relay)
}

/// One way in: where the Service is served.
struct Entry {
    kind: &'static str,
    protocol: Protocol,
    address: SocketAddr,
}

/// The ways in that the manifest asks for, once all of them are open.
async fn entries(relay: &Relay) -> Result<Vec<Entry>> {
    let mut status = relay.status();
    let status =
        timeout(PATIENCE, status.wait_for(|status| status.synced)).await.context("the manifest was not read")??;
    let status: Arc<Status> = Arc::clone(&status);
    if let Some(problem) = status.problems.first() {
        bail!("{}: {}", problem.object, problem.message);
    }
    if let Some((key, state)) = status.failed.first_key_value() {
        bail!("cannot listen on {key}: {state:?}; is another whoami running?");
    }
    let service = status.services.get(&ObjectName::parse("whoami")).context("the manifest has no Service `whoami`")?;
    let mut entries = Vec::new();
    for port in &service.report().ports {
        for listener in &port.listeners {
            let kind = match listener.kind {
                ListenerKind::ClusterIp => "ClusterIP",
                ListenerKind::NodePort => "NodePort",
                _ => continue,
            };
            let address = listener.address.parse().context("a listener without an address")?;
            entries.push(Entry { kind, protocol: port.protocol, address });
        }
    }
    Ok(entries)
}

/// Asks through every way in and prints who answered. An error unless the answers rotate exactly.
async fn prove(entries: &[Entry]) -> Result<()> {
    println!("Who answers, {ROUNDS} times on each way in:\n");
    for entry in entries {
        let mut names = Vec::new();
        for _ in 0..ROUNDS {
            let name = timeout(PATIENCE, ask(entry)).await.unwrap_or_else(|_| bail!("no answer in {PATIENCE:?}"));
            names.push(name.with_context(|| format!("{} {}/{}", entry.kind, entry.address, entry.protocol))?);
        }
        println!("  {:<10} {:<22} {}", entry.kind, format!("{}/{}", entry.address, entry.protocol), names.join("  "));
        ensure!(rotates(&names), "{} {}: the answers do not rotate", entry.kind, entry.address);
    }
    println!("\nEach backend in its turn, on every way in: an exact rotation.");
    Ok(())
}

/// True where all backends come in some order, and then again in the same order.
fn rotates(names: &[String]) -> bool {
    let round = BACKENDS.len();
    let distinct: BTreeSet<_> = names.iter().take(round).collect();
    distinct.len() == round && names.iter().zip(&names[round..]).all(|(name, later)| name == later)
}

/// The name of the backend that answers a new connection, or a first datagram.
async fn ask(entry: &Entry) -> Result<String> {
    let answer = match entry.protocol {
        Protocol::Udp => ask_by_datagram(entry.address).await?,
        _ => ask_by_request(entry.address).await?,
    };
    let word = answer.split([' ', ':', '\n']).find(|word| word.starts_with("whoami-"));
    word.map(str::to_owned).with_context(|| format!("a strange answer: {answer:?}"))
}

async fn ask_by_request(address: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(format!("GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (_, body) = answer.split_once("\r\n\r\n").with_context(|| format!("not HTTP: {answer:?}"))?;
    Ok(body.to_owned())
}

async fn ask_by_datagram(address: SocketAddr) -> Result<String> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    socket.connect(address).await?; // From now on only answers from this very address are taken.
    socket.send(b"hello").await?;
    let mut buffer = [0; 64];
    let length = socket.recv(&mut buffer).await?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

fn what_to_try(entries: &[Entry], admin: bool) -> String {
    let mut text = String::from("\nServing until Ctrl-C. In another terminal:\n\n");
    for entry in entries {
        let (ip, port) = (entry.address.ip(), entry.address.port());
        text += &match entry.protocol {
            Protocol::Udp => format!("  echo hello | nc -u -w1 {ip} {port}\n"),
            _ => format!("  curl http://{ip}:{port}/\n"),
        };
    }
    if admin {
        text += "  curl http://127.0.0.1:10249/status          what is served, with live numbers\n";
        text += "  curl http://127.0.0.1:10249/metrics         the same for Prometheus\n";
    }
    let here = std::env::current_dir().unwrap_or_default();
    let manifest = Path::new(MANIFEST);
    let manifest = manifest.strip_prefix(here).unwrap_or(manifest);
    text += &format!("\nOr take an endpoint out of {} and ask again: a save is enough.", manifest.display());
    text
}
