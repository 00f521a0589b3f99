//! What clients of the API server of one's own do with one object: create, get, replace, patch, with its status apart, and
//! delete, with the codes that real servers answer.

use std::net::IpAddr;

use http_body_util::{BodyExt, Collected};
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::{Method, Request, Response, StatusCode};
use serde_json::{Value, json};

use super::{Body, Shared, State, Target, events, failure, kind_of, whole};

/// Why a request was not carried out: code, reason and message.
type Refusal = (u16, &'static str, String);
type Done = Result<(u16, Value), Refusal>;

/// Carries out a request for one object.
pub(super) async fn answer(request: Request<Incoming>, target: &Target, shared: &Shared) -> Response<Body> {
    let (head, body) = request.into_parts();
    let Ok(body) = body.collect().await.map(Collected::to_bytes) else {
        return failure(400, "BadRequest", "the body broke off");
    };
    let kind = head.headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let mut state = shared.lock();
    let done = match head.method {
        Method::GET => get(&state, target),
        Method::DELETE => delete(&mut state, target),
        Method::POST => parse(&body).and_then(|object| create(&mut state, shared, target, object)),
        Method::PUT => parse(&body).and_then(|object| replace(&mut state, target, object)),
        Method::PATCH if kind == "application/merge-patch+json" => {
            parse(&body).and_then(|change| patch(&mut state, target, change))
        }
        Method::PATCH => Err((415, "UnsupportedMediaType", format!("{kind}: only merge patches are taken here"))),
        _ => Err((405, "MethodNotAllowed", head.method.to_string())),
    };
    shared.version.send_replace(state.version);
    match done {
        Ok((code, object)) => json_of(code, &object),
        Err((code, reason, message)) => failure(code, reason, &message),
    }
}

/// Without what its resource says already.
fn parse(body: &[u8]) -> Result<Value, Refusal> {
    let bad = |why: String| -> Refusal { (400, "BadRequest", why) };
    match serde_json::from_slice::<Value>(body).map_err(|error| bad(error.to_string()))? {
        Value::Object(mut object) => {
            object.retain(|field, _| field != "apiVersion" && field != "kind");
            Ok(Value::Object(object))
        }
        other => Err(bad(format!("{other} is no object"))),
    }
}

fn create(state: &mut State, shared: &Shared, target: &Target, mut object: Value) -> Done {
    let Some(name) = object["metadata"]["name"].as_str().filter(|name| !name.is_empty()) else {
        return Err((422, "Invalid", "metadata.name: required here".into()));
    };
    let key = target.key(name);
    if state.objects.contains_key(&key) {
        return Err((409, "AlreadyExists", format!("{} {} already exists", key.0, key.1)));
    }
    if target.resource == "events" {
        without_faults(events::faults_of_new(&object, target.namespace.as_deref().unwrap_or_default()))?;
    }
    if let Some(namespace) = &target.namespace {
        object["metadata"]["namespace"] = namespace.clone().into();
    }
    object["metadata"]["uid"] = format!("uid-{}", state.version).into();
    object["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z".into();
    if target.resource == "services" {
        object["status"] = json!({"loadBalancer": {}});
        allocate(state, shared, &mut object["spec"]);
    }
    Ok((201, dressed(&target.resource, state.put(&target.resource, object))))
}

/// A cluster IP for a Service that asks for none, and is not without: in the net of the server, from 50.
fn allocate(state: &State, shared: &Shared, spec: &mut Value) {
    let IpAddr::V4(server) = shared.ip else { return };
    if spec["clusterIP"].as_str().is_some_and(|ip| !ip.is_empty()) || spec["type"] == "ExternalName" {
        return;
    }
    let [a, b, c, _] = server.octets();
    let taken = |ip: &String| state.objects.values().any(|object| object["spec"]["clusterIP"] == **ip);
    let free = (50..100).map(|last| format!("{a}.{b}.{c}.{last}")).find(|ip| !taken(ip)).expect("few Services");
    spec["clusterIPs"] = json!([free]);
    spec["clusterIP"] = free.into();
}

fn get(state: &State, target: &Target) -> Done {
    Ok((200, dressed(&target.resource, find(state, target)?.clone())))
}

fn delete(state: &mut State, target: &Target) -> Done {
    let (resource, name) = key(target);
    match state.remove(&resource, &name) {
        Some(object) => Ok((200, dressed(&resource, object))),
        None => Err(missing(target)),
    }
}

fn patch(state: &mut State, target: &Target, change: Value) -> Done {
    let before = find(state, target)?;
    let mut object = before.clone();
    merge(&mut object, change);
    if target.resource == "events" {
        without_faults(events::faults_of_change(before, &object))?;
    }
    store(state, target, object)
}

fn without_faults(faults: Vec<String>) -> Result<(), Refusal> {
    if faults.is_empty() { Ok(()) } else { Err((422, "Invalid", faults.join(", "))) }
}

/// Refused where somebody else was faster.
fn replace(state: &mut State, target: &Target, object: Value) -> Done {
    let (known, given) = (&find(state, target)?["metadata"]["resourceVersion"], &object["metadata"]["resourceVersion"]);
    if !given.is_null() && given != known {
        return Err((409, "Conflict", format!("{} has been modified: it is at {known}, not {given}", key(target).1)));
    }
    store(state, target, object)
}

/// Of what is given, the status alone or all but the status.
fn store(state: &mut State, target: &Target, mut given: Value) -> Done {
    let mut known = find(state, target)?.clone();
    let object = if target.part.as_deref() == Some("status") {
        known["status"] = given["status"].take();
        known
    } else {
        given["metadata"] = with_identity(given["metadata"].take(), &known["metadata"]);
        if let Some(status) = known.get("status") {
            given["status"] = status.clone();
        }
        given
    };
    Ok((200, dressed(&target.resource, state.put(&target.resource, object))))
}

/// What nobody but the server changes.
fn with_identity(mut metadata: Value, known: &Value) -> Value {
    for field in ["name", "namespace", "uid", "creationTimestamp"] {
        if let Some(value) = known.get(field) {
            metadata[field] = value.clone();
        }
    }
    metadata
}

fn find<'a>(state: &'a State, target: &Target) -> Result<&'a Value, Refusal> {
    state.objects.get(&key(target)).ok_or_else(|| missing(target))
}

/// Where the object of a request is kept.
fn key(target: &Target) -> (String, String) {
    target.key(target.name.as_deref().unwrap_or_default())
}

fn missing(target: &Target) -> Refusal {
    (404, "NotFound", format!("{} {} not found", target.resource, key(target).1))
}

/// A JSON merge patch (RFC 7386).
fn merge(target: &mut Value, change: Value) {
    let Value::Object(change) = change else {
        *target = change;
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (field, value) in change {
        match target.as_object_mut() {
            Some(target) if value.is_null() => drop(target.remove(&field)),
            _ => merge(&mut target[field], value),
        }
    }
}

/// An object that says what it is, as all do that come alone.
fn dressed(resource: &str, mut object: Value) -> Value {
    let (api, kind) = kind_of(resource);
    object["apiVersion"] = api.into();
    object["kind"] = kind.into();
    object
}

fn json_of(code: u16, object: &Value) -> Response<Body> {
    whole(StatusCode::from_u16(code).expect("a code"), object.to_string())
}
