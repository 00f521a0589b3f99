//! Clients that come all the time, each with a connection of its own, and what became of them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::support::client::ask;

/// New connections, until it is stopped.
pub(crate) struct Load {
    stop: CancellationToken,
    task: JoinHandle<Outcome>,
    answered: Arc<AtomicU64>,
}

/// What became of them.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) answered: u64,
    pub(crate) failed: Vec<String>,
    pub(crate) per_second: f64,
    pub(crate) slowest: Duration,
}

impl Load {
    /// So many new connections a second, as far as this machine can.
    pub(crate) fn start(service: SocketAddr, per_second: u32) -> Self {
        let (stop, answered) = (CancellationToken::new(), Arc::new(AtomicU64::new(0)));
        let task = tokio::spawn(run(service, per_second, stop.clone(), Arc::clone(&answered)));
        Self { stop, task, answered }
    }

    /// Waits until so many more were answered.
    pub(crate) async fn answered(&self, more: u64) {
        let wanted = self.answered.load(Ordering::Relaxed) + more;
        while self.answered.load(Ordering::Relaxed) < wanted {
            assert!(!self.task.is_finished(), "it goes on until it is stopped");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    pub(crate) async fn end(self) -> Outcome {
        self.stop.cancel();
        self.task.await.expect("no panic")
    }
}

async fn run(service: SocketAddr, per_second: u32, stop: CancellationToken, answered: Arc<AtomicU64>) -> Outcome {
    let (mut clients, began) = (JoinSet::new(), Instant::now());
    let mut outcome = Outcome { answered: 0, failed: Vec::new(), per_second: 0.0, slowest: Duration::ZERO };
    let mut tick = interval(Duration::from_secs(1) / per_second);
    tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            _ = tick.tick() => {
                clients.spawn(async move {
                    let began = Instant::now();
                    ask(service).await.map(|_| began.elapsed())
                });
            }
            Some(ended) = clients.join_next() => note(&mut outcome, ended.expect("no panic"), &answered),
        }
    }
    while let Some(ended) = clients.join_next().await {
        note(&mut outcome, ended.expect("no panic"), &answered);
    }
    outcome.per_second = outcome.answered as f64 / began.elapsed().as_secs_f64();
    outcome
}

fn note(outcome: &mut Outcome, ended: std::io::Result<Duration>, answered: &AtomicU64) {
    match ended {
        Ok(took) => {
            outcome.answered += 1;
            outcome.slowest = outcome.slowest.max(took);
            answered.fetch_add(1, Ordering::Relaxed);
        }
        Err(error) => outcome.failed.push(error.to_string()),
    }
}
