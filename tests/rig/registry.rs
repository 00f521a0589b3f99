//! What a node does with a registry behind a node port: layers are pushed and pulled through `localhost`, one after the
//! other on a connection that stays open, 1 GB of them in the long form. Each byte that is pulled is compared.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Seek, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use socket2::SockRef;

use crate::addresses::at;
use crate::rig::{Case, FAMILIES, Namespace, full};
use crate::stage::{Pod, Stage, TCP_BACKEND_PORT, Web};
use crate::verdicts::rig;

pub(crate) const CASES: &[Case] =
    cases![given_a_registry_behind_a_node_port_when_layers_are_pushed_and_pulled_by_localhost_then_they_are_the_same];

/// Layers on each connection.
const LAYERS: u64 = 16;
/// What is read, made and sent at once; layers are a multiple of it.
const BLOCK: usize = 64 << 10;
/// No side waits longer for the other.
const PATIENCE: Duration = Duration::from_secs(20);
/// How soon the registry sees that it is to end.
const TICK: Duration = Duration::from_millis(50);

fn layer_bytes() -> u64 {
    if full() { 64 << 20 } else { 4 << 20 }
}

fn given_a_registry_behind_a_node_port_when_layers_are_pushed_and_pulled_by_localhost_then_they_are_the_same() {
    let rig = rig();
    let registry = Registry::start(rig.pod(0, 0));
    let web = Web::default().with([Pod::of(&rig, 0, 0)]);
    let stage = Stage::start_with(rig, &web, &["--nodeport-addresses", "primary,localhost"]);

    for localhost in ["127.0.0.1", "::1"] {
        let to = at(localhost.parse::<IpAddr>().expect("an address"));
        let (pushed, pulled) = stage.rig.node(0).run(|| push_and_pull(to)).expect("no connection breaks");
        let megabytes = LAYERS * layer_bytes() / 1_000_000;
        println!("{megabytes} MB by {localhost}: pushed in {pushed:?}, pulled in {pulled:?}");
    }

    assert_eq!(registry.connections.load(Ordering::Relaxed), 2, "one for each family, and none was lost");
    let payload = 2 * LAYERS * layer_bytes();
    for direction in ["upstream", "downstream"] {
        let counted = stage.metric(&format!("kuberelay_{direction}_bytes_total"), "");
        assert!(counted > payload && counted < payload + payload / 100, "{direction}: {counted} of {payload}");
    }
}

/// Pushes all layers, every other one in chunks, and pulls them; tells how long each took.
fn push_and_pull(to: SocketAddr) -> io::Result<(Duration, Duration)> {
    let stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?; // As programs do that are written in Go.
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut client = BufReader::with_capacity(BLOCK, stream);
    let began = Instant::now();
    for layer in 0..LAYERS {
        let path = format!("/v2/web/blobs/{}/{layer}", to.is_ipv4());
        assert_eq!(ask(&mut client, "HEAD", &path)?.code(), "404", "it is not there yet");
        let form = if layer % 2 == 0 { Form::Length(layer_bytes()) } else { Form::Chunked };
        write!(client.get_mut(), "PUT {path} HTTP/1.1\r\nHost: localhost\r\n{}\r\n", form.header())?;
        let mut content = Content::of(layer);
        send_body(client.get_mut(), form, layer_bytes(), |block| {
            block.copy_from_slice(content.next());
            Ok(())
        })?;
        let answer = Head::read(&mut client)?.ok_or(ErrorKind::UnexpectedEof)?;
        assert_eq!((answer.code(), answer.header("taken")), ("201", Some(&*layer_bytes().to_string())));
    }
    let (pushed, began) = (began.elapsed(), Instant::now());
    for layer in 0..LAYERS {
        let path = format!("/v2/web/blobs/{}/{layer}", to.is_ipv4());
        let answer = ask(&mut client, "GET", &path)?;
        assert_eq!(answer.code(), "200");
        let mut content = Content::of(layer);
        let length = take_body(&mut client, answer.form()?, |block| {
            assert!(block == content.next(), "layer {layer} is what was pushed");
            Ok(())
        })?;
        assert_eq!(length, layer_bytes());
    }
    Ok((pushed, began.elapsed()))
}

fn ask(client: &mut BufReader<TcpStream>, method: &str, path: &str) -> io::Result<Head> {
    write!(client.get_mut(), "{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    Head::read(client)?.ok_or_else(|| ErrorKind::UnexpectedEof.into())
}

/// What is in a layer: blocks of noise, each with its number in front.
struct Content {
    noise: Vec<u8>,
    block: u64,
}

impl Content {
    fn of(layer: u64) -> Self {
        let mut noise = vec![0; BLOCK];
        StdRng::seed_from_u64(layer).fill(&mut noise[..]);
        Self { noise, block: 0 }
    }

    fn next(&mut self) -> &[u8] {
        self.noise[..8].copy_from_slice(&self.block.to_le_bytes());
        self.block += 1;
        &self.noise
    }
}

/// How long a body is.
#[derive(Clone, Copy)]
enum Form {
    Length(u64),
    Chunked,
}

impl Form {
    fn header(self) -> String {
        match self {
            Self::Length(length) => format!("Content-Length: {length}\r\n"),
            Self::Chunked => "Transfer-Encoding: chunked\r\n".to_owned(),
        }
    }
}

/// A request or an answer, but for its body.
struct Head {
    first: Vec<String>,
    headers: HashMap<String, String>,
}

impl Head {
    /// `None` where the other side has nothing more to say.
    fn read(from: &mut impl BufRead) -> io::Result<Option<Self>> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if from.read_line(&mut line)? == 0 {
                return if lines.is_empty() { Ok(None) } else { Err(ErrorKind::UnexpectedEof.into()) };
            }
            match line.trim_end() {
                "" => break,
                line => lines.push(line.to_owned()),
            }
        }
        let mut lines = lines.into_iter();
        let first = lines.next().unwrap_or_default().split(' ').map(str::to_owned).collect();
        let pair = |line: String| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned()));
        Ok(Some(Self { first, headers: lines.filter_map(pair).collect() }))
    }

    fn word(&self, place: usize) -> &str {
        self.first.get(place).map_or("", String::as_str)
    }

    fn code(&self) -> &str {
        self.word(1)
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    fn form(&self) -> io::Result<Form> {
        match (self.header("content-length"), self.header("transfer-encoding")) {
            (Some(length), None) => length.parse().map(Form::Length).map_err(io::Error::other),
            (None, Some("chunked")) => Ok(Form::Chunked),
            _ => Err(io::Error::other("no length")),
        }
    }
}

