//! Which sockets of this network namespace take what comes to any of its addresses: to an address of a Service as well,
//! once that is local.
//!
//! Read from `/proc`, as that is where every kernel tells it, and needs no right but for the names of processes. Nothing is
//! done about them here: what refuses their ports on addresses of Services is `guard`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::IpAddr;
use std::path::Path;

use crate::name::{Family, Protocol};

/// The state of a TCP socket that listens (`TCP_LISTEN`), as the tables write it.
const LISTENING: &str = "0A";
/// The state of a UDP socket that is not connected (`TCP_CLOSE`).
const UNCONNECTED: &str = "07";

/// Where the tables of this thread's network namespace are.
const NET: &str = "/proc/thread-self/net";

/// A socket that takes what comes to any address of this machine. One that takes both families is told twice.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WildcardListener {
    /// TCP: it listens. UDP: it is bound and not connected, be it a server's or that of a client who waits for an answer:
    /// the latter has a port of `net.ipv4.ip_local_port_range`.
    pub protocol: Protocol,
    /// Its port.
    pub port: u16,
    /// Of the addresses that it takes traffic to.
    pub family: Family,
    /// Whose it is; `None` where this process may not look into that one (another user's, another container's).
    pub process: Option<SocketOwner>,
}

/// A process that has a socket: the one with the lowest pid, where several share it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SocketOwner {
    /// In the pid namespace of this process.
    pub pid: u32,
    /// Its name as the kernel shortens it: 15 bytes at most.
    pub name: String,
}

/// The wildcard listeners of this network namespace: each protocol, port and family once, sorted.
///
/// `[::]:22` counts for both families unless there is a `0.0.0.0:22` too, as two sockets cannot have one port: tables do not
/// tell whether a socket takes IPv6 alone. One that does, and has no sibling, is told for IPv4 as well.
///
/// # Errors
/// Where `/proc/thread-self/net` cannot be read. A table that is not there has nothing in it: this kernel has no IPv6.
pub fn wildcard_listeners() -> io::Result<Vec<WildcardListener>> {
    let mut found = Vec::new();
    read_tables(|line| found.extend(line.is_wildcard().then_some(line)))?;
    let found = by_family(found);
    let inodes = found.values().copied().collect();
    let owners = owners(Path::new("/proc"), &inodes);
    let listener = |((protocol, port, family), inode): (Key, u64)| {
        let process = owners.get(&inode).cloned();
        WildcardListener { protocol, port, family, process }
    };
    Ok(found.into_iter().map(listener).collect())
}

/// Where wildcard listeners take what is sent to these addresses. Not where somebody is bound to one of them as well: both
/// can only be where the former does not take all of it (IPv6 alone, one interface), which tables do not tell.
///
/// # Errors
/// As [`wildcard_listeners`].
pub(crate) fn wildcard_ports(addresses: &BTreeSet<IpAddr>) -> io::Result<BTreeSet<Key>> {
    let (mut found, mut taken) = (Vec::new(), BTreeSet::new());
    read_tables(|line| {
        if line.is_wildcard() {
            found.push(line);
        } else if addresses.contains(&line.address) {
            taken.insert(line.key);
        }
    })?;
    Ok(by_family(found).into_keys().filter(|key| !taken.contains(key)).collect())
}

fn read_tables(mut take: impl FnMut(Line)) -> io::Result<()> {
    for (table, protocol, family) in [
        ("tcp", Protocol::Tcp, Family::V4),
        ("udp", Protocol::Udp, Family::V4),
        ("tcp6", Protocol::Tcp, Family::V6),
        ("udp6", Protocol::Udp, Family::V6),
    ] {
        let table = match File::open(Path::new(NET).join(table)) {
            Ok(table) => BufReader::new(table),
            Err(error) if error.kind() == io::ErrorKind::NotFound && family == Family::V6 => continue,
            Err(error) => return Err(error),
        };
        for line in table.lines().skip(1) {
            match read_line(&line?, protocol, family) {
                Some(line) => take(line),
                None if protocol == Protocol::Tcp => break, // Those that listen come first; there may be many more.
                None => {}
            }
        }
    }
    Ok(())
}

