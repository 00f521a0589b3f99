//! The API server: whether it is reached, what it offers, and whether it permits exactly what a relay asks of it.
//!
//! Nothing is written there: an access review is a question, and is not kept.

use std::collections::BTreeMap;
use std::time::Duration;

use hyper::Request;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use kube::api::PostParams;
use kube::{Api as Resources, Client};
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use super::fact::{Fact, Unreadable};
use super::finding::{Finding, Subject};
use crate::api_client::{Api, ApiOptions};
use crate::causes::causes;
use crate::config::PlanConfig;
use crate::decode::{Kind, Observed};
use crate::host::Host;
use crate::host_watch::Hosts;
use crate::model::{Event, Model, Objects};
use crate::own_node::OwnNode;
use crate::place::Place;
use crate::plan::Plan;
use crate::status::Report;

const SUBJECT: Subject = Subject::Api;
/// From a question to its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// From the first question to the last answer: a server that answers some and hangs at others holds nobody for longer.
const ALL_PATIENCE: Duration = Duration::from_secs(20);
/// The grant that a relay needs, as a manifest.
const ROLE: &str = "examples/kubernetes/base/rbac.yaml";

/// Verbs that a relay uses on a resource, and what becomes of it without them.
#[derive(Debug)]
pub(super) struct Need {
    verbs: &'static [&'static str],
    group: &'static str,
    resource: &'static str,
    without: &'static str,
    finding: fn(Subject, String) -> Finding,
}

const SERVICES: Need = Need {
    verbs: &["list", "watch"],
    group: "",
    resource: "services",
    without: "no Service is served",
    finding: Finding::error,
};
const SLICES: Need = Need {
    verbs: &["list", "watch"],
    group: "discovery.k8s.io",
    resource: "endpointslices",
    without: "no backend is known",
    finding: Finding::error,
};
/// In place of slices, before 1.21.
const ENDPOINTS: Need = Need { group: "", resource: "endpoints", ..SLICES };
const NODES: Need = Need {
    verbs: &["list", "watch"],
    group: "",
    resource: "nodes",
    without: "zone, addresses and pod networks of this node are unknown, and /healthz answers 503",
    finding: Finding::warning,
};
const EVENTS: Need = Need {
    verbs: &["create", "patch"],
    group: "events.k8s.io",
    resource: "events",
    without: "what is wrong is told in log and status alone",
    finding: Finding::note,
};
/// Events on a Service carry its UID.
const UIDS: Need =
    Need { verbs: &["get"], without: "no Event on a Service is made", finding: Finding::note, ..SERVICES };

/// What the server has answered.
#[derive(Debug)]
pub(super) struct Facts {
    /// Its address.
    server: String,
    /// `v1.33.2`.
    version: String,
    /// False before 1.21.
    has_slices: Fact<bool>,
    /// For each need, the verbs that are refused.
    refused: Vec<(&'static Need, Fact<Vec<&'static str>>)>,
    /// All of them, as they are written.
    pub(super) services: Fact<Vec<Value>>,
    /// The Node that this is, if there is one.
    node_name: String,
    node: Fact<Option<Value>>,
    /// Policies of all namespaces.
    pub(super) policies: Fact<Vec<Value>>,
    /// The settings of Cilium, where they were asked for and there are some.
    pub(super) cilium: Option<BTreeMap<String, String>>,
}

/// Asks a server. Cilium's settings are asked for where it was seen.
///
/// # Errors
/// Where it is not known whom to ask, or nobody answers.
pub(super) async fn read(server: &ApiOptions, node_name: String, has_cilium: bool) -> Fact<Facts> {
    let unreadable = |error: &dyn std::error::Error| Unreadable::new("API server", causes(error));
    let api = Api::find(server).await.map_err(|error| unreadable(&error))?;
    let client = api.plain_client().map_err(|error| unreadable(&error))?;
    let asked = Asked { server: api.server(), client, deadline: Deadline::from(Instant::now()) };
    let version = asked.get("/version").await?;
    let has_slices = asked.has_slices().await;
    let endpoints = if has_slices == Ok(false) { &ENDPOINTS } else { &SLICES };
    let mut refused = Vec::new();
    for need in [&SERVICES, endpoints, &NODES, &EVENTS, &UIDS] {
        refused.push((need, asked.refused(need).await));
    }
    let nodes = asked.items(&format!("/api/v1/nodes?fieldSelector=metadata.name%3D{node_name}")).await;
    let cilium = if has_cilium { asked.cilium().await } else { None };
    Ok(Facts {
        version: version["gitVersion"].as_str().unwrap_or("of an unknown version").to_owned(),
        has_slices,
        refused,
        services: asked.items("/api/v1/services").await,
        node: nodes.map(|nodes| nodes.into_iter().next()),
        node_name,
        policies: asked.items("/apis/networking.k8s.io/v1/networkpolicies").await,
        cilium,
        server: asked.server,
    })
}

