//! The objects of a large cluster, by their numbers.

use serde_json::{Value, json};

use crate::stage::service as service_at;

/// Endpoints of each Service.
pub(crate) const ENDPOINTS: u8 = 10;

/// What the Service with a number is called.
pub(crate) fn name(number: u64) -> String {
    format!("s{number:05}")
}

/// It, in the net 127.135, which no [`Site`](crate::support::site::Site) has.
pub(crate) fn service(number: u64) -> Value {
    service_at(&name(number), &format!("127.135.{}.{}", number / 250, number % 250 + 1))
}

/// Its slice as a real server sends it, with all that a proxy does not read.
pub(crate) fn slice(number: u64, endpoints: u8) -> Value {
    let pod = |host: u8| {
        let pod = format!("{}-5d4f8c7b9d-{host:05}", name(number));
        json!({
            "addresses": [format!("10.{}.{}.{host}", number / 250, number % 250)],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": format!("node-{host}"), "zone": "zone-1",
            "targetRef": {"kind": "Pod", "name": pod, "namespace": "default", "uid": "11111111-2222-3333-4444-555555555555"},
        })
    };
    json!({
        "metadata": {
            "name": format!("{}-abcde", name(number)), "namespace": "default", "generation": 3,
            "labels": {"kubernetes.io/service-name": name(number), "app": name(number)},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": name(number), "uid": "u", "controller": true}],
        },
        "addressType": "IPv4", "ports": [{"name": "http", "protocol": "TCP", "port": 8000}],
        "endpoints": (1..=endpoints).map(pod).collect::<Vec<_>>(),
    })
}
