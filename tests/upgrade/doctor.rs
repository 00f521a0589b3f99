//! What `kube-relay doctor` says of an upgrade, and what an upgrade then does.

use std::process::Command;

use serde_json::Value;
use tokio::task::spawn_blocking;

use crate::relay::{BINARY, House};
use crate::support::backend::Backend;
use crate::support::client::ask_times;
use crate::support::manifest::Manifest;
use crate::support::site::Site;

/// What it says of upgrades, and how bad that is; and then what can be done.
async fn say(house: &House, with_folder: bool) -> (String, String, Option<String>) {
    let mut command = Command::new(BINARY);
    command.env_clear().args(["doctor", "-o", "json", "-f"]).arg(house.manifest());
    command.args(["--status-bind-address", &house.admin().to_string()]);
    if with_folder {
        command.arg("--state-dir").arg(house.state());
    }
    let output = spawn_blocking(move || command.output()).await.expect("no panic").expect("the program starts");
    let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    let findings = said["findings"].as_array().expect("a list");
    let [finding] = findings.iter().filter(|finding| finding["subject"] == "upgrade").collect::<Vec<_>>()[..] else {
        panic!("{findings:#?}")
    };
    let text = |field: &str| finding[field].as_str().map(ToOwned::to_owned);
    (text("severity").expect("a word"), text("message").expect("a sentence"), text("remedy"))
}

#[tokio::test]
async fn f25_given_a_relay_that_can_be_upgraded_when_the_doctor_looks_then_it_says_what_is_kept_and_that_is_so() {
    let site = Site::new(47);
    let backend = Backend::named(site.backend(1)).await;
    let mut house = House::new(site, &Manifest::new(site).tcp().endpoints([backend.address]));
    let nobody = say(&house, true).await;
    let first = house.start(|_| {});
    house.until("it is ready", |house| house.serves() == Some(first) && house.is_ready()).await;

    let kept = say(&house, true).await;
    let not_named = say(&house, false).await;
    let done = house.upgrade(&[]).await;

    assert_eq!(nobody.0, "ok");
    assert!(nobody.1.starts_with("no kube-relay runs with this --state-dir"), "{nobody:?}");
    assert_eq!((kept.0.as_str(), kept.2), ("ok", None));
    let all = "an upgrade keeps listeners, connections, UDP flows, session affinity and counters";
    assert!(kept.1.contains(&format!("(pid {first}) serves: {all}")), "{}", kept.1);
    assert!(
        kept.1.ends_with("a crash or a restart keeps nothing (with systemd: FileDescriptorStoreMax=)"),
        "{}",
        kept.1
    );
    assert_eq!(not_named.0, "note");
    assert!(not_named.1.contains("without --state-dir there is no upgrade") && not_named.2.is_some(), "{not_named:?}");
    assert!(done.status.success(), "{done:?}");
}

#[tokio::test]
async fn f25_given_manifests_from_standard_input_when_an_upgrade_is_ordered_then_doctor_and_order_say_what_to_do() {
    let site = Site::new(48);
    let backend = Backend::named(site.backend(1)).await;
    let mut house = House::new(site, &Manifest::new(site).tcp().endpoints([backend.address]));
    let first = house.start(|command| _ = command.args(["-f", "-"])); // Where nothing is.
    house.until("it is ready", |house| house.serves() == Some(first) && house.is_ready()).await;
    let why = "its manifests came from standard input, which another process cannot read again: use files";

    let (severity, message, remedy) = say(&house, true).await;
    let refused = house.upgrade(&[]).await;

    assert_eq!(severity, "note");
    assert!(message.contains(&format!("(pid {first}) serves: it starts no successor ({why})")), "{message}");
    assert!(remedy.as_ref().is_some_and(|remedy| remedy.contains("kube-relay run --take-over")), "{remedy:?}");
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{told}");
    assert!(told.contains(&format!("no upgrade (refused): {why}")), "{told}");
    house.until_told("nothing was handed over").await;
    let [line] = &house.told("nothing was handed over")[..] else { panic!("{}", house.log()) };
    assert!(line.contains(r#""reason":"refused""#) && line.contains(why), "{line}");
    assert_eq!(house.metric("kuberelay_upgrades_total", &[r#"result="refused""#]), 1);
    assert_eq!(ask_times(2, site.service()).await, [backend.address; 2]);

    let second = house.start(|command| _ = command.arg("--take-over"));
    house.until("the second one serves", |house| house.serves() == Some(second)).await;
    assert_eq!(ask_times(2, site.service()).await, [backend.address; 2]);
}