/// A server that is asked.
struct Asked {
    server: String,
    client: Client,
    deadline: Deadline,
}

/// When the last question has to be answered.
struct Deadline(Instant);

impl Deadline {
    fn from(start: Instant) -> Self {
        Self(start + ALL_PATIENCE)
    }

    /// Waits for one answer, for as long as there is time; then tells how long that was.
    async fn wait<T>(&self, answer: impl Future<Output = T>) -> Result<T, String> {
        let own = Instant::now() + PATIENCE;
        timeout_at(own.min(self.0), answer).await.map_err(|_| match own <= self.0 {
            true => format!("no answer within {} s", PATIENCE.as_secs()),
            false => format!("no answer within the {} s for all questions", ALL_PATIENCE.as_secs()),
        })
    }
}

impl Asked {
    async fn get(&self, path: &str) -> Fact<Value> {
        let request = Request::get(path).body(Vec::new()).map_err(|error| self.unreadable(path, error))?;
        self.within(path, self.client.request(request)).await
    }

    async fn within<T>(&self, what: &str, answer: impl Future<Output = kube::Result<T>>) -> Fact<T> {
        match self.deadline.wait(answer).await {
            Ok(answer) => answer.map_err(|error| self.unreadable(what, causes(&error))),
            Err(late) => Err(self.unreadable(what, late)),
        }
    }

    fn unreadable(&self, what: &str, why: impl ToString) -> Unreadable {
        let path = what.split('?').next().unwrap_or_default();
        Unreadable::new(format!("{}{path}", self.server), why)
    }

    async fn items(&self, path: &str) -> Fact<Vec<Value>> {
        match self.get(path).await?["items"].take() {
            Value::Array(items) => Ok(items),
            _ => Err(self.unreadable(path, "no list")),
        }
    }

    async fn has_slices(&self) -> Fact<bool> {
        let groups = self.within("/apis", self.client.list_api_groups()).await?.groups;
        let mut versions = groups.iter().filter(|group| group.name == SLICES.group).flat_map(|group| &group.versions);
        Ok(versions.any(|version| version.version == "v1"))
    }

    async fn refused(&self, need: &Need) -> Fact<Vec<&'static str>> {
        let mut refused = Vec::new();
        for verb in need.verbs {
            let attributes = ResourceAttributes {
                group: Some(need.group.to_owned()),
                resource: Some(need.resource.to_owned()),
                verb: Some((*verb).to_owned()),
                ..ResourceAttributes::default()
            };
            let spec = SelfSubjectAccessReviewSpec {
                resource_attributes: Some(attributes),
                ..SelfSubjectAccessReviewSpec::default()
            };
            let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
            let reviews: Resources<SelfSubjectAccessReview> = Resources::all(self.client.clone());
            let how = PostParams::default();
            let answer = self.within("/apis/authorization.k8s.io/v1", reviews.create(&how, &review));
            if !answer.await?.status.is_some_and(|status| status.allowed) {
                refused.push(*verb);
            }
        }
        Ok(refused)
    }

    async fn cilium(&self) -> Option<BTreeMap<String, String>> {
        let mut config = self.get("/api/v1/namespaces/kube-system/configmaps/cilium-config").await.ok()?;
        serde_json::from_value(config["data"].take()).ok()
    }
}

impl Facts {
    /// The Node, as far as a relay reads it.
    pub(super) fn node(&self) -> Option<OwnNode> {
        self.node.as_ref().ok()?.as_ref().map(OwnNode::of)
    }

