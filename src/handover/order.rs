//! What `kube-relay upgrade` does: asks the running process to start its successor, and waits for what comes of it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::door::{CallError, call_to_ask};
use super::introduction::Introduction;
use super::parcel::{Kind, Parcel, ParcelError};
use super::post::PostError;
use super::refusal::Refusal;
use super::taking::{Greeting, introduce};
use crate::config::DEFAULT_UPGRADE_TIMEOUT;

/// How long the order itself may take.
const SEND_LIMIT: Duration = Duration::from_secs(5);
/// How much longer than its successor the running process may take: it ends that one, and says so.
const ANSWER_LIMIT: Duration = Duration::from_secs(45);

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Order {
    /// The program to start; `None`: the one at the place of the running one.
    #[serde(default)]
    pub(super) program: Option<PathBuf>,
    /// How long it may take from its start until it takes over.
    #[serde(default = "default_limit")]
    pub(super) limit_ms: u64,
}

fn default_limit() -> u64 {
    u64::try_from(DEFAULT_UPGRADE_TIMEOUT.as_millis()).unwrap_or(u64::MAX)
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeReport {
    /// The process that serves now.
    pub pid: u32,
    /// Its program.
    pub version: String,
    /// Listeners that were handed over.
    pub listeners: usize,
    /// Connections that go on in the new process; others come to their end in the old one.
    #[serde(default)]
    pub streams: usize,
    /// UDP flows that go on there.
    #[serde(default)]
    pub flows: usize,
    /// From the first word of the hand-over to the last, in milliseconds.
    pub elapsed_ms: u64,
}

/// What a look at the process with a state folder tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    version: String,
    /// As this process knows it; 0 where it is in another namespace of processes, as in another pod.
    pid: i32,
    ready: bool,
    /// The pod that it runs in, by its UID; empty where it does not say.
    pod: String,
    /// Why it starts no successor; `None` where it does.
    starts_none: Option<String>,
    /// Listeners that a crash would not close.
    kept: u64,
}

impl Seen {
    #[cfg(test)]
    pub(crate) fn of(pid: i32, ready: bool) -> Self {
        Self { version: "0.1.0".into(), pid, ready, pod: String::new(), starts_none: None, kept: 0 }
    }

    #[cfg(test)]
    pub(crate) fn keeping(self, kept: u64) -> Self {
        Self { kept, ..self }
    }

    #[cfg(test)]
    pub(crate) fn starting_none(self, why: &str) -> Self {
        Self { starts_none: Some(why.to_owned()), ..self }
    }

    /// Why it does not do what `kube-relay upgrade` asks for, if so. Another one can take over all the same.
    pub fn starts_none(&self) -> Option<&str> {
        self.starts_none.as_deref()
    }

    /// How many of its listeners a crash would not close: the service manager keeps their sockets.
    pub fn kept(&self) -> u64 {
        self.kept
    }

    /// True where it serves, and runs here.
    pub fn is_ready(&self) -> bool {
        self.ready && self.pid > 0
    }

    /// The same for who asks from this pod: with the node's processes in sight, numbers tell nothing of whose they are. `None`
    /// is nobody's in particular.
    pub fn is_ready_in(&self, pod: Option<&str>) -> bool {
        match pod {
            Some(pod) if !self.pod.is_empty() => self.ready && self.pod == pod,
            _ => self.is_ready(),
        }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { version, pid, ready, .. } = self;
        match (pid, ready) {
            (..=0, _) => write!(f, "kube-relay {version} in another container has the folder"),
            (pid, true) => write!(f, "kube-relay {version} (pid {pid}) serves"),
            (pid, false) => {
                write!(f, "kube-relay {version} (pid {pid}) does not serve everything yet, or not any more")
            }
        }
    }
}

/// Looks who has a state folder. Blocks, for some seconds at most.
///
/// # Errors
/// Nobody has, or it does not answer.
pub fn look(folder: &Path) -> Result<Seen, OrderError> {
    Ok(see(folder)?)
}

