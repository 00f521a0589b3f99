//! Whether clients' addresses could be preserved here (`kube-relay.dev/source-address: preserve`), where a Service asks for it.
//!
//! What is needed is nf_tables with rights to use it, and that answers are not thrown away on their way. Whether those of a
//! backend come by this node at all, its first connections find out.

use super::duty::Duty;
use super::fact::{Fact, Unreadable, sysctl};
use super::finding::{Finding, Subject};
use crate::reply_message::{MARK, filter_table};

const SUBJECT: Subject = Subject::SourceAddress;

#[derive(Debug)]
pub(super) struct Facts {
    /// Whether the kernel has nf_tables, for this process.
    pub(super) has_nftables: Fact<bool>,
    /// Whether the relay may change routes, and what goes with them.
    pub(super) may_change: Fact<bool>,
    /// `net.ipv4.conf.all.src_valid_mark`: the kernel asks where an answer could come from with its mark, and finds that it
    /// would be one of its own.
    pub(super) judges_marks: Fact<Option<u8>>,
}

pub(super) fn read(has_nftables: Fact<bool>, may_change: Fact<bool>) -> Facts {
    Facts { has_nftables, may_change, judges_marks: sysctl("net.ipv4.conf.all.src_valid_mark") }
}

/// Where no Service asks for it, nothing is amiss.
pub(super) fn judge(facts: &Facts, duty: &Duty) -> Finding {
    let Some(service) = duty.preserving.first() else {
        return Finding::ok(SUBJECT, "no Service that is known here asks for its clients' addresses");
    };
    let wants = format!("{service} asks for its clients' addresses (kube-relay.dev/source-address: preserve)");
    match (&facts.may_change, &facts.has_nftables, &facts.judges_marks) {
        (Err(why), ..) | (_, Err(why), _) | (.., Err(why)) => unknown(&wants, why),
        (Ok(false), ..) => Finding::warning(SUBJECT, format!("{wants}, but the relay has no CAP_NET_ADMIN: backends see the node"))
            .remedy("run it with CAP_NET_ADMIN"),
        (_, Ok(false), _) => Finding::warning(SUBJECT, format!("{wants}, but this kernel has no nf_tables: backends see the node"))
            .remedy("a kernel with nf_tables and nft_socket (5.10)"),
        (.., Ok(Some(1))) => Finding::warning(
            SUBJECT,
            format!("{wants}, but src_valid_mark is set: the kernel drops answers with mark {MARK:#x}, and backends see the node"),
        )
        .remedy("`sysctl -w net.ipv4.conf.all.src_valid_mark=0`, unless a VPN (wg-quick sets it) needs it"),
        (Ok(true), Ok(true), Ok(_)) => {
            let table = duty.routes.map(filter_table).map(|table| format!(" by table {table}")).unwrap_or_default();
            Finding::ok(SUBJECT, format!("{wants}: answers can be led here{table}; whether a backend's come by this node, `kube-relay status` tells"))
        }
    }
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
        Facts { has_nftables: Ok(true), may_change: Ok(true), judges_marks: Ok(Some(0)) }
    }

    fn preserving() -> Duty {
        Duty { preserving: vec!["default/web".into()], ..sample::unknown() }
    }

    #[test]
    fn given_no_service_that_asks_when_judged_then_nothing_is_amiss_whatever_is_here() {
        let nothing = Facts { has_nftables: Ok(false), may_change: Ok(false), judges_marks: Ok(Some(1)) };

        assert_eq!(judge(&nothing, &sample::unknown()).grade, Grade::Ok);
    }

    #[test]
    fn given_a_service_that_asks_when_judged_then_it_is_named_with_what_is_missing() {
        let no_right = Facts { may_change: Ok(false), ..facts() };
        let no_nftables = Facts { has_nftables: Ok(false), ..facts() };
        let marks = Facts { judges_marks: Ok(Some(1)), ..facts() };
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
