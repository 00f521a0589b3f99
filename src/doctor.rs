//! What on this machine would break a relay, or slow it down, and what to do about it: `kube-relay doctor`.
//!
//! Each subject has a file below `doctor/`. There, reading and judging are apart: `read` asks the kernel or the API
//! server and gives plain facts, each of which may be an error; `judge` is pure, and tells a finding for each thing that it
//! has looked at. What a relay is to do here, on which most of it depends, is a `Duty`.
//!
//! No setting, route or rule is changed (the kernel may load its module for nftables to tell of the rules), and nothing is
//! sent but to the API server and to a relay that runs here.

#[cfg(feature = "kubernetes")]
mod cluster;
mod cni;
mod conntrack;
mod duty;
mod fact;
mod finding;
mod kernel;
mod loopback;
mod neighbours;
mod nft;
mod open_files;
#[cfg(feature = "kubernetes")]
mod policies;
mod ports;
mod proxies;
mod queues;
mod rights;
mod routes;
mod source_address;
mod upgrades;
mod wildcards;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::config::RunConfig;
#[cfg(feature = "kubernetes")]
use crate::config::SourceConfig;
use crate::doctor::duty::{Duty, Running};
use crate::doctor::fact::Fact;
pub use crate::doctor::finding::{Diagnosis, Finding, Grade, Subject};
use crate::peer;
use crate::status::Report;

/// What `doctor` works with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DoctorConfig {
    /// What `run` would work with. Where no source is named: manifests, and none of them.
    pub run: RunConfig,
    /// True where findings that are fine are to be printed, too. From `--all`.
    pub all: bool,
}

/// Looks at this machine for a relay with these settings. `planned` is what manifests ask for; where there are none, the
/// API server is asked for Services, or the relay that runs here.
pub async fn examine(config: &RunConfig, planned: Option<Report>) -> Diagnosis {
    let (running, serving) = running(config).await;
    let neighbours = neighbours::read().await;
    let interfaces = cni::interfaces();
    #[cfg(feature = "kubernetes")]
    let cluster = ask_cluster(config, &interfaces).await;
    #[cfg(feature = "kubernetes")]
    let planned = planned.or_else(|| {
        let host = neighbours.host.clone().unwrap_or_else(|_| crate::host::Host::loopback_only());
        cluster.as_ref()?.as_ref().ok()?.plan(&config.plan, host)
    });
    let duty = Duty::new(config, planned.or(serving).as_ref(), running);

    let mut findings = of_process(&duty);
    findings.push(match &config.state_dir {
        Some(folder) => upgrades::judge(&upgrades::read(folder.clone()).await),
        None => upgrades::without_folder(duty.running.is_some()),
    });
    findings.extend(of_addresses(&duty, &neighbours, &interfaces));
    findings.extend(of_kernel(&duty));
    #[cfg(feature = "kubernetes")]
    let cilium = cluster.as_ref().and_then(|facts| facts.as_ref().ok()?.cilium.clone());
    #[cfg(not(feature = "kubernetes"))]
    let cilium = None;
    findings.extend(cni::judge(&cni::read(interfaces, cilium), &duty));
    #[cfg(feature = "kubernetes")]
    findings.extend(cluster.iter().flat_map(|facts| of_cluster(facts, &neighbours)));
    Diagnosis::of(findings)
}

/// The relay that runs here, and what it serves.
async fn running(config: &RunConfig) -> (Option<Running>, Option<Report>) {
    let Some(mut address) = config.status_address else { return (None, None) };
    if address.ip().is_unspecified() {
        address = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), address.port());
    }
    // Nobody there, or somebody else: then no relay runs as it is told here.
    let Ok(live) = peer::status(address).await else { return (None, None) };
    let name = std::fs::read_to_string(format!("/proc/{}/comm", live.pid)).unwrap_or_default();
    (Some(Running::new(live.pid, &name, std::process::id())), Some(live.report))
}

fn of_process(duty: &Duty) -> Vec<Finding> {
    let folder = duty.process_folder();
    let mut findings = rights::judge(&rights::read(&folder), duty);
    findings.push(open_files::judge(&open_files::read(&folder), duty));
    findings
}

