//! This node: its interface addresses, the addresses that node ports are served on, its limit of descriptors.
//!
//! Reading the machine and deciding are apart: [`Host::read`] asks the kernel once, everything else is pure. When to ask
//! again is `host_watch`.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::str::FromStr;
use std::time::Duration;

use futures_util::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::time::timeout;

use crate::name::Family;

/// What this machine says about its addresses at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// The addresses of all interfaces that can be bound, in the kernel's order. Not among them: link-local ones of IPv6,
    /// which mean nothing without the interface, and those that another machine may have, as far as the kernel knows.
    pub interfaces: Vec<InterfaceAddress>,
    /// The source address of the default route, at most one for each family.
    pub default_sources: Vec<IpAddr>,
}

/// An address of an interface of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// `lo`, `eth0`; empty where the interface went away while we asked.
    pub interface: String,
    /// The address.
    pub address: IpAddr,
    /// Length of its network prefix in bits.
    pub prefix: u8,
}

impl InterfaceAddress {
    /// The network whose other addresses are neighbours on this interface.
    pub fn net(&self) -> IpNet {
        IpNet::new(self.address, self.prefix).map_or_else(|_| self.address.into(), |net| net.trunc())
    }
}

/// How long the kernel may take to tell all addresses: a dump that it gives up for want of memory never ends.
const PATIENCE: Duration = Duration::from_secs(5);

/// The machine's addresses could not be read.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// There is no such socket here, or no descriptor left for it.
    #[error("rtnetlink: cannot open a socket")]
    Open(#[source] io::Error),
    /// The kernel did not answer as expected.
    #[error("rtnetlink: cannot read the {what} of this machine")]
    Dump {
        /// `addresses` or `interfaces`.
        what: &'static str,
        /// Its answer; boxed, since it carries whole messages.
        source: Box<rtnetlink::Error>,
    },
    /// The kernel has begun to answer, or not even that.
    #[error("rtnetlink: the addresses of this machine are not told within {PATIENCE:?}")]
    Unfinished,
}

impl Host {
    /// Asks the kernel over rtnetlink. Sends nothing to the network. Needs a tokio runtime.
    pub async fn read() -> Result<Self, HostError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(HostError::Open)?;
        // Ends by itself when the last handle is dropped, at the end of this function.
        tokio::spawn(connection);
        let interfaces = timeout(PATIENCE, interface_addresses(&handle)).await.map_err(|_| HostError::Unfinished)??;
        Ok(Self { interfaces, default_sources: default_route_sources() })
    }

    /// What is true of every machine, for one that does not answer over rtnetlink.
    pub fn loopback_only() -> Self {
        let lo = InterfaceAddress { interface: "lo".into(), address: Ipv4Addr::LOCALHOST.into(), prefix: 8 };
        Self { interfaces: vec![lo], default_sources: default_route_sources() }
    }

    /// A wildcard address of one of our own servers, written out: a socket for each address of this machine instead of
    /// one that would also catch the traffic of every VIP. Either family's means both, as kube-proxy takes it; other
    /// addresses are returned as they are.
    pub fn expand_wildcard(&self, address: SocketAddr) -> Vec<SocketAddr> {
        if !address.ip().is_unspecified() {
            return vec![address];
        }
        self.addresses().into_iter().map(|ip| SocketAddr::new(ip, address.port())).collect()
    }

    /// The addresses that this node is reached at. An address on `lo` is not one of them: somebody gave it to this
    /// machine for a Service (`ip addr add VIP/32 dev lo`), unless it is loopback or the node goes by it.
    pub fn own_addresses(&self) -> impl Iterator<Item = IpAddr> {
        let lent = |found: &InterfaceAddress| {
            let ip = found.address;
            found.interface == "lo" && !ip.is_loopback() && !self.default_sources.contains(&ip)
        };
        self.interfaces.iter().filter(move |found| !lent(found)).map(|found| found.address)
    }

    /// Those of a single host (`/32`, `/128`) that the node does not go by: somebody may have given them to this machine
    /// for a Service, as keepalived does, and take them back at any time.
    ///
    /// It goes by `node_addresses` (`--node-address`, the Node's), and where they lack a family by the source address of its
    /// default route. Elsewhere that says nothing: the kernel may prefer an address that has just come.
    pub fn lent_addresses(&self, node_addresses: &[IpAddr]) -> impl Iterator<Item = IpAddr> {
        let by_default: Vec<IpAddr> = primary(node_addresses, &self.default_sources).collect();
        let is_lent = move |found: &&InterfaceAddress| {
            let InterfaceAddress { address, prefix, .. } = **found;
            let is_single = IpNet::from(address).prefix_len() == prefix;
            is_single && !address.is_loopback() && !node_addresses.contains(&address) && !by_default.contains(&address)
        };
        self.interfaces.iter().filter(is_lent).map(|found| found.address)
    }

    /// Each address once, however many interfaces have it.
    pub fn addresses(&self) -> BTreeSet<IpAddr> {
        self.interfaces.iter().map(|found| found.address).collect()
    }
}

