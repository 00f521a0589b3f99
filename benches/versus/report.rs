//! Cells to figures: medians and quartiles, paired ratios, verdicts; the tables and the JSON lines.
//!
//! What is measured and what it is held to is in `rows`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::measure::Quartiles;
use crate::peers::{Absence, PeerKind};
use crate::rows::{Against, Metric, Pattern, Row, Side, Target, Work, Workload};

/// Fewer paired rounds give no verdict.
const ROUNDS_FOR_A_VERDICT: usize = 11;

/// What one peer did in one row of one round.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    figures: BTreeMap<Metric, f64>,
    /// Exchanges that failed, few enough to go on.
    failures: u64,
    /// Other programs took too much of the machine.
    disturbed: bool,
    /// How many things there were, where the machine's limits decide it.
    scale: Option<u32>,
}

impl Outcome {
    /// Without figures yet, for a row of load.
    pub(crate) fn under_load(failures: u64, disturbed: bool) -> Self {
        Self { failures, disturbed, ..Self::default() }
    }

    /// Without figures yet, for a row about so many things.
    pub(crate) fn at_scale(scale: u32, disturbed: bool) -> Self {
        Self { scale: Some(scale), disturbed, ..Self::default() }
    }

    /// Notes a figure, if there is one.
    pub(crate) fn set(&mut self, metric: Metric, value: Option<f64>) {
        if let Some(value) = value {
            self.figures.insert(metric, value);
        }
    }
}

/// An outcome with its place.
#[derive(Clone, Debug)]
pub(crate) struct Cell {
    /// The row's id.
    pub(crate) row: String,
    /// Who.
    pub(crate) peer: PeerKind,
    /// From 0.
    pub(crate) round: u32,
    /// What came of it, or why nothing did.
    pub(crate) outcome: Result<Outcome, String>,
}

impl Cell {
    /// One line of JSON.
    pub(crate) fn to_json(&self) -> String {
        let mut line = serde_json::Map::new();
        line.insert("row".into(), self.row.clone().into());
        line.insert("peer".into(), self.peer.to_string().into());
        line.insert("round".into(), self.round.into());
        match &self.outcome {
            Ok(outcome) => {
                for metric in Metric::ALL {
                    if let Some(&value) = outcome.figures.get(&metric) {
                        line.insert(metric.field().into(), value.into());
                    }
                }
                line.insert("failures".into(), outcome.failures.into());
                line.insert("disturbed".into(), outcome.disturbed.into());
                if let Some(scale) = outcome.scale {
                    line.insert("scale".into(), scale.into());
                }
            }
            Err(error) => drop(line.insert("error".into(), error.clone().into())),
        }
        serde_json::Value::Object(line).to_string()
    }
}

/// All cells of a run.
#[derive(Debug)]
pub(crate) struct Report {
    rounds: u32,
    cells: Vec<Cell>,
    absent: Vec<(PeerKind, Absence)>,
}

impl Report {
    /// An empty report of a run of so many rounds.
    pub(crate) fn new(rounds: u32) -> Self {
        Self { rounds, cells: Vec::new(), absent: Vec::new() }
    }

    /// Adds a cell.
    pub(crate) fn add(&mut self, cell: Cell) {
        self.cells.push(cell);
    }

    /// Notes who is not there.
    pub(crate) fn absent(&mut self, kind: PeerKind, absence: Absence) {
        self.absent.push((kind, absence));
    }

    /// Tables, verdicts and notes, in Markdown.
    pub(crate) fn render(&self, rows: &[Row]) -> String {
        let mut text = format!(
            "Medians of {} paired rounds, [lower–upper quartile]; × is kube-relay divided by the peer, paired by round.\n",
            self.rounds
        );
        text += &self.figures(rows);
        text += &self.verdicts(rows);
        text += &self.notes();
        text
    }

    fn figures(&self, rows: &[Row]) -> String {
        let mut tables: Vec<(Vec<String>, Vec<Vec<String>>)> = Vec::new();
        for row in rows {
            let columns = columns(row.work);
            let mut header = vec![String::from("row"), String::from("peer")];
            header.extend(columns.iter().map(|column| column.title.to_owned()));
            header.extend(columns.iter().filter(|column| column.compared).map(|column| format!("{} ×", column.short)));
            if tables.last().is_none_or(|(last, _)| *last != header) {
                tables.push((header, Vec::new()));
            }
            let lines = PeerKind::ALL.into_iter().filter_map(|peer| self.line(row, peer, &columns));
            if let Some((_, table)) = tables.last_mut() {
                table.extend(lines);
            }
        }
        tables.iter().filter(|(_, lines)| !lines.is_empty()).map(|(header, lines)| table(header, lines)).collect()
    }

