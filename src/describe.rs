//! A report as a person reads it: one block for each Service, then what is wrong, then the sum.

use std::collections::BTreeSet;
use std::fmt;

use ipnet::IpNet;

use crate::name::Scope;
use crate::plan::{Side, Verdict};
use crate::printable::Printable;
use crate::problem::Listed;
use crate::status::{
    HealthPortReport, ListenerReport, ListenerState, PortReport, Report, ScopedBackends, ServiceReport,
};

/// Longer lists of backends are cut; `-o json` has them whole.
const BACKENDS_SHOWN: usize = 6;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for service in &self.services {
            writeln!(f, "{service}")?;
        }
        for listed in [Listed("Problems", &self.problems), Listed("Notes", &self.notes)] {
            if !listed.1.is_empty() {
                writeln!(f, "{listed}")?;
            }
        }
        let counts =
            [(self.services.len(), "Service"), (self.listener_count(), "listener"), (self.problems.len(), "problem")];
        let counts = counts.map(|(count, word)| counted(count, word));
        write!(f, "{}", counts.join(", "))
    }
}

impl fmt::Display for ServiceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}  {}", self.namespace, self.name, self.kind)?;
        if let Some(seconds) = self.affinity_seconds {
            write!(f, ", ClientIP affinity {seconds} s")?;
        }
        if let Some(health_port) = &self.health_port {
            write!(f, ", {health_port}")?;
        }
        if !self.balance.is_default() {
            write!(f, ", {}", self.balance)?;
        }
        if self.source_address.is_preserved() {
            f.write_str(", clients' addresses preserved")?;
        }
        if let Some(nets) = self.allowed_networks() {
            write!(f, ", from outside {}", allowed(&nets))?;
        }
        if let Some(nets) = self.balancers_in_front() {
            write!(f, ", balancers in front {}", allowed(&nets))?;
        }
        if let Some(version) = self.header_to_backends() {
            write!(f, ", PROXY {version} to backends")?;
        }
        if let Some(word) = &self.skipped {
            return writeln!(f, "\n  not served: {word}, {}", meaning(word));
        }
        writeln!(f)?;
        self.ports.iter().try_for_each(|port| port.fmt(f))
    }
}

impl fmt::Display for HealthPortReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let endpoints = counted(self.local_endpoints, "endpoint");
        write!(f, "health port {}: {endpoints} on this node", self.port)?;
        if self.addresses.is_empty() { f.write_str(" (not answered, see the problems)") } else { Ok(()) }
    }
}

impl fmt::Display for PortReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = if self.name.is_empty() { "port" } else { &self.name };
        write!(f, "  {name}  {}/{}", self.port, self.protocol)?;
        if let Some(target) = &self.target_port {
            write!(f, " → {}", Printable(target))?;
        }
        writeln!(f)?;
        if self.listeners.is_empty() {
            return writeln!(f, "    not served, see the problems");
        }
        let widest =
            |text: fn(&ListenerReport) -> &str| self.listeners.iter().map(|l| text(l).len()).max().unwrap_or(0);
        let (kind, address) = (widest(|listener| listener.kind.as_str()), widest(|listener| &listener.address));
        for listener in &self.listeners {
            let columns = format!("{:<kind$}  {:<address$}  ", listener.kind.as_str(), listener.address);
            writeln!(f, "    {}", format!("{columns}{}", remarks(listener)).trim_end())?;
        }
        write!(f, "{}", Arrows(&self.backends))
    }
}

/// What is not as everybody expects: the address was chosen for the user, a policy narrows, nobody answers.
fn remarks(listener: &ListenerReport) -> String {
    let mut remarks = Vec::new();
    if listener.allocated {
        remarks.push("allocated".to_owned());
    }
    let (outside, inside) = (listener.outside, listener.inside);
    if words(outside) != words(inside) {
        remarks.push(format!("from outside: {}; from this node: {}", words(outside), words(inside)));
    } else if outside != (Side { scope: Scope::Cluster, verdict: Verdict::Serve }) {
        remarks.push(words(outside).to_owned());
    }
    if !listener.source_ranges.is_empty() {
        let ranges: Vec<_> = listener.source_ranges.iter().map(ToString::to_string).collect();
        remarks.push(format!("only from {}", abridged(&ranges)));
    }
    match &listener.state {
        Some(ListenerState::Failed { message, .. }) => remarks.push(format!("not bound: {message}")),
        Some(ListenerState::Closed) => remarks.push("closed".to_owned()),
        Some(ListenerState::Serving | ListenerState::Parked) | None => {}
    }
    if remarks.is_empty() { String::new() } else { format!("({})", remarks.join("; ")) }
}

