//! What is said of established TCP connections, and to whom they belong in the process that takes them over.
//!
//! The descriptors of each are its client's socket, its backend's, and both ends of the pipe that holds bytes for the backend and
//! of the one that holds bytes for the client, where there is such a pipe. Bytes in memory follow the text in the same order.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::handover::exporter::ToldCount;
use crate::handover::heirs::Heirs;
use crate::handover::parcel::{Kind, MOST_DESCRIPTORS, Parcel, ParcelError};
use crate::handover::services::PortName;
use crate::name::ServicePortName;
use crate::plan::ListenerKind;
use crate::serve::access::DraftRecord;
use crate::serve::balancer::Backend;
use crate::serve::direction::{Nagle, Phase};
use crate::serve::estate::{Estate, PortParts};
use crate::serve::limits::{LimitOptions, Lived};
use crate::serve::moving_flow::Unanswered;
use crate::serve::moving_stream::{MovingDirection, MovingEnds, MovingPipe, MovingStream, WorkerLines};
use crate::serve::relay::SoFar;
use crate::serve::tcp::ComingStream;
use crate::stats::{Entry, Word};
use crate::vips::{Granted, Wanted};

/// Connections that are asked for at once: what a parcel holds of those without a pipe. The copies of their descriptors are there
/// until they have been sent.
const AT_ONCE: usize = MOST_DESCRIPTORS / 2;

/// Descriptors of one connection at most.
const DESCRIPTORS: usize = 6;

/// The longest time that is taken from another process for something that is to come: no clock goes farther.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3_600);

/// Bytes of connections in one parcel, unless one alone has more.
const BYTES: usize = 256 * 1024;

/// A connection.
#[derive(Debug, Serialize, Deserialize)]
struct StreamSaid {
    port: PortName,
    backend: SocketAddr,
    entry: String,
    up: DirectionSaid,
    down: DirectionSaid,
    #[serde(default)]
    mute: bool,
    /// Left out where they are what they are by default, as with most.
    #[serde(default, skip_serializing_if = "is_default")]
    limits: LimitOptions,
    #[serde(default)]
    lived: Option<Lived>,
    /// Milliseconds, as all that follows.
    #[serde(default)]
    half_silent: Option<u64>,
    #[serde(default)]
    leaves_in: Option<u64>,
    #[serde(default)]
    draft: Option<DraftRecord>,
}

/// One direction of it.
#[derive(Debug, Serialize, Deserialize)]
struct DirectionSaid {
    phase: Phase,
    #[serde(default)]
    nagle: Nagle,
    moved: u64,
    /// Bytes of it that follow the text.
    #[serde(default)]
    rest: usize,
    /// So many of these are no payload.
    #[serde(default)]
    preface: usize,
    /// Bytes in a pipe, if it has one.
    #[serde(default)]
    pipe: Option<u32>,
}

/// All connections that stand still; `told` counts those that are told of.
pub(crate) fn parcels(workers: &WorkerLines, told: &ToldCount) -> impl Iterator<Item = Result<Parcel, Unanswered>> {
    workers.streams(AT_ONCE).flat_map(move |streams| match streams {
        Ok(streams) => {
            told.add(streams.len());
            in_parcels(streams).into_iter().map(Ok).collect()
        }
        Err(unanswered) => vec![Err(unanswered)],
    })
}

/// As few parcels as these take.
fn in_parcels(streams: Vec<MovingStream>) -> Vec<Parcel> {
    let (mut parcels, mut next) = (Vec::new(), Letter::default());
    for stream in streams {
        let is_full = next.descriptors.len() + DESCRIPTORS > MOST_DESCRIPTORS || next.bytes.len() >= BYTES;
        if is_full {
            parcels.push(std::mem::take(&mut next).close());
        }
        next.add(stream);
    }
    if !next.said.is_empty() {
        parcels.push(next.close());
    }
    parcels
}

