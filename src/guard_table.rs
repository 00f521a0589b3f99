//! Keeps addresses of Services guarded by a table of nf_tables: what is there, and what has to be changed.
//!
//! Messages are in `guard_message`, the socket in `guard_socket`; which addresses these are, and when it is looked at them, is
//! in `guard`.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use rustix::io::Errno;

use crate::guard_message::{Rule, rules};
use crate::guard_socket::{BATCH, GuardSocket, There};

/// The table, as far as it is known. Owned by the task of `guard`, by value.
#[derive(Debug)]
pub(crate) struct GuardTable {
    /// Number of our routes.
    protocol: u8,
    /// `None` where there is no netfilter, or it was not needed yet.
    socket: Option<GuardSocket>,
    rules: Vec<Rule>,
    /// What is there, as of the generation; `None`: unknown.
    there: Option<There>,
    generation: Option<u32>,
    /// True where it has guarded in this run.
    is_proven: bool,
}

impl GuardTable {
    /// Asks and changes nothing.
    pub(crate) fn new(protocol: u8, clients: &RangeInclusive<u16>) -> Self {
        Self { protocol, socket: None, rules: rules(clients), there: None, generation: None, is_proven: false }
    }

    /// Has these addresses guarded, and no other; without any, there is no table. True where somebody had changed it.
    ///
    /// # Errors
    /// Where the kernel refuses, or has no nf_tables. It may be done in part then.
    pub(crate) fn settle(&mut self, wanted: &BTreeSet<IpAddr>) -> Result<bool, Errno> {
        let socket = match &mut self.socket {
            Some(socket) => socket,
            None => self.socket.insert(
                GuardSocket::open(self.protocol).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?,
            ),
        };
        let generation = socket.generation()?;
        let mut is_lost = false;
        if self.generation != Some(generation) {
            let found = socket.look(&self.rules)?;
            let had = self.there.replace(found);
            is_lost = matches!(had, Some(There::Guarded(_))) && self.there != had && !wanted.is_empty();
        }
        let there = self.there.get_or_insert(There::Nothing);
        let steps = steps(there, wanted);
        self.generation = None; // As long as not all is done.
        for step in &steps {
            step.carry_out(socket, &self.rules)?;
            step.note(there);
        }
        self.is_proven |= matches!(there, There::Guarded(_));
        // Each was one change. Where somebody else made one meanwhile, this number comes up never, or not now.
        self.generation = Some(generation.wrapping_add(steps.len() as u32));
        Ok(is_lost)
    }

    /// Takes note of which ports the kernel gives to clients: rules depend on that.
    pub(crate) fn note_clients(&mut self, clients: &RangeInclusive<u16>) {
        self.rules = rules(clients);
        self.generation = None; // What is there has other rules.
    }

    /// How many addresses are guarded.
    pub(crate) fn guarded(&self) -> usize {
        match &self.there {
            Some(There::Guarded(addresses)) => addresses.len(),
            Some(There::Nothing | There::Other) | None => 0,
        }
    }

    /// True where there is a table.
    pub(crate) fn is_left(&self) -> bool {
        matches!(self.there, Some(There::Other | There::Guarded(_)))
    }

    /// True where it has guarded in this run: nf_tables are not missing, whatever the kernel says later.
    pub(crate) fn is_proven(&self) -> bool {
        self.is_proven
    }

    #[cfg(test)]
    pub(crate) fn is_asked(&self) -> bool {
        self.socket.is_some()
    }
}

/// Takes the table away. False where there is none.
pub(crate) fn remove(protocol: u8) -> io::Result<bool> {
    Ok(GuardSocket::open(protocol)?.remove()?)
}

/// A change of the table. The kernel makes each as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// The table anew, with nobody guarded.
    Build,
    Remove,
    Take(Vec<IpAddr>),
    Add(Vec<IpAddr>),
}

impl Step {
    fn carry_out(&self, socket: &mut GuardSocket, rules: &[Rule]) -> Result<(), Errno> {
        match self {
            Self::Build => socket.build(rules),
            Self::Remove => socket.remove().map(drop),
            Self::Take(addresses) => socket.take(addresses),
            Self::Add(addresses) => socket.add(addresses),
        }
    }

    /// Takes note of it as made.
    fn note(&self, there: &mut There) {
        match (self, there) {
            (Self::Build, there) => *there = There::Guarded(BTreeSet::new()),
            (Self::Remove, there) => *there = There::Nothing,
            (Self::Add(addresses), There::Guarded(guarded)) => guarded.extend(addresses),
            (Self::Take(addresses), There::Guarded(guarded)) => {
                for address in addresses {
                    guarded.remove(address);
                }
            }
            (Self::Add(_) | Self::Take(_), There::Nothing | There::Other) => {}
        }
    }
}