pub(crate) fn words(side: Side) -> &'static str {
    match (side.verdict, side.scope) {
        (Verdict::Serve, Scope::Cluster) => "every backend",
        (Verdict::Serve, Scope::Local) => "backends on this node",
        (Verdict::Drop, _) => "drop, no backend on this node",
        (Verdict::Reject, _) => "reject, no backend",
    }
}

/// What stands behind the listeners of a port.
struct Arrows<'a>(&'a ScopedBackends);

impl fmt::Display for Arrows<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.0.cluster, &self.0.local) {
            (Some(cluster), None) => writeln!(f, "    → {}", abridged(cluster)),
            (None, Some(local)) => writeln!(f, "    → on this node: {}", abridged(local)),
            (Some(cluster), Some(local)) => {
                writeln!(f, "    → everywhere:   {}", abridged(cluster))?;
                writeln!(f, "    → on this node: {}", abridged(local))
            }
            (None, None) => Ok(()),
        }
    }
}

/// Who is let in from outside: `only 203.0.113.0/24`, `nobody`.
pub(crate) fn allowed(nets: &BTreeSet<IpNet>) -> String {
    let nets: Vec<_> = nets.iter().map(ToString::to_string).collect();
    if nets.is_empty() { "nobody".to_owned() } else { format!("only {}", abridged(&nets)) }
}

pub(crate) fn abridged(addresses: &[String]) -> String {
    let shown = &addresses[..addresses.len().min(BACKENDS_SHOWN)];
    match addresses.len() {
        0 => "no backends".to_owned(),
        count if count > shown.len() => format!("{} and {} more", shown.join(", "), count - shown.len()),
        _ => shown.join(", "),
    }
}

/// Why a Service is not served, for people who do not know the word.
pub(crate) fn meaning(skipped: &str) -> &'static str {
    match skipped {
        "headless" => "its clients find the backends by DNS",
        "external_name" => "it is a DNS alias",
        "proxy_name" => "it is another proxy's, by label service.kubernetes.io/service-proxy-name and --proxy-name",
        "unallocated" => "it has no cluster IP",
        "family" => "its cluster IPs and spec.ipFamilies do not agree",
        _ => "see the manual",
    }
}