/// A parcel that is being written.
#[derive(Default)]
struct Letter {
    said: Vec<StreamSaid>,
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Letter {
    fn add(&mut self, stream: MovingStream) {
        let MovingStream { client, upstream, port, backend, entry, up, down, ends, draft } = stream;
        self.descriptors.extend([client, upstream]);
        let [up, down] = [up, down].map(|direction| self.add_direction(direction));
        self.said.push(StreamSaid {
            port: (&port).into(),
            backend,
            entry: entry.as_str().to_owned(),
            up,
            down,
            mute: ends.mute,
            limits: ends.limits,
            lived: ends.lived,
            half_silent: ends.half_silent.map(ms),
            leaves_in: ends.leaves_in.map(ms),
            draft,
        });
    }

    fn add_direction(&mut self, direction: MovingDirection) -> DirectionSaid {
        let MovingDirection { phase, nagle, moved, rest, preface, pipe } = direction;
        self.bytes.extend_from_slice(&rest);
        let held = pipe.map(|MovingPipe { read, write, held }| {
            self.descriptors.extend([read, write]);
            held
        });
        DirectionSaid { phase, nagle, moved, rest: rest.len(), preface, pipe: held }
    }

    fn close(self) -> Parcel {
        Parcel::new(Kind::Stream, &self.said).with_bytes([self.bytes.as_slice()]).with(self.descriptors)
    }
}

fn is_default(limits: &LimitOptions) -> bool {
    *limits == LimitOptions::default()
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A connection that was taken, ready to go on. Dropped, its descriptors are closed.
pub(crate) struct TakenStream {
    client: OwnedFd,
    /// Where the client came in.
    address: Option<IpAddr>,
    upstream: OwnedFd,
    port: ServicePortName,
    backend: SocketAddr,
    entry: Entry,
    ends: MovingEnds,
    so_far: (SoFar, [u64; 2]),
    draft: Option<DraftRecord>,
}

/// The connections of a parcel.
///
/// # Errors
/// It cannot be read, or has not the descriptors or bytes that it tells of. Then all of them are to stay where they are: a
/// pipe that cannot be used would be a stream with a hole.
pub(crate) fn take(parcel: Parcel) -> Result<Vec<TakenStream>, ParcelError> {
    let said: Vec<StreamSaid> = parcel.said()?;
    let (kind, found) = (parcel.kind, parcel.descriptors.len());
    let wanted = said.iter().map(StreamSaid::descriptors).sum();
    if wanted != found {
        return Err(ParcelError::Descriptors { kind, wanted, found });
    }
    let (wanted, found) = (said.iter().map(StreamSaid::bytes).sum::<usize>(), parcel.bytes().len());
    if wanted != found {
        return Err(ParcelError::Bytes { kind, wanted, found });
    }
    let bytes = parcel.bytes().to_vec();
    let mut contents = Contents { bytes: &bytes, descriptors: parcel.descriptors.into_iter() };
    let streams = said.into_iter().map_while(|said| contents.stream(said));
    streams.map(|stream| TakenStream::ready(stream).map_err(|source| ParcelError::Pipe { kind, source })).collect()
}

impl StreamSaid {
    fn descriptors(&self) -> usize {
        2 + 2 * [&self.up, &self.down].into_iter().filter(|direction| direction.pipe.is_some()).count()
    }

    fn bytes(&self) -> usize {
        self.up.rest.saturating_add(self.down.rest)
    }
}

/// What a parcel has beside its text, as far as it was not taken out yet.
struct Contents<'p> {
    bytes: &'p [u8],
    descriptors: std::vec::IntoIter<OwnedFd>,
}

impl Contents<'_> {
    /// `None` where there is not enough left: it was counted before.
    fn stream(&mut self, said: StreamSaid) -> Option<MovingStream> {
        let (client, upstream) = (self.descriptors.next()?, self.descriptors.next()?);
        let (up, down) = (self.direction(said.up)?, self.direction(said.down)?);
        let ends = MovingEnds {
            mute: said.mute,
            limits: said.limits.at_most(LONGEST),
            lived: said.lived,
            half_silent: said.half_silent.map(Duration::from_millis),
            leaves_in: said.leaves_in.map(|ms| Duration::from_millis(ms).min(LONGEST)),
        };
        let entry = Entry::of(&said.entry).unwrap_or(Entry::ClusterIp);
        let (port, backend, draft) = (said.port.into(), said.backend, said.draft);
        Some(MovingStream { client, upstream, port, backend, entry, up, down, ends, draft })
    }

