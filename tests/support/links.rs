//! Cables, addresses and routes inside namespaces, over rtnetlink: no `ip` program needed.
//!
//! What is wired to what is in `rig`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use futures_util::TryStreamExt;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::rule::RuleAttribute;
use rtnetlink::{Handle, IpVersion, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::namespace::Namespace;

/// Every namespace's loopback device has this index.
const LOOPBACK: u32 = 1;
/// The routing table of what is local (`RT_TABLE_LOCAL`).
const LOCAL_TABLE: u32 = 255;

/// Sets the loopback device up.
pub(crate) fn loopback_up(namespace: &Namespace) -> io::Result<()> {
    ask(namespace, "set lo up", async |handle| {
        handle.link().set(LinkUnspec::new_with_index(LOOPBACK).up().build()).execute().await
    })
}

/// Sets the loopback device down.
pub(crate) fn loopback_down(namespace: &Namespace) -> io::Result<()> {
    ask(namespace, "set lo down", async |handle| {
        handle.link().set(LinkUnspec::new_with_index(LOOPBACK).down().build()).execute().await
    })
}

/// Sets a device up.
pub(crate) fn device_up(namespace: &Namespace, device: &str) -> io::Result<()> {
    ask(namespace, &format!("set {device} up"), async |handle| {
        handle.link().set(LinkUnspec::new_with_name(device).up().build()).execute().await
    })
}

/// Sets a device down: the other end of a cable has no carrier then.
pub(crate) fn device_down(namespace: &Namespace, device: &str) -> io::Result<()> {
    ask(namespace, &format!("set {device} down"), async |handle| {
        handle.link().set(LinkUnspec::new_with_name(device).down().build()).execute().await
    })
}

/// Lays a cable: a veth pair, up, one end in each namespace.
pub(crate) fn cable(here: &Namespace, device: &str, there: &Namespace, peer: &str) -> io::Result<()> {
    let descriptor = there.descriptor().ok_or_else(|| io::Error::other("no cable on loopback"))?.as_raw_fd();
    ask(here, &format!("cable {device} to {}", there.name()), async |handle| {
        let far = LinkUnspec::new_with_name(peer).setns_by_fd(descriptor).build();
        let pair = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(device)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(far)))
            .up()
            .build();
        handle.link().add(pair).execute().await
    })?;
    // Not in the same request: the far end is made first and cannot go up without a near one.
    device_up(there, peer)
}

/// Makes a bridge: all cables that are plugged into it are one network.
pub(crate) fn bridge(namespace: &Namespace, bridge: &str) -> io::Result<()> {
    ask(namespace, &format!("bridge {bridge}"), async |handle| {
        handle.link().add(LinkBridge::new(bridge).build()).execute().await
    })
}

/// Plugs a device into a bridge.
pub(crate) fn plug(namespace: &Namespace, device: &str, bridge: &str) -> io::Result<()> {
    ask(namespace, &format!("plug {device} into {bridge}"), async |handle| {
        let bridge = index_of(handle, bridge).await?;
        handle.link().set(LinkUnspec::new_with_name(device).controller(bridge).build()).execute().await
    })
}

/// The hardware address of a device.
pub(crate) fn hardware_address(namespace: &Namespace, device: &str) -> io::Result<[u8; 6]> {
    let mut found = None;
    ask(namespace, &format!("hardware address of {device}"), async |handle| {
        found = link_of(handle, device).await?.attributes.into_iter().find_map(|attribute| match attribute {
            LinkAttribute::Address(bytes) => bytes.try_into().ok(),
            _ => None,
        });
        Ok(())
    })?;
    found.ok_or_else(|| io::Error::other(format!("{device} has no hardware address")))
}

