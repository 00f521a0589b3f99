//! Whether one more client may come in: how many connections there may be, and who says so.
//!
//! Clients that may not come in wait in the queue of the kernel; nobody is turned away. Who accepts asks here before each
//! client, and rests where the answer is no (`tcp`). The numbers of descriptors and memory come from `headroom`, that of
//! one Service from its plan. UDP has nobody to wait: where there may be no more flows, a new one takes the place of an old
//! one (`room`).
//!
//! *Exactness.* The limit of a Service holds exactly: a place is taken before the accept (`balancer`). Those of the process are
//! looked at by each worker for itself, so that all accepts of the machine do not share one more cache line: workers that
//! look at the same moment each let one in, and such a limit may be exceeded by one for each worker but the first.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use crate::stats::PauseReason;

/// How many connections the process may have. Asked by all workers, before each accept; told by one task.
#[derive(Debug)]
pub(crate) struct Gate {
    /// What the operator allows.
    most: usize,
    by_descriptors: AtomicUsize,
    by_memory: AtomicUsize,
}

/// How many connections may be open until the next look, by what this process has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Allowance {
    pub(crate) by_descriptors: usize,
    pub(crate) by_memory: usize,
}

impl Gate {
    /// Open for so many, or for as many as come; nothing is lacking as long as nobody says so.
    pub(crate) fn new(most: Option<NonZeroU32>) -> Self {
        Self {
            most: most.map_or(usize::MAX, |most| most.get() as usize),
            by_descriptors: AtomicUsize::new(usize::MAX),
            by_memory: AtomicUsize::new(usize::MAX),
        }
    }

    /// Holds until it is called again.
    pub(crate) fn allow(&self, Allowance { by_descriptors, by_memory }: Allowance) {
        // Relaxed: each is true by itself, and a worker that has not heard of it yet admits a few more.
        self.by_descriptors.store(by_descriptors, Ordering::Relaxed);
        self.by_memory.store(by_memory, Ordering::Relaxed);
    }

    /// How many there may be now, for whatever reason; `usize::MAX` without any limit.
    pub(crate) fn most(&self) -> usize {
        let told = [&self.by_descriptors, &self.by_memory].map(|most| most.load(Ordering::Relaxed));
        told.into_iter().fold(self.most, usize::min)
    }

    /// Why nobody may come in while so many connections are open; `None` where one may.
    pub(crate) fn closed(&self, open: usize) -> Option<PauseReason> {
        if open >= self.by_descriptors.load(Ordering::Relaxed) {
            Some(PauseReason::FdLimit)
        } else if open >= self.by_memory.load(Ordering::Relaxed) {
            Some(PauseReason::Memory)
        } else {
            (open >= self.most).then_some(PauseReason::ConnectionLimit)
        }
    }
}

/// How many UDP flows there are and may be, in all shards together. Each flow is counted once when it begins and once when
/// it ends; told by one task.
#[derive(Debug)]
pub(crate) struct FlowGate {
    open: AtomicUsize,
    most: AtomicUsize,
}

/// Open for as many as come; nothing is lacking as long as nobody says so.
impl Default for FlowGate {
    fn default() -> Self {
        Self { open: AtomicUsize::new(0), most: AtomicUsize::new(usize::MAX) }
    }
}

// All relaxed: the numbers guard no other memory, and shards that look at the same moment exceed the limit by one each.
impl FlowGate {
    /// Holds until it is called again.
    pub(crate) fn allow(&self, most: usize) {
        self.most.store(most, Ordering::Relaxed);
    }

    /// Flows that there are now.
    pub(crate) fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// How many there may be now; `usize::MAX` where nobody has said so.
    pub(crate) fn most(&self) -> usize {
        self.most.load(Ordering::Relaxed)
    }

    /// True where there may be no more flows than there are.
    pub(crate) fn is_closed(&self) -> bool {
        self.open() >= self.most()
    }

