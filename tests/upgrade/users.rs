//! Who may ask for a hand-over: the user that serves, and root. Everybody else is kept out by the mode of the socket; and where
//! somebody has changed that, by what the kernel says of who calls.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use rustix::process::geteuid;
use tokio::task::spawn_blocking;

use crate::relay::{BINARY, House, descriptors};
use crate::support::backend::Backend;
use crate::support::client::{ask_on, ask_times, connect};
use crate::support::manifest::Manifest;
use crate::support::site::Site;
use crate::support::skip;

/// A user with no rights.
const NOBODY: u32 = 65_534;

/// Runs `kube-relay upgrade` as somebody else.
async fn upgrade_as(user: u32, house: &House) -> Output {
    let mut command = Command::new(BINARY);
    command.env_clear().arg("upgrade").arg("--state-dir").arg(house.state()).uid(user).gid(user);
    spawn_blocking(move || command.output()).await.expect("no panic").expect("the program starts")
}

/// A relay that a user without rights runs, and its number.
async fn of_nobody(site: Site, backend: &Backend) -> (House, u32) {
    let mut house = House::new(site, &Manifest::new(site).tcp().endpoints([backend.address]));
    fs::set_permissions(house.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
    chown(house.state(), Some(NOBODY), Some(NOBODY)).expect("root may");
    let first = house.start(|command| _ = command.uid(NOBODY).gid(NOBODY));
    house.until("it is ready", |house| house.serves() == Some(first) && house.is_ready()).await;
    (house, first)
}

/// Starts a successor as somebody else, which ends; what it says, in one line.
async fn refused_as(user: u32, house: &mut House) -> String {
    let before = house.told(r#""level":"ERROR""#).len();
    let successor = house.start(|command| _ = command.arg("--take-over").uid(user).gid(user));
    house.until("it has ended", |house| house.has_ended(successor)).await;
    assert_eq!(house.code(successor), Some(1), "{}", house.log());
    let told = house.told(r#""level":"ERROR""#);
    assert_eq!(told.len(), before + 1, "{}", house.log());
    let line = told.last().expect("one").clone();
    assert!(line.contains(r#""reason":"refused""#), "{line}");
    line
}

#[tokio::test]
async fn f25_given_another_user_when_a_hand_over_is_asked_for_then_it_is_refused_and_both_say_so() {
    if !geteuid().is_root() {
        return skip("other_user", "needs root");
    }
    let site = Site::new(49);
    let backend = Backend::named(site.backend(1)).await;
    let (mut house, first) = House::serving(site, &Manifest::new(site).tcp().endpoints([backend.address])).await;
    for folder in [house.path().to_owned(), house.state()] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).expect("it is ours");
    }
    let mut long = connect(site.service()).await.expect("it serves");
    assert_eq!(ask_on(&mut long).await.expect("a backend answers"), backend.address);
    let before = descriptors(first);
    let by_another = "a hand-over is asked for by another user";

    // The mode keeps it out: nobody hears of it.
    let kept_out = refused_as(NOBODY, &mut house).await;
    assert!(kept_out.contains("cannot be called: Permission denied"), "{kept_out}");
    let output = upgrade_as(NOBODY, &house).await;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && told.contains("cannot be called: Permission denied"), "{told}");
    assert_eq!(house.told(by_another), Vec::<String>::new());

    // Without it the kernel tells who calls.
    let door = house.state().join("kube-relay.sock");
    assert_eq!(fs::metadata(&door).expect("it is there").permissions().mode() & 0o777, 0o600);
    fs::set_permissions(&door, fs::Permissions::from_mode(0o666)).expect("root may");
    let refused = refused_as(NOBODY, &mut house).await;
    assert!(refused.contains("does not hand over: it belongs to another user"), "{refused}");
    let output = upgrade_as(NOBODY, &house).await;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && told.contains("it belongs to another user"), "{told}");
    house.until("both were told of", |house| house.told(by_another).len() == 2).await;
    for line in house.told(by_another) {
        assert!(line.contains(r#""reason":"refused""#) && line.contains(&format!(r#""uid":{NOBODY}"#)), "{line}");
    }

    assert_eq!(house.metric("kuberelay_upgrades_total", &[]), 0, "nobody has begun to hand over anything");
    assert_eq!(house.serves(), Some(first));
    assert_eq!(ask_times(2, site.service()).await, [backend.address; 2]);
    house.until("no descriptor is left over", |_| descriptors(first) <= before).await;
    let done = house.upgrade(&[]).await;
    assert!(done.status.success(), "{done:?}");
    assert_eq!(ask_on(&mut long).await.expect("it goes on there"), backend.address);
}

#[tokio::test]
async fn f25_given_a_relay_of_another_user_when_root_starts_a_successor_then_nothing_is_taken_from_it() {
    if !geteuid().is_root() {
        return skip("other_user", "needs root");
    }
    let site = Site::new(50);
    let backend = Backend::named(site.backend(1)).await;
    let (mut house, first) = of_nobody(site, &backend).await;

    let told = refused_as(0, &mut house).await;

    assert!(told.contains(&format!("the socket there belongs to user {NOBODY}, not to this one")), "{told}");
    assert_eq!(house.serves(), Some(first));
    assert_eq!(ask_times(2, site.service()).await, [backend.address; 2]);
}

#[tokio::test]
async fn t234_given_a_relay_of_another_user_when_root_orders_an_upgrade_then_it_is_done() {
    if !geteuid().is_root() {
        return skip("other_user", "needs root");
    }
    let site = Site::new(34);
    let backend = Backend::named(site.backend(1)).await;
    let (house, first) = of_nobody(site, &backend).await;

    let output = house.upgrade(&[]).await;

    assert!(output.status.success(), "{output:?}\n{}", house.log());
    assert_ne!(house.serves(), Some(first));
    assert_eq!(ask_times(1, site.service()).await, [backend.address]);
}
