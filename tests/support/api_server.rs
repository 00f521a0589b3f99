//! An API server of one's own: lists with versions, and with pages for who asks for them, watches with bookmarks, and every
//! way to fail that real ones have. Real HTTP on loopback. What clients write and read one by one is in `api_writes`.
//! Labels do not select here.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio::task::JoinSet;

// By its path, as an example may take this file by its path, too.
#[path = "api_events.rs"]
mod events;
#[path = "api_writes.rs"]
mod writes;

/// How a request is answered.
#[derive(Clone, Debug, PartialEq)]
pub enum Mood {
    /// As it should be.
    Well,
    /// Every request is refused with this code.
    Refuse(u16),
    /// Every watch is refused with this code; lists are fine.
    RefuseWatches(u16),
    /// Every request is refused with 429, to come back after so many seconds.
    Throttle(u64),
    /// Watches are refused with 410.
    ExpireStatus,
    /// Watches are answered with 200 and an ERROR event of code 410.
    ExpireEvent,
    /// Watches are answered with 200 and the status that has the code 410, which is no event.
    ExpireBare,
    /// Watches are answered with 200 and JSON that is no event.
    Misshape,
    /// Every answer breaks off after so many bytes.
    Cut(usize),
    /// Every list and watch breaks off, after these numbers of bytes in turn.
    CutInTurn(&'static [usize]),
    /// Every answer but the headers is text that is no JSON.
    Garble,
    /// Requests are taken and never answered.
    Silent,
    /// Bodies come one byte a second.
    Trickle,
}

/// One request that was made.
#[derive(Clone, Debug)]
pub struct Asked {
    /// `services`.
    pub resource: String,
    /// True for a watch.
    pub watch: bool,
    /// As in the rules of a role: `list`, `watch`, `get`, `create`, `update`, `patch`, `delete`.
    pub verb: &'static str,
    /// `events.k8s.io`; empty for the first API.
    pub group: String,
    /// Its query.
    pub query: String,
    /// When it came.
    pub at: tokio::time::Instant,
}

/// A running server. Dropping it ends it and its connections.
pub struct ApiServer {
    address: SocketAddr,
    state: Arc<Shared>,
    listener: Option<Arc<TcpListener>>,
    running: Option<JoinSet<()>>,
}

struct Shared {
    /// Where the server is. Services that are created without a cluster IP get one beside it.
    ip: IpAddr,
    state: Mutex<State>,
    /// The version of the last change.
    version: watch::Sender<u64>,
}

struct State {
    mood: Mood,
    /// A resource that is refused with a code, whatever the mood.
    refused: Option<(String, u16)>,
    /// A resource that the server is too old for.
    unknown: Option<String>,
    /// Who does not show this token is not known here.
    token: Option<String>,
    /// A resource about which nothing is answered.
    silenced: Option<String>,
    /// Verbs and resources that access reviews say no to.
    denied: Vec<(String, String)>,
    version: u64,
    /// By resource and `namespace/name`.
    objects: BTreeMap<(String, String), Value>,
    /// All changes: version, resource, event.
    history: Vec<(u64, String, Value)>,
    /// Versions up to this one are forgotten: a watch from there has expired.
    compacted: u64,
    asked: Vec<Asked>,
    /// Lists and watches that broke off in turn.
    cuts: usize,
    /// Watches among so many first requests say nothing any more.
    frozen: usize,
    /// Watches of an earlier one have expired.
    epoch: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test panics while it holds it")
    }
}

type Body = UnsyncBoxBody<Bytes, io::Error>;

impl ApiServer {
    /// Starts without objects.
    pub async fn start(address: SocketAddr) -> Self {
        let state = State {
            mood: Mood::Well,
            refused: None,
            unknown: None,
            token: None,
            silenced: None,
            denied: Vec::new(),
            version: 1,
            objects: BTreeMap::new(),
            history: Vec::new(),
            compacted: 0,
            asked: Vec::new(),
            cuts: 0,
            frozen: 0,
            epoch: 0,
        };
        let version = watch::Sender::new(1);
        let state = Arc::new(Shared { ip: address.ip(), state: Mutex::new(state), version });
        let mut server = Self { address, state, listener: None, running: None };
        server.resume().await;
        server
    }

