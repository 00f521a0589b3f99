//! What was said of the Node that this relay runs on: to load balancers, to the log, and as the setting of the plan.
//!
//! What a Node means is `own_node`; when something of it is seen is up to `kubernetes`.

use std::sync::Arc;

use crate::api_watch::Sighting;
use crate::control::Setting;
use crate::health::Health;
use crate::own_node::OwnNode;
use crate::place::Place;

/// What was told of the Node that this relay runs on.
#[derive(Debug)]
pub(crate) struct NodeReport {
    name: Arc<str>,
    place: Place,
    health: Health,
    /// As it was last seen: what a Node said that is gone stays in use, as the traffic of its pods does.
    known: Option<OwnNode>,
    /// What is being listed, until the list is complete.
    arriving: Option<OwnNode>,
    asked: bool,
    standing: Option<Standing>,
}

/// What the cluster wants of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Staying,
    Leaving,
    Missing,
}

impl NodeReport {
    /// Nothing is known of the Node of this name, and nothing said of it.
    pub(crate) fn new(name: &Arc<str>, place: Place, health: Health) -> Self {
        Self { name: Arc::clone(name), place, health, known: None, arriving: None, asked: false, standing: None }
    }

    /// The Node is asked for from now on. As long as nothing is known of it, load balancers are told to send nothing here.
    pub(crate) fn begin(&self) {
        self.health.set_node_eligible(false);
    }

    /// The name of the Node.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// True once the server was asked, whatever came of it: nobody waits for a Node that may not be there.
    pub(crate) fn was_asked_for(&self) -> bool {
        self.asked
    }

    /// As it was last seen.
    pub(crate) fn known(&self) -> Option<&OwnNode> {
        self.known.as_ref()
    }

    /// The setting that comes of what was seen, where it is another one than before.
    pub(crate) fn take(&mut self, sighting: Sighting<OwnNode>) -> Option<Box<Setting>> {
        self.asked |= !matches!(sighting, Sighting::Begin | Sighting::Listed(_));
        match sighting {
            Sighting::Begin => self.arriving = None,
            Sighting::Listed(node) => self.arriving = Some(node),
            Sighting::Complete => {
                let node = self.arriving.take();
                return self.see(node);
            }
            Sighting::Put(node) => return self.see(Some(node)),
            Sighting::Gone(_) => return self.see(None),
            Sighting::Failed(..) | Sighting::Unknown => {}
        }
        None
    }

    /// The same, of what the last run knew.
    pub(crate) fn recall(&mut self, node: OwnNode) -> Option<Box<Setting>> {
        let is_ours = self.known.is_none() && node.name == self.name;
        if is_ours { self.see(Some(node)) } else { None }
    }

    /// The setting on a machine that is another one than before.
    pub(crate) fn moved(&self) -> Box<Setting> {
        let setting = self.known.as_ref().map_or_else(|| self.place.setting(), |node| node.setting(&self.place));
        Box::new(setting)
    }

    fn see(&mut self, node: Option<OwnNode>) -> Option<Box<Setting>> {
        self.judge(node.as_ref());
        let mut node = node?;
        if let Some(known) = &self.known {
            node.keep_missing(known);
        }
        if self.known.as_ref() == Some(&node) {
            return None;
        }
        let setting = node.setting(&self.place);
        self.known = Some(node);
        Some(Box::new(setting))
    }

    fn judge(&mut self, node: Option<&OwnNode>) {
        let standing = match node {
            Some(node) if node.is_eligible() => Standing::Staying,
            Some(_) => Standing::Leaving,
            None => Standing::Missing,
        };
        self.health.set_node_eligible(standing == Standing::Staying);
        if self.standing.replace(standing) == Some(standing) {
            return;
        }
        let node = &*self.name;
        match standing {
            Standing::Staying => tracing::info!(node, "this Node may get traffic"),
            Standing::Leaving => tracing::info!(node, "this Node is about to go: /healthz sends load balancers away"),
            Standing::Missing if self.known.is_some() => {
                tracing::warn!(node, "this Node was deleted: /healthz sends load balancers away, others are served");
            }
            Standing::Missing => tracing::warn!(
                node,
                "the API server has no Node of this name: /healthz sends load balancers away, endpoints here are not \
                 known as local; give the right name with --node-name"
            ),
        }
    }
}
