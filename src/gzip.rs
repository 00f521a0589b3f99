//! Answers of our own servers, compressed for those who ask for it: a page of metrics says the same names over and over.

use std::io::{self, Cursor, Read, Write};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use hyper::StatusCode;
use hyper::body::Bytes;
use hyper::header::{ACCEPT_ENCODING, CONTENT_ENCODING, HeaderMap, HeaderValue, VARY};

use crate::answer_body::AnswerBody;
use crate::http_server::{Answer, response};

/// A text up to here waits as it is; what of a longer one is unpacked at once, for a reader who wants it so.
const PIECE_BYTES: usize = 256 << 10;

/// Whether a request lets the answer be gzip (RFC 9110, 12.5.3).
pub(crate) fn is_accepted(request: &HeaderMap) -> bool {
    let lists = request.get_all(ACCEPT_ENCODING).iter().filter_map(|list| list.to_str().ok());
    let mut choices = lists
        .flat_map(|list| list.split(','))
        .map(|choice| choice.trim().split_once(';').unwrap_or((choice.trim(), "")));
    let mut any = false;
    let named = choices.find(|(coding, weight)| {
        any |= coding.trim() == "*" && !is_refused(weight);
        coding.trim().eq_ignore_ascii_case("gzip") || coding.trim().eq_ignore_ascii_case("x-gzip")
    });
    named.map_or(any, |(_, weight)| !is_refused(weight))
}

/// `q=0`, `q = 0.000`: by no means.
fn is_refused(weight: &str) -> bool {
    let Some((name, weight)) = weight.split_once('=') else { return false };
    name.trim().eq_ignore_ascii_case("q") && weight.trim().parse::<f32>() == Ok(0.0)
}

/// A text that waits for its readers: a long one compressed, so that one who takes his time holds a tenth of it. Cheap to
/// clone.
#[derive(Clone, Debug)]
pub(crate) enum Parcel {
    /// As it is.
    Open(Bytes),
    /// Compressed.
    Zipped {
        /// As it is sent to whoever accepts that.
        bytes: Bytes,
        /// How long the text is.
        text_bytes: usize,
    },
}

impl Parcel {
    /// Takes a while for megabytes.
    pub(crate) fn of(text: String) -> Self {
        match text.len() {
            0..=PIECE_BYTES => Self::Open(text.into()),
            text_bytes => Self::Zipped { bytes: zipped(text.as_bytes()), text_bytes },
        }
    }

    /// An answer with this text: gzip for a request that accepts that, and as it is for others, unpacked piece by piece.
    /// Takes some milliseconds.
    pub(crate) fn answer(self, content_type: &'static str, accepted: bool) -> Answer {
        let body: AnswerBody = match (self, accepted) {
            (Self::Open(text), false) => text.into(),
            (Self::Open(text), true) => zipped(&text).into(),
            (Self::Zipped { bytes, .. }, true) => bytes.into(),
            (Self::Zipped { bytes, text_bytes }, false) => {
                AnswerBody::in_pieces(unpacked(bytes, text_bytes)).of_length(text_bytes as u64)
            }
        };
        let mut answer = response(StatusCode::OK, content_type, body);
        let headers = answer.headers_mut();
        headers.insert(VARY, HeaderValue::from_static("accept-encoding"));
        if accepted {
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        answer
    }
}

/// The fastest way leaves less than a tenth of a page of metrics, and a better one not much less for several times the work.
fn zipped(text: &[u8]) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::with_capacity(text.len() / 8), Compression::fast());
    let written = encoder.write_all(text).and_then(|()| encoder.finish());
    written.expect("memory takes what is written").into()
}

fn unpacked(bytes: Bytes, text_bytes: usize) -> impl Iterator<Item = Bytes> {
    let (mut text, mut left) = (GzDecoder::new(Cursor::new(bytes)), text_bytes);
    std::iter::from_fn(move || {
        let mut piece = Vec::with_capacity(left.min(PIECE_BYTES));
        let read: io::Result<usize> = text.by_ref().take(PIECE_BYTES as u64).read_to_end(&mut piece);
        left -= read.expect("it is what we have compressed").min(left);
        (!piece.is_empty()).then(|| piece.into())
    })
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use hyper::body::Body;

    use super::*;

    fn accepts(lists: &[&'static str]) -> bool {
        let mut headers = HeaderMap::new();
        for list in lists {
            headers.append(ACCEPT_ENCODING, HeaderValue::from_static(list));
        }
        is_accepted(&headers)
    }

    #[test]
    fn given_requests_when_judged_then_gzip_is_sent_to_those_alone_that_accept_it() {
        for yes in [
            &["gzip"][..],
            &["deflate, GZIP;q=0.5"],
            &["br", "gzip"],
            &["*"],
            &["identity, * ;q=0.1"],
            &["x-gzip"],
            &["gzip ; Q = 0.001"],
            &["*;q=0, gzip"],
        ] {
            assert!(accepts(yes), "{yes:?}");
        }
        for no in [
            &[] as &[&str],
            &[""],
            &["identity"],
            &["gzip;q=0"],
            &["gzip; q=0.000, *"],
            &["*;q=0"],
            &["br"],
            &["gzipped"],
            &["gzip; q = 0"],
        ] {
            assert!(!accepts(no), "{no:?}");
        }
    }

    #[tokio::test]
    async fn given_a_text_when_sent_either_way_then_it_comes_whole_and_a_long_one_waits_much_shorter() {
        for lines in [0, 1, 20_000] {
            let text = "kuberelay_connections_total{namespace=\"default\",service=\"web\"} 1\n".repeat(lines);
            let parcel = Parcel::of(text.clone());
            if let Parcel::Zipped { bytes, .. } = &parcel {
                assert!(bytes.len() * 10 < text.len(), "{} of {}", bytes.len(), text.len());
            }
            assert_eq!(matches!(parcel, Parcel::Zipped { .. }), text.len() > PIECE_BYTES);

            let [packed, plain] = [true, false].map(|accepted| parcel.clone().answer("text/plain", accepted));

            let packed = packed.into_body().collect().await.expect("all of it").to_bytes();
            let mut unpacked = String::new();
            GzDecoder::new(&*packed).read_to_string(&mut unpacked).expect("gzip");
            assert!(unpacked == text);
            assert_eq!(plain.body().size_hint().exact(), Some(text.len() as u64));
            let plain = plain.into_body().collect().await.expect("all of it").to_bytes();
            assert!(plain == text);
        }
    }
}
