//! What `kube-relay doctor` asks of an API server, and makes of its answers.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tokio::task::spawn_blocking;

use crate::stage::{api_address, node, web};
use crate::support::api_server::ApiServer;
use crate::support::site::Site;

/// All findings of a doctor that asks the server of this kubeconfig. Its own machine is not looked at here.
async fn findings(kubeconfig: &Path) -> Vec<Value> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
    command.args(["doctor", "-o", "json", "--status-bind-address", "none", "--node-name", "node-1", "--kubeconfig"]);
    command.arg(kubeconfig).env_clear().stdin(Stdio::null());
    let output = spawn_blocking(move || command.output()).await.expect("it does not panic").expect("the doctor comes");
    let mut said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    said["findings"].as_array_mut().map(std::mem::take).expect("a list")
}

/// Asks a server.
async fn examined(server: &ApiServer) -> Vec<Value> {
    let file = tempfile::NamedTempFile::new().expect("a file can be made");
    std::fs::write(file.path(), server.kubeconfig()).expect("it can be written");
    findings(file.path()).await
}

/// The messages about a subject with a severity.
fn about<'f>(findings: &'f [Value], subject: &str, severity: &str) -> Vec<&'f str> {
    let of = findings.iter().filter(|found| found["subject"] == subject && found["severity"] == severity);
    of.filter_map(|found| found["message"].as_str()).collect()
}

#[tokio::test]
async fn given_a_server_that_permits_all_when_the_doctor_asks_then_it_asks_for_what_a_relay_needs_and_writes_nothing() {
    let site = Site::new(84);
    let server = ApiServer::start(api_address(site)).await;
    server.put("services", web(site));
    server.put("nodes", node([192, 0, 2, 5].into(), &[]));

    let found = examined(&server).await;

    let fine = about(&found, "api", "ok");
    assert!(fine.iter().any(|message| message.contains("answers (v1.33.2)")), "{fine:?}");
    for permitted in [
        "it permits to list, watch services",
        "it permits to list, watch endpointslices.discovery.k8s.io",
        "it permits to list, watch nodes",
        "it permits to create, patch events.events.k8s.io",
        "it permits to get services",
    ] {
        assert!(fine.contains(&permitted), "{permitted} in {fine:?}");
    }
    let fine_policies = about(&found, "network-policies", "ok");
    assert_eq!(fine_policies.len(), 1, "{found:?}");
    let written: BTreeSet<_> = server
        .asked()
        .into_iter()
        .filter(|asked| asked.verb != "list")
        .map(|asked| (asked.verb, asked.resource))
        .collect();
    assert_eq!(written, [("create", "selfsubjectaccessreviews".to_owned())].into(), "reviews are questions");
}

#[tokio::test]
async fn given_refused_verbs_when_the_doctor_asks_then_each_is_told_with_what_follows() {
    let site = Site::new(97);
    let server = ApiServer::start(api_address(site)).await;
    server.deny("watch", "endpointslices");
    server.deny("create", "events");
    server.forbid("networkpolicies");

    let found = examined(&server).await;

    let error = "it does not permit to watch endpointslices.discovery.k8s.io: no backend is known";
    assert_eq!(about(&found, "api", "error"), [error]);
    let note = "it does not permit to create events.events.k8s.io: what is wrong is told in log and status alone";
    assert!(about(&found, "api", "note").contains(&note), "{found:?}");
    assert!(about(&found, "api", "warning")[0].starts_with("it has no Node \"node-1\""), "{found:?}");
    let unknown = about(&found, "network-policies", "note");
    assert!(unknown.len() == 1 && unknown[0].starts_with("not known: http://"), "{unknown:?}");
}

#[tokio::test]
async fn given_an_old_server_when_the_doctor_asks_then_endpoints_are_what_it_needs() {
    let site = Site::new(98);
    let server = ApiServer::start(api_address(site)).await;
    server.unknown("endpointslices");
    server.deny("list", "endpoints");

    let found = examined(&server).await;

    assert_eq!(about(&found, "api", "error"), ["it does not permit to list endpoints: no backend is known"]);
    assert!(about(&found, "api", "note").iter().any(|message| message.contains("before 1.21")), "{found:?}");
}

#[tokio::test]
async fn given_a_policy_by_pods_when_it_guards_a_service_then_the_nodes_address_is_the_remedy() {
    let site = Site::new(99);
    let server = ApiServer::start(api_address(site)).await;
    let mut service = web(site);
    service["spec"]["selector"] = json!({"app": "web"});
    server.put("services", service);
    server.put("nodes", node([192, 0, 2, 5].into(), &[]));
    let from = json!([{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]}]);
    let policy =
        json!({"metadata": {"name": "clients", "namespace": "default"}, "spec": {"podSelector": {}, "ingress": from}});
    server.put("networkpolicies", policy);

    let found = examined(&server).await;

    let policy = found.iter().find(|found| found["subject"] == "network-policies").expect("a finding");
    let told = "NetworkPolicy default/clients (Service default/web) admits clients by their pods";
    assert!(policy["message"].as_str().is_some_and(|message| message.starts_with(told)), "{policy}");
    assert!(
        policy["remedy"].as_str().is_some_and(|remedy| remedy.contains("{ipBlock: {cidr: 192.0.2.5/32}}")),
        "{policy}"
    );
}

#[tokio::test]
async fn given_a_server_that_is_away_when_the_doctor_asks_then_that_is_an_error_and_the_machine_is_judged_all_the_same()
{
    let site = Site::new(90);
    let mut server = ApiServer::start(api_address(site)).await;
    server.stop().await;

    let found = examined(&server).await;

    let away = about(&found, "api", "error");
    assert!(away.len() == 1 && away[0].contains("/version: "), "{away:?}");
    assert!(found.iter().any(|found| found["subject"] == "kernel"), "{found:?}");
}
