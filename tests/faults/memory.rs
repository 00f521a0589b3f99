//! A relay that may have little memory, in a group of the kernel's own that would be its end.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use kube_relay::name::Family;

use crate::bursts::{answer, ask, backends, message};
use crate::rig::{full, skip};
use crate::stage::{PATIENCE, Relay, Stage};

/// What the relay may have, with what the kernel takes for its sockets.
const LIMIT_BYTES: u64 = 64 << 20;
/// Clients that come at once. The relay lets in ever fewer at a time, the last ones one by one: to wait for these takes long.
const AT_ONCE: usize = 256;
/// So many have their answers by then, where nobody waits to be accepted.
const WAITING: Duration = Duration::from_secs(2);
/// Clients that wait besides: they would fill what is left when some of [`AT_ONCE`] wait.
const MORE: usize = 600;
/// How long memory stays short.
const SHORT: Duration = Duration::from_secs(3);
/// Five minutes were no different; the whole file has ten.
const LONG: Duration = Duration::from_secs(60);
/// From when thousands of others begin to go to the first answer. Twice as long without optimization.
const RECOVERY: Duration = Duration::from_secs(if cfg!(debug_assertions) { 2 } else { 1 });
/// For how long it has let in nobody as memory is short.
const PAUSED: &str = r#"kuberelay_accept_paused_seconds_total{reason="memory"}"#;
/// From one look at the relay to the next.
const LOOK_EVERY: Duration = Duration::from_millis(100);

pub(crate) fn is_short() {
    let group = match Group::make(LIMIT_BYTES) {
        Ok(group) => group,
        Err(error) => return skip("cgroup", &format!("no memory group (version 1) of our own: {error}")),
    };
    let stage = Stage::build();
    let _backends = backends(&stage);
    let relay = group.run(|| stage.relay(&stage.backends(Family::V4), &[]));
    let service = stage.service(Family::V4);

    let lacks_memory = || relay.gauge(PAUSED) > 0.0;
    let come = || until_some_wait(service, lacks_memory);
    let (mut open, count) = stage.client().run(come).expect("each is served, or waits");
    let more = (0..=MORE).map(|_| TcpStream::connect_timeout(&service, PATIENCE));
    let mut more = stage.client().run(|| more.collect::<io::Result<Vec<_>>>()).expect("the kernel's queue takes them");
    let mut late = more.pop().expect("it has come last");
    let span = if full() { LONG } else { SHORT };
    let slowest = thread::scope(|scope| {
        late.set_read_timeout(Some(span)).expect("an option");
        let waits = scope.spawn(|| message(&mut late).map_err(|error| error.kind()));
        let slowest = admin_answers(&relay, span);
        assert_eq!(waits.join().expect("clients do not panic"), Err(io::ErrorKind::WouldBlock));
        slowest
    });
    message(&mut open[0]).expect("an open connection goes on");

    assert_eq!(relay.dropped(None), 0, "nobody was turned away");
    let freed = Instant::now();
    drop(open);
    late.set_read_timeout(Some(PATIENCE)).expect("an option");
    message(&mut late).expect("it is served");
    let recovered = freed.elapsed();
    println!(
        "{count} connections in {} MiB; the slowest page took {slowest:?}; served again {recovered:?} after the others \
         had gone",
        LIMIT_BYTES >> 20,
    );
    assert!(recovered < RECOVERY, "{recovered:?}");
}

/// Looks at it for a time: it is there, and says why it accepts nobody. Returns how long the slowest page took.
fn admin_answers(relay: &Relay<'_>, span: Duration) -> Duration {
    let (begin, mut slowest) = (Instant::now(), Duration::ZERO);
    while begin.elapsed() < span {
        let asked = Instant::now();
        let paused = relay.gauge(PAUSED);
        slowest = slowest.max(asked.elapsed());
        assert!(paused > 0.0, "something else than memory was lacking");
        thread::sleep(LOOK_EVERY); // Nothing to wait for: that nothing happens is the point.
    }
    slowest
}

/// Opens connections, many at once, until some of them are not served for want of memory. Those come last; and how many are
/// served.
fn until_some_wait(service: SocketAddr, lacks_memory: impl Fn() -> bool) -> io::Result<(Vec<TcpStream>, usize)> {
    let mut open: Vec<TcpStream> = Vec::new();
    loop {
        let served = open.len();
        for _ in 0..AT_ONCE {
            let mut stream = TcpStream::connect_timeout(&service, PATIENCE)?;
            ask(&mut stream)?;
            open.push(stream);
        }
        let come = Instant::now();
        for number in served..open.len() {
            let stream = &mut open[number];
            let left = WAITING.saturating_sub(come.elapsed()).max(Duration::from_millis(1));
            stream.set_read_timeout(Some(left))?;
            match answer(stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && lacks_memory() => return Ok((open, number)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    stream.set_read_timeout(Some(PATIENCE))?; // The machine is slow.
                    answer(stream)?;
                }
                outcome => outcome?,
            }
        }
    }
}

/// A group of our own below the one that this process is in. Dropping it takes it away, when nobody is in it any more.
struct Group {
    home: PathBuf,
    folder: PathBuf,
}

impl Group {
    fn make(limit_bytes: u64) -> io::Result<Self> {
        let home = home()?;
        let folder = home.join(format!("kube-relay-test-{}", std::process::id()));
        fs::create_dir(&folder)?;
        let group = Self { home, folder };
        fs::write(group.folder.join("memory.limit_in_bytes"), limit_bytes.to_string())?;
        enter(&group.folder)?; // Not everybody may.
        enter(&group.home)?;
        Ok(group)
    }

    /// Acts with this process in it: what is started stays there.
    fn run<T>(&self, act: impl FnOnce() -> T) -> T {
        enter(&self.folder).expect("as before");
        let outcome = act();
        enter(&self.home).expect("as before");
        outcome
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = enter(&self.home); // Where the act has panicked.
        let _ = fs::remove_dir(&self.folder);
    }
}

/// Moves this process with all its threads.
fn enter(folder: &Path) -> io::Result<()> {
    fs::write(folder.join("cgroup.procs"), std::process::id().to_string())
}

/// The memory group that this process is in.
fn home() -> io::Result<PathBuf> {
    let groups = fs::read_to_string("/proc/self/cgroup")?;
    let of_memory = |line: &str| {
        let (controllers, group) = line.split_once(':')?.1.split_once(':')?;
        controllers.split(',').any(|controller| controller == "memory").then(|| group.to_owned())
    };
    let group = groups.lines().find_map(of_memory);
    let group = group.ok_or_else(|| io::Error::other("there is no hierarchy of memory of this version"))?;
    Ok(Path::new("/sys/fs/cgroup/memory").join(group.trim_start_matches('/')))
}
