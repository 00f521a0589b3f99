//! Which addresses may be endpoints at all.
//!
//! Whoever may write an EndpointSlice could otherwise reach, through this process, what listens on the
//! node only for itself (CVE-2021-25737), or what admits the node alone (CVE-2021-25740). What is chosen among the admitted
//! is decided in `endpoints`.

use std::borrow::Cow;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::{Endpoint, Slice};
use crate::name::Family;
use crate::plan::PlanOptions;
use crate::problem::Problem;

/// What endpoints have to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Demands<'o> {
    allow_loopback: bool,
    /// Inside one of these; empty: anywhere.
    networks: &'o [IpNet],
    /// Those of a pod.
    pods_only: bool,
}

impl<'o> Demands<'o> {
    pub(crate) fn of(options: &'o PlanOptions) -> Self {
        Self {
            allow_loopback: options.allow_loopback_endpoints,
            networks: &options.endpoint_cidrs,
            pods_only: options.require_target_ref,
        }
    }
}

/// The slices without the endpoints that are refused, and a problem for each slice and cause.
pub(crate) fn admit<'a>(
    slices: impl Iterator<Item = &'a Slice>,
    demands: Demands<'_>,
) -> (Vec<Cow<'a, Slice>>, Vec<Problem>) {
    let mut problems = Vec::new();
    let admitted = slices
        .map(|slice| {
            let refused =
                |endpoint: &Endpoint| Refusal::of(endpoint.address, endpoint.pod.is_some(), slice.family, demands);
            if slice.endpoints.iter().all(|endpoint| refused(endpoint).is_none()) {
                return Cow::Borrowed(slice);
            }
            problems.extend(report(slice, refused));
            let mut rest = slice.clone();
            rest.endpoints.retain(|endpoint| refused(endpoint).is_none());
            Cow::Owned(rest)
        })
        .collect();
    (admitted, problems)
}

/// True where an address of a slice of that family cannot be an endpoint. `is_pod`: it names a pod.
pub(crate) fn refuses(address: IpAddr, is_pod: bool, family: Family, demands: Demands<'_>) -> bool {
    Refusal::of(address, is_pod, family, demands).is_some()
}

/// Why something cannot be an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    Family,
    Unspecified,
    Loopback,
    LinkLocal,
    Multicast,
    Broadcast,
    Outside,
    NoPod,
}

impl Refusal {
    const ALL: [Self; 8] = [
        Self::Family,
        Self::Unspecified,
        Self::Loopback,
        Self::LinkLocal,
        Self::Multicast,
        Self::Broadcast,
        Self::Outside,
        Self::NoPod,
    ];

    fn of(address: IpAddr, is_pod: bool, family: Family, demands: Demands<'_>) -> Option<Self> {
        let Demands { allow_loopback, networks, pods_only } = demands;
        if Family::of(address) != family {
            return Some(Self::Family);
        }
        let is_outside = !networks.is_empty() && !networks.iter().any(|network| network.contains(&address));
        // `::ffff:127.0.0.1` is loopback for the kernel.
        let address = address.to_canonical();
        let (link_local, broadcast) = match address {
            IpAddr::V4(v4) => (v4.is_link_local(), v4.is_broadcast()),
            IpAddr::V6(v6) => (v6.is_unicast_link_local(), false),
        };
        let causes = [
            (address.is_unspecified(), Self::Unspecified),
            (address.is_loopback() && !allow_loopback, Self::Loopback),
            (link_local, Self::LinkLocal),
            (address.is_multicast(), Self::Multicast),
            (broadcast, Self::Broadcast),
            (is_outside, Self::Outside),
            (pods_only && !is_pod, Self::NoPod),
        ];
        causes.into_iter().find_map(|(applies, cause)| applies.then_some(cause))
    }

    fn reason(self) -> &'static str {
        if self == Self::Family { "family" } else { "denied_address" }
    }

    fn explain(self, family: Family) -> String {
        match self {
            Self::Family => format!("is not of the slice's addressType {family}"),
            Self::Unspecified => "is the unspecified address".into(),
            Self::Loopback => "is a loopback address, which endpoints of a cluster may not have".into(),
            Self::LinkLocal => "is a link-local address, which has no meaning off its link".into(),
            Self::Multicast => "is a multicast address".into(),
            Self::Broadcast => "is the broadcast address".into(),
            Self::Outside => "is in none of --endpoint-cidrs".into(),
            Self::NoPod => "has no targetRef to a pod, which --require-target-ref asks for".into(),
        }
    }
}

