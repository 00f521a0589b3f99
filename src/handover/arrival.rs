//! How a process that is to take over comes to its state folder: as the first one, as a successor, or not yet.
//!
//! What a successor then does is in `taking`.

use super::line;
use super::taking::{TakeError, TakeOver};
use crate::state_lock::{StateLock, StateLockError};

/// What there is to do.
#[derive(Debug)]
pub enum Arrival {
    /// To begin: nobody has the folder, and now this process has.
    First(StateLock),
    /// To take over from who serves, once there is something to serve.
    Successor,
    /// To come again later.
    NotYet(NotYet),
    /// To do without: whether somebody has the folder cannot be known.
    Alone(StateLockError),
}

/// Why a process has to wait.
#[derive(Debug, thiserror::Error)]
pub enum NotYet {
    /// Somebody has the folder who does not hand over: it has just begun, or is about to end, or is of a version that cannot.
    #[error("who has the folder does not hand over: it is waited for until it does, or ends ({0})")]
    Held(StateLockError),
    /// The pod that has taken this one's place serves.
    #[error("another pod has taken this one's place: it is waited for until that one ends")]
    Past,
}

impl TakeOver {
    /// Looks who has the folder, and takes it where nobody has. Blocks, for some seconds at most.
    ///
    /// # Errors
    /// There is somebody whom this process cannot take over from.
    pub fn arrive(&self) -> Result<Arrival, TakeError> {
        if self.look()? {
            let is_past = self.pod.as_ref().is_some_and(|pod| line::is_past(&self.folder, pod));
            return Ok(if is_past { Arrival::NotYet(NotYet::Past) } else { Arrival::Successor });
        }
        Ok(match StateLock::take(&self.folder, self.holder) {
            Ok(lock) => Arrival::First(lock),
            Err(error @ StateLockError::Held { .. }) => Arrival::NotYet(NotYet::Held(error)),
            Err(error) => Arrival::Alone(error),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::thread;
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::handover::introduction::Introduction;
    use crate::handover::office::Office;
    use crate::handover::taking::Decision;
    use crate::state_lock::Holder;

    const SOON: Duration = Duration::from_secs(5);

    fn holder(pid: u32) -> Holder {
        Holder { pid, admin: None, since: SystemTime::UNIX_EPOCH }
    }

    fn pod(folder: &Path, name: &str) -> TakeOver {
        TakeOver {
            folder: folder.to_owned(),
            holder: holder(2),
            pod: Some(name.to_owned()),
            decision: Decision::default(),
        }
    }

    #[test]
    fn t234_given_a_folder_of_nobody_or_of_one_without_a_door_when_a_process_comes_then_it_begins_or_waits() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let process = pod(folder.path(), "one");

        let first = process.arrive().expect("nobody is there");
        let Arrival::First(lock) = first else { panic!("{first:?}") };
        let second = process.arrive().expect("nobody answers");
        drop(lock);

        let Arrival::NotYet(NotYet::Held(why)) = second else { panic!("{second:?}") };
        assert!(why.to_string().contains("belongs to the kube-relay with pid 2,"), "{why}");
        assert!(matches!(process.arrive(), Ok(Arrival::First(_))), "it has ended");
    }

    #[test]
    fn t234_given_a_pod_that_serves_when_pods_before_and_after_it_come_then_only_those_after_it_take_over() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let lock = StateLock::take(folder.path(), holder(1)).expect("nobody has it");
        let office = Office::found(folder.path(), lock).expect("a socket can be made");
        for name in ["old", "serving"] {
            line::enter(folder.path(), name).expect("the test's folder can be written");
        }
        let arrive = |name: &str| {
            thread::scope(|scope| {
                scope.spawn(|| {
                    let caller = office.door.next(None, Some(SOON)).expect("it listens").expect("somebody comes");
                    caller.post.receive(SOON).expect("it says who it is");
                    caller.post.send(Introduction::own().parcel(), SOON).expect("it goes");
                });
                pod(folder.path(), name).arrive().expect("it is of our version")
            })
        };

        assert!(matches!(arrive("old"), Arrival::NotYet(NotYet::Past)));
        assert!(matches!(arrive("serving"), Arrival::Successor), "its container was started again, or upgrades");
        assert!(matches!(arrive("new"), Arrival::Successor));
    }

    #[test]
    fn given_a_folder_that_is_missing_when_a_process_comes_then_it_has_to_do_without() {
        let folder = tempfile::tempdir().expect("a folder can be made");

        let arrival = pod(&folder.path().join("missing"), "one").arrive();

        assert!(matches!(arrival, Ok(Arrival::Alone(_))), "{arrival:?}");
    }
}
