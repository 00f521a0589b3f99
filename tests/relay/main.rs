//! The relay from end to end: manifests in, connections and datagrams through, over real sockets on loopback.

mod access_log;
mod browser;
mod caps;
mod health_ports;
mod idle;
mod lack;
mod ladder;
mod limits;
mod listeners;
mod manifests;
mod page;
mod proxy_protocol;
mod rollout;
mod spread;
mod tcp;
mod udp;
mod verdicts;

#[path = "../support/mod.rs"]
mod support;
