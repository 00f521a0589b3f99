//! How many connections there is room for: looks at descriptors and memory several times a second, and tells the gate.
//!
//! A look is good for a number of connections, not for a time: however many come until the next one, they are not more
//! than what was left has room for. Where memory is read is `cgroup`; who rests when there is no room is `serve::tcp`.

use std::fs;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};
use tokio_util::task::AbortOnDropHandle;

use crate::cgroup::{Level, MemoryGroups};
use crate::heap;
use crate::serve::gate::Allowance;
use crate::serve::tcp::TcpShared;

/// From a look to the next. With the longest rest of who accepts (500 ms) it is what recovery takes at most.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Descriptors that no client gets: a twentieth within these bounds, and not more than half of what listeners and flows have
/// left. For our own servers, what the control plane asks, backends of clients that are already in, and pipes: that does
/// not grow with the limit.
const RESERVE: RangeInclusive<u64> = 64..=400;

/// What one more connection may take before the next look, in the process and in the kernel: two sockets with a first
/// answer in their queues. Idle ones take a fifth.
const CONNECTION_BYTES: u64 = 32 * 1024;

/// Where memory is short, how often what the allocator keeps is given back: that takes milliseconds.
const GIVE_BACK_EVERY: Duration = Duration::from_secs(10);

/// Where a kernel does not tell how many descriptors there are, they are counted at each so many looks: that takes
/// milliseconds for tens of thousands.
const LOOKS_PER_COUNT: u32 = 8;

/// Looks until the handle is dropped.
pub(crate) fn follow(tcp: Arc<TcpShared>) -> AbortOnDropHandle<()> {
    let mut looks = Looks::new(MemoryGroups::of_this_process());
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            // The files are the kernel's own, in memory: nothing to wait for.
            tcp.allow(looks.look(tcp.open_connections(), Instant::now()));
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }))
}

/// What has to be remembered from look to look.
struct Looks {
    groups: MemoryGroups,
    descriptors: Descriptors,
    gave_back: Option<Instant>,
}

impl Looks {
    fn new(groups: MemoryGroups) -> Self {
        Self { groups, descriptors: Descriptors::default(), gave_back: None }
    }

    fn look(&mut self, open: usize, now: Instant) -> Allowance {
        let by_memory = most_by_memory(open, self.groups.levels());
        if by_memory == 0 {
            self.give_back(now);
        }
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        Allowance { by_descriptors: most_by_descriptors(limit, self.descriptors.others(open)), by_memory }
    }

    /// What the allocator keeps of connections that have ended must not keep new ones out.
    fn give_back(&mut self, now: Instant) {
        if self.gave_back.is_none_or(|last| now.saturating_duration_since(last) >= GIVE_BACK_EVERY) {
            self.gave_back = Some(now);
            heap::give_back();
        }
    }
}

/// Connections that there may be where so many descriptors are not theirs. Pure.
fn most_by_descriptors(limit: u64, others: u64) -> usize {
    let left = limit.saturating_sub(others);
    let reserve = (limit / 20).clamp(*RESERVE.start(), *RESERVE.end()).min(left / 2);
    usize::try_from((left - reserve) / 2).unwrap_or(usize::MAX)
}

/// Connections that there may be where so many are open; none where a group has taken 80 % of its limit. Pure.
fn most_by_memory(open: usize, levels: impl Iterator<Item = Level>) -> usize {
    let of_level = |Level { used_bytes, limit_bytes }| {
        let mark_bytes = limit_bytes / 5 * 4;
        if used_bytes >= mark_bytes {
            return 0;
        }
        let more = (mark_bytes - used_bytes) / CONNECTION_BYTES;
        open.saturating_add(usize::try_from(more).unwrap_or(usize::MAX))
    };
    levels.map(of_level).min().unwrap_or(usize::MAX)
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
        Level { used_bytes: used * MIB, limit_bytes: limit * MIB }
    }

    #[test]
    fn f14_given_a_limit_of_descriptors_when_judged_then_a_reserve_is_left_and_each_connection_takes_two() {
        assert_eq!(most_by_descriptors(1_024, 60), 450, "64 stay");
        assert_eq!(most_by_descriptors(4_000, 1_000), 1_400, "a twentieth stays");
        assert_eq!(most_by_descriptors(20_000, 60), 9_770, "400 at most");
        assert_eq!(most_by_descriptors(20_000, 19_700), 75, "half of what is left at most");
        assert_eq!(most_by_descriptors(100, 10), 22);
        assert_eq!([most_by_descriptors(1_024, 1_024), most_by_descriptors(0, 3)], [0, 0]);
        assert!(most_by_descriptors(u64::MAX, 0) > usize::MAX / 4);
    }

    #[test]
    fn f22_given_a_limit_of_memory_when_80_percent_is_taken_then_none_may_come() {
        assert_eq!(most_by_memory(100, [level(80, 100)].into_iter()), 0);
        assert_eq!(most_by_memory(100, [level(200, 100)].into_iter()), 0);
        assert_eq!(most_by_memory(100, [level(79, 100)].into_iter()), 132, "32 KiB each");
        assert_eq!(most_by_memory(100, std::iter::empty()), usize::MAX);
    }

    #[test]
    fn f22_given_several_groups_when_judged_then_the_fullest_decides() {
        let levels = [level(0, 1_000), level(15, 20), level(0, 2_000)];

        assert_eq!(most_by_memory(7, levels.into_iter()), 7 + 32);
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
        let allowance = Looks::new(MemoryGroups::default()).look(0, Instant::now());

        assert_eq!(allowance.by_memory, usize::MAX);
        assert!(allowance.by_descriptors > 0);
    }
}
