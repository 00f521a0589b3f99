//! How many connections and flows there is room for: looks at descriptors and memory several times a second, and tells the
//! gates.
//!
//! A look is good for a number of connections, not for a time: however many come until the next one, they are not more
//! than what was left has room for. Where memory is read is `cgroup`; who rests when there is no room is `serve::tcp`, and
//! whose flow makes room for another `serve::room`.

use std::fs;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};
use tokio_util::task::AbortOnDropHandle;

use crate::capacity::CAPACITY;
use crate::cgroup::{Level, MemoryGroups};
use crate::heap;
use crate::serve::gate::{Allowance, FlowGate};
use crate::serve::tcp::TcpShared;
use crate::stats::PROCESS;

/// From a look to the next. With the longest rest of who accepts (500 ms) it is what recovery takes at most.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// While nothing is open and nothing lacks, one look in so many is enough, and an idle process stays one.
const LOOKS_PER_IDLE_LOOK: u32 = 16;

/// Descriptors that no client gets: a twentieth within these bounds, and not more than half of what listeners and flows have
/// left. For our own servers, what the control plane asks, backends of clients that are already in, and pipes: that does
/// not grow with the limit.
const RESERVE: RangeInclusive<u64> = 64..=400;

/// What one more connection may take before the next look, in the process and in the kernel: two sockets with a first
/// answer in their queues. Idle ones take a fifth.
const CONNECTION_BYTES: u64 = 32 * 1024;

/// The same of a flow: a socket with an answer in its queue.
const FLOW_BYTES: u64 = 8 * 1024;

/// So many connections and flows there may be however little memory is left: a relay that takes most of its limit for its
/// Services alone is still to serve somebody. They take a fifth of what is kept of 64 MiB. (The few flows that there may be
/// however few descriptors are left are counted in `serve::room`.)
const FEW: usize = 64;

/// Memory that is kept of a group which others may be in. Where that is all pods of a node, four fifths of its limit are taken
/// day by day, and a fifth of it would be many times what this process ever needs.
const KEPT_OF_OTHERS_BYTES: u64 = 256 * 1024 * 1024;

/// Flows may take one part in so many of what is left, and connections the rest: together they cannot go beyond it before
/// the next look, which shares out anew what is still there.
const FLOWS_SHARE: u64 = 4;

/// Where memory is short, how often what the allocator keeps is given back: that takes milliseconds.
const GIVE_BACK_EVERY: Duration = Duration::from_secs(10);

/// Where a kernel does not tell how many descriptors there are, they are counted at each so many looks: that takes
/// milliseconds for tens of thousands.
const LOOKS_PER_COUNT: u32 = 8;

/// Looks until the handle is dropped. `flow_limit` is how many flows there may be though nothing is lacking.
pub(crate) fn follow(tcp: Arc<TcpShared>, flows: Arc<FlowGate>, flow_limit: usize) -> AbortOnDropHandle<()> {
    let mut looks = Looks::new(MemoryGroups::of_this_process());
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            let open = Open { connections: tcp.open_connections(), flows: flows.open() };
            if looks.is_due(open) {
                // The files are the kernel's own, in memory: nothing to wait for.
                let most = looks.look(open, Instant::now());
                tcp.allow(most.connections);
                flows.allow(most.flows);
                PROCESS.connections_limit.set(tcp.most_connections() as u64);
            }
            CAPACITY.connections.tell(open.connections as u64, tcp.most_connections() as u64);
            CAPACITY.flows.tell(open.flows as u64, flows.most().min(flow_limit) as u64);
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }))
}

/// What clients have open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Open {
    connections: usize,
    flows: usize,
}

/// How much may be open until the next look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Most {
    connections: Allowance,
    flows: usize,
}

/// What has to be remembered from look to look.
struct Looks {
    groups: MemoryGroups,
    descriptors: Descriptors,
    gave_back: Option<Instant>,
    /// Looks that may be left out.
    rest: u32,
    /// The last look has found that nobody may come in.
    short: bool,
}

impl Looks {
    fn new(groups: MemoryGroups) -> Self {
        Self { groups, descriptors: Descriptors::default(), gave_back: None, rest: 0, short: false }
    }

    /// Where nothing is open what may be is not soon used up: a look is good for a number.
    fn is_due(&mut self, open: Open) -> bool {
        if open == Open::default() && !self.short && self.rest > 0 {
            self.rest -= 1;
            return false;
        }
        self.rest = LOOKS_PER_IDLE_LOOK - 1;
        true
    }

    fn look(&mut self, open: Open, now: Instant) -> Most {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let others = self.descriptors.others(open.connections);
        CAPACITY.descriptors.tell(others + 2 * open.connections as u64, limit);
        let level = tightest(self.groups.levels());
        let free_bytes = level.map(free_bytes);
        let taken_bytes = level.map_or(0, |level| level.used_bytes);
        CAPACITY.memory_bytes.tell(taken_bytes, free_bytes.map_or(u64::MAX, |free| taken_bytes + free));
        if free_bytes == Some(0) {
            self.give_back(now);
        }
        let most = most(open, connections_that_fit(limit, others), free_bytes);
        let Allowance { by_descriptors, by_memory } = most.connections;
        self.short = by_descriptors.min(by_memory) <= open.connections;
        most
    }

