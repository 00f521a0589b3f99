//! The library in a program of its own: one Service built in code, its endpoint swapped, its counters printed.
use std::net::SocketAddr;
use std::sync::Arc;

use kube_relay::control::{Message, Relay, RelayOptions};
use kube_relay::model::{Endpoint, Event, Service, Slice};
use kube_relay::{plan::PlanOptions, serve::balancer::Backend, status::Status};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let plan = PlanOptions { allow_loopback_endpoints: true, ..PlanOptions::default() };
    let relay = Relay::start(RelayOptions { plan, ..RelayOptions::default() })?;
    let (messages, mut status) = (relay.messages(), relay.status());
    let web = Service::new("default/web").cluster_ip([127, 96, 0, 20]).port("http", 8080);
    messages.send(Message::Event(Event::ApplyService(Arc::new(web.clone())))).await?;
    messages.send(Message::Synced).await?; // What was said so far is carried out now, later changes at once.

    for name in ["blue", "green"] {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        tokio::spawn(async move { listener.accept().await?.0.write_all(name.as_bytes()).await });

        let slice = Slice::new("web-1", &web).port("http", address.port()).endpoint(Endpoint::new(address.ip()));
        messages.send(Message::Event(Event::ApplySlice(Arc::new(slice)))).await?; // In place of the one before.
        let status = status.wait_for(|status| find(status, address).is_some()).await?.clone();
        let mut answer = String::new();
        TcpStream::connect("127.96.0.20:8080").await?.read_to_string(&mut answer).await?;
        let connections = find(&status, address).map_or(0, |backend| backend.stats.connections.get());
        println!("{answer} at {address}: {connections} connections");
    }
    Ok(())
}

fn find(status: &Status, address: SocketAddr) -> Option<&Backend> {
    let mut backends =
        status.services.values().flat_map(|service| &service.ports).flat_map(|port| port.backends.iter());
    backends.find(|backend| backend.address() == address).map(AsRef::as_ref)
}
