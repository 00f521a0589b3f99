//! Which cluster an API server is of, as far as that can be told while it is away: by the authorities that vouch for it.
//!
//! Its address does not tell, as a server is asked at its own one today and at the cluster's (10.96.0.1) tomorrow. Nobody is
//! kept out by this: who can write a state can write whose it is.

use serde::{Deserialize, Serialize};

/// A cluster. The default is one of which nothing is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Cluster {
    /// Prints of the certificates that vouch for its server, sorted; none without TLS, and where it is the system's that do.
    authorities: Vec<String>,
}

impl Cluster {
    /// The one whose server these certificates (DER) vouch for.
    pub(crate) fn vouched_for_by(certificates: &[Vec<u8>]) -> Self {
        let mut authorities: Vec<_> = certificates.iter().map(|certificate| print(certificate)).collect();
        authorities.sort();
        authorities.dedup();
        Self { authorities }
    }

    /// True where it is certain that these are two clusters. While authorities are replaced, old and new ones vouch together.
    pub(crate) fn is_not(&self, other: &Self) -> bool {
        let known = !self.authorities.is_empty() && !other.authorities.is_empty();
        known && !self.authorities.iter().any(|authority| other.authorities.contains(authority))
    }
}

/// FNV-1a of 128 bits, as hexadecimal digits: the same in each version of this program, unlike what the standard library has.
fn print(bytes: &[u8]) -> String {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let hash = bytes.iter().fold(OFFSET, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(PRIME));
    format!("{hash:032x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(authorities: &[&str]) -> Cluster {
        let certificates: Vec<_> = authorities.iter().map(|text| text.as_bytes().to_vec()).collect();
        Cluster::vouched_for_by(&certificates)
    }

    #[test]
    fn given_bytes_when_printed_then_it_is_what_others_compute() {
        assert_eq!(print(b""), "6c62272e07bb014262b821756295c58d");
        assert_eq!(print(b"a"), "d228cb696f1a8caf78912b704e4a8964");
        assert_eq!(print(b"foobar"), "343e1662793c64bf6f0d3597ba446f18");
    }

    #[test]
    fn given_authorities_when_two_have_none_in_common_then_they_are_two_clusters() {
        assert!(cluster(&["a"]).is_not(&cluster(&["b"])));
        assert!(!cluster(&["old", "new"]).is_not(&cluster(&["new"])), "replaced meanwhile");
        for known in [&[][..], &["a"]] {
            assert!(!cluster(&[]).is_not(&cluster(known)) && !cluster(known).is_not(&cluster(&[])), "not certain");
        }
    }
}
