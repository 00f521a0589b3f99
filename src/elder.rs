//! The first of a line of processes that have taken over from each other, each started by the one before it.
//!
//! Whoever has started the first one knows it by its number: a container ends with it, and so does what a shell, runit or
//! `docker run --init` looks after. So it stays until the last of the line has ended, passes signals on, and then ends as that
//! one did. It keeps nothing else. Those in between end once they are done, and their children become its own. Where a
//! supervisor is told of each number (`supervisor`) nobody has to stay, but for the first process of a container.
//!
//! Who is the last one is asked at the door of their state folder: the kernel tells who listens there.

use std::env;
use std::fmt;
use std::fs;
use std::future::Future;
use std::io;
use std::iter;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{self, Child, Command, ExitStatus};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Pid, PidfdFlags, WaitOptions, getpid, getppid, pidfd_open, set_child_subreaper, waitpid};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::sleep;
use tracing::{debug, info};

use crate::handover::serving;
use crate::heap;
use crate::lifecycle::{self, Request, Signals};
use crate::supervisor;

/// By which a successor knows the first one.
const ELDER: &str = "KUBE_RELAY_ELDER";
/// A line in which each still has connections is no longer than this.
const MOST_ANCESTORS: usize = 64;
/// When it is asked again who serves, where that could not be told, and how often.
const ASK_AGAIN: Duration = Duration::from_millis(500);
const MOST_QUESTIONS: usize = 20;

/// True where this process is to stay until those that it has started have ended.
pub fn stays() -> bool {
    process::id() == 1 || !(supervisor::is_there() || has_elder())
}

/// True where somebody knows this process, or the first one of its line, by its number.
pub fn is_held() -> bool {
    process::id() == 1 || has_elder()
}

/// Has a successor know whether it has to stay, and what that one starts come to us when it ends.
pub(crate) fn prepare(successor: &mut Command) {
    if !stays() {
        return;
    }
    if let Err(error) = set_child_subreaper(Some(getpid())) {
        debug!(%error, "who is started by a successor is another process's when that one ends");
    }
    successor.env(ELDER, process::id().to_string());
}

fn has_elder() -> bool {
    let elder = env::var(ELDER).ok().and_then(|number| number.parse::<u32>().ok());
    elder.is_some_and(|elder| ancestors().any(|pid| pid == elder))
}

/// From the parent up.
fn ancestors() -> impl Iterator<Item = u32> {
    let parent = getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    iter::successors(parent, |pid| parent_of(*pid)).take(MOST_ANCESTORS)
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the name of the program, which may have anything in it.
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok().filter(|pid| *pid > 0)
}

/// Those that have come after this process, of which it has started the first.
#[derive(Debug)]
pub struct Descendants {
    /// Where they meet.
    folder: PathBuf,
    /// The one that is waited for.
    pid: Pid,
    /// Whoever waits for its end.
    ended: JoinHandle<Ending>,
    /// How it did; `None` while it runs.
    ending: Option<Ending>,
}

/// How a process has ended; `None`: its parent knows that, and that is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending(Option<ExitStatus>);

impl Ending {
    /// False where it has failed, or was killed.
    pub fn is_success(self) -> bool {
        self.0.is_none_or(|status| status.success())
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(status) => status.fmt(f),
            None => f.write_str("nobody knows how"),
        }
    }
}

