//! The next program: which one it is, how it is started, and what becomes of it.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{self, Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::elder;
use crate::given::FOR_THIS_PROCESS;

/// The flag by which it knows what it is for.
const TAKE_OVER: &str = "--take-over";
/// By which it knows the upgrade that it is started for.
const UPGRADE: &str = "KUBE_RELAY_UPGRADE";
/// What the kernel adds to the path of a program whose file was replaced.
const DELETED: &[u8] = b" (deleted)";

/// A program that was started to take over.
#[derive(Debug)]
pub(super) struct Successor {
    child: Child,
    /// Readable once it has ended.
    ended: OwnedFd,
    is_own_file: bool,
}

impl Successor {
    /// Starts a program with our own arguments, for the upgrade with this number; without a name it is what is at the place now
    /// where ours was found. It has our environment but for what is said of descriptors there, our standard error, and no
    /// standard input.
    ///
    /// # Errors
    /// There is none, or it cannot be run.
    pub(super) fn start(program: Option<&Path>, upgrade: u64) -> io::Result<Self> {
        let own;
        let program = match program {
            Some(program) => program,
            None => {
                own = own_place()?;
                &own
            }
        };
        let mut command = Command::new(program);
        FOR_THIS_PROCESS.iter().for_each(|name| _ = command.env_remove(name));
        command.env(UPGRADE, upgrade.to_string());
        command.args(arguments(env::args_os())).stdin(Stdio::null());
        elder::prepare(&mut command);
        let mut child = command.spawn()?;
        let is_own_file = is_own_file(program);
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(ended) => Ok(Self { child, ended, is_own_file }),
            Err(errno) => {
                let _ = child.kill().and_then(|()| child.wait());
                Err(errno.into())
            }
        }
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// True where its program is the very file that this process runs: no other version.
    pub(super) fn is_own_file(&self) -> bool {
        self.is_own_file
    }

    /// What is readable once it has ended.
    pub(super) fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// How it has ended; `None` while it runs.
    pub(super) fn status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Ends it, whatever it does, where it has not by itself by then.
    pub(super) fn end(mut self, patience: Duration) {
        let patience = Timespec::try_from(patience).ok();
        let _ = retry_on_intr(|| poll(&mut [PollFd::new(&self.ended, PollFlags::IN)], patience.as_ref()));
        let _ = self.child.kill(); // It may have ended.
        let _ = self.child.wait();
    }

    /// It is on its own from now on; its end may still be waited for.
    pub(super) fn released(self) -> Child {
        self.child
    }
}

/// The upgrade that this process was started for; 0: for none.
pub(super) fn own_upgrade() -> u64 {
    env::var(UPGRADE).ok().and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Those of this process, without its own name.
fn arguments(own: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let says_so = |argument: &OsString| {
        let value = argument.as_bytes().strip_prefix(TAKE_OVER.as_bytes());
        value.is_some_and(|value| value.is_empty() || value[0] == b'=')
    };
    own.skip(1).filter(|argument| !says_so(argument)).chain([TAKE_OVER.into()]).collect()
}

/// Where the next version of our own program is. The name that it was called by comes first: that may be a link, which leads to
/// another file by now.
fn own_place() -> io::Result<PathBuf> {
    let called = env::args_os().next().map(PathBuf::from);
    match called.and_then(|name| found(&name, env::var_os("PATH"))) {
        Some(place) => Ok(place),
        None => env::current_exe().map(undeleted),
    }
}

/// A program as whoever called it by this name has found it; nobody here changes the working directory.
fn found(name: &Path, path: Option<OsString>) -> Option<PathBuf> {
    if name.as_os_str().as_bytes().contains(&b'/') {
        return path::absolute(name).ok().filter(|place| is_program(place));
    }
    env::split_paths(&path?).map(|folder| folder.join(name)).find(|place| is_program(place))
}

fn is_program(place: &Path) -> bool {
    fs::metadata(place).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

fn is_own_file(program: &Path) -> bool {
    let file = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    let own = file(Path::new("/proc/self/exe"));
    own.is_some() && own == file(program)
}

/// The place where our own program was, and where the next one is.
fn undeleted(path: PathBuf) -> PathBuf {
    match path.as_os_str().as_bytes().strip_suffix(DELETED) {
        Some(place) => OsString::from_vec(place.to_vec()).into(),
        None => path,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn given_our_own_arguments_when_a_successor_is_started_then_it_has_them_and_knows_what_it_is_for() {
        let of = |words: &[&str]| {
            let given = arguments(words.iter().map(OsString::from));
            given.iter().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
        };

        assert_eq!(of(&["kube-relay", "run", "-f", "a b"]), "run -f a b --take-over");
        assert_eq!(of(&["kube-relay", "run", "--take-over", "-f", "a"]), "run -f a --take-over");
        assert_eq!(of(&["kube-relay", "run", "--take-over=false", "-f", "a"]), "run -f a --take-over");
    }

    #[test]
    fn given_a_program_whose_file_was_replaced_when_looked_for_then_the_new_file_is_meant() {
        assert_eq!(undeleted("/bin/kube-relay (deleted)".into()), Path::new("/bin/kube-relay"));
        assert_eq!(undeleted("/bin/kube-relay".into()), Path::new("/bin/kube-relay"));
    }

    #[test]
    fn given_a_program_that_was_called_by_a_link_or_a_bare_name_when_looked_for_then_the_name_is_followed_anew() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let (link, old, new) = (folder.path().join("relay"), folder.path().join("1.2"), folder.path().join("1.3"));
        for program in [&old, &new] {
            fs::write(program, "").expect("the test's folder can be written");
            fs::set_permissions(program, fs::Permissions::from_mode(0o755)).expect("it is ours");
        }
        symlink(&old, &link).expect("the test's folder can be written");
        let path: Option<OsString> = Some(format!("/nowhere:{}", folder.path().display()).into());

        assert_eq!(found(&link, None), Some(link.clone()), "and not where it led to when it was called");
        assert_eq!(found(Path::new("relay"), path.clone()), Some(link.clone()));
        fs::set_permissions(&old, fs::Permissions::from_mode(0o644)).expect("it is ours");
        assert_eq!((found(&link, None), found(Path::new("relay"), path)), (None, None), "it is no program");
        assert_eq!((found(Path::new("relay"), None), found(&folder.path().join("gone"), None)), (None, None));
        assert!(!is_own_file(&new) && is_own_file(&env::current_exe().expect("it is known")));
    }

    #[test]
    fn f25_given_no_such_program_when_it_is_started_then_that_is_an_error() {
        let error = Successor::start(Some(Path::new("/nowhere/kube-relay")), 1).expect_err("it is not there");

        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
