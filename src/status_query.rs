//! What may be asked of `/status` beside its path: `?service=default/web`.
//!
//! Written by who asks (`peer`), read by who answers (`admin`). What is answered is made in `report_pieces` and `summary`.

use std::net::IpAddr;

use crate::name::ObjectName;

/// The most letters of a namespace, or of a name: no object of Kubernetes has more.
const NAME_BYTES: usize = 253;

/// What is wanted of `/status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StatusQuery {
    /// A line for each Service.
    Summary,
    /// All that is known.
    Report(Excerpt),
}

/// How much of a report is wanted; nothing set: all of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Excerpt {
    /// This Service alone, and what is said about it.
    pub(crate) service: Option<ObjectName>,
    /// With where session affinity keeps this client.
    pub(crate) client: Option<IpAddr>,
}

/// A query that is none of ours. Its text is for whoever wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}; there is /status?summary, and /status?service=NAMESPACE/NAME&client=IP or either of the two")]
pub(crate) struct BadQuery {
    what: &'static str,
}

impl StatusQuery {
    /// What follows the `?`, if anything does.
    pub(crate) fn read(query: Option<&str>) -> Result<Self, BadQuery> {
        let bad = |what| BadQuery { what };
        let query = query.unwrap_or_default();
        let mut excerpt = Excerpt::default();
        let parts: Vec<_> = query.split('&').filter(|part| !part.is_empty()).collect();
        for part in &parts {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let value = &*read_spelled(value).ok_or(bad("what is behind a % is no letter"))?;
            match key {
                "summary" if parts.len() == 1 => return Ok(Self::Summary),
                "service" if excerpt.service.is_some() => return Err(bad("service is asked for twice")),
                "service" => {
                    let name = read_name(value).ok_or(bad("service is not NAMESPACE/NAME"))?;
                    excerpt.service = Some(name);
                }
                "client" if excerpt.client.is_some() => return Err(bad("client is asked for twice")),
                "client" => {
                    let client: IpAddr = value.parse().map_err(|_| bad("client is not an IP address"))?;
                    excerpt.client = Some(client.to_canonical());
                }
                _ => return Err(bad("that cannot be asked for")),
            }
        }
        Ok(Self::Report(excerpt))
    }
}

impl Excerpt {
    /// Path and query that ask for it.
    pub(crate) fn path(&self) -> String {
        let service =
            self.service.as_ref().map(|name| format!("service={}/{}", spelled(&name.namespace), spelled(&name.name)));
        let client = self.client.map(|client| format!("client={client}"));
        let parts: Vec<_> = service.into_iter().chain(client).collect();
        if parts.is_empty() { "/status".to_owned() } else { format!("/status?{}", parts.join("&")) }
    }
}

/// Names are letters, digits, dashes and dots. What else one may have is spelled out, so that it stays one name.
pub(crate) fn spelled(name: &str) -> String {
    let letter = |byte: u8| match byte {
        b'-' | b'.' => char::from(byte).to_string(),
        _ if byte.is_ascii_alphanumeric() => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    name.bytes().map(letter).collect()
}

/// Reads what others spell out: letters of ASCII, as nothing that can be asked for has others.
fn read_spelled(text: &str) -> Option<String> {
    let mut pieces = text.split('%');
    let mut read = pieces.next()?.to_owned();
    for piece in pieces {
        let (digits, rest) = piece.split_at_checked(2)?;
        let is_hex = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        let letter = u8::from_str_radix(digits, 16).ok().filter(|letter| is_hex && letter.is_ascii())?;
        read.push(char::from(letter));
        read.push_str(rest);
    }
    Some(read)
}

/// Both halves are written out: a namespace that is left out is left to nobody's guess.
fn read_name(value: &str) -> Option<ObjectName> {
    let (namespace, name) = value.split_once('/')?;
    let is_name = |half: &str| {
        let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.');
        (1..=NAME_BYTES).contains(&half.len()) && half.bytes().all(is_letter)
    };
    (is_name(namespace) && is_name(name)).then(|| ObjectName::new(namespace, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(name: &str) -> Excerpt {
        Excerpt { service: Some(ObjectName::parse(name)), client: None }
    }

    #[test]
    fn given_what_is_wanted_when_written_and_read_then_it_is_the_same() {
        let client = Some(IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 1]));
        let of_client = [Excerpt { client, ..Excerpt::default() }, Excerpt { client, ..only("web") }];
        for excerpt in [Excerpt::default(), only("shop/web-1.v2")].into_iter().chain(of_client) {
            let path = excerpt.path();
            let query = path.strip_prefix("/status").expect("it asks for the status").strip_prefix('?');

            assert_eq!(StatusQuery::read(query), Ok(StatusQuery::Report(excerpt)), "{path}");
        }
    }

    #[test]
    fn given_the_queries_of_people_when_read_then_they_are_understood() {
        for all in [None, Some(""), Some("&")] {
            assert_eq!(StatusQuery::read(all), Ok(StatusQuery::Report(Excerpt::default())), "{all:?}");
        }
        for summary in ["summary", "summary=1"] {
            assert_eq!(StatusQuery::read(Some(summary)), Ok(StatusQuery::Summary));
        }
        for web in ["service=default/web", "service=default%2Fweb", "service=default%2fweb&"] {
            assert_eq!(StatusQuery::read(Some(web)), Ok(StatusQuery::Report(only("web"))), "{web}");
        }
        for client in ["client=fd00::1", "client=fd00%3A%3A1", "client=%66d00%3a%3a1"] {
            let fd00 = Excerpt { client: "fd00::1".parse().ok(), service: None };
            assert_eq!(StatusQuery::read(Some(client)), Ok(StatusQuery::Report(fd00)), "{client}");
        }
    }

    #[test]
    fn given_a_query_of_nobody_when_read_then_it_is_told_what_there_is() {
        let long = format!("service=default/{}", "a".repeat(NAME_BYTES + 1));
        let bad = [
            "colour=red",
            "Service=default/web",
            "service",
            "service=",
            "service=web",
            "service=/web",
            "service=default/",
            "service=a/b/c",
            "service=a/b%00",
            "service=a/b%",
            "service=a/b%+1",
            "service=a/b%C5%BC",
            "service=a/b%cż",
            "service=a/%20",
            "service=a/ż",
            "service=a/b&service=a/b",
            "service=a/b&summary",
            "summary=1&service=a/b",
            "summaryfoo",
            "client=",
            "client=192.0.2.7:80",
            "client=fe80::1%eth0",
            "client=web",
            "client=192.0.2.7&client=192.0.2.7",
            &long,
        ];

        for query in bad {
            let error = StatusQuery::read(Some(query)).expect_err(query).to_string();
            assert!(
                error.ends_with(
                    "; there is /status?summary, and /status?service=NAMESPACE/NAME&client=IP or either of the two"
                ),
                "{query}: {error}"
            );
        }
    }

    #[test]
    fn given_any_name_when_spelled_then_it_is_of_plain_letters() {
        assert_eq!(spelled("web-1.v2"), "web-1.v2");
        assert_eq!(spelled("../x?\r\n/ż"), "..%2Fx%3F%0D%0A%2F%C5%BC");
    }
}