/// Gives a device an address, usable at once. Giving it twice is fine.
pub(crate) fn address(namespace: &Namespace, device: &str, address: IpAddr, prefix: u8) -> io::Result<()> {
    ask(namespace, &format!("address {address}/{prefix} dev {device}"), async |handle| {
        let index = index_of(handle, device).await?;
        let mut request = handle.address().add(index, address, prefix).replace();
        if address.is_ipv6() {
            // Nobody else is on the cable: without it the address cannot be used for a second.
            request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        request.execute().await
    })
}

/// Gives a device an address as routers do: before it can be used, its neighbours are asked whether it is theirs.
pub(crate) fn address_in_doubt(namespace: &Namespace, device: &str, address: IpAddr, prefix: u8) -> io::Result<()> {
    ask(namespace, &format!("address {address}/{prefix} dev {device}"), async |handle| {
        let index = index_of(handle, device).await?;
        handle.address().add(index, address, prefix).execute().await
    })
}

/// Whether an address of a device can be used: `None` while that is being found out.
pub(crate) fn is_usable(namespace: &Namespace, device: &str, address: IpAddr) -> io::Result<Option<bool>> {
    let mut usable = None;
    ask(namespace, &format!("show address {address} dev {device}"), async |handle| {
        let index = index_of(handle, device).await?;
        let request = handle.address().get().set_link_index_filter(index).set_address_filter(address);
        let found = std::pin::pin!(request.execute()).try_next().await?.ok_or(rtnetlink::Error::RequestFailed)?;
        let flags = found.header.flags;
        usable = match flags.contains(AddressHeaderFlags::Dadfailed) {
            true => Some(false),
            false => (!flags.contains(AddressHeaderFlags::Tentative)).then_some(true),
        };
        Ok(())
    })?;
    Ok(usable)
}

/// Takes an address away from a device.
pub(crate) fn delete_address(namespace: &Namespace, device: &str, address: IpAddr) -> io::Result<()> {
    ask(namespace, &format!("delete address {address} dev {device}"), async |handle| {
        let index = index_of(handle, device).await?;
        let request = handle.address().get().set_link_index_filter(index).set_address_filter(address);
        let mut all = std::pin::pin!(request.execute());
        let found = all.try_next().await?.ok_or(rtnetlink::Error::RequestFailed)?;
        handle.address().del(found).execute().await
    })
}

/// Routes a prefix by a device, through a gateway if one is named. Doing it twice is fine.
pub(crate) fn route(
    namespace: &Namespace,
    (destination, prefix): (IpAddr, u8),
    device: &str,
    gateway: Option<IpAddr>,
) -> io::Result<()> {
    ask(namespace, &format!("route {destination}/{prefix} dev {device}"), async |handle| {
        let index = index_of(handle, device).await?;
        let message = match destination {
            IpAddr::V4(destination) => {
                let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(destination, prefix);
                let route = route.output_interface(index);
                match gateway {
                    Some(IpAddr::V4(gateway)) => route.gateway(gateway).build(),
                    _ => route.scope(RouteScope::Link).build(),
                }
            }
            IpAddr::V6(destination) => {
                let route = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(destination, prefix);
                let route = route.output_interface(index);
                match gateway {
                    Some(IpAddr::V6(gateway)) => route.gateway(gateway).build(),
                    _ => route.build(),
                }
            }
        };
        handle.route().add(message).replace().execute().await
    })
}

/// Makes a network local, as `ip route add local NETWORK dev lo` does.
pub(crate) fn local_route(namespace: &Namespace, to: (IpAddr, u8)) -> io::Result<()> {
    ask(namespace, &format!("local route {}/{}", to.0, to.1), async |handle| {
        handle.route().add(local_route_to(to)?.protocol(RouteProtocol::Static).build()).replace().execute().await
    })
}

/// Takes a local route away, as `ip route del local NETWORK dev lo` does, whoever made it.
pub(crate) fn delete_local_route(namespace: &Namespace, to: (IpAddr, u8)) -> io::Result<()> {
    ask(namespace, &format!("delete local route {}/{}", to.0, to.1), async |handle| {
        handle.route().del(local_route_to(to)?.protocol(RouteProtocol::Unspec).build()).execute().await
    })
}

/// Adds and deletes that many local routes, one at a time: twice as many messages to whoever listens.
pub(crate) fn churn(namespace: &Namespace, count: u16) -> io::Result<()> {
    ask(namespace, "churn", async |handle| {
        for number in 0..count {
            let [high, low] = number.to_be_bytes();
            let route = local_route_to(([10, 98, high, low].into(), 32))?.protocol(RouteProtocol::Static).build();
            handle.route().add(route.clone()).execute().await?;
            handle.route().del(route).execute().await?;
        }
        Ok(())
    })
}

fn local_route_to((network, prefix): (IpAddr, u8)) -> Result<RouteMessageBuilder<IpAddr>, rtnetlink::Error> {
    let route = RouteMessageBuilder::<IpAddr>::new().destination_prefix(network, prefix);
    let route = route.map_err(|_| rtnetlink::Error::RequestFailed)?.output_interface(LOOPBACK);
    Ok(route.scope(RouteScope::Host).kind(RouteType::Local).table_id(LOCAL_TABLE))
}

/// Where the local routes lead that a program with this number has made.
pub(crate) fn local_routes(namespace: &Namespace, protocol: u8) -> io::Result<Vec<(IpAddr, u8)>> {
    let mut found = Vec::new();
    ask(namespace, "list routes", async |handle| {
        for all in [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()] {
            let mut routes = std::pin::pin!(handle.route().get(all).execute());
            while let Some(route) = routes.try_next().await? {
                let header = &route.header;
                if header.kind == RouteType::Local && u8::from(header.protocol) == protocol {
                    let to = route.attributes.iter().find_map(destination);
                    found.extend(to.map(|to| (to, header.destination_prefix_length)));
                }
            }
        }
        Ok(())
    })?;
    found.sort();
    Ok(found)
}

fn destination(attribute: &RouteAttribute) -> Option<IpAddr> {
    match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(v4)) => Some((*v4).into()),
        RouteAttribute::Destination(RouteAddress::Inet6(v6)) => Some((*v6).into()),
        _ => None,
    }
}

