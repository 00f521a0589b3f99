//! What is said of a process's source: objects that were rejected, and how it was with the API server.
//!
//! Requests that failed, and Events that were sent, are each process's own: the next one adds its own to them. Objects
//! that are rejected are the same ones in both, and the next one has counted those that still are before it takes over:
//! what both have counted counts once.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::contact::Contact;
use crate::handover::counts::Counts;
use crate::handover::parcel::{Kind, Parcel};
use crate::rejections::Rejections;

/// Where a source counts. Given out by the control task.
#[derive(Clone, Debug, Default)]
pub(crate) struct SourceCounts {
    pub(crate) contact: Arc<Contact>,
    /// What was rejected so far, by the source and by the plan.
    pub(crate) rejections: Rejections,
}

/// What is said of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SourceSaid {
    #[serde(default)]
    pub(crate) api: Counts,
    #[serde(default)]
    pub(crate) rejections: Rejections,
}

impl From<&SourceCounts> for SourceSaid {
    fn from(SourceCounts { contact, rejections }: &SourceCounts) -> Self {
        Self { api: Counts::of(&**contact), rejections: rejections.clone() }
    }
}

impl SourceSaid {
    /// What is sent.
    pub(crate) fn parcel(&self) -> Parcel {
        Parcel::new(Kind::Source, self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::{WatchFailure, WatchedKind};

    #[test]
    fn t234_given_what_was_counted_of_an_api_server_when_another_process_goes_on_from_it_then_no_number_falls() {
        let (old, new) = (SourceCounts::default(), Contact::default());
        for contact in [&*old.contact, &new] {
            contact.events.sent.increment();
            contact.line(WatchedKind::Service).fail(WatchFailure::Timeout);
        }
        old.contact.line(WatchedKind::Service).relist(WatchFailure::Expired);
        old.contact.line(WatchedKind::Node).fail(WatchFailure::Timeout);
        old.contact.events.dropped.add(7);

        let said: SourceSaid = SourceSaid::from(&old).parcel().said().expect("what was written");
        said.api.add_to(&new);

        assert_eq!((new.events.sent.get(), new.events.dropped.get()), (2, 7));
        assert_eq!(new.relists().collect::<Vec<_>>(), [(WatchFailure::Expired, 1)]);
        let failures = [WatchedKind::Service, WatchedKind::Node].map(|kind| (kind, WatchFailure::Timeout));
        assert!(new.failures().eq([(failures[0].0, failures[0].1, 2), (failures[1].0, failures[1].1, 1)]));
    }
}
