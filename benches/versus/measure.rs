//! Readings of CPU time and memory from `/proc`, and the difference of two.
//!
//! The proxy's CPU is the run time that the scheduler kept for each of its threads, in nanoseconds: it has the softirq
//! work done in their context, and no sampling error. All-CPU comes from `/proc/stat`, in ticks of 10 ms.

use std::fs;
use std::time::{Duration, Instant};

use rustix::time::ClockId;

/// Above this share of all CPUs other programs have disturbed a cell.
const DISTURBED_SHARE: f64 = 0.15;

/// The clocks at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Reading {
    at: Instant,
    proxy: Duration,
    /// This process: load generator and backends.
    ours: Duration,
    /// Kernel threads that do network work on behalf of everybody.
    kernel: Duration,
    busy: Duration,
    /// What the hypervisor gave to others.
    stolen: Duration,
}

/// What happened between two readings.
#[derive(Clone, Debug)]
pub(crate) struct Cost {
    /// Wall time.
    pub(crate) elapsed: Duration,
    /// Run time of the proxy's threads.
    pub(crate) proxy: Duration,
    /// Busy time of all CPUs.
    pub(crate) all: Duration,
    /// Share of all CPUs that neither the rig nor the proxy nor the network used (0..=1).
    pub(crate) foreign_share: f64,
}

impl Cost {
    /// True where other programs took so much that the figures are doubtful.
    pub(crate) fn is_disturbed(&self) -> bool {
        self.foreign_share > DISTURBED_SHARE
    }
}

impl Reading {
    /// Reads all clocks; the proxy is these processes, with all their threads.
    pub(crate) fn take(proxy: &[u32]) -> Self {
        let (busy, stolen) = machine();
        Self {
            at: Instant::now(),
            proxy: run_time(proxy),
            ours: own_time(),
            kernel: run_time(&network_threads()),
            busy,
            stolen,
        }
    }

    /// What happened since an earlier reading.
    pub(crate) fn since(&self, earlier: &Self) -> Cost {
        let elapsed = self.at - earlier.at;
        let proxy = self.proxy.saturating_sub(earlier.proxy);
        let all = self.busy.saturating_sub(earlier.busy);
        let known = proxy + self.ours.saturating_sub(earlier.ours) + self.kernel.saturating_sub(earlier.kernel);
        let foreign = all.saturating_sub(known) + self.stolen.saturating_sub(earlier.stolen);
        let capacity = elapsed.as_secs_f64() * cpus() as f64;
        Cost { elapsed, proxy, all, foreign_share: foreign.as_secs_f64() / capacity }
    }
}

/// How many CPUs there are for us: what each peer gets as its number of workers.
pub(crate) fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Time on CPU of all threads of some processes.
pub(crate) fn run_time(pids: &[u32]) -> Duration {
    let threads = pids.iter().flat_map(|pid| fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten());
    let nanos = threads.filter_map(|thread| {
        let schedstat = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        schedstat.split_whitespace().next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanos.sum())
}

/// This process, its ended threads included.
fn own_time() -> Duration {
    let time = rustix::time::clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn network_threads() -> Vec<u32> {
    // They never change, but looking is cheap beside a window of 200 ms and more.
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("ksoftirqd/")))
        .collect()
}

/// Busy and stolen time of all CPUs.
fn machine() -> (Duration, Duration) {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let mut ticks = stat.lines().next().unwrap_or_default().split_whitespace().skip(1);
    let mut next = || ticks.next().and_then(|ticks| ticks.parse::<u64>().ok()).unwrap_or(0);
    let [user, nice, system, _idle, _iowait, irq, softirq, stolen] = std::array::from_fn(|_| next());
    let time = |ticks: u64| Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND);
    (time(user + nice + system + irq + softirq), time(stolen))
}

/// USER_HZ, the same on every architecture that Rust and Kubernetes share.
const TICKS_PER_SECOND: u64 = 100;

/// Memory of some processes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    /// RssAnon: what nobody else shares.
    pub(crate) private_bytes: u64,
    /// VmRSS: code and shared pages, too.
    pub(crate) resident_bytes: u64,
}

impl Memory {
    /// Reads and adds it up.
    pub(crate) fn of(pids: &[u32]) -> Self {
        let mut sum = Self { private_bytes: 0, resident_bytes: 0 };
        for pid in pids {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            sum.private_bytes += field_bytes(&status, "RssAnon:");
            sum.resident_bytes += field_bytes(&status, "VmRSS:");
        }
        sum
    }
}

fn field_bytes(status: &str, field: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Median and quartiles of a sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Quartiles {
    /// A quarter is below.
    pub(crate) lower: f64,
    /// Half is below.
    pub(crate) median: f64,
    /// Three quarters are below.
    pub(crate) upper: f64,
}

impl Quartiles {
    /// Of a sample; `None` where it is empty. Between two values it is on the line that joins them.
    pub(crate) fn of(mut sample: Vec<f64>) -> Option<Self> {
        sample.sort_by(f64::total_cmp);
        let last = sample.len().checked_sub(1)?;
        let at = |share: f64| {
            let place = share * last as f64;
            let (below, above) = (sample[place.floor() as usize], sample[place.ceil() as usize]);
            below + (above - below) * place.fract()
        };
        Some(Self { lower: at(0.25), median: at(0.5), upper: at(0.75) })
    }
}

/// The value below which this share of a sorted sample lies.
pub(crate) fn percentile(sorted: &[u32], share: f64) -> Option<u32> {
    let last = sorted.len().checked_sub(1)?;
    sorted.get((share * last as f64).round() as usize).copied()
}
