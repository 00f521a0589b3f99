//! The API source: Services, their endpoints and the own Node as an API server tells them, for as long as it takes.
//!
//! Here is what is watched. One watch, and when to try it again, is `api_watch`, the choice between two kinds of endpoints
//! `endpoints_watch`; who is asked `api_client`, and as whom `login`; what is told of all this `api_report`, and to the
//! cluster `events`; what of its objects is in use `mirror`; how it does is read in `contact`. Nothing is taken out of use
//! because the server is away: the last state stays until a complete new one is there.

use std::io;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use rand::RngExt;
use tokio::runtime::Builder;
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::admin::Unbound;
use crate::api_client::{Api, ApiError};
use crate::api_report::{Report, Server};
use crate::api_watch::{Selector, Watch, at};
use crate::control::Relay;
use crate::decode::Observed;
use crate::endpoints_watch::{EndpointsSighting, EndpointsWatch};
use crate::events::Herald;
use crate::host_watch::Hosts;
use crate::last_good::{self, Keeper};
use crate::node_report::NodeReport;
use crate::own_node::OwnNode;
use crate::place::Place;
use crate::watched::{Services, Watched, WatchedNode};

/// How often it is looked whether the server is back: a watch that goes on without news says nothing by itself.
const OUTAGE_LOOK: Duration = Duration::from_secs(1);

/// How long the server may take at the start before the state of the last run is served.
const SAVED_AFTER: Duration = Duration::from_millis(500);

/// Which objects are taken, and where the last of them are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Folder of the state that is served when the server is away at the start; `None`: no such state. From `--state-dir`.
    pub state_dir: Option<PathBuf>,
    /// Cancelled once that folder is this process's own: nothing is written there before, as another one may. `None`: it is from the
    /// start.
    pub folder_taken: Option<CancellationToken>,
    /// Services with this value of the label `service.kubernetes.io/service-proxy-name`; `None`: those without the label.
    /// From `--proxy-name`.
    pub proxy_name: Option<String>,
    /// The Node that this relay runs on. From `--node-name`, else the name of this machine.
    pub node_name: Arc<str>,
    /// Where the cluster takes the addresses of Services from, as far as that is known before it is asked. From
    /// `KUBERNETES_SERVICE_HOST` and `--service-cluster-ip-range`.
    pub service_nets: Vec<IpNet>,
    /// Seconds for which the server lets a watch live. Drawn for each, so that a thousand nodes do not come back at once;
    /// short, as a connection that broke without a word is noticed 5 s later. 48 to 60, but for tests.
    pub watch_seconds: RangeInclusive<u32>,
    /// How long something has to be wrong before the cluster is told in an Event: what mends itself is no news. Drawn once,
    /// so that a thousand nodes, which see the same, do not tell it as one. 1 to 30 s, but for tests.
    pub event_delay: RangeInclusive<Duration>,
}

impl Default for Selection {
    fn default() -> Self {
        let (state_dir, folder_taken, proxy_name, service_nets) = (None, None, None, Vec::new());
        let event_delay = Duration::from_secs(1)..=Duration::from_secs(30);
        let node_name = "".into();
        Self { state_dir, folder_taken, proxy_name, node_name, service_nets, watch_seconds: 48..=60, event_delay }
    }
}

impl Selection {
    /// Networks whose addresses nobody but this relay serves on this node. One that takes Services of its own label alone
    /// has another proxy beside it, which serves the cluster's own.
    fn served_nets(&self) -> Vec<IpNet> {
        if self.proxy_name.is_some() { Vec::new() } else { self.service_nets.clone() }
    }

    fn services(&self) -> Selector {
        const LABEL: &str = "service.kubernetes.io/service-proxy-name";
        let labels = match &self.proxy_name {
            Some(name) => format!("{LABEL}={name}"),
            None => format!("!{LABEL}"),
        };
        Selector { labels: Some(labels), fields: None, seconds: self.watch_seconds.clone() }
    }

    fn endpoints(&self) -> Selector {
        let labels = Some("!service.kubernetes.io/headless".to_owned());
        Selector { labels, fields: None, seconds: self.watch_seconds.clone() }
    }

    fn node(&self) -> Selector {
        let fields = Some(format!("metadata.name={}", self.node_name));
        Selector { labels: None, fields, seconds: self.watch_seconds.clone() }
    }
}

/// The source cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The server cannot be asked.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// There is no thread for it.
    #[error("cannot start the runtime of the API source")]
    Runtime(#[source] io::Error),
}

/// Follows an API server until `cancel`, on a thread and a runtime of its own: the list of a large cluster is tens of
/// megabytes, and who reads them does nothing else for a second. To be called on a runtime, whose end it does not outlive.
/// `unbound`: as for [`Source::telling_of`].
///
/// # Errors
/// Where the credentials cannot be used, or no thread is left.
pub fn start(
    api: &Api,
    selection: &Selection,
    relay: &Relay,
    place: Place,
    unbound: watch::Receiver<Vec<Unbound>>,
    cancel: CancellationToken,
) -> Result<JoinHandle<()>, StartError> {
    let runtime = Builder::new_current_thread().enable_all().build().map_err(StartError::Runtime)?;
    let source = {
        let _entered = runtime.enter(); // The clients have tasks.
        Source::new(api, selection, relay, place)
    };
    match source {
        Ok(source) => Ok(spawn_blocking(move || runtime.block_on(run(source.telling_of(unbound), cancel)))),
        Err(error) => {
            runtime.shutdown_background(); // To wait for its end is not allowed on another one.
            Err(error.into())
        }
    }
}

