//! What a real API server wants of an Event (`events.k8s.io/v1`) before it takes it, as its validation has it.

use serde_json::Value;

const NAME_BYTES: usize = 253;
const NOTE_BYTES: usize = 1024;
const WORD_BYTES: usize = 128;

/// What is wrong with a new Event in a namespace.
pub(super) fn faults_of_new(event: &Value, namespace: &str) -> Vec<String> {
    let metadata = &event["metadata"];
    let regarding = event["regarding"]["namespace"].as_str();
    let rules = [
        ("metadata.name", metadata["name"].as_str().is_some_and(is_subdomain)),
        ("metadata.namespace", metadata["namespace"].as_str().is_none_or(|own| own == namespace)),
        ("regarding.namespace", regarding.unwrap_or("default") == namespace),
        ("eventTime", event["eventTime"].as_str().is_some_and(is_micro_time)),
        ("type", matches!(event["type"].as_str(), Some("Normal" | "Warning"))),
        ("reportingController", event["reportingController"].as_str().is_some_and(is_qualified)),
        ("reportingInstance", is_word(&event["reportingInstance"])),
        ("action", is_word(&event["action"])),
        ("reason", is_word(&event["reason"])),
        ("note", event["note"].as_str().unwrap_or_default().len() <= NOTE_BYTES),
        ("series", event["series"].is_null() || is_series(&event["series"])),
    ];
    let broken = rules.into_iter().filter(|(_, holds)| !holds).map(|(field, _)| field);
    let old = ["deprecatedCount", "deprecatedFirstTimestamp", "deprecatedLastTimestamp", "deprecatedSource"];
    broken.chain(old.into_iter().filter(|field| !event[*field].is_null())).map(str::to_owned).collect()
}

/// What is wrong with the change of an Event: nothing but its series may change.
pub(super) fn faults_of_change(before: &Value, after: &Value) -> Vec<String> {
    let fields = after.as_object().into_iter().flatten();
    let changed = fields.filter(|(field, value)| before[field.as_str()] != **value).map(|(field, _)| field.as_str());
    let wrong = changed.filter(|field| *field != "series" || !is_series(&after["series"]));
    wrong.map(str::to_owned).collect()
}

fn is_series(series: &Value) -> bool {
    series["count"].as_i64().is_some_and(|count| count >= 2 && i32::try_from(count).is_ok())
        && series["lastObservedTime"].as_str().is_some_and(is_micro_time)
}

fn is_word(value: &Value) -> bool {
    value.as_str().is_some_and(|text| !text.is_empty() && text.len() <= WORD_BYTES)
}

/// `web.0123`: lower case letters, digits, `-` and `.`; each part begins and ends with a letter or a digit.
fn is_subdomain(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_label = |label: &str| {
        let ends = [label.bytes().next(), label.bytes().next_back()];
        ends.iter().all(|end| end.is_some_and(is_plain)) && label.bytes().all(|byte| is_plain(byte) || byte == b'-')
    };
    name.len() <= NAME_BYTES && name.split('.').all(is_label)
}

/// `kube-relay` or `example.com/kube-relay`.
fn is_qualified(name: &str) -> bool {
    let (prefix, name) = name.split_once('/').unwrap_or(("prefix", name));
    is_subdomain(prefix) && is_subdomain(&name.to_lowercase()) && name.len() <= 63
}

/// `2026-01-01T00:00:00.000000Z`: six digits after the point, neither more nor fewer.
fn is_micro_time(time: &str) -> bool {
    const SHAPE: &[u8] = b"0000-00-00T00:00:00.000000Z";
    let fits = |(byte, shape): (u8, &u8)| if *shape == b'0' { byte.is_ascii_digit() } else { byte == *shape };
    time.len() == SHAPE.len() && time.bytes().zip(SHAPE).all(fits)
}
