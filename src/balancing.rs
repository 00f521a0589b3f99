//! What a Service says about how its clients are spread: the annotations `kube-relay.dev/balance` and
//! `kube-relay.dev/affinity-ipv6-prefix`.
//!
//! How a pick follows from the first is `serve::table`, who counts as one client by the second `serve::affinity`.

use std::fmt;
use std::num::NonZeroU8;

use serde::{Deserialize, Serialize};

use crate::model::Service;
use crate::problem::Problem;

const BALANCE: &str = "balance";
const IPV6_PREFIX: &str = "affinity-ipv6-prefix";

/// How a backend is chosen for a client without a pin. From `kube-relay.dev/balance`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    /// Each in its turn, exactly: what a Service gets that does not say.
    #[default]
    RoundRobin,
    /// Any, each as likely as the others.
    Random,
    /// The one with the fewest open connections or flows, by turns among equals. A pick looks at all of them.
    LeastConnections,
    /// Two at random, and of these the one with fewer open connections or flows: nearly as even, for any number.
    P2c,
}

impl Balance {
    /// All of them, in the order in which people are told of them.
    pub const ALL: [Self; 4] = [Self::RoundRobin, Self::Random, Self::LeastConnections, Self::P2c];

    /// The word of the annotation.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RoundRobin => "round-robin",
            Self::Random => "random",
            Self::LeastConnections => "least-connections",
            Self::P2c => "p2c",
        }
    }

    /// True where a report need not mention it.
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|balance| balance.as_str() == text)
    }
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How the clients of one Service are spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Balancing {
    /// For clients without a pin.
    pub balance: Balance,
    /// Bits of an IPv6 address that tell one client from another (1..=128, default 128): 64 for clients that change
    /// their addresses. From `kube-relay.dev/affinity-ipv6-prefix`; matters with session affinity only.
    pub ipv6_prefix: NonZeroU8,
}

impl Default for Balancing {
    fn default() -> Self {
        Self { balance: Balance::default(), ipv6_prefix: WHOLE_ADDRESS }
    }
}

const WHOLE_ADDRESS: NonZeroU8 = NonZeroU8::new(128).expect("128 is not 0");

impl Balancing {
    /// Reads a Service's annotations. One that cannot be read is a problem, and as if it were not there.
    pub(crate) fn of(service: &Service, problems: &mut Vec<Problem>) -> Self {
        let mut balancing = Self::default();
        let mut complain = |key: &str, value: &str, right: &str| {
            let message = format!("annotation kube-relay.dev/{key}: {value:?} is not used: write {right}");
            problems.push(Problem::error(format_args!("Service {}", service.name), "annotation", message));
        };
        if let Some(value) = service.annotations.get(BALANCE) {
            match Balance::parse(value) {
                Some(balance) => balancing.balance = balance,
                None => complain(BALANCE, value, "round-robin, random, least-connections or p2c"),
            }
        }
        if let Some(value) = service.annotations.get(IPV6_PREFIX) {
            match value.parse().ok().filter(|bits| *bits <= WHOLE_ADDRESS) {
                Some(bits) => balancing.ipv6_prefix = bits,
                None => complain(IPV6_PREFIX, value, "a number of bits from 1 to 128"),
            }
        }
        balancing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(key: &str, value: &str) -> (Balancing, Vec<String>) {
        let mut service = Service::new("default/web");
        service.annotations.insert(key.into(), value.into());
        let mut problems = Vec::new();
        let balancing = Balancing::of(&service, &mut problems);
        (balancing, problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn given_each_word_when_read_then_it_is_that_choice() {
        for balance in Balance::ALL {
            assert_eq!(read(BALANCE, balance.as_str()), (Balancing { balance, ..Balancing::default() }, vec![]));
        }
    }

    #[test]
    fn given_a_word_that_nobody_knows_when_read_then_it_is_a_problem_and_means_the_default() {
        let said = "Service default/web: annotation kube-relay.dev/balance: \"Random\" is not used: \
                    write round-robin, random, least-connections or p2c";
        assert_eq!(read(BALANCE, "Random"), (Balancing::default(), vec![said.into()]));
        assert_eq!(read(BALANCE, "").1.len(), 1);
    }

    #[test]
    fn t147_given_a_prefix_when_read_then_1_to_128_bits_count_and_anything_else_is_told() {
        for (text, bits) in [("1", 1), ("64", 64), ("128", 128)] {
            assert_eq!((read(IPV6_PREFIX, text).0.ipv6_prefix.get(), read(IPV6_PREFIX, text).1.len()), (bits, 0));
        }
        for wrong in ["0", "129", "-1", "/64", ""] {
            let (balancing, problems) = read(IPV6_PREFIX, wrong);
            assert_eq!((balancing, problems.len()), (Balancing::default(), 1), "{wrong:?}");
        }
    }
}
