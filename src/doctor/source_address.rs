//! Whether clients' addresses could be preserved here (`kube-relay.dev/source-address: preserve`), where a Service asks for it.
//!
//! What is needed is nf_tables with rights to use it, and that answers are not thrown away on their way. Whether those of a
//! backend come by this node at all, its first connections find out.

use super::duty::Duty;
use super::fact::{Fact, Unreadable, interfaces_with, off};
use super::finding::{Abridged, Finding, Subject};
use crate::reply_message::{MARK, filter_table};

const SUBJECT: Subject = Subject::SourceAddress;
/// With it the kernel asks where an answer could come from with its mark, and finds that it would be one of its own.
const SETTING: &str = "src_valid_mark";

#[derive(Debug)]
pub(super) struct Facts {
    /// Whether the kernel has nf_tables, for this process.
    pub(super) has_nftables: Fact<bool>,
    /// Whether the relay may change routes, and what goes with them.
    pub(super) may_change: Fact<bool>,
    /// The interfaces that have [`SETTING`], `all` and `default` among them.
    pub(super) judging_marks: Fact<Vec<String>>,
}

pub(super) fn read(has_nftables: Fact<bool>, may_change: Fact<bool>) -> Facts {
    Facts { has_nftables, may_change, judging_marks: interfaces_with(SETTING) }
}

/// Where no Service asks for it, nothing is amiss.
pub(super) fn judge(facts: &Facts, duty: &Duty) -> Finding {
    let Some(service) = duty.preserving.first() else {
        return Finding::ok(SUBJECT, "no Service that is known here asks for its clients' addresses");
    };
    let wants = format!("{service} asks for its clients' addresses (kube-relay.dev/source-address: preserve)");
    match (&facts.may_change, &facts.has_nftables, &facts.judging_marks) {
        (Err(why), ..) | (_, Err(why), _) | (.., Err(why)) => unknown(&wants, why),
        (Ok(false), ..) => {
            Finding::warning(SUBJECT, format!("{wants}, but the relay has no CAP_NET_ADMIN: backends see the node"))
                .remedy("run it with CAP_NET_ADMIN")
        }
        (_, Ok(false), _) => {
            Finding::warning(SUBJECT, format!("{wants}, but this kernel has no nf_tables: backends see the node"))
                .remedy("a kernel with nf_tables and nft_socket (5.10)")
        }
        (Ok(true), Ok(true), Ok(judging)) if !judging.is_empty() => judged(&wants, judging),
        (Ok(true), Ok(true), Ok(_)) => {
            let table = duty.routes.map(filter_table).map(|table| format!(" by table {table}")).unwrap_or_default();
            Finding::ok(
                SUBJECT,
                format!(
                    "{wants}: answers can be led here{table}; whether a backend's come by this node, `kube-relay status` tells"
                ),
            )
        }
    }
}

/// Where an answer that comes in there is thrown away.
fn judged(wants: &str, judging: &[String]) -> Finding {
    let off: Vec<String> = judging.iter().map(|interface| off(SETTING, interface)).collect();
    let places = Abridged(judging);
    let message = format!(
        "{wants}, but {SETTING} is set for {places}: there the kernel drops answers over IPv4 with mark {MARK:#x}, and backends see the node"
    );
    let remedy = format!("`sysctl -w {}`, unless a VPN (wg-quick sets it for all) needs it", off.join(" "));
    Finding::warning(SUBJECT, message).remedy(remedy)
}

fn unknown(wants: &str, why: &Unreadable) -> Finding {
    Finding::note(SUBJECT, format!("{wants}; whether that works here is not known: {why}"))
}

#[cfg(test)]
mod tests {
    use super::super::duty::sample;
    use super::super::finding::Grade;
    use super::*;

    fn facts() -> Facts {
        Facts { has_nftables: Ok(true), may_change: Ok(true), judging_marks: Ok(vec![]) }
    }

    fn preserving() -> Duty {
        Duty { preserving: vec!["default/web".into()], ..sample::unknown() }
    }

    #[test]
    fn given_interfaces_that_judge_marks_when_judged_then_each_is_told_with_how_to_end_that() {
        let facts = Facts { judging_marks: Ok(vec!["all".into(), "eth0.7".into()]), ..facts() };

        let found = judge(&facts, &preserving());

        assert!(found.message.contains("src_valid_mark is set for all, eth0.7: "), "{found:?}");
        let remedy = found.remedy.expect("a remedy");
        let settings = "net.ipv4.conf.all.src_valid_mark=0 net.ipv4.conf.eth0/7.src_valid_mark=0";
        assert!(remedy.starts_with(&format!("`sysctl -w {settings}`")), "{remedy}");
    }

    #[test]
    fn given_no_service_that_asks_when_judged_then_nothing_is_amiss_whatever_is_here() {
        let nothing = Facts { has_nftables: Ok(false), may_change: Ok(false), judging_marks: Ok(vec!["all".into()]) };

        assert_eq!(judge(&nothing, &sample::unknown()).grade, Grade::Ok);
    }

    #[test]
    fn given_a_service_that_asks_when_judged_then_it_is_named_with_what_is_missing() {
        let no_right = Facts { may_change: Ok(false), ..facts() };
        let no_nftables = Facts { has_nftables: Ok(false), ..facts() };
        let marks = Facts { judging_marks: Ok(vec!["all".into(), "eth0.7".into()]), ..facts() };
        for (facts, word) in [(no_right, "CAP_NET_ADMIN"), (no_nftables, "nf_tables"), (marks, "src_valid_mark")] {
            let found = judge(&facts, &preserving());

            assert_eq!(found.grade, Grade::Warning);
            assert!(found.message.starts_with("default/web asks") && found.message.contains(word), "{found:?}");
            assert!(found.remedy.is_some());
        }
        assert_eq!(judge(&facts(), &preserving()).grade, Grade::Ok);
        let hidden = Facts { has_nftables: Err(Unreadable::new("the rules", "no right")), ..facts() };
        assert_eq!(judge(&hidden, &preserving()).grade, Grade::Note);
    }
}
