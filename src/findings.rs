//! What is found wrong in an object while its fields are asked for, and the asking.
//!
//! Each question names the field, says what a right value is, and goes on after a wrong one, so that a
//! person sees everything at once. Which fields there are is `decode_service` and `decode_endpoints`.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::sync::Arc;

use ipnet::IpNet;

use crate::locate::{At, Path, Wanted, locate};
use crate::plan::{Problem, Severity};
use crate::printable::Printable;
use crate::texts::Texts;
use crate::yaml::{Document, Fields, List, Object, Scalar};

/// Findings of one file that are told one by one; more are only counted.
pub(crate) const MAX_FINDINGS: usize = 1000;

/// Whole numbers that a float can hold exactly.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// One thing that is wrong with a field.
#[derive(Debug)]
pub(crate) struct Finding {
    /// Which object.
    pub(crate) object: Arc<str>,
    /// Where in the document.
    pub(crate) path: Path,
    /// True where the name is wrong, not the value.
    pub(crate) at_name: bool,
    /// One word of the event vocabulary.
    pub(crate) reason: &'static str,
    /// Field, value and what would be right.
    pub(crate) message: String,
    /// How bad it is.
    pub(crate) severity: Severity,
}

/// The findings of one document, and the object that is being read.
#[derive(Debug)]
pub(crate) struct Findings {
    object: Arc<str>,
    errors: usize,
    /// Findings that may still be told.
    room: usize,
    /// What was found, in the order of the fields.
    pub(crate) list: Vec<Finding>,
    /// Findings that no room was left for.
    pub(crate) untold: usize,
    /// The texts that were asked for. Taken from document to document.
    pub(crate) texts: Texts,
}

impl Findings {
    /// Begins with nothing found and `room` for more.
    pub(crate) fn new(room: usize) -> Self {
        Self { object: "".into(), errors: 0, room, list: Vec::new(), untold: 0, texts: Texts::default() }
    }

    /// What is found from now on belongs to this object.
    pub(crate) fn of(&mut self, object: impl Into<Arc<str>>) {
        self.object = object.into();
    }

    /// Errors so far: an object whose reading adds one is not used.
    pub(crate) fn errors(&self) -> usize {
        self.errors
    }

    /// The object, or this part of it, cannot be used.
    pub(crate) fn error(&mut self, at: At<'_>, text: impl AsRef<str>) {
        self.errors += 1;
        self.push(at, false, "decode", Severity::Error, text.as_ref());
    }

    /// Probably a mistake; the object is used.
    pub(crate) fn warn(&mut self, at: At<'_>, reason: &'static str, text: impl AsRef<str>) {
        self.push(at, false, reason, Severity::Warning, text.as_ref());
    }

    /// Worth knowing; nothing is wrong.
    pub(crate) fn note(&mut self, at: At<'_>, reason: &'static str, text: impl AsRef<str>) {
        self.push(at, false, reason, Severity::Note, text.as_ref());
    }

    /// Nobody reads a field of this name.
    pub(crate) fn unknown(&mut self, at: At<'_>, key: &str, known: &[&str]) {
        let text = match closest(key, known.iter().copied()) {
            Some(near) => format!("unknown field, did you mean {near}?"),
            None => "unknown field, it is ignored".to_owned(),
        };
        self.push(at.key(key), true, "unknown_field", Severity::Warning, &text);
    }

    fn push(&mut self, at: At<'_>, at_name: bool, reason: &'static str, severity: Severity, text: &str) {
        if self.list.len() >= self.room {
            self.untold += 1;
            return;
        }
        let field = at.field().to_string();
        let message = if field.is_empty() { text.to_owned() } else { format!("{}: {text}", Printable(&field)) };
        let object = self.object.clone();
        self.list.push(Finding { object, path: at.path(), at_name, reason, message, severity });
    }