/// The source, ready to begin. Owned by the task of [`run`].
#[derive(Debug)]
pub struct Source {
    services: Watch<Observed>,
    endpoints: EndpointsWatch,
    node: Watch<OwnNode>,
    hosts: Hosts,
    /// The file with the last state.
    saved: Option<PathBuf>,
    /// Cancelled once that may be written.
    folder_taken: CancellationToken,
    report: Report,
    herald: Herald,
}

impl Source {
    /// Prepares the watches for a relay at a place: Services, EndpointSlices and the own Node. Sends nothing. To be called
    /// on the runtime that it is to run on.
    ///
    /// # Errors
    /// Where the credentials cannot be used.
    pub fn new(api: &Api, selection: &Selection, relay: &Relay, place: Place) -> Result<Self, ApiError> {
        let contact = relay.contact();
        let (services, endpoints, node) = (selection.services(), selection.endpoints(), selection.node());
        let event_delay = rand::rng().random_range(selection.event_delay.clone());
        Ok(Self {
            services: Watch::new::<Watched<Services>>(api, &services, &contact, |object| object.observed)?,
            endpoints: EndpointsWatch::new(api, &endpoints, &contact)?,
            node: Watch::new::<WatchedNode>(api, &node, &contact, |object| object.node)?,
            hosts: place.hosts.clone(),
            saved: selection.state_dir.as_deref().map(last_good::path),
            folder_taken: selection.folder_taken.clone().unwrap_or_else(already_cancelled),
            report: Report::new(
                Server { name: api.server(), api: api.clone(), service_nets: selection.served_nets() },
                relay,
                NodeReport::new(&selection.node_name, place, relay.health()),
            ),
            herald: Herald::new(api, Arc::clone(&selection.node_name), relay, event_delay)?,
        })
    }

    /// Tells on the own Node which of these there are: see [`crate::admin::Admin::unbound`].
    #[must_use]
    pub fn telling_of(mut self, unbound: watch::Receiver<Vec<Unbound>>) -> Self {
        self.herald.watch_unbound(unbound);
        self
    }
}

/// Follows the API server until `cancel`.
///
/// Sends `Synced` once Services and endpoints have both been listed and the Node was asked for, then each change; what was
/// deleted while the server could not be reached, together with all else that changed, when it can. Meanwhile Events tell
/// the cluster what is wrong with its objects here.
pub async fn run(source: Source, cancel: CancellationToken) {
    tokio::select! {
        biased;
        () = cancel.cancelled() => {}
        () = follow(source) => {}
    }
}

/// Ends when nobody listens any more.
async fn follow(source: Source) {
    let Source { mut services, mut endpoints, mut node, mut hosts, saved, folder_taken, mut report, herald } = source;
    let mut telling = pin!(herald.run());
    report.begin([services.kind, endpoints.kind().into(), node.kind]);
    let (mut save, start) = (Keeper::new(saved.clone()), Instant::now());
    let mut serve_saved = saved;
    let mut may_save = folder_taken.is_cancelled();
    let mut look = interval(OUTAGE_LOOK); // Also where news of other kinds come more often.
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Only this relay leads to such a server, and only the file leads to this relay.
    if report.server.is_a_service() && report.serve_saved(serve_saved.take()).await.is_err() {
        return;
    }
    loop {
        let took = tokio::select! {
            sighting = services.next() => report.take(0, sighting).await,
            sighting = endpoints.next() => match sighting {
                EndpointsSighting::Of(sighting) => report.take(1, sighting).await,
                EndpointsSighting::Turn(kind) => {
                    report.turn_to(kind);
                    Ok(())
                }
            },
            sighting = node.next() => report.take_node(sighting).await,
            _ = hosts.changed() => report.move_host().await,
            _ = look.tick(), if report.is_away() => report.look().await,
            () = sleep_until(start + SAVED_AFTER), if serve_saved.is_some() => {
                report.serve_saved(serve_saved.take()).await
            }
            () = at(report.catch_up_due()) => report.catch_up().await,
            () = folder_taken.cancelled(), if !may_save => {
                may_save = true;
                Ok(())
            }
            () = at(save.due()) => {
                save.save(report.state());
                Ok(())
            }
            () = &mut telling => return,
        };
        if took.is_err() {
            return;
        }
        if report.take_return() {
            services.hurry();
            endpoints.hurry();
            node.hurry();
        }
        if report.is_synced() {
            serve_saved = None;
            if may_save {
                save.note(report.take_changed());
            }
        }
    }
}

fn already_cancelled() -> CancellationToken {
    let token = CancellationToken::new();
    token.cancel();
    token
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_a_proxy_name_when_selected_then_its_services_are_asked_for_and_else_those_of_nobody() {
        let own = Selection { proxy_name: Some("kube-relay".into()), ..Selection::default() };

        let labels = |selection: &Selection| selection.services().labels;
        assert_eq!(labels(&own).as_deref(), Some("service.kubernetes.io/service-proxy-name=kube-relay"));
        assert_eq!(labels(&Selection::default()).as_deref(), Some("!service.kubernetes.io/service-proxy-name"));
    }

    #[test]
    fn f2_given_a_proxy_name_when_the_server_is_asked_by_its_cluster_ip_then_another_proxy_leads_there() {
        let service_nets = vec![IpNet::from(std::net::IpAddr::from([10, 96, 0, 1]))];
        let alone = Selection { service_nets: service_nets.clone(), ..Selection::default() };
        let beside = Selection { proxy_name: Some("kube-relay".into()), ..alone.clone() };

        assert_eq!(alone.served_nets(), service_nets);
        assert!(beside.served_nets().is_empty());
    }
}
