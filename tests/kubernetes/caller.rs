//! Somebody who would notice: a client that asks all the time, and a look at the socket that it asks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::support::site::Site;
use crate::support::{client, seen};

/// A client of the first Service that asks again and again, how often it was answered, and what went wrong if anything did.
pub(crate) struct Caller {
    site: Site,
    sockets: Vec<u64>,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Caller {
    /// Begins to ask.
    pub(crate) fn start(site: Site) -> Self {
        let sockets = seen::listening(site.service());
        assert_eq!(sockets.len(), 1, "one socket listens at {}", site.service());
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (until, count) = (Arc::clone(&stop), Arc::clone(&answered));
        let task = tokio::spawn(async move {
            while !until.load(Ordering::Relaxed) {
                client::ask(site.service()).await.expect("a backend answers all the time");
                count.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(2)).await; // Not a load, only somebody who would notice.
            }
        });
        Self { site, sockets, stop, answered, task }
    }

    /// Ends, with no error: it was answered, at the socket that it asked first.
    pub(crate) async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.expect("no client saw an error");
        assert!(self.answered.load(Ordering::Relaxed) > 0);
        assert_eq!(seen::listening(self.site.service()), self.sockets, "T225: no listener was closed");
    }
}
