//! Runs the test cases of a `harness = false` binary: isolate, filter, run, count.
//!
//! The usual harness starts threads before the first test, and then the kernel gives no user namespace any more.

use std::env;
use std::io::{self, Write};
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;

use super::namespace::isolate;

/// A test: its name, which tells the story, and what it does. It fails by panicking.
pub(crate) type Case = (&'static str, fn());

/// Runs the cases whose names contain one of the arguments, all without arguments. Call it first in `main`.
pub(crate) fn run(cases: &[Case]) -> ExitCode {
    if let Err(end) = isolated() {
        return end;
    }
    let filters: Vec<String> = env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
    let failed = cases.iter().filter(|(name, _)| wanted(name)).filter(|case| !passes(case)).count();
    if failed > 0 {
        println!("{failed} failed");
    }
    ExitCode::from(u8::from(failed > 0))
}

fn passes((name, case): &Case) -> bool {
    print!("test {name} ... ");
    let _ = io::stdout().flush();
    let passed = panic::catch_unwind(AssertUnwindSafe(case)).is_ok();
    println!("{}", if passed { "ok" } else { "FAILED" });
    passed
}

/// Isolates the process, or says why that cannot be and how the program is to end.
fn isolated() -> Result<(), ExitCode> {
    let Err(reason) = isolate() else { return Ok(()) };
    if full() && !may_skip("rig") {
        println!("failed: {reason}; if that is expected here, set KUBE_RELAY_MAY_SKIP=rig");
        return Err(ExitCode::FAILURE);
    }
    println!("skipped: {reason}");
    Err(ExitCode::SUCCESS)
}

/// Says why a test proves nothing here. Under `KUBE_RELAY_TEST=full` that is a failure, unless `KUBE_RELAY_MAY_SKIP`
/// (a comma list) names the word.
pub(crate) fn skip(word: &str, reason: &str) {
    assert!(!full() || may_skip(word), "skipped ({word}): {reason}");
    println!("skipped ({word}): {reason}");
}

/// True where the long forms are asked for: `KUBE_RELAY_TEST=full`.
pub(crate) fn full() -> bool {
    env::var("KUBE_RELAY_TEST").is_ok_and(|form| form == "full")
}

fn may_skip(word: &str) -> bool {
    env::var("KUBE_RELAY_MAY_SKIP").is_ok_and(|words| words.split(',').any(|known| known == word))
}
