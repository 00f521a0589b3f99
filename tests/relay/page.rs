//! The status page in a real browser: what somebody sees of a running relay, and what happens when they touch it. Without
//! a browser nothing is proved.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::process::Command;

use crate::browser::{Browser, installed};
use crate::support::backend::Backend;
use crate::support::manifest::Manifest;
use crate::support::program::Program;
use crate::support::site::Site;
use crate::support::{client, skip};

/// A Service that cannot be read, and whose mistake is markup: it comes back in a problem's message.
const HOSTILE: &str = r#"---
apiVersion: v1
kind: Service
metadata: {name: hostile}
spec:
  clusterIP: "<img src=x onerror=document.title=1>"
  ports: [{port: 80}]
"#;

const TAB: u32 = 9;
const ENTER: u32 = 13;

/// Roles of what can be used, or found by its name. A screen reader has nothing else to say of it.
const NAMED: [&str; 9] =
    ["button", "link", "searchbox", "combobox", "table", "columnheader", "rowheader", "region", "heading"];

/// A Service at an address that somebody else has.
fn taken(address: SocketAddr) -> String {
    let (ip, port) = (address.ip(), address.port());
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: taken}}\nspec: {{clusterIP: {ip}, ports: [{{port: {port}}}]}}\n"
    )
}

fn headless(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: None, ports: [{{port: 80}}]}}\n"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_running_relay_when_its_page_is_used_then_it_tells_what_is_there_and_what_happens() {
    let Some(browser) = installed() else { return skip("chromium", "no chromium is installed") };
    let site = Site::new(22);
    let _backends = [Backend::named(site.backend(1)).await, Backend::named(site.backend(2)).await];
    let other = TcpListener::bind((site.client(8), 0)).expect("the test's own address is free");
    let taken = taken(other.local_addr().expect("it is bound"));
    let manifest = Manifest::new(site).tcp().endpoints([1, 2].map(|number| site.backend(number)));
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("quiet.yaml"), headless("quiet")).expect("the test's folder can be written");
    let add_folder = |command: &mut Command| _ = command.arg("-f").arg(folder.path());
    let relay = Program::start(site, format!("{manifest}\n{taken}{HOSTILE}"), add_folder).await;
    client::ask_times(4, site.service()).await;

    let mut page = Browser::at(browser, relay.admin());

    all_services_are_there(&mut page);
    names_become_text(&mut page);
    rows_are_filtered_and_sorted(&mut page);
    limits_are_told(&mut page);
    one_service_is_opened_by_keyboard(&mut page, site);
    fs::write(folder.path().join("later.yaml"), headless("later")).expect("the test's folder can be written");
    what_happens_is_told(&mut page);
    a_phone_and_the_dark_have_room(&mut page);
    tables_fit_or_scroll_in_their_box(&mut page, site);
    everything_has_a_name(&mut page);
    assert!(page.console.is_empty(), "the console has to be empty: {:#?}", page.console);
    drop(relay);
    silence_is_told(&mut page);
}

fn all_services_are_there(page: &mut Browser) {
    page.sees("#heard", &["● Live, from manifests"]);
    page.sees("tbody", &["default/taken", "not bound", "default/quiet", "not served", "default/web", "serving"]);
    assert_eq!(page.text("tbody tr:not(.gap) th"), "default/taken", "what is wrong comes first");
}

fn names_become_text(page: &mut Browser) {
    page.sees("#problems", &["<img src=x onerror=document.title=1>"]);
    assert_eq!(page.value("document.images.length"), 0);
    page.holds("document.title === '(1) kube-relay'");
}

