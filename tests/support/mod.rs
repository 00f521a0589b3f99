//! What the integration tests share: places on loopback, manifests, scripted backends, clients, a running relay.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part of this, and exports nothing")]

pub mod api_server;
pub mod backend;
pub mod client;
pub mod manifest;
pub mod program;
pub mod relay;
pub mod seen;
pub mod site;

use std::future::Future;
use std::time::Duration;

/// How long any test waits for anything. Reached only where something is broken.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// The result of a future that has to end.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(result) => result,
        Err(_) => panic!("waited {DEADLINE:?} for {what}"),
    }
}

/// Says why a test proves nothing here. With the long forms that is a failure, unless the caller knows of it:
/// `KUBE_RELAY_MAY_SKIP` lists words, with commas between.
pub fn skip(word: &str, reason: &str) {
    let known = std::env::var("KUBE_RELAY_MAY_SKIP").unwrap_or_default();
    assert!(!full() || known.split(',').any(|known| known == word), "skipped ({word}): {reason}");
    println!("skipped ({word}): {reason}");
}

/// True where the long forms are asked for: `KUBE_RELAY_TEST=full`.
pub fn full() -> bool {
    std::env::var("KUBE_RELAY_TEST").is_ok_and(|value| value == "full")
}
