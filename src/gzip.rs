//! Answers of our own servers, compressed for those who ask for it: a page of metrics says the same names over and over.

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use hyper::StatusCode;
use hyper::header::{ACCEPT_ENCODING, CONTENT_ENCODING, HeaderMap, HeaderValue, VARY};

use crate::http_server::{Answer, response};

/// Whether a request lets the answer be gzip (RFC 9110, 12.5.3).
pub(crate) fn is_accepted(request: &HeaderMap) -> bool {
    let lists = request.get_all(ACCEPT_ENCODING).iter().filter_map(|list| list.to_str().ok());
    let mut choices = lists
        .flat_map(|list| list.split(','))
        .map(|choice| choice.trim().split_once(';').unwrap_or((choice.trim(), "")));
    let mut any = false;
    let named = choices.find(|(coding, weight)| {
        any |= *coding == "*" && !is_refused(weight);
        coding.trim().eq_ignore_ascii_case("gzip") || coding.trim().eq_ignore_ascii_case("x-gzip")
    });
    named.map_or(any, |(_, weight)| !is_refused(weight))
}

/// `q=0`, `q=0.000`: by no means.
fn is_refused(weight: &str) -> bool {
    let weight = weight.trim().to_ascii_lowercase();
    weight.strip_prefix("q=").and_then(|weight| weight.trim().parse::<f32>().ok()) == Some(0.0)
}

/// An answer with this text, compressed where the request accepts that. Takes a while for megabytes.
pub(crate) fn answer(text: String, content_type: &'static str, accepted: bool) -> Answer {
    let mut answer = match accepted {
        true => response(StatusCode::OK, content_type, compressed(&text)),
        false => response(StatusCode::OK, content_type, text),
    };
    let headers = answer.headers_mut();
    headers.insert(VARY, HeaderValue::from_static("accept-encoding"));
    if accepted {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    answer
}

/// The fastest way: it takes a tenth of the text away, and a better one not much more for several times the work.
fn compressed(text: &str) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::with_capacity(text.len() / 8), Compression::fast());
    let written = encoder.write_all(text.as_bytes()).and_then(|()| encoder.finish());
    written.expect("memory takes what is written")
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use flate2::read::GzDecoder;

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
        for yes in
            [&["gzip"][..], &["deflate, GZIP;q=0.5"], &["br", "gzip"], &["*"], &["identity, *;q=0.1"], &["x-gzip"]]
        {
            assert!(accepts(yes), "{yes:?}");
        }
        for no in
            [&[] as &[&str], &["identity"], &["gzip;q=0"], &["gzip; q=0.000, *"], &["*;q=0"], &["br"], &["gzipped"]]
        {
            assert!(!accepts(no), "{no:?}");
        }
    }

    #[test]
    fn given_a_text_when_compressed_then_it_comes_back_whole_and_was_much_shorter() {
        let text = "kuberelay_connections_total{namespace=\"default\",service=\"web\"} 1\n".repeat(1_000);

        let short = compressed(&text);

        let mut back = String::new();
        GzDecoder::new(short.as_slice()).read_to_string(&mut back).expect("gzip");
        assert!(back == text && short.len() * 10 < text.len(), "{} of {}", short.len(), text.len());
    }
}