/// What has to be done so that these addresses are guarded. Without any, there is no table.
fn steps(there: &There, wanted: &BTreeSet<IpAddr>) -> Vec<Step> {
    let (build, missing, surplus) = match there {
        There::Nothing if wanted.is_empty() => return Vec::new(),
        _ if wanted.is_empty() => return vec![Step::Remove],
        There::Nothing | There::Other => (Some(Step::Build), wanted.iter().copied().collect(), Vec::new()),
        There::Guarded(guarded) => {
            (None, wanted.difference(guarded).copied().collect(), guarded.difference(wanted).copied().collect())
        }
    };
    let parts = |addresses: Vec<IpAddr>| addresses.chunks(BATCH).map(<[_]>::to_vec).collect::<Vec<_>>();
    let (missing, surplus) = (parts(missing), parts(surplus));
    build.into_iter().chain(surplus.into_iter().map(Step::Take)).chain(missing.into_iter().map(Step::Add)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(numbers: impl IntoIterator<Item = u16>) -> BTreeSet<IpAddr> {
        numbers.into_iter().map(|number| [0xfd96, 0, 0, 0, 0, 0, 0, number].into()).collect()
    }

    fn list(numbers: impl IntoIterator<Item = u16>) -> Vec<IpAddr> {
        addresses(numbers).into_iter().collect()
    }

    /// Carries steps out as a kernel that refuses nothing.
    fn after(mut there: There, wanted: &BTreeSet<IpAddr>) -> There {
        steps(&there, wanted).iter().for_each(|step| step.note(&mut there));
        there
    }

    #[test]
    fn given_what_is_there_when_other_addresses_are_wanted_then_only_what_differs_is_changed() {
        let guarded = There::Guarded(addresses([1, 2]));

        assert_eq!(steps(&guarded, &addresses([1, 2])), []);
        assert_eq!(steps(&guarded, &addresses([2, 3])), [Step::Take(list([1])), Step::Add(list([3]))]);
        assert_eq!(steps(&There::Nothing, &addresses([1])), [Step::Build, Step::Add(list([1]))]);
        assert_eq!(steps(&There::Other, &addresses([1])), [Step::Build, Step::Add(list([1]))]);
    }

    #[test]
    fn given_no_address_when_asked_for_then_there_is_no_table() {
        let none = BTreeSet::new();

        assert_eq!(steps(&There::Nothing, &none), []);
        for there in [There::Other, There::Guarded(none.clone()), There::Guarded(addresses([1]))] {
            assert_eq!(steps(&there, &none), [Step::Remove]);
        }
    }

    #[test]
    fn given_any_state_when_its_steps_are_made_then_it_is_the_wanted_one_and_there_are_no_more() {
        for there in [There::Nothing, There::Other, There::Guarded(addresses([])), There::Guarded(addresses(5..3_000))]
        {
            for wanted in [addresses([]), addresses([7]), addresses(0..2_500)] {
                let there = after(there.clone(), &wanted);

                let is_wanted = match &there {
                    There::Nothing => wanted.is_empty(),
                    There::Other => false,
                    There::Guarded(guarded) => *guarded == wanted,
                };
                assert!(is_wanted, "{there:?}");
                assert_eq!(steps(&there, &wanted), []);
            }
        }
    }

    #[test]
    fn given_thousands_of_addresses_when_sent_then_no_part_is_longer_than_a_message_may_be() {
        let steps = steps(&There::Nothing, &addresses(0..2_500));

        let lengths: Vec<usize> = steps
            .iter()
            .filter_map(|step| match step {
                Step::Add(addresses) => Some(addresses.len()),
                _ => None,
            })
            .collect();
        assert_eq!(lengths, [1_000, 1_000, 500]);
    }

    #[test]
    fn given_a_table_that_nobody_has_looked_at_when_asked_then_nothing_is_known_of_it() {
        let mut table = GuardTable::new(254, &(32_768..=60_999));
        assert_eq!((table.guarded(), table.is_left(), table.is_proven()), (0, false, false));

        table.there = Some(There::Guarded(addresses([1, 2])));
        assert_eq!((table.guarded(), table.is_left()), (2, true));
        table.there = Some(There::Other);
        assert_eq!((table.guarded(), table.is_left()), (0, true));
    }
}
