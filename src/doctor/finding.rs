//! What `doctor` has to say: findings with a severity and a remedy, worst first, as text and as JSON.

use std::fmt::{self, Display, Write};

use serde::{Serialize, Serializer};

use super::fact::Unreadable;
use crate::describe::counted;

/// How many of a list are named in a sentence.
const NAMED: usize = 3;

/// How bad it is. The words in JSON: `ok`, `note`, `warning`, `error`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    /// It was looked at, and is as it should be.
    Ok,
    /// Worth knowing, or not known; nothing breaks by it.
    Note,
    /// Something may break, or be slower than it need be.
    Warning,
    /// Something will not work.
    Error,
}

impl Grade {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// What a finding is about. The words stay as they are: programs select by them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// The API server: whether it is reached, what it offers, what it permits.
    Api,
    /// Capabilities of the process.
    Capabilities,
    /// Its limit of descriptors.
    OpenFiles,
    /// Addresses of Services, and the routes that make them local.
    VipRoutes,
    /// Who would answer neighbours for such an address.
    Arp,
    /// Programs that listen on all addresses, those of Services among them.
    WildcardListeners,
    /// Whether clients' addresses can be preserved.
    SourceAddress,
    /// Rules of other proxies, which come before any socket.
    OtherProxies,
    /// Networks of pods that may pass by the node's own tables.
    Cni,
    /// Policies that judge clients by their address, which is the node's now.
    NetworkPolicies,
    /// Node ports against the source ports of connections.
    NodePorts,
    /// How many source ports there are.
    SourcePorts,
    /// The queues of connections and datagrams.
    Queues,
    /// The kernel's table of connections.
    Conntrack,
    /// Whether neighbours reach loopback.
    Loopback,
    /// What the kernel can do.
    Kernel,
    /// What an upgrade of the relay that runs would keep.
    Upgrade,
}

impl Subject {
    /// The word: `vip-routes`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Capabilities => "capabilities",
            Self::OpenFiles => "open-files",
            Self::VipRoutes => "vip-routes",
            Self::Arp => "arp",
            Self::WildcardListeners => "wildcard-listeners",
            Self::SourceAddress => "source-address",
            Self::OtherProxies => "other-proxies",
            Self::Cni => "cni",
            Self::NetworkPolicies => "network-policies",
            Self::NodePorts => "node-ports",
            Self::SourcePorts => "source-ports",
            Self::Queues => "queues",
            Self::Conntrack => "conntrack",
            Self::Loopback => "loopback",
            Self::Kernel => "kernel",
            Self::Upgrade => "upgrade",
        }
    }
}

impl Serialize for Subject {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about.
    pub subject: Subject,
    /// How bad it is.
    #[serde(rename = "severity")]
    pub grade: Grade,
    /// One sentence with object and value.
    pub message: String,
    /// A command, a flag or a field that mends it; where nothing is to be done, there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    pub(super) fn ok(subject: Subject, message: impl Into<String>) -> Self {
        Self { subject, grade: Grade::Ok, message: message.into(), remedy: None }
    }

    pub(super) fn note(subject: Subject, message: impl Into<String>) -> Self {
        Self { grade: Grade::Note, ..Self::ok(subject, message) }
    }

    pub(super) fn warning(subject: Subject, message: impl Into<String>) -> Self {
        Self { grade: Grade::Warning, ..Self::ok(subject, message) }
    }

    pub(super) fn error(subject: Subject, message: impl Into<String>) -> Self {
        Self { grade: Grade::Error, ..Self::ok(subject, message) }
    }

    /// Something could not be read, so nobody knows.
    pub(super) fn unknown(subject: Subject, why: &Unreadable) -> Self {
        Self::note(subject, format!("not known: {why}"))
    }

    #[must_use]
    pub(super) fn remedy(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }
}

/// All that was found on this machine: the document that `doctor -o json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Diagnosis {
    /// Version of the program that has looked.
    pub version: &'static str,
    /// How many are errors.
    pub errors: usize,
    /// How many are warnings.
    pub warnings: usize,
    /// How many are notes.
    pub notes: usize,
    /// How many are fine.
    pub ok: usize,
    /// Worst first.
    pub findings: Vec<Finding>,
}

