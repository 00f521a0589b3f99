//! Begin and end of the process: readiness as named blockers, signals, and the order in which a relay is put to rest.
//!
//! What drains is behind [`Drainable`]; who answers `/readyz` is `admin`.

use std::collections::BTreeMap;
use std::future::Future;
use std::io::{self, IsTerminal};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{self, Pid};
use tokio::signal::unix::{self, SignalKind};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::heap;
use crate::status::Status;

/// Blocker: the source has not delivered its first complete state.
pub const SOURCE: &str = "source";
/// Blocker: the first plan has not been carried out.
pub const LISTENERS: &str = "listeners";
/// Blocker: the process is about to end.
pub const SHUTDOWN: &str = "shutdown";

/// How often a drain says how far it is.
const DRAIN_NEWS: Duration = Duration::from_secs(5);

/// What still keeps this process from being ready, by name. Shared: whoever knows of a blocker sets and clears it.
///
/// A listener that cannot be bound is not a blocker: one taken port must not take a node out of service.
/// The default is ready.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    checks: Arc<watch::Sender<BTreeMap<&'static str, bool>>>,
}

impl Readiness {
    /// Not ready until each of the named blockers has been cleared.
    pub fn blocked_by(blockers: &[&'static str]) -> Self {
        let checks = blockers.iter().map(|blocker| (*blocker, false)).collect();
        Self { checks: Arc::new(watch::Sender::new(checks)) }
    }

    /// Adds a blocker, or sets one again that was cleared.
    pub fn block(&self, blocker: &'static str) {
        self.set(blocker, false);
    }

    /// Clears a blocker.
    pub fn clear(&self, blocker: &'static str) {
        self.set(blocker, true);
    }

    /// True once nothing blocks.
    pub fn is_ready(&self) -> bool {
        self.checks.borrow().values().all(|passed| *passed)
    }

    /// What blocks now, by name.
    pub fn blockers(&self) -> Vec<&'static str> {
        self.checks().into_iter().filter(|(_, passed)| !passed).map(|(name, _)| name).collect()
    }

    /// Every check by name, and whether it passes.
    pub fn checks(&self) -> Vec<(&'static str, bool)> {
        self.checks.borrow().iter().map(|(name, passed)| (*name, *passed)).collect()
    }

    /// Waits until nothing blocks.
    pub async fn ready(&self) {
        let mut checks = self.checks.subscribe();
        // The sender lives as long as `self`: this cannot fail.
        let _ = checks.wait_for(|checks| checks.values().all(|passed| *passed)).await;
    }

    fn set(&self, name: &'static str, passed: bool) {
        self.checks.send_if_modified(|checks| checks.insert(name, passed) != Some(passed));
    }
}

/// Clears [`SOURCE`] and [`LISTENERS`] as the relay gets there. Ends then, or when the relay is gone.
pub async fn watch_start(mut status: watch::Receiver<Arc<Status>>, readiness: Readiness) {
    if status.wait_for(|status| status.synced).await.is_err() {
        return;
    }
    readiness.clear(SOURCE);
    // A snapshot that says `synced` is made after the steps of that state: its listeners are up.
    readiness.clear(LISTENERS);
    let (services, failed) = {
        let status = status.borrow();
        (status.services.len(), status.failed.len())
    };
    info!(services, failed_listeners = failed, "ready");
    heap::give_back(); // The first state is the largest that is ever read at once.
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read the manifests again, where Services come from them.
    Reload,
    /// End, but let what is under way come to its end first.
    Drain,
    /// End now.
    Stop,
}

/// A signal that we answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Signal {
    Hangup,
    Terminate,
    Interrupt,
}

/// The signals of this process. From [`Signals::catch`] on they no longer end it by themselves.
#[derive(Debug)]
pub struct Signals {
    hangup: unix::Signal,
    terminate: unix::Signal,
    interrupt: unix::Signal,
    interactive: bool,
    /// When the first request to end came.
    asked: Option<Instant>,
}

/// A second signal to end that comes sooner is an echo: `timeout` and some init processes signal a child and its
/// whole group, and nobody has changed his mind in between.
const ECHO: Duration = Duration::from_millis(100);

impl Signals {
    /// Starts to catch SIGHUP, SIGTERM and SIGINT.
    pub fn catch() -> io::Result<Self> {
        Ok(Self {
            hangup: unix::signal(SignalKind::hangup())?,
            terminate: unix::signal(SignalKind::terminate())?,
            interrupt: unix::signal(SignalKind::interrupt())?,
            // Manifests may come through a pipe: somebody who reads the log at a terminal is a person, too.
            interactive: io::stdin().is_terminal() || io::stderr().is_terminal(),
            asked: None,
        })
    }

