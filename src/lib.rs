//! kube-relay: a userspace L4 proxy for Kubernetes Services.
//!
//! This page is the map. It is reviewed with the code: where the two disagree, one of them has a bug.
//!
//! # The story of a change
//!
//! ```text
//! manifest ─ Message ─▶ control: batch ≤ 20 ms ─▶ Model::apply ─▶ Plan::update(dirty Services) ─▶ [Step] ─▶ Listeners::apply
//! kubernetes ┤
//! host ──────┘                         nothing before Synced       endpoints::usable, claims, diff: pure    │ Swap    → the balancer's table
//!                                                                                                           │ Point   → the listener's target, its socket's filter
//!                                                                                                           │ Bind    → a route that makes its address local (`vips`), a socket, and threads that serve it
//!                                                                                                           │ Park    → port held, connects refused
//!                                                                                                           │ Revive  → the same socket serves again
//!                                                                                                           │ Unbind  → closed; open connections go on
//!                                                                                                           └ Retire  → nobody needs the balancer
//! ```
//!
//! Health ports that nobody wants any more are closed before the steps and new ones are opened after them, so that a
//! number can go from one to the other; their counts follow with each plan.
//!
//! # The story of a connection, and of a datagram
//!
//! ```text
//! client ─▶ accept ─▶ Balancer::pick ─▶ connect (next backend on failure) ─▶ relay ─▶ guard drop: counters, close reason
//!                  │       ▲ what a try gave: who fails again and again is left out for a time (`serve::ejection`)
//!                  └ or first a balancer's header that says who the client is (`serve::introduction`)
//! client ─▶ receive a batch ─▶ FlowTable (pure) ─▶ pick, open, send, close ─▶ replies leave from the listener's own socket
//! ```
//!
//! Counters are atomics in `Arc<Backend>` and `Arc<PortState>`; `/metrics`, `/status` with its page, and `status` read them
//! when asked.
//!
//! # Who owns what
//!
//! | State | Owner | Others see |
//! |---|---|---|
//! | [`model::Model`], [`plan::Plan`], [`serve::Listeners`] | the control task, by value | a `watch` snapshot: [`status::Status`] |
//! | which health ports are open, and the sockets there | the control task; one task that answers at all of them | a number each, as an atomic |
//! | a table of backends | its [`serve::balancer::Balancer`]'s `ArcSwap` cell | one load a pick |
//! | turn of the round robin | its [`serve::balancer::Balancer`], over all swaps | an atomic |
//! | affinity, counters of a ServicePort | [`serve::balancer::PortState`], over all swaps | atomics |
//! | what backends that left have carried | the control task: [`serve::departed::Departed`] | a `watch` snapshot: [`status::Status`] |
//! | a backend's counters, and whether it is ejected | [`serve::balancer::Backend`], from table to table | atomics |
//! | where a listener's traffic goes | the listener's [`serve::TargetCell`] | one load a connection |
//! | how many connections there is room for | the task of `headroom`, by value | two atomics of `serve::gate`, a load each for an accept |
//! | an open connection | a task of one worker thread, from the first byte to the last | its counters |
//! | flows | their UDP shard, by value | nobody |
//! | source ports of flows | each its flow's UDP shard, in a table of atomics | one load a new flow: our own sockets are no clients |
//! | routes that make addresses of Services local | the keeper of [`vips`], by value: [`vip_routes::Routes`] | a [`vips::Hold`] for each listener and each connection |
//! | which of these addresses are guarded | the task of [`guard`], by value | a table of nf_tables, or filters of tc |
//! | by which way answers to clients' addresses come here | the task of [`reply_path`], by value | an atomic |
//! | whether answers of a backend come by this node at all | [`serve::balancer::Backend`], as its connections find out | atomics |
//! | since when work waits, and whether the node may get traffic | [`health::Health`], told by control and the source | a `watch` value |
//! | last good objects of each file | the manifest source | [`control::Message`] |
//! | what the cluster is told in Events | the API source (`events`, `event_ledger`) | counts in [`contact::Contact`] |
//! | the page of metrics | a task of `admin`, while it is made | a copy for each who has asked, compressed |
//! | what has happened to Services lately | the control task, by value: [`recent::Recent`] | a `watch` snapshot: [`status::Status`] |
//! | the access log's file | the writer thread of [`access_log`] | a bounded queue: [`serve::access::AccessTap`] |
//! | what this machine is: addresses, default routes | the follower of [`host_watch`], by value | a `watch` snapshot: [`host_watch::Hosts`] |
//! | credentials for the API server | `login`, for the API source alone: whoever asks while they are read anew waits for that | nobody |
//! | the right to the state folder, and its door | the thread of [`handover`], from start to hand-over | whoever calls |
//! | which sockets the supervisor keeps for the next process | the listeners, by value: `fd_store` | the supervisor, told by a thread |
//! | lines that the log has yet to write | a thread of `log_queue` | a queue with an end: nobody waits |
//! | objects as the API server has them | the API source (`kubernetes`), shared with the model | [`control::Message`], [`contact::Contact`] |
//!
//! # What always holds
//!
//! * Sources and tasks never share a lock: messages in, snapshots out. In [`serve`] nothing waits for anything but sockets.
//! * Traffic has threads of its own: workers for connections, shards for datagrams. The tokio runtime is for the rest.
//! * A bound listener always has a target, and a target's balancers are always there (see [`plan::diff`] for the order).
//! * An address that a listener or a connection needs is local, whoever tries to take that away; routes of others are never
//!   touched.
//! * What listens on all addresses of the machine does not answer at an address that a route of ours makes local ([`guard`]).
//! * A backend that is a listener of this process is never picked: one connection would make thousands.
//! * One bad object, file, address or peer hurts nobody else: it becomes a [`plan::Problem`], a failed listener or a
//!   counted end with one word of a fixed vocabulary, the same in log, metric and status.
//! * Arrows between modules point one way: `name ← stats ← model ← endpoints ← plan ← serve ← control ← admin ← main`.