/// What a listener is told by: its protocol, port and family.
pub(crate) type Key = (Protocol, u16, Family);

/// A line of a table about a socket that takes what comes from anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Line {
    key: Key,
    address: IpAddr,
    inode: u64,
}

impl Line {
    fn is_wildcard(&self) -> bool {
        self.address.is_unspecified()
    }
}

/// `None` for headings, for connections, and for what cannot be read.
fn read_line(line: &str, protocol: Protocol, family: Family) -> Option<Line> {
    let mut fields = line.split_ascii_whitespace();
    let (local, state) = (fields.nth(1)?, fields.nth(1)?);
    let inode = fields.nth(5)?.parse().ok()?;
    let listens = match protocol {
        Protocol::Tcp => state == LISTENING,
        _ => state == UNCONNECTED,
    };
    let (address, port) = local.split_once(':')?;
    let (address, port) = (read_address(address)?, u16::from_str_radix(port, 16).ok()?);
    (listens && port != 0).then_some(Line { key: (protocol, port, family), address, inode })
}

/// As words of 32 bits, each written as this machine has it.
fn read_address(text: &str) -> Option<IpAddr> {
    let word = |at: usize| u32::from_str_radix(text.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes);
    match text.len() {
        8 => Some(IpAddr::from(word(0)?)),
        32 => {
            let octets: [u8; 16] = [word(0)?, word(8)?, word(16)?, word(24)?].concat().try_into().ok()?;
            Some(IpAddr::from(octets))
        }
        _ => None,
    }
}

/// Each key once, with one of its sockets. Those of IPv6 are for IPv4, too, where nothing else has their port there.
fn by_family(lines: Vec<Line>) -> BTreeMap<Key, u64> {
    let mut found: BTreeMap<Key, u64> = lines.iter().map(|line| (line.key, line.inode)).collect();
    for Line { key: (protocol, port, _), inode, .. } in lines {
        found.entry((protocol, port, Family::V4)).or_insert(inode);
    }
    found
}

/// Who has these sockets, as far as this process may know.
fn owners(proc: &Path, inodes: &BTreeSet<u64>) -> BTreeMap<u64, SocketOwner> {
    let mut owners = BTreeMap::new();
    let Ok(entries) = fs::read_dir(proc) else { return owners };
    let mut pids: Vec<u32> = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    for pid in pids {
        let process = proc.join(pid.to_string());
        let sockets: Vec<u64> = sockets_of(&process).filter(|inode| inodes.contains(inode)).collect();
        if sockets.is_empty() {
            continue;
        }
        let name = fs::read_to_string(process.join("comm")).unwrap_or_default().trim_end().to_owned();
        for inode in sockets {
            owners.entry(inode).or_insert_with(|| SocketOwner { pid, name: name.clone() });
        }
    }
    owners
}

