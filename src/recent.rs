//! What has happened to Services lately: backends, listeners and problems that came and went, for whoever asks afterwards.
//!
//! Found by comparing two plans of a Service. Lines of the log are written by `journal`; this is kept in memory, and short.

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::describe::abridged;
use crate::name::{ListenKey, ObjectName, ServicePortName};
use crate::plan::ServicePlan;

/// How many are kept, of all Services together: some hundred bytes each.
const KEPT: usize = 512;

/// One thing that happened to a Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Happened {
    /// When it was in use: `2026-01-31T23:59:59Z`.
    pub at: String,
    /// `namespace/name`.
    pub service: String,
    /// What: `http/TCP: backends +10.244.0.4:8000`.
    pub what: String,
}

/// The last things that happened, the oldest first. Owned by `control`; snapshots share it.
#[derive(Clone, Debug, Default)]
pub struct Recent(VecDeque<Arc<Happened>>);

impl Recent {
    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Happened> {
        self.0.iter().map(AsRef::as_ref)
    }

    /// Adds what happened to a Service; the oldest make room.
    pub(crate) fn add(&mut self, at: &str, service: &ObjectName, news: Vec<String>) {
        let service = service.to_string();
        let happened = |what| Arc::new(Happened { at: at.to_owned(), service: service.clone(), what });
        self.0.extend(news.into_iter().map(happened));
        self.0.drain(..self.0.len().saturating_sub(KEPT));
    }
}

/// What is otherwise in the second of two plans of one Service; `None` where there is no such Service. Mostly nothing.
pub(crate) fn news(before: Option<&ServicePlan>, after: Option<&ServicePlan>) -> Vec<String> {
    let nothing = ServicePlan::default();
    let existence = match (before, after) {
        (None, Some(_)) => Some("added".to_owned()),
        (Some(_), None) => Some("deleted".to_owned()),
        _ => None,
    };
    let (before, after) = (before.unwrap_or(&nothing), after.unwrap_or(&nothing));
    let listeners = change(listeners(before), listeners(after)).map(|change| format!("listeners {change}"));
    let ports: BTreeSet<_> = ports(before).chain(ports(after)).collect();
    let backends = ports.into_iter().filter_map(|port| {
        let change = change(backends(before, port), backends(after, port))?;
        let colon = if port.port.is_empty() { "" } else { "/" };
        Some(format!("{}{colon}{}: backends {change}", port.port, port.protocol))
    });
    let (old, new) = (problems(before), problems(after));
    let came = new.difference(&old).map(|problem| format!("problem: {problem}"));
    let went = old.difference(&new).map(|problem| format!("no longer: {problem}"));
    existence.into_iter().chain(listeners).chain(backends).chain(came).chain(went).collect()
}

fn listeners(plan: &ServicePlan) -> BTreeSet<ListenKey> {
    plan.listeners().map(|(key, _)| *key).collect()
}

fn ports(plan: &ServicePlan) -> impl Iterator<Item = &ServicePortName> {
    plan.wanted.balancers.keys().map(|key| &key.port)
}

/// Whom new traffic may go to, on either side.
fn backends(plan: &ServicePlan, port: &ServicePortName) -> BTreeSet<SocketAddr> {
    let balancers = plan.wanted.balancers.iter().filter(|(key, _)| key.port == *port);
    balancers.flat_map(|(_, backends)| &*backends.usable.picks).map(|endpoint| endpoint.address()).collect()
}

/// Each in one line: lines to paste are for a terminal.
fn problems(plan: &ServicePlan) -> BTreeSet<&str> {
    plan.own_problems().filter_map(|problem| problem.message.lines().next()).collect()
}

/// `+10.244.0.4:8000 -10.244.0.1:8000`; `None` where both are the same.
fn change<T: Ord + ToString>(before: BTreeSet<T>, after: BTreeSet<T>) -> Option<String> {
    let listed = |sign: char, mut items: Vec<String>| {
        items.iter_mut().for_each(|item| item.insert(0, sign));
        (!items.is_empty()).then(|| abridged(&items))
    };
    let came = listed('+', after.difference(&before).map(ToString::to_string).collect());
    let went = listed('-', before.difference(&after).map(ToString::to_string).collect());
    let parts: Vec<_> = came.into_iter().chain(went).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::sample;
    use crate::model::{Endpoint, Service};
    use crate::plan::Problem;

    fn web() -> Service {
        Service::new("default/web").cluster_ip([10, 96, 0, 10]).port("http", 80)
    }

    fn planned<const N: usize>(service: &Service, hosts: [u8; N]) -> Arc<ServicePlan> {
        sample::plan(service, hosts.map(|host| Endpoint::new([10, 244, 0, host])).into())
    }

    fn told(before: Option<&Arc<ServicePlan>>, after: Option<&Arc<ServicePlan>>) -> Vec<String> {
        news(before.map(AsRef::as_ref), after.map(AsRef::as_ref))
    }

    #[test]
    fn given_two_plans_of_a_service_when_compared_then_what_came_and_went_is_told() {
        let (few, others) = (planned(&web(), [1, 2]), planned(&web(), [2, 4]));
        let wide = planned(&web().node_port(30080), [1, 2]);
        let mut troubled = (*few).clone();
        troubled.problems.push(Problem::error("Service default/web", "expose", "opens nothing\n  paste"));
        let troubled = Arc::new(troubled);

        assert_eq!(told(Some(&few), Some(&few)), [] as [&str; 0]);
        assert_eq!(told(Some(&few), Some(&others)), ["http/TCP: backends +10.244.0.4:8000, -10.244.0.1:8000"]);
        assert_eq!(told(Some(&few), Some(&wide)), ["listeners +127.0.0.1:30080/TCP"]);
        assert_eq!(told(Some(&few), Some(&troubled)), ["problem: opens nothing"]);
        assert_eq!(told(Some(&troubled), Some(&few)), ["no longer: opens nothing"]);
        assert_eq!(
            told(None, Some(&few)),
            ["added", "listeners +10.96.0.10:80/TCP", "http/TCP: backends +10.244.0.1:8000, +10.244.0.2:8000"]
        );
        assert_eq!(told(Some(&few), None)[0], "deleted");
    }

    #[test]
    fn given_more_than_is_kept_when_added_then_the_oldest_make_room() {
        let mut recent = Recent::default();
        let name = ObjectName::parse("web");

        recent.add("t", &name, (0..KEPT + 2).map(|number| number.to_string()).collect());

        let kept: Vec<_> = recent.iter().map(|happened| happened.what.as_str()).collect();
        assert_eq!((kept.len(), kept[0]), (KEPT, "2"));
        assert_eq!(recent.iter().next().map(|happened| happened.service.as_str()), Some("default/web"));
    }
}
