//! How parcels travel: over a Unix socket that keeps messages apart, to and fro, each within a time.
//!
//! SOCK_SEQPACKET, not a stream: a message comes whole or not at all, the descriptors that come with it are those that were
//! sent with it, and nobody has to put together what was read in parts. A body that is longer than a message goes in several;
//! its descriptors come with the first.
//!
//! Whoever says the last word can know whether it was heard ([`Post::settle`]): the kernel takes a message or does not, and
//! the other end can say "no more" and then look at what was taken.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_send_buffer_size, set_socket_timeout, socket_send_buffer_size};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown, recvmsg, sendmsg, shutdown,
};

use super::parcel::{Kind, LONGEST_BODY_BYTES, MOST_DESCRIPTORS, Parcel};

/// What is sent at once of a body: a message has to fit into the send buffer of the socket, 208 KiB by default.
const PIECE_BYTES: usize = 64 * 1024;
/// Before each piece: the number of the kind, and whether more pieces follow.
const HEADER_BYTES: usize = 2;
/// The shortest time that a socket waits: none at all would be for ever.
const SHORTEST_WAIT: Duration = Duration::from_millis(1);

/// One end of a conversation. Dropped, it is over: the other end hears so at once.
#[derive(Debug)]
pub(crate) struct Post(OwnedFd);

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    /// As this process knows it; 0 where it is in a namespace of processes that this one does not see.
    pub(crate) pid: i32,
    pub(crate) uid: u32,
}

/// Why a parcel did not go, or none came.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PostError {
    /// The other end is closed: its process has ended, or wants no more.
    #[error("the other process has hung up")]
    Closed,
    /// It took too long.
    #[error("the other process has not answered in time")]
    Limit,
    /// It is no message of ours, or the kernel had to leave out some of it: no descriptor was left for what came.
    #[error("a message came that is not whole: {0}")]
    Broken(&'static str),
    /// The kernel does not do it.
    #[error("the kernel does not pass a message ({0})")]
    Kernel(Errno),
}

impl From<Errno> for PostError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::AGAIN => Self::Limit,
            Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN => Self::Closed,
            errno => Self::Kernel(errno),
        }
    }
}

impl Post {
    /// An end of a connected socket of the kind SOCK_SEQPACKET, which blocks.
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Who is at the other end, as the kernel knows it.
    ///
    /// # Errors
    /// It does not tell.
    pub(crate) fn peer(&self) -> io::Result<Peer> {
        credentials(&self.0)
    }

    /// The process at the other end, wherever it is numbered: readable once it has ended. `None` where the kernel does not tell, as
    /// before 6.5, or it has ended long ago.
    pub(crate) fn process(&self) -> Option<OwnedFd> {
        process(&self.0)
    }

    /// Sends a parcel. Its descriptors are closed here once they are on their way, and also where that fails.
    ///
    /// # Errors
    /// It was not sent, or not all of it: nothing more may be said.
    pub(crate) fn send(&self, parcel: Parcel, limit: Duration) -> Result<(), PostError> {
        if parcel.body.len() > LONGEST_BODY_BYTES {
            return Err(PostError::Broken("too long to be sent")); // Nobody would take it.
        }
        let deadline = Instant::now() + limit;
        let mut descriptors: Vec<_> = parcel.descriptors.iter().map(AsFd::as_fd).collect();
        let mut pieces = parcel.body.chunks(PIECE_BYTES).peekable();
        loop {
            let piece = pieces.next().unwrap_or_default();
            let more = pieces.peek().is_some();
            self.wait_at_most(Timeout::Send, deadline)?;
            send_piece(&self.0, [parcel.kind.number(), u8::from(more)], piece, &descriptors)?;
            descriptors.clear();
            if !more {
                return Ok(());
            }
        }
    }

    /// The next parcel of a kind that this version knows; others are passed over, and their descriptors closed.
    ///
    /// # Errors
    /// None came in time, or it is not whole.
    pub(crate) fn receive(&self, limit: Duration) -> Result<Parcel, PostError> {
        let deadline = Instant::now() + limit;
        loop {
            let (number, body, descriptors) = self.receive_any(deadline)?;
            if let Some(kind) = Kind::of(number) {
                return Ok(Parcel { kind, body, descriptors });
            }
            if Instant::now() >= deadline {
                return Err(PostError::Limit); // However many come that are passed over.
            }
        }
    }