    /// What the allocator keeps of connections that have ended must not keep new ones out.
    fn give_back(&mut self, now: Instant) {
        if self.gave_back.is_none_or(|last| now.saturating_duration_since(last) >= GIVE_BACK_EVERY) {
            self.gave_back = Some(now);
            heap::give_back();
        }
    }
}

/// Shares out what is left: descriptors, said as connections, and memory, where it has a limit. Where there are more
/// connections than fit, as flows, listeners or pipes have come, none takes the place of one that ends until the reserve is
/// whole again. Pure.
fn most(open: Open, fitting: u64, free_bytes: Option<u64>) -> Most {
    let plus = |count: usize, more: u64| count.saturating_add(usize::try_from(more).unwrap_or(usize::MAX));
    let free = fitting.saturating_sub(open.connections as u64);
    let by_descriptors = plus(open.connections, free - free / FLOWS_SHARE).min(plus(0, fitting));
    let flows_by_descriptors = plus(open.flows, free / FLOWS_SHARE * 2);
    let (by_memory, flows_by_memory) = match free_bytes {
        None => (usize::MAX, usize::MAX),
        Some(0) => (FEW, FEW),
        Some(free) => (
            plus(open.connections, (free - free / FLOWS_SHARE) / CONNECTION_BYTES).max(FEW),
            plus(open.flows, free / FLOWS_SHARE / FLOW_BYTES).max(FEW),
        ),
    };
    Most { connections: Allowance { by_descriptors, by_memory }, flows: flows_by_descriptors.min(flows_by_memory) }
}

/// Connections that there may be where so many descriptors, of the limit, are not theirs. Pure.
pub(crate) fn connections_that_fit(limit: u64, others: u64) -> u64 {
    let left = limit.saturating_sub(others);
    let reserve = (limit / 20).clamp(*RESERVE.start(), *RESERVE.end()).min(left / 2);
    (left - reserve) / 2
}

/// The group that will be the first to have taken what it may; `None` without a limit. Pure.
fn tightest(levels: impl Iterator<Item = Level>) -> Option<Level> {
    levels.min_by_key(|level| free_bytes(*level))
}

/// Memory until a group has taken what it may: 80 % of its limit, and of one that it is in, where others may have
/// taken most, all but [`KEPT_OF_OTHERS_BYTES`] where that is more. Pure.
fn free_bytes(Level { used_bytes, limit_bytes, is_own }: Level) -> u64 {
    let fifth = limit_bytes - limit_bytes / 5 * 4;
    let kept = if is_own { fifth } else { fifth.min(KEPT_OF_OTHERS_BYTES) };
    limit_bytes.saturating_sub(kept).saturating_sub(used_bytes)
}

/// Descriptors of this process that belong to no connection: listeners, event loops, flows, pipes.
#[derive(Debug, Default)]
struct Descriptors {
    others: u64,
    /// Looks until they are counted again, where that is dear.
    rest: u32,
}

impl Descriptors {
    const FOLDER: &str = "/proc/self/fd";

    /// Where they cannot be counted, as many as the last time.
    fn others(&mut self, open: usize) -> u64 {
        let used = match told(Path::new(Self::FOLDER)) {
            None if self.rest > 0 => {
                self.rest -= 1;
                return self.others;
            }
            None => {
                self.rest = LOOKS_PER_COUNT - 1;
                counted(Path::new(Self::FOLDER))
            }
            told => told,
        };
        if let Some(used) = used {
            self.others = used.saturating_sub(2 * open as u64);
        }
        self.others
    }
}

/// As the size of the folder, since Linux 6.2; before that it is 0.
fn told(folder: &Path) -> Option<u64> {
    fs::metadata(folder).ok().map(|folder| folder.len()).filter(|count| *count > 0)
}

