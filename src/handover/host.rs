//! Who answers at the door of a state folder: tells who this process is, starts its successor, hands everything over.
//!
//! A thread of its own, as all of this waits, and one conversation at a time. It ends with the hand-over.

use std::collections::BTreeMap;
use std::mem::{self, ManuallyDrop};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};
use tracing::{error, info, warn};

use super::door::Caller;
use super::failure::Failure;
use super::giving::{Ask, Loan, Moved};
use super::introduction::Introduction;
use super::late::{Accounts, LateCounts, Ledger, Reporter};
use super::office::Office;
use super::order::{Order, UpgradeReport};
use super::parcel::{Kind, Parcel};
use super::post::{Post, PostError};
use super::successor::Successor;
use crate::lifecycle::Readiness;
use crate::stats::UpgradeResult;

/// How long a caller may take to say who it is and what it wants: nobody else is heard meanwhile.
const CALLER_LIMIT: Duration = Duration::from_secs(1);
/// How long no byte may move here for a hand-over, from the first connection that stands still to the successor's last word.
/// It is some dozen milliseconds where both have a processor: this is what one that fails may cost.
const STANDSTILL: Duration = Duration::from_secs(2);
/// How long the process that has taken over may take until it serves: its listeners are bound by then.
const SERVING_LIMIT: Duration = Duration::from_secs(10);
/// How much longer whoever has ordered it waits for this process's own servers to close.
const LOOK_AWAY_LIMIT: Duration = Duration::from_secs(3);
/// The most that an upgrade may take, whatever is asked for.
const LONGEST_LIMIT: Duration = Duration::from_secs(24 * 3_600);
/// How long a successor that was refused may take to say so and to end.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(3);
/// How long is waited after the door could not be opened.
const PAUSE: Duration = Duration::from_secs(1);

/// What a process needs for that it can be succeeded.
#[derive(Debug)]
pub struct Host {
    /// What it has as such.
    pub office: Office,
    /// Where it can be met, and meets those that come after it. From `--state-dir`.
    pub folder: PathBuf,
    /// The sockets of its own servers, as they come and go.
    pub admin: watch::Receiver<BTreeMap<SocketAddr, Arc<OwnedFd>>>,
    /// Whether it serves.
    pub readiness: Readiness,
    /// Why it cannot start a successor by itself, if so.
    pub cannot_start: Option<&'static str>,
    /// The pod that it runs in, by its UID; `None`: nobody says.
    pub pod: Option<String>,
}

/// Everything is another process's now.
#[derive(Debug)]
pub struct Handed {
    /// Its process, as this one knows it; 0 where that is another namespace's.
    pub pid: i32,
    /// Where we have started it: its end can be waited for.
    pub child: Option<Child>,
    answered: Option<oneshot::Receiver<()>>,
    /// Who tells what is counted here yet.
    accounts: Option<Accounts>,
    /// Dropped once our own servers accept nobody any more.
    looks: Option<Sender<()>>,
}

impl Handed {
    /// Has whoever has ordered the upgrade told that it is done. To be called when the own servers of this process accept
    /// nobody any more: who asks then who serves is answered by the other one.
    pub fn look_away(&mut self) {
        self.looks = None;
    }

    /// Has whoever serves told what this process has counted since it was taken over from, and resolves once that is
    /// done, or cannot be. To be called when nothing is open here any more.
    pub async fn settle(&mut self) {
        if let Some(accounts) = self.accounts.take() {
            accounts.settle().await;
        }
    }

    /// Resolves once whoever has ordered the upgrade knows what came of it: this process has to be there until then. At
    /// once the second time.
    pub fn answered(&mut self) -> impl Future<Output = ()> + Send + use<> {
        let answered = self.answered.take();
        async move {
            if let Some(answered) = answered {
                let _ = answered.await; // The other end says nothing, and is dropped then.
            }
        }
    }
}

/// What there is once everything was handed over.
struct Gone {
    handed: Handed,
    farewell: Option<Farewell>,
    /// What goes on counting here.
    ledger: Option<Ledger>,
}

/// What is left to say when everything is another process's: whoever has ordered that waits until it serves.
struct Farewell {
    asker: Post,
    /// Where the other process says so; `None` where its version does not.
    post: Option<Post>,
    report: UpgradeReport,
    /// Hangs up once our own servers accept nobody any more.
    looks: Receiver<()>,
    /// Dropped once it is said.
    _answered: oneshot::Sender<()>,
}

