//! What machines and pods are told of Services: where each is found, whoever serves it.
//!
//! Pure. Here is what manifests or a running relay know, and which text is made of it; the texts are those of
//! `pod_environment`, `hosts_file` and `dns_zone`. What is in no text goes to whoever asked, with the reason.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::allocate::Ranges;
use crate::dns_records::Records;
use crate::dns_zone::{self, ReverseNetwork};
use crate::findings::is_name;
use crate::hosts_file;
use crate::manifest::{Input, Reading};
use crate::model::{ClusterIps, Service, ServiceKind, ServicePort, Slice};
use crate::name::ObjectName;
use crate::pod_environment::Environment;
use crate::status::{Report, ServiceReport};

/// What `kube-relay env` is asked for.
#[derive(Debug, PartialEq, Eq)]
pub struct DiscoveryConfig {
    /// Who knows the Services.
    pub source: DiscoverySource,
    /// What to print of them.
    pub form: Form,
}

/// Who knows the Services.
#[derive(Debug, PartialEq, Eq)]
pub enum DiscoverySource {
    /// Manifests.
    Manifests {
        /// Where they are.
        inputs: Vec<Input>,
        /// Where Services without a cluster IP get theirs: those of the relay that serves them.
        ranges: Ranges,
    },
    /// A running relay with this status address. It knows no endpoints of headless Services.
    Relay(SocketAddr),
}

/// What to print of Services.
#[derive(Debug, PartialEq, Eq)]
pub enum Form {
    /// The variables of a pod.
    Environment {
        /// The pod's namespace.
        namespace: String,
    },
    /// Lines of a hosts file, with the names that a pod may say.
    Hosts {
        /// The pod's namespace: its Services have short names.
        namespace: String,
        /// The cluster's domain.
        domain: String,
    },
    /// The zone of the cluster's domain.
    Zone {
        /// The cluster's domain.
        domain: String,
    },
    /// The zone that leads from addresses of a network to names of the domain.
    ReverseZone {
        /// The cluster's domain.
        domain: String,
        /// The network.
        network: ReverseNetwork,
    },
}

/// What is printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The text, for standard output.
    pub text: String,
    /// What is not in it, or not for certain, and why; a line each.
    pub gaps: Vec<String>,
}

/// Services, and the endpoints of those whose clients find them by DNS.
#[derive(Clone, Debug, Default)]
pub struct Discovery {
    /// By namespace and name.
    services: Vec<Arc<Service>>,
    /// Of each Service; `None` where the source does not tell.
    slices: Option<BTreeMap<ObjectName, Vec<Arc<Slice>>>>,
}

impl Discovery {
    /// What manifests say.
    pub fn of_manifests(reading: &Reading) -> Self {
        let mut slices: BTreeMap<ObjectName, Vec<Arc<Slice>>> = BTreeMap::new();
        for slice in reading.objects.slices.iter().chain(&reading.headless_slices) {
            slices.entry(slice.service.clone()).or_default().push(Arc::clone(slice));
        }
        Self { services: by_name(reading.objects.services.clone()), slices: Some(slices) }
    }

    /// What a running relay says of itself.
    pub fn of_relay(report: &Report) -> Self {
        let services = report.services.iter().filter(|service| is_sound(service)).map(told);
        Self { services: by_name(services.map(Arc::new).collect()), slices: None }
    }

    /// The text that was asked for. `serial` is that of a zone: it has to grow with each change, as seconds do.
    pub fn answer(&self, form: &Form, serial: u32) -> Answer {
        match form {
            Form::Environment { namespace } => {
                let environment = Environment::of_pod(&self.services, namespace);
                Answer { text: environment.to_string(), gaps: lines(&environment.clashes) }
            }
            Form::Hosts { namespace, domain } => {
                let records = self.records();
                Answer { text: hosts_file::text(&records, domain, namespace), gaps: lines(&records.gaps) }
            }
            Form::Zone { domain } => {
                let records = self.records();
                Answer { text: dns_zone::forward(&records, domain, serial), gaps: lines(&records.gaps) }
            }
            Form::ReverseZone { domain, network } => {
                let records = self.records();
                Answer { text: dns_zone::reverse(&records, domain, network, serial), gaps: lines(&records.gaps) }
            }
        }
    }

