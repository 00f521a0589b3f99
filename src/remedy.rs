//! Why an address cannot be bound, in one word, and what an operator can do about it.
//!
//! Words and sentences only: who binds, reports and tries again is `control` (listeners) and `admin` (own servers).

use std::fmt;
use std::io;
use std::net::IpAddr;

use rustix::io::Errno;
use serde::Serialize;

use crate::name::ListenKey;
use crate::vips::NoRoute;

/// Why a socket could not be bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BindFailure {
    /// Another socket holds the address and port.
    InUse,
    /// A port below the unprivileged ones, without the capability for it.
    Permission,
    /// The address belongs to no interface of this machine, and no route leads here.
    NotLocal,
    /// A route would make it local, but have this machine answer its neighbours for it.
    ArpConflict,
    /// This machine does not speak the address family.
    Family,
    /// This process has no descriptor left.
    FdLimit,
    /// The kernel has no memory for a socket.
    Memory,
    /// None of the above: the error text says it.
    Other,
}

impl BindFailure {
    /// Tells the cause from the error of `socket`, `bind` or `listen`.
    pub fn of(error: &io::Error) -> Self {
        match error.get_ref().and_then(|reason| reason.downcast_ref::<NoRoute>()) {
            Some(NoRoute::ArpConflict { .. }) => return Self::ArpConflict,
            // EACCES: IPv6 is switched off on loopback.
            Some(NoRoute::Refused(Errno::AFNOSUPPORT | Errno::OPNOTSUPP | Errno::ACCESS)) => return Self::Family,
            Some(NoRoute::Unsure | NoRoute::Forbidden | NoRoute::Refused(_) | NoRoute::Gone) => return Self::NotLocal,
            None => {}
        }
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::ADDRINUSE) => Self::InUse,
            Some(Errno::ACCESS | Errno::PERM) => Self::Permission,
            Some(Errno::ADDRNOTAVAIL) => Self::NotLocal,
            Some(Errno::AFNOSUPPORT) => Self::Family,
            Some(Errno::MFILE | Errno::NFILE) => Self::FdLimit,
            Some(Errno::NOBUFS | Errno::NOMEM) => Self::Memory,
            _ => Self::Other,
        }
    }

    /// The word: the same in log, metric and status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InUse => "in_use",
            Self::Permission => "permission",
            Self::NotLocal => "not_local",
            Self::ArpConflict => "arp_conflict",
            Self::Family => "family",
            Self::FdLimit => "fd_limit",
            Self::Memory => "memory",
            Self::Other => "other",
        }
    }
}

impl fmt::Display for BindFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What an operator can do so that the address can be bound; `None` where we know nothing better than the error itself.
pub fn remedy(failure: BindFailure, key: ListenKey) -> Option<String> {
    let (ip, port) = (key.ip(), key.port());
    let text = match failure {
        BindFailure::InUse => format!("another socket holds it: `ss -lnp 'sport = :{port}'` shows whose"),
        BindFailure::Permission => format!(
            "ports below 1024 need the capability NET_BIND_SERVICE (`setcap cap_net_bind_service=ep kube-relay`), \
             or `sysctl -w net.ipv4.ip_unprivileged_port_start={port}`"
        ),
        BindFailure::NotLocal => {
            let host = host_prefix(ip);
            let command = if ip.is_ipv4() { "ip" } else { "ip -6" };
            format!(
                "the address is not on this machine: `{command} address add {host} dev lo`, \
                 or `{command} route add local {host} dev lo`"
            )
        }
        BindFailure::Family => format!("this machine has no {}: leave the address out", crate::name::Family::of(ip)),
        BindFailure::FdLimit => {
            "the process has no descriptor left: raise its limit (`LimitNOFILE=`, `ulimit -n`)".into()
        }
        BindFailure::Memory => "the kernel has no memory for sockets: see `net.ipv4.tcp_mem` and `free`".into(),
        BindFailure::ArpConflict | BindFailure::Other => return None, // The error itself says it.
    };
    Some(text)
}

/// `error; remedy`: the text of a bind failure, for logs, status and errors.
pub fn explain(error: &io::Error, key: ListenKey) -> String {
    match remedy(BindFailure::of(error), key) {
        Some(remedy) => format!("{error}; {remedy}"),
        None => error.to_string(),
    }
}

/// The address as a network of one: `10.96.0.10/32`, `fd00::10/128`.
fn host_prefix(ip: IpAddr) -> String {
    let bits = if ip.is_ipv4() { 32 } else { 128 };
    format!("{ip}/{bits}")
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;
    use crate::name::Protocol;

    fn key(address: &str) -> ListenKey {
        ListenKey::at(address.parse().expect("an address"), Protocol::Tcp)
    }

    #[test]
    fn t235_given_a_low_port_without_the_capability_when_explained_then_capability_and_sysctl_are_named() {
        let error = io::Error::from_raw_os_error(Errno::ACCESS.raw_os_error());

        let text = explain(&error, key("127.96.0.1:80"));

        assert_eq!(BindFailure::of(&error).as_str(), "permission");
        assert!(text.contains("NET_BIND_SERVICE"), "{text}");
        assert!(text.contains("net.ipv4.ip_unprivileged_port_start=80"), "{text}");
    }

    #[test]
    fn given_a_taken_port_when_bound_again_then_the_failure_is_in_use() {
        let first = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = first.local_addr().expect("a bound socket");

        let error = TcpListener::bind(address).expect_err("the port is taken");

        assert_eq!(BindFailure::of(&error), BindFailure::InUse);
        assert!(explain(&error, key(&address.to_string())).contains(&format!("sport = :{}", address.port())));
    }

    #[test]
    fn given_a_foreign_address_when_bound_then_the_remedy_adds_it_to_lo() {
        let error = UdpSocket::bind("203.0.113.77:0").expect_err("a documentation address is nobody's");

        assert_eq!(BindFailure::of(&error), BindFailure::NotLocal);
        let v4 = remedy(BindFailure::NotLocal, key("203.0.113.77:80")).expect("a remedy");
        let v6 = remedy(BindFailure::NotLocal, key("[fd00::10]:80")).expect("a remedy");
        assert!(v4.contains("`ip address add 203.0.113.77/32 dev lo`"), "{v4}");
        assert!(v6.contains("`ip -6 route add local fd00::10/128 dev lo`"), "{v6}");
    }

    #[test]
    fn given_an_address_that_got_no_route_when_explained_then_the_reason_is_told_in_its_word() {
        let conflict = io::Error::from(NoRoute::ArpConflict { interface: "eth0".into() });
        let forbidden = io::Error::from(NoRoute::Forbidden);
        let switched_off = io::Error::from(NoRoute::Refused(Errno::ACCESS));
        let at = key("203.0.113.77:80");

        assert_eq!(BindFailure::of(&conflict).as_str(), "arp_conflict");
        assert!(
            explain(&conflict, at)
                .contains("`sysctl -w net.ipv4.conf.eth0.arp_ignore=1 net.ipv4.conf.eth0.arp_announce=2`")
        );
        assert_eq!(BindFailure::of(&switched_off), BindFailure::Family);
        assert_eq!(BindFailure::of(&forbidden), BindFailure::NotLocal);
        assert!(
            explain(&forbidden, at).contains("CAP_NET_ADMIN; the address is not on this machine: `ip address add ")
        );
    }

    #[test]
    fn given_an_unknown_error_when_explained_then_it_stands_alone() {
        let error = io::Error::from_raw_os_error(Errno::INVAL.raw_os_error());

        assert_eq!(explain(&error, key("127.0.0.1:1")), error.to_string());
    }
}