    /// A peer's line in a row; `None` where it had no part in it.
    fn line(&self, row: &Row, peer: PeerKind, columns: &[Column]) -> Option<Vec<String>> {
        let cells: Vec<_> = self.cells_of(row, peer).collect();
        let first = cells.first()?;
        let scale = first.outcome.as_ref().ok().and_then(|outcome| outcome.scale);
        let disturbed = cells.iter().any(|cell| cell.outcome.as_ref().is_ok_and(|outcome| outcome.disturbed));
        let id = scale.filter(|scale| !row.id.ends_with(&format!("-{scale}")));
        let id = id.map_or(row.id.clone(), |scale| format!("{} ({scale} fit)", row.id));
        let mut line = vec![id, format!("{peer}{}", if disturbed { " *" } else { "" })];
        line.extend(columns.iter().map(|column| {
            let spread = Quartiles::of(self.values(row, peer, column.metric).into_values().collect());
            spread.map_or("–".into(), |spread| column.show(spread))
        }));
        line.extend(columns.iter().filter(|column| column.compared).map(|column| {
            let ratios = (peer != PeerKind::KubeRelay).then(|| self.ratios(row, column.metric, peer));
            ratios.and_then(Quartiles::of).map_or("–".into(), |ratio| format!("{:.2}", ratio.median))
        }));
        Some(line)
    }

    fn verdicts(&self, rows: &[Row]) -> String {
        let header = ["row", "measure", "target", "kube-relay", "verdict"].map(String::from);
        let lines: Vec<_> =
            rows.iter().flat_map(|row| row.targets.iter().map(|target| self.verdict(row, target))).collect();
        if lines.is_empty() { String::new() } else { table(&header, &lines) }
    }

    fn verdict(&self, row: &Row, target: &Target) -> Vec<String> {
        let columns = columns(row.work);
        let column = columns.iter().find(|column| column.metric == target.metric);
        let (title, scale) = column.map_or(("", 1.0), |column| (column.title, column.scale));
        let scale = if target.against == Against::Nobody { scale } else { 1.0 };
        let (sample, against) = match target.against {
            Against::Nobody => (self.values(row, PeerKind::KubeRelay, target.metric).into_values().collect(), None),
            Against::Best(peers) => match self.best(row, target, peers) {
                Some(peer) => (self.ratios(row, target.metric, peer), Some(peer)),
                None => (Vec::new(), peers.first().copied()),
            },
        };
        let sign = if target.side == Side::AtMost { '≤' } else { '≥' };
        let limit = |limit: f64| format!("{sign} {}", figure(limit * scale));
        let whom = against.map_or(String::new(), |peer| format!(" × {peer}"));
        let goal = target.goal.map_or(String::new(), |goal| format!(" (goal {})", limit(goal)));
        let rounds = sample.len();
        let spread = Quartiles::of(sample);
        vec![
            row.id.clone(),
            title.into(),
            format!("{}{whom}{goal}", limit(target.limit)),
            spread.map_or("–".into(), |spread| interval(spread, scale)),
            judge(spread, target, rounds).into(),
        ]
    }

    /// The peer with the best median; ties and absences aside there is one.
    fn best(&self, row: &Row, target: &Target, peers: &[PeerKind]) -> Option<PeerKind> {
        let medians = peers.iter().filter_map(|&peer| {
            let spread = Quartiles::of(self.values(row, peer, target.metric).into_values().collect())?;
            Some((peer, spread.median))
        });
        let order = |(_, a): &(PeerKind, f64), (_, b): &(PeerKind, f64)| match target.side {
            Side::AtMost => a.total_cmp(b),
            Side::AtLeast => b.total_cmp(a),
        };
        medians.min_by(order).map(|(peer, _)| peer)
    }

    fn notes(&self) -> String {
        let mut text = String::from("\n");
        if self.cells.iter().any(|cell| cell.outcome.as_ref().is_ok_and(|outcome| outcome.disturbed)) {
            text += "* disturbed in at least one round: other programs took more than 15 % of the CPUs.\n";
        }
        for (kind, absence) in &self.absent {
            let _ = writeln!(text, "absent: {kind}: {absence}");
        }
        let mut failed: BTreeMap<(PeerKind, &str, &str), u32> = BTreeMap::new();
        for cell in &self.cells {
            match &cell.outcome {
                Err(error) => *failed.entry((cell.peer, &cell.row, error)).or_default() += 1,
                Ok(outcome) if outcome.failures > 0 => {
                    *failed.entry((cell.peer, &cell.row, "some exchanges failed")).or_default() += 1;
                }
                Ok(_) => {}
            }
        }
        for ((peer, row, error), rounds) in failed {
            let _ = writeln!(text, "failed: {peer} in {row}, {rounds} of {} rounds: {error}", self.rounds);
        }
        text
    }

    fn cells_of(&self, row: &Row, peer: PeerKind) -> impl Iterator<Item = &Cell> {
        let id = row.id.clone();
        self.cells.iter().filter(move |cell| cell.row == id && cell.peer == peer)
    }

    fn values(&self, row: &Row, peer: PeerKind, metric: Metric) -> BTreeMap<u32, f64> {
        let value = |cell: &Cell| Some((cell.round, *cell.outcome.as_ref().ok()?.figures.get(&metric)?));
        self.cells_of(row, peer).filter_map(value).collect()
    }

