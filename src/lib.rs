//! kube-relay: a userspace L4 proxy for Kubernetes Services.

#[cfg(not(target_os = "linux"))]
compile_error!("kube-relay needs Linux (epoll, splice, recvmmsg, AnyIP): build it in a Linux machine, VM or container");

pub mod admin;
mod admission;
pub mod allocate;
mod claims;
pub mod cli;
pub mod config;
pub mod control;
pub mod decode;
mod decode_endpoints;
mod decode_service;
mod describe;
pub mod endpoints;
mod entries;
mod findings;
pub mod host;
mod layout;
pub mod lifecycle;
pub mod live;
mod locate;
pub mod logs;
pub mod manifest;
pub mod metrics;
pub mod model;
pub mod name;
pub mod overview;
pub mod peer;
pub mod plan;
mod problem;
pub mod remedy;
pub mod scaffold;
pub mod serve;
mod service_plan;
pub mod stats;
pub mod status;
pub mod timestamp;
pub mod value;
mod watch;
mod yaml;
