//! What `examples/kubernetes/monitoring` and the README ask of `/metrics`: each name and label is there, a real Prometheus
//! scrapes it, evaluates each query and each rule, and its linter has nothing to say.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kube_relay::metrics::{Kind, METRICS};
use serde_json::Value;
use support::backend::{Backend, refusing};
use support::manifest::Manifest;
use support::program::Program;
use support::site::{SERVICE_PORT, Site};
use support::{DEADLINE, client, seen, skip};

mod support;

/// Labels that a scrape adds to what we tell.
const OF_THE_SCRAPE: [&str; 2] = ["instance", "job"];

/// What a relay with a static source and nothing but sound listeners does not tell.
const NOT_HERE: [&str; 4] = [
    "kuberelay_listener_failures",
    "kuberelay_source_connected",
    "kuberelay_source_age_seconds",
    "kubeproxy_network_programming_duration_seconds",
];

fn text(file: &str) -> String {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), file].iter().collect();
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// One expression, and where it is from.
struct Query {
    place: String,
    expression: String,
}

/// Those of the dashboard, of the rules and of the README, as Prometheus gets them.
fn queries() -> Vec<Query> {
    let dashboard: Value = serde_json::from_str(&text("examples/kubernetes/monitoring/dashboard.json")).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels").iter();
    let of_dashboard = panels.flat_map(|panel| {
        let targets = panel["targets"].as_array().into_iter().flatten();
        targets.map(|target| query(&panel["title"], &target["expr"])).collect::<Vec<_>>()
    });
    let groups = rules()["groups"].as_array().expect("groups").clone();
    let rules = groups.into_iter().flat_map(|group| group["rules"].as_array().expect("rules").clone());
    let of_rules = rules.map(|rule| query(&rule["alert"], &rule["expr"]));
    of_dashboard.chain(of_rules).chain(of_readme()).collect()
}

fn query(place: &Value, expression: &Value) -> Query {
    let [place, expression] = [place, expression].map(|text| text.as_str().expect("a text").to_owned());
    let expression = expression.replace("$__rate_interval", "1m").replace("$namespace", ".*").replace("$service", ".*");
    Query { place, expression }
}

/// Each question of the README with its query below it.
fn of_readme() -> Vec<Query> {
    let readme = text("README.md");
    let blocks = readme.split("```promql\n").skip(1).filter_map(|rest| rest.split_once("```")).map(|(block, _)| block);
    let mut queries = Vec::new();
    for block in blocks {
        for part in block.split("\n\n") {
            let (comments, lines): (Vec<_>, Vec<_>) = part.lines().partition(|line| line.starts_with('#'));
            queries.push(Query { place: comments.join(" "), expression: lines.join("\n") });
        }
    }
    queries
}

/// What the operator hands to Prometheus.
fn rules() -> Value {
    let rule: Value =
        serde_saphyr::from_str(&text("examples/kubernetes/monitoring/prometheus-rule.yaml")).expect("YAML");
    assert_eq!(
        (rule["kind"].as_str(), rule["apiVersion"].as_str()),
        (Some("PrometheusRule"), Some("monitoring.coreos.com/v1"))
    );
    rule["spec"].clone()
}

/// A metric that an expression names, with the labels in its braces.
struct Named {
    metric: String,
    labels: Vec<String>,
}

/// All words of an expression with a prefix of ours, and what their selectors ask for.
fn named(expression: &str) -> Vec<Named> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut all = Vec::new();
    let mut rest = expression;
    while let Some(start) = rest.find(is_word) {
        rest = &rest[start..];
        let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        let (word, tail) = rest.split_at(end);
        rest = tail;
        if ["kuberelay_", "kubeproxy_", "process_"].iter().any(|prefix| word.starts_with(prefix)) {
            let selector = tail.strip_prefix('{').and_then(|tail| tail.split_once('}')).map_or("", |(inner, _)| inner);
            let matchers = selector.split("\",").filter(|matcher| !matcher.is_empty());
            let label = |matcher: &str| matcher.trim().split(|c| !is_word(c)).next().unwrap_or_default().to_owned();
            all.push(Named { metric: word.to_owned(), labels: matchers.map(label).collect() });
        }
    }
    all
}

