//! What a Service says about its UDP ports: the annotations `kube-relay.dev/udp-shards` and `kube-relay.dev/udp-timeout`.
//!
//! What they default to is `serve::udp`'s.

use std::num::NonZeroU16;
use std::time::Duration;

use crate::model::Service;
use crate::problem::Problem;
use crate::value::Time;

const SHARDS: &str = "udp-shards";
const TIMEOUT: &str = "udp-timeout";

/// The longest idle time: a flow takes a port of this host as long as it lives.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// How the UDP ports of one Service are to be served. What is `None` is as the flags say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UdpSettings {
    /// Threads that share each of its listeners (1..=1024). From `kube-relay.dev/udp-shards`. Takes effect when a
    /// listener is opened: later changes wait for that, as they would move flows.
    pub shards: Option<NonZeroU16>,
    /// Idle time of a flow that no backend has answered. From `kube-relay.dev/udp-timeout`, as are the others:
    /// `30s`, or `unreplied=30s,stream=5m` (1s to 24h).
    pub unreplied: Option<Duration>,
    /// Idle time of a flow of one exchange.
    pub answered: Option<Duration>,
    /// Idle time of a flow whose client sent again after an answer.
    pub stream: Option<Duration>,
}

impl UdpSettings {
    /// Reads a Service's annotations. One that cannot be read is a problem, and as if it were not there.
    pub(crate) fn of(service: &Service, problems: &mut Vec<Problem>) -> Self {
        let mut settings = Self::default();
        let mut complain = |key: &str, value: &str, right: &str| {
            let message = format!("annotation kube-relay.dev/{key}: {value:?} is not used: write {right}");
            problems.push(Problem::error(format_args!("Service {}", service.name), "annotation", message));
        };
        if let Some(value) = service.annotations.get(SHARDS) {
            settings.shards = value.parse().ok().filter(|shards: &NonZeroU16| shards.get() <= 1024);
            if settings.shards.is_none() {
                complain(SHARDS, value, "a number from 1 to 1024");
            }
        }
        if let Some(value) = service.annotations.get(TIMEOUT) {
            match settings.with_timeouts(value) {
                Some(with) => settings = with,
                None => complain(TIMEOUT, value, "a time from 1s to 24h, or unreplied=10s,answered=10s,stream=60s"),
            }
        }
        settings
    }

    fn with_timeouts(mut self, text: &str) -> Option<Self> {
        if !text.contains('=') {
            let time = timeout(text)?;
            return Some(Self { unreplied: Some(time), answered: Some(time), stream: Some(time), ..self });
        }
        for part in text.split(',') {
            let (state, time) = part.split_once('=')?;
            let place = match state.trim() {
                "unreplied" => &mut self.unreplied,
                "answered" => &mut self.answered,
                "stream" => &mut self.stream,
                _ => return None,
            };
            if place.replace(timeout(time)?).is_some() {
                return None;
            }
        }
        Some(self)
    }
}

fn timeout(text: &str) -> Option<Duration> {
    let Time(time) = text.trim().parse().ok()?;
    (Duration::from_secs(1)..=LONGEST).contains(&time).then_some(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(key: &str, value: &str) -> (UdpSettings, Vec<String>) {
        let mut service = Service::new("default/dns");
        service.annotations.insert(key.into(), value.into());
        let mut problems = Vec::new();
        let settings = UdpSettings::of(&service, &mut problems);
        (settings, problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn given_shards_when_read_then_a_number_in_range_counts_and_anything_else_is_told() {
        assert_eq!(read(SHARDS, "4").0.shards, NonZeroU16::new(4));
        for wrong in ["0", "-1", "1025", "many", ""] {
            let (settings, problems) = read(SHARDS, wrong);
            assert_eq!((settings, problems.len()), (UdpSettings::default(), 1), "{wrong:?}");
        }
        assert_eq!(
            read(SHARDS, "many").1,
            [
                r#"Service default/dns: annotation kube-relay.dev/udp-shards: "many" is not used: write a number from 1 to 1024"#
            ]
        );
    }

    #[test]
    fn given_timeouts_when_read_then_one_time_is_for_all_states_and_names_pick_some() {
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let times = |text| {
            let settings = read(TIMEOUT, text).0;
            (settings.unreplied, settings.answered, settings.stream)
        };

        assert_eq!(times("30s"), (seconds(30), seconds(30), seconds(30)));
        assert_eq!(times("stream=5m"), (None, None, seconds(300)));
        assert_eq!(times("unreplied=5s, answered=1m30s"), (seconds(5), seconds(90), None));
    }

    #[test]
    fn given_timeouts_that_cannot_be_read_when_read_then_none_of_them_counts() {
        for wrong in ["", "0", "500ms", "25h", "stream", "stream=", "stream=1m,stream=2m", "stream=1m,other=1s"] {
            let (settings, problems) = read(TIMEOUT, wrong);
            assert_eq!((settings, problems.len()), (UdpSettings::default(), 1), "{wrong:?}");
        }
    }
}