    fn direction(&mut self, said: DirectionSaid) -> Option<MovingDirection> {
        let (rest, others) = self.bytes.split_at_checked(said.rest)?;
        self.bytes = others;
        let pipe = match said.pipe {
            Some(held) => Some(MovingPipe { read: self.descriptors.next()?, write: self.descriptors.next()?, held }),
            None => None,
        };
        let DirectionSaid { phase, nagle, moved, preface, .. } = said;
        Some(MovingDirection { phase, nagle, moved, rest: rest.to_vec(), preface: preface.min(said.rest), pipe })
    }
}

impl TakenStream {
    fn ready(stream: MovingStream) -> io::Result<Self> {
        let MovingStream { client, upstream, port, backend, entry, up, down, ends, draft } = stream;
        let (address, so_far) = (local_ip(&client), SoFar::new(up, down, ends)?);
        Ok(Self { client, address, upstream, port, backend, entry, ends, so_far, draft })
    }

    /// The socket to its backend, and where that is.
    pub(crate) fn to_backend(&self) -> (&OwnedFd, SocketAddr) {
        (&self.upstream, self.backend)
    }

    /// The address where the client came in, as far as it has to be made local for it.
    pub(crate) fn wanted(&self) -> Option<Wanted> {
        let announced = match ListenerKind::of(self.entry) {
            ListenerKind::ClusterIp => false,
            ListenerKind::ExternalIp | ListenerKind::LoadBalancerIp => true,
            ListenerKind::NodePort | ListenerKind::Exposed => return None,
        };
        Some(Wanted { address: self.address?, announced })
    }

    /// Finds out what it belongs to here.
    pub(crate) fn coming(
        self,
        estate: &Estate,
        heirs: &mut Heirs<'_>,
        granted: &Granted,
        now: Instant,
    ) -> ComingStream {
        let Self { client, address, upstream, port: name, backend: at, entry, ends, so_far, draft } = self;
        let address = address.and_then(|address| granted.hold(address));
        let (port, backend) = heirs.of(&name, at);
        let parts = estate.ports.get(&name);
        if Heirs::is_departed(&backend) {
            let leaves_in = ends.leaves_in.or_else(|| reset_after(parts));
            part_with(&backend, leaves_in.map(|time| now + time));
        }
        let settings = parts.and_then(|parts| parts.tcp.clone());
        let departed_with = parts.is_none().then_some(ends.limits);
        ComingStream { client, upstream, entry, port, backend, settings, departed_with, so_far, draft, address }
    }
}

fn local_ip(socket: &OwnedFd) -> Option<IpAddr> {
    let address = socket2::SockRef::from(socket).local_addr().ok()?;
    Some(address.as_socket()?.ip())
}

/// How long connections of backends that leave may go on; `None`: as long as they like.
fn reset_after(parts: Option<&PortParts>) -> Option<Duration> {
    parts?.tcp.as_ref()?.reset_after
}

