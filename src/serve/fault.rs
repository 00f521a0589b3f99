//! What errors of UDP sockets mean: for a flow, for a datagram, and for the counters.
//!
//! Who acts on them is `shard`.

use std::io;
use std::ops::ControlFlow;

use crate::serve::outbound::Refusal;
use crate::stats::{CloseReason, ConnectFailure, DropReason};

/// Why a flow got no socket: for the counters of its backend and of its Service.
pub(super) fn why_not_opened(error: &io::Error) -> (ConnectFailure, DropReason) {
    match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => (ConnectFailure::FdLimit, DropReason::FdLimit),
        // EAGAIN is what connect says when it finds no free port for a datagram socket.
        Some(libc::EAGAIN | libc::EADDRNOTAVAIL | libc::EADDRINUSE) => {
            (ConnectFailure::LocalPorts, DropReason::LocalPorts)
        }
        Some(libc::ENOBUFS | libc::ENOMEM | libc::ENOSPC) => (ConnectFailure::Memory, DropReason::Memory),
        _ => (ConnectFailure::Unreachable, DropReason::Unreachable),
    }
}

/// What an error of a flow's socket says about the way to its backend; `None` where it says nothing.
pub(super) fn why_lost(error: &io::Error) -> Option<CloseReason> {
    match error.raw_os_error()? {
        libc::ECONNREFUSED => Some(CloseReason::Refused),
        // No route; or an ICMP error that the kernel takes for final. Others it keeps to itself.
        libc::EHOSTUNREACH
        | libc::ENETUNREACH
        | libc::EHOSTDOWN
        | libc::ENETDOWN
        | libc::EACCES
        | libc::ENOPROTOOPT
        | libc::EPROTO => Some(CloseReason::Unreachable),
        _ => None,
    }
}

/// Counts the datagrams of a message that was not sent, or all that are left where the socket's queue is full.
pub(super) fn count_unsent(refusal: &Refusal<'_>, mut count: impl FnMut(DropReason, u64)) -> ControlFlow<()> {
    match refusal.error.raw_os_error() {
        Some(libc::EAGAIN) => {
            count(DropReason::Memory, refusal.left);
            return ControlFlow::Break(());
        }
        Some(libc::ENOBUFS | libc::ENOMEM) => count(DropReason::Memory, refusal.datagrams),
        _ => count(DropReason::Unreachable, refusal.datagrams),
    }
    ControlFlow::Continue(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::mmsg::Place;

    #[test]
    fn f16_given_errors_of_a_flows_socket_when_judged_then_only_those_about_the_backend_end_the_flow() {
        let loss = |errno| why_lost(&io::Error::from_raw_os_error(errno));

        assert_eq!(loss(libc::ECONNREFUSED), Some(CloseReason::Refused));
        for errno in [libc::EHOSTUNREACH, libc::ENETUNREACH, libc::EHOSTDOWN, libc::EACCES, libc::ENOPROTOOPT] {
            assert_eq!(loss(errno), Some(CloseReason::Unreachable), "{errno}");
        }
        for errno in [libc::EAGAIN, libc::EINTR, libc::ENOBUFS, libc::ENOMEM, libc::EPERM, libc::EMSGSIZE] {
            assert_eq!(loss(errno), None, "{errno}");
        }
    }

    #[test]
    fn f16_given_errors_of_sending_when_counted_then_a_full_queue_takes_the_rest_with_it() {
        let outcome = |errno| {
            let mut counted = None;
            let error = io::Error::from_raw_os_error(errno);
            let refusal = Refusal { at: Place::default(), datagrams: 2, left: 5, error: &error };
            let flow = count_unsent(&refusal, |reason, count| counted = Some((reason, count)));
            (counted, flow.is_break())
        };

        assert_eq!(outcome(libc::EAGAIN), (Some((DropReason::Memory, 5)), true));
        assert_eq!(outcome(libc::ENOBUFS), (Some((DropReason::Memory, 2)), false));
        assert_eq!(outcome(libc::EHOSTUNREACH), (Some((DropReason::Unreachable, 2)), false));
    }

    #[test]
    fn given_errors_of_opening_when_named_then_ports_descriptors_and_memory_are_told_apart() {
        let reason = |errno| why_not_opened(&io::Error::from_raw_os_error(errno)).1;

        assert_eq!(reason(libc::EMFILE), DropReason::FdLimit);
        assert_eq!(reason(libc::EAGAIN), DropReason::LocalPorts);
        assert_eq!(reason(libc::EADDRNOTAVAIL), DropReason::LocalPorts);
        assert_eq!(reason(libc::ENOBUFS), DropReason::Memory);
        assert_eq!(reason(libc::ENETUNREACH), DropReason::Unreachable);
    }
}
