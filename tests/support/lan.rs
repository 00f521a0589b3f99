//! One more network: the client and all nodes on one switch, each other's neighbours.
//!
//! ```text
//! client ─┬─ node0      client  198.18.0.100 … 198.18.0.102   fd18::100
//!         └─ node1 …    node i  198.18.0.1+i                  fd18::1+i
//! ```

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kube_relay::name::Family;

use super::namespace::{DualAddress, FAMILIES, Namespace};
use super::{Rig, host_prefix, links, namespace};

/// What each of them calls its cable to the switch.
pub(crate) const LAN: &str = "lan";
/// What the switch calls itself.
const SWITCH: &str = "switch";
/// A hardware address.
pub(crate) type Hardware = [u8; 6];

/// The switch, and who is plugged in. Dropping it takes the network down.
#[derive(Debug)]
pub(crate) struct Lan {
    switch: Namespace,
    members: Vec<(String, Hardware)>,
}

impl Lan {
    /// The client's addresses: three of IPv4, as neighbours remember whom they have met.
    pub(crate) const CLIENTS: [DualAddress; 3] = [member(100, 0x100), member(101, 0x100), member(102, 0x100)];

    /// The address of node `i`.
    pub(crate) fn node(i: u8) -> DualAddress {
        member(1 + i, 1 + u16::from(i))
    }

    /// An address that is nobody's yet.
    pub(crate) fn shared(number: u8) -> DualAddress {
        member(number, number.into())
    }

    /// Lays a cable to each. The kernel has to know bridges.
    pub(crate) fn lay(rig: &Rig) -> io::Result<Self> {
        let switch = namespace("switch", member(0, 0))?;
        links::bridge(&switch, SWITCH)?;
        let mut lan = Self { switch, members: Vec::new() };
        for own in Self::CLIENTS {
            lan.plug_in(rig.client(), own)?;
        }
        for (i, node) in (0..).zip(rig.nodes()) {
            lan.plug_in(node, Self::node(i))?;
        }
        Ok(lan)
    }

    fn plug_in(&mut self, part: &Namespace, own: DualAddress) -> io::Result<()> {
        if !self.members.iter().any(|(name, _)| name == part.name()) {
            links::cable(&self.switch, part.name(), part, LAN)?;
            links::plug(&self.switch, part.name(), SWITCH)?;
            self.members.push((part.name().to_owned(), links::hardware_address(part, LAN)?));
        }
        for (family, prefix) in FAMILIES.into_iter().zip([24, 64]) {
            links::address(part, LAN, own.of(family), prefix)?;
        }
        Ok(())
    }

    /// Has a node announce an address: it is one of its interface to the others.
    pub(crate) fn announce(&self, node: &Namespace, shared: DualAddress) -> io::Result<()> {
        FAMILIES.into_iter().try_for_each(|family| {
            let address = shared.of(family);
            links::address(node, LAN, address, host_prefix(family))
        })
    }

    /// Has a neighbour send what is for an address to node `i`, whoever announces it.
    pub(crate) fn lead(&self, from: &Namespace, address: IpAddr, i: u8) -> io::Result<()> {
        let family = Family::of(address);
        links::route(from, (address, host_prefix(family)), LAN, Some(Self::node(i).of(family)))
    }

    /// The hardware address of a part on this network.
    pub(crate) fn hardware(&self, part: &Namespace) -> Hardware {
        let found = self.members.iter().find(|(name, _)| name == part.name());
        found.expect("it is plugged in").1
    }

    /// Whose hardware address it is.
    pub(crate) fn owner(&self, hardware: &Hardware) -> &str {
        self.members.iter().find(|(_, theirs)| theirs == hardware).map_or("a stranger", |(name, _)| name)
    }
}

const fn member(v4: u8, v6: u16) -> DualAddress {
    DualAddress {
        v4: IpAddr::V4(Ipv4Addr::new(198, 18, 0, v4)),
        v6: IpAddr::V6(Ipv6Addr::new(0xfd18, 0, 0, 0, 0, 0, 0, v6)),
    }
}
