//! Asks the admin server of a kube-relay that runs elsewhere: `status` and `top` do, and whoever finds a port taken.
//!
//! Answering is `admin`; both sides share the line by which a kube-relay names itself.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::header::{HOST, SERVER};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::live::{LiveReport, NO_SERVICE};
use crate::name::ObjectName;
use crate::status_query::{Excerpt, spelled};
use crate::summary::{Closeup, Summary};

/// How long a neighbour on a taken port may take to name itself: it is on this machine.
const INTRODUCTION: Duration = Duration::from_millis(200);
/// How long `status` waits. The answer is ready at once, unless the other process hangs.
const PATIENCE: Duration = Duration::from_secs(5);
/// Larger than the status of any cluster; smaller than what would hurt.
const ANSWER_LIMIT_BYTES: usize = 256 << 20;
/// A sentence, with two names in it.
const REFUSAL_LIMIT_BYTES: usize = 4 << 10;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens there.
    #[error(
        "{server}: nothing answers; is `kube-relay run` up, and is this its --status-bind-address? (--server IP:PORT asks another)"
    )]
    Connect {
        /// Whom we asked.
        server: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody listens there, but does not answer.
    #[error("{server}: no answer within {}", crate::value::Time(PATIENCE))]
    Timeout {
        /// Whom we asked.
        server: SocketAddr,
    },
    /// It does not speak HTTP, or broke off.
    #[error("{server}: no HTTP answer")]
    Http {
        /// Whom we asked.
        server: SocketAddr,
        /// What went wrong.
        source: hyper::Error,
    },
    /// The answer broke off, or is larger than any that we would send.
    #[error("{server}: the answer cannot be read: {what}")]
    Body {
        /// Whom we asked.
        server: SocketAddr,
        /// What went wrong.
        what: String,
    },
    /// It answers, but not as we do.
    #[error("{server}: answers {status} to GET /status: not the --status-bind-address of a kube-relay")]
    Stranger {
        /// Whom we asked.
        server: SocketAddr,
        /// What it said.
        status: StatusCode,
    },
    /// It is a kube-relay that does not have what was asked for.
    #[error("{server}: {what}")]
    Refused {
        /// Whom we asked.
        server: SocketAddr,
        /// What it said.
        what: String,
    },
    /// It is a kube-relay of a version with other words.
    #[error("{server}: its status cannot be understood; is it another version than {}?", env!("CARGO_PKG_VERSION"))]
    Shape {
        /// Whom we asked.
        server: SocketAddr,
        /// What is not as expected.
        source: serde_json::Error,
    },
}

/// What the kube-relay at this address serves.
pub async fn status(server: SocketAddr) -> Result<LiveReport, AskError> {
    status_for(server, None).await
}

/// The same with where session affinity keeps a client. A relay of a version before this one tells nothing of that.
pub async fn status_for(server: SocketAddr, client: Option<IpAddr>) -> Result<LiveReport, AskError> {
    ask(server, &Excerpt { client, ..Excerpt::default() }.path()).await?.read(server)
}

/// The same of one Service alone.
pub async fn status_of(server: SocketAddr, name: &ObjectName) -> Result<LiveReport, AskError> {
    let wanted = Excerpt { service: Some(name.clone()), ..Excerpt::default() };
    let told: LiveReport = ask(server, &wanted.path()).await?.read(server)?;
    // A relay of a version before this one tells of all.
    told.only(name).map_err(|error| AskError::Refused { server, what: error.to_string() })
}

/// The same at a glance: a line for each Service.
pub async fn summary(server: SocketAddr) -> Result<Summary, AskError> {
    ask(server, "/status?summary").await?.read(server)
}

/// One Service with all that is known of it; `None` where the kube-relay has none of that name.
pub async fn closeup(server: SocketAddr, name: &ObjectName) -> Result<Option<Closeup>, AskError> {
    let answer = ask(server, &path_of(name)).await?;
    if answer.status == StatusCode::NOT_FOUND && answer.is_ours() {
        return Ok(None);
    }
    answer.read(server).map(Some)
}

