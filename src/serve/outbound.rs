//! Sends what a batch holds, whatever the kernel says meanwhile, and tells what left.
//!
//! System calls are in `mmsg`; what an error means for a flow is in `fault`, and who acts on it is `shard`.

use std::io::{self, ErrorKind};
use std::net::UdpSocket;
use std::ops::ControlFlow;
use std::os::fd::AsFd;

use crate::serve::mmsg::{Batch, Place, To};

/// A message that the kernel would not take.
pub(super) struct Refusal<'a> {
    /// Where it begins.
    pub(super) at: Place,
    /// The datagrams in it.
    pub(super) datagrams: u64,
    /// These, and all behind them.
    pub(super) left: u64,
    /// Why.
    pub(super) error: &'a io::Error,
}

/// Sends the datagrams from a place on, one message after another.
///
/// `sent` hears of what left, from place to place. `refused` hears which message the kernel would not take, and says
/// whether to go on with the next.
pub(super) fn send_all(
    batch: &mut Batch,
    socket: &UdpSocket,
    slots: &[u8],
    from: Place,
    to: To,
    mut sent: impl FnMut(&Batch, Place, Place),
    mut refused: impl FnMut(&Refusal<'_>) -> ControlFlow<()>,
) {
    let (mut at, mut asked_again) = (from, None);
    while at.position < slots.len() {
        let unsent = match batch.send(socket.as_fd(), slots, at, to) {
            Ok(end) => {
                sent(batch, at, end);
                at = end;
                continue;
            }
            Err(unsent) => unsent,
        };
        if unsent.error.kind() == ErrorKind::Interrupted {
            continue;
        }
        // Not about this message, but about an earlier one: a router has told a smaller MTU, which the kernel keeps
        // to from now on.
        if unsent.error.raw_os_error() == Some(libc::EMSGSIZE) && asked_again != Some(at) {
            asked_again = Some(at);
            continue;
        }
        if batch.take_apart(&unsent) {
            continue;
        }
        let datagrams = batch.measure(slots, at, unsent.end).datagrams;
        let left = batch.measure(slots, at, Place { position: slots.len(), offset: 0 }).datagrams;
        if refused(&Refusal { at, datagrams, left, error: &unsent.error }).is_break() {
            break;
        }
        at = unsent.end;
    }
}
