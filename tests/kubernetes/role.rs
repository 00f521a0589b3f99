//! What the role of `examples/kubernetes` grants, beside what the relay asks its server for: no more, and no less.

use std::collections::BTreeSet;
use std::fs;

use k8s_openapi::api::rbac::v1::ClusterRole;
use serde_json::{Value, json};

use crate::events::rival;
use crate::stage::{Stage, api_address, node, web};
use crate::support::api_server::ApiServer;
use crate::support::site::Site;

/// Group, resource and verb.
type Calls = BTreeSet<(String, String, String)>;

fn granted() -> Calls {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/kubernetes/base/rbac.yaml");
    let text = fs::read_to_string(path).expect("a file of this repository");
    let role = text.split("\n---\n").find(|document| document.contains("kind: ClusterRole\n")).expect("a role");
    let role: Value = serde_saphyr::from_str(role).expect("YAML");
    let role: ClusterRole = serde_json::from_value(role).expect("a role");
    let mut granted = Calls::new();
    for rule in role.rules.into_iter().flatten() {
        for group in rule.api_groups.iter().flatten() {
            for resource in rule.resources.iter().flatten() {
                granted.extend(rule.verbs.iter().map(|verb| (group.clone(), resource.clone(), verb.clone())));
            }
        }
    }
    granted
}

/// All but what every account may ask for: which groups there are (`/apis`).
fn asked(server: &ApiServer) -> Calls {
    let asked = server.asked().into_iter().filter(|asked| asked.resource != "apis");
    asked.map(|asked| (asked.group, asked.resource, asked.verb.to_owned())).collect()
}

/// True once each of these kinds is watched.
fn watched(server: &ApiServer, kinds: [&str; 3]) -> bool {
    kinds.iter().all(|kind| server.count(kind, true) > 0)
}

/// A server with a Service and a Node.
async fn server(site: Site) -> ApiServer {
    let server = ApiServer::start(api_address(site)).await;
    server.put("services", web(site));
    server.put("nodes", node(site.node_ip(), &[]));
    server
}

/// What is asked of a server of today, from the first list to an Event that is told and told again.
async fn asked_of_a_new_server(site: Site) -> Calls {
    let stage = Stage::following(site, server(site).await).await;
    stage.server.put("services", rival(site));
    stage.until("an Event", |_| stage.of_rival().len() == 1).await;
    stage.end_conflict(1).await;
    stage.server.put("services", rival(site));
    stage.until("its count", |_| stage.server.count_of("events", "patch") == 1).await;
    stage.until("watches", |_| watched(&stage.server, ["services", "endpointslices", "nodes"])).await;
    asked(&stage.server)
}

/// What is asked of a server that has Endpoints alone.
async fn asked_of_an_old_server(site: Site) -> Calls {
    let server = server(site).await;
    server.unknown("endpointslices");
    server.put("endpoints", json!({"metadata": {"name": "web"}, "subsets": null}));
    let stage = Stage::following(site, server).await;
    stage.until("watches", |_| watched(&stage.server, ["services", "endpoints", "nodes"])).await;
    asked(&stage.server)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_all_that_is_asked_of_new_and_old_servers_when_compared_with_the_role_then_it_grants_exactly_that() {
    let mut asked = asked_of_a_new_server(Site::new(46)).await;
    asked.append(&mut asked_of_an_old_server(Site::new(87)).await);

    assert_eq!(asked, granted());
}
