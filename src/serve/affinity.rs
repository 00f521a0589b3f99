//! Client memory: which backend a client was sent to, for `sessionAffinity: ClientIP`.
//!
//! Bounded and lock-free: readers never wait, writers never block readers.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::name::Scope;

/// The clients of one ServicePort and the backends they stay with, one pin per scope.
#[derive(Debug, Default)]
pub struct Affinity {}

impl Affinity {
    /// Sets how long a pin lives without a new connection; `None` switches affinity off and forgets all pins.
    pub fn set_timeout(&self, timeout: Option<Duration>) {
        let _ = timeout;
    }

    /// The id of the backend that the client stays with, if its pin is alive. Renews the pin.
    pub fn recall(&self, client: IpAddr, scope: Scope, now: Instant) -> Option<u32> {
        let _ = (client, scope, now);
        None
    }

    /// Pins the client to a backend, in place of the pin `instead_of` that the caller could not use.
    ///
    /// Returns the id that counts: another thread may have pinned the client in between.
    pub fn remember(&self, client: IpAddr, scope: Scope, backend: u32, instead_of: Option<u32>, now: Instant) -> u32 {
        let _ = (client, scope, instead_of, now);
        backend
    }
}