/// The process that has a state folder; `None` where nobody has, 0 where it is in another namespace of processes. By the kernel's
/// word alone: that one may be busy, or of another version.
///
/// # Errors
/// It cannot be told.
pub(crate) fn serving(folder: &Path) -> Result<Option<i32>, CallError> {
    match call_to_ask(folder) {
        Ok(post) => {
            let peer = post.peer().map_err(|source| CallError::Failed { folder: folder.to_owned(), source })?;
            Ok(Some(peer.pid))
        }
        Err(CallError::Nobody { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn see(folder: &Path) -> Result<Seen, NotDone> {
    let post = call_to_ask(folder)?;
    let pid = post.peer().map_err(|source| CallError::Failed { folder: folder.to_owned(), source })?.pid;
    let told = introduce(&post, Introduction::own())?;
    let (version, starts_none) = (told.version(), told.why_none_is_started());
    Ok(Seen { version, pid, ready: told.ready, pod: told.pod, starts_none, kept: told.kept })
}

/// Why nothing came of it: the running process serves as before, if there is one.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct OrderError(#[from] NotDone);

impl OrderError {
    /// True where nobody is there to be asked.
    pub fn is_nobody(&self) -> bool {
        matches!(self.0, NotDone::Call(CallError::Nobody { .. }))
    }
}

#[derive(Debug, thiserror::Error)]
enum NotDone {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("the kube-relay that runs cannot be asked: {0}")]
    Greeting(#[from] Greeting),
    #[error("no upgrade ({}): {}", .0.reason, .0.why)]
    Refused(Refusal),
    #[error("nobody knows what came of it: {0}")]
    Post(#[from] PostError),
    #[error("nobody knows what came of it: {0}")]
    Parcel(#[from] ParcelError),
}

/// Has the process with this state folder start a program that takes over from it, and waits until that serves. Blocks.
///
/// # Errors
/// It does not: [`OrderError`] says why.
pub fn upgrade(folder: &Path, program: Option<PathBuf>, limit: Duration) -> Result<UpgradeReport, OrderError> {
    Ok(ask(folder, program, limit)?)
}

fn ask(folder: &Path, program: Option<PathBuf>, limit: Duration) -> Result<UpgradeReport, NotDone> {
    let post = call_to_ask(folder)?;
    introduce(&post, Introduction::own())?;
    let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    post.send(Parcel::new(Kind::Upgrade, &Order { program, limit_ms }), SEND_LIMIT)?;
    let answer = post.receive(limit.saturating_add(ANSWER_LIMIT))?;
    match answer.kind {
        Kind::Upgraded => Ok(answer.said()?),
        _ => Err(NotDone::Refused(Refusal::of(&answer))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_two_pods_of_a_node_when_one_asks_who_serves_then_another_pods_process_is_not_its_own() {
        let seen = Seen::of;

        assert!(seen(1, true).is_ready() && !seen(1, false).is_ready() && !seen(0, true).is_ready());
        let in_pod = |ready| Seen { pod: "new".into(), ..seen(4711, ready) };
        assert!(in_pod(true).is_ready_in(Some("new")) && !in_pod(true).is_ready_in(Some("old")));
        assert!(!in_pod(false).is_ready_in(Some("new")) && in_pod(true).is_ready_in(None));
        assert!(seen(1, true).is_ready_in(Some("new")), "it does not say where it is");
        assert_eq!(seen(0, true).to_string(), "kube-relay 0.1.0 in another container has the folder");
    }

    #[test]
    fn f25_given_an_order_of_another_version_when_read_then_what_it_does_not_say_has_a_default() {
        let parcel = Parcel { kind: Kind::Upgrade, body: b"{\"later\":1}".to_vec(), descriptors: Vec::new() };

        let order: Order = parcel.said().expect("it can be read");

        assert_eq!(order, Order { program: None, limit_ms: 60_000 });
    }
}