/// A successor that was started, and who wants to know what becomes of it.
struct Upgrade {
    asker: Post,
    /// By which a process can tell that it was started for this one.
    number: u64,
    successor: Successor,
    deadline: Instant,
}

impl Host {
    /// Answers from now on. `control` is asked to lend its sockets. Resolves when all is handed over, and never if it is
    /// not.
    ///
    /// # Errors
    /// No thread, or no descriptor, is left.
    pub(crate) fn attend(
        self,
        control: impl Fn(Ask) -> bool + Send + 'static,
    ) -> std::io::Result<oneshot::Receiver<Handed>> {
        self.attend_with(control, STANDSTILL)
    }

    fn attend_with(
        self,
        control: impl Fn(Ask) -> bool + Send + 'static,
        standstill: Duration,
    ) -> std::io::Result<oneshot::Receiver<Handed>> {
        let (tell, handed) = oneshot::channel();
        // What is not dropped where the thread panics: the process serves on then, and the folder stays its own.
        let folder = ManuallyDrop::new(self.office.lock.copy()?);
        let door_folder = self.folder.clone();
        let attendant = Attendant { host: self, standstill, control, upgrade: None, is_deaf: false };
        thread::Builder::new().name("handover".into()).spawn(move || {
            let Gone { mut handed, farewell, ledger } = attendant.run();
            drop(ManuallyDrop::into_inner(folder));
            let (reporter, accounts) = ledger.map(|ledger| Reporter::new(ledger, door_folder)).unzip();
            handed.accounts = accounts;
            let _ = tell.send(handed); // Who asked may be about to end.
            farewell.into_iter().for_each(Farewell::say);
            reporter.into_iter().for_each(Reporter::run);
        })?;
        Ok(handed)
    }
}

struct Attendant<C> {
    host: Host,
    /// How long nothing may move for a successor's sake.
    standstill: Duration,
    control: C,
    upgrade: Option<Upgrade>,
    /// True since nobody could be heard, and that was said.
    is_deaf: bool,
}

