//! Who removes routes: one process for each network namespace and route protocol, and everybody can ask it who it is.
//!
//! The claim is a name that the kernel gives to one socket at a time, and takes back when its process ends, however that
//! happens. Such names (of abstract Unix sockets) belong to the network namespace, as routes do. A locked file in the state
//! folder would be one and the same for two namespaces that share that folder, and two relays with a folder each, or
//! none, would both remove routes of one namespace.
//!
//! Any process of the namespace may take the name, whatever its rights: then routes are left where they are, and whoever
//! is refused tells the holder's pid and uid by the kernel's word. Two relays with the same number are a mistake that
//! both tell of. Where the first one starts anew and the second one has the claim by then, that one removes what it does
//! not need itself once that has lingered, and the first one sets it again at once: each such route is missing for an
//! instant, one time.

use std::convert::Infallible;
use std::io::{self, Write};
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{sleep, timeout};

/// How long the holder of a claim may take to say who it is.
const PATIENCE: Duration = Duration::from_millis(300);
/// The longest answer that is read.
const LONGEST_ANSWER: u64 = 200;
/// How long is waited after an accept that failed: there may be no descriptor left.
const PAUSE: Duration = Duration::from_secs(1);

/// The right to remove routes. Given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    listener: UnixListener,
    says: String,
}

/// Why there is no claim.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Somebody has it.
    #[error("routes of protocol {protocol} belong to another process here: {holder}")]
    Held {
        /// The number.
        protocol: u8,
        /// What the holder says of itself, and who it is as the kernel knows it.
        holder: String,
    },
    /// There are no such sockets here, or no descriptor left.
    #[error("cannot claim the routes of protocol {protocol}")]
    Socket {
        /// The number.
        protocol: u8,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Claim {
    /// Claims the routes of a protocol. `says` is told to whoever comes later.
    pub(crate) async fn take(protocol: u8, says: String) -> Result<Self, ClaimError> {
        Self::take_named(&name_of(protocol), protocol, says).await
    }

    /// The same, by another name than that of the protocol.
    pub(crate) async fn take_named(name: &str, protocol: u8, says: String) -> Result<Self, ClaimError> {
        match listen(name) {
            Ok(listener) => Ok(Self { listener, says }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                let holder = ask(name).await.unwrap_or_else(|| "it has just ended".into());
                Err(ClaimError::Held { protocol, holder })
            }
            Err(source) => Err(ClaimError::Socket { protocol, source }),
        }
    }

    /// Tells everybody who asks, for ever.
    pub(crate) async fn answer(&self) -> Infallible {
        loop {
            match self.listener.accept().await {
                // A few bytes fit into a new socket; who does not read them does not want to know.
                Ok((asker, _)) => drop(asker.into_std().and_then(|mut asker| asker.write_all(self.says.as_bytes()))),
                Err(_) => sleep(PAUSE).await,
            }
        }
    }
}

/// The name that stands for the routes of a protocol.
pub(crate) fn name_of(protocol: u8) -> String {
    format!("kube-relay/routes/{protocol}")
}

fn address(name: &str) -> io::Result<SockAddr> {
    SockAddr::unix(format!("\0{name}"))
}

fn listen(name: &str) -> io::Result<UnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?;
    socket.bind(&address(name)?)?;
    socket.listen(16)?;
    UnixListener::from_std(socket.into())
}

/// Who the holder is: one line, as it is for a log. `None` where nobody is there.
async fn ask(name: &str) -> Option<String> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None).ok()?;
    socket.connect(&address(name).ok()?).ok()?;
    let holder = UnixStream::from_std(socket.into()).ok()?;
    // Of who listens, not of who accepts: the kernel knows it before anybody does.
    let process = holder.peer_cred().ok();
    let says = hear(holder).await.unwrap_or_else(|| "it does not say who it is".into());
    Some(match process.and_then(|process| Some((process.pid()?, process.uid()))) {
        Some((pid, uid)) => format!("{says} (pid {pid}, uid {uid})"),
        None => says,
    })
}

/// What the holder says; `None` where that is nothing.
async fn hear(holder: UnixStream) -> Option<String> {
    let mut answer = Vec::new();
    timeout(PATIENCE, holder.take(LONGEST_ANSWER).read_to_end(&mut answer)).await.ok()?.ok()?;
    let answer = String::from_utf8_lossy(&answer).escape_debug().to_string();
    (!answer.is_empty()).then_some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Claims a name of this process: others test at the same time, in the same network namespace.
    async fn take(number: u8, says: &str) -> Result<Claim, ClaimError> {
        let name = format!("kube-relay/test/{}/{number}", std::process::id());
        Claim::take_named(&name, number, says.into()).await
    }

    #[tokio::test]
    async fn given_a_claim_when_another_asks_for_it_then_it_is_told_who_has_it_until_that_one_ends() {
        let first = take(1, "kube-relay with pid 4711").await.expect("nobody has it");
        let answering = tokio::spawn(async move { first.answer().await });

        let refused = take(1, "").await.expect_err("one at a time").to_string();
        take(2, "").await.expect("another name");
        answering.abort();
        let _ = answering.await;

        let told = "routes of protocol 1 belong to another process here: kube-relay with pid 4711";
        let known = format!(" (pid {}, uid ", std::process::id());
        assert!(refused.starts_with(&format!("{told}{known}")), "{refused}");
        take(1, "").await.expect("it is free again");
    }

    #[tokio::test]
    async fn given_a_holder_that_says_nothing_when_asked_then_it_is_not_waited_for_and_the_kernel_knows_it() {
        let _silent = take(3, "").await.expect("nobody has it");

        let refused = take(3, "").await.expect_err("one at a time").to_string();

        let known = format!("it does not say who it is (pid {}, uid ", std::process::id());
        assert!(refused.contains(&known), "{refused}");
    }

    #[tokio::test]
    async fn given_a_holder_that_says_odd_things_when_asked_then_it_stays_one_line() {
        let odd = take(4, &format!("a\nb\u{1b}[2J{}", "x".repeat(1_000))).await.expect("nobody has it");
        tokio::spawn(async move { odd.answer().await });

        let refused = take(4, "").await.expect_err("one at a time").to_string();

        assert!(refused.contains("a\\nb\\u{1b}[2J") && refused.len() < 400, "{refused}");
    }
}
