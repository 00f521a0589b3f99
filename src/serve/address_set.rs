//! Sets of addresses of one family, of which unions and intersections can be made.
//!
//! Pure. What becomes of such a set in the kernel is `filter`.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::name::Family;

/// A set of IPv4 or of IPv6 addresses.
///
/// Written as the addresses at which, counting up from the lowest, membership changes. A set that reaches to the
/// highest address just does not change back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AddressSet {
    family: Family,
    /// Strictly increasing.
    flips: Vec<u128>,
}

impl AddressSet {
    /// All addresses of a family, or none.
    pub(super) fn all_or_none(family: Family, all: bool) -> Self {
        Self { family, flips: if all { vec![0] } else { vec![] } }
    }

    /// The addresses of some networks; those of the other family have none.
    pub(super) fn of(family: Family, nets: &[IpNet]) -> Self {
        let of_family = nets.iter().filter(|net| Family::of(net.addr()) == family);
        // Aggregated they are sorted, and none touches or overlaps another.
        let nets = IpNet::aggregate(&of_family.copied().collect::<Vec<_>>());
        let mut flips = Vec::with_capacity(nets.len() * 2);
        for net in nets {
            let (first, last) = (number(net.network()), number(net.broadcast()));
            if flips.last() == Some(&first) {
                flips.pop(); // It goes on where the one before ends.
            } else {
                flips.push(first);
            }
            flips.extend((last < highest(family)).then(|| last + 1));
        }
        Self { family, flips }
    }

    /// The addresses of which `keeps` is true, told whether they are in this set and in the other one.
    pub(super) fn combine(&self, other: &Self, keeps: impl Fn(bool, bool) -> bool) -> Self {
        debug_assert_eq!(self.family, other.family);
        let mut points: Vec<u128> = [0].into_iter().chain(self.flips.iter().chain(&other.flips).copied()).collect();
        points.sort_unstable();
        points.dedup();
        let mut member = false;
        points.retain(|point| {
            let before = member;
            member = keeps(self.has(*point), other.has(*point));
            member != before
        });
        Self { family: self.family, flips: points }
    }

    /// True where every address is in it.
    pub(super) fn is_everybody(&self) -> bool {
        self.flips == [0]
    }

    /// The family of its addresses.
    pub(super) fn family(&self) -> Family {
        self.family
    }

    /// The addresses, as numbers, at which membership changes, in their order. Below the first nobody is in it.
    pub(super) fn flips(&self) -> &[u128] {
        &self.flips
    }

    fn has(&self, address: u128) -> bool {
        self.flips.partition_point(|flip| *flip <= address) % 2 == 1
    }
}

/// An address as the number that it is on the wire.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn highest(family: Family) -> u128 {
    match family {
        Family::V4 => u32::MAX.into(),
        Family::V6 => u128::MAX,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Networks that often touch, overlap and reach the ends of their family.
    pub(in crate::serve) fn nets(family: Family) -> impl Strategy<Value = Vec<IpNet>> {
        let net = (any::<[u8; 16]>(), 0_u8..=128, any::<bool>()).prop_map(move |(bytes, prefix, near)| {
            // Near ones differ in the last bits of the first and the last word alone.
            let mask = if near { 0xc000_0000_0000_0000_0000_0000_0000_0007 } else { u128::MAX };
            let bits = u128::from_be_bytes(bytes) & mask;
            let net = match family {
                Family::V4 => {
                    let near = (bits >> 96) as u32 | (bits as u32 & 7);
                    IpNet::new(IpAddr::from(near.to_be_bytes()), prefix.min(32))
                }
                Family::V6 => IpNet::new(IpAddr::from(bits.to_be_bytes()), prefix),
            };
            net.expect("a prefix that fits").trunc()
        });
        prop::collection::vec(net, 0..12)
    }

    /// The addresses at and around the ends of networks: where a mistake would show.
    pub(in crate::serve) fn telling(family: Family, nets: &[IpNet]) -> Vec<IpAddr> {
        let ends = nets.iter().flat_map(|net| [number(net.network()), number(net.broadcast())]);
        let around = ends.flat_map(|end| [end.saturating_sub(1), end, end.saturating_add(1).min(highest(family))]);
        around.chain([0, highest(family), highest(family) / 3]).map(|number| address(family, number)).collect()
    }

    fn address(family: Family, number: u128) -> IpAddr {
        match family {
            Family::V4 => IpAddr::from((number as u32).to_be_bytes()),
            Family::V6 => IpAddr::from(number.to_be_bytes()),
        }
    }

    fn within(nets: &[IpNet], address: &IpAddr) -> bool {
        nets.iter().any(|net| net.contains(address))
    }

    proptest! {
        #[test]
        fn given_networks_when_combined_then_each_address_is_judged_as_by_looking_through_them(
            (family, a, b) in prop_oneof![Just(Family::V4), Just(Family::V6)]
                .prop_flat_map(|family| (Just(family), nets(family), nets(family))),
        ) {
            let (set, other) = (AddressSet::of(family, &a), AddressSet::of(family, &b));
            let (both, outside) = (set.combine(&other, |a, b| a && b), set.combine(&other, |a, b| !a || b));

            prop_assert!(both.flips.is_sorted_by(|a, b| a < b));
            for address in telling(family, &[a.clone(), b.clone()].concat()) {
                let (in_a, in_b) = (within(&a, &address), within(&b, &address));
                prop_assert_eq!(set.has(number(address)), in_a, "{}", address);
                prop_assert_eq!(both.has(number(address)), in_a && in_b, "{}", address);
                prop_assert_eq!(outside.has(number(address)), !in_a || in_b, "{}", address);
            }
        }
    }

    #[test]
    fn given_networks_that_are_everything_together_when_made_a_set_then_it_is_everybody() {
        let halves = ["0.0.0.0/1", "128.0.0.0/1", "2001:db8::/32"].map(|net| net.parse().expect("a net"));

        assert!(AddressSet::of(Family::V4, &halves).is_everybody());
        assert!(AddressSet::all_or_none(Family::V6, true).is_everybody());
        assert!(!AddressSet::of(Family::V6, &halves).is_everybody());
    }
}