    /// The fields of a mapping; unknown ones are told. `None` where it is absent or something else.
    pub(crate) fn object<'v, T: Fields>(&mut self, at: At<'_>, value: &'v Object<T>) -> Option<&'v T> {
        match value {
            Object::Absent => None,
            Object::Fields(fields, unknown) => {
                if !unknown.is_empty() {
                    let known: Vec<&str> = T::READ.iter().chain(T::UNUSED).copied().collect();
                    unknown.iter().for_each(|key| self.unknown(at, key, &known));
                }
                Some(fields)
            }
            Object::Wrong(value) => {
                self.error(at, format!("{value} where a mapping is wanted (`key: value` lines)"));
                None
            }
        }
    }

    /// The entries of a list; none where it is absent, null or something else.
    pub(crate) fn list<'v, T>(&mut self, at: At<'_>, value: &'v List<T>) -> &'v [T] {
        match value {
            List::Empty => &[],
            List::Items(items) => items,
            List::Wrong(value) => {
                self.error(at, format!("{value} where a list is wanted (lines that begin with `- `)"));
                &[]
            }
        }
    }

    /// Text. `None` where it is absent, null or something else.
    pub(crate) fn text(&mut self, at: At<'_>, value: &Scalar) -> Option<Arc<str>> {
        match value {
            Scalar::Absent | Scalar::Null => None,
            // A copy: shared, each name that is kept would keep the page of the whole document's memory that it is in.
            Scalar::Text(text) => Some(self.texts.share(text)),
            Scalar::Flag(_) => {
                let words = "y, yes and on are true, n, no and off are false";
                self.error(at, format!("{value} where text is wanted; put it in quotes ({words})"));
                None
            }
            Scalar::Whole(_) | Scalar::Float(_) => {
                self.error(at, format!("{value} where text is wanted; put it in quotes"));
                None
            }
            Scalar::List | Scalar::Map => {
                self.error(at, format!("{value} where text is wanted"));
                None
            }
        }
    }

    /// True or false. `None` where it is absent, null or something else.
    pub(crate) fn flag(&mut self, at: At<'_>, value: &Scalar) -> Option<bool> {
        match value {
            Scalar::Absent | Scalar::Null => None,
            Scalar::Flag(flag) => Some(*flag),
            other => {
                self.error(at, format!("{other} where true or false is wanted"));
                None
            }
        }
    }

    /// A whole number of a range, also where it is written as `8080.` or `8080.0`, as kubectl takes it.
    pub(crate) fn number(&mut self, at: At<'_>, value: &Scalar, range: RangeInclusive<i64>) -> Option<i64> {
        let (least, most) = (range.start(), range.end());
        let number = match value {
            Scalar::Absent | Scalar::Null => return None,
            Scalar::Whole(number) => *number,
            Scalar::Float(number) if number.fract() == 0.0 && number.abs() <= EXACT => *number as i64,
            Scalar::Text(text) if text.parse::<i64>().is_ok() => {
                self.error(at, format!("{value} is text; write {text} without quotes"));
                return None;
            }
            other => {
                self.error(at, format!("{other} where a whole number from {least} to {most} is wanted"));
                return None;
            }
        };
        if !range.contains(&number) {
            self.error(at, format!("{number} is out of range; write a whole number from {least} to {most}"));
            return None;
        }
        Some(number)
    }

    /// A port. `None` where it is absent, null or wrong.
    pub(crate) fn port(&mut self, at: At<'_>, value: &Scalar) -> Option<u16> {
        self.number(at, value, 1..=65_535).and_then(|number| u16::try_from(number).ok())
    }

    /// A port where 0 stands for none.
    pub(crate) fn port_or_none(&mut self, at: At<'_>, value: &Scalar) -> Option<u16> {
        let number = self.number(at, value, 0..=65_535)?;
        u16::try_from(number).ok().filter(|port| *port != 0)
    }

    /// One of the words that a field knows. `None` where it is absent, null, empty or another.
    pub(crate) fn word<T: Copy>(&mut self, at: At<'_>, value: &Scalar, words: &[(&str, T)]) -> Option<T> {
        let text = self.text(at, value).filter(|text| !text.is_empty())?;
        if let Some((_, meaning)) = words.iter().find(|(word, _)| *word == &*text) {
            return Some(*meaning);
        }
        let known = words.iter().map(|(word, _)| *word);
        let near = closest(&text, known.clone()).map_or(String::new(), |near| format!(", did you mean {near}?"));
        let known: Vec<&str> = known.collect();
        let end = if near.is_empty() { format!("; known are {}", known.join(", ")) } else { near };
        self.error(at, format!("{value} is not known{end}"));
        None
    }
}