impl Diagnosis {
    /// In order, and counted.
    pub(super) fn of(mut findings: Vec<Finding>) -> Self {
        findings.sort_by_key(|finding| (std::cmp::Reverse(finding.grade), finding.subject));
        let count = |grade| findings.iter().filter(|finding| finding.grade == grade).count();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            errors: count(Grade::Error),
            warnings: count(Grade::Warning),
            notes: count(Grade::Note),
            ok: count(Grade::Ok),
            findings,
        }
    }

    /// True where something will or may break.
    pub fn has_problems(&self) -> bool {
        self.errors + self.warnings > 0
    }

    /// For people: a line each, and what to do below it. What is fine is only counted, unless `all` is to be told.
    pub fn text(&self, all: bool) -> String {
        let mut text = String::new();
        for finding in self.findings.iter().filter(|finding| all || finding.grade > Grade::Ok) {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{:<8} {}: {}", finding.grade.as_str(), finding.subject.as_str(), finding.message);
            for line in finding.remedy.iter().flat_map(|remedy| remedy.lines()) {
                let _ = writeln!(text, "         → {line}");
            }
        }
        let gap = if text.is_empty() { "" } else { "\n" };
        let fold = if all || self.ok == 0 { "" } else { " (--all shows them)" };
        let (errors, warnings, notes) =
            (counted(self.errors, "error"), counted(self.warnings, "warning"), counted(self.notes, "note"));
        let _ = writeln!(text, "{gap}{errors}, {warnings}, {notes}, {} fine{fold}", self.ok);
        text
    }
}

/// The first few of a list, and how many more there are: `a, b, c and 4 more`.
pub(super) struct Abridged<'a, T>(pub(super) &'a [T]);

impl<T: Display> Display for Abridged<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.0.len().min(NAMED);
        for (place, item) in self.0[..shown].iter().enumerate() {
            write!(f, "{}{item}", if place > 0 { ", " } else { "" })?;
        }
        match self.0.len() - shown {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn diagnosis() -> Diagnosis {
        Diagnosis::of(vec![
            Finding::ok(Subject::Kernel, "splice works"),
            Finding::note(Subject::Cni, "a network of its own"),
            Finding::warning(Subject::Conntrack, "nearly full")
                .remedy("sysctl -w net.netfilter.nf_conntrack_max=262144"),
            Finding::error(Subject::VipRoutes, "10.96.0.10 is not local").remedy("one way\nanother way"),
        ])
    }

    #[test]
    fn given_findings_when_printed_then_the_worst_comes_first_and_what_is_fine_is_counted() {
        insta::assert_snapshot!(diagnosis().text(false), @"
        error    vip-routes: 10.96.0.10 is not local
                 → one way
                 → another way
        warning  conntrack: nearly full
                 → sysctl -w net.netfilter.nf_conntrack_max=262144
        note     cni: a network of its own

        1 error, 1 warning, 1 note, 1 fine (--all shows them)
        ");
        assert!(diagnosis().text(true).contains("ok       kernel: splice works\n\n1 error"));
    }

    #[test]
    fn given_nothing_wrong_when_printed_then_one_line_says_so() {
        let fine = Diagnosis::of(vec![Finding::ok(Subject::Kernel, "splice works")]);

        assert_eq!(fine.text(false), "0 errors, 0 warnings, 0 notes, 1 fine (--all shows them)\n");
        assert!(!fine.has_problems() && diagnosis().has_problems());
    }

    #[test]
    fn given_findings_when_written_for_programs_then_the_words_are_stable() {
        let json = serde_json::to_value(diagnosis()).expect("it can be written");

        assert_eq!(json["errors"], 1);
        let expected = serde_json::json!({"subject": "conntrack", "severity": "warning", "message": "nearly full",
            "remedy": "sysctl -w net.netfilter.nf_conntrack_max=262144"});
        assert_eq!(json["findings"][1], expected);
        assert_eq!(json["findings"][3]["severity"], "ok");
        assert!(json["findings"][3].get("remedy").is_none());
    }

    #[test]
    fn given_a_list_when_named_then_a_few_stand_for_all() {
        assert_eq!(Abridged(&[1, 2]).to_string(), "1, 2");
        assert_eq!(Abridged(&[1, 2, 3, 4, 5]).to_string(), "1, 2, 3 and 2 more");
    }
}