fn path_of(name: &ObjectName) -> String {
    format!("/status/{}/{}", spelled(&name.namespace), spelled(&name.name))
}

/// The process id of the kube-relay whose admin server has this address; `None` where it is somebody else's.
pub async fn pid(server: SocketAddr) -> Option<u32> {
    let answer = timeout(INTRODUCTION, get(server, "/livez")).await.ok()?.ok()?;
    pid_in(&answer.introduction?)
}

/// How this process names itself in each answer: `kube-relay/0.1.0 (pid 4711)`.
pub fn introduction() -> String {
    format!("kube-relay/{} (pid {})", env!("CARGO_PKG_VERSION"), std::process::id())
}

fn pid_in(introduction: &str) -> Option<u32> {
    let (_, pid) = introduction.strip_prefix("kube-relay/")?.split_once(" (pid ")?;
    pid.strip_suffix(')')?.parse().ok()
}

struct Answer {
    status: StatusCode,
    introduction: Option<String>,
    body: Bytes,
}

impl Answer {
    fn is_ours(&self) -> bool {
        self.introduction.as_deref().and_then(pid_in).is_some()
    }

    /// What a kube-relay says that knows the question and has no answer. Another of its servers knows no such question.
    fn refusal(&self) -> Option<String> {
        let text = self.body.get(..self.body.len().min(REFUSAL_LIMIT_BYTES)).map(String::from_utf8_lossy)?;
        let is_told = match self.status {
            StatusCode::BAD_REQUEST => true,
            StatusCode::NOT_FOUND => text.starts_with(NO_SERVICE),
            _ => false,
        };
        (is_told && self.is_ours()).then(|| text.trim_end().to_owned())
    }

    fn read<T: DeserializeOwned>(&self, server: SocketAddr) -> Result<T, AskError> {
        if let Some(what) = self.refusal() {
            return Err(AskError::Refused { server, what });
        }
        if self.status != StatusCode::OK {
            return Err(AskError::Stranger { server, status: self.status });
        }
        serde_json::from_slice(&self.body).map_err(|source| AskError::Shape { server, source })
    }
}

async fn ask(server: SocketAddr, path: &str) -> Result<Answer, AskError> {
    timeout(PATIENCE, get(server, path)).await.map_err(|_| AskError::Timeout { server })?
}

