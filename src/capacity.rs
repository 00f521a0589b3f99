//! What is taken of what there is: connections, flows, descriptors, memory.
//!
//! Written by `headroom` at each look, read by `metrics` and `summary`. What follows from it is decided in `headroom`.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::stats::Latest;

/// Of this process.
pub static CAPACITY: Capacity =
    Capacity { connections: Share::new(), flows: Share::new(), descriptors: Share::new(), memory_bytes: Share::new() };

/// See [`CAPACITY`].
#[derive(Debug)]
pub struct Capacity {
    /// TCP connections.
    pub connections: Share,
    /// UDP flows.
    pub flows: Share,
    /// Open files: sockets, pipes and what else there is.
    pub descriptors: Share,
    /// Memory of the cgroup that is nearest to its limit, of what may be taken before clients have to wait.
    pub memory_bytes: Share,
}

/// How much of one thing is taken, and how much may be.
#[derive(Debug)]
pub struct Share {
    taken: Latest,
    /// `u64::MAX` without a limit.
    most: Latest,
}

impl Share {
    const fn new() -> Self {
        Self { taken: Latest::new(), most: Latest::at(u64::MAX) }
    }

    pub(crate) fn tell(&self, taken: u64, most: u64) {
        self.taken.set(taken);
        self.most.set(most);
    }

    /// How much may be taken; `None` without a limit, and before the first look.
    pub fn most(&self) -> Option<u64> {
        Some(self.most.get()).filter(|most| *most < u64::MAX)
    }

    fn report(&self, what: &'static str, set_by: &'static str) -> LimitReport {
        LimitReport { what: what.into(), taken: self.taken.get(), most: self.most(), set_by: set_by.into() }
    }
}

/// One limit of a running relay.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LimitReport {
    /// `connections`, `flows`, `descriptors` or `memory_bytes`.
    pub what: Cow<'static, str>,
    /// How many there are.
    pub taken: u64,
    /// How many there may be now; left out where there is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub most: Option<u64>,
    /// What sets it.
    pub set_by: Cow<'static, str>,
}

impl Capacity {
    /// Each limit; that of memory only where there is one.
    pub fn report(&self) -> Vec<LimitReport> {
        let memory = self.memory_bytes.report("memory_bytes", "four fifths of the cgroup's memory limit");
        let mut limits = vec![
            self.connections.report("connections", "--max-connections, descriptors or memory, whichever is least"),
            self.flows.report("flows", "local ports, descriptors or memory, whichever is least"),
            self.descriptors.report("descriptors", "the limit of open files (LimitNOFILE=, the container runtime's)"),
        ];
        limits.extend(memory.most.is_some().then_some(memory));
        limits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_limits_when_reported_then_what_has_none_says_so_and_memory_without_one_is_left_out() {
        let capacity = Capacity {
            connections: Share::new(),
            flows: Share::new(),
            descriptors: Share::new(),
            memory_bytes: Share::new(),
        };
        let told = || capacity.report().into_iter().map(|limit| (limit.taken, limit.most)).collect::<Vec<_>>();
        capacity.connections.tell(3, u64::MAX);
        capacity.flows.tell(2, 14_116);
        capacity.memory_bytes.tell(5, u64::MAX);
        assert_eq!(told(), [(3, None), (2, Some(14_116)), (0, None)]);

        capacity.memory_bytes.tell(5, 10);
        assert_eq!(told()[3], (5, Some(10)));
    }
}
