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
    /// Elsewhere: outside the cluster, or on another node.
    Elsewhere,
    /// This node itself: a process on it, or a pod with `hostNetwork`.
    Node,
}

impl ClientPlace {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::PodHere, Self::Elsewhere, Self::Node];
}

impl fmt::Display for ClientPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PodHere => "pod of this node",
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
    /// The client's, unless the backend is this node itself, as a pod with `hostNetwork` is.
    ClientOffHost,
    /// The client's, unless backend and client are on one link, as on a bridge.
    ClientOffLink,
    /// The client's, where the backend is on this node or has its way back by it.
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
            Self::ClientOffLink => "client unless on one bridge",
            Self::ClientIfWayBack => "client if the backend is here",
            Self::NodeOrVip => "this node, or the VIP",
        })
    }
}

/// Whom a backend sees of a client there; `scope` is that of the backends that such a client gets.
pub fn seen(client: ClientPlace, scope: Scope, source: SourceAddress) -> Seen {
    match (source, client, scope) {
        (SourceAddress::Node, ..) | (_, ClientPlace::Node, _) => Seen::Node,
        (SourceAddress::Preserve, ClientPlace::PodHere, _) => Seen::ClientOffLink,
        (SourceAddress::Preserve, ClientPlace::Elsewhere, Scope::Local) => Seen::ClientOffHost,
        (SourceAddress::Preserve, ClientPlace::Elsewhere, Scope::Cluster) => Seen::ClientIfWayBack,
    }
}

/// Whom a PROXY header names, over TCP: the source of the client's own connection, wherever backends are.
pub fn named(client: ClientPlace) -> Seen {
    match client {
        ClientPlace::PodHere | ClientPlace::Elsewhere => Seen::Client,
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
            let scope = if client == ClientPlace::Elsewhere { outside } else { inside };
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
        assert_eq!(seen(ClientPlace::Elsewhere, Scope::Local), Seen::ClientOffHost);
        assert_eq!(seen(ClientPlace::Elsewhere, Scope::Cluster), Seen::ClientIfWayBack);
        assert_eq!(seen(ClientPlace::PodHere, Scope::Cluster), Seen::ClientOffLink);
    }

    #[test]
    fn given_a_header_when_looked_up_then_it_names_the_client_and_a_program_of_the_node_by_its_source() {
        assert_eq!(ClientPlace::ALL.map(named), [Seen::Client, Seen::Client, Seen::NodeOrVip]);
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
}
