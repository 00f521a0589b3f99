//! Takes back what a relay has left on this machine: the routes that make addresses of Services local, and their guard; and
//! what leads answers to clients' addresses to it.
//!
//! Which ones they are is told by their number; what is done about them while a relay runs is in `vips`,
//! `guard` and `reply_path`.

use std::io;
use std::net::IpAddr;

use rustix::io::Errno;

use crate::guard;
use crate::reply_path;
use crate::reply_seats::take_all;
use crate::route_claim::{Claim, ClaimError, name_of};
use crate::route_socket::{BATCH, NotMade, RouteSocket, removals};

/// Why not all is removed.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// A relay runs: it would set them again.
    #[error("stop it first")]
    Runs(#[source] ClaimError),
    /// Nobody can tell whether one runs.
    #[error("nothing is removed, as another process may need these routes")]
    Claim(#[source] ClaimError),
    /// There is no rtnetlink here, or no descriptor left.
    #[error("rtnetlink: cannot open a socket")]
    Open(#[source] io::Error),
    /// The kernel does not tell which routes there are.
    #[error("rtnetlink: cannot read the routes of this machine")]
    Look(#[source] io::Error),
    /// This process may not change routes.
    #[error("{address}: cannot remove its route without CAP_NET_ADMIN")]
    Forbidden {
        /// Of which address.
        address: IpAddr,
        /// What the kernel said.
        source: Errno,
    },
    /// The kernel would not remove the guard of these routes, but the routes.
    #[error("nf_tables: cannot remove the guard of these routes")]
    Guard(#[source] io::Error),
    /// The same, where filters of tc are the guard.
    #[error("tc: cannot remove the filters that guard these routes")]
    Filters(#[source] io::Error),
    /// The kernel would not remove what leads answers to clients' addresses here, or not all of it.
    #[error("cannot remove what leads answers to clients' addresses to a relay")]
    ReplyPath(#[source] io::Error),
    /// The kernel would not remove one.
    #[error("{address}: cannot remove its route")]
    Remove {
        /// Of which address.
        address: IpAddr,
        /// What the kernel said.
        source: Errno,
    },
}

impl From<ClaimError> for CleanupError {
    fn from(error: ClaimError) -> Self {
        match error {
            ClaimError::Held { .. } => Self::Runs(error),
            ClaimError::Socket { .. } => Self::Claim(error),
        }
    }
}

/// What was there, and is no more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// How many routes that made addresses of Services local.
    pub routes: usize,
    /// True where answers to clients' addresses were led to a relay.
    pub reply_path: bool,
}

/// Removes all routes that a relay has made with this number and their guard, and what has led answers to clients' addresses
/// to it. Nothing is no error.
///
/// # Errors
/// Where a relay runs, or the kernel refuses; those that it does not refuse are removed all the same.
pub async fn remove_routes(protocol: u8) -> Result<Removed, CleanupError> {
    remove_claimed(&name_of(protocol), protocol).await
}

/// The same, where this name says who removes routes.
async fn remove_claimed(name: &str, protocol: u8) -> Result<Removed, CleanupError> {
    let _claim = Claim::take_named(name, protocol, "kube-relay cleanup".into()).await?;
    let _seats = take_all(name, protocol, "kube-relay cleanup", None).await?;
    let mut socket = RouteSocket::open(protocol).map_err(CleanupError::Open)?;
    let routes = socket.look().map_err(CleanupError::Look)?;
    let addresses: Vec<IpAddr> = routes.iter().filter_map(|route| route.own_address()).collect();
    let (mut removed, mut refused) = (0, None);
    for part in addresses.chunks(BATCH) {
        for (address, outcome) in part.iter().zip(socket.change(&removals(part))) {
            match outcome.map_err(NotMade::error) {
                Ok(()) => removed += 1,
                Err(Errno::SRCH) => {} // Somebody else was faster.
                Err(source) => {
                    refused.get_or_insert_with(|| not_removed(*address, source));
                }
            }
        }
    }
    if let Some(error) = refused {
        return Err(error); // What is still local is still guarded.
    }
    remove_guard(protocol)?;
    let reply_path = reply_path::remove(protocol).map_err(CleanupError::ReplyPath)?;
    Ok(Removed { routes: removed, reply_path })
}

fn remove_guard(protocol: u8) -> Result<(), CleanupError> {
    guard::remove_filters(protocol).map_err(CleanupError::Filters)?;
    let Err(error) = guard::remove(protocol) else { return Ok(()) };
    match Errno::from_io_error(&error) {
        // There is no nf_tables here, or nothing that this process could have made there.
        Some(Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT | Errno::OPNOTSUPP | Errno::PERM) => Ok(()),
        _ => Err(CleanupError::Guard(error)),
    }
}

fn not_removed(address: IpAddr, source: Errno) -> CleanupError {
    match source {
        Errno::PERM => CleanupError::Forbidden { address, source },
        _ => CleanupError::Remove { address, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reply_seats::Seat;

    #[tokio::test]
    async fn given_a_relay_that_runs_when_cleaned_up_then_it_is_named_and_nothing_is_touched() {
        // Not the name of a number: others test at the same time, in the same network namespace.
        let name = format!("kube-relay/test/{}/cleanup", std::process::id());
        let running = Claim::take_named(&name, 252, "kube-relay with pid 4711".into()).await.expect("nobody has it");
        tokio::spawn(async move { running.answer().await });

        let error = remove_claimed(&name, 252).await.expect_err("it runs");

        let CleanupError::Runs(source) = &error else { panic!("{error}") };
        assert!(source.to_string().contains("kube-relay with pid 4711"), "{source}");
    }

    #[tokio::test]
    async fn given_a_relay_that_needs_answers_led_here_alone_when_cleaned_up_then_it_is_named_and_nothing_is_touched() {
        let name = format!("kube-relay/test/{}/cleanup/seats", std::process::id());
        let seat = Seat::take(&name, 252, "kube-relay with pid 4712").await.expect("nobody has it");
        tokio::spawn(async move { seat.answer().await });

        let error = remove_claimed(&name, 252).await.expect_err("it runs");

        let CleanupError::Runs(source) = &error else { panic!("{error}") };
        assert!(source.to_string().contains("kube-relay with pid 4712"), "{source}");
    }

    #[test]
    fn given_a_kernel_that_refuses_when_told_then_the_capability_is_named_only_where_that_is_it() {
        let told = |source| not_removed([10, 96, 0, 1].into(), source).to_string();

        assert_eq!(told(Errno::PERM), "10.96.0.1: cannot remove its route without CAP_NET_ADMIN");
        assert_eq!(told(Errno::NOBUFS), "10.96.0.1: cannot remove its route");
    }
}