#[cfg(not(target_os = "linux"))]
compile_error!("kube-relay needs Linux (epoll, splice, recvmmsg, AnyIP): build it in a Linux machine, VM or container");

mod access_line;
pub mod access_log;
pub mod admin;
mod admission;
pub mod allocate;
mod allow_from;
mod answer_body;
#[cfg(feature = "kubernetes")]
pub mod api_client;
#[cfg(feature = "kubernetes")]
mod api_report;
#[cfg(feature = "kubernetes")]
mod api_watch;
pub mod apply_stats;
mod arp;
mod arp_tuning;
mod balancing;
pub mod capacity;
#[cfg(feature = "kubernetes")]
mod catch_up;
mod causes;
mod cgroup;
pub mod choice;
mod claims;
pub mod cleanup;
pub mod cli;
#[cfg(feature = "kubernetes")]
mod cluster;
pub mod config;
mod config_fields;
pub mod config_file;
pub mod contact;
pub mod control;
pub mod decode;
mod decode_endpoints;
mod decode_service;
mod describe;
pub mod difference;
pub mod discovery;
pub mod dns_records;
pub mod dns_zone;
pub mod doctor;
pub mod elder;
pub mod endpoints;
#[cfg(feature = "kubernetes")]
mod endpoints_watch;
mod entrance;
mod entries;
#[cfg(feature = "kubernetes")]
mod event_ledger;
#[cfg(feature = "kubernetes")]
mod event_news;
#[cfg(feature = "kubernetes")]
mod events;
pub mod explain;
mod fd_store;
#[cfg(feature = "kubernetes")]
mod file_stamps;
mod filter_message;
mod findings;
pub mod flag_defaults;
mod follow;
pub mod frozen;
pub mod given;
pub mod guard;
mod guard_addresses;
mod guard_filters;
mod guard_message;
mod guard_program;
mod guard_socket;
mod guard_table;
mod gzip;
pub mod handover;
mod headroom;
pub mod health;
mod health_port;
mod healthcheck;
pub mod heap;
#[cfg(feature = "kubernetes")]
mod heard;
mod hints;
pub mod host;
mod host_news;
pub mod host_watch;
pub mod hosts_file;
mod http_server;
mod input;
mod journal;
#[cfg(feature = "kubernetes")]
pub mod kubernetes;
mod large_list;
#[cfg(feature = "kubernetes")]
mod last_good;
mod layout;
pub mod lifecycle;
mod listen_overflows;
mod listener_set;
pub mod live;
mod local_ports;
mod locate;
mod log_queue;
#[cfg(feature = "kubernetes")]
mod login;
pub mod logs;
pub mod manifest;
mod manifest_file;
pub mod manual;
pub mod metrics;
#[cfg(feature = "kubernetes")]
mod mirror;
pub mod model;
pub mod name;
#[cfg(feature = "kubernetes")]
mod node_report;
#[cfg(feature = "kubernetes")]
mod outage;
pub mod overview;
#[cfg(feature = "kubernetes")]
pub mod own_node;
mod page;
mod pages;
pub mod panics;
mod parts;
pub mod peer;
pub mod place;
pub mod plan;
pub mod pod_environment;
pub mod printable;
mod problem;
mod proxy_protocol;
pub mod rare;
mod reading;
pub mod recent;
pub mod rejections;
pub mod remedy;
pub mod reply_mark;
pub mod reply_message;
mod reply_news;
pub mod reply_path;
mod reply_seats;
mod report_pieces;
pub mod retirement;
pub mod route_claim;
mod route_message;
mod route_socket;
mod routing_rules;
#[cfg(feature = "kubernetes")]
mod saved_object;
pub mod scaffold;
pub mod serve;
mod service_plan;
pub mod source_address;
pub mod source_matrix;
mod source_ranges;
pub mod state_lock;
pub mod stats;
pub mod status;
mod status_query;
pub mod summary;
pub mod supervisor;
mod sysctl;
mod tcp_settings;
mod texts;
pub mod timestamp;
pub mod top;
mod udp_settings;
pub mod value;
pub mod vip_routes;
pub mod vips;
mod watch;
#[cfg(feature = "kubernetes")]
mod watched;
pub mod wildcard;
#[cfg(feature = "kubernetes")]
mod wire;
mod yaml;
