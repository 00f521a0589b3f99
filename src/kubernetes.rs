//! The API source: Services and their endpoints as an API server tells them, for as long as it takes.
//!
//! Here is what is watched. One watch, and when to try it again, is `api_watch`; the way to the server `api_client`; what is
//! told of all this `api_report`; what of its objects is in use `mirror`; how it does is read in `contact`. Nothing is taken
//! out of use because the server is away: the last state stays until a complete new one is there.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::api_client::{Api, ApiError};
use crate::api_report::Report;
use crate::api_watch::{Sighting, Watch, at};
use crate::contact::Contact;
use crate::control::Message;
use crate::decode::Kind;
use crate::last_good::{self, Keeper};
use crate::mirror::Mirror;
use crate::watched::{EndpointSlices, Endpoints, Services};

/// How often it is looked whether the server is back: a watch that goes on without news says nothing by itself.
const OUTAGE_LOOK: Duration = Duration::from_secs(1);

/// How long the server may take at the start before the state of the last run is served.
const SAVED_AFTER: Duration = Duration::from_millis(500);

/// Which objects are taken, and where the last of them are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Folder of the state that is served when the server is away at the start; `None`: no such state. From `--state-dir`.
    pub state_dir: Option<PathBuf>,
    /// Services with this value of the label `service.kubernetes.io/service-proxy-name`; `None`: those without the label.
    /// From `--proxy-name`.
    pub proxy_name: Option<String>,
}

/// The source, ready to begin. Owned by the task of [`run`].
#[derive(Debug)]
pub struct Source {
    /// Of Services and of EndpointSlices.
    watches: [Watch; 2],
    /// In place of slices, where the server has none.
    old_endpoints: Option<Watch>,
    contact: Arc<Contact>,
    server: String,
    /// The file with the last state.
    saved: Option<PathBuf>,
}

impl Source {
    /// Prepares the watches of Services and EndpointSlices. Sends nothing.
    ///
    /// # Errors
    /// Where the credentials cannot be used.
    pub fn new(api: &Api, selection: &Selection, contact: Arc<Contact>) -> Result<Self, ApiError> {
        let services = labels_of_services(selection);
        let endpoints = || "!service.kubernetes.io/headless".to_owned();
        let watches = [
            Watch::new::<Services>(api, services, &contact)?,
            Watch::new::<EndpointSlices>(api, endpoints(), &contact)?,
        ];
        let old_endpoints = Some(Watch::new::<Endpoints>(api, endpoints(), &contact)?);
        Ok(Self {
            watches,
            old_endpoints,
            contact,
            server: api.server(),
            saved: selection.state_dir.as_deref().map(last_good::path),
        })
    }
}

fn labels_of_services(selection: &Selection) -> String {
    const LABEL: &str = "service.kubernetes.io/service-proxy-name";
    match &selection.proxy_name {
        Some(name) => format!("{LABEL}={name}"),
        None => format!("!{LABEL}"),
    }
}

/// Follows the API server until `cancel`.
///
/// Sends `Synced` once Services and endpoints have both been listed, then each change; what was deleted while the server
/// could not be reached, together with all else that changed, when it can.
pub async fn run(source: Source, messages: mpsc::Sender<Message>, cancel: CancellationToken) {
    tokio::select! {
        biased;
        () = cancel.cancelled() => {}
        () = follow(source, messages) => {}
    }
}

/// Ends when nobody listens any more.
async fn follow(source: Source, messages: mpsc::Sender<Message>) {
    let Source { watches: [mut services, mut endpoints], mut old_endpoints, contact, server, saved } = source;
    tracing::info!(server, "asking the API server");
    [&services, &endpoints].into_iter().for_each(|watch| contact.watch(watch.kind));
    let kinds = [services.kind, endpoints.kind];
    let mut report = Report::new(messages, Arc::clone(&contact), server, kinds);
    let (mut save, start) = (Keeper::new(saved.clone()), Instant::now());
    let mut serve_saved = saved;
    loop {
        let took = tokio::select! {
            sighting = services.next() => report.take(0, sighting).await,
            sighting = endpoints.next() => match (sighting, old_endpoints.take()) {
                (Sighting::Unknown, Some(old)) => {
                    tracing::warn!(
                        server = report.server,
                        "the API server has no discovery.k8s.io/v1 (before 1.21): reading Endpoints, of which it cuts \
                         those with more than 1,000 addresses"
                    );
                    contact.forget(endpoints.kind);
                    contact.watch(old.kind);
                    (endpoints, report.mirrors[1]) = (old, Mirror::new(Kind::Endpoints));
                    Ok(())
                }
                (sighting, old) => {
                    old_endpoints = old;
                    report.take(1, sighting).await
                }
            },
            () = tokio::time::sleep(OUTAGE_LOOK), if report.is_away() => report.look().await,
            () = sleep_until(start + SAVED_AFTER), if serve_saved.is_some() => {
                report.serve_saved(serve_saved.take()).await
            }
            () = at(save.due()) => {
                save.save(report.objects());
                Ok(())
            }
        };
        if took.is_err() {
            return;
        }
        if report.synced() {
            serve_saved = None;
            save.note(std::mem::take(&mut report.changed));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_a_proxy_name_when_selected_then_its_services_are_asked_for_and_else_those_of_nobody() {
        let own = Selection { proxy_name: Some("kube-relay".into()), ..Selection::default() };

        assert_eq!(labels_of_services(&own), "service.kubernetes.io/service-proxy-name=kube-relay");
        assert_eq!(labels_of_services(&Selection::default()), "!service.kubernetes.io/service-proxy-name");
    }
}
