//! Whom the backends of a Service see, by who its client is and where that comes in: as it is, and with each choice.
//!
//! Pure; made from a report, so that `status` and `explain` say it of a running relay. Why it is so is in `serve::preserve`
//! and, for headers, in `serve::introduction`. Where balancers in front name clients, the clients are those.

use std::collections::BTreeSet;
use std::fmt;

use crate::name::Scope;
use crate::plan::{ListenerKind, SourceAddress};
use crate::status::ServiceReport;

/// Where a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientPlace {
    /// A pod of this node.
    PodHere,
    /// A pod of another node that counts as one of this node's here: its address is in what `--cluster-cidr` names.
    PodElsewhere,
    /// Elsewhere: outside the cluster, another node, or a pod there whose address is not in it.
    Elsewhere,
    /// This node itself: a process on it, or a pod with `hostNetwork`.
    Node,
}

impl ClientPlace {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::PodHere, Self::PodElsewhere, Self::Elsewhere, Self::Node];

    /// True where it counts as this node and its pods.
    pub fn is_inside(self) -> bool {
        self != Self::Elsewhere
    }
}

impl fmt::Display for ClientPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PodHere => "pod of this node",
            Self::PodElsewhere => "other pod in --cluster-cidr",
            Self::Elsewhere => "outside, other nodes",
            Self::Node => "this node",
        })
    }
}

/// Whose address a backend sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// One of this node.
    Node,
    /// The client's.
    Client,
    /// The client's, unless the backend is this node itself, as a pod with `hostNetwork` is here.
    ClientOffHost,
    /// The client's, unless the backend is this node itself, or on one link with the client, as on a bridge.
    ClientOffLink,
    /// The client's, where the backend is on this node and not the node itself, or else has its way back by it.
    ClientIfWayBack,
    /// One of this node, or the address that its program connects to: the program's own source where that address is local by
    /// a route alone.
    NodeOrVip,
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Node => "this node",
            Self::Client => "client",
            Self::ClientOffHost => "client unless hostNetwork",
            Self::ClientOffLink => "client unless hostNetwork or one bridge",
            Self::ClientIfWayBack => "client if here, unless hostNetwork",
            Self::NodeOrVip => "this node, or the VIP",
        })
    }
}

/// Whom a backend sees of a client there; `scope` is that of the backends that such a client gets.
pub fn seen(client: ClientPlace, scope: Scope, source: SourceAddress) -> Seen {
    match (source, client, scope) {
        (SourceAddress::Node, ..) | (_, ClientPlace::Node, _) => Seen::Node,
        (SourceAddress::Preserve, ClientPlace::PodHere, _) => Seen::ClientOffLink,
        (SourceAddress::Preserve, ClientPlace::PodElsewhere | ClientPlace::Elsewhere, Scope::Local) => {
            Seen::ClientOffHost
        }
        (SourceAddress::Preserve, ClientPlace::PodElsewhere | ClientPlace::Elsewhere, Scope::Cluster) => {
            Seen::ClientIfWayBack
        }
    }
}

/// Whom a PROXY header names, over TCP: the source of the client's own connection, wherever backends are.
pub fn named(client: ClientPlace) -> Seen {
    match client {
        ClientPlace::PodHere | ClientPlace::PodElsewhere | ClientPlace::Elsewhere => Seen::Client,
        ClientPlace::Node => Seen::NodeOrVip,
    }
}

/// A line of the table of one Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Who asks.
    pub client: ClientPlace,
    /// Where: kinds of listeners that are the same in this.
    pub entries: Vec<ListenerKind>,
    /// The backends that such a client gets.
    pub scope: Scope,
}

