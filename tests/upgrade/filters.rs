//! Listeners that the kernel filters: whom it keeps out, it keeps out all the time that a listener goes from one process to the
//! next, whatever that one's filter is.
#![allow(unsafe_code)] // SO_GET_FILTER, pre_exec and prctl: one call a block.

use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, Type};

use crate::load::Load;
use crate::relay::{House, copies};
use crate::support::backend::{Backend, Talker};
use crate::support::client::{Caller, ask, ask_on};
use crate::support::manifest::Manifest;
use crate::support::site::{SERVICE_PORT, Site};
use crate::support::{skip, within};

/// How often somebody knocks who is to hear nothing.
const PACE: Duration = Duration::from_millis(1);
/// So many knock at a time: on loopback one that is let in knows that long before the last of them comes.
const KNOCKING: usize = 100;

/// How many instructions the filter of a socket has: 0 is none.
fn filter_length(socket: &OwnedFd) -> io::Result<u32> {
    let mut length: libc::socklen_t = 0;
    // SAFETY: the descriptor is open while it is borrowed; with no room the kernel writes nothing but the length.
    let outcome = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_GET_FILTER, ptr::null_mut(), &raw mut length)
    };
    if outcome == 0 { Ok(length) } else { Err(io::Error::last_os_error()) }
}

/// Has a process killed where it takes the filter of a socket away, for however short a time.
fn forbid_to_take_filters_away(command: &mut Command) {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    const CALL: u32 = 0; // Where things are in `struct seccomp_data`.
    const LOW_WORD: u32 = if cfg!(target_endian = "big") { 4 } else { 0 };
    const LEVEL: u32 = 16 + 8 + LOW_WORD;
    const OPTION: u32 = 16 + 16 + LOW_WORD;
    let step = |code, k, jf| libc::sock_filter { code, jt: 0, jf, k };
    let mut program = [
        step(LOAD, CALL, 0),
        step(EQUAL, libc::SYS_setsockopt as u32, 5),
        step(LOAD, LEVEL, 0),
        step(EQUAL, libc::SOL_SOCKET as u32, 3),
        step(LOAD, OPTION, 0),
        step(EQUAL, libc::SO_DETACH_FILTER as u32, 1),
        step(RETURN, libc::SECCOMP_RET_KILL_PROCESS, 0),
        step(RETURN, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let before_exec = move || {
        let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        // SAFETY: all arguments are numbers.
        if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } == -1 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel reads as many instructions as there are, and keeps a copy.
        if unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) } == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: it makes system calls, and neither allocates nor locks.
    unsafe { command.pre_exec(before_exec) };
}

/// Does something on a thread of its own until it is dropped, or asked what it has seen.
struct Watch<T> {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<T>>,
}

impl<T: Send + 'static> Watch<T> {
    fn start(watch: impl FnOnce(&AtomicBool) -> T + Send + 'static) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let over = Arc::clone(&over);
            move || watch(&over)
        });
        Self { over, thread: Some(thread) }
    }

    fn end(mut self) -> T {
        self.over.store(true, Relaxed);
        self.thread.take().expect("it ends once").join().expect("no panic")
    }
}

impl<T> Drop for Watch<T> {
    fn drop(&mut self) {
        self.over.store(true, Relaxed);
    }
}

/// Every length that the filter of a socket has.
fn lengths(socket: OwnedFd) -> Watch<BTreeSet<u32>> {
    Watch::start(move |over| {
        let mut seen = BTreeSet::new();
        while !over.load(Relaxed) {
            seen.insert(filter_length(&socket).expect("the kernel tells"));
            thread::yield_now();
        }
        seen
    })
}

/// Knocks at a listener from an address; how often, and how often somebody has answered, whatever it was.
fn knock(from: IpAddr, to: SocketAddr) -> Watch<[usize; 2]> {
    Watch::start(move |over| {
        let (mut knocked, mut answered) = (0, 0);
        let (mut clients, caller) = (VecDeque::new(), UdpSocket::bind((from, 0)).expect("a free port"));
        caller.connect(to).and_then(|()| caller.set_nonblocking(true)).expect("an option");
        let is_heard = |client: &Socket| client.peer_addr().is_ok() || !matches!(client.take_error(), Ok(None));
        while !over.load(Relaxed) {
            let client = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).expect("descriptors are left");
            client.bind(&SocketAddr::new(from, 0).into()).expect("a free port");
            let _ = client.connect(&to.into()); // It is under way.
            clients.push_back(client);
            knocked += 1;
            if clients.len() > KNOCKING {
                answered += usize::from(clients.pop_front().is_some_and(|client| is_heard(&client)));
            }
            let _ = caller.send(b"?"); // What has come of the last one is told below.
            let is_silent = |error: io::Error| error.kind() == io::ErrorKind::WouldBlock;
            answered += usize::from(!caller.recv(&mut [0; 64]).is_err_and(is_silent));
            thread::sleep(PACE); // Its pace.
        }
        [knocked, answered + clients.iter().filter(|client| is_heard(client)).count()]
    })
}

