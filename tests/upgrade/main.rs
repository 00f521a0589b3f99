//! Hot upgrades, with the program as it is: one process takes over from another one while clients come and go.

mod continuity;
mod counters;
mod datagrams;
mod doctor;
mod elders;
mod failures;
#[cfg(debug_assertions)] // What makes a process fail at a step is in no build for use.
mod faults;
mod few_descriptors;
mod filters;
mod kept;
mod load;
mod pods;
mod relay;
mod size;
mod strangers;
mod succession;
mod supervisor;
mod talk;
mod users;

#[path = "../support/mod.rs"]
mod support;

/// True in what is built for speed, and with as many samples as it takes to tell how long anything lasts. Such builds run these
/// tests one after the other.
fn is_measured() -> bool {
    support::full() && !cfg!(debug_assertions)
}