    /// The process is gone: connections are cut, new ones refused. Its objects are kept elsewhere.
    pub async fn stop(&mut self) {
        self.hang_up().await;
        self.listener = None;
    }

    async fn hang_up(&mut self) {
        if let Some(mut tasks) = self.running.take() {
            tasks.shutdown().await;
        }
    }

    /// A new process at the same address.
    pub async fn resume(&mut self) {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_reuseaddr(true).expect("an option");
        socket.bind(self.address).expect("a free address");
        self.listener = Some(Arc::new(socket.listen(64).expect("a listener")));
        self.answer_all();
    }

    fn answer_all(&mut self) {
        let listener = Arc::clone(self.listener.as_ref().expect("it listens"));
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, Arc::clone(&self.state)));
        self.running = Some(tasks);
    }

    /// A kubeconfig that leads here.
    pub fn kubeconfig(&self) -> String {
        let (server, token) = (format!("http://{}", self.address), self.state.lock().token.clone());
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": server}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "users": [{"name": "test", "user": {"token": token.as_deref().unwrap_or("not-a-secret")}}],
        })
        .to_string()
    }

    /// How requests are answered from now on; watches that are open go on.
    pub fn mood(&self, mood: Mood) {
        self.state.lock().mood = mood;
    }

    /// Requests for this resource are refused, or none any more.
    pub fn refuse_only(&self, resource: Option<&str>) {
        self.state.lock().refused = resource.map(|resource| (resource.to_owned(), 500));
    }

    /// Nobody may read this resource.
    pub fn forbid(&self, resource: &str) {
        self.state.lock().refused = Some((resource.to_owned(), 403));
    }

    /// Requests for this resource are taken and never answered.
    pub fn silence(&self, resource: &str) {
        self.state.lock().silenced = Some(resource.to_owned());
    }

    /// Who asks whether it may do this hears no from now on.
    pub fn deny(&self, verb: &str, resource: &str) {
        self.state.lock().denied.push((verb.to_owned(), resource.to_owned()));
    }

    /// The server is too old for this resource, and does not name its group either.
    pub fn unknown(&self, resource: &str) {
        self.lose(resource);
        self.state.lock().unknown = Some(resource.to_owned());
    }

    /// Lists of this resource are led to where nobody knows it (404). The server has it, and names its group.
    pub fn lose(&self, resource: &str) {
        let mut state = self.state.lock();
        (state.refused, state.unknown) = (Some((resource.to_owned(), 404)), None);
    }

    /// Only who shows this token is answered from now on; it is in each kubeconfig that is made from now on.
    pub fn expect_token(&self, token: &str) {
        self.state.lock().token = Some(token.to_owned());
    }

    /// Watches that are open say nothing any more, and do not end: a connection that broke without a word.
    pub fn freeze(&self) {
        let mut state = self.state.lock();
        state.frozen = state.asked.len();
    }

    /// Watches that are open end with an ERROR event of code 410: from where they are nothing can be continued.
    pub fn expire(&self) {
        let mut state = self.state.lock();
        state.epoch += 1;
        self.state.version.send_replace(state.version);
    }

    /// Ends all connections, and answers new ones: nobody is refused meanwhile.
    pub async fn cut(&mut self) {
        self.hang_up().await;
        self.answer_all();
    }

    /// Creates or replaces an object.
    pub fn put(&self, resource: &str, object: Value) {
        let mut state = self.state.lock();
        state.put(resource, object);
        self.state.version.send_replace(state.version);
    }

    /// Deletes an object.
    pub fn delete(&self, resource: &str, name: &str) {
        let mut state = self.state.lock();
        state.remove(resource, name).expect("there is such an object");
        self.state.version.send_replace(state.version);
    }

    /// Forgets what happened so far: watches cannot continue from before.
    pub fn compact(&self) {
        let mut state = self.state.lock();
        state.version += 1;
        state.compacted = state.version;
        state.history.clear();
    }

    /// Forgets which requests there were.
    pub fn forget_requests(&self) {
        self.state.lock().asked = Vec::new();
    }

    /// The requests so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.state.lock().asked.clone()
    }

    /// How many lists and watches broke off in turn.
    pub fn cuts(&self) -> usize {
        self.state.lock().cuts
    }

    /// How many lists or watches of a resource there were.
    pub fn count(&self, resource: &str, watch: bool) -> usize {
        self.count_of(resource, if watch { "watch" } else { "list" })
    }

    /// How many requests with a verb there were for a resource.
    pub fn count_of(&self, resource: &str, verb: &str) -> usize {
        self.asked().iter().filter(|asked| asked.resource == resource && asked.verb == verb).count()
    }

    /// All objects of a resource.
    pub fn objects(&self, resource: &str) -> Vec<Value> {
        let state = self.state.lock();
        state.objects.iter().filter(|((of, _), _)| of == resource).map(|(_, object)| object.clone()).collect()
    }
}