    /// What a relay would serve of these Services on this machine; their backends are of no concern here.
    pub(super) fn plan(&self, plan: &PlanConfig, host: Host) -> Option<Report> {
        let observed = self.services.as_ref().ok()?.iter().flat_map(|item| Observed::deserialize(item, Kind::Service));
        let mut objects = Objects::default();
        observed.filter_map(|observed| observed.content).for_each(|content| objects.add(&content));
        let place = Place { plan: plan.clone(), hosts: Hosts::fixed(host) };
        let options = self.node().unwrap_or_default().setting(&place).plan;
        let (mut model, mut planned, mut dirty) = (Model::default(), Plan::default(), Default::default());
        model.apply(Event::Replace(objects), &mut dirty);
        planned.update(&model, &dirty, &options);
        Some(Report::of(&model, &planned, Vec::new()))
    }
}

pub(super) fn judge(facts: &Fact<Facts>) -> Vec<Finding> {
    let facts = match facts {
        Ok(facts) => facts,
        Err(why) => {
            let remedy = "is it up, and --kubeconfig or --master right? In place of kube-proxy the server's own address is needed, not its ClusterIP";
            return vec![Finding::error(SUBJECT, why.to_string()).remedy(remedy)];
        }
    };
    let mut findings = vec![Finding::ok(SUBJECT, format!("{} answers ({})", facts.server, facts.version))];
    findings.push(match &facts.has_slices {
        Ok(true) => Finding::ok(SUBJECT, "it has EndpointSlices (discovery.k8s.io/v1)"),
        Ok(false) => Finding::note(SUBJECT, "it has no EndpointSlices (before 1.21): Endpoints are read instead"),
        Err(why) => Finding::unknown(SUBJECT, why),
    });
    findings.extend(facts.refused.iter().map(|(need, refused)| judge_need(need, refused)));
    findings.push(judge_node(facts));
    findings
}

fn judge_need(need: &Need, refused: &Fact<Vec<&'static str>>) -> Finding {
    let Need { group, resource, .. } = need;
    let full = if group.is_empty() { (*resource).to_owned() } else { format!("{resource}.{group}") };
    let refused = match refused {
        Ok(refused) if refused.is_empty() => {
            return Finding::ok(SUBJECT, format!("it permits to {} {full}", need.verbs.join(", ")));
        }
        Ok(refused) => refused,
        Err(why) => return Finding::unknown(SUBJECT, why),
    };
    let message = format!("it does not permit to {} {full}: {}", refused.join(", "), need.without);
    (need.finding)(SUBJECT, message).remedy(format!(
        "in the account's ClusterRole `- {{apiGroups: [\"{group}\"], resources: [{resource}], verbs: [{}]}}`, as in {ROLE}",
        refused.join(", ")
    ))
}

