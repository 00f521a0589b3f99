//! A body of an answer of the API server: heard as it comes, and broken off where it is longer than any good one.
//!
//! What is kept of what was heard is in `wire`.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use hyper::body::{Body, Bytes, Frame, SizeHint};
use tower::BoxError;

use crate::wire::Wire;

/// What a body may be at most, in bytes: who reads it keeps a whole piece in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    /// Each of its lines.
    Line(usize),
    /// All of it.
    Whole(usize),
}

/// A body went beyond its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TooLong {
    /// In one line.
    #[error("an event of more than {0} bytes")]
    Line(usize),
    /// As a whole.
    #[error("an answer of more than {0} bytes")]
    Whole(usize),
}

/// What has come of the piece that is limited.
#[derive(Debug)]
struct Measure {
    limit: Limit,
    bytes: usize,
}

impl Measure {
    fn take(&mut self, data: &[u8]) -> Result<(), TooLong> {
        match self.limit {
            Limit::Whole(limit) => {
                self.bytes += data.len();
                if self.bytes > limit { Err(TooLong::Whole(limit)) } else { Ok(()) }
            }
            Limit::Line(limit) => {
                let mut pieces = data.split(|byte| *byte == b'\n');
                self.bytes += pieces.next().map_or(0, <[u8]>::len);
                let mut longest = self.bytes;
                for piece in pieces {
                    self.bytes = piece.len();
                    longest = longest.max(self.bytes);
                }
                if longest > limit { Err(TooLong::Line(limit)) } else { Ok(()) }
            }
        }
    }
}

/// A body whose frames are heard and measured.
#[derive(Debug)]
pub(crate) struct Heard<B> {
    body: B,
    /// Who hears; nobody, where the answer is no good one.
    wire: Option<Arc<Wire>>,
    measure: Measure,
}

impl<B> Heard<B> {
    /// Nothing of it has come.
    pub(crate) fn new(body: B, wire: Option<Arc<Wire>>, limit: Limit) -> Self {
        Self { body, wire, measure: Measure { limit, bytes: 0 } }
    }
}

impl<B> Body for Heard<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = match ready!(Pin::new(&mut self.body).poll_frame(context)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
            None => return Poll::Ready(None),
        };
        if let Some(wire) = &self.wire {
            wire.hear(&frame);
        }
        let measured = frame.data_ref().map_or(Ok(()), |data| self.measure.take(data));
        Poll::Ready(Some(measured.map(|()| frame).map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(limit: Limit, frames: &[&str]) -> Result<(), TooLong> {
        let mut measure = Measure { limit, bytes: 0 };
        frames.iter().try_for_each(|frame| measure.take(frame.as_bytes()))
    }

    #[test]
    fn f4_given_lines_in_any_frames_when_measured_then_only_a_long_line_is_too_long() {
        let four = Limit::Line(4);

        for fine in [&["1234\n1234\n1234"][..], &["12", "34", "\n12", "34\n", "\n\n"], &["", "1234\n", "1234"]] {
            assert_eq!(measured(four, fine), Ok(()), "{fine:?}");
        }
        for long in [&["12345"][..], &["12", "345\n"], &["1\n12345\n1"], &["1\n123", "45"]] {
            assert_eq!(measured(four, long), Err(TooLong::Line(4)), "{long:?}");
        }
    }

    #[test]
    fn f4_given_an_answer_when_measured_then_its_lines_do_not_count() {
        assert_eq!(measured(Limit::Whole(4), &["12", "\n3"]), Ok(()));
        assert_eq!(measured(Limit::Whole(4), &["12", "\n3", "4"]), Err(TooLong::Whole(4)));
    }

    #[tokio::test]
    async fn f4_given_a_body_that_is_too_long_when_it_is_read_then_it_breaks_off() {
        use http_body_util::{BodyExt, Full};
        let body = |limit| Heard::new(Full::new(Bytes::from_static(b"12345")), None, limit);

        let whole = body(Limit::Whole(5)).collect().await.expect("short enough").to_bytes();
        assert_eq!(&whole[..], b"12345");
        let error = body(Limit::Whole(4)).collect().await.expect_err("too long");
        assert_eq!(error.downcast_ref(), Some(&TooLong::Whole(4)));
    }
}
