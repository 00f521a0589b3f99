//! That no field of the API is forgotten: the README says of each what becomes of it, and the decoder knows it.
//!
//! The names are those that the API's own types ask for when they are decoded; they are written down nowhere else.

use std::collections::BTreeSet;
use std::{error, fmt, fs};

use k8s_openapi::api::core::v1::{
    ClientIPConfig, LoadBalancerIngress, LoadBalancerStatus, ServicePort, ServiceSpec, ServiceStatus,
    SessionAffinityConfig,
};
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone,
};
use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::forward_to_deserialize_any;

/// The fields of a Service, by their paths; those of `spec` without it, as the README has them.
fn fields_of_services() -> Vec<String> {
    [
        under::<ServiceSpec>(""),
        under::<ServicePort>("ports[]."),
        under::<SessionAffinityConfig>("sessionAffinityConfig."),
        under::<ClientIPConfig>("sessionAffinityConfig.clientIP."),
        under::<ServiceStatus>("status."),
        under::<LoadBalancerStatus>("status.loadBalancer."),
        under::<LoadBalancerIngress>("status.loadBalancer.ingress[]."),
    ]
    .concat()
}

/// The fields of an EndpointSlice beside those that each object has.
fn fields_of_slices() -> Vec<String> {
    let own = under::<EndpointSlice>("").into_iter();
    let own = own.filter(|field| !["apiVersion", "kind", "metadata"].contains(&field.as_str())).collect();
    [
        own,
        under::<EndpointPort>("ports[]."),
        under::<Endpoint>("endpoints[]."),
        under::<EndpointConditions>("endpoints[].conditions."),
        under::<EndpointHints>("endpoints[].hints."),
        under::<ForZone>("endpoints[].hints.forZones[]."),
        under::<ForNode>("endpoints[].hints.forNodes[]."),
    ]
    .concat()
}

#[test]
fn given_the_api_when_the_readme_is_read_then_it_says_of_each_field_what_becomes_of_it() {
    let readme = include_str!("../README.md");

    for (title, fields) in [("### Service", fields_of_services()), ("### EndpointSlice", fields_of_slices())] {
        let told = fields_told(readme, title);
        // Whoever tells what is in a list or an object has told of it, too.
        let is_told = |field: &str| told.iter().any(|told| told == field || is_below(told, field));
        let missing: Vec<_> = fields.iter().filter(|field| !is_told(field)).collect();
        assert!(missing.is_empty(), "no row of the table under {title:?} in README.md for {missing:?}");
    }
}

#[test]
fn given_the_api_when_a_manifest_has_all_of_it_then_the_decoder_calls_no_field_unknown() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/manifests/every_field.yaml");
    let manifest = fs::read_to_string(path).expect("the manifest with every field");

    for field in fields_of_services().into_iter().chain(fields_of_slices()) {
        let name = field.rsplit('.').next().unwrap_or_default();
        assert!(manifest.contains(&format!("{name}:")), "{field} is not in every_field.yaml");
    }
    let decoded = kube_relay::decode::decode(manifest.as_bytes(), "every_field.yaml");
    let unknown: Vec<_> = decoded.problems.iter().filter(|problem| problem.reason == "unknown_field").collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}

fn is_below(path: &str, field: &str) -> bool {
    path.strip_prefix(field).is_some_and(|rest| rest.starts_with(['.', '[']))
}

/// What stands in backquotes in the first column of the table under a title.
fn fields_told(readme: &str, title: &str) -> BTreeSet<String> {
    let section = readme.lines().skip_while(|line| *line != title).skip(1).take_while(|line| !line.starts_with('#'));
    let cells = section.filter_map(|line| line.strip_prefix('|')?.split('|').next());
    cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).map(str::to_owned).collect()
}

fn under<T: for<'de> Deserialize<'de>>(path: &str) -> Vec<String> {
    let fields = match T::deserialize(Asked) {
        Err(Told(fields)) => fields,
        Ok(_) => &[],
    };
    assert!(!fields.is_empty(), "{} asks for no fields", std::any::type_name::<T>());
    fields.iter().map(|field| format!("{path}{field}")).collect()
}

/// A document that holds nothing: it only notes which fields it is asked for.
struct Asked;

/// The answer to the asking.
#[derive(Debug)]
struct Told(&'static [&'static str]);

impl<'de> Deserializer<'de> for Asked {
    type Error = Told;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, Told> {
        Err(Told(fields))
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Told> {
        Err(Told(&[]))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "asked for {:?}", self.0)
    }
}

impl error::Error for Told {}

impl de::Error for Told {
    fn custom<T: fmt::Display>(_message: T) -> Self {
        Self(&[])
    }
}
