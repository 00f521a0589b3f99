//! The life of a Service and its EndpointSlice at an API server: created, read, listed, watched, patched, given an address,
//! deleted. After each step a client looks what has become of it, through a relay that follows the same server.
//!
//! `cargo run --example manage`: at an API server of its own, on loopback, without root. With `KUBECONFIG` set: in the
//! namespace that its first file names, as a user who may read Services, EndpointSlices and Nodes of all. Nobody else serves this
//! Service there: its label says that this relay does.

use std::ffi::OsString;
use std::fmt::Debug;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, ListParams, ObjectList, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, Resource, ResourceExt};
use kube_relay::api_client;
use kube_relay::cli::{Cli, Command};
use kube_relay::config::{RunConfig, SourceConfig};
use kube_relay::control::Relay;
use kube_relay::host::Host;
use kube_relay::host_watch::Hosts;
use kube_relay::kubernetes::{self, Selection, Source};
use kube_relay::place::Place;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

/// The server of the crate's tests.
#[path = "../tests/support/api_server.rs"]
#[allow(dead_code, unreachable_pub, reason = "it can do more than is told here, and is exported to nobody")]
mod api_server;

/// Of the Service, of its EndpointSlice, and of who serves it.
const NAME: &str = "kube-relay-manage";
const LABELS: &str = "app=kube-relay-manage";
const PORT: u16 = 8080;
/// Where nothing but this example is, as far as we know.
const LOOPBACK: [u8; 3] = [127, 96, 40];
/// How long a step may take to reach the client. A server far away needs some of it.
const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::main]
async fn main() -> Result<()> {
    match std::env::var_os("KUBECONFIG") {
        None => play_alone(LOOPBACK).await,
        Some(files) => {
            let kubeconfig = std::env::split_paths(&files).next().context("KUBECONFIG is empty")?;
            play(&kubeconfig, own_address()?, LOOPBACK).await
        }
    }
}

/// Everything on loopback, in one net of 256 addresses.
pub(crate) async fn play_alone(net: [u8; 3]) -> Result<()> {
    let server = api_server::ApiServer::start((address(net, 208), 6443).into()).await;
    let kubeconfig = tempfile::NamedTempFile::new()?;
    std::fs::write(&kubeconfig, server.kubeconfig())?;
    play(kubeconfig.path(), address(net, 101), net).await
}

async fn play(kubeconfig: &Path, backend_ip: IpAddr, net: [u8; 3]) -> Result<()> {
    let config = Kubeconfig::read_from(kubeconfig)?;
    let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
    let (namespace, client) = (config.default_namespace.clone(), Client::try_from(config)?);
    let story = Story {
        services: Api::namespaced(client.clone(), &namespace),
        slices: Api::namespaced(client, &namespace),
        blue: backend(backend_ip, "blue").await?,
        green: backend(backend_ip, "green").await?,
        entry: (address(net, 10), PORT).into(),
        balancer: (address(net, 11), PORT).into(),
    };
    let _following = relay(kubeconfig, &namespace, story.entry).await?;

    let service = story.create_service().await?;
    let told = story.go_on(&service).await;
    if told.is_err() {
        // With it goes what belongs to it.
        let _ = story.services.delete(NAME, &DeleteParams::default()).await;
    }
    told
}

/// The objects' places at the server, and those who see them change.
struct Story {
    services: Api<Service>,
    slices: Api<EndpointSlice>,
    /// Two servers, of which the slice names one at a time.
    blue: SocketAddr,
    green: SocketAddr,
    /// Where the relay serves the Service whatever its cluster IP is.
    entry: SocketAddr,
    /// The address that a load balancer would give it.
    balancer: SocketAddr,
}

impl Story {
    async fn create_service(&self) -> Result<Service> {
        let created = self.services.create(&PostParams::default(), &service()?).await;
        let created = created.with_context(|| format!("Service {NAME}, perhaps left by an earlier run"))?;
        println!("create  Service {NAME}");
        Ok(created)
    }

