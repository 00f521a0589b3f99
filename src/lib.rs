//! kube-relay: a userspace L4 proxy for Kubernetes Services.

#[cfg(not(target_os = "linux"))]
compile_error!("kube-relay needs Linux (epoll, splice, recvmmsg, AnyIP): build it in a Linux machine, VM or container");

pub mod admin;
pub mod allocate;
pub mod config;
pub mod control;
pub mod endpoints;
pub mod host;
pub mod lifecycle;
pub mod manifest;
pub mod metrics;
pub mod model;
pub mod name;
pub mod plan;
pub mod serve;
pub mod stats;
pub mod status;
