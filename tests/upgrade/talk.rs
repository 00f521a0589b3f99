//! Long connections that say things both ways while processes change, and check each byte that they hear.
//!
//! What is said is a function of the talk and of the place in it: a byte that is lost, doubled or another connection's does
//! not fit where it is heard.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::support::client::connect;
use crate::support::within;

/// How often a talk says something.
const PACE: Duration = Duration::from_millis(20);
/// What is said at once.
const PIECE: usize = 700;
/// What is said at once by who says as much as goes in, and the most that is heard at once.
const LARGE_PIECE: usize = 64 * 1024;

/// Many talks, in all manners. They go on until they are told to come to their end.
pub(crate) struct Talks {
    over: watch::Sender<bool>,
    parties: JoinSet<io::Result<Told>>,
    waits: Waits,
}

/// How each talk that asks is answered.
type Waits = Arc<Mutex<BTreeMap<u64, Wait>>>;

/// How a talk is answered.
struct Wait {
    /// When the last question was asked that has its answer.
    asked: Instant,
    /// The longest time that an answer took, since this was looked at last.
    longest: Duration,
}

/// What one party says at its end.
struct Told {
    talk: u64,
    is_client: bool,
    said: u64,
    heard: u64,
}

/// How a talk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// Both say something now and then.
    Both,
    /// The client asks, and waits for the answer.
    Asks,
    /// The client has said all, the backend goes on.
    ClientEnded,
    /// The backend has said all, the client goes on.
    BackendEnded,
    /// The backend says as much as goes in, and the client does not read before the end.
    Stalled,
}

/// How a party speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speech {
    Once,
    NowAndThen,
    AsMuchAsGoesIn,
}

impl Manner {
    const ALL: [Self; 5] = [Self::Both, Self::Asks, Self::ClientEnded, Self::BackendEnded, Self::Stalled];

    /// Of the client and of the backend.
    fn speech(self) -> [Speech; 2] {
        match self {
            Self::Both | Self::Asks => [Speech::NowAndThen, Speech::NowAndThen],
            Self::ClientEnded => [Speech::Once, Speech::NowAndThen],
            Self::BackendEnded => [Speech::NowAndThen, Speech::Once],
            Self::Stalled => [Speech::NowAndThen, Speech::AsMuchAsGoesIn],
        }
    }
}

impl Talks {
    /// So many, through a Service that nobody else uses. Its one backend is in here, too.
    pub(crate) async fn begin(count: u64, service: SocketAddr, backend: SocketAddr) -> Self {
        let listener = TcpListener::bind(backend).await.expect("the test's own address is free");
        let (over, is_over) = watch::channel(false);
        let (mut parties, waits) = (JoinSet::new(), Waits::default());
        for (talk, manner) in (0..count).zip(Manner::ALL.into_iter().cycle()) {
            let both = async { tokio::join!(connect(service), listener.accept()) };
            let (client, accepted) = within("a talk to begin", both).await;
            let (client, server) = (client.expect("it serves"), accepted.expect("descriptors are left").0);
            parties.spawn(be_client(client, talk, manner, is_over.clone(), Arc::clone(&waits)));
            parties.spawn(be_backend(server, talk, manner, is_over.clone()));
        }
        Self { over, parties, waits }
    }

