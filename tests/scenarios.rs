//! Manifests in, plan out: each `scenarios/NAME.yaml` is checked as a user would, and its report compared
//! with `NAME.json`.
//!
//! The first comment of a scenario tells the rule and its cases; a line `# flags: …` gives the flags of
//! `check`. An expectation names what the rule is about and leaves out the rest: objects may have more
//! fields than it says, lists have exactly its entries.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

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

fn failure(scenario: &Path) -> Option<String> {
    let expected = fs::read_to_string(scenario.with_extension("json")).expect("an expectation beside each scenario");
    let expected: Value = serde_json::from_str(&expected).expect("the expectation is JSON");

    let (actual, exit) = check(scenario);

    let mut differences = Vec::new();
    compare("", &expected, &actual, &mut differences);
    let clean = actual["problems"].as_array().is_some_and(Vec::is_empty);
    if exit != Some(i32::from(!clean)) {
        differences.push(format!("exit code {exit:?}"));
    }
    let name = scenario.file_name().unwrap_or_default().to_string_lossy();
    (!differences.is_empty()).then(|| format!("{name}:\n  {}\n{actual:#}", differences.join("\n  ")))
}

/// What `kube-relay check -o json` prints, and its exit code.
fn check(scenario: &Path) -> (Value, Option<i32>) {
    let text = fs::read_to_string(scenario).expect("the scenario");
    let flags = text.lines().filter_map(|line| line.strip_prefix("# flags:")).flat_map(str::split_whitespace);
    let mut command = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
    let output = command.args(["check", "-o", "json"]).args(flags).arg(scenario).output().expect("kube-relay runs");
    let report = serde_json::from_slice(&output.stdout);
    let report = report.unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
    (report, output.status.code())
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
