//! Many Services at once on one node, all before the same backends.

use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::stage::{PORT, Stage};

/// So many Services, each with an address of its own.
#[derive(Clone, Copy)]
pub(crate) struct Many {
    count: u16,
}

impl Many {
    /// Leads their addresses to the node, where they are local.
    pub(crate) fn on(stage: &Stage, count: u16) -> Self {
        let network = ([10, 97, 0, 0].into(), 16);
        stage.rig.network_to_node(0, network).expect("the client is ours");
        stage.rig.network_local_to_node(0, network).expect("the node is ours");
        Self { count }
    }

    /// Where clients find one of them.
    pub(crate) fn service(number: u16) -> SocketAddr {
        let [high, low] = (number + 1).to_be_bytes(); // 10.97.0.0 is nobody's.
        SocketAddr::from(([10, 97, high, low], PORT))
    }

    /// All their objects.
    pub(crate) fn manifest(self, backends: &[SocketAddr]) -> Value {
        let items: Vec<_> = (0..self.count).flat_map(|number| objects(number, backends)).collect();
        json!({"apiVersion": "v1", "kind": "List", "items": items})
    }
}

fn objects(number: u16, backends: &[SocketAddr]) -> [Value; 2] {
    let (name, ports) = (format!("s{number:05}"), json!([{"name": "tcp", "port": PORT, "protocol": "TCP"}]));
    let endpoints: Vec<_> = backends.iter().map(|backend| json!({"addresses": [backend.ip()]})).collect();
    [
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"clusterIP": Many::service(number).ip(), "ports": ports},
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": format!("{name}-1"), "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4", "endpoints": endpoints, "ports": ports,
        }),
    ]
}
