//! The socket to nf_tables about tables of ours. Messages are in `guard_message`, what to ask for is decided in `guard`.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{Socket, SocketAddr};
use rustix::io::Errno;

use crate::guard_message::{Batch, Heard, Hook, Rule, RuleName, ask_addresses, ask_generation, ask_rules, read};
use crate::name::Family;

/// Addresses that are sent at once: of IPv6, they fill half of what an attribute may hold.
pub(crate) const BATCH: usize = 1_000;
/// The longest datagram of the kernel.
const DATAGRAM: usize = 32 * 1024;
/// How often all is read anew, where others change their rules all the time while ours are told.
const LOOKS: usize = 5;

/// Each call is over in as long as the kernel works: it answers before a call to send returns.
#[derive(Debug)]
pub(crate) struct GuardSocket {
    socket: Socket,
    /// Name of our table.
    table: String,
    /// Number of the next request.
    next: u32,
    buffer: Box<[u8]>,
}

/// What is there of the guard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum There {
    /// No table of ours.
    Nothing,
    /// One of another version, or one that others have changed.
    Other,
    /// Our rules, and these addresses.
    Guarded(BTreeSet<IpAddr>),
}

impl GuardSocket {
    /// Opens it, for the table of the guard. Changes nothing.
    pub(crate) fn open(protocol: u8) -> io::Result<Self> {
        Self::open_for(table_name(protocol))
    }