/// The labels that an expression groups or joins by.
fn grouped(expression: &str) -> BTreeSet<String> {
    let mut labels = BTreeSet::new();
    for word in ["by (", "on (", "without (", "ignoring ("] {
        let lists = expression.split(word).skip(1).filter_map(|rest| rest.split_once(')'));
        labels.extend(lists.flat_map(|(list, _)| list.split(',').map(|label| label.trim().to_owned())));
    }
    labels
}

/// The row of the table for a series: of a histogram, without the suffix.
fn metric(series: &str) -> Option<&'static kube_relay::metrics::Metric> {
    METRICS.iter().find(|metric| match metric.kind {
        Kind::Histogram => {
            series.strip_prefix(metric.name).is_some_and(|suffix| ["_bucket", "_sum", "_count"].contains(&suffix))
        }
        Kind::Counter | Kind::Gauge | Kind::Untyped => series == metric.name,
    })
}

/// A second way in.
fn exposed(site: Site) -> SocketAddr {
    SocketAddr::new(site.client(7), SERVICE_PORT)
}

/// A relay that has met all that can happen to one Service: two backends answer, one refuses, and clients were turned away.
struct Stage {
    program: Program,
    admin: SocketAddr,
    site: Site,
    _backends: [Backend; 2],
}

impl Stage {
    async fn open(site: Site) -> Self {
        let _backends = [Backend::named(site.backend(1)).await, Backend::named(site.backend(2)).await];
        let _nobody = refusing(site.backend(3));
        let web = Manifest::new(site).tcp().udp().sticky(60);
        let web = web.endpoints([site.backend(1), site.backend(2), site.backend(3)]);
        let expose = format!("{}=default/web:on-tcp", exposed(site));
        let also = |command: &mut Command| {
            command.args(["--expose", &expose]);
        };
        let program = Program::start(site, web, also).await;
        let stage = Self { program, admin: SocketAddr::new(site.client(9), 10249), site, _backends };
        stage.visit().await;
        stage
    }

    async fn visit(&self) {
        for address in [self.site.service(), exposed(self.site)] {
            for number in 1..=6 {
                // Each from an address of its own, as the Service is sticky.
                let from = SocketAddr::new(self.site.client(number), 0);
                let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
                socket.bind(from).expect("loopback is ours");
                let mut stream = socket.connect(address).await.expect("the Service answers");
                client::ask_on(&mut stream).await.expect("a backend answers");
            }
        }
    }