/// Where node ports are served: one item of `--nodeport-addresses`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodePortSelector {
    /// This node's main address of each family.
    Primary,
    /// 127.0.0.1, and ::1 where `lo` has it.
    Localhost,
    /// All addresses but loopback.
    All,
    /// The interface addresses inside a network.
    Cidr(IpNet),
}

/// Text that is no [`NodePortSelector`].
#[derive(Debug, thiserror::Error)]
#[error("neither a keyword nor a network: write primary, localhost, all, or a CIDR like 192.168.0.0/16")]
pub struct SelectorError;

impl FromStr for NodePortSelector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, SelectorError> {
        match text {
            "primary" => Ok(Self::Primary),
            "localhost" => Ok(Self::Localhost),
            "all" => Ok(Self::All),
            cidr => cidr.parse().map(Self::Cidr).map_err(|_| SelectorError),
        }
    }
}

impl fmt::Display for NodePortSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Primary => f.write_str("primary"),
            Self::Localhost => f.write_str("localhost"),
            Self::All => f.write_str("all"),
            Self::Cidr(cidr) => cidr.fmt(f),
        }
    }
}

/// The addresses that node ports are served on, sorted, each once. None is a legal answer.
///
/// `node_addresses` are the addresses that the node goes by (`--node-address`); where they lack a family, the source
/// address of its default route is `primary`. A list of CIDRs that names one family leaves the other one at `all`, as
/// kube-proxy does, unless it names loopback networks alone: who asks for those does not want the rest opened.
pub fn node_port_addresses(selectors: &[NodePortSelector], host: &Host, node_addresses: &[IpAddr]) -> Vec<IpAddr> {
    let mut chosen: BTreeSet<IpAddr> = BTreeSet::new();
    for selector in selectors {
        match selector {
            NodePortSelector::Primary => chosen.extend(primary(node_addresses, &host.default_sources)),
            NodePortSelector::Localhost => chosen.extend(localhost(host)),
            NodePortSelector::All => chosen.extend(all(host)),
            // A network of everything means all, and that is without loopback.
            NodePortSelector::Cidr(net) if net.prefix_len() == 0 => {
                chosen.extend(all(host).filter(|ip| net.contains(ip)))
            }
            NodePortSelector::Cidr(net) => chosen.extend(host.addresses().into_iter().filter(|ip| net.contains(ip))),
        }
    }
    for family in families_left_at_all(selectors) {
        chosen.extend(all(host).filter(|ip| Family::of(*ip) == family));
    }
    chosen.into_iter().collect()
}

fn families_left_at_all(selectors: &[NodePortSelector]) -> impl Iterator<Item = Family> {
    let nets: Vec<IpNet> = selectors
        .iter()
        .filter_map(|selector| match selector {
            NodePortSelector::Cidr(net) => Some(*net),
            _ => None,
        })
        .collect();
    let cidrs_only = !nets.is_empty() && nets.len() == selectors.len();
    let loopback_only = nets.iter().all(|net| net.network().is_loopback());
    [Family::V4, Family::V6]
        .into_iter()
        .filter(move |family| cidrs_only && !loopback_only && nets.iter().all(|net| Family::of(net.addr()) != *family))
}

