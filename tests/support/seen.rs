//! What a running program shows from outside: its numbers at `/metrics`, its memory, time, descriptors and sockets in `/proc`.

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

/// The value of one series, named with its labels as they are written, if it has any; `None` where it is not there.
pub(crate) fn gauge(metrics: &str, metric: &str) -> Option<f64> {
    metrics.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix(' ')?.parse().ok())
}

/// The kernel's numbers of the TCP sockets that listen at an IPv4 address, whoever owns them: another number is another socket.
pub(crate) fn listening(address: SocketAddr) -> Vec<u64> {
    let SocketAddr::V4(address) = address else { return Vec::new() };
    let table = fs::read_to_string("/proc/self/net/tcp").unwrap_or_default();
    // As the kernel prints it: the address as a number of this machine, then the port.
    let wanted = format!("{:08X}:{:04X}", u32::from_ne_bytes(address.ip().octets()), address.port());
    let number = |line: &str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let (local, state, number) = (fields.get(1)?, fields.get(3)?, fields.get(9)?);
        (*local == wanted && *state == LISTEN).then(|| number.parse().ok())?
    };
    table.lines().filter_map(number).collect()
}

/// The state of a listener in `/proc/net/tcp`.
const LISTEN: &str = "0A";

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