impl State {
    /// Where this one breaks off, if lists and watches do so in turn.
    fn next_cut(&mut self, mood: Mood) -> Mood {
        let Mood::CutInTurn(lengths) = mood else { return mood };
        self.cuts += 1;
        Mood::Cut(lengths[(self.cuts - 1) % lengths.len()])
    }

    /// Creates or replaces an object, and says what became of it.
    fn put(&mut self, resource: &str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let before = self.objects.insert((resource.to_owned(), key(&object)), object.clone());
        let kind = if before.is_some() { "MODIFIED" } else { "ADDED" };
        self.note(resource, kind, object.clone());
        object
    }

    /// Deletes an object; `None` where there is none of this `namespace/name`.
    fn remove(&mut self, resource: &str, name: &str) -> Option<Value> {
        let mut object = self.objects.remove(&(resource.to_owned(), name.to_owned()))?;
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.note(resource, "DELETED", object.clone());
        Some(object)
    }

    fn note(&mut self, resource: &str, kind: &str, mut object: Value) {
        let (api, name) = kind_of(resource);
        object["apiVersion"] = api.into();
        object["kind"] = name.into();
        self.history.push((self.version, resource.to_owned(), json!({"type": kind, "object": object})));
    }

    /// The lines of a watch behind a version, and the version that they lead to.
    fn lines(&self, wanted: &Wanted, behind: u64) -> (String, u64) {
        let news = self.history.iter();
        let news = news.filter(|(version, of, event)| *version > behind && wanted.takes(of, &event["object"]));
        (news.map(|(_, _, event)| format!("{event}\n")).collect(), self.version)
    }
}

/// What a request asks for.
struct Wanted {
    resource: String,
    /// `None`: objects of all namespaces.
    namespace: Option<String>,
    /// The one name that a field selector asks for.
    name: Option<String>,
    /// The number of the request, from 1.
    request: usize,
    /// When it was made.
    epoch: u64,
}

impl Wanted {
    fn takes(&self, resource: &str, object: &Value) -> bool {
        resource == self.resource
            && self.namespace.as_deref().is_none_or(|namespace| namespace_of(object) == namespace)
            && self.name.as_deref().is_none_or(|name| object["metadata"]["name"] == name)
    }
}

fn key(object: &Value) -> String {
    format!("{}/{}", namespace_of(object), object["metadata"]["name"].as_str().unwrap_or_default())
}

fn namespace_of(object: &Value) -> &str {
    object["metadata"]["namespace"].as_str().unwrap_or("default")
}