fn primary(node_addresses: &[IpAddr], default_sources: &[IpAddr]) -> impl Iterator<Item = IpAddr> {
    [Family::V4, Family::V6].into_iter().filter_map(move |family| {
        let mut candidates = node_addresses.iter().chain(default_sources).copied();
        candidates.find(|ip| Family::of(*ip) == family && !ip.is_loopback() && !ip.is_unspecified())
    })
}

fn localhost(host: &Host) -> impl Iterator<Item = IpAddr> {
    let v6 = IpAddr::V6(Ipv6Addr::LOCALHOST);
    let has_v6 = host.interfaces.iter().any(|found| found.address == v6);
    [IpAddr::V4(Ipv4Addr::LOCALHOST)].into_iter().chain(has_v6.then_some(v6))
}

fn all(host: &Host) -> impl Iterator<Item = IpAddr> {
    host.addresses().into_iter().filter(|ip| !ip.is_loopback())
}

/// What an operator should know of a choice on this machine, where it is not what the words suggest.
pub fn node_port_advice(selectors: &[NodePortSelector], host: &Host, node_addresses: &[IpAddr]) -> Vec<String> {
    let mut advice = Vec::new();
    let chosen = node_port_addresses(selectors, host, node_addresses);
    if chosen.is_empty() {
        advice.push("no address of this machine is among them: no node port is served until one is".to_owned());
    }
    let everything = |selector: &NodePortSelector| match selector {
        NodePortSelector::All => true,
        NodePortSelector::Cidr(net) => net.prefix_len() == 0,
        NodePortSelector::Primary | NodePortSelector::Localhost => false,
    };
    if selectors.iter().any(everything) {
        advice.push(
            "node ports are open on each network that this machine is in: `primary` or CIDRs name some".to_owned(),
        );
    }
    let open: Vec<Family> = chosen.iter().filter(|ip| !ip.is_loopback()).map(|ip| Family::of(*ip)).collect();
    for family in families_of_others(host) {
        if families_left_at_all(selectors).any(|left| left == family) {
            advice.push(format!("no CIDR of {family} is named: its node ports are open on all {family} addresses"));
        } else if !open.is_empty() && !open.contains(&family) {
            advice.push(format!("this machine has {family} addresses, and none of them is among those named"));
        }
    }
    advice
}

/// Families in which others can reach this machine.
fn families_of_others(host: &Host) -> impl Iterator<Item = Family> {
    let of_others: Vec<Family> = all(host).map(Family::of).collect();
    Family::ALL.into_iter().filter(move |family| of_others.contains(family))
}

async fn interface_addresses(handle: &rtnetlink::Handle) -> Result<Vec<InterfaceAddress>, HostError> {
    let failed = |what| move |source| HostError::Dump { what, source: Box::new(source) };
    // Without their counters, which are most of what there is to tell, and slow to add up.
    let links = handle.link().get().set_filter_mask(AddressFamily::Unspec, vec![LinkExtentMask::SkipStats]);
    let links: Vec<_> = links.execute().try_collect().await.map_err(failed("interfaces"))?;
    let messages: Vec<_> = handle.address().get().execute().try_collect().await.map_err(failed("addresses"))?;
    let name = |index: u32| {
        let link = links.iter().find(|link| link.header.index == index)?;
        link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        })
    };
    let found = |message: &AddressMessage| {
        let interface = name(message.header.index).unwrap_or_default();
        let address = own_address(message).filter(|ip| !is_link_local_v6(*ip))?;
        Some(InterfaceAddress { interface, address, prefix: message.header.prefix_len })
    };
    Ok(messages.iter().filter(|message| is_usable(message)).filter_map(found).collect())
}

/// False while it is being found out whether another machine has the address, and where one has it: nobody can listen
/// there. An optimistic address is used meanwhile.
fn is_usable(message: &AddressMessage) -> bool {
    let flags = message.header.flags;
    let in_doubt = flags.contains(AddressHeaderFlags::Tentative) && !flags.contains(AddressHeaderFlags::Optimistic);
    !in_doubt && !flags.contains(AddressHeaderFlags::Dadfailed)
}

/// `IFA_LOCAL` is our end; `IFA_ADDRESS` is the same, or the peer's on a point-to-point link. IPv6 mostly has only the latter.
fn own_address(message: &AddressMessage) -> Option<IpAddr> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    })
}