    /// Ours divided by theirs, for each round that both have.
    fn ratios(&self, row: &Row, metric: Metric, peer: PeerKind) -> Vec<f64> {
        let ours = self.values(row, PeerKind::KubeRelay, metric);
        let theirs = self.values(row, peer, metric);
        ours.iter().filter_map(|(round, ours)| theirs.get(round).map(|theirs| ours / theirs)).collect()
    }
}

/// Met and missed by the median; level where the quartiles lie on both sides of the limit.
fn judge(spread: Option<Quartiles>, target: &Target, rounds: usize) -> &'static str {
    let Some(spread) = spread else { return "not measured" };
    if rounds < ROUNDS_FOR_A_VERDICT {
        return "too few rounds";
    }
    let holds = |value: f64| match target.side {
        Side::AtMost => value <= target.limit,
        Side::AtLeast => value >= target.limit,
    };
    match (holds(spread.lower), holds(spread.upper)) {
        (true, true) => "met",
        (false, false) => "missed",
        _ => "level",
    }
}

/// How a measure is shown in a row's table.
struct Column {
    metric: Metric,
    title: &'static str,
    /// Heads the column of ratios.
    short: &'static str,
    /// From the metric's unit to the title's.
    scale: f64,
    compared: bool,
}

impl Column {
    fn show(&self, spread: Quartiles) -> String {
        interval(spread, self.scale)
    }
}

fn columns(work: Work) -> Vec<Column> {
    let column = |metric, title, short, scale, compared| Column { metric, title, short, scale, compared };
    let exchanges = |rate, proxy_cpu, all_cpu| {
        vec![
            column(Metric::Rate, rate, "rate", 1.0, true),
            column(Metric::ProxyCpu, proxy_cpu, "CPU", 1e6, true),
            column(Metric::AllCpu, all_cpu, "all CPU", 1e6, true),
            column(Metric::LatencyMedian, "p50 µs", "p50", 1e6, false),
            column(Metric::LatencyP99, "p99 µs", "p99", 1e6, false),
        ]
    };
    match work {
        Work::Traffic(Workload::Bulk { .. }) => vec![
            column(Metric::Rate, "GB/s", "rate", 1.0, true),
            column(Metric::ProxyCpu, "CPU s/GB", "CPU", 1.0, true),
            column(Metric::AllCpu, "all CPU s/GB", "all CPU", 1.0, true),
        ],
        Work::Traffic(Workload::ShortConnections { .. }) => exchanges("conn/s", "CPU µs/conn", "all CPU µs/conn"),
        Work::Traffic(Workload::PingPong { .. }) => exchanges("req/s", "CPU µs/req", "all CPU µs/req"),
        Work::Datagrams(load) => {
            let lost = column(Metric::Lost, "lost %", "lost", 1e2, false);
            let mut columns = match load.pattern {
                Pattern::OneWay => exchanges("delivered/s", "CPU µs/datagram", "all CPU µs/datagram"),
                Pattern::LossFree => exchanges("loss-free exchanges/s", "CPU µs/exchange", "all CPU µs/exchange"),
                _ => exchanges("exchanges/s", "CPU µs/exchange", "all CPU µs/exchange"),
            };
            if load.pattern == Pattern::OneWay {
                columns.truncate(3); // nothing comes back whose time could be taken
            }
            columns.push(lost);
            columns
        }
        Work::Flows(_) => vec![
            column(Metric::FlowMemory, "bytes/flow", "bytes", 1.0, true),
            column(Metric::UserMemory, "user MB", "MB", 1e-6, false),
        ],
        Work::Idle(_) => vec![
            column(Metric::ConnectionMemory, "KiB/connection", "KiB", 1.0 / 1024.0, true),
            column(Metric::UserMemory, "user MB", "MB", 1e-6, false),
        ],
        Work::Services(_) => vec![
            column(Metric::StartUp, "start ms", "start", 1e3, false),
            column(Metric::IdleCpu, "idle CPU ms/s", "idle", 1e3, false),
            column(Metric::UserMemory, "user MB", "MB", 1e-6, false),
            column(Metric::ResidentMemory, "resident MB", "resident", 1e-6, false),
        ],
    }
}

fn interval(spread: Quartiles, scale: f64) -> String {
    let Quartiles { lower, median, upper } = spread;
    let [lower, median, upper] = [lower, median, upper].map(|value| figure(value * scale));
    if lower == upper { median } else { format!("{median} [{lower}–{upper}]") }
}

/// Three digits that count.
fn figure(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        size if size >= 0.1 || size == 0.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

/// A Markdown table with aligned columns.
fn table(header: &[String], lines: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = lines.iter().map(|line| &line[column]).chain([&header[column]]);
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..header.len()).map(width).collect();
    let line = |cells: &[String]| {
        let cells = cells.iter().zip(&widths).map(|(cell, &width)| format!(" {cell:width$} |"));
        format!("|{}\n", cells.collect::<String>())
    };
    let rule: String = widths.iter().map(|width| format!("{}|", "-".repeat(width + 2))).collect();
    format!("\n{}|{rule}\n{}", line(header), lines.iter().map(|cells| line(cells)).collect::<String>())
}
