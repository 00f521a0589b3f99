//! What choosing a backend costs: `Balancer::pick` on one thread and on two, for each balance and with ClientIP affinity.
//!
//! The baseline beside it is a plain index into a vector: what nobody can beat who hands out an `Arc`. A connection
//! costs some 70 µs, so anything under 100 ns is lost in it; what must not happen is waiting.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use kube_relay::name::{BalancerKey, Family, ObjectName, Protocol, Scope, ServicePortName};
use kube_relay::plan::Balance;
use kube_relay::serve::balancer::{Backend, Balancer, PortState, Table, Tried};

const BACKENDS: u8 = 10;
/// Kubernetes' default for `sessionAffinityConfig.clientIP.timeoutSeconds`.
const AFFINITY_TIMEOUT: Duration = Duration::from_secs(10_800);

criterion_group!(benches, index, balances, client_ip);
criterion_main!(benches);

fn index(criterion: &mut Criterion) {
    let backends = backends();
    let mut next = 0;
    criterion.bench_function("plain index, 1 thread", |bencher| {
        bencher.iter(|| {
            next = (next + 1) % backends.len();
            black_box(Arc::clone(&backends[next]))
        });
    });
}

fn balances(criterion: &mut Criterion) {
    for balance in Balance::ALL {
        let mut group = criterion.benchmark_group(balance.as_str());
        for threads in [1, 2] {
            let balancer = balancer(balance, None);
            group.bench_function(BenchmarkId::new("threads", threads), |bencher| {
                bencher.iter_custom(|picks| time(threads, picks, &balancer, |_| Ipv4Addr::LOCALHOST.into()));
            });
        }
    }
}

fn client_ip(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ClientIP");
    for (threads, clients) in [(1, 1), (1, 10_000), (2, 10_000)] {
        let balancer = balancer(Balance::RoundRobin, Some(AFFINITY_TIMEOUT));
        let id = BenchmarkId::new(format!("{clients} clients, threads"), threads);
        group.bench_function(id, |bencher| {
            bencher.iter_custom(|picks| time(threads, picks, &balancer, |pick| client(pick % clients)));
        });
    }
}

/// How long `picks` take when each of the threads makes so many at the same time.
fn time(threads: usize, picks: u64, balancer: &Balancer, client: impl Fn(u64) -> IpAddr + Sync) -> Duration {
    let together = Barrier::new(threads);
    let work = || {
        let (tried, now) = (Tried::default(), Instant::now());
        together.wait();
        let start = Instant::now();
        for pick in 0..picks {
            black_box(balancer.pick(client(pick), &tried, now));
        }
        start.elapsed()
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let times = threads.into_iter().map(|thread| thread.join().expect("picking does not panic"));
        times.max().unwrap_or_default()
    })
}

fn client(number: u64) -> IpAddr {
    let [.., a, b, c] = number.to_be_bytes();
    [10, a, b, c].into()
}

fn backends() -> Vec<Arc<Backend>> {
    let address = |i| SocketAddr::from(([10, 244, 0, i], 8000));
    (0..BACKENDS).map(|i| Arc::new(Backend::new(i.into(), address(i)))).collect()
}

fn balancer(balance: Balance, affinity: Option<Duration>) -> Balancer {
    let name = ServicePortName::new(ObjectName::parse("default/web"), "http", Protocol::Tcp);
    let key = BalancerKey { port: name.clone(), family: Family::V4, scope: Scope::Cluster };
    let port = Arc::new(PortState::new(name));
    port.affinity.set_timeout(affinity);
    Balancer::new(key, port, Table::new(backends().into(), &[]).balanced_by(balance, rand::random()))
}
