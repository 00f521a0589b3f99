//! How many flows there may be, and which one makes room for another.
//!
//! What a flow is, and when it ends by itself, is `flow`.

use std::sync::Arc;
use std::sync::atomic::{AtomicIsize, Ordering};

use crate::serve::flow::FlowState;
use crate::serve::gate::FlowGate;
use crate::serve::slab::{Chain, Id, Slab};

/// A client address with at least one in so many of its allowed flows makes room for its own new ones. One with
/// fewer takes the place of the least flow of all, so that a flood cannot make it evict itself.
const HEAVY_SHARE: usize = 8;

/// So many flows each table may have though the gate is closed: what connections and the flows of other tables hold must not
/// leave the clients of this one with nothing, as it cannot evict what it does not have.
const FEW: usize = 8;

/// How many flows one table may hold.
///
/// Half of a process's flows is split evenly, so that a flood on one shard leaves room on the others; the other half
/// goes to whichever shard needs it.
#[derive(Clone, Debug)]
pub struct FlowLimits {
    /// Flows that only this table may have.
    own: usize,
    /// Places that tables share.
    shared: Arc<SharedPlaces>,
    /// Flows of one client address in this table.
    per_client: usize,
    /// What the process has left, but for a few: open, as long as it is of its own.
    gate: Arc<FlowGate>,
}

impl FlowLimits {
    /// Splits the flows of a process among its shards. One client address gets a quarter of them.
    pub fn split(flows: usize, shards: usize) -> impl Iterator<Item = Self> {
        let shards = shards.max(1);
        let own = if shards == 1 { flows } else { flows / shards / 2 }.max(1);
        let shared = Arc::new(SharedPlaces(AtomicIsize::new(flows.saturating_sub(own * shards) as isize)));
        let per_client = (flows / 4).max(1);
        let gate = Arc::<FlowGate>::default();
        (0..shards).map(move |_| Self { own, shared: Arc::clone(&shared), per_client, gate: Arc::clone(&gate) })
    }

    /// Counts at this gate, and has no more flows than a few while it is closed.
    pub(super) fn behind(self, gate: &Arc<FlowGate>) -> Self {
        Self { gate: Arc::clone(gate), ..self }
    }

    #[cfg(test)]
    pub(super) fn free(&self) -> usize {
        self.shared.0.load(Ordering::Relaxed).try_into().expect("no flow is there without a place")
    }
}

/// Places that no table holds now. Below 0 while there are flows of another process that there was no place for.
#[derive(Debug)]
struct SharedPlaces(AtomicIsize);

/// The room of one table. Owned by it.
#[derive(Debug)]
pub(super) struct Room {
    limits: FlowLimits,
    /// How many of the shared places are held.
    borrowed: usize,
    /// Flows that are counted at the gate.
    counted: usize,
}

/// Whether a client may have one more flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// There is a place for it.
    Free,
    /// Only in the place of another flow of this client.
    OwnFlow,
    /// In the place of another flow of this client; if none may go, of any flow.
    OwnFlowFirst,
    /// In the place of any flow.
    AnyFlow,
}

impl Room {
    pub(super) fn new(limits: FlowLimits) -> Self {
        Self { limits, borrowed: 0, counted: 0 }
    }

    pub(super) fn limits(&self) -> FlowLimits {
        self.limits.clone()
    }

    /// Finds a place for one more flow of a client that has `mine`, in a table that has `all`.
    pub(super) fn place(&mut self, mine: usize, all: usize) -> Place {
        if mine >= self.limits.per_client {
            Place::OwnFlow
        } else if self.take(all) {
            Place::Free
        } else if mine * HEAVY_SHARE >= self.limits.per_client {
            Place::OwnFlowFirst
        } else {
            Place::AnyFlow
        }
    }

    /// Has a place for one more flow in a table that has `all`, whatever the limits are: another process has let it in.
    pub(super) fn find_place_anyway(&mut self, all: usize) {
        if all >= self.limits.own + self.borrowed {
            self.limits.shared.0.fetch_sub(1, Ordering::Relaxed);
            self.borrowed += 1;
        }
    }

