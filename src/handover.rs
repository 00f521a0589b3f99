//! A hot upgrade: what a process has is taken over by the one that comes after it.
//!
//! ```text
//! the one that serves                          its successor, `run --take-over`
//!                                              reads its sources, plans, has addresses made local; binds nothing
//!                       ◀── Hello, Take ──
//! control stands still  ──── sockets ────▶
//! traffic stands still  ── all else, End ─▶    reads it; has the addresses of connections made local
//!                       ◀──── Ready ─────
//!                       ──── Commit ────▶
//!                       ◀──── Taken ─────      from here on they are its own: connections and flows go on
//! looks away            ─── Released ───▶      listeners begin
//! closes                ──── Closed ────▶      what could not be taken over is opened anew
//! keeps what has not moved to its end
//!                       ◀─── Serving ────      whoever has asked for the upgrade is told
//! tells what it counts  ───── Late ─────▶      at the door, whoever serves by then
//! ```
//!
//! *Who serves is never in doubt.* `Taken` is the one message that decides, and the kernel knows whether it was sent: it
//! is the successor's where it went, and the other one lets go where it came (`post`). Clients wait in the kernel until it has;
//! if it crashes instead, the successor hears that at once. Whatever fails before it leaves the first
//! process serving, and each descriptor that was sent goes with the message or the process that had it. A successor that
//! crashes after it is a crash like any other: who supervises it starts it again. Where it is the first process that is killed
//! before it, somebody serves as well: the successor, with all of it where `End` has come, and else from the beginning.
//!
//! *Why a socket in `--state-dir`.* The lock of that folder says who is the one that serves, and goes over with the rest: two
//! successors cannot take over from the same process. Two pods of a node find each other there, where nobody knows a pid; which
//! of them came after the other is in the same folder (`line`), as either may be started again.
//!
//! *Why the running process starts its successor* (`kube-relay upgrade`, `successor`): the child has the same user, rights,
//! namespaces, group of the supervisor and standard error, by whatever way these were come by. Whoever supervises is told
//! of the child's pid where it can be told (`supervisor`).
//!
//! | File | Holds |
//! |---|---|
//! | `parcel` | what one message carries |
//! | `post` | how messages travel |
//! | `refusal` | why one of them will not |
//! | `introduction` | who the two are, and whether they understand each other |
//! | `door` | the socket in the state folder |
//! | `arrival` | how a process comes to that folder: first, as a successor, or not yet |
//! | `line` | which pods have served, in their order |
//! | `office` | what a process has as such: the folder, the door, the sockets of its own servers |
//! | `sockets` | what is said of listening sockets |
//! | `giving`, `taking` | the two sides of the conversation above |
//! | `host` | who answers at the door |
//! | `failure` | why nothing came of it, for the side that hands over |
//! | `successor` | the next program |
//! | `exporter`, `importer` | what the two sides have beside listeners: when each stands still, and when it goes on |
//! | `services`, `counts` | what is said of ServicePorts: pins, turns, ejections, counters |
//! | `source` | what is said of the source: what was rejected, and how it was with the API server |
//! | `late` | what is counted by the one that hands over once these were said |
//! | `flows`, `streams` | what is said of UDP flows and of connections |
//! | `heirs` | to whom these belong in the process that takes over |
//! | `fault` | what tests have a successor do |
//! | `order` | what `kube-relay upgrade` and `kube-relay ready` do |

mod arrival;
mod counts;
mod door;
pub(crate) mod exporter;
mod failure;
mod fault;
mod flows;
pub(crate) mod giving;
mod heirs;
mod host;
pub(crate) mod importer;
mod introduction;
pub(crate) mod late;
mod line;
mod office;
mod order;
pub(crate) mod parcel;
mod post;
mod refusal;
mod services;
mod sockets;
pub(crate) mod source;
mod streams;
mod successor;
pub(crate) mod taking;

pub use arrival::{Arrival, NotYet};
pub use host::{Handed, Host};
pub use line::enter;
pub use office::{NoDoor, Office};
pub(crate) use order::serving;
pub use order::{OrderError, Seen, UpgradeReport, look, upgrade};
pub use taking::{Decision, TakeError, TakeOver};

#[cfg(test)]
mod tests;