/// Sends a body whose blocks `next` fills. Chunks are of odd sizes: they begin and end anywhere.
fn send_body(
    to: &mut impl Write,
    form: Form,
    length: u64,
    mut next: impl FnMut(&mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    for _ in 0..length / BLOCK as u64 {
        next(&mut block)?;
        match form {
            Form::Length(_) => to.write_all(&block)?,
            Form::Chunked => {
                for chunk in block.chunks(50_001) {
                    write!(to, "{:x}\r\n", chunk.len())?;
                    to.write_all(chunk)?;
                    to.write_all(b"\r\n")?;
                }
            }
        }
    }
    match form {
        Form::Length(_) => Ok(()),
        Form::Chunked => to.write_all(b"0\r\n\r\n"),
    }
}

/// Takes a body block by block, and tells how long it was.
fn take_body(from: &mut impl BufRead, form: Form, mut take: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<u64> {
    let (mut block, mut filled, mut total) = (vec![0; BLOCK], 0, 0);
    loop {
        let mut left = match form {
            Form::Length(length) => length,
            Form::Chunked => chunk_bytes(from)?,
        };
        let is_last = left == 0 || matches!(form, Form::Length(_));
        while left > 0 {
            let room = (BLOCK - filled).min(usize::try_from(left).unwrap_or(BLOCK));
            from.read_exact(&mut block[filled..filled + room])?;
            (filled, left, total) = (filled + room, left - room as u64, total + room as u64);
            if filled == BLOCK {
                take(&block)?;
                filled = 0;
            }
        }
        if let Form::Chunked = form {
            from.read_line(&mut String::new())?; // What ends a chunk.
        }
        if is_last {
            return Ok(total);
        }
    }
}

fn chunk_bytes(from: &mut impl BufRead) -> io::Result<u64> {
    let mut line = String::new();
    from.read_line(&mut line)?;
    u64::from_str_radix(line.trim_end(), 16).map_err(io::Error::other)
}

/// Keeps what is put, in files that nobody else sees. Ends when dropped.
struct Registry {
    connections: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Registry {
    fn start(pod: &Namespace) -> Self {
        let mut registry = Self { connections: Arc::default(), stop: Arc::default(), threads: Vec::new() };
        for family in FAMILIES {
            let listener = pod.run(|| TcpListener::bind((pod.address(family), TCP_BACKEND_PORT)));
            let listener = listener.expect("the pod's address is free");
            let (connections, stop) = (Arc::clone(&registry.connections), Arc::clone(&registry.stop));
            registry.threads.push(thread::spawn(move || serve(&listener, &connections, &stop)));
        }
        registry
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // A panic has been printed.
        }
    }
}

fn serve(listener: &TcpListener, connections: &AtomicUsize, stop: &AtomicBool) {
    SockRef::from(listener).set_read_timeout(Some(TICK)).expect("an option"); // It limits accept, too.
    thread::scope(|scope| {
        while !stop.load(Ordering::Relaxed) {
            let Ok((stream, _)) = listener.accept() else { continue };
            connections.fetch_add(1, Ordering::Relaxed);
            scope.spawn(move || converse(stream).expect("no connection breaks"));
        }
    });
}

fn converse(stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut layers: HashMap<String, (File, u64)> = HashMap::new();
    let mut stream = BufReader::with_capacity(BLOCK, stream);
    while let Some(request) = Head::read(&mut stream)? {
        let path = request.word(1).to_owned();
        match (request.word(0), layers.get_mut(&path)) {
            ("PUT", _) => {
                let mut file = tempfile::tempfile()?;
                let length = take_body(&mut stream, request.form()?, |block| file.write_all(block))?;
                write!(stream.get_mut(), "HTTP/1.1 201 Created\r\nTaken: {length}\r\nContent-Length: 0\r\n\r\n")?;
                layers.insert(path, (file, length));
            }
            ("GET", Some((file, length))) => {
                // The other way round than it was pushed.
                let form =
                    if path.ends_with(['0', '2', '4', '6', '8']) { Form::Chunked } else { Form::Length(*length) };
                file.rewind()?;
                write!(stream.get_mut(), "HTTP/1.1 200 OK\r\n{}\r\n", form.header())?;
                send_body(stream.get_mut(), form, *length, |block| file.read_exact(block))?;
            }
            _ => write!(stream.get_mut(), "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?,
        }
    }
    Ok(())
}