    /// How long each talk that asks has waited for an answer at most, since this was asked last. Waits until each has the answer
    /// to a question that it asks from now on: who stands still is waited for.
    pub(crate) async fn longest_waits(&self) -> Vec<Duration> {
        let now = Instant::now();
        let answered = async {
            while self.waits().values().any(|wait| wait.asked < now) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        within("an answer for each talk that asks", answered).await;
        self.waits().values_mut().map(|wait| std::mem::take(&mut wait.longest)).collect()
    }

    fn waits(&self) -> MutexGuard<'_, BTreeMap<u64, Wait>> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has all come to their end, and checks that each has heard what the other has said. How many bytes that was.
    pub(crate) async fn end(mut self) -> u64 {
        self.over.send_replace(true);
        let mut heard_by = BTreeMap::<u64, [Option<Told>; 2]>::new();
        while let Some(told) = within("the talks to end", self.parties.join_next()).await {
            let told = told.expect("no wrong byte").expect("no reset");
            let (talk, place) = (told.talk, usize::from(told.is_client));
            heard_by.entry(talk).or_default()[place] = Some(told);
        }
        let mut bytes = 0;
        for (talk, told) in heard_by {
            let [Some(backend), Some(client)] = told else { panic!("talk {talk} has one party") };
            assert_eq!((client.said, backend.said), (backend.heard, client.heard), "talk {talk}");
            bytes += client.said + backend.said;
        }
        bytes
    }
}

async fn be_client(
    stream: TcpStream,
    talk: u64,
    manner: Manner,
    over: watch::Receiver<bool>,
    waits: Waits,
) -> io::Result<Told> {
    let [speech, _] = manner.speech();
    let (said, heard) = match manner {
        Manner::Asks => ask(stream, talk, over, &waits).await?,
        Manner::Stalled => take_part(stream, [talk, !talk], speech, true, over).await?,
        _ => take_part(stream, [talk, !talk], speech, false, over).await?,
    };
    Ok(Told { talk, is_client: true, said, heard })
}

async fn be_backend(stream: TcpStream, talk: u64, manner: Manner, over: watch::Receiver<bool>) -> io::Result<Told> {
    let [_, speech] = manner.speech();
    let (said, heard) = match manner {
        Manner::Asks => echo(stream).await?,
        _ => take_part(stream, [!talk, talk], speech, false, over).await?,
    };
    Ok(Told { talk, is_client: false, said, heard })
}

/// Speaks and hears, each to its end. `seeds`: of what is said, and of what is to be heard.
async fn take_part(
    stream: TcpStream,
    [own, theirs]: [u64; 2],
    speech: Speech,
    hears_at_the_end: bool,
    over: watch::Receiver<bool>,
) -> io::Result<(u64, u64)> {
    let (read, write) = stream.into_split();
    let mut end = over.clone();
    let hearing = async {
        if hears_at_the_end {
            end.wait_for(|over| *over).await.expect("the test says when");
        }
        hear(read, theirs).await
    };
    tokio::try_join!(say(write, own, speech, over), hearing)
}

async fn say(mut write: OwnedWriteHalf, seed: u64, speech: Speech, over: watch::Receiver<bool>) -> io::Result<u64> {
    let piece = if speech == Speech::AsMuchAsGoesIn { LARGE_PIECE } else { PIECE };
    let mut at = 0;
    loop {
        write.write_all(&words(seed, at, piece)).await?;
        at += piece as u64;
        if speech == Speech::Once || *over.borrow() {
            break;
        }
        if speech == Speech::NowAndThen {
            tokio::time::sleep(PACE).await; // Its pace: nobody waits for this.
        }
    }
    write.shutdown().await?;
    Ok(at)
}

async fn hear(mut read: OwnedReadHalf, seed: u64) -> io::Result<u64> {
    let (mut at, mut bytes) = (0, vec![0; LARGE_PIECE]);
    loop {
        let count = read.read(&mut bytes).await?;
        if count == 0 {
            return Ok(at);
        }
        let expected = words(seed, at, count);
        assert!(bytes[..count] == expected, "a wrong byte between {at} and {}", at + count as u64);
        at += count as u64;
    }
}

async fn ask(mut stream: TcpStream, talk: u64, over: watch::Receiver<bool>, waits: &Waits) -> io::Result<(u64, u64)> {
    let (mut at, mut answer) = (0, [0; PIECE]);
    while !*over.borrow() {
        let question = words(talk, at, PIECE);
        let began = Instant::now();
        stream.write_all(&question).await?;
        stream.read_exact(&mut answer).await?;
        note(waits, talk, began);
        assert!(answer[..] == question[..], "a wrong byte between {at} and {}", at + PIECE as u64);
        at += PIECE as u64;
        tokio::time::sleep(PACE).await; // As above.
    }
    stream.shutdown().await?;
    let more = stream.read(&mut answer).await?;
    Ok((at, at + more as u64))
}

fn note(waits: &Waits, talk: u64, asked: Instant) {
    let mut waits = waits.lock().unwrap_or_else(PoisonError::into_inner);
    let wait = waits.entry(talk).or_insert(Wait { asked, longest: Duration::ZERO });
    (wait.asked, wait.longest) = (asked, wait.longest.max(asked.elapsed()));
}

/// Gives back what comes, to the end.
async fn echo(mut stream: TcpStream) -> io::Result<(u64, u64)> {
    let (mut bytes, mut count) = ([0; PIECE], 0);
    loop {
        let more = stream.read(&mut bytes).await?;
        if more == 0 {
            stream.shutdown().await?;
            return Ok((count, count));
        }
        stream.write_all(&bytes[..more]).await?;
        count += more as u64;
    }
}

/// What is said from a place on.
fn words(seed: u64, at: u64, count: usize) -> Vec<u8> {
    let seed = seed.wrapping_mul(0xd6e8_feb8_6659_fd93);
    let word = |at: u64| ((seed ^ at).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
    (at..at + count as u64).map(word).collect()
}
