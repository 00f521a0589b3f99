//! What whoever supervises this process is told, where it asks for that: systemd, by `NOTIFY_SOCKET`.
//!
//! That the process is ready or stops, and which process is the main one after a hand-over; with descriptors, that these are
//! to be kept (`fd_store` says which). A supervisor that cannot be told is none.
//!
//! By hand, as it is one datagram for each message: the crates for it know no abstract addresses, wait for ever where the
//! queue is full, or cannot be asked whether a message was carried out.

use std::env;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::pipe::{PipeFlags, pipe_with};
use tracing::debug;

/// Where it is told, for this process and those that it starts.
const SOCKET: &str = "NOTIFY_SOCKET";
/// How long a message may take to be taken: it waits where the queue is full, as it may be when thousands of sockets are kept.
const SEND_LIMIT: Duration = Duration::from_secs(5);
/// How long all that was told may take to be carried out.
const SETTLE_LIMIT: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// Descriptors that come with a message at most (SCM_MAX_FD).
pub(crate) const MOST_DESCRIPTORS: usize = 253;

/// What there is to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// Everything is served.
    Ready,
    /// The process is about to end.
    Stopping,
    /// Another process serves from now on: this one may end.
    Successor(u32),
}

impl News {
    fn text(self) -> String {
        match self {
            Self::Ready => "READY=1".into(),
            Self::Stopping => "STOPPING=1".into(),
            Self::Successor(pid) => format!("MAINPID={pid}"),
        }
    }
}

/// True where somebody wants to know.
pub fn is_there() -> bool {
    env::var_os(SOCKET).is_some()
}

/// Tells it, where somebody wants to know. Blocks for as long as the queue there is full, and for some seconds at most.
pub fn tell(news: News) {
    let Some(supervisor) = Supervisor::of_this_process() else { return };
    if let Err(error) = supervisor.send(&news.text(), &[]) {
        debug!(%error, ?news, "the supervisor cannot be told");
    }
}

/// Who supervises.
#[derive(Clone, Debug)]
pub(crate) struct Supervisor(SocketAddr);

impl Supervisor {
    /// `None` where nobody wants to be told.
    pub(crate) fn of_this_process() -> Option<Self> {
        let socket = env::var_os(SOCKET)?;
        Self::at(Path::new(&socket)).inspect_err(|error| debug!(%error, ?socket, "the supervisor has no address")).ok()
    }

    /// The one with a socket at a path, or of an abstract name, which begins with `@`.
    ///
    /// # Errors
    /// That is no address.
    pub(crate) fn at(socket: &Path) -> io::Result<Self> {
        let address = match socket.as_os_str().as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name),
            None => SocketAddr::from_pathname(socket),
        };
        Ok(Self(address?))
    }

    /// Sends a message, with [`MOST_DESCRIPTORS`] at most. Blocks, see [`tell`]. Whether it is carried out is not told.
    ///
    /// # Errors
    /// Nobody is there, or does not read.
    pub(crate) fn send(&self, text: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let sender = UnixDatagram::unbound()?;
        sender.connect_addr(&self.0)?;
        sender.set_write_timeout(Some(SEND_LIMIT))?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let text = [IoSlice::new(text.as_bytes())];
        rustix::io::retry_on_intr(|| sendmsg(&sender, &text, &mut control, SendFlags::NOSIGNAL))?;
        Ok(())
    }

    /// Waits until all that was sent before is carried out: the supervisor closes what it is sent then. Blocks.
    ///
    /// # Errors
    /// It takes too long.
    pub(crate) fn settle(&self) -> io::Result<()> {
        let (here, there) = pipe_with(PipeFlags::CLOEXEC)?;
        self.send("BARRIER=1", &[there.as_fd()])?;
        drop(there);
        let mut ends = [PollFd::new(&here, PollFlags::empty())]; // That nobody writes there any more is told in any case.
        match rustix::io::retry_on_intr(|| poll(&mut ends, Some(&SETTLE_LIMIT)))? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs::File;
    use std::io::IoSliceMut;
    use std::os::fd::OwnedFd;
    use std::thread;

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    use super::*;

    /// One that hears what it is told, for tests.
    pub(crate) struct Listener(UnixDatagram);

    impl Listener {
        /// With how it is told.
        pub(crate) fn new(name: &str) -> (Self, Supervisor) {
            let name = format!("@kube-relay/test/supervisor/{}/{name}", std::process::id());
            let supervisor = Supervisor::at(Path::new(&name)).expect("a short name");
            let socket = UnixDatagram::bind_addr(&supervisor.0).expect("a free name");
            socket.set_read_timeout(Some(Duration::from_secs(5))).expect("a socket");
            (Self(socket), supervisor)
        }

        /// The next message, and what came with it.
        pub(crate) fn hear(&self) -> (String, Vec<OwnedFd>) {
            hear(&self.0)
        }
    }

    fn hear(socket: &UnixDatagram) -> (String, Vec<OwnedFd>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut text = [0; 512];
        let received = recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC);
        let length = received.expect("it was sent").bytes;
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(passed) = message {
                descriptors.extend(passed);
            }
        }
        (String::from_utf8(text[..length].to_vec()).expect("text"), descriptors)
    }

    #[test]
    fn given_a_supervisor_when_told_then_it_hears_each_line_at_either_kind_of_address() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let path = folder.path().join("notify");
        let at_path = (UnixDatagram::bind(&path).expect("a free name"), Supervisor::at(&path).expect("a short path"));
        let (Listener(socket), supervisor) = Listener::new("abstract");

        for (socket, supervisor) in [at_path, (socket, supervisor)] {
            for (news, text) in
                [(News::Ready, "READY=1"), (News::Stopping, "STOPPING=1"), (News::Successor(7), "MAINPID=7")]
            {
                supervisor.send(&news.text(), &[]).expect("somebody listens");
                assert_eq!(hear(&socket).0, text);
            }
        }
    }

    #[test]
    fn given_a_supervisor_that_is_gone_when_told_then_that_is_an_error_and_nobody_waits() {
        let nobody = Supervisor::at(Path::new("/nowhere/notify")).expect("a short path");

        nobody.send("READY=1", &[]).expect_err("nobody is there");
        nobody.settle().expect_err("nobody is there");
    }

    #[test]
    fn f21_given_descriptors_when_sent_then_they_arrive_with_the_text_and_too_many_are_an_error() {
        let (listener, supervisor) = Listener::new("descriptors");
        let file = File::open("/dev/null").expect("it is there");

        supervisor.send("FDSTORE=1", &[file.as_fd(); 3]).expect("somebody listens");
        supervisor.send("FDSTORE=1", &[file.as_fd(); MOST_DESCRIPTORS + 1]).expect_err("too many");

        let (text, descriptors) = listener.hear();
        assert_eq!((&*text, descriptors.len()), ("FDSTORE=1", 3));
    }

    #[test]
    fn f21_given_messages_when_settled_then_the_supervisor_has_read_them_all() {
        let (listener, supervisor) = Listener::new("barrier");
        let hearing = thread::spawn(move || [listener.hear().0, listener.hear().0]);

        supervisor.send("FDSTOREREMOVE=1", &[]).expect("somebody listens");
        supervisor.settle().expect("it closes what it was sent");

        assert_eq!(hearing.join().expect("no panic"), ["FDSTOREREMOVE=1", "BARRIER=1"]);
    }
}
