//! The peers side by side: direct, in-kernel DNAT, kube-relay, HAProxy and nginx, in one run over one rig.
//!
//! ```text
//! cargo bench --bench versus -- tcp|udp [--quick] [--rounds N] [--only ROW] [--peers a,b] [--json FILE]
//! ```
//!
//! client → node → three pods of that node, over veth pairs, in namespaces of our own (loopback where the kernel gives
//! none, and then it says so). All peers take part in each round, in rotated order; ratios are taken within a round.
//! A peer that is not installed is said to be absent; nothing is installed.

#[path = "../tests/support/rig.rs"]
mod rig;
#[path = "../tests/support/workload.rs"]
mod workload;

#[path = "versus/datagrams.rs"]
mod datagrams;
#[path = "versus/echo.rs"]
mod echo;
#[path = "versus/load.rs"]
mod load;
#[path = "versus/measure.rs"]
mod measure;
#[path = "versus/peers.rs"]
mod peers;
#[path = "versus/report.rs"]
mod report;
#[path = "versus/rows.rs"]
mod rows;
#[path = "versus/scale.rs"]
mod scale;
#[path = "versus/stage.rs"]
mod stage;

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use kube_relay::name::Protocol;

use crate::peers::{Peer, PeerKind};
use crate::report::{Cell, Report};
use crate::rows::{Row, Work};
use crate::stage::Stage;

/// Runs kube-relay beside its peers and prints what each costs.
#[derive(Debug, Parser)]
#[command(name = "versus", bin_name = "cargo bench --bench versus --")]
struct Arguments {
    /// What to compare. Without it nothing runs.
    suite: Option<Suite>,
    /// One short round: plausible numbers in under 60 s, no verdicts.
    #[arg(long)]
    quick: bool,
    /// Paired rounds; a verdict needs 11 [default: 11, or 1 with --quick].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Only this row or group: bulk, bulk-down-4, connections, ping, idle, services; for UDP window, one-each, trains,
    /// paced, lossfree, flood, flows; may be repeated.
    #[arg(long, value_name = "ROW")]
    only: Vec<String>,
    /// Only these peers.
    #[arg(long, value_enum, value_delimiter = ',')]
    peers: Vec<PeerKind>,
    /// Writes one line of JSON for each row, peer and round.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Cargo passes it to each bench.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// Streams: bulk, short connections, ping-pong, idle connections, many Services.
    Tcp,
    /// Datagrams: closed loops, a paced stream, the highest loss-free rate, a flood, many flows.
    Udp,
}

impl Suite {
    fn protocol(self) -> Protocol {
        match self {
            Self::Tcp => Protocol::Tcp,
            Self::Udp => Protocol::Udp,
        }
    }

    fn rows(self) -> Vec<Row> {
        match self {
            Self::Tcp => rows::tcp(),
            Self::Udp => rows::udp(),
        }
    }

    /// How long a row runs. Datagrams are so small that a shorter time has enough of them.
    fn span(self, quick: bool) -> load::Span {
        let [warm_up, window] = match (self, quick) {
            (Self::Tcp, false) => [200, 600],
            (Self::Tcp, true) => [60, 180],
            (Self::Udp, false) => [120, 400],
            (Self::Udp, true) => [60, 180],
        };
        load::Span { warm_up: Duration::from_millis(warm_up), window: Duration::from_millis(window) }
    }
}

impl Arguments {
    fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 1 } else { 11 })
    }

    fn peers(&self, suite: Suite) -> Vec<PeerKind> {
        let named = |peer: &PeerKind| match self.peers.as_slice() {
            [] => peer.is_invited(),
            named => named.contains(peer),
        };
        PeerKind::ALL.into_iter().filter(|peer| named(peer) && peer.speaks(suite.protocol())).collect()
    }

    fn rows(&self, suite: Suite) -> Vec<Row> {
        let begins =
            |row: &Row, name: &str| row.id.strip_prefix(name).is_some_and(|rest| !rest.starts_with(|c| c != '-'));
        let named = |row: &Row| self.only.is_empty() || self.only.iter().any(|name| begins(row, name));
        suite.rows().into_iter().filter(named).collect()
    }
}

fn main() -> ExitCode {
    let isolation = rig::isolate(); // before any thread exists
    let arguments = Arguments::parse();
    let Some(suite) = arguments.suite else {
        println!("versus runs for minutes, so it wants to be asked: cargo bench --bench versus -- tcp|udp [--quick]");
        return ExitCode::SUCCESS;
    };
    if let Err(reason) = &isolation {
        println!("{reason}; everything below runs on LOOPBACK, which flatters whoever copies\n");
    }
    match compare(&arguments, suite, isolation.is_ok()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("versus: {error}");
            ExitCode::FAILURE
        }
    }
}

fn compare(arguments: &Arguments, suite: Suite, isolated: bool) -> io::Result<()> {
    let stage = Stage::build(isolated)?;
    let mut report = Report::new(arguments.rounds());
    let mut peers = Vec::new();
    for kind in arguments.peers(suite) {
        match Peer::start(kind, suite.protocol(), &stage, kind.vip()) {
            Ok(peer) => peers.push(peer),
            Err(absence) => report.absent(kind, absence),
        }
    }
    println!("{}", stage.describe(&peers)?);

    let mut json = arguments.json.as_ref().map(File::create).transpose()?.map(BufWriter::new);
    let (rows, span) = (arguments.rows(suite), suite.span(arguments.quick));
    for round in 0..arguments.rounds() {
        eprintln!("round {} of {}", round + 1, arguments.rounds());
        for row in &rows {
            for peer in rotated(&peers, round) {
                let Some(outcome) = run(row, peer, &stage, span) else { continue };
                let cell = Cell { row: row.id.clone(), peer: peer.kind, round, outcome };
                if let Some(json) = &mut json {
                    writeln!(json, "{}", cell.to_json())?;
                }
                report.add(cell);
            }
        }
    }
    println!("{}", report.render(&rows));
    json.map_or(Ok(()), |mut json| json.flush())
}

/// One cell: a row with a peer. `None` where the row is not for this peer or this stage.
fn run(row: &Row, peer: &Peer, stage: &Stage, span: load::Span) -> Option<Result<report::Outcome, String>> {
    if !stage.rig.families().contains(&row.family) {
        return None;
    }
    let outcome = match row.work {
        Work::Traffic(workload) => load::run(workload, peer, row.family, stage, span),
        Work::Datagrams(load) => datagrams::run(load, peer, row.family, stage, span),
        Work::Idle(_) | Work::Services(_) | Work::Flows(_) if !peer.kind.is_proxy() => return None,
        Work::Idle(connections) => scale::idle(connections, peer.kind, stage),
        Work::Flows(_) if peer.kind == PeerKind::NginxBest => return None, // its memory is not what differs
        Work::Flows(count) => scale::flows(count, peer.kind, stage),
        Work::Services(_) if peer.kind != PeerKind::KubeRelay => return None,
        Work::Services(count) => scale::services(count, stage, span),
    };
    Some(outcome.map_err(|error| error.to_string()))
}

/// Everybody is first, second … and last equally often.
fn rotated(peers: &[Peer], round: u32) -> impl Iterator<Item = &Peer> {
    let first = (round as usize).checked_rem(peers.len()).unwrap_or(0);
    peers.iter().cycle().skip(first).take(peers.len())
}
