//! Which of the numbered cases of Service semantics, and which of the numbered faults, have a test.
//!
//! A test says which it covers by its name (`t029_given_…`, `f07_t161_given_…`), a scenario by its first comment
//! (`(T029 T030)`). What has none yet stands in [`TO_COME`] or [`FAULTS_TO_COME`], with the issue that brings it and the
//! reason.
//!
//! And that no two tests of a program take the same place on loopback.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// The cases of what a proxy owes a Service: intake, slices, selection, verdicts, balancing and affinity; then of TCP and of
/// UDP on the way; then of who asks for its health, of the node's addresses, of sources, and of the process.
const CASES: RangeInclusive<u16> = 1..=237;
/// What a proxy has to outlast: of the API server, endpoints, backends, clients, the machine's means, its own end.
const FAULTS: RangeInclusive<u16> = 1..=36;

/// Cases without a test, the issue that brings it, and why it is not here.
const TO_COME: &[(u16, u16, &str)] = &[];

/// The same for faults.
const FAULTS_TO_COME: &[(u16, u16, &str)] = &[];

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
    sources.filter(|path| *path != this_file()).flat_map(|path| cases_in(kind, &path)).collect()
}

fn this_file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(file!())
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

/// Who makes a place on loopback, before its number.
const PLACE: &str = "Site::new(";

/// Two tests of one program at one place meet on its ports, whenever both happen to run at once.
#[test]
fn given_all_places_on_loopback_when_compared_then_no_two_tests_of_a_program_have_the_same_one() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut taken = BTreeMap::<(String, String), Vec<String>>::new();
    for path in files(&folder).into_iter().filter(|path| is_source(path) && *path != this_file()) {
        let file = path.strip_prefix(&folder).expect("it was found there");
        for (line, number) in places(&fs::read_to_string(&path).expect("a text file")) {
            taken.entry((program(file), number)).or_default().push(format!("{}:{line}", file.display()));
        }
    }
    assert!(!taken.is_empty(), "places are made otherwise now");

    // Where it is no number, nobody sees which one it is.
    let wrong = taken.into_iter().filter(|((_, number), uses)| uses.len() > 1 || number.parse::<u8>().is_err());
    let wrong: Vec<_> = wrong.map(|((_, number), uses)| format!("{PLACE}{number}) at {}", uses.join(", "))).collect();
    assert!(wrong.is_empty(), "each test needs a number of its own: {}", wrong.join("; "));
}

fn is_source(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "rs")
}

/// The test program that a file below `tests` belongs to: `relay` has `relay/tcp.rs`, and would have `relay.rs`.
fn program(file: &Path) -> String {
    let first = file.components().next().map(|first| Path::new(first.as_os_str()).with_extension(""));
    first.unwrap_or_default().display().to_string()
}

/// What stands for the number of each place that is made, and in which line.
fn places(text: &str) -> Vec<(usize, String)> {
    let of_line = |(index, line): (usize, &str)| {
        let after = line.split(PLACE).skip(1);
        after.map(|rest| (index + 1, rest.split(')').next().unwrap_or(rest).to_owned())).collect::<Vec<_>>()
    };
    text.lines().enumerate().flat_map(of_line).collect()
}

#[test]
fn given_sources_when_read_then_their_places_and_programs_are_found() {
    let text = "use site::Site;\n\nlet (a, b) = (Site::new(7), Site::new(255));\nlet c = Site::new(number);\n";
    let found = [(3, "7"), (3, "255"), (4, "number")].map(|(line, number)| (line, number.to_owned()));

    assert_eq!(places(text), found);
    assert_eq!(["relay.rs", "relay/tcp.rs", "relay/a/b.rs"].map(|file| program(Path::new(file))), ["relay"; 3]);
}
