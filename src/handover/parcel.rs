//! What one message of a hand-over carries: a text that other versions can read, bytes of streams, and descriptors.
//!
//! The body is one line of JSON; whatever follows it are bytes as they are, those that a stream has yet to send. A version
//! that knows more fields than the other one leaves out what it does not know and has a default for what is not said.
//!
//! How parcels travel is in `post`; what they say is in `office`, `sockets`, `source`, `services`, `flows`, `streams`
//! and `late`.

use std::io;
use std::os::fd::OwnedFd;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Descriptors that one parcel may carry: what Linux passes with one message (SCM_MAX_FD).
pub(crate) const MOST_DESCRIPTORS: usize = 253;

/// The longest body that is taken. The longest that is sent is that of a stream with as much as a direction may hold, both
/// ways.
pub(crate) const LONGEST_BODY_BYTES: usize = 1024 * 1024;

/// What one message carries, and the descriptors that belong to it. Dropped, it closes them.
#[derive(Debug)]
pub(crate) struct Parcel {
    pub(crate) kind: Kind,
    /// A line of JSON, and bytes. At most [`LONGEST_BODY_BYTES`].
    pub(crate) body: Vec<u8>,
    /// At most [`MOST_DESCRIPTORS`], in an order that each kind has.
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// Declares the kinds with the numbers that stand for them in messages.
macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $number:literal,)+) => {
        /// What a parcel tells of. A number keeps its meaning over all versions.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub(crate) enum Kind { $($(#[$doc])* $kind,)+ }

        impl Kind {
            /// Every kind, by its number.
            pub(crate) const ALL: &'static [Self] = &[$(Self::$kind,)+];

            /// What stands for it in a message.
            pub(crate) fn number(self) -> u8 {
                match self { $(Self::$kind => $number,)+ }
            }

            /// The kind of a number; `None` where only a later version knows it.
            pub(crate) fn of(number: u8) -> Option<Self> {
                match number {
                    $($number => Some(Self::$kind),)+
                    _ => None,
                }
            }
        }
    };
}

kinds! {
    /// The first of each side: who it is, and which versions it speaks.
    Hello = 0,
    /// Why nothing comes of it. The last of whoever says it.
    Refused = 1,
    /// A listening socket, or those of the shards of one.
    Listener = 2,
    /// A ServicePort: its counters, and whose turn it is.
    Port = 3,
    /// Backends of a ServicePort: their counters, and who of them is ejected.
    Backend = 4,
    /// Clients of a ServicePort that stay with their backends.
    Pins = 5,
    /// An established TCP connection: its two sockets, and pipes that hold bytes of it.
    Stream = 6,
    /// A UDP flow, and its socket.
    Flow = 7,
    /// The numbers of the whole process.
    Process = 8,
    /// All has been said that there is to say.
    End = 9,
    /// All was taken, and whoever says so can begin to serve.
    Ready = 10,
    /// Begin: from here on it is the other one's.
    Commit = 11,
    /// Give me what you have: I have planned what to do with it. The answer are parcels up to an `End`.
    Take = 12,
    /// It is mine: with this, and not before, the one who takes over begins. The answer to `Commit`.
    Taken = 13,
    /// No listener is looked at here any more: let clients in.
    Released = 14,
    /// Start your successor: what `kube-relay upgrade` asks for.
    Upgrade = 15,
    /// It was done: the answer to `Upgrade`.
    Upgraded = 16,
    /// The lock of the state folder, and the socket where hand-overs are asked for.
    Folder = 17,
    /// The sockets of our own servers.
    Admin = 18,
    /// All listeners are closed here: addresses that were held and not handed over are free.
    Closed = 19,
    /// All is served here, and everybody is told so: the last word of the one who has taken over.
    Serving = 20,
    /// The socket of a health port.
    HealthPort = 21,
    /// What is counted of the source: objects that were rejected, and how it was with the API server.
    Source = 22,
    /// What was counted since it was told of: all that follows, up to an `End`. From a process that was taken over
    /// from, to the one that serves.
    Late = 23,
    /// How many datagrams the kernel has dropped at sockets, as far as they are counted.
    Losses = 24,
}

/// Why a parcel cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ParcelError {
    /// Its text is not what its kind says.
    #[error("hand-over: a message of kind {kind:?} that this version cannot read")]
    Unreadable {
        /// What it was to tell of.
        kind: Kind,
        /// Where the text is wrong.
        source: serde_json::Error,
    },
    /// It has not the descriptors that its text tells of.
    #[error("hand-over: a message of kind {kind:?} with {found} descriptors in place of {wanted}")]
    Descriptors {
        /// What it was to tell of.
        kind: Kind,
        /// So many its text tells of.
        wanted: usize,
        /// So many came.
        found: usize,
    },
    /// A pipe that came with it is none, or holds something else.
    #[error("hand-over: a message of kind {kind:?} with a pipe that is not as was said")]
    Pipe {
        /// What it was to tell of.
        kind: Kind,
        /// What the kernel says of it.
        source: io::Error,
    },
    /// It has not the bytes that its text tells of.
    #[error("hand-over: a message of kind {kind:?} with {found} bytes in place of {wanted}")]
    Bytes {
        /// What it was to tell of.
        kind: Kind,
        /// So many its text tells of.
        wanted: usize,
        /// So many came.
        found: usize,
    },
}

