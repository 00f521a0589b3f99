//! Connections that nobody means to open: SYNs from addresses of nobody, as many as a sender can make.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use kube_relay::name::Family;

use crate::bursts::{Burst, backends};
use crate::many::Many;
use crate::rig::full;
use crate::seen;
use crate::spoofed;
use crate::stage::Stage;

const A_SECOND: u32 = 200;

/// One Service is flooded; clients of another notice nothing.
pub(crate) fn one_service_is_flooded() {
    let (a_millisecond, seconds) = if full() { (50, 10) } else { (10, 2) };
    let stage = Stage::build();
    let _backends = backends(&stage);
    // Both in one manifest.
    let mut manifest = Many::on(&stage, 1).manifest(&stage.backends(Family::V4));
    let mut flooded = stage.manifest(&stage.backends(Family::V4), &[]);
    let flooded = flooded["items"].as_array_mut().expect("a list").split_off(0);
    manifest["items"].as_array_mut().expect("a list").extend(flooded);
    let relay = stage.relay_of(&manifest, &[]);
    let burst = || Burst::run(stage.client(), Many::service(0), seconds * A_SECOND, A_SECOND);
    let service = stage.service(Family::V4);

    let quiet = burst();
    let before = (seen::run_time(relay.pid()), Instant::now());
    let count = 1_000 * a_millisecond * seconds;
    let flood =
        stage.client().thread(move || spoofed::flood(service, count, a_millisecond, syn)).expect("a thread starts");
    let beside = burst();
    let busy = (seen::run_time(relay.pid()) - before.0).as_secs_f64() / before.1.elapsed().as_secs_f64();
    let took = flood.join().expect("it does not panic").expect("all are sent");

    let overflows = relay.gauge("kuberelay_host_listen_overflows_total");
    println!(
        "{count} SYNs in {took:?}, {overflows} clients turned away by the kernel, {:.1} % of a processor for the relay; another Service, quiet: {quiet}; beside it: {beside}",
        busy * 100.0
    );
    assert_eq!((quiet.failures.len(), &beside.failures), (0, &Vec::new()));
    assert_eq!(relay.dropped(None), 0, "no SYN has come as far as a connection");
    if cfg!(debug_assertions) {
        println!("times are judged in release builds alone");
        return;
    }
    // Three times as long, and what a processor takes to change between two programs.
    let (alone, together) = (quiet.percentile(99), beside.percentile(99));
    assert!(together < alone * 3 + Duration::from_millis(1), "p99 was {alone:?} and is {together:?}");
}

/// A SYN, whose checksum is ours to write.
fn syn(source: Ipv4Addr, to: SocketAddrV4) -> [u8; 40] {
    const TCP: u8 = 6;
    const SOURCE_PORT: u16 = 40_000;
    const WORDS: u8 = 5 << 4;
    const SYN: u8 = 2;
    const WINDOW: u16 = 64_240;
    let mut packet = [0; 40];
    spoofed::header(&mut packet, TCP, source, *to.ip());
    let segment = &mut packet[spoofed::HEADER_BYTES..];
    segment[0..2].copy_from_slice(&SOURCE_PORT.to_be_bytes());
    segment[2..4].copy_from_slice(&to.port().to_be_bytes());
    segment[12] = WORDS;
    segment[13] = SYN;
    segment[14..16].copy_from_slice(&WINDOW.to_be_bytes());
    let checksum = checksum(&packet[spoofed::HEADER_BYTES - ADDRESSES_BYTES..], TCP);
    packet[36..38].copy_from_slice(&checksum.to_be_bytes());
    packet
}

/// Both addresses, at the end of an IPv4 header.
const ADDRESSES_BYTES: usize = 8;

/// Of both addresses and the segment behind them, with the rest of the header that is summed up but not sent (RFC 9293).
fn checksum(addresses_and_segment: &[u8], protocol: u8) -> u16 {
    let segment_bytes = (addresses_and_segment.len() - ADDRESSES_BYTES) as u32;
    let words = addresses_and_segment.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let mut sum = words.sum::<u32>() + u32::from(protocol) + segment_bytes;
    while sum > u32::from(u16::MAX) {
        sum = (sum >> 16) + (sum & u32::from(u16::MAX));
    }
    !(sum as u16)
}
