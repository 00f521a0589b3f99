//! Who may reach a Service from outside: `--allow-from`, and the annotation `kube-relay.dev/allow-from`.
//!
//! Only the question of who is let in is answered here. What counts as outside is said by `config`, and how others are
//! kept out is up to `serve`. Kubernetes' own list, which is for load-balancer addresses and asks everybody, is
//! `source_ranges`.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::model::Service;
use crate::name::Family;
use crate::problem::Problem;
use crate::value::network;

const ANNOTATION: &str = "allow-from";

/// Wrong entries that are named; of more, only how many there are.
const NAMED_ENTRIES: usize = 3;
/// Of one that is longer, so many characters are shown.
const SHOWN: usize = 48;

/// The clients from outside that are let in, at every listener of a Service. This node and its pods are in no list, and
/// let in by every one.
///
/// A list of nothing lets nobody in, and one without a network of a family nobody of that family: who writes a list means
/// to keep others out, so a mistake in it must not open it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowFrom {
    /// Sorted, and none touches or overlaps another, as is the other list.
    v4: Arc<[IpNet]>,
    v6: Arc<[IpNet]>,
}

impl AllowFrom {
    /// The clients in some networks, of both families.
    pub fn new(nets: &[IpNet]) -> Self {
        let of_family = |family| {
            let nets: Vec<_> = nets.iter().filter(|net| Family::of(net.addr()) == family).copied().collect();
            IpNet::aggregate(&nets).into()
        };
        Self { v4: of_family(Family::V4), v6: of_family(Family::V6) }
    }

    /// Who may come to a Service: whom both its annotation and the list of this process let in. `None`: everybody.
    ///
    /// The annotation never widens what the process allows, as who may edit a Service need not be who answers for the
    /// node. What of it cannot be read is a problem, and lets nobody in.
    pub(crate) fn of(service: &Service, process: Option<&Self>, problems: &mut Vec<Problem>) -> Option<Self> {
        let Some(text) = service.annotations.get(ANNOTATION) else { return process.cloned() };
        let own = Self::read(text, service, problems);
        let Some(process) = process else { return Some(own) };
        let both = Self { v4: shared(&own.v4, &process.v4), v6: shared(&own.v6, &process.v6) };
        if both.is_nobody() && !own.is_nobody() {
            let text = "--allow-from lets in nobody whom it names, so no client from outside is served";
            problems.push(Problem::note(format_args!("Service {}", service.name), "annotation", described(text)));
        }
        Some(both)
    }

    /// The networks of one family: sorted, none within another. Empty: nobody of that family is let in.
    pub(crate) fn at(&self, family: Family) -> Arc<[IpNet]> {
        match family {
            Family::V4 => Arc::clone(&self.v4),
            Family::V6 => Arc::clone(&self.v6),
        }
    }

    /// The networks of both families, for where balancers in front tell who a client is: sorted, none within another.
    pub(crate) fn of_both_families(&self) -> Arc<[IpNet]> {
        self.v4.iter().chain(&*self.v6).copied().collect()
    }

    fn is_nobody(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }

    fn read(text: &str, service: &Service, problems: &mut Vec<Problem>) -> Self {
        let entries = || text.split(',').map(str::trim);
        let nets: Vec<_> = entries().filter_map(|entry| network(entry).ok()).collect();
        let wrong: Vec<_> = entries().filter(|entry| network(entry).is_err()).collect();
        if !wrong.is_empty() {
            let outcome = if nets.is_empty() { ", and no client from outside is served" } else { "" };
            let text = format!("{} not used: write addresses and networks{outcome}", named(&wrong));
            problems.push(Problem::error(format_args!("Service {}", service.name), "annotation", described(&text)));
        }
        Self::new(&nets)
    }
}

fn described(text: &str) -> String {
    format!("annotation kube-relay.dev/{ANNOTATION}: {text}")
}

/// `"a" is`, `"a", "b" are`, `"a", "b", "c" and 4 more are`.
fn named(entries: &[&str]) -> String {
    let shown: Vec<_> = entries.iter().take(NAMED_ENTRIES).map(|entry| shown(entry)).collect();
    match entries.len() - shown.len() {
        0 if shown.len() == 1 => format!("{} is", shown[0]),
        0 => format!("{} are", shown.join(", ")),
        more => format!("{} and {more} more are", shown.join(", ")),
    }
}

fn shown(entry: &str) -> String {
    match entry.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{:?}…", &entry[..end]),
        None => format!("{entry:?}"),
    }
}

/// True where an address is in one of these networks of its family, sorted and with none within another: in steps that grow
/// with the length's logarithm, as a stranger can have this asked for each datagram.
pub(crate) fn within(nets: &[IpNet], address: IpAddr) -> bool {
    let before = nets.partition_point(|net| net.network() <= address);
    before.checked_sub(1).is_some_and(|last| nets[last].contains(&address))
}

