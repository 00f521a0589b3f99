//! Who the two sides of a hand-over are, and whether they understand each other: told before anything is asked for.

use std::fs;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};

use super::parcel::{Kind, Parcel};
use super::successor;
use crate::stats::PROCESS;

/// The newest way of speaking that this version knows. It grows where an older side would get something wrong; fields and
/// kinds that come alone are no reason.
const NEWEST: u32 = 1;
/// The oldest one.
const OLDEST: u32 = 1;
/// The longest version and the longest reason that are told on: they are another process's words.
const LONGEST_VERSION: usize = 40;
const LONGEST_REASON: usize = 200;

/// The first parcel of each side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Introduction {
    /// The ways of speaking that it knows, both ends included.
    oldest: u32,
    newest: u32,
    /// Of the program.
    version: String,
    /// As itself knows it: another one in another pod.
    pub(crate) pid: u32,
    /// The network namespace; empty where that cannot be told.
    #[serde(default)]
    network: String,
    /// The kinds of parcels that it understands, by number. What is of another kind is not handed over.
    #[serde(default)]
    kinds: Vec<u8>,
    /// True where it serves, and everything that there is.
    #[serde(default)]
    pub(crate) ready: bool,
    /// True where it is about to take over, and not only to look on or to order something.
    #[serde(default)]
    pub(crate) takes_over: bool,
    /// Which upgrade it was started for; 0: none, or it does not say.
    #[serde(default)]
    pub(crate) upgrade: u64,
    /// The pod that it runs in, by its UID; empty where nobody has told it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) pod: String,
    /// Why it starts no successor by itself; empty where it does.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) starts_none: String,
    /// How many of its listeners a crash would not close.
    #[serde(default)]
    pub(crate) kept: u64,
}

/// Why two processes cannot hand over anything to each other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Stranger {
    /// No way of speaking is common to both.
    #[error(
        "kube-relay {version} speaks versions {oldest} to {newest} of the hand-over, this one {OLDEST} to {NEWEST}"
    )]
    Version {
        /// Of the other program.
        version: String,
        /// What it speaks.
        oldest: u32,
        /// What it speaks.
        newest: u32,
    },
    /// Its sockets are of no use here.
    #[error("the other process is in another network namespace")]
    Network,
}

impl Introduction {
    /// Of this process.
    pub(crate) fn own() -> Self {
        Self {
            oldest: OLDEST,
            newest: NEWEST,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            network: network(),
            kinds: Kind::ALL.iter().map(|kind| kind.number()).collect(),
            ready: false,
            takes_over: false,
            upgrade: 0,
            pod: String::new(),
            starts_none: String::new(),
            kept: PROCESS.kept_listeners.get(),
        }
    }

    /// The same, of one that is about to take over.
    pub(crate) fn taking_over(self) -> Self {
        Self { takes_over: true, upgrade: successor::own_upgrade(), ..self }
    }

    /// The same, of one that serves or does not.
    pub(crate) fn ready(self, ready: bool) -> Self {
        Self { ready, ..self }
    }

    /// The same, of one in a pod.
    pub(crate) fn of_pod(self, pod: Option<&str>) -> Self {
        Self { pod: pod.unwrap_or_default().to_owned(), ..self }
    }

    /// The same, of one that starts no successor for this reason.
    pub(crate) fn starting_none(self, why: Option<&str>) -> Self {
        Self { starts_none: why.unwrap_or_default().to_owned(), ..self }
    }

    /// What is sent.
    pub(crate) fn parcel(&self) -> Parcel {
        Parcel::new(Kind::Hello, self)
    }

    /// True where the other side knows what to do with such a parcel.
    pub(crate) fn understands(&self, kind: Kind) -> bool {
        self.kinds.contains(&kind.number())
    }

    /// The other program's version, as it is for a log.
    pub(crate) fn version(&self) -> String {
        self.version.chars().take(LONGEST_VERSION).collect::<String>().escape_debug().to_string()
    }

    /// Why it starts no successor, as it is for a log; `None` where it does.
    pub(crate) fn why_none_is_started(&self) -> Option<String> {
        let why = self.starts_none.chars().take(LONGEST_REASON).collect::<String>();
        (!why.is_empty()).then(|| why.escape_debug().to_string())
    }

    /// Whether this process can work with that one.
    ///
    /// # Errors
    /// It cannot.
    pub(crate) fn check(&self) -> Result<(), Stranger> {
        let Self { oldest, newest, .. } = *self;
        if newest < OLDEST || oldest > NEWEST {
            return Err(Stranger::Version { version: self.version(), oldest, newest });
        }
        let here = network();
        if !self.network.is_empty() && !here.is_empty() && self.network != here {
            return Err(Stranger::Network);
        }
        Ok(())
    }
}

/// Two namespaces have not the same number on the same device.
fn network() -> String {
    let namespace = fs::metadata("/proc/self/ns/net");
    namespace.map(|namespace| format!("{}:{}", namespace.dev(), namespace.ino())).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f25_given_another_version_when_it_introduces_itself_then_a_common_way_of_speaking_is_enough() {
        let speaks = |oldest, newest| Introduction { oldest, newest, ..Introduction::own() }.check();

        assert_eq!(speaks(1, 1), Ok(()));
        assert_eq!(speaks(1, 9), Ok(()), "it knows this one's, too");
        let error = speaks(8, 9).expect_err("nothing in common").to_string();
        assert_eq!(error, "kube-relay 0.1.0 speaks versions 8 to 9 of the hand-over, this one 1 to 1");
        assert!(speaks(0, 0).is_err());
    }

    #[test]
    fn f25_given_another_network_namespace_when_it_introduces_itself_then_its_sockets_are_of_no_use() {
        let in_network = |network: &str| Introduction { network: network.into(), ..Introduction::own() }.check();

        assert_eq!(in_network("4:1"), Err(Stranger::Network));
        assert_eq!(in_network(""), Ok(()), "nobody knows");
        assert!(!network().is_empty(), "this machine tells");
    }

    #[test]
    fn given_a_later_version_when_it_introduces_itself_then_it_is_known_what_it_understands() {
        let parcel = Parcel {
            kind: Kind::Hello,
            body: br#"{"oldest":1,"newest":3,"version":"9\u001b[2J","pid":1,"kinds":[2,250],"later":{}}"#.to_vec(),
            descriptors: Vec::new(),
        };

        let told: Introduction = parcel.said().expect("what is known is read");

        assert!(told.understands(Kind::Listener) && !told.understands(Kind::Flow));
        assert_eq!(told.version(), "9\\u{1b}[2J");
    }
}
