//! The ports that the kernel gives to sockets of this network namespace that ask for none, of either family.

use std::fs;
use std::ops::RangeInclusive;
use std::sync::{Arc, LazyLock};

use arc_swap::ArcSwap;

/// What the kernel begins with.
const DEFAULT: RangeInclusive<u16> = 32_768..=60_999;

/// Where daemons' ports end that they name themselves: what the kernel begins with is above them.
const FIRST_OF_CLIENTS: u16 = *DEFAULT.start();

/// As they were when this was asked first, or [looked at](refresh) last.
static KNOWN: LazyLock<ArcSwap<LocalPorts>> = LazyLock::new(|| ArcSwap::from_pointee(LocalPorts::read()));

/// From `net.ipv4.ip_local_port_range`, as it is now.
pub(crate) fn range() -> RangeInclusive<u16> {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok();
    text.and_then(|text| read_range(&text)).unwrap_or(DEFAULT)
}

/// True for a port that the kernel may choose: in the range, and not kept for somebody (`net.ipv4.ip_local_reserved_ports`).
///
/// Costs no system call: it tells of the settings as they were looked at last.
pub(crate) fn may_be_chosen(port: u16) -> bool {
    KNOWN.load().contains(port)
}

/// The same over UDP, where a port that one socket has bound is taken from all that want it by its number: no port of those
/// that daemons name (4789, 8472), also where the range of a machine has them.
pub(crate) fn may_be_chosen_for_datagrams(port: u16) -> bool {
    port >= FIRST_OF_CLIENTS && may_be_chosen(port)
}

/// Looks at the settings anew.
pub(crate) fn refresh() {
    let ports = LocalPorts::read();
    if **KNOWN.load() != ports {
        KNOWN.store(Arc::new(ports));
    }
}

#[derive(Debug, PartialEq, Eq)]
struct LocalPorts {
    range: RangeInclusive<u16>,
    reserved: Vec<RangeInclusive<u16>>,
}

impl LocalPorts {
    fn read() -> Self {
        let reserved = fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports").unwrap_or_default();
        Self { range: range(), reserved: read_list(&reserved) }
    }

    fn contains(&self, port: u16) -> bool {
        self.range.contains(&port) && !self.reserved.iter().any(|reserved| reserved.contains(&port))
    }
}

/// `32768 60999`.
fn read_range(text: &str) -> Option<RangeInclusive<u16>> {
    let mut ends = text.split_ascii_whitespace().map(|end| end.parse().ok());
    Some(ends.next()??..=ends.next()??)
}

/// `8472,30000-32767`; what is neither a port nor a range is passed over.
fn read_list(text: &str) -> Vec<RangeInclusive<u16>> {
    let read = |entry: &str| -> Option<RangeInclusive<u16>> {
        let (first, last) = entry.split_once('-').unwrap_or((entry, entry));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    text.trim().split(',').filter_map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_what_the_kernel_tells_when_read_then_the_range_is_known_and_nonsense_is_none() {
        assert_eq!(read_range("32768\t60999\n"), Some(32_768..=60_999));
        for wrong in ["", "32768", "a b", "1 70000"] {
            assert_eq!(read_range(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn given_ports_that_are_kept_for_somebody_when_asked_then_the_kernel_does_not_choose_them() {
        let ports = LocalPorts { range: 32_768..=60_999, reserved: read_list("8472,51820,60000-60010\n") };

        let chosen = [32_767, 32_768, 51_820, 60_005, 60_999].map(|port| ports.contains(port));
        assert_eq!(chosen, [false, true, false, false, true]);
        assert!(read_list("\n").is_empty());
    }

    #[test]
    fn given_settings_when_looked_at_anew_then_what_may_be_chosen_is_as_they_are() {
        refresh();

        let end = *range().end();
        assert_eq!(may_be_chosen(end), LocalPorts::read().contains(end));
        assert!(!may_be_chosen_for_datagrams(4_789), "whatever the range is");
    }
}