/// The lines of a Service: each way in that it has, for each client.
pub fn rows(service: &ServiceReport) -> Vec<Row> {
    let listeners = || service.ports.iter().flat_map(|port| &port.listeners);
    let kinds: BTreeSet<ListenerKind> = listeners().map(|listener| listener.kind).collect();
    let sides = kinds.into_iter().filter_map(|kind| {
        let listener = listeners().find(|listener| listener.kind == kind)?;
        Some((kind, (listener.inside.scope, listener.outside.scope)))
    });
    let mut groups: Vec<((Scope, Scope), Vec<ListenerKind>)> = Vec::new();
    for (kind, scopes) in sides {
        match groups.iter_mut().find(|(known, _)| *known == scopes) {
            Some((_, entries)) => entries.push(kind),
            None => groups.push((scopes, vec![kind])),
        }
    }
    let of_group = |((inside, outside), entries): ((Scope, Scope), Vec<ListenerKind>)| {
        ClientPlace::ALL.map(|client| {
            let scope = if client.is_inside() { inside } else { outside };
            Row { client, entries: entries.clone(), scope }
        })
    };
    groups.into_iter().flat_map(of_group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::sample;

    #[test]
    fn given_a_service_that_does_not_say_when_looked_up_then_backends_see_the_node_always() {
        for (client, scope) in
            ClientPlace::ALL.into_iter().flat_map(|client| [Scope::Cluster, Scope::Local].map(|scope| (client, scope)))
        {
            assert_eq!(seen(client, scope, SourceAddress::Node), Seen::Node);
        }
    }

    #[test]
    fn given_a_service_that_preserves_when_looked_up_then_the_node_itself_is_never_preserved() {
        let seen = |client, scope| seen(client, scope, SourceAddress::Preserve);

        assert_eq!(seen(ClientPlace::Node, Scope::Local), Seen::Node);
        for elsewhere in [ClientPlace::PodElsewhere, ClientPlace::Elsewhere] {
            assert_eq!(seen(elsewhere, Scope::Local), Seen::ClientOffHost);
            assert_eq!(seen(elsewhere, Scope::Cluster), Seen::ClientIfWayBack);
        }
        assert_eq!(seen(ClientPlace::PodHere, Scope::Cluster), Seen::ClientOffLink);
    }

    #[test]
    fn given_a_header_when_looked_up_then_it_names_the_client_and_a_program_of_the_node_by_its_source() {
        assert_eq!(ClientPlace::ALL.map(named), [Seen::Client, Seen::Client, Seen::Client, Seen::NodeOrVip]);
    }

    #[test]
    fn given_listeners_of_two_kinds_that_differ_when_listed_then_each_has_a_line_for_each_client() {
        let status = sample::status();
        let web = status.report().services.into_iter().find(|service| service.name == "web").expect("it is there");

        let rows = rows(&web);

        assert_eq!(rows.len() % ClientPlace::ALL.len(), 0);
        let listed: BTreeSet<ListenerKind> = rows.iter().flat_map(|row| row.entries.iter().copied()).collect();
        let there = web.ports.iter().flat_map(|port| &port.listeners).map(|listener| listener.kind).collect();
        assert_eq!(listed, there);
    }

    /// A row of the README's table: client, whether at the cluster IP (`None`: at any address), its policies, and what is said.
    fn row_of_readme<'a>(cells: &[&'a str]) -> (ClientPlace, Option<bool>, Vec<Scope>, [&'a str; 3]) {
        let [client, at, policy, _, now, preserved, header] = cells else { panic!("seven cells: {cells:?}") };
        let place = ClientPlace::ALL.into_iter().find(|place| {
            let words = place.to_string();
            client.replace('`', "").strip_prefix(&words).is_some_and(|rest| rest.is_empty() || rest.starts_with(','))
        });
        let at_cluster_ip = (*at != "any").then_some(*at == "cluster IP");
        let policies = match policy.trim_matches('`') {
            "Cluster" => vec![Scope::Cluster],
            "Local" => vec![Scope::Local],
            _ => vec![Scope::Cluster, Scope::Local],
        };
        (place.expect("a client"), at_cluster_ip, policies, [*now, *preserved, *header])
    }

    #[test]
    fn given_the_table_of_the_readme_when_compared_then_it_has_each_case_once_and_these_words() {
        let readme = include_str!("../README.md");
        let lines = readme.lines().skip_while(|line| !line.starts_with("| Client | at | Policy |")).skip(2);
        let rows: Vec<Vec<&str>> = lines
            .take_while(|line| line.starts_with('|'))
            .map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('*')).collect())
            .collect();
        let rows: Vec<_> = rows.iter().map(|cells| row_of_readme(cells)).collect();
        for (place, at_cluster_ip, policy) in ClientPlace::ALL.into_iter().flat_map(|place| {
            [true, false]
                .into_iter()
                .flat_map(move |at| [Scope::Cluster, Scope::Local].map(|policy| (place, at, policy)))
        }) {
            // This node and its pods may use every endpoint at all other addresses.
            let scope = if place.is_inside() && !at_cluster_ip { Scope::Cluster } else { policy };
            let seen = [SourceAddress::Node, SourceAddress::Preserve].map(|source| seen(place, scope, source));
            let words = [seen[0], seen[1], named(place)].map(|seen| seen.to_string());

            let found: Vec<_> = rows
                .iter()
                .filter(|(of, at, policies, _)| {
                    *of == place && at.is_none_or(|at| at == at_cluster_ip) && policies.contains(&policy)
                })
                .map(|(.., said)| said.map(str::to_owned))
                .collect();

            assert_eq!(found, [words], "{place}, at the cluster IP: {at_cluster_ip}, {policy:?}");
        }
    }
}