    /// A flow has begun.
    pub(super) fn enter(&mut self) {
        self.counted += 1;
        self.limits.gate.enter();
    }

    /// A flow has ended.
    pub(super) fn leave(&mut self) {
        self.counted -= 1;
        self.limits.gate.leave(1);
    }

    /// Gives back what a table of `all` flows does not need.
    pub(super) fn give_back(&mut self, all: usize) {
        let needed = all.saturating_sub(self.limits.own);
        if self.borrowed > needed {
            // Relaxed: the number guards no other memory.
            self.limits.shared.0.fetch_add((self.borrowed - needed) as isize, Ordering::Relaxed);
            self.borrowed = needed;
        }
    }

    fn take(&mut self, all: usize) -> bool {
        if all >= FEW && self.limits.gate.is_closed() {
            return false;
        }
        if all < self.limits.own + self.borrowed {
            return true;
        }
        let free = &self.limits.shared.0;
        let one_less = |free: isize| (free > 0).then(|| free - 1);
        let taken = free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok();
        self.borrowed += usize::from(taken);
        taken
    }

    #[cfg(test)]
    pub(super) fn check(&self, all: usize) {
        assert_eq!(self.borrowed, all.saturating_sub(self.limits.own), "places are held for flows only");
        assert_eq!(self.counted, all, "each flow is counted once");
    }

    #[cfg(test)]
    pub(super) fn per_client(&self) -> usize {
        self.limits.per_client
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.give_back(0);
        self.limits.gate.leave(self.counted);
    }
}

/// Flows by state, in each the longest silent first. Runs through one lane of their slab.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ages {
    chains: [Chain; 3],
    counts: [usize; 3],
}

impl Ages {
    pub(super) fn count(&self) -> usize {
        self.counts.iter().sum()
    }

    pub(super) fn enter<T, const N: usize>(&mut self, flows: &mut Slab<T, N>, lane: usize, state: FlowState, id: Id) {
        flows.append(lane, &mut self.chains[state as usize], id);
        self.counts[state as usize] += 1;
    }

    pub(super) fn leave<T, const N: usize>(&mut self, flows: &mut Slab<T, N>, lane: usize, state: FlowState, id: Id) {
        flows.detach(lane, &mut self.chains[state as usize], id);
        self.counts[state as usize] -= 1;
    }

    /// The flow that will be missed least: the oldest one of the larger group among unreplied and answered ones,
    /// unreplied ones first; with neither, the oldest stream, if it `is_silent`.
    ///
    /// A flood of spoofed sources is a large group of unreplied flows, and finished queries are a large group of
    /// answered ones: neither of them pushes out an exchange that is under way, or the few of the other kind.
    pub(super) fn least<T, const N: usize>(&self, flows: &Slab<T, N>, is_silent: impl Fn(&T) -> bool) -> Option<Id> {
        let [unreplied, answered, stream] = self.chains.map(|chain| flows.first(chain));
        let exchange = if self.counts[1] > self.counts[0] { answered } else { unreplied.or(answered) };
        exchange.or(stream.filter(|id| flows.get(*id).is_some_and(is_silent)))
    }

    /// All flows, by state.
    pub(super) fn iter<'a, T, const N: usize>(
        &'a self,
        flows: &'a Slab<T, N>,
        lane: usize,
    ) -> impl Iterator<Item = (Id, &'a T)> {
        FlowState::ALL.into_iter().flat_map(move |state| self.of_state(state, flows, lane))
    }

    /// The flows in one state, the longest silent first.
    pub(super) fn of_state<'a, T, const N: usize>(
        &self,
        state: FlowState,
        flows: &'a Slab<T, N>,
        lane: usize,
    ) -> impl Iterator<Item = (Id, &'a T)> + use<'a, T, N> {
        flows.iter(lane, self.chains[state as usize])
    }

    #[cfg(test)]
    pub(super) fn count_of(&self, state: FlowState) -> usize {
        self.counts[state as usize]
    }
}
