//! The limit of descriptors: each listener takes one, each connection two, and some are kept for ourselves.

use super::duty::Duty;
use super::fact::{Fact, Unreadable, file};
use super::finding::{Finding, Subject};
use crate::describe::counted;
use crate::headroom::connections_that_fit;

const SUBJECT: Subject = Subject::OpenFiles;
/// For everything that is neither a listener nor a connection: event loops, pipes, netlink, the API server.
const OWN: u64 = 200;
/// With fewer connections at once, a node of average load is refused some.
const FEW_CONNECTIONS: u64 = 4_000;

/// The hard limit, to which a relay raises its own; `None`: there is none.
pub(super) fn read(process_folder: &str) -> Fact<Option<u64>> {
    let path = format!("{process_folder}/limits");
    let text = file(&path)?.ok_or_else(|| Unreadable::new(&path, "there is no such process"))?;
    hard_limit(&text).ok_or_else(|| Unreadable::new(&path, "it has no line \"Max open files\""))
}

fn hard_limit(limits: &str) -> Option<Option<u64>> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    match line.split_whitespace().nth(1)? {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    }
}

pub(super) fn judge(limit: &Fact<Option<u64>>, duty: &Duty) -> Finding {
    if let Some(why) = duty.out_of_sight() {
        return Finding::unknown(SUBJECT, &why);
    }
    let limit = match limit {
        Ok(None) => return Finding::ok(SUBJECT, "no limit of descriptors"),
        Ok(Some(limit)) => *limit,
        Err(why) => return Finding::unknown(SUBJECT, why),
    };
    let listeners = duty.listeners().count();
    let process = duty.process();
    let remedy = "`LimitNOFILE=` in a systemd unit, `ulimit -Hn` in a shell, the container runtime's limit for a pod: 65536 or more";
    let others = OWN + listeners as u64;
    if limit < others {
        let count = counted(listeners, "listener");
        let message = format!("{process} may have {limit} descriptors: too few for {count} and itself");
        return Finding::error(SUBJECT, message).remedy(remedy);
    }
    let connections = connections_that_fit(limit, others);
    let message =
        format!("{process} may have {limit} descriptors: about {connections} connections at once, then clients wait");
    match connections {
        few if few < FEW_CONNECTIONS => Finding::warning(SUBJECT, message).remedy(remedy),
        _ => Finding::ok(SUBJECT, message),
    }
}

#[cfg(test)]
mod tests {
    use super::super::duty::Running;
    use super::super::duty::sample::{duty, unknown};
    use super::super::finding::Grade;
    use super::*;

    #[test]
    fn given_limits_when_judged_then_too_few_for_listeners_is_an_error_and_few_connections_a_warning() {
        let listeners = ["clusterIP 10.96.0.1:80/TCP"; 100];

        let grade = |limit| judge(&Ok(limit), &duty(&listeners)).grade;

        assert_eq!(grade(Some(299)), Grade::Error);
        assert_eq!(grade(Some(1_024)), Grade::Warning);
        assert_eq!(grade(Some(20_000)), Grade::Ok);
        let told = judge(&Ok(Some(20_000)), &duty(&listeners)).message;
        assert!(told.contains("about 9650 connections"), "of 20,000 less 300 and the 400 that are kept: {told}");
        assert_eq!(grade(None), Grade::Ok);
        assert_eq!(judge(&Err(Unreadable::new("x", "y")), &unknown()).grade, Grade::Note);
        let hidden = Duty { running: Some(Running { pid: 1, visible: false }), ..duty(&listeners) };
        assert_eq!(judge(&Ok(Some(299)), &hidden).grade, Grade::Note, "that limit is our own");
    }

    #[test]
    fn given_the_kernels_table_when_read_then_the_hard_limit_counts() {
        let line = |hard: &str| format!("Limit  Soft Limit  Hard Limit  Units\nMax open files  1024  {hard}  files\n");

        assert_eq!(hard_limit(&line("524288")), Some(Some(524_288)));
        assert_eq!(hard_limit(&line("unlimited")), Some(None));
        assert_eq!(hard_limit("Max processes 1 1"), None);
        assert!(read("/proc/self").is_ok());
    }
}
