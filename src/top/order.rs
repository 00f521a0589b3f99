//! Which Services are shown, and in which order.

use std::cmp::Ordering;
use std::net::IpAddr;

use clap::ValueEnum;

use super::board::{Rates, ServiceLine};
use super::reading::{ServiceReading, word};

/// What Services are sorted by; numbers from the highest down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// New connections and flows a second.
    #[default]
    New,
    /// Bytes a second, both ways.
    Bytes,
    /// Connections and flows that are open.
    Active,
    /// Failures a second: tries that failed, clients turned away.
    Failed,
    /// The worst first.
    State,
    /// Namespace and name.
    Name,
}

impl Sort {
    const ALL: [Self; 6] = [Self::New, Self::Bytes, Self::Active, Self::Failed, Self::State, Self::Name];

    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Bytes => "bytes",
            Self::Active => "active",
            Self::Failed => "failed",
            Self::State => "state",
            Self::Name => "name",
        }
    }

    /// The one after it, around.
    pub fn next(self) -> Self {
        self.turn(1)
    }

    /// The one before it, around.
    pub fn previous(self) -> Self {
        self.turn(Self::ALL.len() - 1)
    }

    fn turn(self, steps: usize) -> Self {
        let place = Self::ALL.iter().position(|one| *one == self).unwrap_or_default();
        Self::ALL[(place + steps) % Self::ALL.len()]
    }

    fn compare(self, one: &ServiceLine, other: &ServiceLine) -> Ordering {
        let by_rate = |rate: fn(&Rates) -> f64| {
            let of = |service: &ServiceLine| service.rates.as_ref().map_or(0.0, rate);
            of(other).total_cmp(&of(one))
        };
        match self {
            Self::New => by_rate(|rates| rates.begun),
            Self::Bytes => by_rate(Rates::bytes),
            Self::Active => other.reading.counts.open.cmp(&one.reading.counts.open),
            Self::Failed => by_rate(|rates| rates.failed),
            Self::State => one.reading.state.cmp(&other.reading.state),
            Self::Name => Ordering::Equal,
        }
    }
}

/// The places of the Services that have all words of a filter, in their order; those that are alike by their names.
pub fn arranged(services: &[ServiceLine], sort: Sort, reversed: bool, filter: &str) -> Vec<usize> {
    let words: Vec<String> = filter.split_whitespace().map(str::to_lowercase).collect();
    let mut places: Vec<usize> = (0..services.len()).filter(|place| has_all(&services[*place], &words)).collect();
    places.sort_by(|one, other| {
        let (one, other) = (&services[*one], &services[*other]);
        let order = sort.compare(one, other).then_with(|| one.reading.name.cmp(&other.reading.name));
        if reversed { order.reverse() } else { order }
    });
    places
}

fn has_all(service: &ServiceLine, words: &[String]) -> bool {
    if words.is_empty() {
        return true;
    }
    let reading = &service.reading;
    let text = format!("{} {} {}", reading.name, reading.kind, word(reading.state)).to_lowercase();
    words.iter().all(|word| text.contains(word.as_str()) || listens_at(service, word))
}

/// Each port is served at each address: `10.96.0.10:80/TCP`, `[fd00::1]:80/TCP`; and `30080/TCP` at those of the node.
fn listens_at(service: &ServiceLine, word: &str) -> bool {
    let ServiceReading { addresses, ports, .. } = &service.reading;
    let places = addresses.iter().flat_map(|address| ports.iter().map(move |port| place(*address, port)));
    places.chain(ports.iter().cloned()).any(|place| place.to_lowercase().contains(word))
}

/// `port` is `80/TCP`, or `80:30080/TCP` with its node port.
fn place(address: IpAddr, port: &str) -> String {
    let number = port.split([':', '/']).next().unwrap_or_default();
    let protocol = port.rsplit('/').next().unwrap_or_default();
    match address {
        IpAddr::V4(v4) => format!("{v4}:{number}/{protocol}"),
        IpAddr::V6(v6) => format!("[{v6}]:{number}/{protocol}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::summary::ServiceState;
    use crate::top::reading::Counts;

    fn service(name: &str, begun: f64, open: u64, state: ServiceState) -> ServiceLine {
        ServiceLine {
            reading: ServiceReading {
                name: name.into(),
                kind: "ClusterIP".into(),
                state,
                addresses: vec![[10, 96, 0, open as u8].into()],
                ports: vec!["80:30080/TCP".into()],
                counts: Counts { open, ..Counts::default() },
                ..ServiceReading::default()
            },
            rates: Some(Rates { begun, ..Rates::default() }),
            ..ServiceLine::default()
        }
    }

    fn services() -> Vec<ServiceLine> {
        vec![
            service("default/a", 1.0, 3, ServiceState::Serving),
            service("default/b", 9.0, 1, ServiceState::Failed),
            service("shop/c", 1.0, 2, ServiceState::Refusing),
        ]
    }

    #[test]
    fn given_each_order_when_arranged_then_numbers_go_down_and_names_decide_between_equals() {
        let services = services();

        assert_eq!(arranged(&services, Sort::New, false, ""), [1, 0, 2]);
        assert_eq!(arranged(&services, Sort::Active, false, ""), [0, 2, 1]);
        assert_eq!(arranged(&services, Sort::State, false, ""), [1, 2, 0]);
        assert_eq!(arranged(&services, Sort::Name, true, ""), [2, 1, 0]);
    }

    #[test]
    fn given_words_when_filtered_then_a_service_has_them_all_somewhere() {
        let services = services();

        assert_eq!(arranged(&services, Sort::Name, false, "DEFAULT"), [0, 1]);
        assert_eq!(arranged(&services, Sort::Name, false, "default failed"), [1]);
        assert_eq!(arranged(&services, Sort::Name, false, "10.96.0.2:80"), [2]);
        assert_eq!(arranged(&services, Sort::Name, false, "10.96.0.2:80/tcp"), [2]);
        assert_eq!(arranged(&services, Sort::Name, false, ":30080"), [0, 1, 2]);
        assert_eq!(arranged(&services, Sort::Name, false, "nobody"), [] as [usize; 0]);
    }

    #[test]
    fn given_orders_when_turned_through_then_each_comes_once_and_back_again() {
        let turned = |sort: &mut Sort| {
            let before = *sort;
            *sort = before.next();
            before
        };
        let mut sort = Sort::default();
        let all: Vec<_> = Sort::ALL.iter().map(|_| turned(&mut sort)).collect();

        assert_eq!((all.as_slice(), sort), (&Sort::ALL[..], Sort::default()));
        assert_eq!(Sort::default().next().previous(), Sort::default());
    }
}