async fn ask_from(source: IpAddr, to: SocketAddr) -> SocketAddr {
    let client = tokio::net::TcpSocket::new_v4().expect("descriptors are left");
    client.bind(SocketAddr::new(source, 0)).expect("a free port");
    let mut client = within("a listener to let it in", client.connect(to)).await.expect("it serves");
    ask_on(&mut client).await.expect("a backend answers")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t107_f25_given_listeners_with_a_filter_when_another_process_takes_over_with_other_ones_then_none_was_off() {
    let site = Site::new(55);
    let backend = Backend::named(site.backend(1)).await;
    let _talker = Talker::named(site.backend(1)).await;
    // One that comes all the time, two others, and somebody.
    let [local, one, two, outside] = [Ipv4Addr::LOCALHOST.into(), site.client(1), site.client(3), site.client(5)];
    let entry = SocketAddr::new(site.client(20), SERVICE_PORT);
    let allowing = |clients: &[IpAddr]| {
        let web = Manifest::new(site).tcp().udp().endpoints([backend.address]);
        web.load_balancer(entry.ip(), clients.iter().copied())
    };
    // So that each listener has one: what it lets in beside this network is this node.
    let filters_all = |command: &mut Command| _ = command.args(["--allow-from", "203.0.113.0/24"]);
    let mut house = House::new(site, &allowing(&[local, one]));
    let first = house.start(filters_all);
    house.until("it is ready", |house| house.serves() == Some(first) && house.is_ready()).await;
    if house.log().contains("no filter: sources that should get no answer") {
        return skip("filter", "this kernel gives filters to privileged processes only");
    }
    assert_eq!(ask_from(one, entry).await, backend.address);
    let caller = Caller::from_address(one, entry).await;
    let answer = caller.ask().await;
    let sockets = copies(first, entry);
    let kinds: Vec<_> = sockets.iter().map(|socket| SockRef::from(socket).r#type().expect("a socket")).collect();
    assert!(kinds.len() == 2 && kinds.contains(&Type::STREAM) && kinds.contains(&Type::DGRAM), "{kinds:?}");
    let before: Vec<_> = sockets.iter().map(|socket| filter_length(socket).expect("the kernel tells")).collect();
    let seen: Vec<_> = sockets.into_iter().map(lengths).collect();
    let knocking = knock(outside, entry);
    let load = Load::start(entry, 200);
    load.answered(50).await;

    fs::write(house.manifest(), allowing(&[local, one, two]).to_string()).expect("it is ours");
    let second = house.start(|command| {
        filters_all(command);
        forbid_to_take_filters_away(command.arg("--take-over"));
    });
    house.until("the second one serves", |house| house.serves() == Some(second) && house.is_ready()).await;
    house.until("the first one ends", |house| house.has_ended(first)).await;
    load.answered(50).await;

    assert_eq!(ask_from(one, entry).await, backend.address);
    assert_eq!(ask_from(two, entry).await, backend.address, "as the next one has planned it");
    assert_eq!(caller.ask().await, answer, "the same flow");
    assert!(ask(entry).await.is_ok());
    let outcome = load.end().await;
    assert_eq!(outcome.failed, Vec::<String>::new(), "{:?}", house.losses());
    let [knocked, answered] = knocking.end();
    println!("{knocked} clients from outside were not heard, while {} from inside were answered", outcome.answered);
    assert!(knocked > 0 && answered == 0, "{answered} of {knocked} were heard");
    for (seen, before) in seen.into_iter().map(Watch::end).zip(before) {
        assert!(
            before > 0 && !seen.contains(&0) && seen.contains(&before) && seen.len() == 2,
            "{before}, then {seen:?}"
        );
    }
}
