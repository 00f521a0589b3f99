//! The socket in a state folder at which hand-overs are asked for: who made it, who may come, and how it is found.
//!
//! It is for its owner alone, by its mode and by the kernel's word on who calls. Its address is as long as the kernel takes
//! (107 bytes); a folder with a longer name is gone to by its descriptor.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with,
};
use rustix::process::geteuid;

use super::post::Post;
use super::refusal::Refusal;
use crate::stats::UpgradeResult;

/// Its name in the folder.
const NAME: &str = "kube-relay.sock";
/// For its owner alone.
const MODE: u32 = 0o600;
/// How long a call may wait to be taken.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Callers that may wait: one upgrades, and one looks on.
const WAITING: i32 = 8;

/// The listening end. The file stays when it is dropped: the next owner of the folder takes its place.
#[derive(Debug)]
pub(crate) struct Door(OwnedFd);

/// Why nobody can be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// There is no such socket, or nobody listens at it any more.
    #[error("{}: no kube-relay with this --state-dir runs that could hand over", folder.display())]
    Nobody {
        /// Where it was looked.
        folder: PathBuf,
    },
    /// Whoever listens is somebody else.
    #[error("{}: the socket there belongs to user {uid}, not to this one", folder.display())]
    Stranger {
        /// Where it was looked.
        folder: PathBuf,
        /// Who listens.
        uid: u32,
    },
    /// Others wait as well, and nobody is answered.
    #[error("{}: the kube-relay with this --state-dir does not answer", folder.display())]
    Silent {
        /// Where it was looked.
        folder: PathBuf,
    },
    /// The kernel does not let it be called.
    #[error("{}: the kube-relay with this --state-dir cannot be called", folder.display())]
    Failed {
        /// Where it was looked.
        folder: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Door {
    /// Makes the socket, in place of one that was left. For who has the folder's lock.
    ///
    /// # Errors
    /// The folder cannot be written, or its file system has no sockets.
    pub(crate) fn make(folder: &Path) -> io::Result<Self> {
        let socket = File::from(open()?);
        // Before it has a name: nobody can call in between.
        socket.set_permissions(Permissions::from_mode(MODE))?;
        match fs::remove_file(folder.join(NAME)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let socket = OwnedFd::from(socket);
        at(folder, |address| bind(&socket, address))?;
        listen(&socket, WAITING)?;
        Ok(Self(socket))
    }

    /// One that was handed over.
    pub(crate) fn passed(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// From now on callers are told that this process listens: the kernel tells them who did so last.
    pub(crate) fn own(&self) {
        let _ = listen(&self.0, WAITING); // It listens in any case.
    }

    /// Another descriptor of the same socket.
    pub(crate) fn copy(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// The next caller that may ask for anything: one with our own user, or root. `None` where none comes in time, or
    /// something happens at `also`.
    pub(crate) fn next(&self, also: Option<BorrowedFd<'_>>, patience: Option<Duration>) -> io::Result<Option<Caller>> {
        let mut events = vec![PollFd::new(&self.0, PollFlags::IN)];
        events.extend(also.as_ref().map(|also| PollFd::new(also, PollFlags::IN)));
        let patience = patience.and_then(|patience| Timespec::try_from(patience).ok());
        rustix::io::retry_on_intr(|| poll(&mut events, patience.as_ref()))?;
        if !events[0].revents().contains(PollFlags::IN) {
            return Ok(None);
        }
        let post = match accept_with(&self.0, SocketFlags::CLOEXEC) {
            Ok(socket) => Post::new(socket),
            Err(Errno::CONNABORTED | Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let peer = post.peer()?;
        if !is_trusted(peer.uid) {
            let reason = UpgradeResult::Refused;
            tracing::warn!(uid = peer.uid, pid = peer.pid, %reason, "a hand-over is asked for by another user: refused");
            let _ = post.send(Refusal::parcel("it belongs to another user", reason), Duration::ZERO); // There is room for one.
            return Ok(None);
        }
        Ok(Some(Caller { post, pid: peer.pid }))
    }
}

/// Somebody at the door.
#[derive(Debug)]
pub(crate) struct Caller {
    pub(crate) post: Post,
    /// As this process knows it; 0 where it is in another namespace of processes.
    pub(crate) pid: i32,
}

/// Calls whoever has the folder, to take over from it.
///
/// # Errors
/// Nobody is there, or nobody whom we trust, or it does not answer.
pub(crate) fn call(folder: &Path) -> Result<Post, CallError> {
    call_within(folder, CONNECT_LIMIT, is_trusted)
}

/// The same, to ask for something or to look on: whomever root looks at, nothing of that is taken over.
///
/// # Errors
/// As [`call`].
pub(crate) fn call_to_ask(folder: &Path) -> Result<Post, CallError> {
    call_within(folder, CONNECT_LIMIT, |uid| is_trusted(uid) || geteuid().is_root())
}

fn call_within(folder: &Path, limit: Duration, trusts: impl Fn(u32) -> bool) -> Result<Post, CallError> {
    let folder_name = || folder.to_owned();
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => CallError::Nobody { folder: folder_name() },
        io::ErrorKind::WouldBlock => CallError::Silent { folder: folder_name() },
        _ => CallError::Failed { folder: folder_name(), source },
    };
    let socket = open().map_err(failed)?;
    // A call waits where others do: for ever, where whoever has the folder was stopped.
    set_socket_timeout(&socket, Timeout::Send, Some(limit)).map_err(|errno| failed(errno.into()))?;
    at(folder, |address| connect(&socket, address)).map_err(failed)?;
    let post = Post::new(socket);
    let uid = post.peer().map_err(failed)?.uid;
    if trusts(uid) { Ok(post) } else { Err(CallError::Stranger { folder: folder_name(), uid }) }
}

/// Root could do anything to this process anyway.
fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

fn open() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Does something with the address of the socket in a folder.
fn at(folder: &Path, act: impl Fn(&SocketAddrUnix) -> rustix::io::Result<()>) -> io::Result<()> {
    if let Ok(address) = SocketAddrUnix::new(folder.join(NAME)) {
        return Ok(act(&address)?);
    }
    let folder = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(folder)?;
    let path = format!("/proc/self/fd/{}/{NAME}", folder.as_fd().as_raw_fd());
    Ok(act(&SocketAddrUnix::new(path)?)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::handover::parcel::{Kind, Parcel};

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn f25_given_folders_with_short_and_long_names_when_called_then_the_owner_answers_and_nobody_else_may_call() {
        let root = tempfile::tempdir().expect("a folder can be made");
        for name in ["s".to_owned(), "long".repeat(40)] {
            let folder = root.path().join(name);
            fs::create_dir(&folder).expect("the test's folder can be written");
            let door = Door::make(&folder).expect("a socket can be made");

            let caller = call(&folder).expect("somebody listens");
            let host = door.next(None, Some(SOON)).expect("it is heard").expect("somebody has called");
            caller.send(Parcel::new(Kind::Hello, &"it is me"), SOON).expect("it goes");

            assert_eq!(host.pid, std::process::id().cast_signed());
            assert_eq!(host.post.receive(SOON).expect("it comes").said::<String>().expect("a text"), "it is me");
            let file = fs::metadata(folder.join(NAME)).expect("it has a name");
            assert_eq!(file.mode() & 0o777, MODE);
        }
    }

    #[test]
    fn given_a_socket_that_was_left_when_the_folder_is_taken_again_then_it_is_replaced() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        assert!(matches!(call(folder.path()), Err(CallError::Nobody { .. })), "none yet");
        drop(Door::make(folder.path()).expect("a socket can be made"));
        assert!(matches!(call(folder.path()), Err(CallError::Nobody { .. })), "nobody listens");

        let _door = Door::make(folder.path()).expect("in place of the last one");

        call(folder.path()).expect("somebody listens");
    }

    #[test]
    fn f25_given_one_who_answers_nobody_when_called_again_and_again_then_that_ends_in_time() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let _door = Door::make(folder.path()).expect("a socket can be made");
        let call = || call_within(folder.path(), Duration::from_millis(20), is_trusted);

        let calls: Vec<_> = (0..WAITING + 2).map(|_| call()).collect();

        let refused = calls.iter().find_map(|call| call.as_ref().err()).expect("too many wait");
        assert!(matches!(refused, CallError::Silent { .. }), "{refused}");
        assert!(refused.to_string().ends_with("does not answer"), "{refused}");
    }

    #[test]
    fn given_nobody_when_waited_for_then_that_ends_in_time_or_when_something_else_happens() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let door = Door::make(folder.path()).expect("a socket can be made");
        let (reader, writer) = io::pipe().expect("descriptors are left");

        assert!(door.next(None, Some(Duration::from_millis(5))).expect("it is heard").is_none());
        drop(writer);
        // A pipe without a writer hangs up, which is told whatever is asked for.
        assert!(door.next(Some(reader.as_fd()), Some(SOON)).expect("it is heard").is_none());
    }
}
