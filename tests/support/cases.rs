//! Runs the test cases of a `harness = false` binary: isolate, filter, run, count.
//!
//! The usual harness starts threads before the first test, and then the kernel gives no user namespace any more. Here each
//! case is a process of its own, a child of the isolated one: what it says stays together, and no case sees another's
//! counters.
#![allow(unsafe_code)] // pre_exec: one call.

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use std::{env, thread};

use rustix::process::Signal;

use super::namespace::isolate;

/// A test: its name, which tells the story, and what it does. It fails by panicking.
pub(crate) type Case = (&'static str, fn());

/// The argument that a child is started with, before the name of its case.
const INSIDE: &str = "--inside";

/// Runs the cases whose names contain one of the arguments, all without arguments. Call it first in `main`.
///
/// Most are `side_by_side`, as many at a time as the usual harness would run: they wait more than they work. Those which
/// measure, time or CPU or loss, come `alone` before them.
pub(crate) fn run(side_by_side: &[Case], alone: &[Case]) -> ExitCode {
    let asked = Asked::read(env::args().skip(1));
    if let Asked::Inside(wanted) = &asked {
        return run_here(alone.iter().chain(side_by_side).find(|(name, _)| name == wanted));
    }
    if let Err(end) = isolated() {
        return end;
    }
    let Asked::Some { filters, threads } = asked else { unreachable!("one case is run above") };
    let wanted = |cases: &[Case]| -> Vec<&'static str> {
        let names = cases.iter().map(|(name, _)| *name);
        names.filter(|name| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()))).collect()
    };
    let failed = [run_all(&wanted(alone), 1), run_all(&wanted(side_by_side), threads)].concat();
    if !failed.is_empty() {
        println!("{} failed: {}", failed.len(), failed.join(", "));
    }
    ExitCode::from(u8::from(!failed.is_empty()))
}

/// What the program is asked to do.
enum Asked {
    /// To be one case: we are isolated already.
    Inside(String),
    /// To run the cases that match, so many at a time; no filter matches all.
    Some { filters: Vec<String>, threads: usize },
}

impl Asked {
    /// Understands of the usual harness's arguments the filters and `--test-threads`, and passes the others over.
    fn read(mut arguments: impl Iterator<Item = String>) -> Self {
        let (mut filters, mut threads) = (Vec::new(), env::var("RUST_TEST_THREADS").ok());
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                INSIDE => return Self::Inside(arguments.next().unwrap_or_default()),
                "--test-threads" => threads = arguments.next(),
                _ => match argument.strip_prefix("--test-threads=") {
                    Some(number) => threads = Some(number.to_owned()),
                    None if argument.starts_with('-') => {}
                    None => filters.push(argument),
                },
            }
        }
        let threads = threads.and_then(|number| number.parse().ok()).filter(|number| *number > 0);
        let threads = threads.unwrap_or_else(|| thread::available_parallelism().map_or(1, Into::into));
        Self::Some { filters, threads }
    }
}

fn run_here(case: Option<&Case>) -> ExitCode {
    let Some((_, case)) = case else { return ExitCode::FAILURE };
    case();
    ExitCode::SUCCESS
}

/// Runs the cases, so many at a time. Those which failed.
fn run_all(cases: &[&'static str], at_a_time: usize) -> Vec<&'static str> {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..at_a_time.min(cases.len()) {
            scope.spawn(|| {
                while let Some(name) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if !passes(name) {
                        failed.lock().expect("nobody panics with it").push(*name);
                    }
                }
            });
        }
    });
    failed.into_inner().expect("as above")
}

/// Runs a case in a process of its own and tells how it went, with all that it said.
fn passes(name: &str) -> bool {
    let began = Instant::now();
    let (passed, said) = match run_apart(name) {
        Ok(outcome) => outcome,
        Err(error) => (false, format!("cannot be started: {error}\n").into()),
    };
    let verdict = if passed { "ok" } else { "FAILED" };
    let mut output = io::stdout().lock();
    let _ = writeln!(output, "test {name} ... {verdict} <{:.1}s>", began.elapsed().as_secs_f64());
    let _ = output.write_all(&said);
    passed
}

/// Whether it passed, and what it said.
fn run_apart(name: &str) -> io::Result<(bool, Vec<u8>)> {
    let (mut output, input) = io::pipe()?;
    let mut command = Command::new("/proc/self/exe");
    command.args([INSIDE, name]).stdin(Stdio::null()).stdout(input.try_clone()?).stderr(input);
    let end_with_us = || Ok(rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?);
    // SAFETY: between fork and exec it makes one system call and neither allocates nor locks.
    let mut child = unsafe { command.pre_exec(end_with_us) }.spawn()?;
    drop(command); // It holds the other end.
    let mut said = Vec::new();
    output.read_to_end(&mut said)?;
    Ok((child.wait()?.success(), said))
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