    async fn go_on(&self, service: &Service) -> Result<()> {
        self.slices.create(&PostParams::default(), &slice(service, self.blue)?).await?;
        println!("create  EndpointSlice: port {}", self.blue.port());
        client_sees(self.entry, "blue").await?;

        let cluster_ip = self.services.get(NAME).await?.spec.and_then(|spec| spec.cluster_ip);
        println!("get     Service: cluster IP {}", cluster_ip.context("the server gave none")?);

        let ours = ListParams::default().labels(LABELS);
        let (service_list, slice_list) = (self.services.list(&ours).await?, self.slices.list(&ours).await?);
        println!("list    Service: {}, EndpointSlice: {}", service_list.items.len(), slice_list.items.len());
        ensure!(service_list.items.len() == 1 && slice_list.items.len() == 1, "others have the label {LABELS}");

        let mut service_events = watch(&self.services, &service_list).await?;
        let mut slice_events = watch(&self.slices, &slice_list).await?;
        println!("watch   both, from where the lists end");

        let port = json!({"name": "http", "protocol": "TCP", "port": self.green.port()});
        let patch = Patch::Merge(json!({"ports": [port]}));
        let patched = self.slices.patch(NAME, &PatchParams::default(), &patch).await?;
        println!("patch   EndpointSlice: port {}", self.green.port());
        watch_tells(&mut slice_events, |event| is_change_to(&patched, event)).await?;
        client_sees(self.entry, "green").await?;

        // What a load balancer does once it has an address for the Service.
        let mut service = self.services.get_status(NAME).await?;
        service.status = serde_json::from_value(json!({"loadBalancer": {"ingress": [{"ip": self.balancer.ip()}]}}))?;
        let addressed = self.services.replace_status(NAME, &PostParams::default(), &service).await?;
        println!("status  Service: load balancer at {}", self.balancer.ip());
        watch_tells(&mut service_events, |event| is_change_to(&addressed, event)).await?;
        client_sees(self.balancer, "green").await?;

        self.slices.delete(NAME, &DeleteParams::default()).await?;
        println!("delete  EndpointSlice");
        watch_tells(&mut slice_events, is_end).await?;
        client_sees(self.entry, NOBODY).await?;

        self.services.delete(NAME, &DeleteParams::default()).await?;
        println!("delete  Service");
        watch_tells(&mut service_events, is_end).await?;
        client_sees(self.balancer, NOBODY).await
    }
}

/// Without a selector, so that nobody else writes its endpoints, and of a class that no other load balancer serves.
fn service() -> Result<Service> {
    let labels = json!({"app": NAME, "service.kubernetes.io/service-proxy-name": NAME});
    Ok(serde_json::from_value(json!({
        "metadata": {"name": NAME, "labels": labels},
        "spec": {
            "type": "LoadBalancer", "loadBalancerClass": "example.com/manage", "allocateLoadBalancerNodePorts": false,
            "ports": [{"name": "http", "protocol": "TCP", "port": PORT}],
        },
    }))?)
}

/// It belongs to the Service: the cluster deletes it after that, if nobody has before.
fn slice(service: &Service, backend: SocketAddr) -> Result<EndpointSlice> {
    let labels = json!({
        "app": NAME, "kubernetes.io/service-name": NAME, "endpointslice.kubernetes.io/managed-by": NAME,
    });
    Ok(serde_json::from_value(json!({
        "metadata": {"name": NAME, "labels": labels, "ownerReferences": [service.owner_ref(&())]}, "addressType": "IPv4",
        "ports": [{"name": "http", "protocol": "TCP", "port": backend.port()}],
        "endpoints": [{"addresses": [backend.ip()], "conditions": {"ready": true}}],
    }))?)
}

type Events<K> = BoxStream<'static, kube::Result<WatchEvent<K>>>;

/// Begins where the list ends: nothing is missed between them.
async fn watch<K>(objects: &Api<K>, list: &ObjectList<K>) -> Result<Events<K>>
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let version = list.metadata.resource_version.as_deref().context("a list without a version")?;
    Ok(objects.watch(&WatchParams::default().labels(LABELS), version).await?.boxed())
}