fn rows_are_filtered_and_sorted(page: &mut Browser) {
    page.click("#words");
    page.write("quiet");
    page.sees("#shown", &["1 of 3"]);
    assert_eq!(page.text("tbody tr:not(.gap) th"), "default/quiet");

    page.value("document.querySelector('#words').select()");
    page.write(" ");
    page.sees("#shown", &["3 of 3"]);
    page.click("thead th:first-child button");
    page.holds("document.querySelector('thead th').ariaSort === 'ascending'");
    assert_eq!(page.text("tbody tr:not(.gap) th"), "default/quiet", "by the alphabet");
    page.click("thead th:first-child button");
    page.holds("document.querySelector('tbody tr:not(.gap) th').innerText === 'default/web'");
}

fn limits_are_told(page: &mut Browser) {
    page.sees("#capacity", &["TCP connections", "Open files", "by the limit of open files"]);
    page.sees("#limits-none", &["None."]);
}

fn one_service_is_opened_by_keyboard(page: &mut Browser, site: Site) {
    page.value("document.activeElement.blur(); document.querySelector('tbody th a[href=\"#/default/web\"]').focus()");
    page.press("Enter", ENTER);
    page.sees("#one-title", &["default/web"]);
    let backends = [1, 2].map(|number| site.backend(number).to_string());
    page.sees("#one-ports", &[&backends[0], &backends[1], "50 %", "every ready endpoint; next is"]);
    page.holds("document.querySelector('#all').hidden && document.querySelector('#one-gone').hidden");

    page.value("location.hash = '#/default/taken'");
    page.sees("#one-ports", &["not bound (in_use)"]);
    page.value("location.hash = '#/default/nobody'");
    page.sees("#one", &["There is no such Service."]);
    page.value("location.hash = '#/'");
    page.holds("!document.querySelector('#all').hidden");
    page.value("document.activeElement.blur()");
    page.press("Tab", TAB);
    page.holds("document.activeElement !== document.body");
}

fn what_happens_is_told(page: &mut Browser) {
    page.sees("#events", &["default/later: added"]);
    page.sees("#shown", &["4 of 4"]);
}

fn a_phone_and_the_dark_have_room(page: &mut Browser) {
    let light = page.value("getComputedStyle(document.body).backgroundColor");

    page.becomes(390, 844, "dark");

    page.holds("document.documentElement.scrollWidth <= innerWidth");
    page.holds("document.querySelector('tbody tr:not(.gap) th').clientWidth >= 120");
    assert_ne!(page.value("getComputedStyle(document.body).backgroundColor"), light);
}

/// The page itself is never wider than the window. Where a table does not fit, its box scrolls: on no phone and on no desk.
fn tables_fit_or_scroll_in_their_box(page: &mut Browser, site: Site) {
    let headings = "[...document.querySelectorAll('thead button')].every((one) => one.scrollWidth <= one.clientWidth)";
    let fits = "[...document.querySelectorAll('.scroller')].every((box) => box.scrollWidth <= box.clientWidth)";
    for (width, scheme, all_fit) in
        [(360, "light", true), (768, "dark", false), (1280, "light", true), (1920, "dark", true)]
    {
        page.becomes(width, 860, scheme);
        for hash in ["#/default/web", "#/"] {
            page.value(&format!("location.hash = '{hash}'"));
            if hash != "#/" {
                page.sees("#one-ports", &[&site.backend(1).to_string()]);
            }
            page.holds("document.documentElement.scrollWidth <= innerWidth");
            page.holds(headings);
            if all_fit {
                page.holds(fits);
            }
        }
    }
    page.becomes(390, 844, "dark");
}

fn everything_has_a_name(page: &mut Browser) {
    let told = page.accessible();
    let nameless: Vec<_> =
        told.iter().filter(|(role, name)| NAMED.contains(&role.as_str()) && name.is_empty()).collect();

    assert!(told.iter().any(|(role, _)| role == "searchbox") && told.iter().any(|(role, _)| role == "columnheader"));
    assert!(nameless.is_empty(), "{nameless:?} say nothing");
}

fn silence_is_told(page: &mut Browser) {
    page.sees("#heard", &["▲ The relay does not answer"]);
    page.holds("document.body.classList.contains('silent')");
}
