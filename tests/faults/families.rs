//! Both families at once.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::bursts::{backends, exchange};
use crate::rig::FAMILIES;
use crate::stage::{NODE_PORT, Stage, until};

pub(crate) fn each_reaches_its_own() {
    let stage = Stage::build();
    let _backends = backends(&stage);
    let both = FAMILIES.map(|family| stage.backend(0, family));
    let relay = stage.relay(&both, &[]);
    let loopback = SocketAddr::new(IpAddr::from(Ipv6Addr::LOCALHOST), NODE_PORT);

    for family in FAMILIES {
        stage.client().run(|| exchange(stage.service(family))).expect("a backend answers");
    }
    // No route_localnet, as packet filters need it, and which IPv6 does not have.
    stage.node().run(|| exchange(loopback)).expect("a backend answers");

    let connections =
        |backend: SocketAddr| relay.metric("kuberelay_connections_total", &[&format!(r#"backend="{backend}""#)]);
    until("all to be counted", || (both.map(connections) == [1, 2]).then_some(()));
}
