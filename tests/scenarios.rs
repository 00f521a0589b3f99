//! Manifests in, plan out: each `scenarios/NAME.yaml` is checked as a user would, and its report compared
//! with `NAME.json`.
//!
//! The first comment of a scenario tells the rule and its cases; a line `# flags: …` gives the flags of
//! `check`. An expectation names what the rule is about and leaves out the rest: objects may have more
//! fields than it says, lists have exactly its entries.
//!
//! A line `--- # event: WHAT HAPPENS` begins a change: the objects behind it come, or take the place of
//! those of their kind and name; `# delete: KIND NAME` takes one away. Each event has an entry under
//! `events` in the expectation: the report of the state that it leads to and, as `steps`, what a running
//! relay does to get there. Whatever the history, its report is the one that `check` prints for the state.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Parser;
use kube_relay::cli::{self, Cli};
use kube_relay::config::CheckConfig;
use kube_relay::decode::decode;
use kube_relay::host::Host;
use kube_relay::model::{Event, Model};
use kube_relay::plan::{Plan, PlanOptions, Step};
use kube_relay::status::Report;
use kube_relay::{allocate::Ranges, manifest};
use serde_json::{Value, json};

#[test]
fn given_each_scenario_when_checked_then_the_plan_is_the_expected_one() {
    let scenarios = scenarios();
    assert!(!scenarios.is_empty(), "no scenarios found");

    let failures: Vec<String> = scenarios.iter().filter_map(|scenario| failure(scenario)).collect();

    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn scenarios() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let entries = fs::read_dir(&folder).expect("the folder of scenarios").flatten().map(|entry| entry.path());
    let mut found: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|extension| extension == "yaml")).collect();
    found.sort();
    found
}

fn failure(path: &Path) -> Option<String> {
    let expected = fs::read_to_string(path.with_extension("json")).expect("an expectation beside each scenario");
    let expected: Value = serde_json::from_str(&expected).expect("the expectation is JSON");
    let scenario = Scenario::read(path);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("state.yaml");
    let mut differences = Vec::new();

    let mut state = scenario.state;
    let mut relay = Relay::new(&scenario.flags, &file);
    let mut actual = relay.reach(&state, "", &scenario.flags, &mut differences);
    let changes = scenario.events.iter().enumerate().map(|(index, event)| {
        event.happen(&mut state);
        let mut report = relay.reach(&state, &format!(".events[{index}]"), &scenario.flags, &mut differences);
        report["event"] = json!(event.title);
        report
    });
    actual["events"] = changes.collect();

    compare("", &expected, &actual, &mut differences);
    if scenario.events.len() != expected["events"].as_array().map_or(0, Vec::len) {
        differences.push("not as many events as expected".into());
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    (!differences.is_empty()).then(|| format!("{name}:\n  {}\n{actual:#}", differences.join("\n  ")))
}

/// A scenario file.
struct Scenario {
    flags: Vec<String>,
    state: State,
    events: Vec<Change>,
}

/// Objects by kind and name, as they are written; in the order in which they came.
type State = Vec<(String, String)>;

/// What is different from an event on.
struct Change {
    title: String,
    objects: State,
    deleted: Vec<String>,
}

impl Scenario {
    fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).expect("the scenario");
        let flags = text.lines().filter_map(|line| line.strip_prefix("# flags:")).flat_map(str::split_whitespace);
        let flags = flags.map(str::to_owned).collect();
        let mut parts = text.split("--- # event:");
        let state = objects(parts.next().unwrap_or_default());
        Self { flags, state, events: parts.map(Change::read).collect() }
    }
}

impl Change {
    fn read(text: &str) -> Self {
        let (title, rest) = text.split_once('\n').expect("a title, and then what changes");
        let deleted = rest.lines().filter_map(|line| line.strip_prefix("# delete: ")).map(str::to_owned).collect();
        Self { title: title.trim().into(), objects: objects(rest), deleted }
    }

    fn happen(&self, state: &mut State) {
        for label in &self.deleted {
            let place = state.iter().position(|(known, _)| known == label).expect("what is deleted is there");
            state.remove(place);
        }
        for (label, text) in &self.objects {
            match state.iter_mut().find(|(known, _)| known == label) {
                Some((_, known)) => known.clone_from(text),
                None => state.push((label.clone(), text.clone())),
            }
        }
    }
}