impl<C: Fn(Ask) -> bool> Attendant<C> {
    fn run(mut self) -> Gone {
        loop {
            let patience =
                self.upgrade.as_ref().map(|upgrade| upgrade.deadline.saturating_duration_since(Instant::now()));
            let ended = self.upgrade.as_ref().map(|upgrade| upgrade.successor.ended());
            let heard = self.host.office.door.next(ended, patience);
            self.is_deaf &= heard.is_err();
            match heard {
                Ok(Some(caller)) => {
                    if let Some(gone) = self.answer(caller) {
                        return gone;
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    if !mem::replace(&mut self.is_deaf, true) {
                        warn!(%error, "nobody can ask for a hand-over now, trying again");
                    }
                    thread::sleep(PAUSE);
                }
            }
            self.look_at_successor();
        }
    }

    /// Hears who calls and says who we are. `None` where it is nobody whom we can talk to; where that is the successor that was
    /// started here, nothing can come of it any more.
    fn greet(&mut self, post: &Post, pid: i32) -> Option<Introduction> {
        let (failure, takes_over) = match hear_who(post)? {
            Ok(caller) => match self.judge(&caller) {
                Ok(()) => {
                    let own = Introduction::own().ready(self.host.readiness.is_ready());
                    let own = own.of_pod(self.host.pod.as_deref()).starting_none(self.host.cannot_start);
                    post.send(own.parcel(), CALLER_LIMIT).ok()?;
                    return Some(caller);
                }
                Err(failure) => (failure, caller.takes_over),
            },
            Err(unreadable) => (unreadable, false),
        };
        failure.refuse(post);
        match &self.upgrade {
            Some(upgrade) if upgrade.is_of(pid) => self.end_upgrade(&failure),
            _ if takes_over => failure.tell(),
            _ => {} // It has only asked for something, and knows why it gets none.
        }
        None
    }

    /// Whether a caller can be talked to. Where a program was to be started that starts another one, that one may still come when
    /// whoever has ordered the upgrade was told that nothing came of it.
    fn judge(&self, caller: &Introduction) -> Result<(), Failure> {
        caller.check()?;
        let awaited = self.upgrade.as_ref().map(|upgrade| upgrade.number);
        if caller.upgrade == 0 || awaited == Some(caller.upgrade) { Ok(()) } else { Err(Failure::Late) }
    }

    /// `Some` where everything was handed over.
    fn answer(&mut self, Caller { post, pid }: Caller) -> Option<Gone> {
        let caller = self.greet(&post, pid)?;
        // A caller that only looks hangs up now.
        let asked = post.receive(CALLER_LIMIT).ok()?;
        match asked.kind {
            Kind::Upgrade => {
                match asked.said() {
                    Ok(order) => self.begin_upgrade(post, order),
                    Err(_) => Failure::Unreadable.refuse(&post),
                }
                None
            }
            Kind::Take => self.hand_over(post, &caller, pid),
            Kind::Late => {
                self.count_late(&post, pid);
                None
            }
            _ => None,
        }
    }

    /// Has counted what a process tells that was taken over from.
    fn count_late(&self, post: &Post, pid: i32) {
        match LateCounts::hear(post) {
            Ok(late) => _ = (self.control)(Ask::Count(late)), // It may be about to end.
            Err(error) => {
                warn!(pid, %error, "a process that was taken over from does not tell what it has counted since")
            }
        }
    }

    fn begin_upgrade(&mut self, asker: Post, Order { program, limit_ms }: Order) {
        let number = rand::random::<u64>().max(1); // Another process's successors have others.
        let failure = match self.host.cannot_start {
            Some(why) => Failure::Impossible(why),
            None if self.upgrade.is_some() => Failure::Busy,
            None => match Successor::start(program.as_deref(), number) {
                Ok(successor) => {
                    let same_program = successor.is_own_file();
                    info!(pid = successor.pid(), program = ?program, same_program, "upgrade: a new process is started");
                    let deadline = Instant::now() + Duration::from_millis(limit_ms).min(LONGEST_LIMIT);
                    self.upgrade = Some(Upgrade { asker, number, successor, deadline });
                    return;
                }
                Err(source) => Failure::Start { program: name_of(program), source },
            },
        };
        failure.tell();
        failure.refuse(&asker);
    }

    /// Whether the successor has ended, or has to.
    fn look_at_successor(&mut self) {
        let Some(upgrade) = &mut self.upgrade else { return };
        let failure = match upgrade.successor.status() {
            Some(status) => Failure::Ended(status),
            None if Instant::now() >= upgrade.deadline => Failure::Limit,
            None => return,
        };
        self.end_upgrade(&failure);
    }

    fn end_upgrade(&mut self, failure: &Failure) {
        failure.tell();
        if let Some(Upgrade { asker, successor, .. }) = self.upgrade.take() {
            failure.refuse(&asker);
            drop(asker);
            // One that was told why says so, and ends. One that is too slow, or stands still, would take as long as it is given.
            let patience = if failure.result() == UpgradeResult::Timeout { Duration::ZERO } else { LAST_WORDS_LIMIT };
            successor.end(patience);
        }
    }

    fn hand_over(&mut self, post: Post, to: &Introduction, pid: i32) -> Option<Gone> {
        if self.upgrade.as_ref().is_some_and(|upgrade| !upgrade.is_of(pid)) {
            Failure::Busy.tell();
            Failure::Busy.refuse(&post);
            return None;
        }
        let began = Instant::now();
        let loan = match self.give(&post, to) {
            Ok(loan) => loan,
            Err(failure) => {
                drop(post); // The other side hears that there is no more to come, before anything else is done.
                match self.upgrade {
                    Some(_) => self.end_upgrade(&failure),
                    None => failure.tell(),
                }
                return None;
            }
        };
        Some(self.let_go(loan, post, to, pid, began))
    }

    /// Everything is the other process's: lets go of it here, and says so.
    fn let_go(&mut self, loan: Loan, post: Post, to: &Introduction, pid: i32, began: Instant) -> Gone {
        // It goes on without these words, too.
        let say = |word| _ = post.send(Parcel::new(word, &()), CALLER_LIMIT);
        let (Moved { listeners, streams, flows }, ledger) = loan.release(|| say(Kind::Released));
        say(Kind::Closed);
        let elapsed_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        // The one that has taken over counts it: what is counted here from now on is added to that.
        info!(
            to_pid = pid,
            to_version = to.version(),
            listeners,
            streams,
            flows,
            elapsed_ms,
            "handed over; what has not moved comes to its end here"
        );
        let (tell, answered) = oneshot::channel();
        let mut handed = Handed { pid, child: None, answered: Some(answered), accounts: None, looks: None };
        let farewell = self.upgrade.take().map(|Upgrade { asker, successor, .. }| {
            let (looks, looks_away) = channel();
            let report =
                UpgradeReport { pid: successor.pid(), version: to.version(), listeners, streams, flows, elapsed_ms };
            let post = to.understands(Kind::Serving).then_some(post);
            (handed.child, handed.looks) = (Some(successor.released()), Some(looks));
            Farewell { asker, post, report, looks: looks_away, _answered: tell }
        });
        Gone { handed, farewell, ledger }
    }

    /// Lends everything, until it is the other's; where that fails it is ours as before.
    fn give(&self, post: &Post, to: &Introduction) -> Result<Loan, Failure> {
        let refused = |error| {
            let failure = Failure::Give(error);
            failure.refuse_at_once(post);
            failure
        };
        let mut loan = Loan::take(&self.control).map_err(refused)?;
        let admin = self.host.admin.borrow().clone();
        // Said before the loan is dropped and anything moves here again: a successor that hears no more, and sees this process
        // end, goes on with what it was told.
        loan.offer(post, to, &self.host.office, &admin, self.standstill).map_err(refused)?;
        Ok(loan)
    }
}

/// Who calls. `None` where nothing is said: it may call again.
fn hear_who(post: &Post) -> Option<Result<Introduction, Failure>> {
    match post.receive(CALLER_LIMIT) {
        Ok(hello) if hello.kind == Kind::Hello => Some(hello.said().map_err(|_| Failure::Unreadable)),
        Ok(_) | Err(PostError::Broken(_)) => Some(Err(Failure::Unreadable)),
        Err(_) => None,
    }
}

impl Upgrade {
    /// True where this process is the one that was started for it.
    fn is_of(&self, pid: i32) -> bool {
        i32::try_from(self.successor.pid()) == Ok(pid)
    }
}

impl Farewell {
    fn say(self) {
        let Self { asker, post, report, looks, _answered } = self;
        let heard = post.map_or(Ok(Kind::Serving), |post| post.receive(SERVING_LIMIT).map(|parcel| parcel.kind));
        let failure = match heard {
            Ok(_) => {
                let _ = looks.recv_timeout(LOOK_AWAY_LIMIT); // It is true in any case.
                let _ = asker.send(Parcel::new(Kind::Upgraded, &report), CALLER_LIMIT); // It may not wait any more.
                return;
            }
            Err(PostError::Closed) => Failure::Lost,
            Err(_) => Failure::Silent,
        };
        error!(pid = report.pid, reason = %failure.result(), "{failure}");
        failure.refuse(&asker);
    }
}

fn name_of(program: Option<PathBuf>) -> String {
    program.map_or_else(|| "the program at the place of this one".into(), |program| program.display().to_string())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::SystemTime;

    use socket2::SockRef;

    use super::*;
    use crate::handover::door::call;
    use crate::handover::giving::{Handing, Lent};
    use crate::handover::refusal::Refusal;
    use crate::handover::taking::{Decision, TakeOver, introduce};
    use crate::name::{ListenKey, ObjectName, Protocol, ServicePortName};
    use crate::serve::estate::Estate;
    use crate::serve::passed::{Passed, WantedSockets};
    use crate::serve::socket;
    use crate::state_lock::{Holder, StateLock};

    const SOON: Duration = Duration::from_secs(5);

    fn holder(pid: u32) -> Holder {
        Holder { pid, admin: None, since: SystemTime::UNIX_EPOCH }
    }

    /// Whatever sockets come.
    fn anything() -> WantedSockets {
        WantedSockets::default()
    }

    fn nothing() -> Estate {
        Estate::of_ports(BTreeMap::new())
    }

    /// A host with one listener, and a control task that does as it should.
    struct Rig {
        folder: tempfile::TempDir,
        key: ListenKey,
        listener: Arc<OwnedFd>,
        handed: oneshot::Receiver<Handed>,
        /// Whether each hand-over came to its end, as the control task knows it.
        committed: Receiver<bool>,
    }

    impl Rig {
        fn start(number: u8, standstill: Duration) -> Self {
            let folder = tempfile::tempdir().expect("a folder can be made");
            let lock = StateLock::take(folder.path(), holder(1)).expect("nobody has it");
            let office = Office::found(folder.path(), lock).expect("a socket can be made");
            let own = TcpListener::bind(SocketAddr::from(([127, 85, 10, number], 7501))).expect("a free address");
            let address = own.local_addr().expect("it is bound");
            let admin = watch::Sender::new([(address, Arc::new(OwnedFd::from(own)))].into());
            let readiness = Readiness::default();
            let (admin, path) = (admin.subscribe(), folder.path().to_owned());
            let host = Host { office, folder: path, admin, readiness, cannot_start: None, pod: None };
            let key = ListenKey::new([127, 85, 10, number].into(), 7500, Protocol::Tcp);
            let listener = Arc::new(socket::listen_tcp(key).expect("a free address"));
            let (tell, committed) = channel();
            let shared = Arc::clone(&listener);
            let control = move |ask: Ask| {
                let Ask::Lend(Handing { lent, end }) = ask else { return false };
                let (tell, sockets) = (tell.clone(), vec![Arc::clone(&shared)]);
                thread::spawn(move || {
                    let passed = vec![Passed { key, parked: false, sockets }];
                    let (health_ports, source) = Default::default();
                    let _ = lent.send(Ok(Lent { passed, health_ports, estate: nothing(), source }));
                    let done = end.blocking_recv();
                    let _ = tell.send(done.is_ok());
                    done.map(|done| done.send(()))
                });
                true
            };
            let handed = host.attend_with(control, standstill).expect("threads are left");
            Self { folder, key, listener, handed, committed }
        }

        fn take_over(&self) -> TakeOver {
            TakeOver {
                folder: self.folder.path().to_owned(),
                holder: holder(2),
                pod: None,
                decision: Decision::default(),
            }
        }

        fn was_committed(&self) -> bool {
            self.committed.recv_timeout(SOON).expect("it ends")
        }

        /// A successor that has said everything up to the question.
        fn asks(&self) -> Post {
            let post = call(self.folder.path()).expect("somebody listens");
            introduce(&post, Introduction::own()).expect("it is of our version");
            post.send(Parcel::new(Kind::Take, &()), SOON).expect("it goes");
            post
        }
    }

    fn hear_until(post: &Post, kind: Kind) {
        while post.receive(SOON).expect("more is said").kind != kind {}
    }

    #[test]
    fn t234_given_a_successor_that_does_as_it_should_when_it_asks_then_everything_is_its_own() {
        let rig = Rig::start(1, SOON);

        let offer = rig.take_over().ask(&anything(), nothing()).expect("it is given").expect("somebody is there");
        let mut taken = offer.accept(holder(2)).expect("it is ours");

        assert!(taken.from.as_ref().expect("there was one").released());
        assert!(rig.was_committed());
        let handed = rig.handed.blocking_recv().expect("it was handed over");
        assert_eq!(handed.pid, std::process::id().cast_signed());
        let keys: Vec<_> = taken.listeners.iter().map(|passed| (passed.key, passed.sockets.len())).collect();
        assert_eq!(keys, [(rig.key, 1)]);
        let fresh = taken.fresh.as_ref().expect("it was looked at some");
        taken.listeners[0].check(1, fresh).expect("it is the same socket");
        let admin: Vec<_> = taken.office.take_admin_sockets().into_keys().collect();
        assert_eq!(admin, [([127, 85, 10, 1], 7501).into()]);
        let refused = StateLock::take(rig.folder.path(), holder(3)).expect_err("it has a new owner").to_string();
        assert!(refused.contains("pid 2,"), "{refused}");
        drop(taken);
        StateLock::take(rig.folder.path(), holder(3)).expect("nobody has a copy any more");
    }

    #[test]
    fn f25_given_a_successor_that_crashes_at_any_step_when_it_is_gone_then_everything_is_as_before() {
        let rig = Rig::start(2, SOON);

        drop(rig.take_over().ask(&anything(), nothing()).expect("it is given")); // With all descriptors, before it is ready.
        assert!(!rig.was_committed());
        drop(rig.asks()); // Before it has read anything.
        assert!(!rig.was_committed());
        let post = rig.asks();
        hear_until(&post, Kind::End);
        post.send(Parcel::new(Kind::Ready, &()), SOON).expect("it goes");
        hear_until(&post, Kind::Commit);
        drop(post); // Before it has said that it is its own.
        assert!(!rig.was_committed());

        let offer = rig.take_over().ask(&anything(), nothing()).expect("it is given").expect("somebody is there");
        offer.accept(holder(2)).expect("it is ours");
        assert!(rig.was_committed());
    }

    #[test]
    fn f25_given_a_socket_with_another_option_when_a_successor_sees_it_then_nothing_is_taken_over() {
        let rig = Rig::start(5, SOON);
        let web = ServicePortName::new(ObjectName::new("default", "web"), "http", Protocol::Tcp);
        let wanted = WantedSockets { listeners: [(rig.key, (web, 1))].into() };
        let shares_port = |shares| SockRef::from(&rig.listener).set_reuse_port(shares).expect("a listener");

        shares_port(true);
        let refused = rig.take_over().ask(&wanted, nothing()).expect_err("it is another one").to_string();

        let why = "default/web:http: the socket at 127.85.10.5:7500/TCP cannot be taken over: its SO_REUSEPORT is another one";
        assert!(refused.contains(why), "{refused}");
        assert!(!rig.was_committed());
        shares_port(false);
        rig.take_over().ask(&wanted, nothing()).expect("it is as it should be");
    }

    #[test]
    fn f25_given_a_successor_that_is_asked_to_end_when_it_has_not_taken_yet_then_it_does_not_and_after_that_it_knows() {
        let rig = Rig::start(6, SOON);

        let take_over = rig.take_over();
        let offer = take_over.ask(&anything(), nothing()).expect("it is given").expect("somebody is there");
        assert!(take_over.decision.leave());
        let left = offer.accept(holder(2)).expect_err("it is about to end");

        assert!(matches!(left, crate::handover::TakeError::Left), "{left}");
        assert!(!rig.was_committed());
        let take_over = rig.take_over();
        let offer = take_over.ask(&anything(), nothing()).expect("it is given").expect("somebody is there");
        offer.accept(holder(2)).expect("it is ours");
        assert!(!take_over.decision.leave(), "it has to be looked after");
        assert!(rig.was_committed());
    }

    #[test]
    fn f25_given_a_successor_that_says_nothing_when_it_was_waited_for_then_it_cannot_begin_any_more() {
        let rig = Rig::start(3, Duration::from_millis(500));
        let post = rig.asks();
        hear_until(&post, Kind::End);
        post.send(Parcel::new(Kind::Ready, &()), SOON).expect("it goes");
        hear_until(&post, Kind::Commit);

        assert!(!rig.was_committed());

        assert!(post.send(Parcel::new(Kind::Taken, &()), SOON).is_err());
    }

    #[test]
    fn t237_given_a_thread_that_panics_when_a_successor_asks_then_the_folder_stays_its_own() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let lock = StateLock::take(folder.path(), holder(1)).expect("nobody has it");
        let office = Office::found(folder.path(), lock).expect("a socket can be made");
        let admin = watch::Sender::default().subscribe();
        let (readiness, path) = (Readiness::default(), folder.path().to_owned());
        let host = Host { office, folder: path, admin, readiness, cannot_start: None, pod: None };
        let handed = host.attend_with(|_| panic!("a fault of the test's"), SOON).expect("threads are left");

        let take_over =
            TakeOver { folder: folder.path().to_owned(), holder: holder(2), pod: None, decision: Decision::default() };
        take_over.ask(&anything(), nothing()).expect_err("nobody answers any more");

        handed.blocking_recv().expect_err("nothing was handed over");
        let refused = StateLock::take(folder.path(), holder(3)).expect_err("it has its owner").to_string();
        assert!(refused.contains("pid 1,"), "{refused}");
    }

    #[test]
    fn f25_given_another_version_or_what_is_no_version_when_it_calls_then_it_is_told_and_others_are_heard() {
        let rig = Rig::start(4, SOON);
        let says = |kind, body: &str| {
            let post = call(rig.folder.path()).expect("somebody listens");
            let parcel = Parcel { kind, body: body.as_bytes().to_vec(), descriptors: Vec::new() };
            post.send(parcel, SOON).expect("it goes");
            post.receive(SOON)
        };

        let answer = says(Kind::Hello, r#"{"oldest":8,"newest":9,"version":"9.1.0","pid":1}"#).expect("it is answered");
        let Refusal { why, reason } = Refusal::of(&answer);
        assert_eq!((answer.kind, reason), (Kind::Refused, UpgradeResult::Version));
        assert!(why.contains("kube-relay 9.1.0 speaks versions 8 to 9"), "{why}");
        for (kind, body) in [(Kind::Take, "{}"), (Kind::Hello, "}")] {
            let Refusal { why, reason } = Refusal::of(&says(kind, body).expect("it is answered"));
            assert_eq!((reason, why.contains("does not say who it is")), (UpgradeResult::Version, true), "{why}");
        }

        assert!(rig.take_over().look().expect("it is of our version"));
    }
}