/// Reads an address as Kubernetes reads it: zeros in front are decimal, never octal (CVE-2021-29923),
/// and an IPv4 address in IPv6 clothes is an IPv4 address.
pub(crate) fn parse_ip(text: &str) -> Option<IpAddr> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Some(ip.to_canonical());
    }
    let mut octets = [0_u8; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next()?;
        if part.is_empty() || !part.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        *octet = part.parse().ok()?;
    }
    parts.next().is_none().then(|| Ipv4Addr::from(octets).into())
}

/// Reads `address/bits`, blanks around it allowed, bits behind the prefix cleared.
pub(crate) fn parse_cidr(text: &str) -> Option<IpNet> {
    let (ip, bits) = text.trim().split_once('/')?;
    IpNet::new(parse_ip(ip)?, bits.parse().ok()?).ok().map(|net| net.trunc())
}

/// What was found in a document of a file, with the places, from the top down.
pub(crate) fn located(findings: Vec<Finding>, document: Document<'_>, file: &str) -> Vec<Problem> {
    if findings.is_empty() {
        return Vec::new();
    }
    let wanted: Vec<_> = findings.iter().map(|finding| Wanted { path: &finding.path, name: finding.at_name }).collect();
    let places = locate(document.text, &wanted);
    let located = findings.into_iter().zip(places).map(|(finding, place)| Problem {
        object: finding.object.to_string(),
        file: Some(file.to_owned()),
        line: Some(document.line + place.map_or(0, |place| place.line - 1)),
        column: place.map(|place| place.column),
        reason: finding.reason.into(),
        message: finding.message,
        severity: finding.severity,
    });
    let mut problems: Vec<Problem> = located.collect();
    // Fields were asked for in our order; a person mends from the top down.
    problems.sort_by_key(|problem| (problem.line, problem.column));
    problems
}

/// The known word that somebody probably meant.
pub(crate) fn closest<'k>(word: &str, known: impl Iterator<Item = &'k str>) -> Option<&'k str> {
    let word: Vec<char> = word.chars().take(64).flat_map(char::to_lowercase).collect();
    let limit = (word.len() / 3).clamp(1, 3);
    known
        .map(|candidate| (distance(&word, &candidate.to_lowercase().chars().collect::<Vec<_>>()), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Letters to add, drop, change or swap with their neighbour to make one word the other.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut before = vec![0; b.len() + 1];
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut next = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let mut least = (last[j] + usize::from(x != y)).min(last[j + 1] + 1).min(next[j] + 1);
            if i > 0 && j > 0 && *x == b[j - 1] && a[i - 1] == *y {
                least = least.min(before[j - 1] + 1);
            }
            next.push(least);
        }
        before = std::mem::replace(&mut last, next);
    }
    last[b.len()]
}

/// False where Kubernetes refuses the text as a name.
///
/// `most` is 63 for a Service, a namespace or a port; other objects may have 253 and dots between parts.
pub(crate) fn is_name(text: &str, most: usize) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part.len() <= most
            && !part.starts_with('-')
            && !part.ends_with('-')
            && part.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
    };
    text.len() <= most && if most > 63 { text.split('.').all(part) } else { part(text) }
}

