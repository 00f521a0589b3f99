//! The static source: formats, reload, and what is said about mistakes.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;

use kube_relay::control::RelayOptions;
use kube_relay::plan::Severity;

use crate::support::backend::Backend;
use crate::support::client;
use crate::support::manifest::Manifest;
use crate::support::relay::{Relay, picks, problems, replace, service_of};
use crate::support::site::{SERVICE_PORT, Site};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t228_given_a_served_manifest_when_it_is_replaced_by_rename_then_the_new_one_is_served() {
    let site = Site::new(228);
    let _running = [Backend::named(site.backend(1)).await, Backend::named(site.backend(2)).await];
    let manifest = Manifest::new(site).tcp();
    let relay = Relay::start(site, manifest.clone().endpoints([site.backend(1)])).await;

    relay.edit(manifest.endpoints([site.backend(2)]));
    relay.until_backends("web", &[site.backend(2)]).await;

    assert_eq!(client::ask(site.service()).await.expect("a backend answers"), site.backend(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t228_given_a_served_manifest_when_it_is_written_in_place_then_the_new_one_is_served() {
    let site = Site::new(11);
    let manifest = Manifest::new(site).tcp();
    let relay = Relay::start(site, manifest.clone().endpoints([site.backend(1)])).await;

    let text = manifest.endpoints([site.backend(2)]).to_string();
    fs::write(relay.folder().join("web.yaml"), text).expect("the test's folder can be written");

    relay.until_backends("web", &[site.backend(2)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t228_given_a_served_manifest_when_it_breaks_then_the_old_state_serves_and_the_line_is_shown_until_it_is_mended()
 {
    let site = Site::new(12);
    let _running = [Backend::named(site.backend(1)).await, Backend::named(site.backend(2)).await];
    let manifest = Manifest::new(site).tcp();
    let relay = Relay::start(site, manifest.clone().endpoints([site.backend(1)])).await;

    relay.edit("apiVersion: v1\nkind: Service\nmetadata: [oops\n");
    relay.until("the mistake to be shown", |status| !status.source.last_reload_successful).await;

    let status = relay.status();
    let problem =
        status.problems.iter().find(|problem| problem.severity == Severity::Error).expect("an error is shown");
    assert!(problem.file.as_deref().is_some_and(|file| file.ends_with("web.yaml")), "{problem:?}");
    assert!(problem.line.is_some_and(|line| (3..=4).contains(&line)), "{problem:?}");
    assert_eq!(client::ask(site.service()).await.expect("the old state serves"), site.backend(1));

    relay.edit(manifest.endpoints([site.backend(2)]));
    relay.until_backends("web", &[site.backend(2)]).await;
    relay.until("the mistake to be forgotten", |status| status.source.last_reload_successful).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f4_f20_given_one_bad_object_in_a_served_file_when_the_others_change_then_they_are_served_as_they_are_now() {
    let site = Site::new(50);
    let _running = [Backend::named(site.backend(1)).await, Backend::named(site.backend(2)).await];
    let at = |number| SocketAddr::new(site.client(number), SERVICE_PORT);
    let other = |name, number, backend| {
        let manifest = Manifest::new(site).named(name).cluster_ip(site.client(number)).tcp();
        format!("---\n{}", manifest.endpoints([site.backend(backend)]))
    };
    let web = Manifest::new(site).tcp().endpoints([site.backend(1)]).to_string();
    let bad = web.replacen("port: 8080", "port: eighty", 1);
    let relay = Relay::start(site, web.clone() + &other("moves", 1, 1) + &other("goes", 2, 1)).await;

    relay.edit(bad.clone() + &other("moves", 1, 2) + &other("comes", 3, 2));
    relay.until_backends("moves", &[site.backend(2)]).await;
    relay.until_backends("comes", &[site.backend(2)]).await;
    relay.until("the deletion", |status| service_of(status, "goes").is_none()).await;

    assert_eq!(client::ask(at(1)).await.expect("what changed is served"), site.backend(2));
    assert_eq!(client::ask(at(3)).await.expect("what was added is served"), site.backend(2));
    client::ask(at(2)).await.expect_err("what was deleted is gone");
    assert_eq!(client::ask(site.service()).await.expect("what is wrong stays as it was"), site.backend(1));
    relay.until("the mistake to be shown", |status| !status.source.last_reload_successful).await;
    let told = problems(&relay.status());
    assert!(told.contains("Service default/web: spec.ports[0].port: \"eighty\""), "{told}");
    assert!(told.contains("Service default/web: its last good version stays in use"), "{told}");

    relay.edit(bad + &other("moves", 1, 1));
    relay.until_backends("moves", &[site.backend(1)]).await;
    relay.until("another deletion", |status| service_of(status, "comes").is_none()).await;
    let status = relay.status();
    let counted: Vec<_> = status.source.rejections.iter().collect();
    assert_eq!(counted, [("Service", "decode", 1)], "it is wrong as before");

    relay.edit(web);
    relay.until("the mistake to be forgotten", |status| status.source.last_reload_successful).await;
    assert!(service_of(&relay.status(), "moves").is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t228_given_a_folder_like_a_mounted_config_map_when_its_link_is_swapped_then_the_new_state_is_served() {
    let site = Site::new(7);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let version = |name: &str, number: u8| {
        let path = folder.path().join(name);
        fs::create_dir(&path).expect("the test's folder can be written");
        replace(&path, "web.yaml", &Manifest::new(site).tcp().endpoints([site.backend(number)]).to_string());
    };
    version("..2026_01", 1);
    symlink("..2026_01", folder.path().join("..data")).expect("the test's folder can be written");
    symlink("..data/web.yaml", folder.path().join("web.yaml")).expect("the test's folder can be written");
    version("..2026_02", 2);
    let relay = Relay::start_in(site, folder, RelayOptions::default()).await;
    relay.until_backends("web", &[site.backend(1)]).await;

    let link = relay.folder().join("..data_tmp");
    symlink("..2026_02", &link).expect("the test's folder can be written");
    fs::rename(&link, relay.folder().join("..data")).expect("the test's folder can be written");

    relay.until_backends("web", &[site.backend(2)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t229_given_lists_and_documents_in_yaml_and_json_when_read_then_all_of_them_are_served() {
    let site = Site::new(229);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let cluster_ip = |number| site.client(number);
    let many = ["one", "two"].into_iter().zip(1..).map(|(name, number)| {
        let manifest = Manifest::new(site).named(name).cluster_ip(cluster_ip(number)).tcp();
        manifest.endpoints([site.backend(1)]).to_string()
    });
    replace(folder.path(), "documents.yaml", &many.collect::<Vec<_>>().join("---\n"));
    replace(folder.path(), "list.json", &list_in_json("three", &cluster_ip(3).to_string(), site));
    replace(folder.path(), "endpoints.yml", &service_with_endpoints("four", &cluster_ip(4).to_string(), site));
    replace(folder.path(), "README.md", "Not a manifest.");

    let relay = Relay::start_in(site, folder, RelayOptions::default()).await;

    let status = relay.status();
    for name in ["one", "two", "three", "four"] {
        assert_eq!(picks(&status, name), [site.backend(1).to_string()], "{name}: {}", problems(&status));
    }
}

fn list_in_json(name: &str, cluster_ip: &str, site: Site) -> String {
    let endpoint = site.backend(1);
    serde_json::json!({
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": name},
                "spec": {"clusterIP": cluster_ip, "ports": [{"port": 8080}]},
            },
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"name": format!("{name}-1"), "labels": {"kubernetes.io/service-name": name}},
                "addressType": "IPv4",
                "ports": [{"name": "", "port": endpoint.port()}],
                "endpoints": [{"addresses": [endpoint.ip()]}],
            },
        ],
    })
    .to_string()
}

/// Two objects of one name, as the API allows.
fn service_with_endpoints(name: &str, cluster_ip: &str, site: Site) -> String {
    let (ip, port) = (site.backend(1).ip(), site.backend(1).port());
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n\
         spec: {{clusterIP: {cluster_ip}, ports: [{{port: 8080}}]}}\n---\n\
         apiVersion: v1\nkind: Endpoints\nmetadata: {{name: {name}}}\n\
         subsets: [{{addresses: [{{ip: {ip}}}], ports: [{{port: {port}}}]}}]\n"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t230_given_a_misspelt_field_when_read_then_it_is_named_with_a_suggestion_and_the_rest_is_served() {
    let site = Site::new(230);
    let text = Manifest::new(site).tcp().endpoints([site.backend(1)]).to_string();

    let relay = Relay::start(site, text.replacen("targetPort:", "nodeport: 30999\n      targetPort:", 1)).await;

    let status = relay.status();
    assert_eq!(picks(&status, "web"), [site.backend(1).to_string()]);
    let warnings = problems(&status);
    assert!(warnings.contains("nodeport") && warnings.contains("nodePort"), "{warnings}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t230_given_a_value_of_the_wrong_type_when_read_then_its_path_is_named_and_the_other_objects_are_served() {
    let site = Site::new(8);
    let good = Manifest::new(site).tcp().endpoints([site.backend(1)]).to_string();
    let bad = Manifest::new(site).named("bad").cluster_ip(site.client(1)).tcp().to_string();

    let relay = Relay::start(site, good + "---\n" + &bad.replacen("port: 8080", "port: eighty", 1)).await;

    let status = relay.status();
    assert_eq!(picks(&status, "web"), [site.backend(1).to_string()]);
    assert!(service_of(&status, "bad").is_none_or(|service| service.report().ports.is_empty()));
    let errors = problems(&status);
    assert!(errors.contains("spec.ports[0].port") && errors.contains("eighty"), "{errors}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_two_services_on_one_address_when_served_then_one_wins_and_the_other_is_reported() {
    let site = Site::new(9);
    let _running = [Backend::named(site.backend(1)).await, Backend::named(site.backend(2)).await];
    let first = Manifest::new(site).named("first").tcp().endpoints([site.backend(1)]);
    let second = Manifest::new(site).named("second").tcp().endpoints([site.backend(2)]);
    let relay = Relay::start(site, format!("{first}---\n{second}")).await;

    let winner = client::ask(site.service()).await.expect("one of them is served");
    let status = relay.status();
    let conflict = status.problems.iter().find(|problem| problem.reason == "conflict");
    let conflict = conflict.unwrap_or_else(|| panic!("the conflict is reported: {}", problems(&status)));

    // Neither has an age: the name decides, and the loser takes over when the winner goes.
    assert_eq!(winner, site.backend(1));
    assert!(conflict.object.contains("default/second"), "{conflict:?}");
    relay.edit(second);
    relay
        .until("the conflict to end", |status| status.problems.iter().all(|problem| problem.reason != "conflict"))
        .await;
    assert_eq!(client::ask(site.service()).await.expect("the other is served"), site.backend(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f4_t031_given_objects_that_cannot_be_served_when_planned_again_then_each_is_counted_once() {
    let site = Site::new(51);
    let web = |backend| {
        let manifest = Manifest::new(site).tcp().external_ips([site.client(9)]).endpoints([site.backend(backend)]);
        let sctp = "    - {name: s, protocol: SCTP, port: 9}\n    - {name: t, protocol: SCTP, port: 10}\n---\n";
        manifest.to_string().replacen("---\n", sctp, 1)
    };
    let twice = Manifest::new(site).tcp();
    let names = "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: FQDN\n\
                 metadata: {name: names, labels: {kubernetes.io/service-name: web}}\n";
    let text = |backend| format!("{}---\n{twice}{names}", web(backend));
    let relay = Relay::start(site, text(1)).await;
    let counted = |relay: &Relay| {
        let status = relay.status();
        let all = status.source.rejections.iter();
        all.map(|(kind, reason, count)| format!("{kind} {reason} {count}")).collect::<Vec<_>>()
    };
    let expected = [
        "EndpointSlice conflict 1",
        "EndpointSlice family 1",
        "Service conflict 1",
        "Service external_ip 1",
        "Service sctp 1",
    ];

    relay.until_backends("web", &[site.backend(1)]).await;
    let first = counted(&relay);
    relay.edit(text(2));
    relay.until_backends("web", &[site.backend(2)]).await;
    relay.edit(format!("# Other lines, the same objects.\n{}", text(1)));
    relay.until_backends("web", &[site.backend(1)]).await;

    assert_eq!((first, counted(&relay)), (expected.map(str::to_owned).into(), expected.map(str::to_owned).into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_an_address_that_another_process_holds_when_served_then_it_is_reported_and_taken_once_it_is_free() {
    let site = Site::new(10);
    let _backend = Backend::named(site.backend(1)).await;
    let stranger = std::net::TcpListener::bind(site.service()).expect("the test's own address is free");
    let manifest = Manifest::new(site).tcp().node_port().endpoints([site.backend(1)]);
    let relay = Relay::start(site, manifest).await;

    relay
        .until("the failure to be shown", |status| status.failed.keys().any(|key| key.address() == site.service()))
        .await;
    assert_eq!(client::ask(site.node_port()).await.expect("the other listener serves"), site.backend(1));
    drop(stranger);

    relay.until("the retry", |status| status.failed.is_empty()).await;
    assert_eq!(client::ask(site.service()).await.expect("the listener serves"), site.backend(1));
}