/// How many rules, of both families, lead into a table of routes.
pub(crate) fn rules_into(namespace: &Namespace, table: u32) -> io::Result<usize> {
    let mut count = 0;
    ask(namespace, "list rules", async |handle| {
        for version in [IpVersion::V4, IpVersion::V6] {
            let mut rules = std::pin::pin!(handle.rule().get(version).execute());
            while let Some(rule) = rules.try_next().await? {
                count += usize::from(rule.attributes.contains(&RuleAttribute::Table(table)));
            }
        }
        Ok(())
    })?;
    Ok(count)
}

/// Removes the rules, of both families, that lead into a table of routes.
pub(crate) fn remove_rules_into(namespace: &Namespace, table: u32) -> io::Result<()> {
    ask(namespace, "remove rules", async |handle| {
        for version in [IpVersion::V4, IpVersion::V6] {
            let all: Vec<_> = handle.rule().get(version).execute().try_collect().await?;
            for rule in all.into_iter().filter(|rule| rule.attributes.contains(&RuleAttribute::Table(table))) {
                handle.rule().del(rule).execute().await?;
            }
        }
        Ok(())
    })
}

/// The devices of a namespace, loopback among them.
pub(crate) fn devices(namespace: &Namespace) -> io::Result<usize> {
    let mut count = 0;
    ask(namespace, "list devices", async |handle| {
        count = handle.link().get().execute().try_fold(0, async |count, _| Ok(count + 1)).await?;
        Ok(())
    })?;
    Ok(count)
}

async fn index_of(handle: &Handle, device: &str) -> Result<u32, rtnetlink::Error> {
    Ok(link_of(handle, device).await?.header.index)
}

async fn link_of(handle: &Handle, device: &str) -> Result<LinkMessage, rtnetlink::Error> {
    let mut links = std::pin::pin!(handle.link().get().match_name(device).execute());
    links.try_next().await?.ok_or(rtnetlink::Error::RequestFailed)
}

/// One conversation with the kernel, from inside a namespace.
fn ask(
    namespace: &Namespace,
    what: &str,
    conversation: impl AsyncFnOnce(&Handle) -> Result<(), rtnetlink::Error> + Send,
) -> io::Result<()> {
    namespace.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            tokio::spawn(connection);
            conversation(&handle)
                .await
                .map_err(|error| io::Error::other(format!("{}: {what}: {error}", namespace.name())))
        })
    })
}