/// None where the process has ended, or is not ours to look into.
fn sockets_of(process: &Path) -> impl Iterator<Item = u64> {
    let descriptors = fs::read_dir(process.join("fd")).ok();
    descriptors.into_iter().flatten().flatten().filter_map(|descriptor| {
        let target = fs::read_link(descriptor.path()).ok()?;
        target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};

    use super::*;

    const HEADING: &str =
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode";
    const SSHD: &str = "   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1234 1 0 100 0 0 10 0";

    fn line(port: u16, family: Family, inode: u64) -> Line {
        let address = match family {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        };
        Line { key: (Protocol::Tcp, port, family), address, inode }
    }

    #[test]
    fn given_lines_of_a_table_when_read_then_wildcard_listeners_alone_are_found() {
        let tcp = |line: &str| read_line(line, Protocol::Tcp, Family::V4);
        let udp = |line: &str| read_line(line, Protocol::Udp, Family::V4);

        assert_eq!(tcp(SSHD), Some(line(22, Family::V4, 1234)));
        assert_eq!(tcp(HEADING), None);
        let of_one = tcp(&SSHD.replace("00000000:0016", "0100007F:0016")).expect("it listens");
        assert!(!of_one.is_wildcard() && of_one.address == IpAddr::from([127, 0, 0, 1]), "{of_one:?}");
        assert_eq!(tcp(&SSHD.replace(" 0A ", " 01 ")), None, "a connection");
        assert_eq!(
            udp(&SSHD.replace(" 0A ", " 07 ")),
            Some(Line { key: (Protocol::Udp, 22, Family::V4), ..line(22, Family::V4, 1234) })
        );
        assert_eq!(udp(&SSHD.replace(" 0A ", " 01 ")), None, "connected");
        let any = "   0: 00000000000000000000000000000000:280A 00000000000000000000000000000000:0000 0A \
                   00000000:00000000 00:00000000 00000000  1000        0 77 1";
        assert_eq!(read_line(any, Protocol::Tcp, Family::V6), Some(line(10_250, Family::V6, 77)));
    }

    #[test]
    fn given_lines_that_are_cut_or_wrong_when_read_then_nothing_panics() {
        for length in 0..SSHD.len() {
            let _ = read_line(&SSHD[..length], Protocol::Tcp, Family::V4);
        }
        for wrong in ["0: :0016 0:0 0A 0 0 0 0 0 1", "0: 0 0 0A 0 0 0 0 0 1", "0: 0:FFFFF 0:0 0A 0 0 0 0 0 1"] {
            assert_eq!(read_line(wrong, Protocol::Tcp, Family::V4), None, "{wrong}");
        }
    }

    #[test]
    fn given_addresses_of_a_table_when_read_then_they_are_what_was_bound() {
        let six = "B80D0120000000000000000001000000";

        assert_eq!(read_address("0A00600A"), Some(IpAddr::from([10, 96, 0, 10])));
        assert_eq!(read_address(six), Some("2001:db8::1".parse().expect("an address")));
        for wrong in ["", "0", "0100007G", &six[1..], "\u{e9}100007"] {
            assert_eq!(read_address(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn given_a_port_that_somebody_has_at_an_address_when_ports_are_asked_for_then_it_is_not_one_of_them() {
        let everywhere = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a listener");
        let here = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
        let port = |listener: &TcpListener| listener.local_addr().expect("it is bound").port();

        let ports = wildcard_ports(&[Ipv4Addr::LOCALHOST.into()].into()).expect("there is /proc");

        assert!(ports.contains(&(Protocol::Tcp, port(&everywhere), Family::V4)));
        assert!(!ports.contains(&(Protocol::Tcp, port(&here), Family::V4)));
    }

    #[test]
    fn given_a_socket_of_ipv6_when_nothing_of_ipv4_has_its_port_then_it_counts_for_both() {
        let found = by_family(vec![line(22, Family::V4, 1), line(22, Family::V6, 2), line(10_250, Family::V6, 3)]);

        let tcp = |port, family| (Protocol::Tcp, port, family);
        let wanted = [
            (tcp(22, Family::V4), 1),
            (tcp(22, Family::V6), 2),
            (tcp(10_250, Family::V4), 3),
            (tcp(10_250, Family::V6), 3),
        ];
        assert_eq!(found, wanted.into());
    }

    #[test]
    fn t236_given_sockets_of_this_process_when_listed_then_those_of_all_addresses_are_there_with_its_name() {
        let everywhere = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a listener");
        let datagrams = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
        let here = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
        let port = |address: io::Result<std::net::SocketAddr>| address.expect("it is bound").port();

        let found = wildcard_listeners().expect("there is /proc");

        let find = |protocol, port| {
            found
                .iter()
                .find(|listener| (listener.protocol, listener.port, listener.family) == (protocol, port, Family::V4))
        };
        for (protocol, port) in
            [(Protocol::Tcp, port(everywhere.local_addr())), (Protocol::Udp, port(datagrams.local_addr()))]
        {
            let listener = find(protocol, port).unwrap_or_else(|| panic!("{port}/{protocol} is in {found:?}"));
            let owner = listener.process.as_ref().expect("our own processes are open to us");
            assert_eq!(owner.pid, std::process::id());
            assert!(!owner.name.is_empty());
        }
        assert_eq!(find(Protocol::Tcp, port(here.local_addr())), None);
        assert!(found.is_sorted());
    }
}
