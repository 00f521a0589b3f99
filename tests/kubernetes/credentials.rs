//! Who we are to the server: credentials that are replaced while the relay runs, and none at all.

use std::fs;

use kube_relay::api_client::{Api, ApiOptions};
use kube_relay::stats::WatchFailure;
use serde_json::{Value, json};

use crate::log::Log;
use crate::stage::{Setup, Stage, api_address, slice, web};
use crate::support::api_server::ApiServer;
use crate::support::site::Site;

/// A server that wants to see a token, with the Service `web`.
async fn guarded(site: Site) -> ApiServer {
    let server = ApiServer::start(api_address(site)).await;
    server.expect_token("first");
    server.put("services", web(site));
    server.put("endpointslices", slice("web-1", &[site.backend(1)]));
    server
}

/// Kinds that were refused.
fn refusals(stage: &Stage) -> usize {
    stage.status().contact.failures().filter(|(_, reason, _)| *reason == WatchFailure::Forbidden).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_credentials_that_are_replaced_when_watches_begin_again_then_they_have_the_new_ones_at_once() {
    let site = Site::new(73);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let setup = Setup { kubeconfig_in: Some(folder.path().to_owned()), ..Setup::default() };
    let mut stage = Stage::following_with(site, guarded(site).await, setup).await;
    stage.until_backends(&[site.backend(1)]).await;
    let kinds = ["services", "endpointslices", "nodes"];
    stage.until("watches", |_| kinds.iter().all(|kind| stage.server.count(kind, true) > 0)).await;

    stage.server.expect_token("second");
    fs::write(folder.path().join("config"), stage.server.kubeconfig()).expect("the test's folder can be written");
    stage.server.cut().await;
    stage.server.put("endpointslices", slice("web-1", &[site.backend(2)]));

    stage.until_backends(&[site.backend(2)]).await;
    assert_eq!(refusals(&stage), 0, "nobody showed the old ones");
}

/// A kubeconfig whose token a plugin reads from a file. It says of no end.
fn with_plugin(kubeconfig: &str, token_file: &str) -> String {
    let mut kubeconfig: Value = serde_json::from_str(kubeconfig).expect("JSON");
    kubeconfig["users"][0]["user"] = json!({"exec": {
        "apiVersion": "client.authentication.k8s.io/v1", "command": "/bin/cat", "args": [token_file],
        "interactiveMode": "Never",
    }});
    kubeconfig.to_string()
}

fn credential(token: &str) -> String {
    json!({
        "apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": token},
    })
    .to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_token_that_is_refused_when_a_plugin_has_another_then_it_is_asked_again() {
    let site = Site::new(74);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let token = folder.path().join("token");
    let setup = Setup { kubeconfig_in: Some(folder.path().to_owned()), ..Setup::default() };
    let server = guarded(site).await;
    fs::write(&token, credential("first")).expect("the test's folder can be written");
    let kubeconfig = with_plugin(&server.kubeconfig(), &token.display().to_string());
    let mut stage = Stage::following_by(site, server, &kubeconfig, setup).await;
    stage.until_backends(&[site.backend(1)]).await;

    fs::write(&token, credential("second")).expect("the test's folder can be written");
    stage.server.expect_token("second");
    stage.server.cut().await;
    stage.server.put("endpointslices", slice("web-1", &[site.backend(2)]));

    stage.until_backends(&[site.backend(2)]).await;
    assert!(refusals(&stage) > 0, "nobody says beforehand that a token is not taken any more");
    stage.until("contact", |status| status.contact.is_connected()).await;
}

/// On one thread, so that all it logs is seen.
#[tokio::test]
async fn given_a_server_by_address_alone_when_there_is_no_service_account_then_the_log_says_that_nobody_asks() {
    let (log, _logging) = Log::of_this_thread();

    let api = Api::find(&ApiOptions { kubeconfig: None, master: Some("https://127.0.0.1:1".into()) }).await;

    assert_eq!(api.expect("a server").server(), "https://127.0.0.1:1");
    let told = log.lines_with("is asked without credentials");
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains(" WARN ") && told[0].contains("https://127.0.0.1:1"), "{told:?}");
}
