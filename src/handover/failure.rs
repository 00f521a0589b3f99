//! Why a hand-over came to nothing, for the side that hands over: told in one line, and counted once.
//!
//! What the other side says of its own failures is in `taking`; how each tells the other, in `refusal`.

use std::io;
use std::process::ExitStatus;
use std::time::{Duration, SystemTime};

use tracing::warn;

use super::giving::GiveError;
use super::introduction::Stranger;
use super::post::{Post, PostError};
use super::refusal::Refusal;
use crate::causes::causes;
use crate::stats::{PROCESS, UpgradeResult};

/// How long the other side may take to be told.
const SAY_LIMIT: Duration = Duration::from_secs(1);

/// Why nothing came of an upgrade.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("{program} cannot be started")]
    Start { program: String, source: io::Error },
    #[error("the new process has ended ({0}) before it took over: its log says why")]
    Ended(ExitStatus),
    #[error("the new process was not ready to take over in time, and was ended")]
    Limit,
    #[error("the new process comes too late: nobody waits for it any more")]
    Late,
    #[error("{0}")]
    Impossible(&'static str),
    #[error("another upgrade is under way")]
    Busy,
    #[error("the new process has taken over and has ended then: nobody serves, its log says why")]
    Lost,
    #[error("the new process has taken over and does not say that it serves: its log says why")]
    Silent,
    #[error(transparent)]
    Stranger(#[from] Stranger),
    #[error("the other process does not say who it is in a way that kube-relay {} can read", env!("CARGO_PKG_VERSION"))]
    Unreadable,
    #[error(transparent)]
    Give(#[from] GiveError),
}

impl Failure {
    /// What it counts as: the same word in log and metric.
    pub(super) fn result(&self) -> UpgradeResult {
        match self {
            Self::Start { .. } => UpgradeResult::NotStarted,
            Self::Ended(_) | Self::Lost => UpgradeResult::Ended,
            Self::Limit | Self::Late | Self::Silent => UpgradeResult::Timeout,
            Self::Stranger(_) | Self::Unreadable => UpgradeResult::Version,
            Self::Give(GiveError::Post { source: PostError::Limit, .. }) => UpgradeResult::Timeout,
            Self::Give(GiveError::Post { source: PostError::Closed, .. }) => UpgradeResult::Ended,
            Self::Give(GiveError::Refused(refusal)) => refusal.reason,
            Self::Impossible(_) | Self::Busy | Self::Give(_) => UpgradeResult::Refused,
        }
    }

    /// Counts it and says so. Once for each hand-over that comes to nothing.
    pub(super) fn tell(&self) {
        // One that comes too late is of an upgrade that was counted.
        if !matches!(self, Self::Late) {
            PROCESS.upgrades.count(self.result());
            PROCESS.upgrade_failure.note(self.result(), SystemTime::now());
        }
        warn!(reason = %self.result(), error = causes(self), "nothing was handed over: this process serves as before");
    }

    /// Says so to the other side.
    pub(super) fn refuse(&self, post: &Post) {
        self.refuse_within(SAY_LIMIT, post);
    }

    /// The same, where no time is left to wait for one that hears nothing: it finds it when it goes on, behind all
    /// else.
    pub(super) fn refuse_at_once(&self, post: &Post) {
        post.make_room();
        self.refuse_within(Duration::ZERO, post);
    }

    fn refuse_within(&self, limit: Duration, post: &Post) {
        let _ = post.send(Refusal::parcel(&causes(self), self.result()), limit); // It may be gone.
    }
}
