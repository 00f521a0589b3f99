//! Who may come to a listener, and whether from this node and its pods or from outside; and who has to say first for whom it
//! comes.
//!
//! The rules for one client: the data plane asks for each, and `explain` tells of them. The same for the kernel, as a program,
//! is `serve::filter`; what a side gets then is the plan's to say.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::allow_from;

/// What a listener knows of its clients. All networks are of its family, or of both where balancers in front name the clients.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entrance<'a> {
    /// Who may come at all, on either side; empty: everybody.
    pub(crate) source_ranges: &'a [IpNet],
    /// What counts as inside, see [`inside_at`].
    pub(crate) inside_of: &'a [IpNet],
    /// Who may come from outside. `None`: everybody, empty: nobody. Sorted, none within another.
    pub(crate) allow_from: Option<&'a [IpNet]>,
}

/// Where a client comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// From this node or one of its pods.
    Inside,
    /// From anywhere else.
    Outside,
}

/// A list that a client is not in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum List {
    /// `spec.loadBalancerSourceRanges`.
    SourceRanges,
    /// The annotation `kube-relay.dev/allow-from`, and `--allow-from`.
    AllowFrom,
}

/// Whom a connection is of, as far as its peer's address tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// The peer is the client.
    InPerson,
    /// The peer is a balancer in front: the PROXY header that it begins with tells who the client is.
    Announced,
    /// Balancers in front tell who a client is, and the peer is none of them: what it says is not even heard.
    Unannounced,
}

impl Arrival {
    /// `balancers`: those in front of the listener, sorted, none within another; `None`: nobody is asked who a client is.
    pub(crate) fn of(peer: IpAddr, balancers: Option<&[IpNet]>) -> Self {
        match balancers {
            None => Self::InPerson,
            Some(balancers) if allow_from::within(balancers, peer) => Self::Announced,
            Some(_) => Self::Unannounced,
        }
    }
}

impl Entrance<'_> {
    /// The side on which a client is let in.
    ///
    /// # Errors
    /// The first list that keeps it out.
    pub(crate) fn admit(&self, client: IpAddr) -> Result<Origin, List> {
        if !self.source_ranges.is_empty() && !has(self.source_ranges, client) {
            return Err(List::SourceRanges);
        }
        match self.origin(client) {
            Origin::Outside if self.allow_from.is_some_and(|nets| !allow_from::within(nets, client)) => {
                Err(List::AllowFrom)
            }
            origin => Ok(origin),
        }
    }

    /// Where a client comes from, let in or not.
    pub(crate) fn origin(&self, client: IpAddr) -> Origin {
        if has(self.inside_of, client) { Origin::Inside } else { Origin::Outside }
    }
}

/// What counts as inside at an address: this node and its pods, and the address itself. That is the source of a program on
/// this node that connects to an address which is local by a route alone.
pub(crate) fn inside_at(inside: &[IpNet], address: IpAddr) -> impl Iterator<Item = IpNet> {
    inside.iter().copied().chain([address.into()])
}

fn has(nets: &[IpNet], client: IpAddr) -> bool {
    nets.iter().any(|net| net.contains(&client))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets<const N: usize>(texts: [&str; N]) -> Vec<IpNet> {
        texts.map(|text| text.parse().expect("a net")).to_vec()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn given_both_lists_when_clients_come_then_the_ranges_bind_everybody_and_the_other_list_those_from_outside() {
        let (ranges, inside) = (nets(["10.0.0.0/8", "203.0.113.0/24"]), nets(["10.244.0.0/16"]));
        let allowed = nets(["203.0.113.0/25"]);
        let entrance = Entrance { source_ranges: &ranges, inside_of: &inside, allow_from: Some(&allowed) };
        let cases = [
            ("10.244.0.7", Ok(Origin::Inside)),
            ("203.0.113.9", Ok(Origin::Outside)),
            ("203.0.113.200", Err(List::AllowFrom)),
            ("10.0.0.9", Err(List::AllowFrom)),
            ("198.51.100.1", Err(List::SourceRanges)),
        ];
        for (client, expected) in cases {
            assert_eq!(entrance.admit(ip(client)), expected, "{client}");
        }
        let nobody = Entrance { source_ranges: &[], allow_from: Some(&[]), ..entrance };
        assert_eq!(nobody.admit(ip("10.244.0.7")), Ok(Origin::Inside));
        assert_eq!(nobody.admit(ip("203.0.113.9")), Err(List::AllowFrom));
    }

    #[test]
    fn given_peers_when_they_arrive_then_only_balancers_in_front_are_asked_for_whom() {
        let (balancer, other) = (ip("10.0.0.9"), ip("10.244.0.7"));
        let in_front = nets(["10.0.0.8/30"]);

        let arrivals = |balancers: Option<&[IpNet]>| [balancer, other].map(|peer| Arrival::of(peer, balancers));

        assert_eq!(arrivals(None), [Arrival::InPerson; 2]);
        assert_eq!(arrivals(Some(&in_front)), [Arrival::Announced, Arrival::Unannounced]);
        assert_eq!(arrivals(Some(&[])), [Arrival::Unannounced; 2], "nobody is believed");
    }

    #[test]
    fn given_clients_of_both_families_when_a_balancer_names_them_then_each_is_judged_by_networks_of_its_own() {
        let (inside, allowed) = (nets(["10.244.0.0/16", "fd00:244::/64"]), nets(["203.0.113.0/24", "2001:db8::/64"]));
        let entrance = Entrance { source_ranges: &[], inside_of: &inside, allow_from: Some(&allowed) };

        assert_eq!(entrance.admit(ip("fd00:244::7")), Ok(Origin::Inside));
        assert_eq!(entrance.admit(ip("2001:db8::9")), Ok(Origin::Outside));
        assert_eq!(entrance.admit(ip("2001:db8:1::9")), Err(List::AllowFrom));
    }

    #[test]
    fn given_a_program_of_this_node_when_its_source_is_the_address_it_connects_to_then_it_is_inside() {
        let service: Vec<_> = inside_at(&nets(["127.0.0.0/8"]), ip("10.96.0.10")).collect();
        let entrance = Entrance { source_ranges: &[], inside_of: &service, allow_from: Some(&[]) };

        assert_eq!(entrance.admit(ip("10.96.0.10")), Ok(Origin::Inside));
        assert_eq!(entrance.admit(ip("10.96.0.11")), Err(List::AllowFrom));
    }
}
