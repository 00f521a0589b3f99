//! kube-relay: a userspace L4 proxy for Kubernetes Services.

#[cfg(not(target_os = "linux"))]
compile_error!("kube-relay needs Linux (epoll, splice, recvmmsg, AnyIP): build it in a Linux machine, VM or container");

pub mod admin;
mod admission;
pub mod allocate;
mod claims;
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
mod locate;
pub mod manifest;
pub mod metrics;
pub mod model;
pub mod name;
pub mod plan;
mod problem;
pub mod scaffold;
pub mod serve;
mod service_plan;
pub mod stats;
pub mod status;
mod yaml;
