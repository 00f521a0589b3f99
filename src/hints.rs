//! Topology hints for Services that ask for near endpoints where no controller writes them.
//!
//! In a cluster the slice controller turns `spec.trafficDistribution` into hints, and a proxy reads those
//! alone. Files have no controller: here is what it would write. How hints are followed is `endpoints`.

use std::collections::HashMap;
use std::sync::Arc;

use crate::model::{Endpoint, Service, Slice};
use crate::name::ObjectName;

/// What a Service may ask for with `spec.trafficDistribution`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Preference {
    /// Endpoints of the client's zone.
    SameZone,
    /// Endpoints of the client's node, then of its zone.
    SameNode,
}

impl Preference {
    /// The words of the field; `PreferClose` is the old name of `PreferSameZone`.
    pub(crate) const WORDS: [(&str, Self); 3] =
        [("PreferSameZone", Self::SameZone), ("PreferSameNode", Self::SameNode), ("PreferClose", Self::SameZone)];

    fn of(service: &Service) -> Option<Self> {
        let asked = service.traffic_distribution.as_deref()?;
        Self::WORDS.into_iter().find_map(|(word, preference)| (word == asked).then_some(preference))
    }
}

/// Writes hints into the slices of Services that ask for them. Where any slice of a Service has some already,
/// somebody else decides: they stay as they are.
pub(crate) fn write(services: &[Arc<Service>], slices: &mut [Arc<Slice>]) {
    let mut preferences: HashMap<ObjectName, Preference> =
        services.iter().filter_map(|service| Some((service.name.clone(), Preference::of(service)?))).collect();
    if preferences.is_empty() {
        return;
    }
    for slice in slices.iter().filter(|slice| slice.endpoints.iter().any(is_hinted)) {
        preferences.remove(&slice.service);
    }
    for slice in slices {
        if let Some(preference) = preferences.get(&slice.service) {
            // As the controller does it: only ready endpoints have hints, and without a zone there is no zone hint.
            let endpoints = &mut Arc::make_mut(slice).endpoints;
            endpoints.iter_mut().filter(|endpoint| endpoint.ready).for_each(|endpoint| hint(endpoint, *preference));
        }
    }
}

fn is_hinted(endpoint: &Endpoint) -> bool {
    !endpoint.zone_hints.is_empty() || !endpoint.node_hints.is_empty()
}

fn hint(endpoint: &mut Endpoint, preference: Preference) {
    endpoint.zone_hints = endpoint.zone.iter().cloned().collect();
    if preference == Preference::SameNode {
        endpoint.node_hints = endpoint.node.iter().cloned().collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(distribution: Option<&str>) -> Service {
        Service { traffic_distribution: distribution.map(Arc::from), ..Service::new("default/web") }
    }

    fn placed(host: u8, node: Option<&str>, zone: Option<&str>) -> Endpoint {
        Endpoint { node: node.map(Arc::from), zone: zone.map(Arc::from), ..Endpoint::new([10, 0, 0, host]) }
    }

    /// `zones/nodes` of each endpoint after the hints are written.
    fn hints(distribution: Option<&str>, slices: Vec<Slice>) -> Vec<String> {
        let mut slices: Vec<_> = slices.into_iter().map(Arc::new).collect();
        write(&[Arc::new(service(distribution))], &mut slices);
        let said = |endpoint: &Endpoint| format!("{}/{}", endpoint.zone_hints.join(","), endpoint.node_hints.join(","));
        slices.iter().flat_map(|slice| &slice.endpoints).map(said).collect()
    }

    fn slice(name: &str, endpoints: impl IntoIterator<Item = Endpoint>) -> Slice {
        endpoints.into_iter().fold(Slice::new(name, &service(None)).port("http", 8000), Slice::endpoint)
    }

    #[test]
    fn t092_given_a_preference_when_hints_are_written_then_they_are_those_of_the_slice_controller() {
        let endpoints = || {
            let ending = Endpoint { ready: false, ..placed(3, Some("n3"), Some("b")) };
            vec![slice("web-1", [placed(1, Some("n1"), Some("a")), placed(2, Some("n2"), None), ending])]
        };

        assert_eq!(hints(Some("PreferSameZone"), endpoints()), ["a/", "/", "/"]);
        assert_eq!(hints(Some("PreferClose"), endpoints()), ["a/", "/", "/"]);
        assert_eq!(hints(Some("PreferSameNode"), endpoints()), ["a/n1", "/n2", "/"]);
        assert_eq!(hints(None, endpoints()), ["/", "/", "/"]);
        assert_eq!(hints(Some("example.com/near"), endpoints()), ["/", "/", "/"]);
    }

    #[test]
    fn t092_given_hints_in_one_slice_when_hints_are_written_then_they_stay_and_no_others_come() {
        let hinted = Endpoint { zone_hints: vec!["b".into()].into(), ..placed(1, None, Some("a")) };
        let slices = vec![slice("web-1", [hinted]), slice("web-2", [placed(2, None, Some("a"))])];

        assert_eq!(hints(Some("PreferSameZone"), slices), ["b/", "/"]);
    }
}