fn is_link_local_v6(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// Connecting a UDP socket sends nothing, but makes the kernel choose a route and with it a source address.
fn default_route_sources() -> Vec<IpAddr> {
    let documentation: [(IpAddr, IpAddr); 2] = [
        (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::new(198, 51, 100, 1).into()),
        (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()),
    ];
    let source = |(any, remote): (IpAddr, IpAddr)| -> io::Result<IpAddr> {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect((remote, 9))?;
        Ok(socket.local_addr()?.ip())
    };
    // No route of a family is no error: there is no primary address of that family then.
    documentation.into_iter().filter_map(|pair| source(pair).ok()).filter(|ip| !ip.is_loopback()).collect()
}

/// The name of this machine, as a Node goes by it.
pub fn name() -> String {
    rustix::system::uname().nodename().to_string_lossy().trim().to_lowercase()
}

/// Raises this process's soft limit of open descriptors to its hard limit, and returns the limit that holds now.
pub fn raise_open_files() -> io::Result<Option<u64>> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum {
        return Ok(current);
    }
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    Ok(maximum)
}

/// Has the kernel make its table of this process's descriptors large enough for so many, or for as many as the limit
/// allows. Takes 8 bytes of kernel memory each.
///
/// By itself the table doubles each time that it is full. In a process of several threads, who opens a file then waits
/// until none of the others can be reading the old one (a grace period of RCU): milliseconds at a time, be it in the
/// middle of ten thousand binds or of a burst of connections. To be called before there are other threads: then nobody
/// waits. Best effort: without, it is slower.
pub fn make_room_for_open_files(count: u64) {
    let Some(last) = count.min(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)).checked_sub(1) else { return };
    let last = i32::try_from(last).unwrap_or(i32::MAX);
    drop(rustix::io::fcntl_dupfd_cloexec(io::stderr(), last)); // Its number is what counts: the table reaches up to it.
}

#[cfg(test)]
mod tests {
    use super::*;

    const LO4: &str = "127.0.0.1";
    const LO6: &str = "::1";

    fn host(addresses: &[&str]) -> Host {
        let interface = |address: IpAddr| if address.is_loopback() { "lo" } else { "eth0" };
        let found = |text: &&str| {
            let net: IpNet = text.parse().expect("address/prefix");
            InterfaceAddress { interface: interface(net.addr()).into(), address: net.addr(), prefix: net.prefix_len() }
        };
        Host { interfaces: addresses.iter().map(found).collect(), default_sources: ips(&["10.0.0.5"]) }
    }

    fn dual_stack() -> Host {
        host(&["127.0.0.1/8", "::1/128", "10.0.0.5/24", "192.168.7.2/24", "2001:db8::5/64", "fd00::5/64"])
    }

    fn ips(addresses: &[&str]) -> Vec<IpAddr> {
        addresses.iter().map(|text| text.parse().expect("an address")).collect()
    }

    fn chosen(selectors: &str, host: &Host, node_addresses: &[&str]) -> Vec<IpAddr> {
        let selectors: Vec<NodePortSelector> =
            selectors.split(',').map(|text| text.parse().expect("a selector")).collect();
        node_port_addresses(&selectors, host, &ips(node_addresses))
    }

    #[test]
    fn t216_given_all_when_resolved_then_every_address_but_loopback() {
        let expected = ips(&["10.0.0.5", "192.168.7.2", "2001:db8::5", "fd00::5"]);

        assert_eq!(chosen("all", &dual_stack(), &[]), expected);
        assert_eq!(chosen("0.0.0.0/0,::/0", &dual_stack(), &[]), expected);
    }

    #[test]
    fn t216_given_primary_when_resolved_then_the_first_node_address_of_each_family_else_the_default_route() {
        let host = dual_stack();

        assert_eq!(chosen("primary", &host, &["192.168.7.2", "fd00::5", "10.0.0.5"]), ips(&["192.168.7.2", "fd00::5"]));
        assert_eq!(chosen("primary", &host, &["fd00::5"]), ips(&["10.0.0.5", "fd00::5"]));
        assert_eq!(chosen("primary", &host, &["127.0.0.1"]), ips(&["10.0.0.5"]), "a loopback node address is skipped");
    }

