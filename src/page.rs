//! The status page: one HTML file that is served as it is, and what a browser is told it may do with it.
//!
//! The page itself is `page.html`: it asks the server that it came from for `/status?summary` and
//! `/status/NAMESPACE/NAME` (`summary`). Who may ask for it, and where, is `admin`'s.

use hyper::StatusCode;
use hyper::header::{CONTENT_SECURITY_POLICY, HeaderValue, REFERRER_POLICY};

use crate::http_server::{Answer, response};

/// Without a build step: what is edited is what runs.
const PAGE: &str = include_str!("page.html");
/// In the page, where its style and its script say who let them in.
const NONCE: &str = "@NONCE@";

/// The page, for one browser.
///
/// Names and messages on it come from whoever may write a Service. The script puts them there as text and never as HTML;
/// should it ever fail to, the policy lets nothing run that does not know this answer's number, lets nothing be sent
/// to anybody else, and has the browser refuse text in place of markup (trusted types).
pub(crate) fn answer() -> Answer {
    let nonce = format!("{:032x}", rand::random::<u128>());
    let mut answer = response(StatusCode::OK, "text/html; charset=utf-8", PAGE.replace(NONCE, &nonce));
    let policy = HeaderValue::try_from(policy(&nonce)).expect("a policy is letters, digits and quotes");
    let headers = answer.headers_mut();
    headers.insert(CONTENT_SECURITY_POLICY, policy);
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    answer
}

