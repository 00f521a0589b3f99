//! The last part of a process that another one has taken over from: what did not move comes to its end, and whoever knows this
//! process by its number is not let down.
//!
//! How everything went over is in `handover`; who stays for whom in `elder`.

use std::future::pending;
use std::path::Path;
use std::time::Duration;

use tracing::{error, info, warn};

use crate::access_log::AccessLog;
use crate::control::Relay;
use crate::elder::{self, Descendants, Ending};
use crate::handover::Handed;
use crate::lifecycle::{self, Readiness, Request, ShutdownTimes, Signals};
use crate::stats::UpgradeResult;
use crate::supervisor::{self, News};

/// What there is to bring to an end.
#[derive(Clone, Copy, Debug)]
pub struct Retirement<'a> {
    /// Whose listeners and connections have gone.
    pub relay: &'a Relay,
    /// What it says to who asks for it.
    pub readiness: &'a Readiness,
    /// Its file may be moved away meanwhile; `None`: there is none.
    pub access_log: Option<&'a AccessLog>,
    /// How long the end may take, once somebody asks for it.
    pub times: ShutdownTimes,
    /// Where it was handed over. From `--state-dir`.
    pub folder: &'a Path,
}

impl Retirement<'_> {
    /// Waits until nothing is open any more, however long that takes, unless somebody says that it is enough. Those for which
    /// this process has to stay then, if any.
    ///
    /// One in a container that was not taken over by a process of its own does not end by itself: the container would be
    /// started again, and be there beside the one that serves.
    ///
    /// # Errors
    /// Those that came after this process have ended before it, and not well.
    pub async fn run(self, mut handed: Handed, signals: &mut Signals) -> Result<Option<Descendants>, Ending> {
        let mut after = self.meet(&mut handed);
        let mut is_asked = false;
        loop {
            tokio::select! {
                biased;
                request = signals.next() => {
                    self.hear(request, after.as_ref()).await;
                    if request == Request::Reload {
                        continue;
                    }
                    let times = if request == Request::Stop { ShutdownTimes::NONE } else { self.times };
                    self.finish(times, signals, after.as_ref()).await;
                    is_asked = true;
                    break;
                }
                ending = ended(after.as_mut()) => {
                    let reason = UpgradeResult::Ended;
                    error!(%ending, %reason, "the process that has taken over has ended, nothing is served any more");
                    self.finish(self.times, signals, None).await;
                    handed.settle().await;
                    return if ending.is_success() { Ok(None) } else { Err(ending) };
                }
                () = self.relay.drained() => {
                    info!("the last connection has ended");
                    break;
                }
            }
        }
        handed.settle().await;
        if after.is_none() && !is_asked && (lifecycle::is_container() || elder::is_held()) {
            self.wait_to_be_ended(signals).await;
        }
        Ok(after.filter(|_| elder::stays()))
    }

    /// The same, for one that was asked to end before. Whoever asked has not meant that a process goes on which this one has
    /// started.
    pub async fn run_asked(self, mut handed: Handed, signals: &mut Signals) -> Option<Descendants> {
        let after = self.meet(&mut handed);
        if let Some(after) = &after {
            after.pass_on(Request::Drain).await;
        }
        self.finish(self.times, signals, after.as_ref()).await;
        handed.settle().await;
        after.filter(|_| elder::stays())
    }

    /// Whoever supervises this process is told of the one that serves, where that is known by its number here.
    fn meet(&self, handed: &mut Handed) -> Option<Descendants> {
        if let Ok(pid @ 1..) = u32::try_from(handed.pid) {
            supervisor::tell(News::Successor(pid));
        }
        info!(open = self.relay.open_connections(), "another process serves");
        let after = Descendants::after(handed.child.take()?, self.folder.to_owned());
        after.inspect_err(|error| warn!(%error, "the end of the process that serves will not be noticed")).ok()
    }

    /// Signals are meant for those that serve, too, where nobody else knows them.
    async fn hear(&self, request: Request, after: Option<&Descendants>) {
        if let (Request::Reload, Some(access_log)) = (request, self.access_log) {
            access_log.reopen();
        }
        if let Some(after) = after.filter(|_| elder::stays()) {
            after.pass_on(request).await;
        }
    }

    async fn finish(&self, times: ShutdownTimes, signals: &mut Signals, after: Option<&Descendants>) {
        let times = ShutdownTimes { delay: Duration::ZERO, ..times };
        let hurry = async {
            loop {
                let request = signals.next().await;
                self.hear(request, after).await;
                if request == Request::Stop {
                    return;
                }
            }
        };
        lifecycle::shut_down(self.relay, self.readiness, times, hurry).await;
    }

    async fn wait_to_be_ended(&self, signals: &mut Signals) {
        loop {
            let request = signals.next().await;
            self.hear(request, None).await;
            if request != Request::Reload {
                return;
            }
        }
    }
}

/// Never, where there is nobody.
async fn ended(after: Option<&mut Descendants>) -> Ending {
    match after {
        Some(after) => after.end().await,
        None => pending().await,
    }
}
