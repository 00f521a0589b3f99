//! Who has a state folder: one process at a time, by a locked file in it that says who that is.
//!
//! The kernel takes the lock back when the process ends, however that happens, and the file stays: it is nobody's to delete,
//! as two processes would then lock a file each. Who removes routes is another question, of a network namespace and not
//! of a folder: `route_claim`.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::timestamp::rfc3339;

/// Its name in `--state-dir`.
const FILE: &str = "kube-relay.lock";
/// For its owner alone: whoever may open it may lock it.
const MODE: u32 = 0o600;
/// The longest text of a holder that is read.
const LONGEST_TEXT: u64 = 200;

/// The right to a state folder. Given back when it is dropped.
///
/// It belongs to the open file, not to the process: who is passed its descriptor has it, too, until the last one is
/// closed. So it can be handed over without a moment in which it is nobody's.
#[derive(Debug)]
pub struct StateLock {
    file: File,
}

/// What a holder says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Holder {
    /// Its process, as itself knows it: 1 in most pods.
    pub pid: u32,
    /// Where it tells its status, if anywhere.
    pub admin: Option<SocketAddr>,
    /// When it started.
    pub since: SystemTime,
}

/// Why there is no lock.
#[derive(Debug, thiserror::Error)]
pub enum StateLockError {
    /// Somebody has it.
    #[error("{}: this --state-dir belongs to the kube-relay with {holder}: end that one, or give each its own", folder.display())]
    Held {
        /// The folder.
        folder: PathBuf,
        /// What it says of itself.
        holder: String,
    },
    /// The file cannot be opened, or its file system has no locks: nobody knows whether the folder is another one's.
    #[error("{}: cannot lock {FILE}, a second kube-relay with this --state-dir would not be noticed", folder.display())]
    Unknown {
        /// The folder.
        folder: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl StateLock {
    /// Locks a folder, and says for whom. Waits for nobody.
    ///
    /// # Errors
    /// Where another process has it, and where that cannot be found out.
    pub fn take(folder: &Path, holder: Holder) -> Result<Self, StateLockError> {
        let unknown = |source| StateLockError::Unknown { folder: folder.to_owned(), source };
        let file = open(&folder.join(FILE)).map_err(unknown)?;
        match file.try_lock() {
            Ok(()) => {
                // On a read-only file system nobody is told, and nobody else gets the lock all the same.
                let _ = tell(&file, holder);
                Ok(Self { file })
            }
            Err(TryLockError::WouldBlock) => {
                Err(StateLockError::Held { folder: folder.to_owned(), holder: told(file) })
            }
            Err(TryLockError::Error(source)) => Err(unknown(source)),
        }
    }

    /// One that another process has had. Both have it until that one has closed its own descriptor.
    pub(crate) fn passed(file: OwnedFd) -> Self {
        Self { file: file.into() }
    }

    /// Another descriptor of the lock, for the next owner.
    pub(crate) fn copy(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }

    /// Says that it has a new owner.
    pub(crate) fn tell(&self, holder: Holder) {
        let _ = tell(&self.file, holder); // As with a new lock: nobody is told, and nobody else gets it.
    }
}

/// Makes it where it is missing. One that may only be read can be locked, too.
fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    // A link of that name is somebody's trap, where others may write to the folder: what it leads to is not overwritten. So
    // is a pipe: nobody waits for its other end.
    options.read(true).mode(MODE).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    options.clone().write(true).create(true).truncate(false).open(path).or_else(|error| match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => options.open(path).map_err(|_| error),
        _ => Err(error),
    })
}

/// In place of what the last holder said.
fn tell(mut file: &File, Holder { pid, admin, since }: Holder) -> io::Result<()> {
    let admin = admin.map_or_else(|| "no admin server".into(), |address| format!("admin server at {address}"));
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "pid {pid}, {admin}, since {}", rfc3339(since))
}

/// One line, as it is for a log. Of the last holder, in the instant before the present one has written.
fn told(file: File) -> String {
    let mut text = Vec::new();
    match file.take(LONGEST_TEXT).read_to_end(&mut text) {
        Ok(read) if read > 0 => String::from_utf8_lossy(&text).trim_end().escape_debug().to_string(),
        _ => "no name yet".into(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use super::*;

    fn holder(pid: u32) -> Holder {
        let since = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        Holder { pid, admin: Some(([127, 0, 0, 1], 10249).into()), since }
    }

    #[test]
    fn t237_given_a_folder_that_one_has_when_another_asks_then_it_is_told_whose_it_is_until_that_one_ends() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let first = StateLock::take(folder.path(), holder(4711)).expect("nobody has it");

        let refused = StateLock::take(folder.path(), holder(4712)).expect_err("one at a time").to_string();
        drop(first);
        let _next = StateLock::take(folder.path(), Holder { admin: None, ..holder(4713) }).expect("it is free again");

        let whose = " with pid 4711, admin server at 127.0.0.1:10249, since 2027-01-15T08:00:00Z:";
        assert!(refused.starts_with(&folder.path().display().to_string()) && refused.contains(whose), "{refused}");
        let file = folder.path().join(FILE);
        let said = fs::read_to_string(&file).expect("it stays");
        assert_eq!(said, "pid 4713, no admin server, since 2027-01-15T08:00:00Z\n");
        assert_eq!(fs::metadata(&file).expect("it is there").permissions().mode() & 0o777, MODE);
    }

    #[test]
    fn t237_given_a_holder_that_says_odd_things_or_nothing_when_another_asks_then_it_stays_one_line() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let _first = StateLock::take(folder.path(), holder(1)).expect("nobody has it");
        let refused_by = |says: &str| {
            fs::write(folder.path().join(FILE), says).expect("the test's folder can be written");
            StateLock::take(folder.path(), holder(2)).expect_err("one at a time").to_string()
        };

        let odd = refused_by(&format!("a\nb\u{1b}[2J{}", "x".repeat(1_000)));
        let silent = refused_by("");

        assert!(odd.contains("with a\\nb\\u{1b}[2Jx") && odd.len() < 500, "{odd}");
        assert!(silent.contains("with no name yet"), "{silent}");
    }

    #[test]
    fn t237_given_a_descriptor_that_was_passed_on_when_its_first_owner_ends_then_the_folder_stays_locked() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let first = StateLock::take(folder.path(), holder(1)).expect("nobody has it");
        let passed_on = first.file.try_clone().expect("descriptors are left");

        drop(first);

        assert!(StateLock::take(folder.path(), holder(2)).is_err(), "there is another owner");
        drop(passed_on);
        StateLock::take(folder.path(), holder(2)).expect("it was the last one");
    }

    #[test]
    fn given_a_pipe_in_place_of_the_file_when_asked_for_then_nobody_waits_for_its_other_end() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let made = std::process::Command::new("mkfifo").arg(folder.path().join(FILE)).status();
        assert!(made.expect("mkfifo runs").success());
        let _first = StateLock::take(folder.path(), holder(1));

        let second = StateLock::take(folder.path(), holder(2));

        assert!(second.is_err(), "{second:?}");
    }

    #[test]
    fn given_a_file_that_cannot_be_locked_when_asked_for_then_that_is_no_other_holder() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        std::os::unix::fs::symlink("/dev/null", folder.path().join(FILE)).expect("the test's folder can be written");

        for folder in [folder.path(), &folder.path().join("missing")] {
            let error = StateLock::take(folder, holder(1)).expect_err("there is no file");
            assert!(matches!(error, StateLockError::Unknown { .. }), "{error}");
            assert!(error.to_string().starts_with(&folder.display().to_string()), "{error}");
        }
    }
}
