//! Clients that ask for much and read nothing of it: what each costs, and that others do not wait for them.

use std::io::{self, ErrorKind, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kube_relay::name::Family;
use socket2::{Domain, Socket, Type};

use crate::bursts::Burst;
use crate::many::Many;
use crate::rig::{Namespace, full};
use crate::seen;
use crate::stage::{PATIENCE, Relay, Stage, until};
use crate::workload::{Backend, Bulk};

const CONNECTIONS: u64 = 1_000;
const SHORT_CONNECTIONS: u64 = 100;
/// What the two far ends buffer, so that the machine's memory for TCP is not the limit.
const BUFFER_BYTES: usize = 16 * 1024;
/// Memory of the process for one of them.
const BYTES_EACH: u64 = 4 * 1024;
/// What a direction may hold that was stuck before it was known to be a bulky one, or has no pipe: the rest of one read. In a
/// pipe it would be as much memory, and up to six calls for each time that a receiver is slow.
const READ_BYTES: u64 = 64 * 1024;

const A_SECOND: u32 = 200;

pub(crate) fn nobody_waits_for_them() {
    let (count, seconds) = if full() { (CONNECTIONS, 5) } else { (SHORT_CONNECTIONS, 1) };
    let stage = Stage::build();
    let _source = Source::start(stage.pod(0), stage.backend(0, Family::V4));
    let other = stage.backend(1, Family::V4);
    let _other = Backend::start(stage.pod(1), &[other], &Arc::new(Bulk::default())).expect("a backend starts");
    let mut manifest = Many::on(&stage, 1).manifest(&[other]);
    let mut slow = stage.manifest(&[stage.backend(0, Family::V4)], &[]);
    let slow = slow["items"].as_array_mut().expect("a list").split_off(0);
    manifest["items"].as_array_mut().expect("a list").extend(slow);
    let relay = stage.relay_of(&manifest, &[]);
    let burst = || Burst::run(stage.client(), Many::service(0), seconds * A_SECOND, A_SECOND);
    let quiet = burst();
    let before = (seen::private_bytes(relay.pid()), seen::descriptors(relay.pid()));

    let service = stage.service(Family::V4);
    let open: Vec<_> =
        (0..count).map(|_| stage.client().run(|| unread(service)).expect("the Service answers")).collect();
    let busy = until_stuck(&relay);
    let memory = seen::private_bytes(relay.pid()).saturating_sub(before.0);
    let descriptors = seen::descriptors(relay.pid()).saturating_sub(before.1) as u64;
    let pipes = (descriptors.saturating_sub(2 * count) / 2).min(count);
    let beside = burst();

    println!(
        "{count} clients that do not read: {} bytes of memory each ({pipes} with a pipe), {:.2} % of a processor; \
         others, without them: {quiet}; beside them: {beside}",
        memory / count,
        busy * 100.0
    );
    assert_eq!((quiet.failures.len(), &beside.failures), (0, &Vec::new()));
    let active =
        relay.metric("kuberelay_active_connections", &[&format!(r#"backend="{}""#, stage.backend(0, Family::V4))]);
    assert_eq!(active, count, "none of them was ended");
    let allowed = count * BYTES_EACH + (count - pipes) * READ_BYTES;
    assert!(memory <= allowed, "{memory} bytes, {allowed} allowed");
    assert_eq!(relay.gauge("kuberelay_stalled_connections"), count as f64);
    drop(open);
    let (alone, together) = (quiet.percentile(99), beside.percentile(99));
    if cfg!(debug_assertions) {
        println!("times are judged in release builds alone");
        return;
    }
    // Twice as long, and what a processor takes to change between two programs.
    assert!(together < alone * 2 + Duration::from_millis(1), "p99 was {alone:?} and is {together:?}");
}

/// A connection whose client never reads. It is served: the backend's queue is too short for all at once.
fn unread(service: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_recv_buffer_size(BUFFER_BYTES)?;
    socket.connect(&service.into())?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let stream = TcpStream::from(socket);
    if stream.peek(&mut [0])? == 0 {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok(stream)
}

/// Waits until no byte moves for a while, and tells how much of a processor the relay took meanwhile.
fn until_stuck(relay: &Relay<'_>) -> f64 {
    const WHILE: Duration = Duration::from_millis(500);
    let moved = || relay.metric("kuberelay_downstream_bytes_total", &[]);
    until("all of them to be stuck", || {
        let before = (moved(), seen::run_time(relay.pid()));
        thread::sleep(WHILE);
        let ran = seen::run_time(relay.pid()) - before.1; // Before it is asked again, which costs as well.
        (before.0 > 0 && moved() == before.0).then(|| ran.as_secs_f64() / WHILE.as_secs_f64())
    })
}

/// A backend that sends to everybody, as fast as they take it. Ends when dropped.
struct Source {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Source {
    fn start(inside: &Namespace, address: SocketAddr) -> Self {
        let listener = inside.run(|| TcpListener::bind(address)).expect("the pod is ours");
        listener.set_nonblocking(true).expect("an option");
        let stop = Arc::<AtomicBool>::default();
        let thread = thread::spawn({
            let stop = Arc::clone(&stop);
            move || serve(&listener, &stop)
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(listener: &TcpListener, stop: &AtomicBool) {
    const PACE: Duration = Duration::from_millis(10);
    let mut streams = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        while let Ok((stream, _)) = listener.accept() {
            let narrow = socket2::SockRef::from(&stream).set_send_buffer_size(BUFFER_BYTES);
            narrow.and_then(|()| stream.set_nonblocking(true)).expect("options");
            streams.push(stream);
        }
        streams.retain_mut(is_open_when_filled);
        thread::sleep(PACE);
    }
}

/// Sends what fits; false once nobody is there any more.
fn is_open_when_filled(stream: &mut TcpStream) -> bool {
    loop {
        match stream.write(&[0; BUFFER_BYTES]) {
            Ok(0) => return false,
            Ok(1..) => {}
            Err(error) => return error.kind() == ErrorKind::WouldBlock,
        }
    }
}
