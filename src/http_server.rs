//! How our own servers speak HTTP/1: bounded in connections, time and header size, whoever asks and whatever for.
//!
//! What they answer is made in `admin` and `healthcheck`; asking is `peer`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::answer_body::AnswerBody;

/// Connections of one server. One more, and the oldest makes room: somebody who only holds connections open cannot keep
/// a scrape out.
pub(crate) const CONNECTION_LIMIT: usize = 64;
/// Time from the start of a connection, or from the answer before, to the end of a request's headers.
pub(crate) const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long somebody who has asked may take nothing of the answer, while it waits.
pub(crate) const READER_TIMEOUT: Duration = Duration::from_secs(30);
/// Size of a request's headers. No smaller than what hyper reads at once.
pub(crate) const HEADER_LIMIT_BYTES: usize = 8 << 10;
/// Pause after a failed accept: most causes (no descriptor left) do not end at once.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What is said to one request.
pub(crate) type Answer = Response<AnswerBody>;

/// Connections of one server, oldest first. Dropping it ends them.
pub(crate) struct Connections {
    limit: usize,
    tasks: JoinSet<()>,
    oldest_first: VecDeque<AbortHandle>,
}

impl Connections {
    /// None yet, and so many at most; at least one.
    pub(crate) fn at_most(limit: usize) -> Self {
        Self { limit, tasks: JoinSet::new(), oldest_first: VecDeque::new() }
    }

    /// One more. At the limit, the oldest ends.
    pub(crate) fn add(&mut self, connection: impl Future<Output = ()> + Send + 'static) {
        while self.tasks.try_join_next().is_some() {}
        self.oldest_first.retain(|task| !task.is_finished());
        if self.oldest_first.len() >= self.limit
            && let Some(oldest) = self.oldest_first.pop_front()
        {
            oldest.abort();
        }
        self.oldest_first.push_back(self.tasks.spawn(connection));
    }

    /// Waits for the end of all.
    async fn ended(mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Answers on a listener until it is closing: then nobody is accepted any more, and it ends when those who were have had their
/// answers.
pub(crate) async fn serve<F>(
    listener: TcpListener,
    header_timeout: Duration,
    closing: CancellationToken,
    answer: impl Fn(Request<Incoming>) -> F + Clone + Send + 'static,
) where
    F: Future<Output = Answer> + Send + 'static,
{
    let mut connections = Connections::at_most(CONNECTION_LIMIT);
    loop {
        let accepted = tokio::select! {
            biased;
            () = closing.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                watch_reader(&stream, READER_TIMEOUT);
                connections.add(converse(stream, header_timeout, closing.clone(), answer.clone()));
            }
            Err(error) => {
                debug!(%error, "an own server cannot accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    connections.ended().await;
}

/// Ends a connection whose other side takes nothing for so long. The kernel sees to that: nobody asks for the body of an
/// answer while its reader is stuck.
fn watch_reader(stream: &TcpStream, patience: Duration) {
    let patience_ms = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
    if let Err(error) = sockopt::set_tcp_user_timeout(stream, patience_ms) {
        debug!(%error, "a reader that is stuck will be waited for");
    }
}

/// Answers on one connection until the other side has no more to ask; one question and no more once it is closing, as that
/// may be on its way.
pub(crate) async fn converse<F>(
    stream: TcpStream,
    header_timeout: Duration,
    closing: CancellationToken,
    answer: impl Fn(Request<Incoming>) -> F,
) where
    F: Future<Output = Answer>,
{
    let (was_asked, is_closing) = (Arc::<AtomicBool>::default(), closing.clone());
    let asked = Arc::clone(&was_asked);
    let service = service_fn(move |request| {
        asked.store(true, Ordering::Relaxed); // Read by the same task.
        let (answering, is_closing) = (answer(request), is_closing.clone());
        async move {
            let mut answer = answering.await;
            if is_closing.is_cancelled() {
                answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(answer)
        }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(header_timeout)
            .max_header_size(HEADER_LIMIT_BYTES)
            .max_buf_size(HEADER_LIMIT_BYTES)
            .serve_connection(TokioIo::new(stream), service)
    );
    let ended = tokio::select! {
        biased;
        ended = connection.as_mut() => ended,
        () = closing.cancelled() => {
            if was_asked.load(Ordering::Relaxed) {
                connection.as_mut().graceful_shutdown(); // It would not wait for the first question.
            }
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "a connection to an own server ended early");
    }
}

/// An answer of one type.
pub(crate) fn response(code: StatusCode, content_type: &'static str, body: impl Into<AnswerBody>) -> Answer {
    let mut response = Response::new(body.into());
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::serve::scripted::soon;

    #[tokio::test]
    async fn f25_given_clients_at_a_server_that_closes_when_they_ask_then_they_are_answered_and_nobody_else_is() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let (at, closing) = (listener.local_addr().expect("bound"), CancellationToken::new());
        let answer = |_| async { response(StatusCode::OK, "text/plain", "well") };
        let server = tokio::spawn(serve(listener, HEADER_TIMEOUT, closing.clone(), answer));
        let mut silent = TcpStream::connect(at).await.expect("it listens");
        let mut idle = TcpStream::connect(at).await.expect("it listens");
        assert!(ask(&mut idle).await.contains("well")); // Whoever has come before this one is let in by now.

        closing.cancel();

        assert!(ask(&mut silent).await.contains("well"), "it was let in before");
        assert_eq!(soon(idle.read(&mut [0])).await.expect("no reset"), 0, "it has had its answer");
        soon(server).await.expect("no panic");
        TcpStream::connect(at).await.expect_err("nobody listens");
    }

    /// Asks once, and reads up to the end of the body.
    async fn ask(stream: &mut TcpStream) -> String {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await.expect("a connection");
        let mut answer = String::new();
        while !answer.ends_with("well") {
            let mut bytes = [0; 256];
            let count = soon(stream.read(&mut bytes)).await.expect("no reset");
            assert!(count > 0, "it ends with {answer:?}");
            answer.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
        answer
    }

    #[tokio::test]
    async fn given_a_reader_that_takes_nothing_when_its_time_is_over_then_the_connection_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let _stuck = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("it listens");
        let (stream, _) = listener.accept().await.expect("a client");
        watch_reader(&stream, Duration::from_millis(500));

        let error = soon(async {
            loop {
                match stream.try_write(&[0; 64 << 10]) {
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => stream.writable().await.expect("a socket"),
                    Err(error) => return error,
                }
            }
        });

        assert_eq!(error.await.kind(), ErrorKind::TimedOut);
    }
}