fn kind_of(resource: &str) -> (&'static str, &'static str) {
    match resource {
        "services" => ("v1", "Service"),
        "endpointslices" => ("discovery.k8s.io/v1", "EndpointSlice"),
        "nodes" => ("v1", "Node"),
        "events" => ("events.k8s.io/v1", "Event"),
        "networkpolicies" => ("networking.k8s.io/v1", "NetworkPolicy"),
        _ => ("v1", "Endpoints"),
    }
}

async fn serve(listener: Arc<TcpListener>, state: Arc<Shared>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let _ = stream.set_nodelay(true); // As real servers do: else an event may wait 40 ms for an acknowledgement.
        let state = Arc::clone(&state);
        let service = service_fn(move |request| {
            let state = Arc::clone(&state);
            async move { Ok::<_, Infallible>(answer(request, state).await) }
        });
        connections.spawn(async move {
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await; // Clients may go away.
        });
    }
}

/// What the path of a request leads to.
struct Target {
    /// `events.k8s.io`; empty for the first API.
    group: String,
    namespace: Option<String>,
    resource: String,
    /// Of one object.
    name: Option<String>,
    /// The one part of it that is meant: `status`.
    part: Option<String>,
}

impl Target {
    /// `/api/v1/…` or `/apis/GROUP/v1/…`, then `namespaces/NAMESPACE/` or nothing, `RESOURCE`, perhaps `/NAME` and `/PART`.
    fn of(path: &str) -> Self {
        let mut parts = path.trim_matches('/').split('/');
        let group = if parts.next() == Some("apis") { parts.next().unwrap_or_default() } else { "" };
        let rest: Vec<&str> = parts.skip(1).collect();
        let (namespace, rest) = match rest.as_slice() {
            ["namespaces", namespace, rest @ ..] => (Some((*namespace).to_owned()), rest),
            rest => (None, rest),
        };
        let part = |index: usize| rest.get(index).map(|part| (*part).to_owned());
        let resource = part(0).unwrap_or_else(|| path.trim_matches('/').to_owned()); // `/apis` itself.
        Self { group: group.to_owned(), namespace, resource, name: part(1), part: part(2) }
    }

    fn key(&self, name: &str) -> (String, String) {
        (self.resource.clone(), format!("{}/{name}", self.namespace.as_deref().unwrap_or("default")))
    }

    fn verb(&self, method: &Method, is_watch: bool) -> &'static str {
        match *method {
            Method::POST => "create",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE => "delete",
            _ if is_watch => "watch",
            _ if self.name.is_some() => "get",
            _ => "list",
        }
    }
}

