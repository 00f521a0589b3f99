//! Pods of a node that share a bridge, as CNI's plugin of that name wires them: each is the others' neighbour.
//!
//! ```text
//! node i ── bridge ─┬─ bridged i-0      node i      10.82.100+i.1       fd82:100+i::1
//!                   └─ bridged i-1      bridged i,j 10.82.100+i.16+j    fd82:100+i::10+j
//! ```

use std::io;

use super::namespace::{DualAddress, FAMILIES, Namespace};
use super::{ANY, Rig, UPLINK, dual, links, namespace, network, pods_prefix};

/// What a node calls it.
const BRIDGE: &str = "bridge";

impl Rig {
    /// Lays a bridge on node `i` with so many pods. The kernel has to know bridges.
    pub(crate) fn bridge(&self, i: u8, pods: u8) -> io::Result<Vec<Namespace>> {
        let node = self.node(i.into());
        let own = address(i, 1);
        links::bridge(node, BRIDGE)?;
        for family in FAMILIES {
            links::address(node, BRIDGE, own.of(family), pods_prefix(family))?;
            self.network_to_node(i.into(), network((own.of(family), pods_prefix(family))))?;
        }
        (0..pods).map(|j| plug_in(node, own, format!("bridged{i}-{j}"), address(i, 0x10 + j))).collect()
    }
}

fn plug_in(node: &Namespace, gateway: DualAddress, name: String, own: DualAddress) -> io::Result<Namespace> {
    let pod = namespace(name, own)?;
    links::cable(node, pod.name(), &pod, UPLINK)?;
    links::plug(node, pod.name(), BRIDGE)?;
    for family in FAMILIES {
        links::address(&pod, UPLINK, own.of(family), pods_prefix(family))?;
        links::route(&pod, (ANY.of(family), 0), UPLINK, Some(gateway.of(family)))?;
    }
    Ok(pod)
}

fn address(i: u8, host: u8) -> DualAddress {
    let network = 100 + i;
    dual([10, 82, network, host], [0xfd82, network.into(), 0, 0, 0, 0, 0, host.into()])
}
