//! What a process has as such, whatever it serves: the lock of its state folder, the door there, and the sockets of its
//! own servers.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::door::Door;
use super::parcel::{Kind, Parcel, ParcelError};
use super::taking::Predecessor;
use crate::state_lock::StateLock;

/// See the module. Dropped, the folder is free for another one.
#[derive(Debug)]
pub struct Office {
    pub(super) lock: StateLock,
    pub(super) door: Door,
    /// The sockets of the last process's own servers, by the addresses that were asked for.
    admin: BTreeMap<SocketAddr, OwnedFd>,
    /// The last owner, while it waits to hear that all is served.
    last: Option<Arc<Predecessor>>,
}

/// Nobody can be met in a folder, which is still the own one.
#[derive(Debug, thiserror::Error)]
#[error("no socket can be made there")]
pub struct NoDoor {
    /// To be kept for as long as the folder is used.
    pub lock: StateLock,
    /// What the kernel said.
    pub source: io::Error,
}

/// The addresses of the sockets that come with it, in their order.
#[derive(Debug, Serialize, Deserialize)]
struct AdminSockets {
    addresses: Vec<SocketAddr>,
}

impl Office {
    /// Of a process that is the first one: its door is made. For who has the folder's lock.
    ///
    /// # Errors
    /// The folder cannot be written. The lock comes back: whose the folder is, is another question.
    pub fn found(folder: &Path, lock: StateLock) -> Result<Self, NoDoor> {
        match Door::make(folder) {
            Ok(door) => Ok(Self { lock, door, admin: BTreeMap::new(), last: None }),
            Err(source) => Err(NoDoor { lock, source }),
        }
    }

    /// What was handed over, put together.
    ///
    /// # Errors
    /// It is not whole.
    pub(super) fn passed(folder: Parcel, admin: Option<Parcel>) -> Result<Self, ParcelError> {
        let [lock, door] = folder.take()?;
        let admin = admin.map_or_else(|| Ok(BTreeMap::new()), admin_sockets)?;
        Ok(Self { lock: StateLock::passed(lock), door: Door::passed(door), admin, last: None })
    }

    /// The sockets of the last process's own servers. None the second time.
    pub fn take_admin_sockets(&mut self) -> BTreeMap<SocketAddr, OwnedFd> {
        std::mem::take(&mut self.admin)
    }

    /// Notes who waits to hear that all is served.
    pub(crate) fn owe_word_to(&mut self, last: Arc<Predecessor>) {
        self.last = Some(last);
    }

    /// To be called once this process serves everything, its own servers included. Says so to the last one, once.
    pub fn tell_serving(&mut self) {
        self.last.take().iter().for_each(|last| last.tell_serving());
    }

    /// Copies for another process.
    ///
    /// # Errors
    /// No descriptor is left.
    pub(super) fn parcels(&self, admin: &BTreeMap<SocketAddr, Arc<OwnedFd>>) -> io::Result<[Parcel; 2]> {
        let folder = Parcel::new(Kind::Folder, &()).with([self.lock.copy()?, self.door.copy()?]);
        let addresses = admin.keys().copied().collect();
        let sockets = admin.values().map(|socket| socket.try_clone()).collect::<io::Result<Vec<_>>>()?;
        Ok([folder, Parcel::new(Kind::Admin, &AdminSockets { addresses }).with(sockets)])
    }
}

fn admin_sockets(parcel: Parcel) -> Result<BTreeMap<SocketAddr, OwnedFd>, ParcelError> {
    let AdminSockets { addresses } = parcel.said()?;
    let (wanted, found) = (addresses.len(), parcel.descriptors.len());
    if wanted != found {
        return Err(ParcelError::Descriptors { kind: Kind::Admin, wanted, found });
    }
    Ok(addresses.into_iter().zip(parcel.descriptors).collect())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::SystemTime;

    use super::*;
    use crate::state_lock::Holder;

    #[test]
    fn t237_given_a_folder_in_which_no_socket_can_be_made_when_it_is_founded_then_its_lock_is_kept() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let holder = Holder { pid: 1, admin: None, since: SystemTime::UNIX_EPOCH };
        fs::create_dir(folder.path().join("kube-relay.sock")).expect("the test's folder can be written");
        let lock = StateLock::take(folder.path(), holder).expect("nobody has it");

        let refused = Office::found(folder.path(), lock).expect_err("a folder is in the way");

        assert!(StateLock::take(folder.path(), holder).is_err(), "it has its owner");
        drop(refused);
        StateLock::take(folder.path(), holder).expect("nobody has it any more");
    }
}
