//! The body of an answer: whole, or in pieces that are made as fast as somebody reads them.
//!
//! How HTTP is spoken is `http_server`; which answers come in pieces is `admin`'s to say.

use std::fmt;
use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http_body_util::Full;
use hyper::body::{Body, Bytes, Frame, SizeHint};
use tokio::task::{JoinError, JoinHandle, spawn_blocking};

/// What an answer says. Dropped with the connection, and then nothing more of it is made.
#[derive(Debug)]
pub(crate) enum AnswerBody {
    /// All of it.
    Whole(Full<Bytes>),
    /// One piece at a time, the next one when the last one is on its way.
    Pieces(Pieces),
}

impl AnswerBody {
    /// Makes each piece on a thread of its own, as it may take milliseconds that a worker owes to its connections. Between
    /// two pieces no thread waits: a reader that has stopped costs the memory of one piece and what they are made of.
    pub(crate) fn in_pieces(pieces: impl Iterator<Item = Bytes> + Send + 'static) -> Self {
        Self::Pieces(Pieces { making: Making::Idle(Box::new(pieces)), left: None })
    }

    /// The same, of so many bytes together: whoever reads is told beforehand.
    pub(crate) fn of_length(mut self, bytes: u64) -> Self {
        if let Self::Pieces(pieces) = &mut self {
            pieces.left = Some(bytes);
        }
        self
    }
}

impl<T: Into<Bytes>> From<T> for AnswerBody {
    fn from(whole: T) -> Self {
        Self::Whole(Full::new(whole.into()))
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    /// A piece panicked: whoever reads sees that the answer broke off.
    type Error = JoinError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, JoinError>>> {
        match self.get_mut() {
            Self::Whole(whole) => Pin::new(whole).poll_frame(cx).map_err(|never| match never {}),
            Self::Pieces(pieces) => pieces.poll_next(cx).map_ok(Frame::data),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(whole) => whole.is_end_stream(),
            Self::Pieces(Pieces { making, .. }) => matches!(making, Making::Over),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(whole) => whole.size_hint(),
            Self::Pieces(Pieces { left, .. }) => left.map_or_else(SizeHint::default, SizeHint::with_exact),
        }
    }
}

/// The pieces of an answer that are still to come.
pub(crate) struct Pieces {
    making: Making,
    /// How many bytes are to come; `None` where nobody knows.
    left: Option<u64>,
}

type Source = Box<dyn Iterator<Item = Bytes> + Send>;

enum Making {
    /// Nobody has asked for the next one yet.
    Idle(Source),
    /// It is being made.
    Busy(JoinHandle<(Option<Bytes>, Source)>),
    /// There is none any more.
    Over,
}

impl Pieces {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, JoinError>>> {
        if let Making::Idle(_) = self.making
            && let Making::Idle(mut source) = mem::replace(&mut self.making, Making::Over)
        {
            self.making = Making::Busy(spawn_blocking(move || (source.next(), source)));
        }
        let Making::Busy(next) = &mut self.making else { return Poll::Ready(None) };
        let (piece, rest) = match ready!(Pin::new(next).poll(cx)) {
            Ok((Some(piece), source)) => {
                self.left = self.left.map(|left| left.saturating_sub(piece.len() as u64));
                (Some(Ok(piece)), Making::Idle(source))
            }
            Ok((None, _)) => (None, Making::Over),
            Err(panicked) => (Some(Err(panicked)), Making::Over),
        };
        self.making = rest;
        Poll::Ready(piece)
    }
}

impl fmt::Debug for Pieces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.making {
            Making::Idle(_) => "Pieces(idle)",
            Making::Busy(_) => "Pieces(busy)",
            Making::Over => "Pieces(over)",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::iter;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn given_pieces_when_read_then_they_come_in_order_and_one_ahead_of_the_reader_at_most() {
        let made = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&made);
        let numbers = iter::repeat_with(move || counted.fetch_add(1, Ordering::Relaxed)).take(3);
        let mut body = AnswerBody::in_pieces(numbers.map(|number| Bytes::from(number.to_string())));
        assert!(!body.is_end_stream());

        let first = body.frame().await.expect("a piece").expect("no panic").into_data().expect("bytes");

        assert_eq!((first, made.load(Ordering::Relaxed)), ("0".into(), 1));
        assert_eq!(body.collect().await.expect("no panic").to_bytes(), "12");
        assert_eq!(made.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn given_a_piece_that_panics_when_read_then_the_answer_breaks_off() {
        let mut body = AnswerBody::in_pieces(iter::once_with(|| panic!("on purpose")));

        assert!(body.frame().await.expect("a piece").is_err());
        assert!(body.is_end_stream());
    }
}