/// Waits until a watch tells of what was done.
async fn watch_tells<K>(events: &mut Events<K>, of_it: impl Fn(&WatchEvent<K>) -> bool) -> Result<()> {
    within("the watch to tell of it", async {
        loop {
            match events.next().await.context("the watch has ended")?? {
                WatchEvent::Error(error) => bail!("the watch failed: {error:?}"),
                event if of_it(&event) => break,
                _ => {}
            }
        }
        println!("        the watch tells of it");
        Ok(())
    })
    .await
}

fn is_change_to<K: Resource>(written: &K, event: &WatchEvent<K>) -> bool {
    matches!(event, WatchEvent::Modified(object) if object.resource_version() == written.resource_version())
}

fn is_end<K: Resource>(event: &WatchEvent<K>) -> bool {
    matches!(event, WatchEvent::Deleted(object) if object.name_any() == NAME)
}

/// What a client sees where no port is open.
const NOBODY: &str = "nobody: connection refused";

/// Waits until this answers a client.
async fn client_sees(service: SocketAddr, expected: &str) -> Result<()> {
    within("the client to see it", async {
        while ask(service).await?.as_deref() != Some(expected) {
            sleep(Duration::from_millis(5)).await;
        }
        println!("        the client at {service} is answered by {expected}");
        Ok(())
    })
    .await
}

/// Who answers a new connection; `None` where it ends without a word.
async fn ask(service: SocketAddr) -> io::Result<Option<String>> {
    let mut answer = String::new();
    let asked = async { TcpStream::connect(service).await?.read_to_string(&mut answer).await };
    let Ok(asked) = timeout(Duration::from_secs(1), asked).await else { return Ok(None) };
    match asked.map_err(|error| error.kind()) {
        Ok(_) => Ok(Some(answer).filter(|answer| !answer.is_empty())),
        Err(io::ErrorKind::ConnectionRefused) => Ok(Some(NOBODY.into())),
        Err(io::ErrorKind::ConnectionReset) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

async fn within<T>(what: &str, future: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| bail!("waited {PATIENCE:?} for {what}"))
}

/// A server that says its name to whoever connects.
async fn backend(ip: IpAddr, name: &'static str) -> Result<SocketAddr> {
    let listener = TcpListener::bind((ip, 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        loop {
            let Ok((mut stream, _)) = listener.accept().await else { continue };
            let _ = stream.write_all(name.as_bytes()).await; // Clients may go away.
        }
    });
    Ok(address)
}

/// `kube-relay run` with these flags, in this process and until it is dropped.
async fn relay(kubeconfig: &Path, namespace: &str, entry: SocketAddr) -> Result<(Relay, DropGuard)> {
    let expose = format!("{entry}={namespace}/{NAME}:http");
    let flags = ["kube-relay", "run", "--proxy-name", NAME, "--node-name", NAME, "--expose", &expose];
    // The client comes in at `entry`: no address has to be made local for it.
    let more = ["--vip-routes", "none", "--kubeconfig"];
    let line = flags.into_iter().chain(more).map(OsString::from).chain([kubeconfig.into()]);
    let Command::Run(args) = Cli::try_parse_from(line)?.command else { bail!("it is `run`") };
    let mut config = RunConfig::try_from(*args)?;
    config.plan.allow_loopback_endpoints = true; // Where the backends are, without a cluster.
    let SourceConfig::Api { server, .. } = &config.source else { bail!("a kubeconfig leads to a server") };

    let host = Host::loopback_only();
    let relay = Relay::start(config.relay_options(&host))?;
    let selection = Selection { proxy_name: Some(NAME.into()), node_name: NAME.into(), ..Selection::default() };
    let api = api_client::Api::find(server).await?;
    let source = Source::new(&api, &selection, &relay, Place { plan: config.plan, hosts: Hosts::fixed(host) })?;
    let stop = CancellationToken::new();
    tokio::spawn(kubernetes::run(source, stop.clone()));
    Ok((relay, stop.drop_guard()))
}

/// An address of a loopback net.
fn address([a, b, c]: [u8; 3], last: u8) -> IpAddr {
    Ipv4Addr::new(a, b, c, last).into()
}

/// Where this machine is reached: API servers take no endpoint on loopback. Nothing is sent.
fn own_address() -> Result<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).context("this machine has no address that others could reach")?;
    Ok(socket.local_addr()?.ip())
}
