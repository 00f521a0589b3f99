//! The side that takes over: asks for what there is once it knows what to do with it, and begins when that is its own.
//!
//! Blocking; the control task has it done elsewhere and waits. What is to be served is decided there.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::warn;

use super::door::{CallError, call};
use super::fault::{self, Step};
use super::importer::Importer;
use super::introduction::{Introduction, Stranger};
use super::office::{NoDoor, Office};
use super::parcel::{Kind, Parcel, ParcelError};
use super::post::{Post, PostError};
use super::refusal::Refusal;
use super::sockets;
use super::source::SourceSaid;
use crate::causes::causes;
use crate::remedy::BindFailure;
use crate::serve::estate::Estate;
use crate::serve::fresh::Fresh;
use crate::serve::passed::{Fit, Passed, Unlike, WantedSockets};
use crate::state_lock::{Holder, StateLock, StateLockError};
use crate::stats::UpgradeResult;

/// How long the other side may take to say who it is. It may be busy with another caller.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take from one message to the next: its control task may be in the middle of a large change.
const NEXT_LIMIT: Duration = Duration::from_secs(20);
/// How long one message may take to be taken from us.
const SEND_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take to look away from what is ours by then, and to close it.
const RELEASE_LIMIT: Duration = Duration::from_secs(5);

/// How long a process that has hung up may take to end, if it does.
const END_LIMIT: Duration = Duration::from_secs(1);

/// What is to be taken over, and from whom.
#[derive(Clone, Debug)]
pub struct TakeOver {
    /// Whose owner hands over. From `--state-dir`.
    pub folder: PathBuf,
    /// What this process says of itself as the owner.
    pub holder: Holder,
    /// The pod that this process runs in, by its UID; `None`: it is none. From `--pod-uid`.
    pub pod: Option<String>,
    /// Whether it comes to that.
    pub decision: Decision,
}

/// Whether what another process serves with is taken, or left to it for good. Decided once, by whoever is first; clones are one.
#[derive(Clone, Debug, Default)]
pub struct Decision(Arc<OnceLock<bool>>);

impl Decision {
    /// Leaves it to the other process. False where it is taken, or was in this moment: then it has to be looked after.
    pub fn leave(&self) -> bool {
        !*self.0.get_or_init(|| false)
    }

    /// Takes it.
    ///
    /// # Errors
    /// It is left to the other process.
    fn take(&self) -> Result<(), TakeError> {
        if *self.0.get_or_init(|| true) { Ok(()) } else { Err(TakeError::Left) }
    }
}

