//! Which addresses are to be guarded, as routes come and go: those that routes of ours make local, and nobody else does.
//!
//! Pure. What has the guard hold so is in `guard`.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::vip_routes::{LocalRoute, News};

/// Owned by the task of `guard`, by value.
#[derive(Debug, Default)]
pub(crate) struct GuardAddresses {
    /// Of routes of ours.
    own: BTreeSet<IpAddr>,
    /// Of routes of others for one address alone, as the kernel makes them for each address of an interface.
    others: BTreeSet<IpAddr>,
    /// `own` without `others`.
    wanted: BTreeSet<IpAddr>,
}

/// What a change of routes comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Noted {
    /// The same addresses are to be guarded.
    Same,
    /// Others are.
    Changed,
    /// That cannot be told without a look at all routes.
    Unsure,
}

impl GuardAddresses {
    /// The addresses to guard.
    pub(crate) fn wanted(&self) -> &BTreeSet<IpAddr> {
        &self.wanted
    }

    /// Takes note of one route.
    pub(crate) fn note(&mut self, news: News) -> Noted {
        let (route, is_there) = match news {
            News::Appeared(route) => (route, true),
            News::Vanished(route) => (route, false),
            News::Unknown => return Noted::Unsure,
        };
        let Some(address) = route.host_address() else { return Noted::Same };
        if !is_there && !route.own && self.own.contains(&address) {
            return Noted::Unsure; // Another interface may have it, too.
        }
        let routes = if route.own { &mut self.own } else { &mut self.others };
        match is_there {
            true => routes.insert(address),
            false => routes.remove(&address),
        };
        self.judge(address)
    }

    /// Takes note of all routes that there are.
    pub(crate) fn note_all(&mut self, routes: &[LocalRoute]) -> Noted {
        let of =
            |own| routes.iter().filter(move |route| route.own == own).filter_map(LocalRoute::host_address).collect();
        (self.own, self.others) = (of(true), of(false));
        let wanted = &self.own - &self.others;
        match std::mem::replace(&mut self.wanted, wanted) == self.wanted {
            true => Noted::Same,
            false => Noted::Changed,
        }
    }

    fn judge(&mut self, address: IpAddr) -> Noted {
        let is_wanted = self.own.contains(&address) && !self.others.contains(&address);
        let is_changed = if is_wanted { self.wanted.insert(address) } else { self.wanted.remove(&address) };
        if is_changed { Noted::Changed } else { Noted::Same }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(net: &str, own: bool) -> LocalRoute {
        LocalRoute { net: net.parse().expect("a network"), own }
    }

    fn with(routes: &[LocalRoute]) -> GuardAddresses {
        let mut addresses = GuardAddresses::default();
        addresses.note_all(routes);
        addresses
    }

    #[test]
    fn given_routes_when_they_come_and_go_then_those_of_ours_alone_are_guarded() {
        let (ours, others) = (route("10.96.0.1/32", true), route("10.0.0.1/32", false));
        let mut addresses = GuardAddresses::default();

        assert_eq!(addresses.note(News::Appeared(ours)), Noted::Changed);
        assert_eq!(addresses.note(News::Appeared(others)), Noted::Same);
        assert_eq!(addresses.note(News::Appeared(ours)), Noted::Same, "told twice");
        assert_eq!(*addresses.wanted(), [ours.net.addr()].into());
        assert_eq!(addresses.note(News::Vanished(others)), Noted::Same);
        assert_eq!(addresses.note(News::Vanished(ours)), Noted::Changed);
        assert!(addresses.wanted().is_empty());
        assert_eq!(addresses.note(News::Unknown), Noted::Unsure);
    }

    #[test]
    fn given_a_guarded_address_when_it_becomes_the_nodes_own_then_it_is_not_guarded_until_a_look_finds_it_is_not() {
        let (ours, others) = (route("10.96.0.1/32", true), route("10.96.0.1/32", false));
        let mut addresses = with(&[ours]);

        assert_eq!(addresses.note(News::Appeared(others)), Noted::Changed);
        assert!(addresses.wanted().is_empty());
        assert_eq!(addresses.note(News::Vanished(others)), Noted::Unsure);
        assert_eq!(addresses.note_all(&[ours, others]), Noted::Same, "another interface has it");
        assert_eq!(addresses.note_all(&[ours]), Noted::Changed);
        assert_eq!(*addresses.wanted(), [ours.net.addr()].into());
    }

    #[test]
    fn given_a_network_of_others_when_it_covers_an_address_of_ours_then_that_is_still_guarded() {
        let (ours, network) = (route("10.96.0.1/32", true), route("10.96.0.0/12", false));

        assert_eq!(*with(&[network, ours]).wanted(), [ours.net.addr()].into());
        assert!(with(&[route("10.96.0.0/12", true)]).wanted().is_empty(), "nobody's address");
    }
}