async fn get(server: SocketAddr, path: &str) -> Result<Answer, AskError> {
    let stream = TcpStream::connect(server).await.map_err(|source| AskError::Connect { server, source })?;
    let http = |source| AskError::Http { server, source };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
    let request = Request::get(path).header(HOST, server.to_string()).body(Empty::<Bytes>::new());
    let request = request.expect("plain letters and an address make a request");
    let exchange = async {
        let response = sender.send_request(request).await.map_err(http)?;
        let introduction = response.headers().get(SERVER).and_then(|name| name.to_str().ok()).map(str::to_owned);
        let (head, body) = response.into_parts();
        let body = Limited::new(body, ANSWER_LIMIT_BYTES).collect().await;
        let body = body.map_err(|error| AskError::Body { server, what: error.to_string() })?.to_bytes();
        Ok(Answer { status: head.status, introduction, body })
    };
    // The connection moves the bytes of the exchange, and may end just before the exchange has seen the last of them.
    let connection = async {
        let _ = connection.await;
        std::future::pending::<Infallible>().await
    };
    tokio::select! {
        answer = exchange => answer,
        never = connection => match never {},
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::live::sample;

    /// Answers one request with these bytes.
    async fn stranger(answer: &'static [u8]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await?;
            let _ = stream.read(&mut [0; 1024]).await?;
            stream.write_all(answer).await
        });
        address
    }

    #[tokio::test]
    async fn given_nobody_when_asked_then_the_error_names_the_address_and_what_to_do() {
        let address = {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
            listener.local_addr().expect("a bound socket")
        };

        let error = status(address).await.expect_err("nobody is there");

        assert!(matches!(error, AskError::Connect { .. }));
        assert!(error.to_string().contains(&address.to_string()) && error.to_string().contains("--server"), "{error}");
    }

    #[tokio::test]
    async fn given_another_program_when_asked_then_it_is_told_apart() {
        let web = stranger(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await;
        let other = stranger(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]").await;
        let ssh = stranger(b"SSH-2.0-OpenSSH_9.9\r\n").await;

        assert!(matches!(status(web).await, Err(AskError::Stranger { status: StatusCode::NOT_FOUND, .. })));
        assert!(matches!(status(other).await, Err(AskError::Shape { .. })));
        assert!(matches!(status(ssh).await, Err(AskError::Http { .. })));
    }

    #[tokio::test]
    async fn given_no_such_service_when_asked_then_a_kube_relay_is_believed_and_another_program_is_not() {
        let name = ObjectName::parse("shop/web");
        let relay =
            stranger(b"HTTP/1.1 404 Not Found\r\nserver: kube-relay/0.1.0 (pid 7)\r\ncontent-length: 0\r\n\r\n").await;
        let other = stranger(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await;

        assert!(matches!(closeup(relay, &name).await, Ok(None)));
        assert!(matches!(closeup(other, &name).await, Err(AskError::Stranger { .. })));
    }

    #[tokio::test]
    async fn given_a_relay_that_refuses_when_asked_for_one_service_then_its_words_are_told_and_no_strangers() {
        let web = ObjectName::parse("shop/web");
        let relay = stranger(
            b"HTTP/1.1 404 Not Found\r\nserver: kube-relay/0.1.0 (pid 7)\r\ncontent-length: 30\r\n\r\nthere is no Service shop/web\xff\n",
        )
        .await;
        let health = stranger(
            b"HTTP/1.1 404 Not Found\r\nserver: kube-relay/0.1.0 (pid 7)\r\ncontent-length: 19\r\n\r\nthere is:\n/healthz\n",
        )
        .await;
        let other = stranger(b"HTTP/1.1 404 Not Found\r\ncontent-length: 20\r\n\r\nthere is no Service ").await;

        let error = status_of(relay, &web).await.expect_err("it has none");

        assert_eq!(error.to_string(), format!("{relay}: there is no Service shop/web\u{fffd}"));
        for stranger in [health, other] {
            assert!(matches!(status_of(stranger, &web).await, Err(AskError::Stranger { .. })));
        }
    }

    #[tokio::test]
    async fn given_a_relay_of_a_version_before_when_asked_for_one_service_then_that_one_is_taken_from_all() {
        let answer = |name: &str| {
            let body = serde_json::to_string(&LiveReport::of(&sample::status())).expect("JSON");
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            (ObjectName::parse(name), &*String::leak(head + &body))
        };
        let ((web, all), (mail, again)) = (answer("web"), answer("shop/web"));

        let told = status_of(stranger(all.as_bytes()).await, &web).await.expect("it is there");
        let error = status_of(stranger(again.as_bytes()).await, &mail).await.expect_err("it is elsewhere");

        assert_eq!(told.report.services.len(), 1);
        assert!(error.to_string().ends_with(": there is no Service shop/web, but default/web"), "{error}");
    }

    #[test]
    fn given_any_name_when_asked_for_then_the_path_has_two_parts_of_plain_letters() {
        assert_eq!(path_of(&ObjectName::new("shop", "web-1.v2")), "/status/shop/web-1.v2");
        assert_eq!(path_of(&ObjectName::new("a b", "../x?\r\n/ż")), "/status/a%20b/..%2Fx%3F%0D%0A%2F%C5%BC");
    }

    #[tokio::test]
    async fn given_a_stranger_on_a_port_when_asked_for_its_pid_then_there_is_none() {
        let web = stranger(b"HTTP/1.1 200 OK\r\nserver: nginx\r\ncontent-length: 0\r\n\r\n").await;

        assert_eq!(pid(web).await, None);
    }

    #[test]
    fn given_our_own_introduction_when_read_then_the_pid_is_ours() {
        assert_eq!(pid_in(&introduction()), Some(std::process::id()));
        for other in ["nginx/1.27", "kube-relay/0.1.0", "kube-relay/0.1.0 (pid x)", "kube-relay/0.1.0 (pid 1"] {
            assert_eq!(pid_in(other), None, "{other}");
        }
    }
}
