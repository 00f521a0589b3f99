//! The one owner of model, plan and listeners: events in, steps out, snapshots for everybody else.

use crate::model::Event;
use crate::plan::Problem;
use crate::status::SourceStatus;

/// What a source tells the control task.
#[derive(Debug)]
pub enum Message {
    /// Objects changed.
    Event(Event),
    /// The first complete state has been sent: act on it.
    Synced,
    /// How the source does, and all that is wrong with its input now (replaces what it said before).
    Source {
        /// Its state.
        status: SourceStatus,
        /// Broken files, wrong fields, passed-over kinds.
        problems: Vec<Problem>,
    },
}