    /// Opens it, for another table of ours.
    pub(crate) fn open_for(table: String) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let _ = socket.set_cap_ack(true); // Answers without the question, where the kernel knows how.
        Ok(Self { socket, table, next: 1, buffer: vec![0; DATAGRAM].into() })
    }

    /// How often rules have changed, those of everybody.
    pub(crate) fn generation(&mut self) -> Result<u32, Errno> {
        let request = self.number();
        let mut generation = None;
        self.ask(&ask_generation(request), request, |heard| {
            if let Heard::Generation(number, id) = heard
                && number == request
            {
                generation = Some(id);
            }
        })?;
        generation.ok_or(Errno::OPNOTSUPP)
    }

    /// What is there.
    pub(crate) fn look(&mut self, rules: &[Rule]) -> Result<There, Errno> {
        let mut looks = (0..LOOKS).map(|_| self.try_look(rules));
        let there = looks.find(|there| *there != Err(Errno::INTR));
        there.unwrap_or(Err(Errno::AGAIN))
    }

    /// `INTR` where something changed while it was told.
    fn try_look(&mut self, rules: &[Rule]) -> Result<There, Errno> {
        let mut addresses = BTreeSet::new();
        for family in Family::ALL {
            let request = self.number();
            let question = ask_addresses(&self.table, family, request);
            let told = self.ask(&question, request, |heard| {
                if let Heard::Addresses(number, told) = heard
                    && number == request
                {
                    addresses.extend(told);
                }
            });
            match told {
                Err(Errno::NOENT) => {
                    return self.is_there().map(|there| if there { There::Other } else { There::Nothing });
                }
                told => told?,
            }
        }
        let wanted: Vec<RuleName> = rules.iter().map(Rule::name).collect();
        Ok(if same(&self.rules()?, &wanted) { There::Guarded(addresses) } else { There::Other })
    }

    /// A table without our sets may have rules all the same.
    fn is_there(&mut self) -> Result<bool, Errno> {
        match self.rules() {
            Ok(rules) => Ok(!rules.is_empty()),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// True where the table is there with these rules, and no others.
    pub(crate) fn has(&mut self, rules: &[Rule]) -> Result<bool, Errno> {
        let wanted: Vec<RuleName> = rules.iter().map(Rule::name).collect();
        match self.rules() {
            Ok(found) => Ok(same(&found, &wanted)),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn rules(&mut self) -> Result<Vec<RuleName>, Errno> {
        let request = self.number();
        let mut rules = Vec::new();
        self.ask(&ask_rules(&self.table, request), request, |heard| {
            if let Heard::Rule(number, rule) = heard
                && number == request
            {
                rules.push(rule);
            }
        })?;
        Ok(rules)
    }

    /// Makes the table anew, with nobody guarded.
    pub(crate) fn build(&mut self, rules: &[Rule]) -> Result<(), Errno> {
        self.change(|batch| batch.build(rules))
    }

    /// Makes the table anew, with these chains.
    pub(crate) fn build_chains(&mut self, chains: &[(&str, Option<Hook>)], rules: &[Rule]) -> Result<(), Errno> {
        self.change(|batch| batch.build_chains(chains, rules))
    }

    /// Takes the table away. False where there was none.
    pub(crate) fn remove(&mut self) -> Result<bool, Errno> {
        match self.change(|batch| batch.remove()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Guards these addresses, [`BATCH`] at most.
    pub(crate) fn add(&mut self, addresses: &[IpAddr]) -> Result<(), Errno> {
        debug_assert!(addresses.len() <= BATCH);
        self.change(|batch| batch.add(addresses))
    }

    /// Guards these addresses no more, [`BATCH`] at most.
    pub(crate) fn take(&mut self, addresses: &[IpAddr]) -> Result<(), Errno> {
        debug_assert!(addresses.len() <= BATCH);
        self.change(|batch| batch.take(addresses))
    }

    fn change(&mut self, write: impl FnOnce(&mut Batch<'_>)) -> Result<(), Errno> {
        let table = self.table.clone();
        let mut batch = Batch::new(&table, self.next);
        write(&mut batch);
        let (bytes, last) = batch.finish();
        self.next = last.wrapping_add(2); // The end has a number, too.
        self.ask(&bytes, last, |_| ())
    }

    fn number(&mut self) -> u32 {
        let number = self.next;
        self.next = number.wrapping_add(1);
        number
    }

    /// Sends something and hears all that the kernel says to it: of a batch that it refuses, it answers the last message
    /// all the same.
    fn ask(&mut self, bytes: &[u8], last: u32, mut take: impl FnMut(Heard)) -> Result<(), Errno> {
        self.socket.send(bytes, 0).map_err(errno)?;
        let (mut outcome, mut is_answered, mut is_interrupted) = (Ok(()), false, false);
        loop {
            let length = match self.socket.recv(&mut &mut self.buffer[..], libc::MSG_DONTWAIT) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(errno(error)),
            };
            for heard in read(&self.buffer[..length.min(DATAGRAM)], &self.table) {
                match heard {
                    Heard::Answer(number, said) | Heard::End(number, said) => {
                        is_answered |= number == last;
                        outcome = outcome.and(said);
                    }
                    Heard::Interrupted(_) => is_interrupted = true,
                    other => take(other),
                }
            }
        }
        outcome?;
        match (is_answered, is_interrupted) {
            (true, false) => Ok(()),
            (_, true) => Err(Errno::INTR),
            (false, _) => Err(Errno::IO),
        }
    }
}

/// The name of the table that guards what routes with this number make local.
pub(crate) fn table_name(protocol: u8) -> String {
    format!("kube-relay-{protocol}")
}

/// Rules of one chain are told in their order, chains in any.
fn same(found: &[RuleName], wanted: &[RuleName]) -> bool {
    found.len() == wanted.len() && wanted.iter().all(|rule| found.contains(rule))
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard_message::rules;

    #[test]
    fn given_a_table_that_nobody_has_when_looked_at_and_removed_then_it_is_not_there() {
        // Of a number that nobody uses: what is asked changes nothing.
        let mut socket = match GuardSocket::open(254) {
            Ok(socket) => socket,
            Err(error) => return eprintln!("skipped, no netfilter here: {error}"),
        };
        match socket.generation() {
            Ok(_) => {}
            Err(error) => return eprintln!("skipped, no right or no nf_tables here: {error}"),
        }

        assert_eq!(socket.look(&rules(&(32_768..=60_999))), Ok(There::Nothing));
        assert_eq!(socket.remove(), Ok(false));
    }

    #[test]
    fn given_rules_when_compared_then_neither_more_nor_fewer_nor_others_are_the_same() {
        let names = |clients| rules(&clients).iter().map(Rule::name).collect::<Vec<_>>();
        let (wanted, others) = (names(32_768..=60_999), names(1..=2));

        assert!(same(&wanted, &wanted));
        assert!(!same(&wanted[1..], &wanted));
        assert!(!same(&[&wanted[..], &wanted[..1]].concat(), &wanted));
        assert!(!same(&others, &wanted));
    }
}