    /// The next request. A second one to end means now.
    pub async fn next(&mut self) -> Request {
        let signal = tokio::select! {
            _ = self.terminate.recv() => Signal::Terminate,
            _ = self.interrupt.recv() => Signal::Interrupt,
            _ = self.hangup.recv() => Signal::Hangup,
        };
        let request = answer(signal, self.interactive, self.asked.map(|asked| asked.elapsed()));
        if request != Request::Reload {
            self.asked.get_or_insert_with(Instant::now);
        }
        request
    }
}

/// `asked_before`: how long ago somebody asked to end.
fn answer(signal: Signal, interactive: bool, asked_before: Option<Duration>) -> Request {
    match signal {
        Signal::Hangup => Request::Reload,
        _ if asked_before.is_some_and(|ago| ago >= ECHO) => Request::Stop,
        // Ctrl-C: a person is waiting for the prompt.
        Signal::Interrupt if interactive => Request::Stop,
        Signal::Interrupt | Signal::Terminate => Request::Drain,
    }
}

/// True where the end of this process is the end of its container, or has it started again: a pod's, or that of anything
/// with processes of its own.
pub fn is_container() -> bool {
    std::process::id() == 1 || std::env::var_os("KUBERNETES_SERVICE_HOST").is_some()
}

/// Asks another process for the same.
pub fn pass_on(request: Request, pid: u32) {
    let signal = match request {
        Request::Reload => process::Signal::HUP,
        Request::Drain | Request::Stop => process::Signal::TERM,
    };
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    if let Some(pid) = pid {
        let _ = process::kill_process(pid, signal); // It may have ended.
    }
}

/// How long the end may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShutdownTimes {
    /// From not ready to no longer accepting, so that load balancers notice first. From `--shutdown-delay`.
    pub delay: Duration,
    /// From no longer accepting to resetting what is still open. From `--drain-timeout`.
    pub drain_timeout: Duration,
}

impl ShutdownTimes {
    /// No waiting at all: what SIGINT on a terminal and a second signal ask for.
    pub const NONE: Self = Self { delay: Duration::ZERO, drain_timeout: Duration::ZERO };
}

/// A relay that can be put to rest.
pub trait Drainable {
    /// Has load balancers look elsewhere. Everything is served as before.
    fn leave(&self);

    /// Closes all listeners; what is open goes on. A second call changes nothing.
    fn stop_accepting(&self) -> impl Future<Output = ()> + Send;

    /// Waits until everything open has ended, for at most `timeout`; resets the rest and returns how many that were.
    fn drain(&self, timeout: Duration) -> impl Future<Output = usize> + Send;

    /// Connections that are open now.
    fn open_connections(&self) -> usize;
}

/// Puts a relay to rest: not ready, and unhealthy for load balancers, wait, stop accepting, drain, reset the rest. `hurry` cuts all waiting short.
///
/// Returns how many connections and flows were cut.
pub async fn shut_down(
    relay: &impl Drainable,
    readiness: &Readiness,
    times: ShutdownTimes,
    hurry: impl Future<Output = ()>,
) -> usize {
    readiness.block(SHUTDOWN);
    relay.leave();
    let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let (delay_ms, drain_timeout_ms) = (milliseconds(times.delay), milliseconds(times.drain_timeout));
    info!(delay_ms, drain_timeout_ms, "shutting down");
    let patient = async {
        tokio::time::sleep(times.delay).await;
        relay.stop_accepting().await;
        drain_and_tell(relay, times.drain_timeout).await
    };
    let cut = tokio::select! {
        biased;
        () = hurry => {
            info!("second signal: not waiting any longer");
            relay.stop_accepting().await;
            relay.drain(Duration::ZERO).await
        }
        cut = patient => cut,
    };
    if cut > 0 {
        warn!(cut, reason = "drain", "connections were reset");
    }
    cut
}

