//! Services from an API server, from end to end: a server that fails in every way that real ones do, real clients and
//! backends on loopback, and what each of them notices.
#![cfg(feature = "kubernetes")]

mod away;
mod bootstrap;
mod caller;
mod credentials;
mod doctor;
mod endurance;
mod events;
mod failures;
mod log;
mod many;
mod node;
mod nonsense;
mod role;
mod rollout;
mod saved;
mod scale;
mod stage;
mod story;

#[path = "../support/mod.rs"]
mod support;