    /// The answer to a last question, or the certainty that it will never come: what the other end says from now on it is
    /// told that nobody hears, and can still be told why. `None` where it had not answered.
    pub(crate) fn settle(&self) -> Option<Parcel> {
        // Nothing is queued from here on (the kernel looks at this with each message), and what is stays there to be read.
        let _ = shutdown(&self.0, Shutdown::Read);
        self.receive(Duration::ZERO).ok()
    }

    /// Has one more message go, however much of the others is unread: the kernel counts these against the send buffer.
    pub(crate) fn make_room(&self) {
        // What is asked for is doubled, as far as the host allows that.
        let _ = socket_send_buffer_size(&self.0).and_then(|size| set_socket_send_buffer_size(&self.0, size));
    }

    fn receive_any(&self, deadline: Instant) -> Result<(u8, Vec<u8>, Vec<OwnedFd>), PostError> {
        let (mut body, mut descriptors) = (Vec::new(), Vec::new());
        let mut first = None;
        loop {
            self.wait_at_most(Timeout::Recv, deadline)?;
            let begin = body.len();
            let [number, more] = receive_piece(&self.0, &mut body, &mut descriptors)?;
            if *first.get_or_insert(number) != number {
                if number != Kind::Refused.number() {
                    return Err(PostError::Broken("pieces of two kinds"));
                }
                // A last word: the rest of what it breaks off will never come.
                first = Some(number);
                drop(body.drain(..begin));
                descriptors.clear();
            }
            if body.len() > LONGEST_BODY_BYTES || descriptors.len() > MOST_DESCRIPTORS {
                return Err(PostError::Broken("too long"));
            }
            if more == 0 {
                return Ok((number, body, descriptors));
            }
        }
    }

    fn wait_at_most(&self, what: Timeout, deadline: Instant) -> Result<(), PostError> {
        let left = deadline.saturating_duration_since(Instant::now()).max(SHORTEST_WAIT);
        Ok(set_socket_timeout(&self.0, what, Some(left))?)
    }
}

/// SO_PEERCRED. By hand, as the safe call takes the number of a process for one that is never 0: another pod's is.
#[allow(unsafe_code)]
fn credentials(socket: &OwnedFd) -> io::Result<Peer> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = size_of_val(&peer) as libc::socklen_t;
    // SAFETY: the descriptor is open while it is borrowed; the kernel writes at most `length` bytes to `peer`, which are
    // three numbers of which every bit pattern is one.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        )
    };
    if outcome == 0 { Ok(Peer { pid: peer.pid, uid: peer.uid }) } else { Err(io::Error::last_os_error()) }
}

/// SO_PEERPIDFD, for which there is no safe call.
#[allow(unsafe_code)]
fn process(socket: &OwnedFd) -> Option<OwnedFd> {
    let mut process: libc::c_int = -1;
    let mut length = size_of_val(&process) as libc::socklen_t;
    // SAFETY: the descriptor is open while it is borrowed; the kernel writes at most `length` bytes to `process`, a number of
    // which every bit pattern is one.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut process).cast(),
            &raw mut length,
        )
    };
    // SAFETY: the kernel has made this descriptor for us just now, and nobody else knows it.
    (outcome == 0 && process >= 0).then(|| unsafe { OwnedFd::from_raw_fd(process) })
}

