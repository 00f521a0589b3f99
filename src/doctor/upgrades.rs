//! Whether the relay that runs with this `--state-dir` could be upgraded, and what of it would be kept.

use std::path::PathBuf;

use tokio::task::spawn_blocking;

use super::fact::{Fact, Unreadable};
use super::finding::{Finding, Subject};
use crate::handover::{self, Seen};

const SUBJECT: Subject = Subject::Upgrade;
/// What a successor is handed.
const ALL: &str = "listeners, connections, UDP flows, session affinity and counters";

/// Who answers in the state folder; `None`: nobody does.
pub(super) async fn read(folder: PathBuf) -> Fact<Option<Seen>> {
    let name = folder.display().to_string();
    match spawn_blocking(move || handover::look(&folder)).await {
        Ok(Ok(seen)) => Ok(Some(seen)),
        Ok(Err(error)) if error.is_nobody() => Ok(None),
        Ok(Err(error)) => Err(Unreadable::new(&name, error)),
        Err(error) => Err(Unreadable::new(&name, error)),
    }
}

pub(super) fn judge(seen: &Fact<Option<Seen>>) -> Finding {
    match seen {
        Ok(Some(seen)) if seen.is_ready() => {
            let after_a_crash = after_a_crash(seen.kept());
            match seen.starts_none() {
                None => Finding::ok(SUBJECT, format!("{seen}: an upgrade keeps {ALL}; {after_a_crash}")),
                Some(why) => Finding::note(SUBJECT, format!("{seen}: it starts no successor ({why}); {after_a_crash}"))
                    .remedy(format!("`kube-relay run --take-over` with this --state-dir: it is handed {ALL}")),
            }
        }
        Ok(Some(seen)) => Finding::note(SUBJECT, format!("{seen}: no upgrade from here now")),
        Ok(None) => Finding::ok(SUBJECT, "no kube-relay runs with this --state-dir that could be upgraded"),
        Err(why) => Finding::unknown(SUBJECT, why),
    }
}

/// Without a folder nobody can be asked.
pub(super) fn without_folder(is_running: bool) -> Finding {
    let nothing = "without --state-dir there is no upgrade: the next process begins with nothing of the last one";
    if !is_running {
        return Finding::ok(SUBJECT, nothing);
    }
    Finding::note(SUBJECT, format!("the --state-dir of the kube-relay that runs is not named; {nothing}"))
        .remedy("name it here, to see what an upgrade keeps; where it has none, start it with one")
}

fn after_a_crash(kept: u64) -> String {
    match kept {
        0 => "a crash or a restart keeps nothing (with systemd: FileDescriptorStoreMax=)".into(),
        1 => "a crash or a restart keeps 1 listener".into(),
        kept => format!("a crash or a restart keeps {kept} listeners"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Grade;
    use super::*;

    #[tokio::test]
    async fn f25_given_a_state_folder_of_nobody_when_looked_at_then_there_is_nothing_to_keep() {
        let folder = tempfile::tempdir().expect("a folder can be made");

        let seen = read(folder.path().to_owned()).await;

        assert_eq!(judge(&seen).grade, Grade::Ok);
        assert!(judge(&seen).message.starts_with("no kube-relay runs"), "{seen:?}");
    }

    #[test]
    fn f25_given_no_state_folder_when_judged_then_nothing_is_kept_and_a_relay_that_runs_is_worth_a_note() {
        let [none, some] = [false, true].map(without_folder);

        assert_eq!((none.grade, some.grade), (Grade::Ok, Grade::Note));
        assert!(some.message.contains("begins with nothing") && some.remedy.is_some(), "{some:?}");
    }

    #[test]
    fn f25_given_who_answers_in_the_folder_when_judged_then_only_one_that_serves_here_can_be_upgraded() {
        let told = |pid, ready| judge(&Ok(Some(Seen::of(pid, ready))));

        assert_eq!(told(7, true).grade, Grade::Ok);
        assert!(told(7, true).message.contains("(pid 7) serves: an upgrade keeps listeners"));
        assert!(told(7, true).message.ends_with("keeps nothing (with systemd: FileDescriptorStoreMax=)"));
        let kept = judge(&Ok(Some(Seen::of(7, true).keeping(12)))).message;
        assert!(kept.ends_with("a crash or a restart keeps 12 listeners"), "{kept}");
        let by_hand = judge(&Ok(Some(Seen::of(7, true).starting_none("its manifests came from standard input"))));
        assert_eq!(by_hand.grade, Grade::Note);
        assert!(
            by_hand.message.contains("starts no successor (its manifests came from standard input)"),
            "{by_hand:?}"
        );
        assert!(by_hand.remedy.is_some_and(|remedy| remedy.contains("run --take-over")));
        assert_eq!((told(7, false).grade, told(0, true).grade), (Grade::Note, Grade::Note));
        assert_eq!(judge(&Err(Unreadable::new("/s", "no right"))).grade, Grade::Note);
    }
}
