//! What a Service says about its TCP connections: how its backends are reached, how many connections there may be, and how
//! long one may last. The annotations have the names of the flags that say it for all Services.
//!
//! What they default to is told in `config`; who acts on them are `serve::connect`, `serve::limits` and `serve::ports`.

use std::num::{NonZeroU8, NonZeroU32};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use crate::model::Service;
use crate::problem::Problem;
use crate::value::{OrNone, Time};

/// Times of a first try to connect. Less would give up on backends that are there, more makes clients wait.
pub(crate) const CONNECT_TIMEOUTS: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(60);
/// Tries to connect: with the most, and the longest time, a client waits for four hours.
pub(crate) const CONNECT_TRIES: RangeInclusive<u8> = 1..=8;
/// Times of what may last.
pub(crate) const LASTING: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(365 * 24 * 3600);

/// How the TCP ports of one Service are to be served. What is `None` is as the flags say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpSettings {
    /// Time that a backend gets to answer a connect; each further silent one gets twice as long (10ms to 1m). From
    /// `kube-relay.dev/connect-timeout`.
    pub connect_timeout: Option<Duration>,
    /// Silent tries to connect before the client is given up (1..=8). From `kube-relay.dev/connect-tries`.
    pub connect_tries: Option<NonZeroU8>,
    /// Failures to connect in a row after which a backend gets nothing for a time; or never. From
    /// `kube-relay.dev/eject-after`.
    pub eject_after: Option<OrNone<NonZeroU8>>,
    /// How long one side may keep silent after the other has closed its half (1s to a year). From
    /// `kube-relay.dev/half-close-timeout`.
    pub half_close_timeout: Option<Duration>,
    /// How long both sides may keep silent (1s to a year); or for ever. From `kube-relay.dev/idle-timeout`.
    pub idle_timeout: Option<OrNone<Duration>>,
    /// How old a connection may get, a tenth more or less (1s to a year); or as old as it likes. From
    /// `kube-relay.dev/max-connection-age`.
    pub max_connection_age: Option<OrNone<Duration>>,
    /// How many connections each of its ports may have (1 or more); others wait. From `kube-relay.dev/max-connections`;
    /// `None`: as many as come.
    pub max_connections: Option<NonZeroU32>,
    /// How long after its endpoint has left a connection is reset (0s to a year). From `kube-relay.dev/reset-after`;
    /// `None`: never.
    pub reset_after: Option<Duration>,
}

impl TcpSettings {
    /// Reads a Service's annotations. One that cannot be read is a problem, and as if it were not there.
    pub(crate) fn of(service: &Service, problems: &mut Vec<Problem>) -> Self {
        let mut reader = Reader { service, problems };
        let tries = |text: &str| text.parse().ok().filter(|tries: &NonZeroU8| CONNECT_TRIES.contains(&tries.get()));
        let lasting = |text: &str| time(text, &LASTING);
        let lasting_or_none = |text: &str| match text.trim() {
            "none" => Some(OrNone(None)),
            text => lasting(text).map(|time| OrNone(Some(time))),
        };
        let leaving = |text: &str| match text.trim() {
            "none" => Some(None),
            text => time(text, &(Duration::ZERO..=*LASTING.end())).map(Some),
        };
        Self {
            connect_timeout: reader
                .read("connect-timeout", "a time from 10ms to 1m", |text| time(text, &CONNECT_TIMEOUTS)),
            connect_tries: reader.read("connect-tries", "a number from 1 to 8", tries),
            eject_after: reader.read("eject-after", "a number from 1 to 255, or none", number_or_none),
            half_close_timeout: reader.read("half-close-timeout", "a time from 1s on", lasting),
            idle_timeout: reader.read("idle-timeout", "a time from 1s on, or none", lasting_or_none),
            max_connection_age: reader.read("max-connection-age", "a time from 1s on, or none", lasting_or_none),
            max_connections: reader.read("max-connections", "a number from 1 on", |text| text.trim().parse().ok()),
            reset_after: reader.read("reset-after", "a time like 0s or 30s, or none", leaving).flatten(),
        }
    }
}

struct Reader<'a> {
    service: &'a Service,
    problems: &'a mut Vec<Problem>,
}

