//! Two processes that do not understand each other: another version, or no kube-relay at all. One of them is the program as it
//! is, the other one is played here. The one that serves goes on, and each says why in one line.

use std::env;
use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, accept_with, bind, connect, listen, recvmsg, sendmsg, socket_with,
};
use rustix::process::{Pid, PidfdFlags, getppid, pidfd_open};

use crate::relay::House;
use crate::support::backend::Backend;
use crate::support::client::ask_times;
use crate::support::manifest::Manifest;
use crate::support::site::Site;
use crate::support::within;

/// The state folder of who is to be called, for a process that plays a successor.
const CALLS: &str = "KUBE_RELAY_TEST_CALLS";
/// What it says first: the number of the message's kind, and its text.
const SAYS: &str = "KUBE_RELAY_TEST_SAYS";
/// What it does when it has been answered.
const THEN: &str = "KUBE_RELAY_TEST_THEN";

/// Numbers of kinds of messages (`src/handover/parcel.rs`).
const HELLO: u8 = 0;
const REFUSED: u8 = 1;
const TAKE: u8 = 12;

/// How another version introduces itself.
const OF_VERSION_9: &str = r#"{"oldest":8,"newest":9,"version":"9.1.0","pid":1,"takes_over":true}"#;

/// Plays a successor where this program was started as one; among all the tests there is nothing to play.
#[test]
fn plays_a_successor() {
    let Some(folder) = env::var_os(CALLS) else { return };
    let said = env::var(SAYS).expect("it is said what to say");
    let (kind, text) = said.split_once(' ').expect("a number, and a text");
    let post = seqpacket();
    connect(&post, &door(Path::new(&folder))).expect("somebody listens");
    say(&post, kind.parse().expect("a number"), text);
    let _ = hear(&post); // Whatever it is.
    match env::var(THEN).as_deref() {
        Ok("stays") => await_end_of_parent(),
        _ => std::process::exit(1),
    }
}

/// It would stay for ever otherwise where a test has failed.
fn await_end_of_parent() {
    let parent: Pid = getppid().expect("it is in our namespace");
    let Ok(parent) = pidfd_open(parent, PidfdFlags::empty()) else { return };
    let _ = rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(&parent, PollFlags::IN)], None));
}

fn seqpacket() -> OwnedFd {
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("descriptors are left")
}

fn door(folder: &Path) -> SocketAddrUnix {
    SocketAddrUnix::new(folder.join("kube-relay.sock")).expect("a short name")
}

fn say(post: &OwnedFd, kind: u8, text: &str) {
    let header = [kind, 0]; // And no more pieces.
    let parts = [IoSlice::new(&header), IoSlice::new(text.as_bytes())];
    sendmsg(post, &parts, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL).expect("it goes");
}

/// The kind and the text of the next message; `None` where the other end has hung up.
fn hear(post: &OwnedFd) -> Option<(u8, String)> {
    let mut bytes = [0; 64 * 1024];
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let heard = recvmsg(post, &mut parts, &mut RecvAncillaryBuffer::default(), RecvFlags::empty());
    match heard.map(|heard| heard.bytes) {
        Ok(count @ 2..) => Some((bytes[0], String::from_utf8_lossy(&bytes[2..count]).into_owned())),
        _ => None,
    }
}

/// A program that plays a successor of this house's process.
fn successor(house: &House, number: usize, says: (u8, &str), then: &str) -> String {
    let path = house.path().join(format!("successor-{number}"));
    let (state, own) = (house.state(), env::current_exe().expect("it runs"));
    let (kind, text) = says;
    let script = format!(
        "#!/bin/sh\n{CALLS}='{}' {SAYS}='{kind} {text}' {THEN}={then} \
         exec '{}' --exact strangers::plays_a_successor >/dev/null\n",
        state.display(),
        own.display()
    );
    fs::write(&path, script).expect("the test's folder can be written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is ours");
    path.display().to_string()
}