impl Kind {
    /// True where it tells of what moves beside listeners: of all of it, or it stays where it is.
    pub(crate) fn moves(self) -> bool {
        matches!(self, Self::Process | Self::Port | Self::Backend | Self::Pins | Self::Flow | Self::Stream)
    }
}

impl Parcel {
    /// One that says this. Nothing that is handed over can fail to be written as JSON: no key is anything but a text.
    pub(crate) fn new(kind: Kind, said: &impl Serialize) -> Self {
        let body = serde_json::to_vec(said).expect("fields with plain names are JSON");
        Self { kind, body, descriptors: Vec::new() }
    }

    /// Adds bytes that are no text. Once at most.
    pub(crate) fn with_bytes<'b>(mut self, bytes: impl IntoIterator<Item = &'b [u8]>) -> Self {
        self.body.push(b'\n'); // JSON that was written without spaces has none.
        bytes.into_iter().for_each(|bytes| self.body.extend_from_slice(bytes));
        self
    }

    /// Adds descriptors after those that it has.
    pub(crate) fn with(mut self, descriptors: impl IntoIterator<Item = OwnedFd>) -> Self {
        self.descriptors.extend(descriptors);
        self
    }

    /// What it says.
    ///
    /// # Errors
    /// The text is not what `T` is written as.
    pub(crate) fn said<T: DeserializeOwned>(&self) -> Result<T, ParcelError> {
        let (text, _) = self.parts();
        serde_json::from_slice(text).map_err(|source| ParcelError::Unreadable { kind: self.kind, source })
    }

    /// The bytes that are no text.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.parts().1
    }

    /// Its descriptors, where there are as many as there have to be.
    ///
    /// # Errors
    /// There are more or fewer.
    pub(crate) fn take<const N: usize>(self) -> Result<[OwnedFd; N], ParcelError> {
        let (kind, found) = (self.kind, self.descriptors.len());
        self.descriptors.try_into().map_err(|_| ParcelError::Descriptors { kind, wanted: N, found })
    }

    fn parts(&self) -> (&[u8], &[u8]) {
        let end = self.body.iter().position(|byte| *byte == b'\n');
        end.map_or((&self.body, &[]), |end| (&self.body[..end], &self.body[end + 1..]))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Said {
        name: String,
        #[serde(default)]
        later: u64,
    }

    fn said(name: &str) -> Said {
        Said { name: name.to_owned(), later: 7 }
    }

    #[test]
    fn given_a_parcel_with_bytes_that_look_like_text_when_it_is_read_then_both_are_as_they_were() {
        let bytes = b"{\"name\":1}\n\0\xff\n";

        let parcel = Parcel::new(Kind::Stream, &said("two\nlines")).with_bytes([&bytes[..4], &bytes[4..]]);

        assert_eq!(parcel.said::<Said>().expect("what was written"), said("two\nlines"));
        assert_eq!(parcel.bytes(), bytes);
    }

    #[test]
    fn given_a_parcel_without_bytes_when_it_is_read_then_there_are_none() {
        let parcel = Parcel::new(Kind::Port, &said("web"));

        assert_eq!(parcel.said::<Said>().expect("what was written"), said("web"));
        assert_eq!(parcel.bytes(), b"");
    }

    #[test]
    fn t150_given_another_version_when_it_says_more_or_less_then_what_is_known_is_read() {
        let parcel = |body: &[u8]| Parcel { kind: Kind::Port, body: body.to_vec(), descriptors: Vec::new() };

        let newer: Said = parcel(br#"{"name":"a","later":1,"unknown":[2]}"#).said().expect("a newer one");
        let older: Said = parcel(br#"{"name":"a"}"#).said().expect("an older one");

        assert_eq!((newer.later, older.later), (1, 0));
        assert!(matches!(parcel(b"{}").said::<Said>(), Err(ParcelError::Unreadable { kind: Kind::Port, .. })));
        assert!(parcel(b"").said::<Said>().is_err() && parcel(b"\n{}").said::<Said>().is_err());
    }

    #[test]
    fn given_descriptors_when_there_are_not_as_many_as_there_have_to_be_then_that_is_an_error() {
        let some = || File::open("/dev/null").expect("a descriptor").into();
        let parcel = || Parcel::new(Kind::Flow, &said("web")).with([some(), some()]);

        assert!(parcel().take::<2>().is_ok());
        let error = parcel().take::<1>().expect_err("one too many");

        assert_eq!(error.to_string(), "hand-over: a message of kind Flow with 2 descriptors in place of 1");
    }

    #[test]
    fn given_kinds_when_they_travel_as_numbers_then_each_is_itself_again() {
        for kind in Kind::ALL {
            assert_eq!(Kind::of(kind.number()), Some(*kind));
        }

        assert_eq!(Kind::of(200), None);
    }
}
