//! What is said of listening sockets as they go from one process to another: many with one message.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::parcel::{Kind, MOST_DESCRIPTORS, Parcel, ParcelError};
use crate::name::{ListenKey, Protocol};
use crate::serve::passed::Passed;

/// Listeners whose sockets come with a message.
#[derive(Debug, Default, Serialize, Deserialize)]
struct ListenersSaid {
    listeners: Vec<ListenerSaid>,
}

/// One of them.
#[derive(Debug, Serialize, Deserialize)]
struct ListenerSaid {
    address: SocketAddr,
    protocol: Protocol,
    #[serde(default)]
    parked: bool,
    /// How many of the descriptors are its own: the next ones, in the order of listeners.
    sockets: usize,
}

/// Puts listeners into messages, each as it is asked for: copies of ten thousand sockets are not all there at once. One
/// that has more sockets than a message carries is left out; its address is taken anew once it is free. `kind` is what they
/// are.
pub(super) fn parcels(kind: Kind, listeners: &[Passed]) -> impl Iterator<Item = io::Result<Parcel>> {
    let mut left = listeners;
    std::iter::from_fn(move || {
        if left.is_empty() {
            return None;
        }
        let mut room = MOST_DESCRIPTORS;
        let count = left.iter().take_while(|listener| fits(listener, &mut room)).count().max(1);
        let (next, rest) = left.split_at(count);
        left = rest;
        Some(parcel(kind, next))
    })
}

fn fits(listener: &Passed, room: &mut usize) -> bool {
    let left = room.checked_sub(listener.sockets.len());
    *room = left.unwrap_or(0);
    left.is_some()
}

fn parcel(kind: Kind, listeners: &[Passed]) -> io::Result<Parcel> {
    let (mut said, mut copies) = (ListenersSaid::default(), Vec::new());
    for Passed { key, parked, sockets } in listeners.iter().filter(|one| one.sockets.len() <= MOST_DESCRIPTORS) {
        for socket in sockets {
            copies.push(socket.try_clone()?);
        }
        let (address, protocol) = (key.address(), key.protocol);
        said.listeners.push(ListenerSaid { address, protocol, parked: *parked, sockets: sockets.len() });
    }
    Ok(Parcel::new(kind, &said).with(copies))
}

/// The listeners of a message.
///
/// # Errors
/// It cannot be read, or has not as many descriptors as it tells of.
pub(super) fn listeners(parcel: Parcel) -> Result<Vec<Passed>, ParcelError> {
    let ListenersSaid { listeners } = parcel.said()?;
    let (kind, found) = (parcel.kind, parcel.descriptors.len());
    let wanted = listeners.iter().fold(0_usize, |sum, one| sum.saturating_add(one.sockets));
    if wanted != found {
        return Err(ParcelError::Descriptors { kind, wanted, found });
    }
    let mut descriptors = parcel.descriptors.into_iter().map(Arc::new);
    let with_sockets = |ListenerSaid { address, protocol, parked, sockets }| Passed {
        key: ListenKey::at(address, protocol),
        parked,
        sockets: descriptors.by_ref().take(sockets).collect(),
    };
    Ok(listeners.into_iter().map(with_sockets).collect())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;

    use super::*;

    fn listener(number: u16, sockets: usize) -> Passed {
        let key = ListenKey::new([127, 0, 0, 1].into(), number, Protocol::Udp);
        let socket: Arc<OwnedFd> = Arc::new(File::open("/dev/null").expect("it is there").into());
        Passed { key, parked: number.is_multiple_of(2), sockets: vec![socket; sockets] }
    }

    #[test]
    fn t234_given_listeners_of_many_sockets_when_put_into_messages_then_none_has_too_many_and_all_come_out_again() {
        let counts = [1, 250, 2, 1, 253, 254, 1];
        let sent: Vec<_> = (1..).zip(counts).map(|(number, count)| listener(number, count)).collect();

        let sent: Vec<_> = parcels(Kind::Listener, &sent).map(|parcel| parcel.expect("descriptors are left")).collect();

        assert!(sent.iter().all(|parcel| parcel.descriptors.len() <= MOST_DESCRIPTORS));
        let arrived = sent.into_iter().flat_map(|parcel| listeners(parcel).expect("they are whole"));
        let arrived: Vec<_> = arrived.map(|one| (one.key.port(), one.parked, one.sockets.len())).collect();
        let all_but_the_largest =
            [(1, false, 1), (2, true, 250), (3, false, 2), (4, true, 1), (5, false, 253), (7, false, 1)];
        assert_eq!(arrived, all_but_the_largest);
    }

    #[test]
    fn f25_given_a_message_that_lacks_a_descriptor_when_read_then_that_is_an_error() {
        let mut parcel = parcels(Kind::Listener, &[listener(1, 2)]).next().expect("one").expect("descriptors are left");
        parcel.descriptors.pop();

        let error = listeners(parcel).expect_err("one is missing").to_string();

        assert_eq!(error, "hand-over: a message of kind Listener with 1 descriptors in place of 2");
    }
}