fn counted(folder: &Path) -> Option<u64> {
    fs::read_dir(folder).ok().map(|entries| entries.count() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn level(used: u64, limit: u64) -> Level {
        Level { used_bytes: used * MIB, limit_bytes: limit * MIB, is_own: true }
    }

    fn open(connections: usize, flows: usize) -> Open {
        Open { connections, flows }
    }

    #[test]
    fn f14_given_a_limit_of_descriptors_when_judged_then_a_reserve_is_left_and_each_connection_takes_two() {
        assert_eq!(connections_that_fit(1_024, 60), 450, "64 stay");
        assert_eq!(connections_that_fit(4_000, 1_000), 1_400, "a twentieth stays");
        assert_eq!(connections_that_fit(20_000, 60), 9_770, "400 at most");
        assert_eq!(connections_that_fit(20_000, 19_700), 75, "half of what is left at most");
        assert_eq!(connections_that_fit(100, 10), 22);
        assert_eq!([connections_that_fit(1_024, 1_024), connections_that_fit(0, 3)], [0, 0]);
        assert!(connections_that_fit(u64::MAX, 0) > u64::MAX / 4);
    }

    #[test]
    fn f14_given_descriptors_when_shared_out_then_connections_and_flows_together_never_take_more_than_is_left() {
        for fitting in [0, 1, 3, 4, 450, 9_770] {
            for used in [0, fitting / 2, fitting, fitting + 5] {
                let now = open(used as usize, 7);

                let Most { connections, flows } = most(now, fitting, None);

                let more = 2 * connections.by_descriptors.saturating_sub(now.connections) + (flows - now.flows);
                assert!(more as u64 <= 2 * fitting.saturating_sub(used), "{used} of {fitting}: {more} more");
                assert_eq!(connections.by_descriptors > now.connections, used < fitting, "the last one may come");
                assert!(connections.by_descriptors as u64 <= fitting, "what is too much is not replaced");
            }
        }
        assert_eq!(most(open(0, 0), u64::MAX / 2, None).connections.by_memory, usize::MAX);
    }

    #[test]
    fn f22_given_a_limit_of_memory_when_80_percent_is_taken_then_none_but_a_few_may_come() {
        let free = |used, limit| tightest([level(used, limit)].into_iter()).map(free_bytes);
        assert_eq!(free(80, 100), Some(0));
        assert_eq!(free(200, 100), Some(0));
        assert_eq!(free(79, 100), Some(MIB));
        assert_eq!(tightest(std::iter::empty()), None);

        let by_memory = |free| {
            let Most { connections, flows } = most(open(100, 90), 10_000, free);
            (connections.by_memory, flows)
        };
        assert_eq!(by_memory(Some(0)), (FEW, FEW), "fewer than there are");
        assert_eq!(by_memory(Some(MIB)), (124, 122), "24 of 32 KiB, 32 of 8 KiB");
        assert_eq!(by_memory(None).0, usize::MAX);
    }

    #[test]
    fn f22_given_several_groups_when_judged_then_the_fullest_decides() {
        let levels = [level(0, 1_000), level(15, 20), level(0, 2_000)];

        assert_eq!(tightest(levels.into_iter()).map(free_bytes), Some(MIB));
    }

    #[test]
    fn f22_given_a_group_that_others_fill_when_judged_then_a_part_is_kept_that_this_process_may_need() {
        let others = |used, limit| Level { is_own: false, ..level(used, limit) };
        let free = |used, limit| tightest([others(used, limit)].into_iter()).map(free_bytes);

        assert_eq!(free(58_000, 64_000), Some((6_000 - 256) * MIB), "a node as full as most");
        assert_eq!(free(63_800, 64_000), Some(0));
        assert_eq!(free(79, 100), Some(MIB), "of a small one a fifth is less");
    }

    #[test]
    fn given_a_process_when_it_is_idle_then_it_is_looked_at_now_and_then_and_at_work_or_in_need_each_time() {
        let mut looks = Looks::new(MemoryGroups::default());
        let due = |looks: &mut Looks, open| (0..32).filter(|_| looks.is_due(open)).count();

        assert_eq!(due(&mut looks, Open::default()), 2);
        assert_eq!(due(&mut looks, open(1, 0)), 32);
        assert_eq!(due(&mut looks, open(0, 1)), 32);
        assert!(due(&mut looks, Open::default()) <= 2);
        looks.short = true;
        assert_eq!(due(&mut looks, Open::default()), 32, "who waits is to come in as soon as there is room");
    }

    #[test]
    fn given_this_process_when_its_descriptors_are_asked_for_then_each_way_counts_them() {
        let folder = Path::new(Descriptors::FOLDER);
        let _held: Vec<_> = (0..300).map(|_| fs::File::open("/dev/null").expect("a descriptor")).collect();

        // Other tests have some, too. Before Linux 6.2 it is not told.
        assert!(counted(folder).is_some_and(|count| count >= 300));
        assert!(told(folder).is_none_or(|count| count >= 300));
    }

    #[test]
    fn given_connections_when_descriptors_are_asked_for_then_theirs_are_not_among_the_others() {
        let _held: Vec<_> = (0..300).map(|_| fs::File::open("/dev/null").expect("a descriptor")).collect();
        let mut descriptors = Descriptors::default();

        assert!(descriptors.others(0) >= 300);
        let mut descriptors = Descriptors::default();
        assert_eq!(descriptors.others(1_000_000), 0);
    }

    #[test]
    fn given_short_memory_when_looked_at_again_then_it_is_given_back_now_and_then() {
        let mut looks = Looks::new(MemoryGroups::default());
        let begin = Instant::now();

        let given = [0, 1, 9, 10, 11, 20].map(|second| {
            let now = begin + Duration::from_secs(second);
            looks.give_back(now);
            looks.gave_back == Some(now)
        });

        assert_eq!(given, [true, false, false, true, false, true]);
    }

    #[test]
    fn given_no_group_with_a_limit_when_looked_then_memory_keeps_nobody_out() {
        let mut looks = Looks::new(MemoryGroups::default());

        let Most { connections, flows } = looks.look(Open::default(), Instant::now());

        assert_eq!(connections.by_memory, usize::MAX);
        assert!(connections.by_descriptors > 0 && flows > 0 && !looks.short);
    }
}