async fn answer(request: Request<Incoming>, shared: Arc<Shared>) -> Response<Body> {
    let target = Target::of(request.uri().path());
    let query = request.uri().query().unwrap_or_default().to_owned();
    let parameter = |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    let is_watch = matches!(parameter("watch"), Some("true" | "1"));
    let verb = target.verb(request.method(), is_watch);
    let shown = request.headers().get("authorization").and_then(|value| value.to_str().ok());
    let (mood, number_of_request) = {
        let mut state = shared.lock();
        let at = tokio::time::Instant::now();
        let (resource, group) = (target.resource.clone(), target.group.clone());
        state.asked.push(Asked { resource, watch: is_watch, verb, group, query: query.clone(), at });
        if state.token.as_ref().is_some_and(|token| shown != Some(&*format!("Bearer {token}"))) {
            return refusal(401, None);
        }
        let refused = state.refused.as_ref();
        let refused = refused.filter(|(refused, code)| *refused == target.resource && !(is_watch && *code == 404));
        let silenced = state.silenced.as_ref() == Some(&target.resource);
        let mood = refused.map_or_else(|| state.mood.clone(), |(_, code)| Mood::Refuse(*code));
        (if silenced { Mood::Silent } else { mood }, state.asked.len())
    };
    match mood {
        Mood::Refuse(code) => return refusal(code, None),
        Mood::RefuseWatches(code) if is_watch => return refusal(code, None),
        Mood::Throttle(seconds) => return refusal(429, Some(seconds)),
        Mood::ExpireStatus if is_watch => return refusal(410, None),
        Mood::ExpireEvent if is_watch => return line(json!({"type": "ERROR", "object": expired()})),
        Mood::ExpireBare if is_watch => return line(expired()),
        Mood::Misshape if is_watch => return line(json!({"type": "MOVED", "object": {"metadata": {"name": "web"}}})),
        Mood::Silent => std::future::pending::<()>().await,
        _ => {}
    }
    if request.uri().path() == "/apis" {
        return Response::new(text(groups(&shared.lock())));
    }
    if request.uri().path() == "/version" {
        return Response::new(text(json!({"major": "1", "minor": "33", "gitVersion": "v1.33.2"}).to_string()));
    }
    if target.resource == "selfsubjectaccessreviews" {
        return review(request, &shared).await;
    }
    if !matches!(verb, "list" | "watch") {
        return writes::answer(request, &target, &shared).await.map(|body| spoil(mood, body));
    }
    let Target { resource, namespace, .. } = target;
    let number = |name| parameter(name).and_then(|text| text.parse::<u64>().ok()).unwrap_or_default();
    let name = parameter("fieldSelector").and_then(|text| text.strip_prefix("metadata.name%3D")).map(str::to_owned);
    let wanted = Wanted { resource, namespace, name, request: number_of_request, epoch: shared.lock().epoch };
    let body = if is_watch {
        let behind = number("resourceVersion");
        if behind < shared.lock().compacted {
            return refusal(410, None);
        }
        let lifetime = Duration::from_secs(number("timeoutSeconds").max(1));
        follow(Arc::clone(&shared), wanted, behind, tokio::time::Instant::now() + lifetime)
    } else {
        let state = shared.lock();
        let count = |name| parameter(name).and_then(|text| text.parse::<usize>().ok());
        text(list(&state, &wanted, count("continue").unwrap_or_default(), count("limit")))
    };
    let mood = shared.lock().next_cut(mood);
    Response::new(spoil(mood, body))
}

/// Whether the one who asks may do what the review names. Nothing is kept of it.
async fn review(request: Request<Incoming>, shared: &Shared) -> Response<Body> {
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let Ok(mut review) = serde_json::from_slice::<Value>(&body) else {
        return failure(400, "BadRequest", "no JSON");
    };
    let attributes = &review["spec"]["resourceAttributes"];
    let is_denied =
        |(verb, resource): &(String, String)| attributes["verb"] == **verb && attributes["resource"] == **resource;
    let allowed = !shared.lock().denied.iter().any(is_denied);
    review["status"] = json!({"allowed": allowed});
    whole(StatusCode::CREATED, review.to_string())
}

/// The groups of the API besides the first one.
fn groups(state: &State) -> String {
    let mut names = vec!["apps", "events.k8s.io"];
    if state.unknown.as_deref() != Some("endpointslices") {
        names.push("discovery.k8s.io");
    }
    let group = |name| {
        let version = json!({"groupVersion": format!("{name}/v1"), "version": "v1"});
        json!({"name": name, "versions": [version], "preferredVersion": version})
    };
    let groups: Vec<_> = names.into_iter().map(group).collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}).to_string()
}

fn list(state: &State, wanted: &Wanted, from: usize, limit: Option<usize>) -> String {
    let all = state.objects.iter().filter(|((of, _), object)| wanted.takes(of, object));
    let all: Vec<&Value> = all.map(|(_, object)| object).collect();
    let page: Vec<_> = all.iter().skip(from).take(limit.unwrap_or(usize::MAX)).collect();
    let mut metadata = json!({"resourceVersion": state.version.to_string()});
    if from + page.len() < all.len() {
        metadata["continue"] = (from + page.len()).to_string().into();
    }
    let (api, kind) = kind_of(&wanted.resource);
    // As real servers do it: the items do not say what they are.
    json!({"kind": format!("{kind}List"), "apiVersion": api, "metadata": metadata, "items": page}).to_string()
}

