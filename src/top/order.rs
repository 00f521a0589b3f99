//! Which Services are shown, and in which order.

use std::cmp::Ordering;

use clap::ValueEnum;

use super::board::{Rates, ServiceLine};

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
            Self::Active => other.counts.open.cmp(&one.counts.open),
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
    let text = format!("{} {} {}", reading.name, reading.kind, reading.state.as_str()).to_lowercase();
    let listens_at = |word: &str| reading.listeners.iter().any(|listener| listener.to_lowercase().contains(word));
    words.iter().all(|word| text.contains(word.as_str()) || listens_at(word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::reading::{Counts, ServiceReading, State};

    fn service(name: &str, begun: f64, open: u64, state: State) -> ServiceLine {
        ServiceLine {
            reading: ServiceReading {
                name: name.into(),
                kind: "ClusterIP".into(),
                state,
                listeners: vec![format!("10.96.0.{open}:80/TCP clusterIP serving")],
                ..ServiceReading::default()
            },
            counts: Counts { open, ..Counts::default() },
            rates: Some(Rates { begun, ..Rates::default() }),
            ..ServiceLine::default()
        }
    }

    fn services() -> Vec<ServiceLine> {
        vec![
            service("default/a", 1.0, 3, State::Serving),
            service("default/b", 9.0, 1, State::Failed),
            service("shop/c", 1.0, 2, State::Refusing),
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
