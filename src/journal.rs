//! What a running relay writes to its log about the state that it has reached: where Services are reached from
//! now on, and which problems came and went.
//!
//! Transitions, never repetitions. Who finds the problems is the source and `plan`; listeners that cannot be
//! bound are told by `control`, with the error of the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::layout::{Listener, Step};
use crate::name::{ListenKey, ObjectName};
use crate::plan::{Problem, Severity};

/// Lines of one kind for one change; a cluster may have thousands of Services, and a log has readers.
const LINES: usize = 20;

/// Where each Service is reached anew, and what is closed, as far as steps say so.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Moves {
    opened: BTreeMap<ObjectName, Vec<ListenKey>>,
    closed: Vec<ListenKey>,
}

impl Moves {
    /// Reads steps before they are carried out.
    pub(crate) fn of(steps: &[Step]) -> Self {
        let mut moves = Self::default();
        for step in steps {
            match step {
                Step::Bind(key, Listener { port, .. }) => {
                    moves.opened.entry(port.service.clone()).or_default().push(*key);
                }
                Step::Unbind(key) => moves.closed.push(*key),
                _ => {}
            }
        }
        moves
    }

    /// Tells them, but of listeners only those that are `bound` now.
    pub(crate) fn tell(mut self, bound: impl Fn(&ListenKey) -> bool) {
        self.opened.values_mut().for_each(|keys| keys.retain(&bound));
        self.opened.retain(|_, keys| !keys.is_empty());
        for (service, keys) in self.opened.iter().take(LINES) {
            tracing::info!(%service, listen = joined(keys), "listening");
        }
        if let Some(more) = self.opened.len().checked_sub(LINES).filter(|more| *more > 0) {
            tracing::info!(services = more, "listening for more Services: `kube-relay status` shows where");
        }
        if !self.closed.is_empty() {
            let (told, more) = self.closed.split_at(self.closed.len().min(LINES));
            let more = (!more.is_empty()).then_some(more.len());
            tracing::info!(listen = joined(told), more, "no longer listening");
        }
    }
}

/// Tells where node ports are served from now on, where that is elsewhere than before.
pub(crate) fn tell_node_port_addresses(before: &[IpAddr], now: &[IpAddr]) {
    match now {
        _ if before == now => {}
        [] => tracing::warn!("no address of this machine is one of --nodeport-addresses: no node port is served"),
        addresses => tracing::info!(addresses = joined(addresses), "node ports have moved"),
    }
}

fn joined(items: &[impl ToString]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Tells which problems came and which went. A problem that only moved to another line is no news.
pub(crate) fn tell_problems(before: &[Problem], now: &[Problem]) {
    let (came, went) = (missing_in(before, now), missing_in(now, before));
    for problem in came.iter().take(LINES) {
        let text = in_one_line(problem);
        match problem.severity {
            Severity::Note => tracing::info!(reason = %problem.reason, "{text}"),
            Severity::Warning => tracing::warn!(reason = %problem.reason, "{text}"),
            Severity::Error => tracing::error!(reason = %problem.reason, "{text}"),
        }
    }
    if let Some(more) = came.len().checked_sub(LINES).filter(|more| *more > 0) {
        tracing::warn!(problems = more, "more problems: `kube-relay status` shows them");
    }
    for problem in went.iter().filter(|problem| problem.severity != Severity::Note).take(LINES) {
        tracing::info!(reason = %problem.reason, "no longer: {}", in_one_line(problem));
    }
}

/// Those of `these` that are not among `others`.
fn missing_in<'a>(others: &[Problem], these: &'a [Problem]) -> Vec<&'a Problem> {
    let known: BTreeSet<_> = others.iter().map(essence).collect();
    these.iter().filter(|problem| !known.contains(&essence(problem))).collect()
}

fn essence(problem: &Problem) -> (&str, &str, &str) {
    (&problem.object, &problem.reason, &problem.message)
}

/// Lines to paste are for a terminal, not for a log.
fn in_one_line(problem: &Problem) -> String {
    let text = problem.to_string();
    match text.split_once('\n') {
        Some((first, _)) => format!("{} (`kube-relay check` prints the lines)", first.trim_end_matches(':')),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Service;
    use crate::name::Protocol;
    use crate::scaffold::missing_slice;

    fn problem(message: &str, line: u64) -> Problem {
        Problem { line: Some(line), ..Problem::error("Service default/web", "decode", message) }
    }

    #[test]
    fn given_a_problem_that_moved_to_another_line_when_compared_then_only_the_new_one_is_news() {
        let before = [problem("a", 3), problem("b", 5)];
        let now = [problem("a", 4), problem("c", 6)];

        assert_eq!(missing_in(&before, &now), [&now[1]]);
        assert_eq!(missing_in(&now, &before), [&before[1]]);
    }

    #[test]
    fn given_lines_to_paste_when_logged_then_the_line_tells_where_they_are() {
        let note = missing_slice(&Service::new("web").port("http", 80));

        let line = in_one_line(&note);

        assert!(!line.contains('\n') && line.ends_with("add their addresses (`kube-relay check` prints the lines)"));
    }

    #[test]
    fn given_steps_when_read_then_listeners_are_told_by_service() {
        let key = |port| ListenKey::new([127, 0, 0, 1].into(), port, Protocol::Tcp);

        assert_eq!(Moves::of(&[Step::Unbind(key(1)), Step::Unbind(key(2))]).closed, [key(1), key(2)]);
        assert_eq!(joined(&[key(1), key(2)]), "127.0.0.1:1/TCP, 127.0.0.1:2/TCP");
    }
}