/// Drains, and says now and then how many connections are still open.
async fn drain_and_tell(relay: &impl Drainable, timeout: Duration) -> usize {
    let mut draining = pin!(relay.drain(timeout));
    let mut news = tokio::time::interval(DRAIN_NEWS);
    loop {
        tokio::select! {
            biased;
            cut = &mut draining => return cut,
            _ = news.tick() => info!(open = relay.open_connections(), "draining"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Script {
        steps: Mutex<Vec<String>>,
        readiness_at_stop: Mutex<Vec<&'static str>>,
        readiness: Option<Readiness>,
        never_drains: bool,
    }

    impl Script {
        fn steps(&self) -> Vec<String> {
            self.steps.lock().expect("one thread").clone()
        }

        fn note(&self, step: String) {
            self.steps.lock().expect("one thread").push(step);
        }
    }

    impl Drainable for Script {
        fn leave(&self) {
            self.note("leave".into());
        }

        async fn stop_accepting(&self) {
            let blockers = self.readiness.as_ref().map(Readiness::blockers).unwrap_or_default();
            *self.readiness_at_stop.lock().expect("one thread") = blockers;
            self.note("stop accepting".into());
        }

        fn open_connections(&self) -> usize {
            3
        }

        async fn drain(&self, timeout: Duration) -> usize {
            self.note(format!("drain {timeout:?}"));
            if self.never_drains && timeout > Duration::ZERO {
                pending::<()>().await;
            }
            3
        }
    }

    const TIMES: ShutdownTimes = ShutdownTimes { delay: Duration::ZERO, drain_timeout: Duration::from_secs(30) };

    #[test]
    fn given_two_blockers_when_one_is_cleared_then_the_other_still_blocks() {
        let readiness = Readiness::blocked_by(&[SOURCE, LISTENERS]);

        readiness.clear(SOURCE);

        assert!(!readiness.is_ready());
        assert_eq!(readiness.blockers(), [LISTENERS]);
        readiness.clear(LISTENERS);
        assert!(readiness.is_ready());
        assert_eq!(readiness.checks(), [(LISTENERS, true), (SOURCE, true)]);
    }

    #[tokio::test]
    async fn given_a_relay_that_syncs_when_watched_then_it_becomes_ready() {
        let (sender, receiver) = watch::channel(Arc::new(Status::default()));
        let readiness = Readiness::blocked_by(&[SOURCE, LISTENERS]);
        let watching = tokio::spawn(watch_start(receiver, readiness.clone()));

        sender.send_replace(Arc::new(Status { synced: true, ..Status::default() }));

        readiness.ready().await;
        watching.await.expect("no panic");
    }

    #[test]
    fn given_each_signal_when_answered_then_only_ctrl_c_and_a_second_one_do_not_wait() {
        assert_eq!(answer(Signal::Terminate, true, None), Request::Drain);
        assert_eq!(answer(Signal::Terminate, false, Some(ECHO)), Request::Stop);
        assert_eq!(answer(Signal::Interrupt, true, None), Request::Stop);
        assert_eq!(answer(Signal::Interrupt, false, None), Request::Drain);
        assert_eq!(answer(Signal::Interrupt, false, Some(ECHO)), Request::Stop);
        assert_eq!(answer(Signal::Terminate, false, Some(Duration::from_millis(1))), Request::Drain, "an echo");
        assert_eq!(answer(Signal::Hangup, true, Some(ECHO)), Request::Reload);
    }

    #[tokio::test]
    async fn given_a_ready_relay_when_it_shuts_down_then_unready_comes_before_the_listeners_close() {
        let readiness = Readiness::blocked_by(&[]);
        let relay = Script { readiness: Some(readiness.clone()), ..Script::default() };

        let cut = shut_down(&relay, &readiness, TIMES, pending()).await;

        assert_eq!(cut, 3);
        assert_eq!(relay.steps(), ["leave", "stop accepting", "drain 30s"]);
        assert_eq!(*relay.readiness_at_stop.lock().expect("one thread"), [SHUTDOWN]);
    }

    #[tokio::test]
    async fn given_a_second_signal_when_still_draining_then_the_rest_is_cut_at_once() {
        let relay = Script { never_drains: true, ..Script::default() };
        let mut polls = 0;
        let after_first_poll = std::future::poll_fn(|context| {
            polls += 1;
            context.waker().wake_by_ref();
            if polls > 1 { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        });

        let cut = shut_down(&relay, &Readiness::blocked_by(&[]), TIMES, after_first_poll).await;

        assert_eq!(cut, 3);
        assert_eq!(relay.steps().last().map(String::as_str), Some("drain 0ns"));
    }

    #[tokio::test]
    async fn given_a_long_delay_when_hurried_then_nobody_waits() {
        let relay = Script::default();
        let times = ShutdownTimes { delay: Duration::from_secs(3600), ..TIMES };

        shut_down(&relay, &Readiness::blocked_by(&[]), times, ready(())).await;

        assert_eq!(relay.steps(), ["leave", "stop accepting", "drain 0ns"]);
    }
}