    fn metrics(&self) -> String {
        seen::page(self.admin, "/metrics").expect("it answers")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_each_query_when_read_then_its_metrics_and_labels_are_at_metrics() {
    let stage = Stage::open(Site::new(1)).await;
    let page = stage.metrics();

    let queries = queries();

    assert!(queries.len() > 35, "only {} queries were found", queries.len());
    for Query { place, expression } in queries {
        let series = named(&expression);
        assert!(!series.is_empty(), "{place}: no metric of ours in {expression}");
        let mut known = BTreeSet::from(OF_THE_SCRAPE.map(str::to_owned));
        for Named { metric: name, labels } in series {
            let metric = metric(&name).unwrap_or_else(|| panic!("{place}: there is no metric {name}"));
            known.extend(metric.labels.iter().map(ToString::to_string));
            known.extend((metric.kind == Kind::Histogram).then(|| "le".to_owned()));
            for label in labels {
                assert!(known.contains(&label), "{place}: {name} has no label {label}");
            }
            let is_told = page.contains(&format!("# TYPE {} ", metric.name));
            let may_lack = NOT_HERE.contains(&metric.name) || is_an_event(metric.name);
            assert!(is_told || may_lack, "{place}: {} is not at /metrics", metric.name);
        }
        for label in grouped(&expression) {
            assert!(known.contains(&label), "{place}: nothing has the label {label} in {expression}");
        }
    }
}

/// Series with a reason begin with their first event, and UDP has its own.
fn is_an_event(metric: &str) -> bool {
    ["kuberelay_service_dropped_total", "kuberelay_closed_total"].contains(&metric)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_the_page_of_a_relay_when_promtool_reads_it_then_it_has_nothing_to_say() {
    let stage = Stage::open(Site::new(2)).await;
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let Ok(mut promtool) = promtool.spawn() else { return skip("promtool", "not installed") };

    let mut stdin = promtool.stdin.take().expect("standard input is a pipe");
    stdin.write_all(stage.metrics().as_bytes()).expect("promtool reads");
    drop(stdin);
    let output = promtool.wait_with_output().expect("promtool ends");

    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
}

#[test]
fn given_the_alerts_when_promtool_reads_them_then_they_are_rules() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let file = folder.path().join("rules.yml");
    fs::write(&file, rules().to_string()).expect("the test's folder can be written");

    let Ok(output) = Command::new("promtool").args(["check", "rules"]).arg(&file).output() else {
        return skip("promtool", "not installed");
    };

    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains(" rules found"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let alerts = rules()["groups"][0]["rules"].as_array().map(Vec::len);
    assert!(alerts.is_some_and(|count| count >= 4 && said.contains(&format!("{count} rules found"))), "{said}");
}

#[test]
fn given_the_alerts_when_promtool_plays_what_happens_then_each_fires_in_its_time_and_none_at_a_restart() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    fs::write(folder.path().join("rules.yml"), rules().to_string()).expect("the test's folder can be written");
    let plays = folder.path().join("plays.yml");
    fs::write(&plays, text("tests/monitoring/alerts.yaml")).expect("the test's folder can be written");

    let Ok(output) = Command::new("promtool").args(["test", "rules"]).arg(&plays).output() else {
        return skip("promtool", "not installed");
    };

    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
    let played = text("tests/monitoring/alerts.yaml");
    for rule in rules()["groups"][0]["rules"].as_array().expect("rules") {
        let alert = rule["alert"].as_str().expect("a name");
        assert!(played.contains(&format!("alertname=\"{alert}\"")), "{alert} is never made to fire");
    }
}

/// Units of Grafana that we use, by what they are put at.
const UNITS: [&str; 6] = ["short", "ops", "Bps", "percentunit", "s", "bytes"];

fn dashboard() -> Value {
    serde_json::from_str(&text("examples/kubernetes/monitoring/dashboard.json")).expect("JSON")
}

/// Where a panel is, in columns and rows of the grid.
struct Area {
    title: String,
    columns: std::ops::Range<u64>,
    rows: std::ops::Range<u64>,
}

impl Area {
    fn of(panel: &Value) -> Self {
        let number = |name: &str| panel["gridPos"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {panel}"));
        let [x, y, width, height] = ["x", "y", "w", "h"].map(number);
        assert!(width > 0 && height > 0, "{panel}");
        Self { title: panel["title"].to_string(), columns: x..x + width, rows: y..y + height }
    }

    fn overlaps(&self, other: &Self) -> bool {
        let meets = |a: &std::ops::Range<u64>, b: &std::ops::Range<u64>| a.start < b.end && b.start < a.end;
        meets(&self.columns, &other.columns) && meets(&self.rows, &other.rows)
    }
}

#[test]
fn given_the_dashboard_when_laid_out_then_each_panel_has_a_number_and_a_place_of_its_own() {
    let dashboard = dashboard();
    assert!(dashboard["uid"].as_str().is_some_and(|uid| !uid.is_empty() && uid.len() <= 40));
    assert!(dashboard.get("id").is_none(), "Grafana gives that");
    // 39 is that of Grafana 10.4; newer ones bring it up to theirs as they load it.
    assert!(dashboard["schemaVersion"].as_u64().is_some_and(|version| (39..=42).contains(&version)));

    let panels = dashboard["panels"].as_array().expect("panels");

    let numbers: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().expect("a number")).collect();
    assert_eq!(numbers.len(), panels.len(), "two panels have one number");
    let areas: Vec<_> = panels.iter().map(Area::of).collect();
    for (number, area) in areas.iter().enumerate() {
        assert!(area.columns.end <= 24, "{} is wider than the grid", area.title);
        for other in &areas[number + 1..] {
            assert!(!area.overlaps(other), "{} is over {}", area.title, other.title);
        }
    }
}

#[test]
fn given_the_dashboard_when_read_then_each_panel_asks_the_chosen_source_and_says_what_its_numbers_are() {
    let dashboard = dashboard();
    let source = serde_json::json!({ "type": "prometheus", "uid": "${datasource}" });
    let variables = dashboard["templating"]["list"].as_array().expect("variables");
    let chosen = variables.iter().find(|variable| variable["name"] == "datasource").expect("a source to choose");
    assert_eq!((chosen["type"].as_str(), chosen["query"].as_str()), (Some("datasource"), Some("prometheus")));
    for variable in variables.iter().filter(|variable| variable["type"] == "query") {
        assert_eq!(variable["datasource"], source, "{variable}");
        assert!(variable["query"].as_str().is_some_and(|query| query.starts_with("label_values(kuberelay_")));
    }

    for panel in dashboard["panels"].as_array().expect("panels") {
        let kind = panel["type"].as_str().expect("a type");
        if kind == "row" {
            assert_eq!(
                (&panel["collapsed"], &panel["panels"]),
                (&Value::Bool(false), &Value::Array(vec![])),
                "{panel}"
            );
            continue;
        }
        assert!(["stat", "timeseries"].contains(&kind), "{panel}");
        assert_eq!(panel["datasource"], source, "{panel}");
        let unit = panel["fieldConfig"]["defaults"]["unit"].as_str().expect("a unit");
        assert!(UNITS.contains(&unit), "{unit} of {panel}");
        let targets = panel["targets"].as_array().expect("queries");
        let names: BTreeSet<_> = targets.iter().map(|target| target["refId"].as_str().expect("a name")).collect();
        assert!(!targets.is_empty() && names.len() == targets.len(), "{panel}");
        for target in targets {
            assert_eq!(target["datasource"], source, "{panel}");
            assert_legend_is_known(target);
            assert_variables_are_known(target["expr"].as_str().expect("a query"), variables);
        }
    }
}

/// What Grafana's model of a dashboard has of what we say: it passes over a word that it does not know, and says nothing.
const WORDS_OF_A_DASHBOARD: [&str; 12] = [
    "title",
    "description",
    "uid",
    "tags",
    "schemaVersion",
    "version",
    "editable",
    "graphTooltip",
    "time",
    "refresh",
    "templating",
    "panels",
];
const WORDS_OF_A_PANEL: [&str; 11] = [
    "id",
    "type",
    "title",
    "description",
    "datasource",
    "gridPos",
    "fieldConfig",
    "targets",
    "options",
    "collapsed",
    "panels",
];
const WORDS_OF_A_TARGET: [&str; 4] = ["refId", "datasource", "expr", "legendFormat"];
const WORDS_OF_A_VARIABLE: [&str; 12] = [
    "name",
    "type",
    "label",
    "query",
    "datasource",
    "includeAll",
    "multi",
    "allValue",
    "current",
    "refresh",
    "sort",
    "regex",
];

fn assert_words_are_known(of: &Value, known: &[&str]) {
    let unknown: Vec<_> = of.as_object().expect("an object").keys().filter(|word| !known.contains(&&***word)).collect();
    assert!(unknown.is_empty(), "{unknown:?} of {of}");
}

#[test]
fn given_the_dashboard_when_read_by_the_model_of_grafana_then_it_has_each_word() {
    let dashboard = dashboard();
    assert_words_are_known(&dashboard, &WORDS_OF_A_DASHBOARD);
    assert!(dashboard["title"].as_str().is_some_and(|title| !title.is_empty()));
    assert!(dashboard["graphTooltip"].as_u64().is_some_and(|sharing| sharing <= 2));

    for panel in dashboard["panels"].as_array().expect("panels") {
        assert_words_are_known(panel, &WORDS_OF_A_PANEL);
        assert!(panel["title"].as_str().is_some_and(|title| !title.is_empty()), "{panel}");
        for target in panel["targets"].as_array().into_iter().flatten() {
            assert_words_are_known(target, &WORDS_OF_A_TARGET);
            let name = target["refId"].as_str().expect("a name");
            assert!(name.len() == 1 && name.chars().all(|letter| letter.is_ascii_uppercase()), "{name} of {panel}");
        }
        if panel["type"] == "stat" {
            assert_eq!(panel["options"]["reduceOptions"]["calcs"], serde_json::json!(["lastNotNull"]), "{panel}");
        }
        let thresholds = &panel["fieldConfig"]["defaults"]["thresholds"];
        if let Some(steps) = thresholds["steps"].as_array() {
            assert_eq!(thresholds["mode"], "absolute", "{panel}");
            let values: Vec<_> = steps.iter().map(|step| step["value"].as_f64()).collect();
            assert!(
                values[0].is_none() && values[1..].iter().all(Option::is_some),
                "the first one is the base: {panel}"
            );
            assert!(values.is_sorted_by(|one, next| one < next), "{panel}");
        }
    }
}

/// Grafana moves a panel up into an empty place, and what is under a row goes with it.
#[test]
fn given_the_dashboard_when_laid_out_then_nothing_moves_as_it_is_loaded() {
    let dashboard = dashboard();
    let panels = dashboard["panels"].as_array().expect("panels");
    let areas: Vec<_> = panels.iter().map(Area::of).collect();

    assert_eq!(panels[0]["type"], "row");
    for (number, (panel, area)) in panels.iter().zip(&areas).enumerate() {
        if panel["type"] == "row" {
            assert_eq!((&area.columns, area.rows.end - area.rows.start), (&(0..24), 1), "{panel}");
        }
        let before = &areas[..number];
        assert!(before.iter().all(|other| other.rows.start <= area.rows.start), "{} is told too late", area.title);
        let rests = |other: &Area| {
            let below = Area { title: String::new(), columns: area.columns.clone(), rows: other.rows.clone() };
            other.overlaps(&below) && other.rows.end == area.rows.start
        };
        assert!(area.rows.start == 0 || before.iter().any(rests), "{} has nothing above it", area.title);
    }
}

#[test]
fn given_the_variables_of_the_dashboard_when_read_then_each_is_asked_after_those_it_needs_and_fits_many_values() {
    let dashboard = dashboard();
    let variables = dashboard["templating"]["list"].as_array().expect("variables");
    assert_eq!(variables[0]["type"], "datasource", "the others are asked of it");

    for (number, variable) in variables.iter().enumerate() {
        assert_words_are_known(variable, &WORDS_OF_A_VARIABLE);
        let name = variable["name"].as_str().expect("a name");
        assert!(variables[..number].iter().all(|other| other["name"] != name), "{name} is there twice");
        if variable["type"] == "query" {
            let query = variable["query"].as_str().expect("a query");
            assert_variables_are_known(query, &variables[..number]);
            let (_, label) = query.trim_end_matches(')').rsplit_once(", ").expect("label_values(metric, label)");
            let named = named(query);
            let metric = metric(&named[0].metric).unwrap_or_else(|| panic!("there is no metric of {query}"));
            assert!(metric.labels.contains(&label), "{query}: {} has no label {label}", metric.name);
            assert!(variable["refresh"].as_u64().is_some_and(|when| (1..=2).contains(&when)), "{name} is never asked");
            let all =
                [&variable["includeAll"], &variable["multi"], &variable["allValue"], &variable["current"]["value"]];
            assert_eq!(serde_json::json!(all), serde_json::json!([true, true, ".*", "$__all"]), "{name}");
        }
    }
    let targets =
        dashboard["panels"].as_array().expect("panels").iter().filter_map(|panel| panel["targets"].as_array());
    let expressions = targets.flatten().map(|target| target["expr"].as_str().expect("a query"));
    let queries = variables.iter().filter(|one| one["type"] == "query").filter_map(|one| one["query"].as_str());
    for expression in expressions.chain(queries) {
        for variable in ["$namespace", "$service"] {
            for (before, _) in expression.match_indices(variable) {
                assert!(expression[..before].ends_with("=~\""), "{variable} may be many: {expression}");
            }
        }
    }
}

/// A label that the query does not leave is an empty place in the legend.
fn assert_legend_is_known(target: &Value) {
    let [expression, legend] = ["expr", "legendFormat"].map(|name| target[name].as_str().expect("a text"));
    let sums: Vec<_> = expression.split(" by (").skip(1).filter_map(|rest| rest.split_once(')')).collect();
    let left: BTreeSet<_> = match sums.last() {
        Some((list, _)) => list.split(',').map(|label| label.trim().to_owned()).collect(),
        None if expression.starts_with("sum(") => BTreeSet::new(),
        None => OF_THE_SCRAPE.map(str::to_owned).into(),
    };
    for label in legend.split("{{").skip(1).filter_map(|rest| rest.split_once("}}")).map(|(label, _)| label) {
        let first = sums.first().is_some_and(|(list, _)| list.split(',').any(|it| it.trim() == label));
        assert!(first || left.contains(label), "{label} of {legend} is not left by {expression}");
    }
}

fn assert_variables_are_known(expression: &str, variables: &[Value]) {
    for rest in expression.split('$').skip(1) {
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let name = &rest[..end];
        let is_ours = variables.iter().any(|variable| variable["name"] == name);
        assert!(is_ours || name == "__rate_interval", "nobody sets ${name} of {expression}");
    }
}

/// A Prometheus with the configuration of the examples, on an address of the test's own, in more of a hurry.
struct Prometheus {
    child: Child,
    address: SocketAddr,
    _folder: tempfile::TempDir,
}

impl Prometheus {
    /// `None`, with the reason printed, where there is none.
    fn start(site: Site, relay: SocketAddr) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let example = text("examples/kubernetes/monitoring/prometheus-local.yaml");
        let mut config = example.replace("127.0.0.1:10249", &relay.to_string());
        config = config.replace("_interval: 5s", "_interval: 300ms");
        assert!(config.contains(&relay.to_string()) && config.contains("scrape_interval: 300ms"), "{config}");
        let (config_file, rule_file) = (folder.path().join("prometheus.yml"), folder.path().join("rules.yml"));
        writeln!(config, "rule_files: [{}]", rule_file.display()).expect("a text takes it");
        fs::write(&config_file, config).expect("the test's folder can be written");
        fs::write(&rule_file, rules().to_string()).expect("the test's folder can be written");
        let address = SocketAddr::new(site.client(8), 9090);
        let mut command = Command::new("prometheus");
        command.arg(format!("--config.file={}", config_file.display()));
        command.arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()));
        command.arg(format!("--web.listen-address={address}"));
        match command.current_dir(folder.path()).stdout(Stdio::null()).stderr(Stdio::null()).spawn() {
            Ok(child) => Some(Self { child, address, _folder: folder }),
            Err(_) => {
                skip("prometheus", "not installed");
                None
            }
        }
    }

    fn get(&self, path: &str) -> io::Result<Value> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {}\r\n\r\n", self.address)?; // An answer of 1.1 comes in chunks.
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        serde_json::from_str(body).map_err(|error| io::Error::other(format!("{error}: {answer}")))
    }

    /// What a query gives: how many series.
    fn ask(&self, expression: &str) -> io::Result<usize> {
        let mut path = "/api/v1/query?query=".to_owned();
        expression.bytes().for_each(|byte| write!(path, "%{byte:02X}").expect("a text takes it"));
        let answer = self.get(&path)?;
        match answer["data"]["result"].as_array() {
            Some(series) if answer["status"] == "success" => Ok(series.len()),
            _ => Err(io::Error::other(answer.to_string())),
        }
    }

    async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !condition(self) {
            assert!(Instant::now() < deadline, "waited {DEADLINE:?} for {what}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill(); // It may have ended by itself.
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_real_prometheus_when_it_scrapes_a_relay_then_each_query_and_each_rule_can_be_evaluated() {
    let site = Site::new(3);
    let stage = Stage::open(site).await;
    let Some(prometheus) = Prometheus::start(site, stage.admin) else { return };
    prometheus.until("the first scrape", |it| it.ask("kuberelay_connections_total").is_ok_and(|count| count > 0)).await;
    stage.visit().await;
    prometheus
        .until("a rate", |it| it.ask("sum(rate(kuberelay_connections_total[1m])) > 0").is_ok_and(|count| count == 1))
        .await;

    for Query { place, expression } in queries() {
        let count = prometheus.ask(&expression).unwrap_or_else(|error| panic!("{place}: {expression}: {error}"));
        // Alerts are silent where all is well, and some of what is asked for is not here.
        let of_what_is_here = named(&expression).iter().all(|series| {
            let name = metric(&series.metric).map_or("", |metric| metric.name);
            !NOT_HERE.contains(&name) && !is_an_event(name) && !name.contains("flows")
        });
        let is_alert = place.starts_with("KubeRelay");
        assert!(count > 0 || is_alert || !of_what_is_here, "{place}: nothing comes of {expression}");
    }
    let rules = |it: &Prometheus| it.get("/api/v1/rules").expect("it answers")["data"]["groups"][0]["rules"].clone();
    let evaluated =
        |it: &Prometheus| rules(it).as_array().is_some_and(|all| all.iter().all(|rule| rule["health"] != "unknown"));
    prometheus.until("each rule to be evaluated", evaluated).await;
    for rule in rules(&prometheus).as_array().expect("rules") {
        assert_eq!((rule["health"].as_str(), rule.get("lastError")), (Some("ok"), None), "{rule}");
    }
    let page = stage.program.page("/metrics").expect("it still answers");
    assert!(page.contains("kuberelay_build_info"));
}