fn send_piece(
    socket: &OwnedFd,
    header: [u8; HEADER_BYTES],
    piece: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), PostError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(PostError::Broken("too many descriptors"));
    }
    let pieces = [IoSlice::new(&header), IoSlice::new(piece)];
    // A whole message or none of it: there is no part that was sent.
    rustix::io::retry_on_intr(|| sendmsg(socket, &pieces, &mut control, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// Adds what a message holds to what came before.
fn receive_piece(
    socket: &OwnedFd,
    body: &mut Vec<u8>,
    descriptors: &mut Vec<OwnedFd>,
) -> Result<[u8; HEADER_BYTES], PostError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let (mut header, begin) = ([0; HEADER_BYTES], body.len());
    body.resize(begin + PIECE_BYTES, 0);
    let received = {
        let mut pieces = [IoSliceMut::new(&mut header), IoSliceMut::new(&mut body[begin..])];
        let mut receive =
            || rustix::io::retry_on_intr(|| recvmsg(socket, &mut pieces, &mut control, RecvFlags::CMSG_CLOEXEC));
        match receive() {
            // Told once, and before what the other end has said, where that has hung up without having heard all of ours.
            Err(Errno::CONNRESET) => receive()?,
            received => received?,
        }
    };
    // Before anything else, so that they are closed where this fails.
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            descriptors.extend(passed);
        }
    }
    if received.bytes == 0 {
        return Err(PostError::Closed); // No message of ours is empty.
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(PostError::Broken("no descriptor was left for one that came, or a security module keeps it back"));
    }
    if received.flags.contains(ReturnFlags::TRUNC) || received.bytes < HEADER_BYTES {
        return Err(PostError::Broken("too long or too short"));
    }
    body.truncate(begin + received.bytes - HEADER_BYTES);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::thread;

    use rustix::io::{FdFlags, fcntl_getfd};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    fn posts() -> (Post, Post) {
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let (one, other) = pair.expect("descriptors are left");
        (Post::new(one), Post::new(other))
    }

    #[test]
    fn f25_given_one_that_has_hung_up_without_hearing_all_when_it_is_heard_then_its_last_word_comes_before_its_end() {
        let (own, theirs) = posts();
        own.send(Parcel::new(Kind::Closed, &()), SOON).expect("it goes");
        theirs.send(Parcel::new(Kind::Serving, &()), SOON).expect("it goes");
        drop(theirs);

        assert_eq!(own.receive(SOON).expect("it was said").kind, Kind::Serving);
        assert!(matches!(own.receive(SOON), Err(PostError::Closed)));
    }

    #[test]
    fn f25_given_a_parcel_of_many_pieces_with_as_many_descriptors_as_go_when_it_is_sent_then_it_arrives_whole() {
        let (here, there) = posts();
        let body: Vec<u8> = (0..LONGEST_BODY_BYTES).map(|place| (place % 251) as u8).collect();
        let mut file = tempfile::tempfile().expect("a file can be made");
        file.write_all(b"the same file").expect("it can be written");
        let copies = (0..MOST_DESCRIPTORS).map(|_| file.try_clone().expect("descriptors are left").into());
        let parcel = Parcel { kind: Kind::Stream, body: body.clone(), descriptors: copies.collect() };
        let sending = thread::spawn(move || here.send(parcel, SOON).map(|()| here));

        let arrived = there.receive(SOON).expect("it is sent");

        sending.join().expect("no panic").expect("it went");
        assert_eq!((arrived.kind, arrived.body == body), (Kind::Stream, true));
        assert_eq!(arrived.descriptors.len(), MOST_DESCRIPTORS);
        for descriptor in arrived.descriptors {
            assert!(fcntl_getfd(&descriptor).expect("it is open").contains(FdFlags::CLOEXEC));
            let (mut file, mut text) = (File::from(descriptor), String::new());
            file.rewind().and_then(|()| file.read_to_string(&mut text)).expect("the file can be read");
            assert_eq!(text, "the same file");
        }
    }

    #[test]
    fn given_an_end_when_asked_who_the_other_is_then_the_kernel_tells() {
        let (here, _there) = posts();

        let peer = here.peer().expect("it is connected");

        assert_eq!(peer, Peer { pid: std::process::id().cast_signed(), uid: rustix::process::getuid().as_raw() });
    }

    #[test]
    fn given_more_descriptors_than_go_with_one_message_when_they_are_sent_then_nothing_goes() {
        let (here, there) = posts();
        let file = File::open("/dev/null").expect("it is there");
        let copies = (0..=MOST_DESCRIPTORS).map(|_| file.try_clone().expect("descriptors are left").into());
        let parcel = Parcel { kind: Kind::Listener, body: Vec::new(), descriptors: copies.collect() };

        assert!(here.send(parcel, SOON).is_err());
        assert!(matches!(there.receive(Duration::ZERO), Err(PostError::Limit)));
    }

    #[test]
    fn f25_given_an_end_that_is_silent_or_gone_when_it_is_waited_for_then_both_are_told_apart() {
        let (here, there) = posts();
        assert!(matches!(here.receive(Duration::from_millis(5)), Err(PostError::Limit)));

        drop(there);

        assert!(matches!(here.receive(SOON), Err(PostError::Closed)));
        assert!(matches!(here.send(Parcel::new(Kind::End, &()), SOON), Err(PostError::Closed)));
    }

    #[test]
    fn f25_given_a_reader_that_reads_nothing_when_much_is_sent_then_it_is_given_up_in_time() {
        let (here, _there) = posts();
        let began = Instant::now();

        let outcome = (0..10_000).try_for_each(|_| here.send(Parcel::new(Kind::Pins, &"x"), Duration::from_millis(20)));

        assert!(matches!(outcome, Err(PostError::Limit)), "{outcome:?}");
        assert!(began.elapsed() < SOON);
    }

    #[test]
    fn given_a_kind_that_only_a_later_version_knows_when_it_comes_then_it_is_passed_over() {
        let (here, there) = posts();
        send_piece(&here.0, [200, 0], b"{}", &[here.0.as_fd()]).expect("it goes");
        here.send(Parcel::new(Kind::End, &1), SOON).expect("it goes");

        assert_eq!(there.receive(SOON).expect("it is there").kind, Kind::End);
    }

    #[test]
    fn given_what_is_no_message_of_ours_when_it_comes_then_that_is_an_error() {
        let (here, there) = posts();
        let mut control = SendAncillaryBuffer::default();
        sendmsg(&here.0, &[IoSlice::new(b"x")], &mut control, SendFlags::NOSIGNAL).expect("it goes");
        assert!(matches!(there.receive(SOON), Err(PostError::Broken(_))));

        send_piece(&here.0, [3, 1], b"a", &[]).expect("it goes");
        send_piece(&here.0, [4, 0], b"b", &[]).expect("it goes");
        assert!(matches!(there.receive(SOON), Err(PostError::Broken(_))));
    }

    #[test]
    fn f25_given_a_last_word_when_the_other_end_has_had_enough_then_both_agree_whether_it_was_said() {
        for said_in_time in [true, false] {
            let (here, there) = posts();
            if said_in_time {
                there.send(Parcel::new(Kind::Taken, &()), SOON).expect("it goes");
            }

            let heard = here.settle().map(|parcel| parcel.kind);
            let said_later = there.send(Parcel::new(Kind::Taken, &()), SOON).is_ok();

            assert_eq!(heard, said_in_time.then_some(Kind::Taken));
            assert!(!said_later, "nobody believes to have been heard who was not");
            here.send(Parcel::new(Kind::Refused, &"too late"), SOON).expect("it goes");
            drop(here);
            assert_eq!(there.receive(SOON).expect("it was said").said::<String>().expect("a text"), "too late");
        }
    }

    #[test]
    fn f25_given_a_reader_that_stalls_in_the_middle_of_a_parcel_when_given_up_then_it_can_be_told_why() {
        let (here, there) = posts();
        let long = || Parcel { kind: Kind::Stream, body: vec![b'x'; 3 * PIECE_BYTES], descriptors: Vec::new() };
        let outcome = (0..100).try_for_each(|_| here.send(long(), Duration::from_millis(20)));
        assert!(matches!(outcome, Err(PostError::Limit)), "{outcome:?}");
        assert!(here.send(Parcel::new(Kind::Refused, &"too late"), Duration::ZERO).is_err(), "it is full");

        here.make_room();
        here.send(Parcel::new(Kind::Refused, &"too late"), Duration::ZERO).expect("it goes");
        drop(here);

        let last = std::iter::repeat_with(|| there.receive(SOON).expect("it was said"));
        let last = last.take(100).find(|parcel| parcel.kind == Kind::Refused).expect("it was told");
        assert_eq!(last.said::<String>().expect("a text"), "too late");
    }
}
