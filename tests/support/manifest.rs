//! Manifests as text: what a person would write, with the test's own addresses in it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use super::site::{BACKEND_PORT, NODE_PORT, SERVICE_PORT, Site};

/// One Service with its EndpointSlice. Its text is two YAML documents.
#[derive(Clone, Debug)]
pub struct Manifest {
    name: String,
    cluster_ip: IpAddr,
    protocols: Vec<&'static str>,
    node_port: bool,
    external_ips: Vec<IpAddr>,
    local_to: Option<&'static str>,
    health_port: Option<u16>,
    load_balancer: Option<(IpAddr, Vec<IpAddr>)>,
    affinity_seconds: Option<u32>,
    annotations: Vec<(&'static str, &'static str)>,
    endpoints: Vec<IpAddr>,
    unready: Vec<IpAddr>,
}

impl Manifest {
    /// The Service `web` at the site's cluster IP, without ports and endpoints.
    pub fn new(site: Site) -> Self {
        Self {
            name: "web".to_owned(),
            cluster_ip: site.cluster_ip(),
            protocols: Vec::new(),
            node_port: false,
            external_ips: Vec::new(),
            local_to: None,
            health_port: None,
            load_balancer: None,
            affinity_seconds: None,
            annotations: Vec::new(),
            endpoints: Vec::new(),
            unready: Vec::new(),
        }
    }

    /// Another name.
    pub fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// Another cluster IP.
    pub fn cluster_ip(mut self, ip: IpAddr) -> Self {
        self.cluster_ip = ip;
        self
    }

    /// Adds the TCP port.
    pub fn tcp(mut self) -> Self {
        self.protocols.push("TCP");
        self
    }

    /// Adds the UDP port, of the same number.
    pub fn udp(mut self) -> Self {
        self.protocols.push("UDP");
        self
    }

    /// Makes it a NodePort Service.
    pub fn node_port(mut self) -> Self {
        self.node_port = true;
        self
    }

    /// Adds external IPs.
    pub fn external_ips(mut self, ips: impl IntoIterator<Item = IpAddr>) -> Self {
        self.external_ips.extend(ips);
        self
    }

    /// Both traffic policies Local, and all endpoints on this node.
    pub fn local_to(mut self, node: &'static str) -> Self {
        self.local_to = Some(node);
        self
    }

    /// Makes it one of a load balancer, which asks at this number: for a Service that is local to a node.
    pub fn health_port(mut self, number: u16) -> Self {
        self.health_port = Some(number);
        self
    }

    /// Session affinity ClientIP.
    pub fn sticky(mut self, seconds: u32) -> Self {
        self.affinity_seconds = Some(seconds);
        self
    }

    /// With an address of a load balancer, where none but these clients are served.
    pub fn load_balancer(mut self, ip: IpAddr, clients: impl IntoIterator<Item = IpAddr>) -> Self {
        self.load_balancer = Some((ip, clients.into_iter().collect()));
        self
    }

    /// Adds an annotation under `kube-relay.dev/`.
    pub fn annotation(mut self, key: &'static str, value: &'static str) -> Self {
        self.annotations.push((key, value));
        self
    }

    /// Adds endpoints.
    pub fn endpoints(mut self, backends: impl IntoIterator<Item = SocketAddr>) -> Self {
        self.endpoints.extend(backends.into_iter().map(|backend| backend.ip()));
        self
    }

    /// Adds endpoints that are not ready.
    pub fn unready(mut self, backends: impl IntoIterator<Item = SocketAddr>) -> Self {
        self.unready.extend(backends.into_iter().map(|backend| backend.ip()));
        self
    }
}

impl fmt::Display for Manifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.service(f)?;
        writeln!(f, "---")?;
        self.slice(f)
    }
}

impl Manifest {
    fn service(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "apiVersion: v1\nkind: Service\nmetadata:\n  name: {}", self.name)?;
        if !self.annotations.is_empty() {
            writeln!(f, "  annotations:")?;
        }
        for (key, value) in &self.annotations {
            writeln!(f, "    kube-relay.dev/{key}: {value:?}")?;
        }
        writeln!(f, "spec:\n  clusterIP: \"{}\"", self.cluster_ip)?;
        if self.node_port {
            writeln!(f, "  type: NodePort")?;
        }
        if !self.external_ips.is_empty() {
            writeln!(f, "  externalIPs: {:?}", self.external_ips.iter().map(ToString::to_string).collect::<Vec<_>>())?;
        }
        if self.local_to.is_some() {
            writeln!(f, "  internalTrafficPolicy: Local\n  externalTrafficPolicy: Local")?;
        }
        if let Some(number) = self.health_port {
            writeln!(
                f,
                "  type: LoadBalancer\n  allocateLoadBalancerNodePorts: false\n  healthCheckNodePort: {number}"
            )?;
        }
        if let Some((_, clients)) = &self.load_balancer {
            let ranges: Vec<_> = clients.iter().map(|client| format!("{client}/32")).collect();
            writeln!(f, "  type: LoadBalancer\n  allocateLoadBalancerNodePorts: false")?;
            writeln!(f, "  loadBalancerSourceRanges: {ranges:?}")?;
        }
        if let Some(seconds) = self.affinity_seconds {
            writeln!(f, "  sessionAffinity: ClientIP")?;
            writeln!(f, "  sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {seconds}}}}}")?;
        }
        writeln!(f, "  ports:")?;
        for protocol in &self.protocols {
            writeln!(f, "    - name: {}\n      protocol: {protocol}", port_name(protocol))?;
            writeln!(f, "      port: {SERVICE_PORT}\n      targetPort: {BACKEND_PORT}")?;
            if self.node_port {
                writeln!(f, "      nodePort: {NODE_PORT}")?;
            }
        }
        if let Some((ip, _)) = &self.load_balancer {
            writeln!(f, "status: {{loadBalancer: {{ingress: [{{ip: \"{ip}\"}}]}}}}")?;
        }
        Ok(())
    }

    fn slice(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.cluster_ip.is_ipv4() { "IPv4" } else { "IPv6" };
        writeln!(f, "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {}-1", self.name)?;
        writeln!(f, "  labels: {{kubernetes.io/service-name: {}}}\naddressType: {family}\nports:", self.name)?;
        for protocol in &self.protocols {
            writeln!(f, "  - {{name: {}, protocol: {protocol}, port: {BACKEND_PORT}}}", port_name(protocol))?;
        }
        if self.endpoints.is_empty() && self.unready.is_empty() {
            return writeln!(f, "endpoints: []");
        }
        writeln!(f, "endpoints:")?;
        for ip in &self.endpoints {
            self.endpoint(f, ip)?;
        }
        for ip in &self.unready {
            self.endpoint(f, ip)?;
            writeln!(f, "    conditions: {{ready: false}}")?;
        }
        Ok(())
    }

    fn endpoint(&self, f: &mut fmt::Formatter<'_>, ip: &IpAddr) -> fmt::Result {
        writeln!(f, "  - addresses: [\"{ip}\"]")?;
        match self.local_to {
            Some(node) => writeln!(f, "    nodeName: {node}"),
            None => Ok(()),
        }
    }
}

fn port_name(protocol: &str) -> String {
    format!("on-{}", protocol.to_lowercase())
}