/// The rule of [`is_name`] in words.
pub(crate) fn name_rule(most: usize) -> Cow<'static, str> {
    let dots = if most > 63 { ", dots between parts" } else { "" };
    format!("lower-case letters, digits and dashes between them{dots}, at most {most}").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(ask: impl FnOnce(&mut Findings)) -> String {
        let mut found = Findings::new(10);
        ask(&mut found);
        assert_eq!(found.list.len(), 1);
        found.list.pop().map(|finding| finding.message).expect("one finding")
    }

    #[test]
    fn t050_given_addresses_in_odd_clothes_when_read_then_they_are_canonical() {
        let ip = |text: &str| parse_ip(text).map(|ip| ip.to_string());

        assert_eq!(ip("10.0.0.011").as_deref(), Some("10.0.0.11"));
        assert_eq!(ip("010.000.0.1").as_deref(), Some("10.0.0.1"));
        assert_eq!(ip("::ffff:10.0.0.1").as_deref(), Some("10.0.0.1"));
        assert_eq!(ip("fd00::0:1").as_deref(), Some("fd00::1"));
        for wrong in ["", "10.0.0", "10.0.0.256", "10.0.0.1.2", "10.0.0.+1", "0x0a.0.0.1", "node", "fe80::1%eth0"] {
            assert_eq!(ip(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn t024_given_a_range_with_blanks_when_read_then_it_is_trimmed() {
        assert_eq!(parse_cidr(" 203.0.113.9/25 ").map(|net| net.to_string()).as_deref(), Some("203.0.113.0/25"));
        assert_eq!(parse_cidr("203.0.113.0/33"), None);
        assert_eq!(parse_cidr("203.0.113.0"), None);
    }

    #[test]
    fn given_a_wrong_word_when_compared_then_the_meant_one_is_found() {
        let known = ["nodePort", "port", "targetPort", "name", "protocol", "appProtocol"];
        let near = |word: &str| closest(word, known.into_iter());

        assert_eq!(near("nodeport"), Some("nodePort"));
        assert_eq!(near("tragetPort"), Some("targetPort"));
        assert_eq!(near("protocl"), Some("protocol"));
        assert_eq!(near("Port"), Some("port"));
        assert_eq!(near("weight"), None);
        assert_eq!(near(""), None);
    }

    #[test]
    fn given_numbers_in_many_forms_when_asked_then_whole_ones_are_taken() {
        let mut found = Findings::new(10);

        assert_eq!(found.port(At::Root, &Scalar::Whole(80)), Some(80));
        assert_eq!(found.port(At::Root, &Scalar::Float(8080.0)), Some(8080));
        assert_eq!(found.port(At::Root, &Scalar::Null), None);
        assert_eq!(found.port_or_none(At::Root, &Scalar::Whole(0)), None);
        assert!(found.list.is_empty());
    }

    #[test]
    fn given_a_wrong_number_when_asked_then_the_message_says_what_is_right() {
        let port = At::Root.key("port");

        assert_eq!(
            only(|found| _ = found.port(port, &Scalar::Whole(70_000))),
            "port: 70000 is out of range; write a whole number from 1 to 65535"
        );
        assert_eq!(
            only(|found| _ = found.port(port, &Scalar::Text("80".into()))),
            "port: \"80\" is text; write 80 without quotes"
        );
        assert_eq!(
            only(|found| _ = found.port(port, &Scalar::Float(80.5))),
            "port: 80.5 where a whole number from 1 to 65535 is wanted"
        );
    }

    #[test]
    fn given_a_wrong_word_when_asked_then_the_message_names_the_known_ones() {
        let words = [("TCP", 1), ("UDP", 2), ("SCTP", 3)];
        let at = At::Root.key("protocol");

        assert_eq!(
            only(|found| _ = found.word(at, &Scalar::Text("udp".into()), &words)),
            "protocol: \"udp\" is not known, did you mean UDP?"
        );
        assert_eq!(
            only(|found| _ = found.word(at, &Scalar::Text("HTTP".into()), &words)),
            "protocol: \"HTTP\" is not known; known are TCP, UDP, SCTP"
        );
    }

    #[test]
    fn given_more_findings_than_room_when_pushed_then_they_are_counted() {
        let mut found = Findings::new(2);
        for _ in 0..5 {
            found.error(At::Root, "wrong");
        }

        assert_eq!((found.list.len(), found.untold, found.errors()), (2, 3, 5));
    }

    #[test]
    fn given_names_when_checked_then_the_rule_of_kubernetes_holds() {
        assert!(is_name("web-1", 63) && is_name("1web", 63) && is_name("web.abc-1", 253));
        for wrong in ["", "Web", "web_1", "-web", "web-", "web.a", "wéb", "a b"] {
            assert!(!is_name(wrong, 63), "{wrong}");
        }
        assert!(!is_name(&"a".repeat(64), 63) && !is_name("web..a", 253));
    }
}
