//! What this kernel can do for this user, each tried on a socket of its own that nobody hears of: versions tell little,
//! as filters of containers forbid what kernels know.

use std::io::{self, Write};
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::unix::net::UnixStream;

use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use socket2::{Domain, SockFilter, SockRef, Socket, Type};

use super::duty::Duty;
use super::finding::{Finding, Grade, Subject};
use crate::name::Family;
use crate::serve::mmsg::{receive_trains, try_to_send_trains};

const SUBJECT: Subject = Subject::Kernel;

/// What came of each try.
#[derive(Debug)]
pub(super) struct Facts {
    /// Bytes from a socket to a pipe without a copy.
    pub(super) splice: io::Result<()>,
    /// A filter on a TCP socket; some kernels want CAP_NET_ADMIN for that.
    pub(super) tcp_filter: io::Result<()>,
    /// A filter on a UDP socket.
    pub(super) udp_filter: io::Result<()>,
    /// A socket at `::1`.
    pub(super) ipv6: io::Result<()>,
    /// A socket at an address that is local by a route alone.
    pub(super) freebind: io::Result<()>,
    /// Many datagrams handed over as one, received and sent.
    pub(super) trains: io::Result<()>,
    /// A socket at an address that is not local.
    pub(super) transparent: io::Result<()>,
}

pub(super) fn read() -> Facts {
    Facts {
        splice: try_splice(),
        tcp_filter: try_filter(Type::STREAM),
        udp_filter: try_filter(Type::DGRAM),
        ipv6: UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).map(drop),
        freebind: try_socket(Domain::IPV6, |socket| socket.set_freebind_v6(true)),
        trains: UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|socket| {
            receive_trains(&socket)?;
            try_to_send_trains(&socket)
        }),
        transparent: try_socket(Domain::IPV4, |socket| socket.set_ip_transparent_v4(true)),
    }
}

fn try_socket(domain: Domain, try_it: impl FnOnce(&Socket) -> io::Result<()>) -> io::Result<()> {
    try_it(&Socket::new(domain, Type::DGRAM.cloexec(), None)?)
}

fn try_splice() -> io::Result<()> {
    let (mut near, far) = UnixStream::pair()?;
    let (_read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    near.write_all(b"?")?;
    Ok(splice(&far, None, &write, None, 1, SpliceFlags::NONBLOCK).map(drop)?)
}

fn try_filter(kind: Type) -> io::Result<()> {
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K: takes so many bytes, all of them here.
    let socket = Socket::new(Domain::IPV4, kind.cloexec(), None)?;
    SockRef::from(&socket).attach_filter(&[SockFilter::new(RETURN, 0, 0, u32::MAX)])
}

/// Something that the kernel may refuse, and what follows then.
struct Ability<'f> {
    outcome: &'f io::Result<()>,
    grade: Grade,
    without: &'static str,
    remedy: &'static str,
}

impl Ability<'_> {
    fn lack(&self) -> Option<Finding> {
        let error = self.outcome.as_ref().err()?;
        let finding = Finding { grade: self.grade, ..Finding::ok(SUBJECT, format!("{} ({error})", self.without)) };
        Some(if self.remedy.is_empty() { finding } else { finding.remedy(self.remedy) })
    }
}

pub(super) fn judge(facts: &Facts, duty: &Duty) -> Vec<Finding> {
    let of_ipv6 = if duty.serves(Family::V6) { Grade::Error } else { Grade::Note };
    let abilities = [
        Ability {
            outcome: &facts.splice,
            grade: Grade::Warning,
            without: "splice(2) is refused: streams are copied, at several times the CPU",
            remedy: "allow splice in the container's seccomp profile",
        },
        Ability {
            outcome: &facts.tcp_filter,
            grade: Grade::Note,
            without: "filters on TCP sockets are refused: clients that are to hear nothing get a reset",
            remedy: "CAP_NET_ADMIN for kube-relay",
        },
        Ability {
            outcome: &facts.udp_filter,
            grade: Grade::Note,
            without: "filters on UDP sockets are refused: each datagram is judged by the process instead",
            remedy: "",
        },
        Ability {
            outcome: &facts.ipv6,
            grade: of_ipv6,
            without: "this machine has no IPv6: addresses of that family are not served",
            remedy: "`sysctl -w net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.lo.disable_ipv6=0`, or Services of IPv4 alone",
        },
        Ability {
            outcome: &facts.freebind,
            grade: of_ipv6,
            without: "IPV6_FREEBIND is refused: addresses of IPv6 that are local by a route alone cannot be bound",
            remedy: "",
        },
        Ability {
            outcome: &facts.trains,
            grade: Grade::Note,
            without: "UDP GRO or GSO is missing: bulk datagrams take more CPU",
            remedy: "",
        },
        Ability {
            outcome: &facts.transparent,
            grade: Grade::Ok,
            without: "IP_TRANSPARENT is refused: nothing uses it",
            remedy: "",
        },
    ];
    let lacks: Vec<Finding> = abilities.iter().filter_map(Ability::lack).collect();
    match lacks.as_slice() {
        [] => vec![Finding::ok(SUBJECT, "splice, socket filters, IPv6, GRO, GSO and IP_TRANSPARENT work")],
        _ => lacks,
    }
}

#[cfg(test)]
mod tests {
    use super::super::duty::sample::{duty, unknown};
    use super::*;

    fn able() -> Facts {
        let (splice, tcp_filter, udp_filter, ipv6) = (Ok(()), Ok(()), Ok(()), Ok(()));
        Facts { splice, tcp_filter, udp_filter, ipv6, freebind: Ok(()), trains: Ok(()), transparent: Ok(()) }
    }

    fn refused() -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    #[test]
    fn given_a_kernel_that_can_do_all_when_judged_then_one_line_says_so() {
        let found = judge(&able(), &unknown());

        assert_eq!((found.len(), found[0].grade), (1, Grade::Ok));
    }

    #[test]
    fn given_no_ipv6_when_judged_then_it_is_an_error_for_services_of_that_family_alone() {
        let grade = |duty| judge(&Facts { ipv6: refused(), ..able() }, &duty)[0].grade;

        assert_eq!(grade(duty(&["clusterIP [fd96::1]:80/TCP"])), Grade::Error);
        assert_eq!(grade(duty(&["clusterIP 10.96.0.1:80/TCP"])), Grade::Note);
    }

    #[test]
    fn given_what_is_refused_when_judged_then_each_has_its_grade_and_its_reason() {
        let facts = Facts { splice: refused(), tcp_filter: refused(), transparent: refused(), ..able() };

        let found = judge(&facts, &unknown());

        let grades: Vec<_> = found.iter().map(|finding| finding.grade).collect();
        assert_eq!(grades, [Grade::Warning, Grade::Note, Grade::Ok]);
        assert!(found[0].message.ends_with("(permission denied)"), "{found:?}");
    }

    #[test]
    fn given_this_machine_when_tried_then_what_the_tests_of_the_data_path_need_is_there() {
        let facts = read();

        assert!(facts.splice.is_ok() && facts.udp_filter.is_ok() && facts.trains.is_ok(), "{facts:?}");
    }
}
