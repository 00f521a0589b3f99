//! An upgrade of a large relay: many Services, each with its listener, and many open connections.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Instant;

use futures_util::{StreamExt, stream};
use kube_relay::host;
use serde_json::json;
use tokio::net::TcpStream;

use crate::few_descriptors::number;
use crate::relay::{House, lasting_descriptors};
use crate::support::backend::Backend;
use crate::support::client::{ask, ask_on, connect};
use crate::support::manifest::Manifest;
use crate::support::site::{BACKEND_PORT, SERVICE_PORT, Site};
use crate::support::{full, seen};

/// Cluster IPs in each of the corners of 127/8 behind that of the backends: the last ones for tests here.
const IN_A_CORNER: u16 = 250;
/// Who is asked at the same time: fewer than may wait to be let in.
const AT_ONCE: usize = 64;
/// Descriptors of a process that are no listener and no connection, and what is kept from clients.
const SPARE_DESCRIPTORS: u64 = 1_000;
/// Descriptors that come and go in a process, as of its own connections to somebody else.
const MORE_OR_LESS: usize = 8;
/// Memory after the upgrade, of that before.
const MOST_RESIDENT: f64 = 1.25;

/// How large it is.
struct Size {
    services: u16,
    streams: usize,
}

impl Size {
    /// Half of the descriptors are for listeners, and half for connections, of which each has two: as far as there are
    /// any.
    fn of_this_run() -> Self {
        let limit = host::raise_open_files().expect("a limit").unwrap_or(u64::MAX);
        let half = limit.saturating_sub(SPARE_DESCRIPTORS) / 2;
        let wanted =
            if full() { Self { services: 6_000, streams: 3_000 } } else { Self { services: 2_000, streams: 1_000 } };
        Self {
            services: wanted.services.min(u16::try_from(half).unwrap_or(u16::MAX)),
            streams: wanted.streams.min(usize::try_from(half / 2).unwrap_or(usize::MAX)),
        }
    }

    /// Where its Services answer.
    fn addresses(&self, site: Site) -> Vec<SocketAddr> {
        (0..self.services).map(|number| address(site, number)).collect()
    }
}

fn address(site: Site, number: u16) -> SocketAddr {
    let IpAddr::V4(own) = site.cluster_ip() else { unreachable!("all of 127/8 are") };
    let [net, block, corner, _] = own.octets();
    let (corner, last) = (u16::from(corner) + 1 + number / IN_A_CORNER, 1 + number % IN_A_CORNER);
    let [corner, last] = [corner, last].map(|part| u8::try_from(part).expect("as many corners as there are"));
    SocketAddr::new(Ipv4Addr::new(net, block, corner, last).into(), SERVICE_PORT)
}

/// All Services, in JSON, which is read faster than YAML: each has one of the backends.
fn manifests(addresses: &[SocketAddr], backends: &[Backend]) -> String {
    let mut text = String::new();
    for (number, (address, backend)) in addresses.iter().zip(backends.iter().cycle()).enumerate() {
        let (name, ip, pod) = (format!("s{number:04}"), address.ip(), backend.address.ip());
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"clusterIP": ip, "ports": [{"name": "a", "port": SERVICE_PORT, "targetPort": BACKEND_PORT}]},
        });
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": format!("{name}-1"), "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4", "ports": [{"name": "a", "port": BACKEND_PORT}], "endpoints": [{"addresses": [pod]}],
        });
        text += &format!("{service}\n{slice}\n");
    }
    text
}

/// An open connection, and who has answered there.
async fn open(service: SocketAddr) -> (TcpStream, SocketAddr) {
    let mut stream = connect(service).await.expect("it serves");
    let backend = ask_on(&mut stream).await.expect("a backend answers");
    (stream, backend)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f25_given_many_services_and_streams_when_upgraded_then_all_go_on_and_the_next_process_is_no_larger() {
    let (size, site) = (Size::of_this_run(), Site::new(66));
    let mut backends = Vec::new();
    for number in 1..=4 {
        backends.push(Backend::named(site.backend(number)).await);
    }
    let addresses = size.addresses(site);
    let mut house = House::new(site, &Manifest::new(site));
    fs::write(house.manifest(), manifests(&addresses, &backends)).expect("the test's folder can be written");
    let began = Instant::now();
    let first = house.start(|_| {});
    // Nobody asks for a page that is as long as there are Services: what it takes is no part of an upgrade.
    house.until("it is ready", |house| house.is_ready()).await;
    let started = began.elapsed();
    let streams = stream::iter(addresses.iter().cycle().take(size.streams));
    let mut streams: Vec<_> = streams.map(|service| open(*service)).buffered(AT_ONCE).collect().await;
    let before = (lasting_descriptors(first), seen::resident_bytes(first)[0]);

    let began = Instant::now();
    let output = house.upgrade(&[]).await;

    assert!(output.status.success(), "{output:?}\n{}", house.log());
    let (upgraded, second) = (began.elapsed(), house.newest().expect("somebody serves"));
    let after = (lasting_descriptors(second), seen::resident_bytes(second)[0]);
    house.until_told(r#""message":"taken over""#).await;
    let [line] = &house.told(r#""message":"taken over""#)[..] else { panic!("{}", house.log()) };
    println!("{} Services, {} connections: served after {started:?}", addresses.len(), streams.len());
    println!("upgraded within {upgraded:?}, standstill {} ms", number(line, "standstill_ms"));
    println!(
        "descriptors: {} before, {} after; resident: {} KiB before, {} KiB after",
        before.0,
        after.0,
        before.1 / 1024,
        after.1 / 1024
    );
    assert_eq!((number(line, "adopted"), number(line, "streams")), (addresses.len(), streams.len()), "{line}");
    stream::iter(streams.iter_mut())
        .for_each_concurrent(AT_ONCE, async |(stream, backend)| {
            assert_eq!(ask_on(stream).await.expect("it goes on"), *backend);
        })
        .await;
    stream::iter(addresses.iter().zip(backends.iter().cycle()))
        .for_each_concurrent(AT_ONCE, async |(service, backend)| {
            assert_eq!(ask(*service).await.expect("it serves"), backend.address, "{service}");
        })
        .await;
    assert!(after.0.abs_diff(before.0) <= MORE_OR_LESS, "{} descriptors before, {} after", before.0, after.0);
    assert!(after.1 as f64 <= MOST_RESIDENT * before.1 as f64, "{} bytes before, {} after", before.1, after.1);
    house.until("the first one ends", |house| house.has_ended(first)).await;
}