/// The documents that hold an object, each with its kind and name; what cannot be read goes by its text.
fn objects(text: &str) -> State {
    let lines: Vec<&str> = text.lines().collect();
    let documents = lines.split(|line| *line == "---").map(|lines| lines.join("\n") + "\n");
    let documents =
        documents.filter(|document| document.lines().any(|line| !line.starts_with('#') && !line.is_empty()));
    let labelled = documents.map(|document| {
        let label = decode(document.as_bytes(), "").objects.first().map(|entry| entry.label());
        (label.unwrap_or_else(|| document.clone()), document)
    });
    labelled.collect()
}

/// What a relay would do that reads the file of a scenario's state, again after each event.
struct Relay {
    file: PathBuf,
    options: PlanOptions,
    ranges: Ranges,
    model: Model,
    plan: Plan,
}

impl Relay {
    fn new(flags: &[String], file: &Path) -> Self {
        let words = ["kube-relay", "check"].into_iter().chain(flags.iter().map(String::as_str));
        let cli = Cli::try_parse_from(words.chain(file.to_str())).expect("flags that `check` knows");
        let cli::Command::Check(arguments) = cli.command else { unreachable!("the command is `check`") };
        let config = CheckConfig::try_from(*arguments).expect("flags that fit together");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let host = runtime.block_on(Host::read()).unwrap_or_else(|_| Host::loopback_only());
        let (options, ranges) = (config.plan.resolve(&host), config.plan.ranges());
        Self { file: file.to_owned(), options, ranges, model: Model::default(), plan: Plan::default() }
    }

    /// The report of a state, with the steps to it. It has to be what `check` says.
    fn reach(&mut self, state: &State, path: &str, flags: &[String], differences: &mut Vec<String>) -> Value {
        let documents: Vec<&str> = state.iter().map(|(_, text)| text.as_str()).collect();
        fs::write(&self.file, documents.join("---\n")).expect("a file");

        let (report, steps) = self.follow();
        let (checked, exit) = self.check(flags);

        if report != checked {
            differences.push(format!("{path}: live, the report is another one than that of `check`: {report:#}"));
        }
        let clean = checked["problems"].as_array().is_some_and(Vec::is_empty);
        if exit != Some(i32::from(!clean)) {
            differences.push(format!("{path}: exit code {exit:?}"));
        }
        let mut reached = checked;
        reached["steps"] = json!(steps);
        reached
    }

    fn follow(&mut self) -> (Value, Vec<String>) {
        let mut reading = manifest::read(vec![manifest::Input::Path(self.file.clone())], self.ranges.clone());
        let (objects, found) = (std::mem::take(&mut reading.objects), std::mem::take(&mut reading.problems));
        let mut dirty = BTreeSet::new();
        self.model.apply(Event::Replace(objects), &mut dirty);
        let steps = self.plan.update(&self.model, &dirty, &self.options);
        let mut report = Report::of(&self.model, &self.plan, found);
        report.problems.iter_mut().chain(&mut report.notes).for_each(|problem| reading.locate(problem));
        (json!(report), steps.iter().map(in_words).collect())
    }

    /// What `kube-relay check -o json` prints, and its exit code.
    fn check(&self, flags: &[String]) -> (Value, Option<i32>) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
        let output = command.args(["check", "-o", "json"]).args(flags).arg(&self.file).output();
        let output = output.expect("kube-relay runs");
        let report = serde_json::from_slice(&output.stdout);
        let report = report.unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
        (report, output.status.code())
    }
}

fn in_words(step: &Step) -> String {
    match step {
        Step::Swap(key, _) => format!("swap {key}"),
        Step::Point(key, _) => format!("point {key}"),
        Step::Revive(key, _) => format!("revive {key}"),
        Step::Unbind(key) => format!("unbind {key}"),
        Step::Bind(key, _) => format!("bind {key}"),
        Step::Park(key, _) => format!("park {key}"),
        Step::Retire(key) => format!("retire {key}"),
    }
}

/// Notes where `actual` is not what `expected` says.
fn compare(path: &str, expected: &Value, actual: &Value, differences: &mut Vec<String>) {
    match (expected, actual) {
        (Value::Object(expected), Value::Object(actual)) => {
            for (field, value) in expected {
                let path = format!("{path}.{field}");
                compare(&path, value, actual.get(field).unwrap_or(&Value::Null), differences);
            }
        }
        (Value::Array(expected), Value::Array(actual)) if expected.len() == actual.len() => {
            for (index, (expected, actual)) in expected.iter().zip(actual).enumerate() {
                compare(&format!("{path}[{index}]"), expected, actual, differences);
            }
        }
        _ if expected == actual => {}
        _ => differences.push(format!("{path}: expected {expected}, got {actual}")),
    }
}
