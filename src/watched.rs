//! Objects as the watch of the `kube` crate wants them: of one kind, and already reduced to what a proxy reads.
//!
//! Nothing of the API's own object survives the reading of its text: ten thousand Services never stand in memory in full.
//! What their fields mean is `decode`.

use std::borrow::Cow;
use std::marker::PhantomData;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::{ClusterResourceScope, NamespaceResourceScope};
use kube::Resource;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::decode::{Kind, Observed};
use crate::own_node::OwnNode;
use crate::stats::WatchedKind;

/// An object that can be watched.
pub(crate) trait Watchable:
    Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + Send + 'static
{
    /// Its kind.
    fn watched() -> WatchedKind;
}

impl Watchable for WatchedNode {
    fn watched() -> WatchedKind {
        WatchedKind::Node
    }
}

impl<T: Reduced> Watchable for Watched<T> {
    fn watched() -> WatchedKind {
        T::KIND.into()
    }
}

/// A kind of which only what a proxy reads is ever kept.
pub(crate) trait Reduced: Clone + std::fmt::Debug + Send + 'static {
    /// The kind.
    const KIND: Kind;
    /// Its API group; empty for the core group.
    const GROUP: &'static str;
    /// Its name in paths.
    const PLURAL: &'static str;
}

/// `Service`, v1.
#[derive(Clone, Debug)]
pub(crate) struct Services;
/// `EndpointSlice`, discovery.k8s.io/v1.
#[derive(Clone, Debug)]
pub(crate) struct EndpointSlices;
/// `Endpoints`, v1.
#[derive(Clone, Debug)]
pub(crate) struct Endpoints;

impl Reduced for Services {
    const KIND: Kind = Kind::Service;
    const GROUP: &'static str = "";
    const PLURAL: &'static str = "services";
}

impl Reduced for EndpointSlices {
    const KIND: Kind = Kind::EndpointSlice;
    const GROUP: &'static str = "discovery.k8s.io";
    const PLURAL: &'static str = "endpointslices";
}

impl Reduced for Endpoints {
    const KIND: Kind = Kind::Endpoints;
    const GROUP: &'static str = "";
    const PLURAL: &'static str = "endpoints";
}

/// One object of a kind.
#[derive(Clone, Debug)]
pub(crate) struct Watched<T> {
    /// What a proxy reads in it.
    pub(crate) observed: Observed,
    /// What the watch reads in it: only the resource version, from which it continues.
    metadata: ObjectMeta,
    kind: PhantomData<fn() -> T>,
}

impl<'de, T: Reduced> Deserialize<'de> for Watched<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let observed = Observed::deserialize(deserializer, T::KIND)?;
        let metadata = ObjectMeta { resource_version: Some(observed.version.to_string()), ..ObjectMeta::default() };
        Ok(Self { observed, metadata, kind: PhantomData })
    }
}

impl<T: Reduced> Resource for Watched<T> {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind(_: &()) -> Cow<'_, str> {
        T::KIND.as_str().into()
    }

    fn group(_: &()) -> Cow<'_, str> {
        T::GROUP.into()
    }

    fn version(_: &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural(_: &()) -> Cow<'_, str> {
        T::PLURAL.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// A Node.
#[derive(Clone, Debug)]
pub(crate) struct WatchedNode {
    /// What a proxy reads in it.
    pub(crate) node: OwnNode,
    /// Only the resource version, as in [`Watched`].
    metadata: ObjectMeta,
}

impl<'de> Deserialize<'de> for WatchedNode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let object = Value::deserialize(deserializer)?;
        let resource_version = object["metadata"]["resourceVersion"].as_str().map(str::to_owned);
        Ok(Self { node: OwnNode::of(&object), metadata: ObjectMeta { resource_version, ..ObjectMeta::default() } })
    }
}

impl Resource for WatchedNode {
    type DynamicType = ();
    type Scope = ClusterResourceScope;

    fn kind(_: &()) -> Cow<'_, str> {
        "Node".into()
    }

    fn group(_: &()) -> Cow<'_, str> {
        "".into()
    }

    fn version(_: &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural(_: &()) -> Cow<'_, str> {
        "nodes".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn given_the_kinds_when_their_paths_are_made_then_they_are_those_of_the_api() {
        assert_eq!(Watched::<Services>::url_path(&(), None), "/api/v1/services");
        assert_eq!(Watched::<EndpointSlices>::url_path(&(), None), "/apis/discovery.k8s.io/v1/endpointslices");
        assert_eq!(Watched::<Endpoints>::url_path(&(), None), "/api/v1/endpoints");
        assert_eq!(WatchedNode::url_path(&(), None), "/api/v1/nodes");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if full() { 100_000 } else { 2_000 }))]

        #[test]
        fn f4_given_a_garbled_or_cut_object_when_read_then_nothing_panics(
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4),
            cut in any::<proptest::sample::Index>(),
            is_cut in any::<bool>(),
        ) {
            for text in [SERVICE, SLICE] {
                let mut bytes = text.as_bytes().to_vec();
                changes.iter().for_each(|(place, byte)| bytes[place.index(text.len())] = *byte);
                bytes.truncate(if is_cut { cut.index(text.len()) } else { text.len() });
                let _ = serde_json::from_slice::<Watched<Services>>(&bytes);
                let _ = serde_json::from_slice::<Watched<EndpointSlices>>(&bytes);
                let _ = serde_json::from_slice::<Watched<Endpoints>>(&bytes);
                let _ = serde_json::from_slice::<WatchedNode>(&bytes);
            }
        }
    }

    const SERVICE: &str = r#"{"metadata":{"name":"web","namespace":"default","resourceVersion":"5","annotations":{"kube-relay.dev/balance":"p2c"}},"spec":{"type":"NodePort","clusterIP":"10.96.0.9","clusterIPs":["10.96.0.9"],"ipFamilies":["IPv4"],"sessionAffinity":"ClientIP","sessionAffinityConfig":{"clientIP":{"timeoutSeconds":10}},"externalTrafficPolicy":"Local","ports":[{"name":"http","protocol":"TCP","port":80,"targetPort":"web","nodePort":30080}]},"status":{"loadBalancer":{"ingress":[{"ip":"10.0.0.9"}]}}}"#;
    const SLICE: &str = r#"{"metadata":{"name":"web-1","resourceVersion":"6","labels":{"kubernetes.io/service-name":"web"},"annotations":{"endpoints.kubernetes.io/last-change-trigger-time":"2026-11-21T06:01:52Z"}},"addressType":"IPv4","ports":[{"name":"http","protocol":"TCP","port":8080}],"endpoints":[{"addresses":["10.244.0.3"],"conditions":{"ready":true,"serving":null,"terminating":false},"nodeName":"n","zone":"z","hints":{"forZones":[{"name":"z"}]},"targetRef":{"kind":"Pod","name":"web-1"}}],"subsets":null}"#;

    fn full() -> bool {
        std::env::var("KUBE_RELAY_TEST").is_ok_and(|value| value == "full")
    }

    #[test]
    fn f4_given_an_item_of_a_list_with_wrong_fields_when_read_then_only_its_content_is_missing() {
        let item = json!({"metadata": {"name": "web", "resourceVersion": "5"}, "spec": {"ports": 7}});

        let watched: Watched<Services> = serde_json::from_value(item).expect("an object");

        assert_eq!(watched.meta().resource_version.as_deref(), Some("5"));
        assert!(watched.observed.content.is_none() && watched.observed.name.is_some());
    }
}