#[tokio::test]
async fn f25_given_a_successor_that_speaks_otherwise_when_an_upgrade_is_ordered_then_it_ends_at_once_and_is_told_once()
{
    let site = Site::new(45);
    let backend = Backend::named(site.backend(1)).await;
    let (mut house, first) = House::serving(site, &Manifest::new(site).tcp().endpoints([backend.address])).await;
    let of_version_9 = "kube-relay 9.1.0 speaks versions 8 to 9 of the hand-over, this one 1 to 1";
    let unreadable = "does not say who it is in a way that kube-relay 0.1.0 can read";
    let cases = [
        ((HELLO, OF_VERSION_9), "ends", of_version_9),
        ((HELLO, OF_VERSION_9), "stays", of_version_9),
        ((HELLO, "}"), "stays", unreadable),
        ((TAKE, "{}"), "stays", unreadable),
    ];

    for (number, (says, then, why)) in (1..).zip(cases) {
        let program = successor(&house, number, says, then);
        let output = within("the order to end", house.upgrade(&["--binary", &program, "--timeout", "1h"])).await;

        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.contains("no upgrade (version): ") && told.contains(why), "{told}");
        house.until("it is gone", |house| house.successors().into_iter().all(|pid| house.has_ended(pid))).await;
        house.until("it is told", |house| house.told("nothing was handed over").len() >= number).await;
        let line = house.told("nothing was handed over").pop().expect("it was told");
        assert!(line.contains(r#""reason":"version""#) && line.contains(why), "{line}");
        assert_eq!(house.told("nothing was handed over").len(), number, "{}", house.log());
        let count = |labels: &[&str]| house.metric("kuberelay_upgrades_total", labels);
        assert_eq!((count(&[r#"result="version""#]), count(&[])), (number as u64, number as u64));
        assert_eq!(ask_times(2, site.service()).await, [backend.address; 2]);
    }
    assert_eq!(house.serves(), Some(first));
    let done = house.upgrade(&[]).await;
    assert!(done.status.success(), "{done:?}");
}

/// Plays one that serves: answers whoever calls first, and then hangs up.
fn serve(folder: PathBuf, answer: Option<(u8, &'static str)>) -> JoinHandle<()> {
    let socket = seqpacket();
    bind(&socket, &door(&folder)).expect("the test's folder can be written");
    listen(&socket, 1).expect("it is bound");
    thread::spawn(move || {
        let post = accept_with(&socket, SocketFlags::CLOEXEC).expect("somebody calls");
        let (kind, _) = hear(&post).expect("it says who it is");
        assert_eq!(kind, HELLO);
        answer.into_iter().for_each(|(kind, text)| say(&post, kind, text));
    })
}

#[tokio::test]
async fn f25_given_one_that_speaks_otherwise_when_a_successor_comes_then_it_ends_and_says_why_in_one_line() {
    let site = Site::new(46);
    let cases = [
        (Some((HELLO, OF_VERSION_9)), "version", "kube-relay 9.1.0 speaks versions 8 to 9"),
        (Some((REFUSED, "\"not you\"\nversion")), "version", "does not hand over: not you"),
        (Some((REFUSED, "\"not you\"")), "refused", "does not hand over: not you"),
        (Some((TAKE, "[]")), "version", "broke off"),
        (None, "ended", "the other process has hung up"),
    ];
    for (answer, reason, why) in cases {
        let mut house = House::new(site, &Manifest::new(site).tcp());
        let serving = serve(house.state(), answer);

        let successor = house.start(|command| _ = command.arg("--take-over"));
        house.until("it has ended", |house| house.has_ended(successor)).await;

        serving.join().expect("no panic");
        assert_eq!(house.code(successor), Some(1));
        let lines = house.told(r#""level":"ERROR""#);
        let [line] = lines.as_slice() else { panic!("{}", house.log()) };
        assert!(line.contains(&format!(r#""reason":"{reason}""#)) && line.contains(why), "{line}");
        assert!(house.told(r#""level":"WARN""#).is_empty(), "{}", house.log());
    }
}
