//! A line of the access log: what it says, as JSON or as logfmt.
//!
//! Pure. What is told is `serve::access`, who writes the lines is `access_log`.

use std::fmt::Display;
use std::io::Write;
use std::time::SystemTime;

use crate::name::Protocol;
use crate::serve::access::AccessRecord;
use crate::timestamp::rfc3339_millis;

/// The form of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum AccessFormat {
    /// An object for each line
    #[default]
    Json,
    /// Words like `client=192.0.2.1:5000`, in quotes where they need them
    Logfmt,
}

/// Appends a record's line, with its end. `at` is when it ended.
///
/// The fields are named as labels of metrics and fields of logs are. One without a value (the backend of a connection
/// that reached none) is left out.
pub(crate) fn encode(record: &AccessRecord, at: SystemTime, format: AccessFormat, lines: &mut Vec<u8>) {
    let (name, protocol) = (&record.port.name, record.listen.protocol);
    let mut line = Line::begin(format, lines);
    line.text("time", &rfc3339_millis(at));
    line.text("protocol", protocol.as_str());
    line.text("client", &record.client.to_string());
    if let Some(peer) = record.peer {
        line.text("peer", &peer.to_string());
    }
    line.text("listen", &record.listen.address().to_string());
    line.text("entry", record.kind.as_label());
    line.text("namespace", &name.service.namespace);
    line.text("service", &name.service.name);
    line.text("port", &name.port);
    if let Some(backend) = record.backend {
        line.text("backend", &backend.to_string());
    }
    line.number("upstream_bytes", record.upstream.bytes);
    line.number("downstream_bytes", record.downstream.bytes);
    if protocol == Protocol::Udp {
        line.number("upstream_datagrams", record.upstream.datagrams);
        line.number("downstream_datagrams", record.downstream.datagrams);
    }
    let duration_us = record.duration.as_micros();
    line.number("duration_ms", format_args!("{}.{:03}", duration_us / 1_000, duration_us % 1_000));
    line.number("tries", record.tries);
    line.text("reason", record.reason);
    line.end();
}

/// A line under way.
struct Line<'a> {
    format: AccessFormat,
    bytes: &'a mut Vec<u8>,
    /// What comes before the next field.
    before: &'static str,
}

impl<'a> Line<'a> {
    fn begin(format: AccessFormat, bytes: &'a mut Vec<u8>) -> Self {
        let before = match format {
            AccessFormat::Json => "{",
            AccessFormat::Logfmt => "",
        };
        Self { format, bytes, before }
    }

    /// Adds a value that may hold any character.
    fn text(&mut self, name: &str, value: &str) {
        self.name(name);
        match self.format {
            AccessFormat::Logfmt if is_bare(value) => self.put(value),
            _ => self.quote(value),
        }
    }

    /// Adds a value that is a number in both forms.
    fn number(&mut self, name: &str, value: impl Display) {
        self.name(name);
        self.put(value);
    }

    fn end(self) {
        let end: &[u8] = match self.format {
            AccessFormat::Json => b"}\n",
            AccessFormat::Logfmt => b"\n",
        };
        self.bytes.extend_from_slice(end);
    }

    fn name(&mut self, name: &str) {
        self.put(self.before);
        match self.format {
            AccessFormat::Json => {
                self.put(format_args!("\"{name}\":"));
                self.before = ",";
            }
            AccessFormat::Logfmt => {
                self.put(format_args!("{name}="));
                self.before = " ";
            }
        }
    }

    /// A string as JSON has it; readers of logfmt take the same.
    fn quote(&mut self, value: &str) {
        self.put('"');
        for character in value.chars() {
            match character {
                '"' | '\\' => self.put(format_args!("\\{character}")),
                // Line ends among them: no value begins a line, and none moves a terminal's cursor.
                _ if character.is_control() => self.put(format_args!("\\u{:04x}", u32::from(character))),
                _ => self.put(character),
            }
        }
        self.put('"');
    }

    fn put(&mut self, value: impl Display) {
        let _ = write!(self.bytes, "{value}"); // Writing to a vector cannot fail.
    }
}

