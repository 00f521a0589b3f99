//! Wrong objects and wrong files: none ends the process, none disturbs the others, and each is named.
//!
//! A few thousand mutations; with `KUBE_RELAY_TEST=full` a hundred thousand.

use std::fs;
use std::sync::Arc;

use kube_relay::allocate::Ranges;
use kube_relay::decode::{Decoded, decode};
use kube_relay::manifest::{self, Input};
use kube_relay::model::{Event, Model};
use kube_relay::name::ObjectName;
use kube_relay::plan::{Plan, PlanOptions, Severity};
use kube_relay::status::ServiceReport;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};
use support::full;

#[path = "support/mod.rs"]
mod support;

/// What all mutations together may leave behind in memory.
const MEMORY_KIB: u64 = 64 * 1024;

/// Every field that there is, to begin with.
const MANIFEST: &str = include_str!("manifests/every_field.yaml");

/// One change of an object.
#[derive(Clone, Debug)]
enum Mutation {
    /// The value is another one.
    Put(Value),
    /// The field or entry is gone.
    Remove,
    /// The value stands in a list.
    Wrap,
    /// The entry is there twice.
    Repeat,
    /// The field has another name.
    Rename(&'static str),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    prop_oneof![
        6 => value().prop_map(Mutation::Put),
        2 => Just(Mutation::Remove),
        1 => Just(Mutation::Wrap),
        1 => Just(Mutation::Repeat),
        1 => select(vec!["", "x", "Ports", "clusterip", "kind", "metadata", "\u{0}"]).prop_map(Mutation::Rename),
    ]
}

/// Wrong and odd values. None of them is an address, a number or a name of the good objects.
fn value() -> impl Strategy<Value = Value> {
    let texts = vec![
        "",
        " ",
        "None",
        "10.96.0.1",
        "010.096.000.001",
        "::",
        "fe80::1",
        "127.0.0.1",
        "256.1.1.1",
        "10.0.0.0/33",
        "UDP",
        "SCTP",
        "tcp",
        "Local",
        "FQDN",
        "IPv6",
        "Proxy",
        "ExternalName",
        "Deployment",
        "Service",
        "EndpointSlice",
        "v2",
        "discovery.k8s.io/v1",
        "zz",
        "Zz",
        "\u{1f980}",
        "a\nb",
        "99999999999999999999",
        "true",
        "kube-relay.dev/balance",
    ];
    let texts = prop_oneof![
        8 => select(texts).prop_map(|text| json!(text)),
        1 => Just(json!("y".repeat(70_000))),
        2 => "\\PC{0,12}".prop_map(|text| json!(text)),
    ];
    let numbers = select(vec![
        json!(-1),
        json!(0),
        json!(1),
        json!(65_535),
        json!(65_536),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(8e300),
        json!(0.5),
    ]);
    let others = select(vec![
        json!(null),
        json!(true),
        json!([]),
        json!({}),
        json!([null]),
        json!({"name": null}),
        json!([[[[[[]]]]]]),
    ]);
    prop_oneof![texts, numbers, others]
}

/// The paths of all values in a document.
fn paths(value: &Value, path: &str, all: &mut Vec<String>) {
    all.push(path.to_owned());
    match value {
        Value::Object(fields) => fields.iter().for_each(|(key, value)| {
            paths(value, &format!("{path}/{}", key.replace('~', "~0").replace('/', "~1")), all)
        }),
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(index, value)| paths(value, &format!("{path}/{index}"), all));
        }
        _ => {}
    }
}

fn mutate(document: &mut Value, place: usize, mutation: &Mutation) {
    let mut all = Vec::new();
    paths(document, "", &mut all);
    let path = &all[place % all.len()];
    let (parent, key) = path.rsplit_once('/').unwrap_or(("", ""));
    let key = key.replace("~1", "/").replace("~0", "~");
    match mutation {
        Mutation::Put(value) => *document.pointer_mut(path).expect("a path of this document") = value.clone(),
        Mutation::Wrap => {
            let value = document.pointer_mut(path).expect("a path of this document");
            *value = json!([value.take()]);
        }
        Mutation::Remove | Mutation::Rename(_) | Mutation::Repeat => match document.pointer_mut(parent) {
            Some(Value::Object(fields)) => {
                let value = fields.remove(&key);
                if let (Mutation::Rename(name), Some(value)) = (mutation, value) {
                    fields.insert((*name).to_owned(), value);
                }
            }
            Some(Value::Array(items)) => {
                let index = key.parse().unwrap_or(0);
                match mutation {
                    Mutation::Repeat if index < items.len() => items.push(items[index].clone()),
                    _ if index < items.len() => drop(items.remove(index)),
                    _ => {}
                }
            }
            _ => {}
        },
    }
}

/// The objects of [`MANIFEST`].
fn objects() -> Vec<Value> {
    let documents = MANIFEST.split("---\n").map(|text| serde_saphyr::from_str(text).expect("YAML"));
    documents.collect()
}

/// A Service and its slice that nothing in the mutations means.
fn good(number: u8) -> [Value; 2] {
    let name = format!("aa-{number}");
    [
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"clusterIP": format!("10.96.9.{number}"), "ports": [{"port": 1080 + u16::from(number)}]},
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4", "ports": [{"name": "", "port": 8000}], "endpoints": [{"addresses": ["10.244.9.9"]}],
        }),
    ]
}