impl Descendants {
    /// With the first of them, whose end is waited for here. To be called on a runtime.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn after(child: Child, folder: PathBuf) -> io::Result<Self> {
        let pid = Pid::from_child(&child);
        Ok(Self { folder, pid, ended: watch(pid)?, ending: None })
    }

    /// Waits until none of them is left; how the last one has ended. It may be asked again where nobody has waited for it to
    /// the end.
    pub async fn end(&mut self) -> Ending {
        loop {
            let ending = match self.ending {
                Some(ending) => ending,
                None => {
                    let ending = (&mut self.ended).await.unwrap_or(Ending(None)); // An error is a runtime that ends.
                    *self.ending.insert(ending)
                }
            };
            let Some(next) = self.serving().await.filter(|next| *next != self.pid) else { return ending };
            // It may have ended since: then somebody else serves, or nobody does.
            if let Ok(ended) = watch(next) {
                (self.pid, self.ended, self.ending) = (next, ended, None);
            }
        }
    }

    /// Asks all that are left for the same.
    pub async fn pass_on(&self, request: Request) {
        let next = if self.ending.is_none() { Some(self.pid) } else { None };
        let serving = self.serving().await.filter(|serving| Some(*serving) != next);
        for pid in next.into_iter().chain(serving) {
            lifecycle::pass_on(request, pid.as_raw_nonzero().get().unsigned_abs());
        }
    }

    /// Waits until none of them is left, and passes on what this process is asked for.
    pub async fn outlast(mut self, signals: &mut Signals) -> Ending {
        heap::give_back();
        info!("this process stays for those that have come after it, and passes signals on");
        loop {
            tokio::select! {
                biased;
                ending = self.end() => return ending,
                request = signals.next() => self.pass_on(request).await,
            }
        }
    }

    /// The one that serves, where it is known here by a number.
    fn serving(&self) -> impl Future<Output = Option<Pid>> + use<> {
        let folder = self.folder.clone();
        async move {
            for _ in 0..MOST_QUESTIONS {
                let asked = folder.clone();
                match spawn_blocking(move || serving(&asked)).await {
                    Ok(Ok(pid)) => return pid.and_then(Pid::from_raw).filter(|pid| *pid != getpid()),
                    Ok(Err(error)) => debug!(%error, "who serves cannot be told"),
                    Err(_) => return None, // The runtime ends.
                }
                sleep(ASK_AGAIN).await;
            }
            None
        }
    }
}

/// Waits for the end of one, on a thread that may block.
fn watch(pid: Pid) -> io::Result<JoinHandle<Ending>> {
    let process = pidfd_open(pid, PidfdFlags::empty())?; // From here on the number is nobody else's.
    Ok(spawn_blocking(move || {
        let _ = retry_on_intr(|| poll(&mut [PollFd::new(&process, PollFlags::IN)], None));
        reap(pid)
    }))
}

/// Of one that has ended.
fn reap(pid: Pid) -> Ending {
    loop {
        match waitpid(Some(pid), WaitOptions::NOHANG) {
            Ok(Some((_, status))) => return Ending(Some(ExitStatus::from_raw(status.as_raw()))),
            Err(Errno::INTR) => {}
            Ok(None) | Err(_) => return Ending(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Child {
        Command::new("sh").args(["-c", script]).spawn().expect("a shell starts")
    }

    #[test]
    fn given_processes_above_this_one_when_counted_then_each_has_the_next_as_its_parent() {
        let all: Vec<u32> = ancestors().collect();

        assert_eq!(all.first().copied(), getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs()));
        assert!(all.len() < MOST_ANCESTORS && parent_of(process::id()) == all.first().copied(), "{all:?}");
        assert!(!has_elder(), "nobody has told of one");
    }

    #[tokio::test]
    async fn given_a_process_with_nobody_after_it_when_it_ends_then_that_is_the_end_and_how_it_did_is_known() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        for (script, told, is_success) in [
            ("exit 0", "exit status: 0", true),
            ("exit 3", "exit status: 3", false),
            ("kill -9 $$", "signal: 9", false),
        ] {
            let child = shell(script);
            let mut descendants = Descendants::after(child, folder.path().into()).expect("descriptors are left");

            let ending = descendants.end().await;

            assert!(ending.to_string().starts_with(told), "{ending}");
            assert_eq!(ending.is_success(), is_success);
        }
    }

    #[tokio::test]
    async fn given_a_process_that_is_asked_to_end_when_that_is_passed_on_then_it_hears_of_it() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let child = shell("exec sleep 1000");
        let mut descendants = Descendants::after(child, folder.path().into()).expect("descriptors are left");

        descendants.pass_on(Request::Drain).await;

        assert!(descendants.end().await.to_string().starts_with("signal: 15"));
    }
}