/// The addresses that are in both of two lists, each sorted and with none within another.
fn shared(one: &[IpNet], other: &[IpNet]) -> Arc<[IpNet]> {
    let (mut left, mut right) = (one.iter().peekable(), other.iter().peekable());
    let mut both = Vec::new();
    while let (Some(&a), Some(&b)) = (left.peek(), right.peek()) {
        // Of two networks one is within the other, or they have nothing in common.
        if a.contains(b) {
            both.push(*b);
            right.next();
        } else if b.contains(a) {
            both.push(*a);
            left.next();
        } else if a < b {
            left.next();
        } else {
            right.next();
        }
    }
    both.into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(nets: &[&str]) -> AllowFrom {
        AllowFrom::new(&nets.iter().map(|net| network(net).expect("a network")).collect::<Vec<_>>())
    }

    /// Who may come by an annotation and a list of the process, and what is said of it.
    fn read(annotation: Option<&str>, process: Option<&AllowFrom>) -> (Option<AllowFrom>, Vec<String>) {
        let mut service = Service::new("default/web");
        service.annotations.extend(annotation.map(|text| (ANNOTATION.into(), text.into())));
        let mut problems = Vec::new();
        let allowed = AllowFrom::of(&service, process, &mut problems);
        (allowed, problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn given_an_annotation_when_read_then_addresses_and_networks_of_both_families_count() {
        let text = "203.0.113.7, 198.51.100.0/24,2001:db8::/32 , 010.001.000.001";

        let (allowed, problems) = read(Some(text), None);

        let allowed = allowed.expect("a list");
        assert_eq!(problems, [] as [&str; 0]);
        let shown = |family| allowed.at(family).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(shown(Family::V4), ["10.1.0.1/32", "198.51.100.0/24", "203.0.113.7/32"]);
        assert_eq!(shown(Family::V6), ["2001:db8::/32"]);
    }

    #[test]
    fn given_no_annotation_when_asked_then_the_list_of_the_process_counts_or_everybody_may_come() {
        let process = list(&["203.0.113.0/24"]);

        assert_eq!(read(None, Some(&process)), (Some(process), vec![]));
        assert_eq!(read(None, None), (None, vec![]));
    }

    #[test]
    fn given_entries_that_cannot_be_read_when_read_then_the_others_count_and_those_are_named() {
        let (allowed, problems) = read(Some("10.0.0.0/33,203.0.113.7,,web,10.0.0.300"), None);

        assert_eq!(allowed, Some(list(&["203.0.113.7"])));
        let said = "Service default/web: annotation kube-relay.dev/allow-from: \"10.0.0.0/33\", \"\", \"web\" and 1 more \
                    are not used: write addresses and networks";
        assert_eq!(problems, [said]);
    }

    #[test]
    fn given_an_entry_without_end_when_read_then_its_beginning_is_named() {
        let (_, problems) = read(Some(&"ä".repeat(100_000)), None);

        assert!(problems[0].len() < 300 && problems[0].contains("ä\"… is not used"), "{problems:?}");
    }

    #[test]
    fn given_a_list_without_an_entry_that_can_be_read_when_read_then_nobody_is_let_in() {
        for text in ["", " ", "everybody", "0.0.0.0/0/0", "*"] {
            let (allowed, problems) = read(Some(text), None);

            assert_eq!(allowed, Some(AllowFrom::default()), "{text:?}");
            assert_eq!(problems.len(), 1, "{text:?}");
            assert!(problems[0].ends_with("and no client from outside is served"), "{problems:?}");
        }
    }

    #[test]
    fn given_both_lists_when_asked_then_each_has_to_let_a_client_in() {
        let process = list(&["10.0.0.0/8", "203.0.113.7"]);

        let (allowed, problems) = read(Some("10.1.0.0/16, 203.0.113.0/24, 192.0.2.1"), Some(&process));

        assert_eq!((allowed, problems), (Some(list(&["10.1.0.0/16", "203.0.113.7"])), vec![]));
    }

    #[test]
    fn given_lists_with_nobody_in_common_when_asked_then_nobody_is_let_in_and_that_is_said() {
        let (allowed, problems) = read(Some("192.0.2.0/24"), Some(&list(&["10.0.0.0/8"])));

        assert_eq!(allowed, Some(AllowFrom::default()));
        assert_eq!(problems.len(), 1);
        assert!(problems[0].contains("--allow-from lets in nobody whom it names"), "{problems:?}");
    }

    #[test]
    fn given_a_list_of_one_family_when_asked_for_the_other_then_nobody_of_it_is_let_in() {
        assert_eq!(list(&["10.0.0.0/8"]).at(Family::V6), [].into());
    }

    /// Networks near each other, so that many overlap.
    fn nets() -> impl Strategy<Value = Vec<IpNet>> {
        let net = (any::<u8>(), 24_u8..=32)
            .prop_map(|(host, bits)| IpNet::new([10, 0, 0, host].into(), bits).expect("a prefix that fits").trunc());
        prop::collection::vec(net, 0..8)
    }

    proptest! {
        #[test]
        fn given_two_lists_when_combined_then_an_address_is_in_both_or_in_none(one in nets(), other in nets()) {
            let both = shared(&AllowFrom::new(&one).v4, &AllowFrom::new(&other).v4);

            prop_assert!(both.is_sorted());
            for host in 0..=255 {
                let address = IpAddr::from([10, 0, 0, host]);
                let is_in = |nets: &[IpNet]| nets.iter().any(|net| net.contains(&address));
                prop_assert_eq!(within(&both, address), is_in(&one) && is_in(&other));
            }
        }
    }
}