    #[test]
    fn t216_given_networks_of_both_families_when_resolved_then_only_addresses_inside() {
        assert_eq!(chosen("10.0.0.0/8,fd00::/8", &dual_stack(), &[]), ips(&["10.0.0.5", "fd00::5"]));
    }

    #[test]
    fn t217_given_networks_of_one_family_when_resolved_then_the_other_behaves_as_all() {
        assert_eq!(chosen("10.0.0.0/8", &dual_stack(), &[]), ips(&["10.0.0.5", "2001:db8::5", "fd00::5"]));
        assert_eq!(
            chosen("10.0.0.0/8,::/0,fd00::/8", &dual_stack(), &[]),
            ips(&["10.0.0.5", "2001:db8::5", "fd00::5"])
        );
    }

    #[test]
    fn t217_given_a_keyword_beside_a_network_when_resolved_then_no_family_is_opened_by_itself() {
        assert_eq!(chosen("localhost,10.0.0.0/8", &dual_stack(), &[]), ips(&["10.0.0.5", LO4, LO6]));
    }

    #[test]
    fn t218_given_loopback_selectors_when_resolved_then_loopback_alone_is_chosen() {
        let host = dual_stack();

        assert_eq!(chosen("localhost", &host, &[]), ips(&[LO4, LO6]));
        assert_eq!(chosen("127.0.0.0/8", &host, &[]), ips(&[LO4]));
        assert_eq!(chosen("primary,localhost", &host, &["10.0.0.5"]), ips(&["10.0.0.5", LO4, LO6]));
    }

    #[test]
    fn t218_given_a_machine_without_v6_when_localhost_is_resolved_then_only_v4() {
        assert_eq!(chosen("localhost", &host(&["127.0.0.1/8"]), &[]), ips(&[LO4]));
    }

    #[test]
    fn t217_t218_given_a_choice_when_it_is_not_what_its_words_suggest_then_that_is_told() {
        let told = |selectors: &str, addresses: &[&str]| {
            let selectors: Vec<NodePortSelector> =
                selectors.split(',').map(|text| text.parse().expect("one")).collect();
            node_port_advice(&selectors, &host(addresses), &[]).join("; ")
        };
        let dual = ["127.0.0.1/8", "::1/128", "10.0.0.5/24", "fd00::5/64"];
        let single = ["127.0.0.1/8", "::1/128", "10.0.0.5/24"];

        assert!(told("10.0.0.0/8", &dual).contains("no CIDR of IPv6"));
        assert!(told("fd00::/8", &dual).contains("no CIDR of IPv4"));
        assert!(told("primary", &dual).contains("none of them is among those named"), "no address of IPv6 is primary");
        assert!(told("172.16.0.0/12", &single).contains("until one is"));
        for everything in ["all", "0.0.0.0/0", "::/0,10.0.0.0/8"] {
            assert!(told(everything, &dual).contains("open on each network"), "{everything}");
        }
        for (fine, addresses) in
            [("10.0.0.0/8,fd00::/8", &dual[..]), ("10.0.0.0/8", &single), ("primary,localhost", &single)]
        {
            assert_eq!(told(fine, addresses), "", "{fine}");
        }
    }

    #[test]
    fn t219_given_no_address_inside_when_resolved_then_the_answer_is_empty() {
        assert_eq!(chosen("172.16.0.0/12,fd99::/16", &dual_stack(), &[]), ips(&[]));
    }

    #[test]
    fn given_a_wildcard_of_either_family_when_expanded_then_each_address_of_both_gets_a_socket() {
        for wildcard in ["0.0.0.0:80", "[::]:80"] {
            let wildcard = wildcard.parse().expect("an address");
            let expanded: Vec<IpAddr> = dual_stack().expand_wildcard(wildcard).iter().map(SocketAddr::ip).collect();
            assert_eq!(expanded, ips(&["10.0.0.5", LO4, "192.168.7.2", LO6, "2001:db8::5", "fd00::5"]));
        }

        let own = "10.0.0.5:80".parse().expect("an address");
        assert_eq!(dual_stack().expand_wildcard(own), [own]);
    }