fn judge_node(facts: &Facts) -> Finding {
    match &facts.node {
        Ok(Some(_)) => Finding::ok(SUBJECT, format!("this machine is its Node {}", facts.node_name)),
        Ok(None) => Finding::warning(
            SUBJECT,
            format!(
                "it has no Node {:?}: zone and pod networks are unknown, and /healthz answers 503",
                facts.node_name
            ),
        )
        .remedy("--node-name with the name that `kubectl get nodes` shows"),
        Err(why) => Finding::unknown(SUBJECT, why),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::finding::Grade;
    use super::*;
    use crate::cli::{Cli, Command};
    use crate::config::RunConfig;

    fn facts() -> Facts {
        Facts {
            server: "https://192.0.2.1:6443".into(),
            version: "v1.33.2".into(),
            has_slices: Ok(true),
            refused: vec![(&SERVICES, Ok(vec![])), (&SLICES, Ok(vec![]))],
            services: Ok(vec![]),
            node_name: "node-1".into(),
            node: Ok(Some(serde_json::json!({"metadata": {"name": "node-1"}}))),
            policies: Ok(vec![]),
            cilium: None,
        }
    }

    fn worst(facts: Facts) -> Finding {
        judge(&Ok(facts)).into_iter().max_by_key(|finding| finding.grade).expect("a finding")
    }

    #[test]
    fn given_a_server_that_permits_all_when_judged_then_all_is_fine() {
        assert_eq!(worst(facts()).grade, Grade::Ok);
    }

    #[test]
    fn given_refused_verbs_when_judged_then_the_rule_to_add_is_told() {
        let refused = vec![(&SERVICES, Ok(vec![])), (&SLICES, Ok(vec!["watch"]))];

        let found = worst(Facts { refused, ..facts() });

        assert_eq!(found.grade, Grade::Error);
        assert_eq!(found.message, "it does not permit to watch endpointslices.discovery.k8s.io: no backend is known");
        let remedy = found.remedy.expect("a remedy");
        let rule = "`- {apiGroups: [\"discovery.k8s.io\"], resources: [endpointslices], verbs: [watch]}`";
        assert!(remedy.contains(rule), "{remedy}");
    }

    #[test]
    fn given_no_events_no_node_or_no_slices_when_judged_then_it_is_no_error() {
        let events = worst(Facts { refused: vec![(&EVENTS, Ok(vec!["create", "patch"]))], ..facts() });
        let node = worst(Facts { node: Ok(None), ..facts() });
        let old = worst(Facts { has_slices: Ok(false), ..facts() });

        assert_eq!((events.grade, node.grade, old.grade), (Grade::Note, Grade::Warning, Grade::Note));
        assert!(node.message.contains("no Node \"node-1\""), "{node:?}");
    }

    #[test]
    fn given_questions_without_an_answer_when_judged_then_the_rest_is_told_all_the_same() {
        let unread = || Unreadable::new("x", "y");
        let facts = Facts {
            refused: vec![(&SERVICES, Err(unread()))],
            node: Err(unread()),
            has_slices: Err(unread()),
            ..facts()
        };

        let grades: Vec<_> = judge(&Ok(facts)).into_iter().map(|finding| finding.grade).collect();

        assert_eq!(grades, [Grade::Ok, Grade::Note, Grade::Note, Grade::Note]);
        assert_eq!(judge(&Err(unread()))[0].grade, Grade::Error);
    }

    #[tokio::test(start_paused = true)]
    async fn given_a_server_that_hangs_when_asked_again_and_again_then_all_questions_end_together() {
        let (start, mut waited, mut told) = (Instant::now(), Vec::new(), Vec::new());
        let deadline = Deadline::from(start);

        for _ in 0..4 {
            told.push(deadline.wait(std::future::pending::<()>()).await.expect_err("it never answers"));
            waited.push(start.elapsed());
        }

        assert!(waited[0] >= PATIENCE && waited[0] < ALL_PATIENCE, "{waited:?}");
        assert!(waited[3] >= ALL_PATIENCE && waited[3] < ALL_PATIENCE + Duration::from_secs(1), "{waited:?}");
        assert_eq!(told[0], "no answer within 10 s");
        assert_eq!(told[3], "no answer within the 20 s for all questions");
        assert_eq!(deadline.wait(async { 7 }).await, Ok(7), "what is there already is taken");
    }

    #[test]
    fn given_services_as_a_server_writes_them_when_planned_then_their_addresses_are_known() {
        let service = serde_json::json!({"metadata": {"name": "web", "namespace": "default", "resourceVersion": "1"},
            "spec": {"type": "ClusterIP", "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ipFamilies": ["IPv4"],
            "ports": [{"port": 80, "protocol": "TCP", "targetPort": 8080}]}});
        let odd = serde_json::json!({"metadata": {"name": "odd"}, "spec": 7});
        let facts = Facts { services: Ok(vec![service, odd]), ..facts() };

        let report = facts.plan(&plan_config(), Host::loopback_only()).expect("Services are known");

        assert_eq!(report.services[0].ports[0].listeners[0].address, "10.96.0.10:80");
    }

    fn plan_config() -> PlanConfig {
        let line = ["kube-relay", "run", "--master", "192.0.2.1:6443"];
        match Cli::try_parse_from(line).expect("a command line").command {
            Command::Run(args) => RunConfig::try_from(*args).expect("a fine one").plan,
            other => panic!("not run: {other:?}"),
        }
    }
}