pub(crate) fn counted(count: usize, word: &str) -> String {
    format!("{count} {word}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::{ClusterIps, Endpoint, Event, Model, Objects, Service, ServiceKind, Slice, TrafficPolicy};
    use crate::plan::{Plan, PlanOptions};

    fn described(services: Vec<Service>, slices: Vec<Slice>) -> String {
        let options = PlanOptions {
            node_port_addresses: vec![[127, 0, 0, 1].into(), "::1".parse().expect("an address")],
            allow_loopback_endpoints: true,
            ..PlanOptions::default()
        };
        let (mut model, mut plan, mut dirty) = (Model::default(), Plan::default(), BTreeSet::new());
        model.apply(Event::Replace(Objects::new(services, slices)), &mut dirty);
        plan.update(&model, &dirty, &options);
        Report::of(&model, &plan, vec![]).to_string()
    }

    fn allocated(mut service: Service, host: u8) -> Service {
        service.cluster_ips = ClusterIps::Addresses { addresses: vec![[127, 96, 0, host].into()], allocated: true };
        service
    }

    fn with_endpoints(slice: Slice, count: u8) -> Slice {
        (1..=count).fold(slice, |slice, host| slice.endpoint(Endpoint::new([127, 0, 1, host])))
    }

    #[test]
    fn given_services_as_people_write_them_when_described_then_each_way_in_and_its_backends_can_be_read() {
        let mut whoami =
            allocated(Service::new("whoami").port("http", 8080).node_port(30000).udp_port("echo", 8080), 10);
        whoami.ports[0].target_port = Some("8000".into());
        whoami.ports[1].node_port = Some(30000);
        whoami.ports[1].node_port_allocated = true;
        let endpoints = with_endpoints(Slice::new("whoami-1", &whoami), 3).port("http", 8000).udp_port("echo", 8000);
        let mysql = allocated(Service::new("mysql").port("", 3306), 11);
        let annotations = [("balance".into(), "least-connections".into())].into();
        let mysql = Service { affinity_timeout: Some(Duration::from_secs(10_800)), annotations, ..mysql };
        let alias = Service { kind: ServiceKind::ExternalName, ..Service::new("prod/alias") };

        let text = described(vec![whoami, mysql, alias], vec![endpoints]);

        insta::assert_snapshot!(text, @r"
        default/mysql  ClusterIP, ClientIP affinity 10800 s, least-connections
          port  3306/TCP
            clusterIP  127.96.0.11:3306  (allocated; reject, no backend)
            → no backends

        default/whoami  NodePort
          http  8080/TCP → 8000
            clusterIP  127.96.0.10:8080  (allocated)
            nodePort   127.0.0.1:30000
            → 127.0.1.1:8000, 127.0.1.2:8000, 127.0.1.3:8000
          echo  8080/UDP
            clusterIP  127.96.0.10:8080  (allocated)
            nodePort   127.0.0.1:30000   (allocated)
            → 127.0.1.1:8000, 127.0.1.2:8000, 127.0.1.3:8000

        prod/alias  ExternalName
          not served: external_name, it is a DNS alias

        3 Services, 5 listeners, 0 problems
        ");
    }

    #[test]
    fn given_local_policies_when_described_then_both_sides_and_both_scopes_are_told() {
        let mut web = Service::new("web").cluster_ip([10, 96, 0, 10]).port("http", 80).node_port(30000);
        web.external_policy = TrafficPolicy::Local;
        let endpoints = with_endpoints(Slice::new("web-1", &web), 10).port("http", 8000);

        insta::assert_snapshot!(described(vec![web], vec![endpoints]), @r"
        default/web  NodePort
          http  80/TCP
            clusterIP  10.96.0.10:80
            nodePort   127.0.0.1:30000  (from outside: drop, no backend on this node; from this node: every backend)
            → everywhere:   127.0.1.1:8000, 127.0.1.2:8000, 127.0.1.3:8000, 127.0.1.4:8000, 127.0.1.5:8000, 127.0.1.6:8000 and 4 more
            → on this node: no backends

        1 Service, 2 listeners, 0 problems
        ");
    }

    #[test]
    fn given_a_guarded_load_balancer_when_described_then_who_may_come_and_what_health_checks_hear_is_told() {
        let mut web = Service::new("default/web").cluster_ip([127, 96, 0, 10]).port("http", 80);
        (web.kind, web.external_policy) = (ServiceKind::LoadBalancer, TrafficPolicy::Local);
        web.health_check_node_port = Some(31000);
        web.load_balancer_ips = vec![[198, 51, 100, 1].into()].into();
        web.source_ranges = vec!["203.0.113.0/24".parse().expect("a net")].into();

        let text = described(vec![web], vec![]);

        assert!(text.starts_with("default/web  LoadBalancer, health port 31000: 0 endpoints on this node\n"), "{text}");
        assert!(text.contains("198.51.100.1:80  (reject, no backend; only from 203.0.113.0/24)"), "{text}");
    }

    #[test]
    fn given_allow_lists_when_described_then_those_outside_who_may_come_are_told() {
        let web = Service::new("default/web").cluster_ip([127, 96, 0, 10]).port("http", 80);
        let header = |list: &str| {
            let annotations = [("allow-from".into(), list.into())].into();
            let text = described(vec![Service { annotations, ..web.clone() }], vec![]);
            text.lines().next().map(str::to_owned).expect("a line")
        };

        let both = "default/web  ClusterIP, from outside only 192.0.2.1/32, 203.0.113.0/24";
        assert_eq!(header("203.0.113.0/24, 192.0.2.1"), both);
        assert_eq!(header("2001:db8::/32"), "default/web  ClusterIP, from outside nobody");
    }

    #[test]
    fn t126_given_headers_and_preserve_when_described_then_who_is_believed_and_what_backends_get_is_told() {
        let web = Service::new("default/web").cluster_ip([127, 96, 0, 10]).port("http", 80);
        let annotations = [("accept-proxy", "true"), ("proxy-protocol", "v2"), ("source-address", "preserve")];
        let annotations = annotations.map(|(key, value)| (key.into(), value.into())).into();

        let text = described(vec![Service { annotations, ..web }], vec![]);

        let said = "clients' addresses preserved, balancers in front nobody, PROXY v2 to backends";
        assert!(text.starts_with(&format!("default/web  ClusterIP, {said}\n")), "{text}");
    }

    #[test]
    fn given_problems_when_described_then_they_follow_the_services() {
        let service = |name| Service::new(name).cluster_ip([10, 96, 0, 10]).port("http", 80);

        insta::assert_snapshot!(described(vec![service("a"), service("b")], vec![]), @r"
        default/a  ClusterIP
          http  80/TCP
            clusterIP  10.96.0.10:80  (reject, no backend)
            → no backends

        default/b  ClusterIP
          http  80/TCP
            not served, see the problems

        Problems:
          Service default/b: cluster IP 10.96.0.10:80/TCP is taken by Service default/a: the older, then the first by name, keeps it; give this one another number or address [conflict]

        2 Services, 1 listener, 1 problem
        ");
    }
}