impl Reader<'_> {
    /// The value of an annotation, `None` where there is none or it is not `right`.
    fn read<T>(&mut self, key: &str, right: &str, parse: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let text = self.service.annotations.get(key)?;
        let value = parse(text);
        if value.is_none() {
            let message = format!("annotation kube-relay.dev/{key}: {text:?} is not used: write {right}");
            self.problems.push(Problem::error(format_args!("Service {}", self.service.name), "annotation", message));
        }
        value
    }
}

fn time(text: &str, range: &RangeInclusive<Duration>) -> Option<Duration> {
    let Time(time) = text.trim().parse().ok()?;
    range.contains(&time).then_some(time)
}

fn number_or_none(text: &str) -> Option<OrNone<NonZeroU8>> {
    match text.trim() {
        "" => None, // An annotation without a value is a mistake, not a word for "none".
        text => OrNone::from_str(text).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(key: &str, value: &str) -> (TcpSettings, Vec<String>) {
        let mut service = Service::new("default/db");
        service.annotations.insert(key.into(), value.into());
        let mut problems = Vec::new();
        let settings = TcpSettings::of(&service, &mut problems);
        (settings, problems.iter().map(ToString::to_string).collect())
    }

    fn fine(key: &str, value: &str) -> TcpSettings {
        let (settings, problems) = read(key, value);
        assert_eq!(problems, [] as [String; 0]);
        settings
    }

    #[test]
    fn given_settings_when_read_then_each_is_taken() {
        let seconds = |seconds| Some(Duration::from_secs(seconds));

        assert_eq!(fine("connect-timeout", "2s").connect_timeout, seconds(2));
        assert_eq!(fine("connect-tries", "2").connect_tries, NonZeroU8::new(2));
        assert_eq!(fine("eject-after", "3").eject_after, Some(OrNone(NonZeroU8::new(3))));
        assert_eq!(fine("half-close-timeout", "1m").half_close_timeout, seconds(60));
        assert_eq!(fine("idle-timeout", "10m").idle_timeout, Some(OrNone(seconds(600))));
        assert_eq!(fine("max-connection-age", "1h").max_connection_age, Some(OrNone(seconds(3600))));
        assert_eq!(fine("max-connections", "1000").max_connections, NonZeroU32::new(1_000));
        assert_eq!(fine("balance", "random"), TcpSettings::default());
    }

    #[test]
    fn given_none_when_read_then_it_is_off_whatever_the_flags_say() {
        assert_eq!(fine("eject-after", "none").eject_after, Some(OrNone(None)));
        assert_eq!(fine("idle-timeout", "none").idle_timeout, Some(OrNone(None)));
        assert_eq!(fine("max-connection-age", "none").max_connection_age, Some(OrNone(None)));
        assert_eq!(fine("reset-after", "none").reset_after, None);
    }

    #[test]
    fn t171_given_a_time_of_reset_when_read_then_none_at_all_is_at_once() {
        assert_eq!(fine("reset-after", "0s").reset_after, Some(Duration::ZERO));
        assert_eq!(fine("reset-after", "30s").reset_after, Some(Duration::from_secs(30)));
    }

    #[test]
    fn given_settings_that_cannot_be_read_when_read_then_they_are_told_and_as_if_they_were_not_there() {
        for (key, value) in [
            ("connect-timeout", "0"),
            ("connect-timeout", "2m"),
            ("connect-timeout", "5"),
            ("connect-tries", "0"),
            ("connect-tries", "9"),
            ("connect-tries", "many"),
            ("eject-after", "0"),
            ("eject-after", ""),
            ("eject-after", "never"),
            ("half-close-timeout", "none"),
            ("half-close-timeout", "500ms"),
            ("idle-timeout", ""),
            ("idle-timeout", "0s"),
            ("max-connection-age", "9000h"),
            ("max-connections", "0"),
            ("max-connections", "none"),
            ("max-connections", "5000000000"),
            ("reset-after", "soon"),
            ("reset-after", ""),
        ] {
            let (settings, problems) = read(key, value);
            assert_eq!((settings, problems.len()), (TcpSettings::default(), 1), "{key}: {value:?}");
        }
        assert_eq!(
            read("connect-tries", "many").1,
            [
                r#"Service default/db: annotation kube-relay.dev/connect-tries: "many" is not used: write a number from 1 to 8"#
            ]
        );
    }
}