/// The events of a watch as they come, and a bookmark at its end.
fn follow(shared: Arc<Shared>, wanted: Wanted, behind: u64, ends: tokio::time::Instant) -> Body {
    let changes = shared.version.subscribe();
    let begin = (shared, wanted, behind, changes, false);
    let lines = stream::unfold(begin, move |(shared, wanted, mut behind, mut changes, ended)| async move {
        if ended {
            return None;
        }
        loop {
            if wanted.request <= shared.lock().frozen {
                return std::future::pending().await;
            }
            if wanted.epoch < shared.lock().epoch {
                let expiry = format!("{}\n", json!({"type": "ERROR", "object": expired()}));
                return Some((frame(expiry), (shared, wanted, behind, changes, true)));
            }
            let (lines, version) = shared.lock().lines(&wanted, behind);
            behind = version;
            if !lines.is_empty() {
                return Some((frame(lines), (shared, wanted, behind, changes, false)));
            }
            tokio::select! {
                changed = changes.changed() => changed.ok()?,
                () = tokio::time::sleep_until(ends) => {
                    let (api, kind) = kind_of(&wanted.resource);
                    let object = json!({"kind": kind, "apiVersion": api, "metadata": {"resourceVersion": behind.to_string()}});
                    let bookmark = format!("{}\n", json!({"type": "BOOKMARK", "object": object}));
                    return Some((frame(bookmark), (shared, wanted, behind, changes, true)));
                }
            }
        }
    });
    StreamBody::new(lines).boxed_unsync()
}

fn frame(text: String) -> Result<Frame<Bytes>, io::Error> {
    Ok(Frame::data(Bytes::from(text)))
}

fn text(text: String) -> Body {
    Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync()
}

fn whole(code: StatusCode, body: String) -> Response<Body> {
    let mut response = Response::new(text(body));
    *response.status_mut() = code;
    response
}

/// A watch of one line.
fn line(object: Value) -> Response<Body> {
    whole(StatusCode::OK, format!("{object}\n"))
}

fn expired() -> Value {
    json!({"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"})
}

fn refusal(code: u16, retry_after: Option<u64>) -> Response<Body> {
    let mut response = failure(code, "Test", "refused");
    if let Some(seconds) = retry_after {
        response.headers_mut().insert("retry-after", seconds.into());
    }
    response
}

fn failure(code: u16, reason: &str, message: &str) -> Response<Body> {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message});
    whole(StatusCode::from_u16(code).expect("a code"), status.to_string())
}

/// A body as a server in this mood sends it.
fn spoil(mood: Mood, body: Body) -> Body {
    match mood {
        Mood::Garble => text("{\"type\": \"ADDED\", \"object\": {\"metadata\" 1}}\n".to_owned()),
        Mood::Cut(bytes) => broken_off(body, bytes),
        Mood::Trickle => trickling(body),
        _ => body,
    }
}

fn broken_off(body: Body, bytes: usize) -> Body {
    let frames = stream::unfold((body, Some(bytes)), |(mut body, left)| async move {
        let left = left?;
        let data = if left > 0 { body.frame().await.and_then(|frame| frame.ok()?.into_data().ok()) } else { None };
        match data {
            Some(mut data) => {
                data.truncate(left);
                let left = left - data.len();
                Some((Ok(Frame::data(data)), (body, Some(left))))
            }
            None => Some((Err(io::Error::other("cut")), (body, None))),
        }
    });
    StreamBody::new(frames).boxed_unsync()
}

fn trickling(body: Body) -> Body {
    let frames = stream::unfold((body, Bytes::new()), |(mut body, mut rest)| async move {
        if rest.is_empty() {
            rest = body.frame().await?.ok()?.into_data().ok()?;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        let byte = rest.split_to(1);
        Some((Ok::<_, io::Error>(Frame::data(byte)), (body, rest)))
    });
    StreamBody::new(frames).boxed_unsync()
}