/// What is planned for the good Services among all objects of a document.
fn planned(decoded: Decoded) -> Vec<Value> {
    let (mut model, mut plan, mut dirty) = (Model::default(), Plan::default(), Default::default());
    for entry in decoded.objects {
        match entry.content {
            kube_relay::decode::Content::Service(service) => {
                model.apply(Event::ApplyService(service), &mut dirty);
            }
            kube_relay::decode::Content::Slices(slices) => slices.iter().for_each(|slice| {
                model.apply(Event::ApplySlice(Arc::clone(slice)), &mut dirty);
            }),
        }
    }
    let options = PlanOptions { node_port_addresses: vec![[192, 0, 2, 1].into()], ..PlanOptions::default() };
    plan.update(&model, &dirty, &options);
    let report = |number| {
        let name = ObjectName::parse(&format!("default/aa-{number}"));
        let service = model.service(&name).expect("a good Service is there");
        json!(ServiceReport::of(service, plan.service(&name).map(AsRef::as_ref)))
    };
    [1, 2].into_iter().map(report).collect()
}

fn list(bad: &[Value]) -> String {
    let items: Vec<Value> = good(1).into_iter().chain(bad.iter().cloned()).chain(good(2)).collect();
    json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string()
}

fn run<S: Strategy>(strategy: &S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let cases = if full() { 50_000 } else { 1_500 };
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) };
    let before = memory_kib();

    TestRunner::new(config).run(strategy, test).unwrap_or_else(|failure| panic!("{failure}"));

    let grown = memory_kib().saturating_sub(before);
    assert!(grown < MEMORY_KIB, "{grown} KiB more than before");
}

/// Memory that this process holds.
fn memory_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux tells");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process has memory");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn f4_given_any_mutated_object_when_read_then_it_is_named_and_the_others_are_served_as_if_it_were_not_there() {
    let objects = objects();
    let expected = planned(decode(list(&[]).as_bytes(), "list.json"));
    assert!(expected.iter().all(|service| service["ports"][0]["backends"]["Cluster"] == json!(["10.244.9.9:8000"])));

    run(&(0..objects.len(), vec((any::<usize>(), mutation()), 1..5)), |(object, mutations)| {
        let original = &objects[object];
        let mut mutated = original.clone();
        mutations.iter().for_each(|(place, mutation)| mutate(&mut mutated, *place, mutation));

        let decoded = decode(list(std::slice::from_ref(&mutated)).as_bytes(), "list.json");

        check_named(original, &mutated, &decoded)?;
        prop_assert_eq!(&planned(decoded), &expected);
        Ok(())
    });
}

/// An object that is left out has an error with its name, where it has kept that, and is counted.
fn check_named(original: &Value, mutated: &Value, decoded: &Decoded) -> Result<(), TestCaseError> {
    let errors: Vec<_> = decoded.problems.iter().filter(|problem| problem.severity == Severity::Error).collect();
    prop_assert_eq!(errors.is_empty(), decoded.rejected.is_empty(), "{:?}", decoded.problems);
    prop_assert!(errors.iter().all(|problem| !problem.reason.is_empty() && problem.line.is_some()));
    prop_assert_eq!(decoded.rejected.len(), usize::from(!errors.is_empty()));
    if decoded.objects.len() < 5 {
        prop_assert!(!decoded.problems.is_empty() || mutated.is_null(), "nobody says that it is left out");
    }
    if ["apiVersion", "kind", "metadata"].iter().all(|field| mutated[field] == original[field]) {
        let metadata = &original["metadata"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let name = format!("{} {}/{}", text(&original["kind"]), text(&metadata["namespace"]), text(&metadata["name"]));
        prop_assert!(errors.iter().all(|problem| problem.object == name), "{:?} is not {}", errors, name);
    }
    Ok(())
}

/// One change of the bytes of a file.
fn damage() -> impl Strategy<Value = (usize, usize, Vec<u8>)> {
    let text =
        "([\\[{]{0,3}|[0-9.]{1,22}|null|~|- |: |---\n|\"|'|\t|\r|&a|\\*a|<<: \\*a|!!binary|\u{feff}|true|[a-z]{1,8})";
    let bytes = prop_oneof![3 => text.prop_map(String::into_bytes), 1 => vec(any::<u8>(), 0..16)];
    (any::<usize>(), 0..400_usize, bytes)
}

#[test]
fn f20_given_any_damaged_file_when_read_then_the_other_file_is_served_and_what_is_left_out_is_said() {
    let folder = tempfile::tempdir().expect("a folder");
    let (fine, bad) = (folder.path().join("aa.json"), folder.path().join("bad.yaml"));
    fs::write(&fine, list(&[])).expect("a file");
    let inputs = || vec![Input::Path(fine.clone()), Input::Path(bad.clone())];

    run(&(vec(damage(), 1..4), any::<bool>(), any::<usize>()), |(damages, cut, end)| {
        let mut bytes = MANIFEST.as_bytes().to_vec();
        for (at, length, put) in damages {
            let at = at % (bytes.len() + 1);
            let to = (at + length).min(bytes.len());
            bytes.splice(at..to, put);
        }
        if cut {
            bytes.truncate(end % (bytes.len() + 1));
        }
        fs::write(&bad, &bytes).expect("a file");

        let reading = manifest::read(inputs(), Ranges::default());

        let of_good = |name: &ObjectName| name.name.starts_with("aa-");
        prop_assert_eq!(reading.objects.services.iter().filter(|service| of_good(&service.name)).count(), 2);
        prop_assert_eq!(reading.objects.slices.iter().filter(|slice| of_good(&slice.service)).count(), 2);
        let failed = reading.failed.iter().any(|file| *file == bad.to_string_lossy());
        prop_assert_eq!(failed, !reading.rejections.is_empty(), "{:?}", reading.problems);
        prop_assert!(!failed || reading.problems.iter().any(|problem| problem.severity == Severity::Error));
        Ok(())
    });
}
