//! Faults of a successor, for tests of the program as it is: it crashes, or stands still, at a step of the hand-over.
//!
//! Builds for use have none of it.

#[cfg(debug_assertions)]
use rustix::process::{Signal, getpid, kill_process};

/// Names the step and what happens there: `end:KILL` or `end:STOP`.
#[cfg(debug_assertions)]
const VARIABLE: &str = "KUBE_RELAY_FAULT";

/// How long a process may take until all its threads stand still.
#[cfg(debug_assertions)]
const STOPPING: std::time::Duration = std::time::Duration::from_millis(100);

/// What the successor has done when it happens.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    /// It has asked for everything.
    Take,
    /// It has got the folder.
    Folder,
    /// It has got connections, and others will come.
    Stream,
    /// It has got everything.
    End,
    /// It has said that it can begin.
    Ready,
    /// It was told that it may.
    Commit,
    /// It has said that all is its own.
    Taken,
}

/// Does what the test has asked for at this step, if anything.
#[cfg(debug_assertions)]
pub(super) fn at(step: Step) {
    let Some(asked) = std::env::var(VARIABLE).ok() else { return };
    let fault = asked.split_once(':').filter(|(at, _)| at.eq_ignore_ascii_case(&format!("{step:?}")));
    let signal = match fault {
        Some((_, "KILL")) => Signal::KILL,
        Some((_, "STOP")) => Signal::STOP,
        _ => return,
    };
    let _ = kill_process(getpid(), signal); // It may: it is this process.
    std::thread::sleep(STOPPING); // Another thread may hear of the signal first.
}

/// Nothing.
#[cfg(not(debug_assertions))]
pub(super) fn at(_: Step) {}
