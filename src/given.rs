//! What this process was given at its start by whoever supervises it: sockets that were open before it (`LISTEN_FDS`), and
//! room to have some kept (`FDSTORE`).
//!
//! What they are called says little: they are told apart by what the kernel says of them, and compared with what the plan
//! wants like those of another process (`serve::passed`). What is to be kept is in `fd_store`.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::iter::repeat;
use std::net::SocketAddr;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::net::SocketType;
use rustix::net::sockopt::{socket_acceptconn, socket_cookie, socket_type};
use socket2::SockRef;

use crate::fd_store;
use crate::name::{ListenKey, Protocol};
use crate::serve::passed::Passed;

/// The number of the first descriptor that is passed; the others follow it.
const FIRST: RawFd = 3;
/// For whom they are, how many, and what they are called. A process that is started by this one has none of them.
const LISTEN_PID: &str = "LISTEN_PID";
const LISTEN_FDS: &str = "LISTEN_FDS";
const LISTEN_FDNAMES: &str = "LISTEN_FDNAMES";
/// How many descriptors are kept at most: systemd, from 254 on.
const FDSTORE: &str = "FDSTORE";
/// All that is said of descriptors to this process alone.
pub(crate) const FOR_THIS_PROCESS: [&str; 4] = [LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES, "LISTEN_PIDFDID"];
/// What a descriptor without a name is called.
const UNNAMED: &str = "unknown";

/// What a process was given. `Default`: nothing. Dropped, what is in it is closed here; whoever keeps it has it still.
#[derive(Debug, Default)]
pub struct Given {
    /// By where they are bound.
    pub(crate) sockets: Vec<Passed>,
    /// Names of what is not to be kept under them any more: sockets that are called otherwise here, or that let nobody in,
    /// and what is no listener's socket at all.
    pub(crate) other_names: BTreeSet<String>,
    /// Names of the last kind.
    pub(crate) strays: BTreeSet<String>,
    /// How many descriptors may be kept.
    pub(crate) room: usize,
}

impl Given {
    /// Takes what was given to this process: once, later there is nothing left. To be called before anything is opened.
    pub fn take() -> Self {
        static TAKEN: AtomicBool = AtomicBool::new(false);
        if TAKEN.swap(true, Ordering::Relaxed) {
            return Self::default();
        }
        let said = |name| env::var(name).ok();
        let count = count(said(LISTEN_PID).as_deref(), said(LISTEN_FDS).as_deref(), std::process::id());
        let names = said(LISTEN_FDNAMES).unwrap_or_default();
        let names = names.split(':').chain(repeat(""));
        let descriptors = (FIRST..).take(count).map_while(claim); // They follow each other, whatever is said of their number.
        let named = names.map(|name| if name.is_empty() { UNNAMED } else { name });
        let room = said(FDSTORE).and_then(|room| room.parse().ok()).unwrap_or(0);
        Self { room, ..Self::of(named.zip(descriptors)) }
    }

    /// Sorts descriptors by what they are. The same socket may be there twice: as one that was kept, and as one that a unit
    /// of the supervisor opens.
    fn of<'a>(descriptors: impl Iterator<Item = (&'a str, OwnedFd)>) -> Self {
        let (mut given, mut listeners, mut known) = (Self::default(), BTreeMap::new(), BTreeSet::new());
        for (name, descriptor) in descriptors {
            let Some(Known { key, parked, cookie }) = know(&descriptor) else {
                given.strays.insert(name.to_owned());
                given.other_names.insert(name.to_owned());
                continue;
            };
            if parked || name != fd_store::name(&key) {
                given.other_names.insert(name.to_owned());
            }
            if known.insert(cookie) {
                let listener = listeners.entry(key).or_insert_with(|| Passed { key, parked, sockets: Vec::new() });
                listener.sockets.push(Arc::new(descriptor));
            }
        }
        given.sockets = listeners.into_values().collect();
        given
    }
}

/// What the kernel says of a socket.
struct Known {
    key: ListenKey,
    /// True where it lets nobody in.
    parked: bool,
    /// Another socket has another one.
    cookie: u64,
}