    #[test]
    fn t123_given_addresses_on_lo_when_asked_then_those_of_services_are_not_the_nodes_own() {
        let on_lo = ["198.51.100.7/32", "2001:db8:7::7/128", "192.0.2.9/32"].map(|text| {
            let net: IpNet = text.parse().expect("address/prefix");
            InterfaceAddress { interface: "lo".into(), address: net.addr(), prefix: net.prefix_len() }
        });
        let mut host = dual_stack();
        let own: Vec<IpAddr> = host.own_addresses().collect();
        assert_eq!(own.len(), host.interfaces.len());

        host.interfaces.extend(on_lo);
        host.default_sources = ips(&["192.0.2.9"]); // As routers have it: the node goes by an address on lo.

        assert_eq!(host.own_addresses().collect::<Vec<_>>(), [own, ips(&["192.0.2.9"])].concat());
    }

    #[test]
    fn t123_given_addresses_of_single_hosts_when_asked_then_they_are_lent_unless_the_node_goes_by_them() {
        let host =
            host(&["127.0.0.1/8", "::1/128", "10.0.0.5/32", "10.0.0.6/24", "198.51.100.7/32", "2001:db8::7/128"]);

        let lent = |node_addresses: &[&str]| host.lent_addresses(&ips(node_addresses)).collect::<Vec<_>>();
        assert_eq!(lent(&[]), ips(&["198.51.100.7", "2001:db8::7"]));
        assert_eq!(lent(&["2001:db8::7"]), ips(&["198.51.100.7"]));
        assert_eq!(
            lent(&["10.0.0.6", "198.51.100.7"]),
            ips(&["10.0.0.5", "2001:db8::7"]),
            "whatever the default route"
        );
    }

    #[test]
    fn given_addresses_in_doubt_when_read_then_only_those_count_that_can_be_bound() {
        let with = |flags: AddressHeaderFlags| {
            let mut message = AddressMessage::default();
            message.header.flags = flags | AddressHeaderFlags::Permanent;
            is_usable(&message)
        };

        assert!(with(AddressHeaderFlags::empty()) && with(AddressHeaderFlags::Deprecated));
        assert!(with(AddressHeaderFlags::Tentative | AddressHeaderFlags::Optimistic));
        assert!(!with(AddressHeaderFlags::Tentative));
        assert!(!with(AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed));
        assert!(!with(AddressHeaderFlags::Dadfailed | AddressHeaderFlags::Optimistic));
    }

    #[tokio::test]
    async fn given_this_machine_when_read_then_loopback_is_among_its_addresses() {
        let host = match Host::read().await {
            Ok(host) => host,
            Err(error) => return eprintln!("skipped, no rtnetlink here: {error}"),
        };

        assert!(host.interfaces.iter().any(|found| found.interface == "lo" && found.address.is_loopback()), "{host:?}");
        assert!(!host.interfaces.iter().any(|found| is_link_local_v6(found.address)), "{host:?}");
    }

    #[test]
    fn given_this_process_when_the_limit_is_raised_then_soft_equals_hard() {
        let limit = raise_open_files().expect("raising to the hard limit needs no right");

        assert_eq!(limit, getrlimit(Resource::Nofile).maximum);
    }

    #[test]
    fn given_room_for_open_files_when_made_then_the_kernels_table_is_as_large_and_none_stays_open() {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let wanted = limit.min(20_000);

        make_room_for_open_files(wanted);
        make_room_for_open_files(0);

        let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
        let slots = status.lines().find_map(|line| line.strip_prefix("FDSize:")).expect("a size").trim();
        assert!(slots.parse::<u64>().expect("a number") >= wanted, "{slots}");
        assert!(!std::path::Path::new(&format!("/proc/self/fd/{}", wanted - 1)).exists());
    }

    #[test]
    fn given_nonsense_when_read_as_a_selector_then_the_error_lists_what_is_right() {
        let error = "eth0".parse::<NodePortSelector>().expect_err("no interface names");

        assert!(error.to_string().contains("primary, localhost, all, or a CIDR"), "{error}");
    }
}