    fn records(&self) -> Records {
        Records::of(self.services.iter().map(|service| (&**service, self.slices_of(&service.name))))
    }

    fn slices_of(&self, service: &ObjectName) -> Option<&[Arc<Slice>]> {
        let slices = self.slices.as_ref()?;
        Some(slices.get(service).map(Vec::as_slice).unwrap_or_default())
    }
}

fn by_name(mut services: Vec<Arc<Service>>) -> Vec<Arc<Service>> {
    services.sort_by(|a, b| a.name.cmp(&b.name));
    services
}

fn lines(items: &[impl fmt::Display]) -> Vec<String> {
    items.iter().map(ToString::to_string).collect()
}

/// False where a name would be more than a name in a text: anybody may have answered in the relay's place.
fn is_sound(report: &ServiceReport) -> bool {
    let ports = report.ports.iter().map(|port| port.name.as_str()).filter(|name| !name.is_empty());
    [report.namespace.as_str(), report.name.as_str()].into_iter().chain(ports).all(|name| is_name(name, 63))
}

/// As much of a Service as is told of it to others.
fn told(report: &ServiceReport) -> Service {
    let mut service = Service::new(&report.name);
    service.name = ObjectName::new(report.namespace.as_str(), report.name.as_str());
    if report.kind == ServiceKind::ExternalName.as_str() {
        service.kind = ServiceKind::ExternalName;
    }
    service.external_name = report.external_name.as_deref().map(Arc::from);
    service.cluster_ips = match report.cluster_ips.as_slice() {
        [] => ClusterIps::Unset,
        [none] if none == "None" => ClusterIps::Headless,
        texts => {
            let addresses = texts.iter().filter_map(|text| text.parse().ok()).collect();
            ClusterIps::Addresses { addresses, allocated: false }
        }
    };
    service.ports = report.ports.iter().map(|port| ServicePort::new(&port.name, port.protocol, port.port)).collect();
    service
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::sample;
    use crate::model::Endpoint;

    fn zone(discovery: &Discovery) -> Answer {
        discovery.answer(&Form::Zone { domain: "cluster.local".into() }, 7)
    }

    #[test]
    fn given_a_slice_that_is_hidden_from_proxies_when_asked_for_a_zone_then_dns_has_it() {
        let db = Service { cluster_ips: ClusterIps::Headless, ..Service::new("shop/db") };
        let slice = Slice::new("db-1", &db).endpoint(Endpoint::new([10, 244, 0, 5]));
        let mut reading = Reading::default();
        reading.objects.services = vec![Arc::new(db)];
        reading.headless_slices = vec![Arc::new(slice)];

        let answer = zone(&Discovery::of_manifests(&reading));

        assert!(answer.text.contains("\ndb.shop.svc IN A 10.244.0.5\n"), "{}", answer.text);
        assert_eq!(answer.gaps, [] as [String; 0]);
    }

    #[test]
    fn given_a_running_relay_when_asked_then_it_tells_cluster_ips_and_that_headless_services_are_missing() {
        let discovery = Discovery::of_relay(&sample::status().report());

        let variables = discovery.answer(&Form::Environment { namespace: "default".into() }, 7);
        let records = zone(&discovery);

        assert!(variables.text.contains("WEB_SERVICE_HOST=127.96.0.10\n"), "{}", variables.text);
        assert!(!variables.text.contains("HEADLESS"), "{}", variables.text);
        assert!(records.text.contains("\nweb.default.svc IN A 127.96.0.10\n"), "{}", records.text);
        assert_eq!(records.gaps.len(), 1, "{:?}", records.gaps);
        assert!(records.gaps[0].starts_with("Service default/headless: "), "{:?}", records.gaps);
    }

    #[test]
    fn given_somebody_else_in_the_relays_place_when_names_are_more_than_names_then_they_are_in_no_text() {
        let mut report = sample::status().report();
        for service in &mut report.services {
            service.name.push_str("\n@ IN NS evil.");
        }

        assert!(!zone(&Discovery::of_relay(&report)).text.contains("evil"));
    }
}
