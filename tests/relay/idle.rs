//! Connections that do nothing: what they cost, and that nothing of them stays.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;

use crate::support::backend::Backend;
use crate::support::manifest::Manifest;
use crate::support::program::{Descriptors, Program};
use crate::support::site::Site;
use crate::support::{client, full, seen, within};

/// As many as are asked for, in the long form, and fewer where the machine has not so many descriptors.
const CONNECTIONS: u64 = 10_000;
const SHORT_CONNECTIONS: u64 = 2_000;
/// User memory of one: a reserve above what a release build needs (1.6 KiB).
const BYTES_EACH: u64 = 3 * 1024;

/// Descriptors of the first connections, which may still be closing, and of whoever asks for metrics.
const FEW: u64 = 100;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f13_t170_given_many_idle_connections_when_they_are_open_then_memory_is_bounded_and_afterwards_all_is_as_before()
 {
    let site = Site::new(170);
    let _backend = Backend::named(site.backend(1)).await;
    let relay = Program::start(site, Manifest::new(site).tcp().endpoints([site.backend(1)]), |_| ()).await;
    let descriptors = Descriptors::take().await;
    let count = descriptors.fitting(if full() { CONNECTIONS } else { SHORT_CONNECTIONS }, 2); // Both far ends are here.
    let active = |relay: &Program| relay.metric("kuberelay_active_connections", &[]);
    drop(open(site.service(), FEW / 2).await); // What is made once for all is made now.
    relay.until("a start without connections", |relay| active(relay) == 0).await;
    let before = (seen::descriptors(relay.pid()), seen::private_bytes(relay.pid()));

    let mut peaks = Vec::new();
    for _ in 0..2 {
        let connections = open(site.service(), count).await;

        let each = seen::private_bytes(relay.pid()).saturating_sub(before.1) / count;
        let busy = within("the relay to rest", at_rest(&relay)).await;
        println!("{count} idle connections: {each} bytes of user memory each, {:.2} % of a processor", busy * 100.0);
        assert!(each <= BYTES_EACH, "{each} bytes each");
        let descriptors = (seen::descriptors(relay.pid()) - before.0) as u64;
        let sockets = 2 * count - FEW..=2 * count + FEW;
        assert!(sockets.contains(&descriptors), "{descriptors} descriptors, not two each: no pipe is held");
        peaks.push(seen::private_bytes(relay.pid()));
        drop(connections);
        relay.until("all of them to be closed", |relay| active(relay) == 0).await;
        relay.until("their descriptors to be back", |relay| seen::descriptors(relay.pid()) <= before.0).await;
    }

    assert!(peaks[1] <= peaks[0] + peaks[0] / 10, "more memory the second time: {peaks:?} bytes");
}

/// What it takes of a processor once it takes less than a hundredth: connections that last are given their options some
/// seconds after they came, and on a busy machine they come for as long.
async fn at_rest(relay: &Program) -> f64 {
    loop {
        let busy = relay.busy(Duration::from_millis(500)).await;
        if busy < 0.01 {
            return busy;
        }
    }
}

/// Connections that have exchanged one message.
async fn open(service: SocketAddr, count: u64) -> Vec<TcpStream> {
    let mut connections = Vec::new();
    for _ in 0..count {
        let mut stream = client::connect(service).await.expect("the Service answers");
        client::ask_on(&mut stream).await.expect("the backend answers");
        connections.push(stream);
    }
    connections
}