/// True for what a reader of logfmt takes for one word, all of it.
fn is_bare(value: &str) -> bool {
    let is_plain = |character: char| {
        !character.is_whitespace() && !character.is_control() && !matches!(character, '=' | '"' | '\u{fffd}')
    };
    !value.is_empty() && value.chars().all(is_plain)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;
    use std::time::{Duration, Instant, UNIX_EPOCH};

    use super::*;
    use crate::name::{ListenKey, ObjectName, ServicePortName};
    use crate::plan::ListenerKind;
    use crate::serve::balancer::PortState;
    use crate::serve::mmsg::Tally;

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    fn record(protocol: Protocol) -> AccessRecord {
        let name = ServicePortName::new(ObjectName::new("default", "web"), "http", protocol);
        AccessRecord {
            at: Instant::now(),
            client: address("192.0.2.1:5000"),
            peer: None,
            listen: ListenKey::at(address("10.96.0.10:80"), protocol),
            kind: ListenerKind::LoadBalancerIp,
            port: Arc::new(PortState::new(name)),
            backend: Some(address("10.0.0.1:8080")),
            upstream: Tally { datagrams: 2, bytes: 120 },
            downstream: Tally { datagrams: 3, bytes: 4_500 },
            duration: Duration::from_micros(12_005),
            tries: 2,
            reason: "finished",
        }
    }

    fn line(record: &AccessRecord, format: AccessFormat) -> String {
        let mut bytes = Vec::new();
        encode(record, UNIX_EPOCH + Duration::from_millis(1_735_689_599_007), format, &mut bytes);
        String::from_utf8(bytes).expect("text")
    }

    #[test]
    fn given_a_connection_when_encoded_as_json_then_each_field_is_there() {
        assert_eq!(
            line(&record(Protocol::Tcp), AccessFormat::Json),
            "{\"time\":\"2024-12-31T23:59:59.007Z\",\"protocol\":\"TCP\",\"client\":\"192.0.2.1:5000\",\
             \"listen\":\"10.96.0.10:80\",\"entry\":\"lb_vip\",\"namespace\":\"default\",\"service\":\"web\",\
             \"port\":\"http\",\"backend\":\"10.0.0.1:8080\",\"upstream_bytes\":120,\"downstream_bytes\":4500,\
             \"duration_ms\":12.005,\"tries\":2,\"reason\":\"finished\"}\n"
        );
    }

    #[test]
    fn given_a_flow_when_encoded_as_logfmt_then_datagrams_are_there_and_nothing_needs_quotes() {
        assert_eq!(
            line(&record(Protocol::Udp), AccessFormat::Logfmt),
            "time=2024-12-31T23:59:59.007Z protocol=UDP client=192.0.2.1:5000 listen=10.96.0.10:80 entry=lb_vip \
             namespace=default service=web port=http backend=10.0.0.1:8080 upstream_bytes=120 downstream_bytes=4500 \
             upstream_datagrams=2 downstream_datagrams=3 duration_ms=12.005 tries=2 reason=finished\n"
        );
    }

    #[test]
    fn given_a_client_without_a_backend_when_encoded_then_there_is_no_such_field() {
        let refused = AccessRecord { backend: None, reason: "ejected_all", ..record(Protocol::Tcp) };

        for format in [AccessFormat::Json, AccessFormat::Logfmt] {
            let line = line(&refused, format);
            assert!(!line.contains("backend") && line.contains("ejected_all"), "{line}");
        }
    }

    #[test]
    fn given_a_client_that_a_balancer_has_named_when_encoded_then_both_are_there() {
        let named = AccessRecord { peer: Some(address("10.0.0.9:6000")), ..record(Protocol::Tcp) };

        let (json, logfmt) = (line(&named, AccessFormat::Json), line(&named, AccessFormat::Logfmt));

        assert!(json.contains("\"client\":\"192.0.2.1:5000\",\"peer\":\"10.0.0.9:6000\",\"listen\""), "{json}");
        assert!(logfmt.contains(" client=192.0.2.1:5000 peer=10.0.0.9:6000 listen="), "{logfmt}");
    }

    #[test]
    fn given_ipv6_addresses_when_encoded_then_they_are_in_brackets_and_one_word() {
        let client = address("[fe80::1%3]:5000");
        let v6 = AccessRecord { client, backend: Some(address("[fd00::7]:8080")), ..record(Protocol::Tcp) };

        let (json, logfmt) = (line(&v6, AccessFormat::Json), line(&v6, AccessFormat::Logfmt));

        assert!(json.contains("\"client\":\"[fe80::1%3]:5000\"") && json.contains("\"[fd00::7]:8080\""), "{json}");
        assert!(
            logfmt.contains(" client=[fe80::1%3]:5000 ") && logfmt.contains(" backend=[fd00::7]:8080 "),
            "{logfmt}"
        );
    }

    #[test]
    fn given_any_text_when_encoded_as_json_then_a_reader_gets_it_back_and_the_line_is_one() {
        let plain = ["", "http", "a b", "a=b", "größe 💡"];
        let odd = ["say \"no\"", "C:\\x", "two\nlines\t\u{1b}[2J", "\u{7f}\u{85}", "\u{2028}"];
        for text in plain.into_iter().chain(odd) {
            let name = ServicePortName::new(ObjectName::new("default", "web"), text, Protocol::Tcp);
            let odd = AccessRecord { port: Arc::new(PortState::new(name)), ..record(Protocol::Tcp) };

            let line = line(&odd, AccessFormat::Json);

            let read: serde_json::Value = serde_json::from_str(&line).expect("JSON");
            assert_eq!(read["port"], text);
            assert_eq!(line.matches('\n').count(), 1, "{line:?}");
        }
    }

    #[test]
    fn given_text_when_encoded_as_logfmt_then_quotes_are_where_a_reader_needs_them() {
        let cases = [
            ("http", "port=http "),
            ("größe", "port=größe "),
            ("a\\b", "port=a\\b "),
            ("", "port=\"\" "),
            ("a b", "port=\"a b\" "),
            ("a=b", "port=\"a=b\" "),
            ("a\"b", "port=\"a\\\"b\" "),
            ("a\\ b", "port=\"a\\\\ b\" "),
            ("a\nb", "port=\"a\\u000ab\" "),
            ("a\u{fffd}", "port=\"a\u{fffd}\" "),
        ];

        for (text, encoded) in cases {
            let name = ServicePortName::new(ObjectName::new("default", "web"), text, Protocol::Tcp);
            let odd = AccessRecord { port: Arc::new(PortState::new(name)), ..record(Protocol::Tcp) };
            let line = line(&odd, AccessFormat::Logfmt);
            assert!(line.contains(encoded), "{encoded} not in {line}");
        }
    }
}