fn policy(nonce: &str) -> String {
    [
        "default-src 'none'",
        &format!("script-src 'nonce-{nonce}'"),
        &format!("style-src 'nonce-{nonce}'"),
        "connect-src 'self'",
        "img-src data:", // An icon of no bytes: else browsers ask for /favicon.ico.
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
    .join("; ")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::UNIX_EPOCH;

    use serde::Serialize;

    use super::*;
    use crate::capacity::LimitReport;
    use crate::choice::{Choice, Judged, Rule, Unused};
    use crate::contact::ContactReport;
    use crate::live::sample;
    use crate::name::{Family, ObjectName, Protocol, Scope};
    use crate::plan::{Balance, HeaderVersion, ListenerKind, Problem, Side, SourceAddress, Verdict};
    use crate::recent::Happened;
    use crate::status::{
        BackendTraffic, HealthPortReport, ListenerReport, ListenerState, PortReport, PortTraffic, ScopedBackends,
        ServiceReport, SourceTraffic, UpgradeFailure, UpgradeStatus,
    };
    use crate::summary::{Closeup, ServiceSummary, Summary};

    /// What the script reads out of an object of a shape: it says so as `/* Shape */ { one, other = 0, third: name }`,
    /// at each place where something of the relay's comes in, and nowhere else.
    fn read_by_the_page(shape: &str) -> BTreeSet<String> {
        let mark = format!("/* {shape} */ {{");
        let lists = PAGE.split(&mark).skip(1).map(|rest| rest.split_once('}').expect("the list ends").0);
        let fields = lists.flat_map(|list| list.split(','));
        let names = fields.map(|field| field.split(['=', ':']).next().unwrap_or_default().trim().to_owned());
        names.filter(|name| !name.is_empty()).collect()
    }

    fn fields(sample: impl Serialize) -> BTreeSet<String> {
        let value = serde_json::to_value(sample).expect("a report is JSON");
        value.as_object().expect("an object").keys().cloned().collect()
    }

    /// One sample of each shape that the page reads, with no field left out.
    fn shapes() -> Vec<(&'static str, BTreeSet<String>)> {
        let status = sample::status();
        let mut summary = Summary::of(&status, UNIX_EPOCH);
        summary.contact = Some(contact());
        summary.upgrade = Some(UpgradeStatus::default());
        summary.upgrade_failure = Some(UpgradeFailure::default());
        let mut closeup = Closeup::of(&status, &ObjectName::parse("default/web"), UNIX_EPOCH).expect("web is there");
        closeup.report.notes = vec![problem()];
        let failed = ListenerState::Failed { reason: "in_use".into(), message: "ask ss".into() };
        vec![
            ("SourceStatus", fields(&summary.source)),
            ("ContactReport", fields(contact())),
            ("UpgradeStatus", fields(UpgradeStatus::default())),
            ("UpgradeFailure", fields(UpgradeFailure::default())),
            ("Summary", fields(&summary)),
            ("ServiceSummary", fields(service_summary())),
            ("Closeup", fields(&closeup)),
            ("ServiceReport", fields(service())),
            ("HealthPortReport", fields(health_port())),
            ("PortReport", fields(port())),
            ("ScopedBackends", fields(ScopedBackends::default())),
            ("ListenerReport", fields(listener())),
            ("Side", fields(SIDE)),
            ("ListenerState", fields(failed)),
            ("PortTraffic", fields(traffic())),
            ("SourceTraffic", fields(traffic().sources)),
            ("LimitReport", fields(LimitReport { most: Some(1), ..LimitReport::default() })),
            ("BackendTraffic", fields(backend())),
            ("Choice", fields(choice())),
            ("Judged", fields(judged())),
            ("Happened", fields(happened())),
            ("Problem", fields(problem())),
        ]
    }

    const SIDE: Side = Side { scope: Scope::Cluster, verdict: Verdict::Serve };

    fn contact() -> ContactReport {
        ContactReport { connected: true, age_seconds: 0.0, saved_at: Some(String::new()) }
    }

    fn service_summary() -> ServiceSummary {
        ServiceSummary {
            addresses: vec![[127, 0, 0, 1].into()],
            ports: vec![String::new()],
            problem_count: 1,
            backends: 1,
            ejected: 1,
            active: 1,
            total: 1,
            upstream_bytes: 1,
            downstream_bytes: 1,
            dropped: 1,
            failed_tries: 1,
            ..ServiceSummary::default()
        }
    }

    fn service() -> ServiceReport {
        ServiceReport {
            namespace: String::new(),
            name: String::new(),
            kind: "".into(),
            skipped: None,
            cluster_ips: vec![],
            external_name: None,
            affinity_seconds: None,
            health_port: Some(health_port()),
            balance: Balance::Random,
            source_address: SourceAddress::Preserve,
            source_refusal: Some(String::new()),
            ports: vec![],
        }
    }

    fn health_port() -> HealthPortReport {
        HealthPortReport { port: 1, local_endpoints: 0, addresses: vec![], state: Some(ListenerState::Serving) }
    }

    fn port() -> PortReport {
        PortReport {
            name: String::new(),
            protocol: Protocol::Tcp,
            port: 1,
            target_port: Some(String::new()),
            listeners: vec![],
            backends: ScopedBackends::default(),
            choices: vec![choice()],
            traffic: Some(traffic()),
            backend_traffic: vec![backend()],
        }
    }

    fn traffic() -> PortTraffic {
        let sources = SourceTraffic { preserved: 1, ..SourceTraffic::default() };
        PortTraffic { affinity_pins: Some(1), sources, ..PortTraffic::default() }
    }

    fn listener() -> ListenerReport {
        ListenerReport {
            kind: ListenerKind::ClusterIp,
            address: String::new(),
            allocated: false,
            outside: SIDE,
            inside: SIDE,
            source_ranges: vec!["10.0.0.0/8".parse().expect("a network")],
            allow_from: Some(vec![]),
            proxy_protocol: Some(HeaderVersion::V2),
            accept_proxy_from: Some(vec![]),
            state: Some(ListenerState::Serving),
        }
    }

    fn backend() -> BackendTraffic {
        BackendTraffic { pod: Some(String::new()), ejected_seconds: Some(1), ..BackendTraffic::default() }
    }

    fn choice() -> Choice {
        let address = ([10, 0, 0, 1], 1).into();
        let (family, scope, rule) = (Family::V4, Scope::Cluster, Rule::Ready);
        Choice { family, scope, rule, next: Some(address), pin: None, endpoints: vec![judged()] }
    }

    fn judged() -> Judged {
        let (address, unused) = (([10, 0, 0, 1], 1).into(), Some(Unused::NotReady));
        Judged { address, pod: Some(String::new()), unused, ejected_seconds: Some(1) }
    }

    fn happened() -> Happened {
        Happened { at: String::new(), service: String::new(), what: String::new() }
    }

    fn problem() -> Problem {
        Problem {
            file: Some(String::new()),
            line: Some(1),
            column: Some(1),
            ..Problem::error("Service default/web", "decode", "odd")
        }
    }

    #[test]
    fn given_each_shape_when_the_page_reads_it_then_all_that_it_names_is_there() {
        for (shape, fields) in shapes() {
            let read = read_by_the_page(shape);

            assert!(!read.is_empty(), "the page reads nothing of {shape}");
            let missing: Vec<_> = read.difference(&fields).collect();
            assert!(missing.is_empty(), "{shape} has no {missing:?}, but {fields:?}");
        }
    }

    #[test]
    fn given_the_page_when_read_then_it_takes_nothing_from_elsewhere_and_makes_no_markup_of_text() {
        for word in ["http:", "https:", "//cdn", "@import", "url("] {
            let used = PAGE.replace("http://www.w3.org/2000/svg", "");
            assert!(!used.contains(word), "{word}");
        }
        for word in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "srcdoc", " style=\""] {
            assert!(!PAGE.contains(word), "{word}");
        }
    }

    #[test]
    fn given_an_answer_when_made_then_style_and_script_alone_know_its_number() {
        assert_eq!(PAGE.matches(NONCE).count(), 2);
        assert!(PAGE.contains("<style nonce=\"@NONCE@\">") && PAGE.contains("<script nonce=\"@NONCE@\">"));

        let policy = answer().headers()[CONTENT_SECURITY_POLICY].to_str().expect("text").to_owned();

        let nonce = policy.split("'nonce-").nth(1).and_then(|rest| rest.split('\'').next()).expect("a nonce");
        assert_eq!(nonce.len(), 32, "{policy}");
        assert!(!policy.contains("unsafe"), "{policy}");
    }
}