/// Why nothing was taken over: the other process serves as before, if there is one.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// Nobody could be asked, for another reason than that nobody is there.
    #[error(transparent)]
    Call(CallErrorKind),
    /// The two do not understand each other.
    #[error("nothing can be taken over")]
    Stranger(#[source] StrangerKind),
    /// The other one will not.
    #[error("the kube-relay that runs does not hand over: {why}")]
    Refused {
        /// As it says itself.
        why: String,
        /// The word for it.
        reason: UpgradeResult,
    },
    /// Nothing is left to open sockets with: the other one's cannot be compared with new ones.
    #[error("no {} is left to compare its sockets with new ones", lacking(.0))]
    Short(#[source] std::io::Error),
    /// A listener of the other one is not as it would be here.
    #[error("{0}")]
    Unlike(UnlikeKind),
    /// The other one has ended before all was told, and nothing is left of it: whoever asks again may begin.
    #[error("the kube-relay that was to hand over has ended")]
    Ended,
    /// This process was asked to end before.
    #[error("this process is about to end")]
    Left,
    /// The conversation broke off.
    #[error("the hand-over broke off")]
    Broken(#[source] BrokenKind),
    /// There is nobody to take over from, and the folder cannot be locked.
    #[error(transparent)]
    Lock(#[from] StateLockError),
    /// Nobody hands over, and the door cannot be made.
    #[error("{}: cannot make a socket there", folder.display())]
    Door {
        /// The folder.
        folder: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// See [`TakeError::Call`].
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct CallErrorKind(CallError);

/// See [`TakeError::Stranger`].
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct StrangerKind(Stranger);

/// See [`TakeError::Unlike`].
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct UnlikeKind(Unlike);

/// See [`TakeError::Broken`].
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct BrokenKind(Break);

#[derive(Debug, thiserror::Error)]
enum Break {
    #[error(transparent)]
    Post(#[from] PostError),
    #[error(transparent)]
    Parcel(#[from] ParcelError),
    #[error("the other process says {0:?} out of turn")]
    OutOfTurn(Kind),
    #[error("the other process does not hand its folder over")]
    NoFolder,
}

impl TakeError {
    /// What it counts as where upgrades are counted: the same word as on the other side.
    pub fn reason(&self) -> UpgradeResult {
        match self {
            Self::Call(CallErrorKind(CallError::Silent { .. })) => UpgradeResult::Timeout,
            Self::Stranger(_) | Self::Broken(BrokenKind(Break::Parcel(_))) => UpgradeResult::Version,
            Self::Refused { reason, .. } => *reason,
            Self::Ended | Self::Left => UpgradeResult::Ended,
            Self::Broken(BrokenKind(Break::Post(PostError::Limit))) => UpgradeResult::Timeout,
            Self::Broken(BrokenKind(Break::Post(PostError::Closed))) => UpgradeResult::Ended,
            Self::Call(_) | Self::Short(_) | Self::Unlike(_) | Self::Broken(_) | Self::Lock(_) | Self::Door { .. } => {
                UpgradeResult::Refused
            }
        }
    }
}

/// What there is none of.
fn lacking(error: &std::io::Error) -> &'static str {
    if BindFailure::of(error) == BindFailure::Memory { "memory" } else { "descriptor" }
}

impl From<Refusal> for TakeError {
    fn from(Refusal { why, reason }: Refusal) -> Self {
        Self::Refused { why, reason }
    }
}

impl From<Unlike> for TakeError {
    fn from(unlike: Unlike) -> Self {
        Self::Unlike(UnlikeKind(unlike))
    }
}

impl From<Break> for TakeError {
    fn from(error: Break) -> Self {
        Self::Broken(BrokenKind(error))
    }
}

impl From<PostError> for TakeError {
    fn from(error: PostError) -> Self {
        Break::from(error).into()
    }
}

impl From<ParcelError> for TakeError {
    fn from(error: ParcelError) -> Self {
        Break::from(error).into()
    }
}

/// All that was offered. Dropped, its copies are closed, and the other side goes on as before.
#[derive(Debug)]
pub(crate) struct Offer {
    other: Other,
    offered: Offered,
    decision: Decision,
}

#[derive(Debug)]
struct Offered {
    office: Office,
    fresh: Fresh,
    listeners: Vec<Passed>,
    health_ports: Vec<Passed>,
    source: SourceSaid,
    moving: Importer,
}

/// The process that hands over.
#[derive(Debug)]
struct Other {
    post: Post,
    told: Introduction,
    /// Readable once it has ended; `None` where the kernel does not tell.
    process: Option<OwnedFd>,
}

/// All that is ours now.
#[derive(Debug)]
pub(crate) struct Taken {
    /// What goes to the process.
    pub(crate) office: Office,
    /// What new sockets are like here; `None` where nobody was there before.
    pub(crate) fresh: Option<Fresh>,
    /// The sockets of listeners.
    pub(crate) listeners: Vec<Passed>,
    /// Those of health ports.
    pub(crate) health_ports: Vec<Passed>,
    /// What was counted of the source; nothing where nobody was there before.
    pub(crate) source: SourceSaid,
    /// What goes on, beside them; `None` where nobody was there before.
    pub(crate) moving: Option<Importer>,
    /// The last owner; `None` where there was none.
    pub(crate) from: Option<Predecessor>,
}

/// Whose it was.
#[derive(Debug)]
pub(crate) struct Predecessor {
    /// Its process, as itself knows it.
    pub(crate) pid: u32,
    /// Its program.
    pub(crate) version: String,
    other: Other,
}

impl TakeOver {
    /// Whether somebody is there who could hand over; that costs nothing, and a wrong version is known before all else.
    ///
    /// # Errors
    /// There is somebody, and it will not do.
    pub fn look(&self) -> Result<bool, TakeError> {
        Ok(self.greet()?.is_some())
    }

    /// Asks for all there is; `None` where nobody is there. Sockets have to be as `wanted`; `estate` is what runs here, and
    /// is to go on with it.
    ///
    /// # Errors
    /// It was not given, or not whole, or a socket is another one.
    pub(crate) fn ask(&self, wanted: &WantedSockets, estate: Estate) -> Result<Option<Offer>, TakeError> {
        let Some(other) = self.greet()? else { return Ok(None) };
        let offered = other.hear_all(wanted, estate).inspect_err(|error| other.refuse(error))?;
        Ok(Some(Offer { other, offered, decision: self.decision.clone() }))
    }

    /// Begins with nothing: nobody is there who could hand over.
    ///
    /// # Errors
    /// The folder is somebody else's all the same, or of no use.
    pub(crate) fn begin(&self) -> Result<Taken, TakeError> {
        let lock = StateLock::take(&self.folder, self.holder)?;
        let no_door = |NoDoor { source, .. }| TakeError::Door { folder: self.folder.clone(), source };
        let office = Office::found(&self.folder, lock).map_err(no_door)?;
        let (listeners, health_ports, source) = Default::default();
        Ok(Taken { office, fresh: None, listeners, health_ports, source, moving: None, from: None })
    }

    fn greet(&self) -> Result<Option<Other>, TakeError> {
        let post = match call(&self.folder) {
            Ok(post) => post,
            Err(CallError::Nobody { .. }) => return Ok(None),
            Err(error) => return Err(TakeError::Call(CallErrorKind(error))),
        };
        let process = post.process();
        let told = introduce(&post, Introduction::own().taking_over()).map_err(|error| match error {
            Greeting::Stranger(stranger) => TakeError::Stranger(StrangerKind(stranger)),
            Greeting::Refused(refusal) => refusal.into(),
            Greeting::Post(error) => broken(error, process.as_ref()),
            Greeting::Parcel(error) => error.into(),
        })?;
        Ok(Some(Other { post, told, process }))
    }
}

/// Why nobody was met whom one can talk to.
#[derive(Debug, thiserror::Error)]
pub(super) enum Greeting {
    #[error(transparent)]
    Stranger(Stranger),
    #[error("{}", .0.why)]
    Refused(Refusal),
    #[error(transparent)]
    Post(#[from] PostError),
    #[error(transparent)]
    Parcel(#[from] ParcelError),
}

/// Says who we are and hears who it is.
pub(super) fn introduce(post: &Post, own: Introduction) -> Result<Introduction, Greeting> {
    match post.send(own.parcel(), SEND_LIMIT) {
        Ok(()) | Err(PostError::Closed) => {} // Who has hung up may have said why.
        Err(error) => return Err(error.into()),
    }
    let answer = post.receive(HELLO_LIMIT)?;
    if answer.kind == Kind::Refused {
        return Err(Greeting::Refused(Refusal::of(&answer)));
    }
    let told: Introduction = answer.said()?;
    told.check().map_err(Greeting::Stranger)?;
    Ok(told)
}

impl Offer {
    /// Has everything ready that it needs here. To be called before [`accept`](Self::accept); no byte moves meanwhile.
    pub(crate) async fn prepare(&mut self) {
        self.offered.moving.prepare().await;
    }

    /// Takes it. Where this succeeds, it is ours and nobody else's.
    ///
    /// # Errors
    /// It is the other one's as before.
    pub(crate) fn accept(self, holder: Holder) -> Result<Taken, TakeError> {
        let Self { other, offered, decision } = self;
        let Offered { office, fresh, listeners, health_ports, source, moving } = offered;
        other.agree(&decision).inspect_err(|error| other.refuse(error))?;
        fault::at(Step::Taken);
        office.lock.tell(holder);
        office.door.own();
        let from = Predecessor { pid: other.told.pid, version: other.told.version(), other };
        let (fresh, moving, from) = (Some(fresh), Some(moving), Some(from));
        Ok(Taken { office, fresh, listeners, health_ports, source, moving, from })
    }
}

impl Other {
    /// Has it tell all it has.
    fn hear_all(&self, wanted: &WantedSockets, estate: Estate) -> Result<Offered, TakeError> {
        self.say(Parcel::new(Kind::Take, &()))?;
        fault::at(Step::Take);
        // Before anything comes, and takes the last descriptors.
        let fresh = Fresh::look().map_err(TakeError::Short)?;
        let (mut folder, mut admin, mut moving) = (None, None, Importer::new(estate));
        let (mut listeners, mut health_ports, mut source) = (Vec::new(), Vec::new(), SourceSaid::default());
        loop {
            let parcel = self.hear()?;
            match parcel.kind {
                Kind::Folder => {
                    folder = Some(parcel);
                    fault::at(Step::Folder);
                }
                Kind::Admin => admin = Some(parcel),
                Kind::Listener => {
                    let told = sockets::listeners(parcel)?;
                    // Now, while streams still flow there, and nothing has been decided.
                    for passed in &told {
                        if wanted.check(passed, &fresh)? == Fit::Anew {
                            moving.leave_out(passed.key);
                        }
                    }
                    listeners.extend(told);
                }
                Kind::HealthPort => health_ports.extend(sockets::listeners(parcel)?),
                Kind::Source => source = parcel.said()?,
                kind if kind.moves() || kind == Kind::Losses => {
                    moving.take(parcel)?;
                    if kind == Kind::Stream {
                        fault::at(Step::Stream);
                    }
                }
                Kind::End => break,
                kind => return Err(Break::OutOfTurn(kind).into()),
            }
        }
        let office = Office::passed(folder.ok_or(Break::NoFolder)?, admin)?;
        fault::at(Step::End);
        Ok(Offered { office, fresh, listeners, health_ports, source, moving })
    }

    /// Has it let go. Once this is done, all is ours and nobody else's.
    fn agree(&self, decision: &Decision) -> Result<(), TakeError> {
        // Where it has hung up, it is looked at what it has said before.
        let _ = self.post.send(Parcel::new(Kind::Ready, &()), SEND_LIMIT);
        fault::at(Step::Ready);
        match self.hear() {
            Ok(parcel) if parcel.kind == Kind::Commit => {
                fault::at(Step::Commit);
                decision.take()?;
                // The one moment that counts: once this is sent, the other side hears it, or has ended.
                self.say(Parcel::new(Kind::Taken, &()))
            }
            Ok(parcel) => Err(Break::OutOfTurn(parcel.kind).into()),
            // All that it had was told, and nothing of it has moved since: it says so before it goes on. So what is here is as it
            // left it, and in nobody else's hands.
            Err(TakeError::Ended) => {
                decision.take()?;
                let from_pid = self.told.pid;
                warn!(
                    from_pid,
                    "the process that hands over has ended in the middle: this one goes on with all it has told"
                );
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn say(&self, parcel: Parcel) -> Result<(), TakeError> {
        self.post.send(parcel, SEND_LIMIT).map_err(|error| {
            // Whoever hears no more may still say why: as when this process has stood still for too long.
            let why = matches!(error, PostError::Closed).then(|| self.hear().err()).flatten();
            why.unwrap_or_else(|| broken(error, self.process.as_ref()))
        })
    }

    fn hear(&self) -> Result<Parcel, TakeError> {
        let parcel = self.post.receive(NEXT_LIMIT).map_err(|error| broken(error, self.process.as_ref()))?;
        if parcel.kind == Kind::Refused { Err(Refusal::of(&parcel).into()) } else { Ok(parcel) }
    }

    /// Tells it why nothing is taken over, where it has not said so itself.
    fn refuse(&self, error: &TakeError) {
        let _ = self.post.send(Refusal::parcel(&causes(error), error.reason()), SEND_LIMIT); // It may be gone.
    }
}

/// Whether who has hung up has ended.
fn broken(error: PostError, process: Option<&OwnedFd>) -> TakeError {
    match (&error, process) {
        (PostError::Closed, Some(process)) if has_ended(process) => TakeError::Ended,
        _ => error.into(),
    }
}

/// Its descriptors are closed one after the other as it ends: the last of them is when this is told.
fn has_ended(process: &OwnedFd) -> bool {
    let limit = Timespec::try_from(END_LIMIT).ok();
    let mut events = [PollFd::new(process, PollFlags::IN)];
    rustix::io::retry_on_intr(|| poll(&mut events, limit.as_ref())).is_ok_and(|count| count > 0)
}

impl Predecessor {
    /// Waits until it looks at nothing any more that is ours by then. False where it does not say so in time.
    pub(crate) fn released(&self) -> bool {
        self.says(Kind::Released)
    }

    /// Waits until it has closed all its listeners, after it has [released](Self::released) them. False where it does not say so
    /// in time.
    pub(crate) fn closed(&self) -> bool {
        !self.other.told.understands(Kind::Closed) || self.says(Kind::Closed)
    }

    /// Tells it that all is served here.
    pub(crate) fn tell_serving(&self) {
        let _ = self.other.post.send(Parcel::new(Kind::Serving, &()), SEND_LIMIT); // It may have ended.
    }

    fn says(&self, word: Kind) -> bool {
        self.other.post.receive(RELEASE_LIMIT).is_ok_and(|parcel| parcel.kind == word)
    }
}
