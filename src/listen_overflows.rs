//! What the kernel turned away before anybody here could see it: clients for whom a listener's queue had no place.
//!
//! The number is the network namespace's, of all its listeners. A client of a relay is among them where this process accepts
//! too slowly, or where it accepts nobody for lack of descriptors or memory, and the queue is full.

use std::fs;

/// How many there were since the namespace began; `None` where the kernel does not tell.
pub(crate) fn read() -> Option<u64> {
    parse(&fs::read_to_string("/proc/self/net/netstat").ok()?)
}

/// Two lines that begin alike: names, then numbers.
fn parse(text: &str) -> Option<u64> {
    const GROUP: &str = "TcpExt:";
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(GROUP));
    let (names, numbers) = (lines.next()?, lines.next()?);
    let mut both = names.split_whitespace().zip(numbers.split_whitespace());
    both.find(|(name, _)| *name == "ListenOverflows").and_then(|(_, number)| number.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f09_given_the_kernels_table_when_read_then_the_number_under_the_name_is_found() {
        let text = "TcpExt: SyncookiesSent ListenOverflows ListenDrops\nTcpExt: 7 12 13\nIpExt: InNoRoutes\nIpExt: 3\n";

        assert_eq!(parse(text), Some(12));
        assert_eq!(parse("IpExt: ListenOverflows\nIpExt: 3\n"), None);
        assert_eq!(parse("TcpExt: ListenOverflows\n"), None);
        assert!(read().is_some(), "this kernel tells");
    }
}
