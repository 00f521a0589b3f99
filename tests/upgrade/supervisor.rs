//! Plays the supervisor: keeps the descriptors that it is sent, and starts the next process with them, as systemd does.
#![allow(unsafe_code)] // pre_exec and dup2: one call a block.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::io::fcntl_dupfd_cloexec;
use rustix::net::sockopt::socket_cookie;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::relay::House;

/// The number of the first descriptor that a process is passed.
const FIRST: RawFd = 3;
/// Copies are made above all that a process is passed, so that none of these takes the place of another one.
const FAR_UP: RawFd = 500;
/// What ends the thread.
const END: &str = "X_END=1";

/// Keeps descriptors as long as it lives.
pub(crate) struct Supervisor {
    folder: tempfile::TempDir,
    limit: usize,
    kept: Arc<Mutex<Vec<Kept>>>,
    hearing: Option<JoinHandle<()>>,
}

struct Kept {
    name: String,
    descriptor: OwnedFd,
}

impl Supervisor {
    /// One that has room for so many descriptors.
    pub(crate) fn new(limit: usize) -> Self {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let socket = UnixDatagram::bind(folder.path().join("notify")).expect("a free name");
        let kept = Arc::default();
        let hearing = thread::spawn({
            let kept = Arc::clone(&kept);
            move || hear(&socket, limit, &kept)
        });
        Self { folder, limit, kept, hearing: Some(hearing) }
    }

    /// Starts a process with all that is kept; does not wait for it.
    pub(crate) fn start(&self, house: &mut House) -> u32 {
        let (names, copies): (Vec<_>, Vec<_>) = self.with_kept(|kept| {
            let copy = |one: &Kept| fcntl_dupfd_cloexec(&one.descriptor, FAR_UP).expect("descriptors are left");
            kept.iter().map(|one| (one.name.clone(), copy(one))).unzip()
        });
        // Its number is known to itself alone: the shell's stays when it becomes another program.
        let script = r#"LISTEN_PID=$$; export LISTEN_PID; exec "$0" "$@""#;
        house.start_in("sh", &["-c", script], |command| {
            command.env("NOTIFY_SOCKET", self.socket()).env("FDSTORE", self.limit.to_string());
            command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
            pass(command, copies);
        })
    }

    /// Has something kept that is no socket at all.
    pub(crate) fn put_a_file(&self, name: &str) {
        let descriptor = File::open("/dev/null").expect("it is there").into();
        self.with_kept(|kept| kept.push(Kept { name: name.into(), descriptor }));
    }

    /// What is kept, by name.
    pub(crate) fn names(&self) -> BTreeSet<String> {
        self.with_kept(|kept| kept.iter().map(|one| one.name.clone()).collect())
    }

    fn with_kept<T>(&self, look: impl FnOnce(&mut Vec<Kept>) -> T) -> T {
        look(&mut self.kept.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("notify")
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        let ended = UnixDatagram::unbound().and_then(|sender| sender.send_to(END.as_bytes(), self.socket()));
        if let (Ok(_), Some(hearing)) = (ended, self.hearing.take()) {
            let _ = hearing.join(); // What it has panicked for is on standard error.
        }
    }
}

/// Has a process begin with these descriptors.
fn pass(command: &mut Command, descriptors: Vec<OwnedFd>) {
    let before_exec = move || {
        for (number, descriptor) in (FIRST..).zip(&descriptors) {
            // SAFETY: both are numbers; what had the second one in the child is closed, and nobody needs it there any more.
            if unsafe { libc::dup2(descriptor.as_raw_fd(), number) } == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: it makes system calls, and neither allocates nor locks.
    unsafe { command.pre_exec(before_exec) };
}

fn hear(socket: &UnixDatagram, limit: usize, kept: &Mutex<Vec<Kept>>) {
    loop {
        let (text, descriptors) = receive(socket);
        let says = |words: &str| text.lines().any(|line| line == words);
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored");
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if says(END) {
            return;
        }
        if says("FDSTOREREMOVE=1") {
            kept.retain(|one| one.name != name);
        } else if says("FDSTORE=1") {
            for descriptor in descriptors {
                let is_known = kept.iter().any(|one| is_same(&one.descriptor, &descriptor));
                if kept.len() < limit && !is_known {
                    kept.push(Kept { name: name.into(), descriptor });
                }
            }
        }
        // All others are closed, which is the answer to BARRIER=1.
    }
}

fn is_same(one: &OwnedFd, other: &OwnedFd) -> bool {
    socket_cookie(one).is_ok_and(|cookie| socket_cookie(other) == Ok(cookie))
}

fn receive(socket: &UnixDatagram) -> (String, Vec<OwnedFd>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut text = [0; 4096];
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC);
    let length = received.expect("a socket").bytes;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            descriptors.extend(passed);
        }
    }
    (String::from_utf8_lossy(&text[..length]).into_owned(), descriptors)
}
