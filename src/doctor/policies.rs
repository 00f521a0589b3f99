//! NetworkPolicies that admit clients by what they are, while a relay's backends see the node's address. Pure: objects as
//! the API server writes them.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::fact::Fact;
use super::finding::{Abridged, Finding, Subject};

const SUBJECT: Subject = Subject::NetworkPolicies;

/// `node` are the addresses that backends see.
pub(super) fn judge(policies: &Fact<Vec<Value>>, services: &Fact<Vec<Value>>, node: &[IpAddr]) -> Finding {
    let (policies, services) = match (policies, services) {
        (Ok(policies), Ok(services)) => (policies, services),
        (Err(why), _) | (_, Err(why)) => return Finding::unknown(SUBJECT, why),
    };
    let in_the_way: Vec<String> = policies
        .iter()
        .filter(|policy| !admits(policy, node))
        .filter_map(|policy| Some(format!("{} (Service {})", name(policy), name(concerned(policy, services)?))))
        .collect();
    if in_the_way.is_empty() {
        return Finding::ok(SUBJECT, "no NetworkPolicy tells clients apart that come through this node");
    }
    let node: Vec<String> = node.iter().map(|ip| format!("{{ipBlock: {{cidr: {}}}}}", IpNet::from(*ip))).collect();
    let (these, admit) = (Abridged(&in_the_way), if in_the_way.len() == 1 { "admits" } else { "admit" });
    let message =
        format!("NetworkPolicy {these} {admit} clients by their pods, and sees this node's address in place of theirs");
    let remedy = format!("admit each node that runs kube-relay, under `ingress[].from`: `[{}]`", node.join(", "));
    Finding::warning(SUBJECT, message).remedy(remedy)
}

fn name(object: &Value) -> String {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
    format!("{}/{}", text("namespace"), text("name"))
}

/// True where a policy leaves clients alone, refuses each of them, or admits the node itself.
fn admits(policy: &Value, node: &[IpAddr]) -> bool {
    let spec = &policy["spec"];
    let types = items(&spec["policyTypes"]);
    if types.clone().next().is_some() && !types.clone().any(|kind| kind == "Ingress") {
        return true;
    }
    let rules = || items(&spec["ingress"]);
    let everybody = |rule: &Value| items(&rule["from"]).next().is_none();
    let is_node = |peer: &Value| {
        let net = peer["ipBlock"]["cidr"].as_str().and_then(|cidr| cidr.parse::<IpNet>().ok());
        net.is_some_and(|net| node.iter().any(|ip| net.contains(ip)))
    };
    rules().next().is_none() || rules().any(|rule| everybody(rule) || items(&rule["from"]).any(is_node))
}

/// A Service whose pods, each of them, the policy is for.
fn concerned<'s>(policy: &Value, services: &'s [Value]) -> Option<&'s Value> {
    let selector = &policy["spec"]["podSelector"];
    services.iter().find(|service| {
        let labels = &service["spec"]["selector"];
        let selects = labels.as_object().is_some_and(|labels| !labels.is_empty());
        selects && service["metadata"]["namespace"] == policy["metadata"]["namespace"] && matches(selector, labels)
    })
}

/// Whether a selector takes a pod that has these labels, and may have more.
fn matches(selector: &Value, labels: &Value) -> bool {
    let equal = selector["matchLabels"].as_object().into_iter().flatten();
    let expressions = items(&selector["matchExpressions"]);
    equal.into_iter().all(|(key, value)| labels[key] == *value) && expressions.into_iter().all(|one| holds(one, labels))
}

fn holds(expression: &Value, labels: &Value) -> bool {
    let label = &labels[expression["key"].as_str().unwrap_or_default()];
    let listed = || items(&expression["values"]).any(|value| value == label);
    match expression["operator"].as_str() {
        Some("In") => listed(),
        Some("NotIn") => !listed(),
        Some("Exists") => !label.is_null(),
        Some("DoesNotExist") => label.is_null(),
        _ => false,
    }
}

fn items(list: &Value) -> impl Iterator<Item = &Value> + Clone {
    list.as_array().map(Vec::as_slice).unwrap_or_default().iter()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::fact::Unreadable;
    use super::super::finding::Grade;
    use super::*;

    const NODE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 5));

    fn judged(spec: Value) -> Finding {
        let policy = json!({"metadata": {"name": "db-clients", "namespace": "shop"}, "spec": spec});
        let service = |namespace: &str, selector: Value| json!({"metadata": {"name": "db", "namespace": namespace}, "spec": {"selector": selector}});
        let services = vec![
            service("other", json!({"app": "db"})),
            service("shop", json!({"app": "db", "tier": "1"})),
            service("shop", json!(null)),
        ];
        judge(&Ok(vec![policy]), &Ok(services), &[NODE])
    }

    fn from_pods() -> Value {
        json!([{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}]}])
    }

    #[test]
    fn given_a_policy_by_labels_when_its_pods_are_behind_a_service_then_the_nodes_address_is_to_be_admitted() {
        let found = judged(json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": from_pods()}));

        assert_eq!(found.grade, Grade::Warning);
        assert!(found.message.starts_with("NetworkPolicy shop/db-clients (Service shop/db) admits"), "{found:?}");
        assert!(found.remedy.expect("a remedy").contains("`[{ipBlock: {cidr: 192.0.2.5/32}}]`"));
    }

    #[test]
    fn given_selectors_when_judged_then_pods_of_the_service_alone_count() {
        let grade = |selector: Value| judged(json!({"podSelector": selector, "ingress": from_pods()})).grade;
        let expression =
            |operator: &str| json!({"matchExpressions": [{"key": "app", "operator": operator, "values": ["db"]}]});

        assert_eq!(grade(json!({})), Grade::Warning, "all pods of the namespace");
        assert_eq!(grade(json!({"matchLabels": {"app": "web"}})), Grade::Ok);
        for (operator, expected) in [
            ("In", Grade::Warning),
            ("NotIn", Grade::Ok),
            ("Exists", Grade::Warning),
            ("DoesNotExist", Grade::Ok),
            ("Odd", Grade::Ok),
        ] {
            assert_eq!(grade(expression(operator)), expected, "{operator}");
        }
    }

    #[test]
    fn given_policies_that_do_not_tell_clients_apart_when_judged_then_they_are_fine() {
        let node = json!({"ipBlock": {"cidr": "192.0.2.0/24"}});
        let cases = [
            json!({"podSelector": {}, "policyTypes": ["Egress"], "ingress": from_pods()}),
            json!({"podSelector": {}, "policyTypes": ["Ingress"]}),
            json!({"podSelector": {}, "ingress": [{}]}),
            json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}, node]}]}),
            json!(7),
        ];

        for spec in cases {
            assert_eq!(judged(spec.clone()).grade, Grade::Ok, "{spec}");
        }
    }

    #[test]
    fn given_policies_that_may_not_be_read_when_judged_then_that_is_said() {
        assert_eq!(judge(&Err(Unreadable::new("x", "y")), &Ok(vec![]), &[]).grade, Grade::Note);
    }
}
