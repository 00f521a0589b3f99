//! A pin as a plain value, and the seeds by which another process finds its client again.
//!
//! The memory that they are of is `affinity`.

use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use foldhash::SharedSeed;
use foldhash::quality::SeedableRandomState;
use serde::{Deserialize, Serialize};

use crate::name::Scope;

/// A client of a ServicePort that stays with a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PinRecord {
    /// What stands for the client: a hash of its address, made with the memory's seeds.
    pub(crate) key: u64,
    pub(crate) scope: Scope,
    /// The backend's id.
    pub(crate) backend: u32,
    /// Seconds since it was used.
    pub(crate) age: u32,
}

/// What the hashes of a memory are made with. Who knows them can aim at its places.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seeds {
    pub(crate) own: u64,
    /// Of all memories of the process that has made it.
    pub(crate) shared: u64,
}

impl Seeds {
    /// For a memory of this process.
    pub(crate) fn random() -> Self {
        Self { own: rand::random(), shared: of_this_process() }
    }

    pub(super) fn hasher(self) -> SeedableRandomState {
        SeedableRandomState::with_seed(self.own, shared(self.shared))
    }
}

/// What all memories of this process are made with.
fn of_this_process() -> u64 {
    static OWN: OnceLock<u64> = OnceLock::new();
    *OWN.get_or_init(rand::random)
}

/// What was made of a number, once for each: a process has its own, and those of the few before it whose memories have come down
/// to it. Asked where a memory begins, not for its clients.
fn shared(number: u64) -> &'static SharedSeed {
    static KNOWN: Mutex<BTreeMap<u64, &'static SharedSeed>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    known.entry(number).or_insert_with(|| Box::leak(Box::new(SharedSeed::from_u64(number))))
}

#[cfg(test)]
mod tests {
    use std::hash::BuildHasher;

    use super::*;

    #[test]
    fn t150_given_the_seeds_of_another_memory_when_hashed_with_them_then_it_is_the_same_hash() {
        let hash = |seeds: Seeds| seeds.hasher().hash_one("a client");
        let seeds = Seeds::random();

        assert_eq!(hash(seeds), hash(Seeds { ..seeds }));
        assert_ne!(hash(seeds), hash(Seeds::random()));
        assert_ne!(hash(seeds), hash(Seeds { shared: seeds.shared ^ 1, ..seeds }));
        let strange = Seeds { own: 1, shared: seeds.shared ^ 2 };
        assert_eq!(hash(strange), hash(strange));
        assert!(std::ptr::eq(shared(strange.shared), shared(strange.shared)), "it is made once");
    }
}
