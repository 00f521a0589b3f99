//! Whether clients' addresses could be preserved here (`kube-relay.dev/source-address: preserve`), where a Service asks for it.
//!
//! What is needed is nf_tables with rights to use it, and that answers are neither thrown away nor led elsewhere on their way.
//! Whether those of a backend come by this node at all, its first connections find out.

use super::duty::Duty;
use super::fact::{Fact, Unreadable, interfaces_with, off};
use super::finding::{Abridged, Finding, Subject};
use crate::reply_message::{RULE_PRIORITY, filter_table, route_table};
use crate::routing_rules::{self, RoutingRule};

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
    /// The rules that choose a table of routes.
    pub(super) rules: Fact<Vec<RoutingRule>>,
}

pub(super) fn read(has_nftables: Fact<bool>, may_change: Fact<bool>) -> Facts {
    let rules = routing_rules::look().map_err(|error| Unreadable::new("the rules of routes", error));
    Facts { has_nftables, may_change, judging_marks: interfaces_with(SETTING), rules }
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
        (Ok(true), Ok(true), Ok(judging)) if !judging.is_empty() => judged(&wants, judging, duty),
        (Ok(true), Ok(true), Ok(_)) => led(&wants, &facts.rules, duty),
    }
}

/// Whether somebody else leads them, or would have packets led here, by the same mark.
fn led(wants: &str, rules: &Fact<Vec<RoutingRule>>, duty: &Duty) -> Finding {
    match rules.as_ref().map(|rules| rules.iter().find(|rule| clashes(rule, duty))) {
        Err(why) => unknown(wants, why),
        Ok(Some(other)) => clash(wants, other, duty),
        Ok(None) => {
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
fn judged(wants: &str, judging: &[String], duty: &Duty) -> Finding {
    let off: Vec<String> = judging.iter().map(|interface| off(SETTING, interface)).collect();
    let (places, mark) = (Abridged(judging), duty.reply_mark);
    let message = format!(
        "{wants}, but {SETTING} is set for {places}: there the kernel drops answers over IPv4 with mark {mark}, and backends see the node"
    );
    let remedy = format!("`sysctl -w {}`, unless a VPN (wg-quick sets it for all) needs it", off.join(" "));
    Finding::warning(SUBJECT, message).remedy(remedy)
}

/// True for a rule of somebody else that would lead our answers elsewhere, or whose packets ours would lead here.
fn clashes(rule: &RoutingRule, duty: &Duty) -> bool {
    // A relay with another number may have the same mark: either leads here.
    let is_ours = (route_table(0)..=route_table(u8::MAX)).contains(&rule.table);
    let Some(mark) = rule.mark.filter(|_| !is_ours) else { return false };
    match rule.priority <= RULE_PRIORITY {
        true => duty.reply_mark.has(mark),
        false => mark.has(duty.reply_mark),
    }
}

fn clash(wants: &str, other: &RoutingRule, duty: &Duty) -> Finding {
    let (ours, RoutingRule { priority, mark, table, .. }) = (duty.reply_mark, other);
    let theirs = mark.map(|mark| mark.to_string()).unwrap_or_default();
    let what = match *priority <= RULE_PRIORITY {
        true => "takes answers to them away",
        false => "would lose its packets to us",
    };
    let message =
        format!("{wants}, but rule {priority} (fwmark {theirs} lookup {table}) {what}, as our mark is {ours}");
    Finding::warning(SUBJECT, message)
        .remedy("give kube-relay another value by --reply-mark, as 0x100c/0x3fff, or the other program another mark")
}

fn unknown(wants: &str, why: &Unreadable) -> Finding {
    Finding::note(SUBJECT, format!("{wants}; whether that works here is not known: {why}"))
}

#[cfg(test)]
mod tests {
    use super::super::duty::sample;
    use super::super::finding::Grade;
    use super::*;
    use crate::name::Family;
    use crate::reply_mark::ReplyMark;

    fn facts() -> Facts {
        Facts { has_nftables: Ok(true), may_change: Ok(true), judging_marks: Ok(vec![]), rules: Ok(vec![]) }
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
        let nothing =
            Facts { has_nftables: Ok(false), may_change: Ok(false), judging_marks: Ok(vec!["all".into()]), ..facts() };

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

    #[test]
    fn given_rules_of_others_when_judged_then_those_that_clash_with_our_mark_are_named_and_no_others() {
        let found = |priority, value, mask, table| {
            let mark = Some(ReplyMark::told(value, mask));
            let rule = RoutingRule { family: Family::V4, priority, mark, table };
            judge(&Facts { rules: Ok(vec![rule]), ..facts() }, &preserving())
        };

        for (priority, value, mask, word) in [
            (99, 0x1000, 0x1000, "takes answers"),
            (99, 0x100b, u32::MAX, "takes answers"),
            (20_000, 0x100b, u32::MAX, "lose its packets"),
            (20_000, 0x1_100b, 0x1_3fff, "lose its packets"),
        ] {
            let clash = found(priority, value, mask, 51_820);
            assert_eq!(clash.grade, Grade::Warning, "{value:#x}/{mask:#x}");
            assert!(clash.message.contains(word), "{}", clash.message);
            assert!(clash.remedy.is_some_and(|remedy| remedy.contains("--reply-mark")));
        }
        // Of the VPC CNI, kube-proxy's users, Cilium; one that comes after ours; our own.
        for (priority, value, mask, table) in [
            (1_024, 0x80, 0x80, 254),
            (100, 0x4000, 0x4000, 12),
            (9, 0x200, 0xf00, 2_004),
            (20_000, 0x1000, 0x1000, 7),
            (107, 0x100b, 0x3fff, 107_107),
        ] {
            assert_eq!(found(priority, value, mask, table).grade, Grade::Ok, "{value:#x}/{mask:#x}");
        }
    }
}
