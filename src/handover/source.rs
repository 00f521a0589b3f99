//! What is said of a process's source: objects that were rejected, and how it was with the API server.
//!
//! Requests that failed, and Events that were sent, are each process's own: the next one adds its own to them. Objects
//! that are rejected are the same ones in both, and the next one has counted those that still are before it takes over:
//! what both have counted counts once.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::contact::Contact;
use crate::handover::counts::Counts;
use crate::handover::parcel::{Kind, Parcel};
use crate::rejections::Rejections;

/// Where a source counts. Given out by the control task.
#[derive(Clone, Debug)]
pub(crate) struct SourceCounts {
    pub(crate) contact: Arc<Contact>,
    /// What was rejected so far, by the source and by the plan.
    pub(crate) rejections: Rejections,
    /// When the last change had come about whose time to its being served was measured.
    pub(crate) measured_until: SystemTime,
}

impl Default for SourceCounts {
    /// Of a source that has counted nothing.
    fn default() -> Self {
        let (contact, rejections) = Default::default();
        Self { contact, rejections, measured_until: UNIX_EPOCH }
    }
}

/// What is said of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SourceSaid {
    #[serde(default)]
    pub(crate) api: Counts,
    #[serde(default)]
    pub(crate) rejections: Rejections,
    /// Nanoseconds since 1970; `None`: it does not say.
    #[serde(default)]
    measured_until_ns: Option<u64>,
}

impl From<&SourceCounts> for SourceSaid {
    fn from(SourceCounts { contact, rejections, measured_until }: &SourceCounts) -> Self {
        let since_1970 = measured_until.duration_since(UNIX_EPOCH).ok();
        Self {
            api: Counts::of(&**contact),
            rejections: rejections.clone(),
            measured_until_ns: since_1970.and_then(|since| u64::try_from(since.as_nanos()).ok()),
        }
    }
}

impl SourceSaid {
    /// Of requests and Events alone.
    pub(super) fn of_api(api: Counts) -> Self {
        Self { api, ..Self::default() }
    }

    /// When the last change had come about that the other process has measured; `None`: it does not say.
    pub(crate) fn measured_until(&self) -> Option<SystemTime> {
        self.measured_until_ns.map(|ns| UNIX_EPOCH + Duration::from_nanos(ns))
    }

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
        let measured_until = UNIX_EPOCH + Duration::new(1_800_000_000, 123_456_789);
        let (old, new) = (SourceCounts { measured_until, ..SourceCounts::default() }, Contact::default());
        for contact in [&*old.contact, &new] {
            contact.events.sent.increment();
            contact.line(WatchedKind::Service).fail(WatchFailure::Timeout);
        }
        old.contact.line(WatchedKind::Service).relist(WatchFailure::Expired);
        old.contact.line(WatchedKind::Node).fail(WatchFailure::Timeout);
        old.contact.events.dropped.add(7);

        let said: SourceSaid = SourceSaid::from(&old).parcel().said().expect("what was written");
        said.api.add_to(&new);

        assert_eq!(said.measured_until(), Some(measured_until));
        assert_eq!((new.events.sent.get(), new.events.dropped.get()), (2, 7));
        assert_eq!(new.relists().collect::<Vec<_>>(), [(WatchFailure::Expired, 1)]);
        let failures = [WatchedKind::Service, WatchedKind::Node].map(|kind| (kind, WatchFailure::Timeout));
        assert!(new.failures().eq([(failures[0].0, failures[0].1, 2), (failures[1].0, failures[1].1, 1)]));
    }
}
