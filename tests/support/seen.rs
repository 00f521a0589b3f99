//! What a running program shows from outside: its numbers at `/metrics`, its memory, time and descriptors in `/proc`.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;
use std::{fs, path::Path};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// The body that an admin server answers with.
pub(crate) fn page(server: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
        _ => Err(io::Error::other(answer)),
    }
}

/// The sum of a metric over all series that have all of these labels, each written as `name="value"`.
pub(crate) fn sum(metrics: &str, metric: &str, labels: &[&str]) -> u64 {
    let of_it = metrics.lines().filter_map(|line| line.strip_prefix(metric));
    let series = of_it.filter(|rest| rest.starts_with(['{', ' ']) && labels.iter().all(|label| rest.contains(label)));
    series.filter_map(|rest| rest.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

/// Memory that the process shares with nobody, in bytes.
pub(crate) fn private_bytes(pid: u32) -> u64 {
    memory(pid, "RssAnon:")
}

/// All memory that is there for the process, its program among it: now, and at most so far, in bytes.
pub(crate) fn resident_bytes(pid: u32) -> [u64; 2] {
    ["VmRSS:", "VmHWM:"].map(|row| memory(pid, row))
}

fn memory(pid: u32, row: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(row)).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// How long its threads have run.
pub(crate) fn run_time(pid: u32) -> Duration {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let nanoseconds = threads.filter_map(|thread| {
        let schedstat = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        schedstat.split_whitespace().next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanoseconds.sum())
}

/// How many descriptors it has open.
pub(crate) fn descriptors(pid: u32) -> usize {
    fs::read_dir(Path::new("/proc").join(pid.to_string()).join("fd")).map_or(0, Iterator::count)
}