/// Who reaches addresses of Services, and who is in the way.
fn of_addresses(duty: &Duty, neighbours: &neighbours::Facts, interfaces: &Fact<Vec<String>>) -> Vec<Finding> {
    let may_change = match duty.out_of_sight() {
        Some(why) => Err(why),
        None => rights::read(&duty.process_folder()).rights.map(|rights| rights.routes),
    };
    let routes = routes::read(duty.routes, may_change.clone());
    let ports = ports::read();
    let mut findings = routes::judge(&routes, duty, &neighbours.conflicts(duty));
    findings.extend(neighbours::judge(neighbours, duty, &routes));
    let proxies = proxies::read(interfaces.clone());
    let circumstances = wildcards::Circumstances {
        by: by(duty, &routes, &proxies),
        foreign_nets: routes.foreign_nets(),
        guarded: guarded(duty, &routes, &proxies),
        perhaps_guarded: perhaps_guarded(duty, &routes, &proxies),
        sources: ports.sources(),
    };
    findings.extend(wildcards::judge(&wildcards::read(), duty, &circumstances));
    findings.push(source_address::judge(&source_address::read(has_nftables(&proxies), may_change), duty));
    findings.extend(proxies::judge(&proxies, duty));
    findings.extend(ports::judge(&ports, duty));
    findings
}

fn has_nftables(proxies: &proxies::Facts) -> Fact<bool> {
    proxies.rules.as_ref().map(Option::is_some).map_err(Clone::clone)
}

/// Addresses at which what listens on all addresses is refused, or will be once a relay has begun.
fn guarded(duty: &Duty, routes: &routes::Facts, proxies: &proxies::Facts) -> BTreeSet<IpAddr> {
    if proxies.has_guard(duty) || routes.drops(duty) {
        return routes.guarded_addresses();
    }
    let begins = duty.guards && duty.running.is_none() && duty.routes.is_some() && proxies.has_nftables();
    if !begins || !matches!(routes.may_change, Ok(true)) {
        return BTreeSet::new();
    }
    duty.vips().into_keys().filter(|vip| !routes.is_local(*vip)).chain(routes.guarded_addresses()).collect()
}

/// What guards them.
fn by(duty: &Duty, routes: &routes::Facts, proxies: &proxies::Facts) -> Option<&'static str> {
    match () {
        () if proxies.has_guard(duty) => Some("a table of nftables refuses"),
        () if routes.drops(duty) => Some("filters of tc drop"),
        () => None,
    }
}

/// Addresses at which they may be refused: the rules that would tell are not for this process to read.
fn perhaps_guarded(duty: &Duty, routes: &routes::Facts, proxies: &proxies::Facts) -> BTreeSet<IpAddr> {
    match &proxies.rules {
        Err(_) if duty.guards && duty.routes.is_some() => routes.own_addresses().collect(),
        _ => BTreeSet::new(),
    }
}

fn of_kernel(duty: &Duty) -> Vec<Finding> {
    let mut findings = queues::judge(&queues::read(), duty);
    findings.push(conntrack::judge(&conntrack::read()));
    findings.push(loopback::judge(&loopback::read()));
    findings.extend(kernel::judge(&kernel::read(), duty));
    findings
}

/// `None` where Services are to come from files.
#[cfg(feature = "kubernetes")]
async fn ask_cluster(config: &RunConfig, interfaces: &Fact<Vec<String>>) -> Option<Fact<cluster::Facts>> {
    let SourceConfig::Api { server, .. } = &config.source else { return None };
    let name = config.plan.node.name.as_ref().map_or_else(crate::host::name, ToString::to_string);
    let has_cilium = interfaces.iter().flatten().any(|name| name.starts_with("cilium"));
    Some(cluster::read(server, name, has_cilium).await)
}

#[cfg(feature = "kubernetes")]
fn of_cluster(facts: &Fact<cluster::Facts>, neighbours: &neighbours::Facts) -> Vec<Finding> {
    let mut findings = cluster::judge(facts);
    if let Ok(facts) = facts {
        let of_node = facts.node().map(|node| node.addresses).unwrap_or_default();
        let of_machine = neighbours.host.iter().flat_map(|host| host.default_sources.iter().copied());
        let node = if of_node.is_empty() { of_machine.collect() } else { of_node };
        findings.push(policies::judge(&facts.policies, &facts.services, &node));
    }
    findings
}