    /// One more.
    pub(crate) fn enter(&self) {
        self.open.fetch_add(1, Ordering::Relaxed);
    }

    /// So many less.
    pub(crate) fn leave(&self, count: usize) {
        self.open.fetch_sub(count, Ordering::Relaxed);
    }
}

/// How many connections one ServicePort may have; as many as come by default. Set by `control`, read before each accept.
#[derive(Debug, Default)]
pub(crate) struct Cap(AtomicU32);

impl Cap {
    /// For connections from then on.
    pub(crate) fn set(&self, most: Option<NonZeroU32>) {
        self.0.store(most.map_or(0, NonZeroU32::get), Ordering::Relaxed);
    }

    /// `None` where there is no limit.
    pub(crate) fn most(&self) -> Option<u64> {
        let most = self.0.load(Ordering::Relaxed);
        (most > 0).then_some(u64::from(most))
    }
}

/// What an operator can do.
pub(crate) fn remedy(reason: PauseReason) -> &'static str {
    match reason {
        PauseReason::FdLimit => "a higher limit of open files (LimitNOFILE=, the container runtime's), or more nodes",
        PauseReason::Memory => "a higher memory limit, or more nodes",
        PauseReason::ConnectionLimit => "a higher --max-connections, or more nodes",
        PauseReason::ServiceLimit => {
            "a higher kube-relay.dev/max-connections, or clients that close what they do not use"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(most: u32) -> Gate {
        Gate::new(NonZeroU32::new(most))
    }

    #[test]
    fn given_no_limit_when_asked_then_it_is_open_however_many_there_are() {
        assert_eq!(gate(0).closed(1_000_000), None);
    }

    #[test]
    fn given_a_limit_of_the_process_when_it_is_reached_then_it_is_closed_until_one_has_gone() {
        let gate = gate(2);

        assert_eq!([1, 2, 3, 1].map(|open| gate.closed(open)), {
            let full = Some(PauseReason::ConnectionLimit);
            [None, full, full, None]
        });
    }

    #[test]
    fn f22_given_an_allowance_when_there_are_more_then_it_is_closed_for_what_is_lacking_until_it_is_not() {
        let gate = gate(50);

        gate.allow(Allowance { by_descriptors: 20, by_memory: 10 });
        assert_eq!(
            [9, 10, 20].map(|open| gate.closed(open)),
            [None, Some(PauseReason::Memory), Some(PauseReason::FdLimit)]
        );

        gate.allow(Allowance { by_descriptors: 20, by_memory: 0 });
        assert_eq!(gate.closed(0), Some(PauseReason::Memory), "none at all");

        gate.allow(Allowance { by_descriptors: 100, by_memory: usize::MAX });
        assert_eq!([20, 50].map(|open| gate.closed(open)), [None, Some(PauseReason::ConnectionLimit)]);
        assert_eq!(gate.most(), 50);
    }

    #[test]
    fn given_a_cap_of_a_service_when_set_then_it_holds_and_none_is_no_cap() {
        let cap = Cap::default();
        assert_eq!(cap.most(), None);

        cap.set(NonZeroU32::new(2));
        assert_eq!(cap.most(), Some(2));

        cap.set(None);
        assert_eq!(cap.most(), None);
    }

    #[test]
    fn f18_given_flows_when_there_may_be_no_more_then_it_is_closed_until_some_have_gone() {
        let gate = FlowGate::default();
        gate.enter();
        gate.enter();
        assert!(!gate.is_closed(), "nobody has set a limit");

        gate.allow(2);
        assert!(gate.is_closed());
        gate.leave(1);
        assert!(!gate.is_closed());
        assert_eq!(gate.open(), 1);

        gate.allow(0);
        assert!(gate.is_closed());
    }

    #[test]
    fn given_each_reason_when_told_then_there_is_something_to_do() {
        assert!(PauseReason::ALL.iter().all(|reason| !remedy(*reason).is_empty()));
    }
}
