//! Which of the numbered cases of Service semantics, and which of the numbered faults, have a test.
//!
//! A test says which it covers by its name (`t029_given_…`, `f07_t161_given_…`), a scenario by its first comment
//! (`(T029 T030)`). What has none yet stands in [`TO_COME`] or [`FAULTS_TO_COME`], with the issue that brings it and the
//! reason.

use std::collections::BTreeSet;
use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// The cases of what a proxy owes a Service: intake, slices, selection, verdicts, balancing and affinity; then of TCP and of
/// UDP on the way; then of who asks for its health, of the node's addresses, of sources, and of the process.
const CASES: RangeInclusive<u16> = 1..=237;
/// What a proxy has to outlast: of the API server, endpoints, backends, clients, the machine's means, its own end.
const FAULTS: RangeInclusive<u16> = 1..=36;

/// Cases without a test, the issue that brings it, and why it is not here.
const TO_COME: &[(u16, u16, &str)] = &[
    (126, 11, "what the backend sees as its client belongs to the ways to keep it"),
    (150, 12, "state that is handed over belongs to the upgrade"),
    (234, 12, "sockets that change hands are the upgrade"),
];

/// The same for faults.
const FAULTS_TO_COME: &[(u16, u16, &str)] = &[(25, 12, "this is the upgrade")];

#[test]
fn given_all_cases_when_looked_for_then_each_has_a_test_or_an_issue_that_brings_it() {
    assert_all_are_tested(Kind::Case, CASES, TO_COME);
}

#[test]
fn given_all_faults_when_looked_for_then_each_has_a_test_or_an_issue_that_brings_it() {
    assert_all_are_tested(Kind::Fault, FAULTS, FAULTS_TO_COME);
}

fn assert_all_are_tested(kind: Kind, all: RangeInclusive<u16>, to_come: &[(u16, u16, &str)]) {
    let tested = tested(kind);
    let promised: BTreeSet<u16> = to_come.iter().map(|(number, ..)| *number).collect();
    let name = |number: u16| kind.name(number);

    let missing: Vec<_> = all.filter(|number| !tested.contains(number) && !promised.contains(number)).collect();
    let kept: Vec<_> = promised.intersection(&tested).copied().map(name).collect();

    for (number, issue, why) in to_come {
        println!("{} comes with issue {issue}: {why}", name(*number));
    }
    let missing: Vec<_> = missing.into_iter().map(name).collect();
    assert!(missing.is_empty(), "no test and no issue: {}", missing.join(" "));
    assert!(kept.is_empty(), "these have a test now, and come no more: {}", kept.join(" "));
}

/// What is numbered.
#[derive(Clone, Copy)]
enum Kind {
    /// T001 to T237.
    Case,
    /// F1 to F36, with or without a leading zero.
    Fault,
}

impl Kind {
    fn name(self, number: u16) -> String {
        match self {
            Self::Case => format!("T{number:03}"),
            Self::Fault => format!("F{number}"),
        }
    }

    /// The number that a word says, in lower case.
    fn read(self, word: &str) -> Option<u16> {
        let (letter, lengths) = match self {
            Self::Case => ('t', 3..=3),
            Self::Fault => ('f', 1..=2),
        };
        let digits = word.strip_prefix(letter)?;
        lengths.contains(&digits.len()).then(|| digits.parse().ok())?
    }
}

fn tested(kind: Kind) -> BTreeSet<u16> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = ["src", "tests"].into_iter().flat_map(|folder| files(&root.join(folder)));
    // The names that are read below are examples.
    sources.filter(|path| *path != root.join(file!())).flat_map(|path| cases_in(kind, &path)).collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder of the sources").flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

fn cases_in(kind: Kind, path: &Path) -> Vec<u16> {
    let read = || fs::read_to_string(path).expect("a text file");
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("rs") => read().lines().flat_map(|line| cases_of_name(kind, line)).collect(),
        Some("yaml") => {
            let text = read();
            let comments = text.lines().filter(|line| line.starts_with('#'));
            comments.flat_map(|line| cases_of_comment(kind, line)).collect()
        }
        _ => vec![],
    }
}

/// `fn t009_t010_given_…` covers two, and so does such a name in a list of tests, in quotes.
fn cases_of_name(kind: Kind, line: &str) -> Vec<u16> {
    let Some((_, name)) = line.split_once("fn ").or_else(|| line.split_once('"')) else { return vec![] };
    let Some((numbers, _)) = name.split_once("_given_") else { return vec![] };
    numbers.split('_').filter_map(|word| kind.read(word)).collect()
}

/// `(T009 T010)` covers two.
fn cases_of_comment(kind: Kind, line: &str) -> Vec<u16> {
    let words = line.split(|letter: char| !letter.is_ascii_alphanumeric());
    // In capitals: what is small is a word.
    let numbers = words.filter(|word| word.starts_with(|letter: char| letter.is_ascii_uppercase()));
    numbers.filter_map(|word| kind.read(&word.to_ascii_lowercase())).collect()
}

#[test]
fn given_names_of_tests_and_comments_when_read_then_their_cases_are_found() {
    let cases = |line| cases_of_name(Kind::Case, line);
    let faults = |line| cases_of_name(Kind::Fault, line);

    assert_eq!(cases("    fn t009_t010_given_t3_cases_when_x_then_t011_y() {"), [9, 10]);
    assert_eq!(cases("    async fn f20_t228_given_a_file() {"), [228]);
    assert_eq!(faults("    async fn f20_t228_given_a_file() {"), [20]);
    assert_eq!(faults("            \"f01_f2_given_a_server_that_is_away\","), [1, 2]);
    assert_eq!(cases("    fn given_nothing() {"), [] as [u16; 0]);
    assert_eq!(cases_of_comment(Kind::Case, "# It is so. (T086 T093)"), [86, 93]);
}