/// What was said first counts.
fn part_with(backend: &Arc<Backend>, at: Option<Instant>) {
    if let Some(at) = at
        && backend.leaves_at().is_none()
    {
        backend.leave(at);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;
    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;
    use crate::handover::parcel::LONGEST_BODY_BYTES;
    use crate::name::{ObjectName, Protocol};

    /// What a stream is made of, as far as it can be made up: phase, moved, rest, and what is in a pipe.
    type Made = ((u8, u64, Vec<u8>), Option<u32>);

    fn direction(((phase, moved, rest), held): &Made) -> MovingDirection {
        let phases = [Phase::Copying, Phase::Splicing, Phase::Leaving, Phase::Ending, Phase::Done];
        let pipe = held.map(|held| {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).expect("a pipe");
            rustix::io::write(&write, &vec![7; held as usize]).expect("room");
            MovingPipe { read, write, held }
        });
        let rest = if pipe.is_some() { Vec::new() } else { rest.clone() };
        let (phase, preface) = (phases[usize::from(*phase) % 5], rest.len().min(usize::from(*phase)));
        MovingDirection { phase, nagle: Nagle::On, moved: *moved, rest, preface, pipe }
    }

    fn stream((up, down): &(Made, Made), number: u16) -> MovingStream {
        let (client, upstream) = UnixStream::pair().expect("sockets");
        MovingStream {
            client: client.into(),
            upstream: upstream.into(),
            port: ServicePortName::new(ObjectName::parse("default/web"), "http", Protocol::Tcp),
            backend: ([10, 0, 0, 1], number).into(),
            entry: Entry::ExternalIp,
            up: direction(up),
            down: direction(down),
            ends: MovingEnds {
                mute: number.is_multiple_of(2),
                half_silent: Some(Duration::from_millis(number.into())),
                ..MovingEnds::default()
            },
            draft: Some(DraftRecord { age_ms: number.into(), ..DraftRecord::default() }),
        }
    }

    fn made() -> impl Strategy<Value = Made> {
        let rest = proptest::collection::vec(any::<u8>(), 0..3_000);
        ((any::<u8>(), any::<u64>(), rest), proptest::option::of(1..4_096_u32))
    }

    /// What can be compared of a direction.
    fn seen(direction: &MovingDirection) -> (Phase, Nagle, u64, Vec<u8>, usize, Option<u32>) {
        let MovingDirection { phase, nagle, moved, rest, preface, pipe } = direction;
        (*phase, *nagle, *moved, rest.clone(), *preface, pipe.as_ref().map(|pipe| pipe.held))
    }

    fn read(parcel: Parcel) -> Vec<MovingStream> {
        let said: Vec<StreamSaid> = parcel.said().expect("what was written");
        let bytes = parcel.bytes().to_vec();
        let mut contents = Contents { bytes: &bytes, descriptors: parcel.descriptors.into_iter() };
        said.into_iter().map(|said| contents.stream(said).expect("enough")).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn f25_given_any_streams_when_written_and_read_then_each_is_the_same(
            made in proptest::collection::vec((made(), made()), 1..60),
        ) {
            let streams: Vec<_> = made.iter().zip(1..).map(|(made, number)| stream(made, number)).collect();
            let expected: Vec<_> = streams.iter().map(|stream| (seen(&stream.up), seen(&stream.down))).collect();

            let parcels = in_parcels(streams);
            for parcel in &parcels {
                prop_assert!(parcel.descriptors.len() <= MOST_DESCRIPTORS && parcel.body.len() <= LONGEST_BODY_BYTES);
            }
            let read: Vec<_> = parcels.into_iter().flat_map(read).collect();

            prop_assert_eq!(read.iter().map(|stream| (seen(&stream.up), seen(&stream.down))).collect::<Vec<_>>(), expected);
            for (stream, number) in read.iter().zip(1_u16..) {
                prop_assert_eq!(stream.backend.port(), number);
                prop_assert_eq!((stream.entry, stream.ends.mute), (Entry::ExternalIp, number.is_multiple_of(2)));
                prop_assert_eq!(stream.ends.half_silent, Some(Duration::from_millis(number.into())));
                prop_assert_eq!(stream.draft.map(|draft| draft.age_ms), Some(number.into()));
            }
        }
    }

    fn one(held: u32) -> Parcel {
        let none = ((0, 0, vec![1, 2, 3]), None);
        in_parcels(vec![stream(&(none, ((1, 0, Vec::new()), Some(held))), 1)]).remove(0)
    }

    #[test]
    fn f25_given_a_parcel_that_is_not_whole_when_taken_then_none_of_it_is() {
        assert_eq!(take(one(5)).map(|streams| streams.len()).expect("whole"), 1);

        let mut fewer = one(5);
        fewer.descriptors.pop();
        assert!(matches!(take(fewer), Err(ParcelError::Descriptors { wanted: 4, found: 3, .. })));
        let mut shorter = one(5);
        shorter.body.pop();
        assert!(matches!(take(shorter), Err(ParcelError::Bytes { wanted: 3, found: 2, .. })));
        let leaked = one(5);
        rustix::io::read(&leaked.descriptors[2], &mut [0; 1]).expect("a byte");
        assert!(matches!(take(leaked), Err(ParcelError::Pipe { .. })));
    }
}