/// `None` where it is no socket that a listener could have.
fn know(descriptor: &OwnedFd) -> Option<Known> {
    let protocol = match socket_type(descriptor).ok()? {
        SocketType::STREAM => Protocol::Tcp,
        SocketType::DGRAM => Protocol::Udp,
        _ => return None,
    };
    let options = SockRef::from(descriptor);
    let address: SocketAddr = options.local_addr().ok()?.as_socket()?;
    let parked = match protocol {
        Protocol::Tcp => !socket_acceptconn(descriptor).ok()?,
        _ => options.peer_addr().is_ok(),
    };
    Some(Known { key: ListenKey::at(address, protocol), parked, cookie: socket_cookie(descriptor).ok()? })
}

/// How many descriptors are for the process with this number.
fn count(pid: Option<&str>, descriptors: Option<&str>, own_pid: u32) -> usize {
    let is_ours = pid.and_then(|pid| pid.parse().ok()) == Some(own_pid);
    descriptors.filter(|_| is_ours).and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// A descriptor that this process was started with, which its own children are not; `None` where it is not open.
#[allow(unsafe_code)]
fn claim(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: this call takes any number, and says so where that is no open descriptor.
    let outcome = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    if outcome == -1 {
        return None;
    }
    // SAFETY: it is open, and nobody here has it: who has started this process says that it is passed, nothing was opened
    // before this, and nothing is claimed twice (see `Given::take`).
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::serve::fresh::Fresh;
    use crate::serve::{socket, udp};

    fn key(number: u8, protocol: Protocol) -> ListenKey {
        ListenKey::new([127, 85, 11, number].into(), 7500, protocol)
    }

    #[test]
    fn f21_given_what_is_said_of_descriptors_when_it_is_for_another_process_or_no_number_then_there_are_none() {
        assert_eq!(count(Some("7"), Some("3"), 7), 3);
        for (pid, descriptors) in
            [(Some("8"), Some("3")), (None, Some("3")), (Some("7"), None), (Some("7"), Some("-3"))]
        {
            assert_eq!(count(pid, descriptors, 7), 0, "{pid:?} {descriptors:?}");
        }
    }

    #[test]
    fn f21_given_descriptors_of_all_kinds_when_sorted_then_each_socket_is_there_once_at_its_listener() {
        let tcp = socket::listen_tcp(key(1, Protocol::Tcp)).expect("a free address");
        let again = tcp.try_clone().expect("a descriptor is left");
        let parked = socket::listen_tcp(key(2, Protocol::Tcp)).expect("a free address");
        socket::park_tcp(&parked).expect("it listens");
        let shared = udp::bind_udp_group(key(3, Protocol::Udp).address(), 2).expect("a free address");
        let unit = udp::bind_udp(key(4, Protocol::Udp).address()).expect("a free address");
        let file: OwnedFd = File::open("/dev/null").expect("it is there").into();
        let mut descriptors = vec![
            ("tcp-127.85.11.1-7500", tcp),
            ("kube-relay.socket", again),
            ("tcp-127.85.11.2-7500", parked),
            ("dns", unit.into()),
            ("stored", file),
        ];
        descriptors.extend(shared.into_iter().map(|socket| ("udp-127.85.11.3-7500", socket.into())));

        let given = Given::of(descriptors.into_iter());

        let sockets: Vec<_> = given.sockets.iter().map(|one| (one.key, one.parked, one.sockets.len())).collect();
        let (tcp, udp) = (|number| key(number, Protocol::Tcp), |number| key(number, Protocol::Udp));
        let mut expected = [(tcp(1), false, 1), (tcp(2), true, 1), (udp(3), false, 2), (udp(4), false, 1)];
        expected.sort_by_key(|(key, ..)| *key);
        assert_eq!(sockets, expected);
        assert_eq!(given.strays, BTreeSet::from(["stored".to_owned()]));
        let other_names = ["dns", "kube-relay.socket", "stored", "tcp-127.85.11.2-7500"];
        assert_eq!(given.other_names, other_names.map(str::to_owned).into());
        let fresh = Fresh::look().expect("descriptors are left");
        for (listener, wanted) in given.sockets.iter().zip([1, 1, 2, 1]) {
            listener.check(wanted, &fresh).unwrap_or_else(|difference| panic!("{}: {difference}", listener.key));
        }
    }
}