/// One problem for each cause, however many endpoints share it.
fn report(slice: &Slice, refused: impl Fn(&Endpoint) -> Option<Refusal>) -> Vec<Problem> {
    let problem = |cause: Refusal| {
        let mut refused = slice.endpoints.iter().filter(|endpoint| refused(endpoint) == Some(cause));
        let first = refused.next()?.address;
        let more = refused.count();
        let others = if more == 0 { String::new() } else { format!(" ({more} more like it)") };
        let message = format!("endpoint {first} {}: not used{others}", cause.explain(slice.family));
        Some(Problem::error(&slice.name, cause.reason(), message))
    };
    Refusal::ALL.into_iter().filter_map(problem).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Service;

    fn slice(addresses: &[&str]) -> Slice {
        let endpoints = addresses.iter().map(|ip| Endpoint::new(ip.parse::<IpAddr>().expect("an address")));
        endpoints.fold(Slice::new("web-1", &Service::new("default/web")), Slice::endpoint)
    }

    fn admitted(slice: &Slice, allow_loopback: bool) -> (Vec<String>, Vec<Problem>) {
        let demands = Demands { allow_loopback, networks: &[], pods_only: false };
        let (slices, problems) = admit([slice].into_iter(), demands);
        let addresses = slices.iter().flat_map(|slice| &slice.endpoints).map(|e| e.address.to_string()).collect();
        (addresses, problems)
    }

    #[test]
    fn given_addresses_that_mean_the_node_itself_when_admitted_then_they_are_refused_and_named() {
        let slice = slice(&["10.0.0.1", "127.0.0.1", "127.0.0.2", "169.254.169.254", "224.0.0.1", "0.0.0.0"]);

        let (addresses, problems) = admitted(&slice, false);

        assert_eq!(addresses, ["10.0.0.1"]);
        assert_eq!(problems.len(), 4);
        assert!(problems.iter().all(|problem| problem.reason == "denied_address"));
        let loopback = problems.iter().find(|problem| problem.message.contains("127.0.0.1")).expect("a problem");
        assert_eq!(loopback.object, "EndpointSlice default/web-1");
        assert!(loopback.message.contains("(1 more like it)"), "{}", loopback.message);
    }

    #[test]
    fn given_the_static_mode_when_an_endpoint_is_loopback_then_it_is_admitted_and_others_stay_refused() {
        let slice = slice(&["127.0.0.1", "255.255.255.255"]);

        let (addresses, problems) = admitted(&slice, true);

        assert_eq!(addresses, ["127.0.0.1"]);
        assert_eq!(problems.len(), 1);
    }

    #[test]
    fn given_a_mapped_loopback_address_when_admitted_then_the_mapping_does_not_hide_it() {
        let mut slice = slice(&["::ffff:127.0.0.1", "fe80::1", "fd00::1"]);
        slice.family = Family::V6;

        assert_eq!(admitted(&slice, false).0, ["fd00::1"]);
    }

    #[test]
    fn given_that_endpoints_have_to_be_pods_when_one_names_none_then_it_is_refused_and_named() {
        let mut slice = slice(&["10.0.0.1", "10.0.0.2"]);
        slice.endpoints[0].pod = Some("web-0".into());

        let demands = Demands { allow_loopback: false, networks: &[], pods_only: true };
        let (slices, problems) = admit([&slice].into_iter(), demands);

        let addresses: Vec<_> = slices[0].endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
        assert_eq!((addresses, problems.len()), (vec!["10.0.0.1".to_owned()], 1));
        let refused = "endpoint 10.0.0.2 has no targetRef to a pod, which --require-target-ref asks for: not used";
        assert_eq!((&*problems[0].reason, &*problems[0].message), ("denied_address", refused));
    }

    #[test]
    fn given_networks_of_endpoints_when_one_is_outside_then_it_is_refused_and_named() {
        let networks = ["10.0.0.0/24", "fd00::/64"].map(|network| network.parse().expect("a network"));
        let slice = slice(&["10.0.0.1", "10.0.1.1", "192.0.2.1"]);

        let demands = Demands { allow_loopback: false, networks: &networks, pods_only: false };
        let (slices, problems) = admit([&slice].into_iter(), demands);

        let addresses: Vec<_> = slices[0].endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
        assert_eq!(addresses, ["10.0.0.1"]);
        assert_eq!((problems.len(), &*problems[0].reason), (1, "denied_address"));
        assert_eq!(problems[0].message, "endpoint 10.0.1.1 is in none of --endpoint-cidrs: not used (1 more like it)");
    }

    #[test]
    fn t049_given_an_ipv6_address_in_an_ipv4_slice_when_admitted_then_it_is_skipped_with_a_problem() {
        let slice = slice(&["10.0.0.1", "fd00::1"]);

        let (addresses, problems) = admitted(&slice, true);

        assert_eq!(addresses, ["10.0.0.1"]);
        assert_eq!(problems[0].reason, "family");
    }
}
