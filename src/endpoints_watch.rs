//! The watch of endpoints: of EndpointSlices, or of Endpoints where a server has no slices (before 1.21).
//!
//! Which of them, the server itself says at `/apis`, once it does not find what it is asked for (404). That alone says
//! little: a proxy in between that leads elsewhere finds nothing either.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use kube::Client;

use crate::api_client::{Api, ApiError};
use crate::api_watch::{Selector, Sighting, Watch, reason_of_request};
use crate::causes::causes;
use crate::contact::Contact;
use crate::decode::{Kind, Observed};
use crate::stats::WatchFailure;
use crate::watched::{EndpointSlices, Endpoints, Watched};

/// Where slices are in the API.
const GROUP: &str = "discovery.k8s.io";
const VERSION: &str = "v1";

/// What is seen of endpoints.
#[derive(Debug)]
pub(crate) enum EndpointsSighting {
    /// Of the kind that is watched.
    Of(Sighting<Observed>),
    /// Another kind is watched from now on, beginning with a list.
    Turn(Kind),
}

/// Whether the server has slices, or why that is not known.
type Answer = Result<bool, (WatchFailure, String)>;

/// Both kinds, of which one is watched. Owned by the task of the source.
pub(crate) struct EndpointsWatch {
    slices: Watch<Observed>,
    endpoints: Watch<Observed>,
    by_slices: bool,
    client: Client,
    /// The question what the server has, while it is under way.
    asking: Option<BoxFuture<'static, Answer>>,
}

impl std::fmt::Debug for EndpointsWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EndpointsWatch").field("kind", &self.kind()).finish_non_exhaustive()
    }
}

impl EndpointsWatch {
    /// Of slices, until the server says that it has none. Sends nothing yet.
    pub(crate) fn new(api: &Api, selector: &Selector, contact: &Arc<Contact>) -> Result<Self, ApiError> {
        Ok(Self {
            slices: Watch::new::<Watched<EndpointSlices>>(api, selector, contact, |object| object.observed)?,
            endpoints: Watch::new::<Watched<Endpoints>>(api, selector, contact, |object| object.observed)?,
            by_slices: true,
            client: api.plain_client()?,
            asking: None,
        })
    }

    /// What is watched now.
    pub(crate) fn kind(&self) -> Kind {
        if self.by_slices { Kind::EndpointSlice } else { Kind::Endpoints }
    }

    /// What is seen next. May be dropped and called again at any time: nothing is lost.
    pub(crate) async fn next(&mut self) -> EndpointsSighting {
        loop {
            if let Some(asking) = &mut self.asking {
                let answer = asking.await;
                self.asking = None;
                return self.take(answer);
            }
            let watch = if self.by_slices { &mut self.slices } else { &mut self.endpoints };
            match watch.next().await {
                Sighting::Unknown => self.asking = Some(Box::pin(has_slices(self.client.clone()))),
                sighting => return EndpointsSighting::Of(sighting),
            }
        }
    }

    /// The same as for one [`Watch`].
    pub(crate) fn hurry(&mut self) {
        let watch = if self.by_slices { &mut self.slices } else { &mut self.endpoints };
        watch.hurry();
    }

    fn take(&mut self, answer: Answer) -> EndpointsSighting {
        match answer {
            Ok(has_slices) if has_slices != self.by_slices => {
                self.by_slices = has_slices;
                EndpointsSighting::Turn(self.kind())
            }
            Ok(_) => {
                let error = "the server has this kind, as it says at /apis, and does not find it (404)".to_owned();
                EndpointsSighting::Of(Sighting::Failed(WatchFailure::Server, error))
            }
            Err((reason, error)) => EndpointsSighting::Of(Sighting::Failed(reason, error)),
        }
    }
}

/// Asks the server what it has. Every account may know that (`system:discovery`).
async fn has_slices(client: Client) -> Answer {
    let groups = match client.list_api_groups().await {
        Ok(list) => list.groups,
        Err(error) => return Err((reason_of_request(&error), format!("/apis: {}", causes(&error)))),
    };
    if groups.is_empty() {
        return Err((WatchFailure::Decode, "/apis: not the groups of an API server".to_owned()));
    }
    let mut versions = groups.iter().filter(|group| group.name == GROUP).flat_map(|group| &group.versions);
    Ok(versions.any(|version| version.version == VERSION))
}
