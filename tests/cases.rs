//! Which of the numbered cases of Service semantics have a test.
//!
//! A test says which cases it covers by its name (`t029_given_…`), a scenario by its first comment
//! (`(T029 T030)`). What has none yet stands in [`TO_COME`], with the issue that brings it and the reason.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The cases of what a proxy owes a Service: intake, slices, selection, verdicts, balancing and affinity; then of TCP and of
/// UDP on the way; then of who asks for its health, of the node's addresses, of sources, and of the process.
const CASES: std::ops::RangeInclusive<u16> = 1..=237;

/// Cases without a test, the issue that brings it, and why it is not here.
const TO_COME: &[(u16, u16, &str)] = &[
    (126, 11, "what the backend sees as its client belongs to the ways to keep it"),
    (150, 12, "state that is handed over belongs to the upgrade"),
    (234, 12, "sockets that change hands are the upgrade"),
];

#[test]
fn given_all_cases_when_looked_for_then_each_has_a_test_or_an_issue_that_brings_it() {
    let tested = tested();
    let promised: BTreeSet<u16> = TO_COME.iter().map(|(case, ..)| *case).collect();

    let missing: Vec<_> = CASES.filter(|case| !tested.contains(case) && !promised.contains(case)).map(name).collect();
    let kept: Vec<_> = promised.intersection(&tested).copied().map(name).collect();

    for (case, issue, why) in TO_COME {
        println!("{} comes with issue {issue}: {why}", name(*case));
    }
    assert!(missing.is_empty(), "no test and no issue: {}", missing.join(" "));
    assert!(kept.is_empty(), "these have a test now, take them out of TO_COME: {}", kept.join(" "));
}

fn name(case: u16) -> String {
    format!("T{case:03}")
}

fn tested() -> BTreeSet<u16> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = ["src", "tests"].into_iter().flat_map(|folder| files(&root.join(folder)));
    sources.flat_map(|path| cases_in(&path)).collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder of the sources").flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

fn cases_in(path: &Path) -> Vec<u16> {
    let read = || fs::read_to_string(path).expect("a text file");
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("rs") => read().lines().flat_map(cases_of_function).collect(),
        Some("yaml") => read().lines().filter(|line| line.starts_with('#')).flat_map(cases_of_comment).collect(),
        _ => vec![],
    }
}

/// `fn t009_t010_given_…` covers two.
fn cases_of_function(line: &str) -> Vec<u16> {
    let Some((_, name)) = line.split_once("fn ") else { return vec![] };
    name.split('_').take_while(|word| *word != "given").filter_map(|word| number(word, 't')).collect()
}

/// `(T009 T010)` covers two.
fn cases_of_comment(line: &str) -> Vec<u16> {
    line.split(|letter: char| !letter.is_ascii_alphanumeric()).filter_map(|word| number(word, 'T')).collect()
}

fn number(word: &str, letter: char) -> Option<u16> {
    let digits = word.strip_prefix(letter)?;
    (digits.len() == 3).then(|| digits.parse().ok())?
}

#[test]
fn given_names_of_tests_and_comments_when_read_then_their_cases_are_found() {
    assert_eq!(cases_of_function("    fn t009_t010_given_t3_cases_when_x_then_t011_y() {"), [9, 10]);
    assert_eq!(cases_of_function("    async fn f20_t228_given_a_file() {"), [228]);
    assert_eq!(cases_of_function("    fn given_nothing() {"), [] as [u16; 0]);
    assert_eq!(cases_of_comment("# It is so. (T086 T093)"), [86, 93]);
}
