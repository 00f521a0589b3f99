//! Our own HTTP: health for load balancers and probes; metrics, status and readiness for operators.
//!
//! Reads snapshots, changes nothing, and knows nobody by name: what is told is made in `metrics`, `live`, `summary` and
//! `page`, how HTTP is spoken is `http_server`'s. Small on purpose: GET and HEAD, no TLS.

use std::collections::BTreeMap;
use std::io;
use std::mem;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, HOST, HeaderValue, SERVER, X_CONTENT_TYPE_OPTIONS};
use hyper::{Method, Request, StatusCode, Version};
use serde::Serialize;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

use crate::answer_body::AnswerBody;
use crate::config::{DEFAULT_HEALTHZ_ADDRESS, DEFAULT_METRICS_ADDRESS};
use crate::contact::Contact;
use crate::gzip::Parcel;
use crate::health::{Checkup, FamilyCheckup, Health};
use crate::host::Host;
use crate::host_watch::Hosts;
use crate::http_server::{self, Answer, HEADER_TIMEOUT, response};
use crate::lifecycle::Readiness;
use crate::live::PauseReport;
use crate::name::{Family, ListenKey, ObjectName, Protocol};
use crate::pages::Pages;
use crate::remedy::{self, BindFailure};
use crate::report_pieces::ReportPieces;
use crate::stats::PROCESS;
use crate::status::Status;
use crate::status_query::{Excerpt, StatusQuery};
use crate::summary::{Closeup, Summary};
use crate::timestamp::rfc3339;
use crate::{gzip, metrics, page, peer};

const JSON: &str = "application/json";
/// Before the name of one Service.
const SERVICES: &str = "/status/";
/// Time between tries to bind an address that is taken.
const BIND_RETRY: Duration = Duration::from_secs(5);

/// What a server tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Surface {
    /// `/healthz` and `/livez` as kube-proxy answers them. Harmless: anybody may ask, under any host name.
    Health,
    /// `/metrics`, `/readyz` and more: for the machines of whoever watches this one.
    Metrics,
    /// The same, `/status` and a page that shows it: for whoever works on this machine.
    Status,
}

impl Surface {
    /// What may be asked for.
    pub fn paths(self) -> &'static [&'static str] {
        match self {
            Self::Health => &["/healthz", "/livez"],
            Self::Metrics => &["/metrics", "/readyz", "/readyz?verbose", "/livez", "/healthz", "/proxyMode"],
            Self::Status => &[
                "/",
                "/metrics",
                "/status",
                "/status?summary",
                "/status?service=NAMESPACE/NAME&client=IP",
                "/status/NAMESPACE/NAME",
                "/readyz",
                "/readyz?verbose",
                "/livez",
                "/healthz",
                "/proxyMode",
            ],
        }
    }
}

/// Where to answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminOptions {
    /// Addresses of [`Surface::Metrics`], no wildcards. From `--metrics-bind-address`.
    pub metrics: Vec<SocketAddr>,
    /// Addresses of [`Surface::Status`], no wildcards; they may be among those above. From `--status-bind-address`.
    pub status: Vec<SocketAddr>,
    /// Addresses of [`Surface::Health`], no wildcards. From `--healthz-bind-address`.
    pub health: Vec<SocketAddr>,
    /// An address that cannot be bound is an error of [`start`], not a reason to try again. From `--bind-address-hard-fail`.
    pub hard_fail: bool,
}

impl Default for AdminOptions {
    /// Two addresses, on loopback.
    fn default() -> Self {
        let operators = vec![DEFAULT_METRICS_ADDRESS];
        Self { metrics: operators.clone(), status: operators, health: vec![DEFAULT_HEALTHZ_ADDRESS], hard_fail: false }
    }
}

impl AdminOptions {
    /// No address at all, for as long as another process answers.
    pub fn nowhere() -> Self {
        Self { metrics: Vec::new(), status: Vec::new(), health: Vec::new(), hard_fail: false }
    }

    /// Each address once, with all that is to be told there: those for operators, then those for health.
    fn servers(&self) -> Vec<(Surface, SocketAddr)> {
        let status = self.status.iter().map(|address| (Surface::Status, *address));
        let metrics = self.metrics.iter().filter(|address| !self.status.contains(address));
        let metrics = metrics.map(|address| (Surface::Metrics, *address));
        let health = self.health.iter().map(|address| (Surface::Health, *address));
        status.chain(metrics).chain(health).collect()
    }
}

/// An admin address could not be bound.
#[derive(Debug, thiserror::Error)]
#[error("admin server: cannot listen on {address}: {remedy}")]
pub struct AdminError {
    /// The address.
    pub address: SocketAddr,
    /// What an operator can do.
    pub remedy: String,
    source: io::Error,
}

/// An admin address that cannot be bound now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unbound {
    /// What it was to tell.
    pub surface: Surface,
    /// The address.
    pub address: SocketAddr,
    /// The whole error, with the remedy.
    pub error: String,
}

/// Running servers. Dropping it ends them and their connections.
#[derive(Debug)]
pub struct Admin {
    bound: Vec<(Surface, SocketAddr)>,
    unbound: watch::Sender<Vec<Unbound>>,
    servers: BTreeMap<(Surface, SocketAddr), AbortOnDropHandle<()>>,
    /// The sockets that listen, by the addresses that were asked for: what another process takes over.
    sockets: watch::Sender<AdminSockets>,
    /// Those of the last process that nobody listens at yet.
    passed: BTreeMap<SocketAddr, OwnedFd>,
    closing: CancellationToken,
    view: Arc<View>,
}

/// Sockets of our own servers, by the addresses that were asked for.
pub type AdminSockets = BTreeMap<SocketAddr, Arc<OwnedFd>>;

impl Admin {
    /// The addresses that were bound at the start: those for operators, then those for health.
    pub fn bound(&self) -> &[(Surface, SocketAddr)] {
        &self.bound
    }

    /// The addresses that cannot be bound now.
    pub fn unbound(&self) -> watch::Receiver<Vec<Unbound>> {
        self.unbound.subscribe()
    }

    /// Cancelled, all of it is closing: nobody is accepted any more, which another process does, and [`follow`](Self::follow)
    /// ends when those who were have had their answers.
    pub fn closing(&self) -> CancellationToken {
        self.closing.clone()
    }

    /// The sockets that listen now, for another process.
    pub fn sockets(&self) -> watch::Receiver<AdminSockets> {
        self.sockets.subscribe()
    }

    /// Answers at addresses as [`start`] does, where another process has answered until now: with its sockets as far as
    /// there are any, and where that has another one nobody is refused in between. What cannot be bound is tried again.
    pub async fn take_over(&mut self, passed: BTreeMap<SocketAddr, OwnedFd>, options: &AdminOptions) {
        self.passed = passed;
        self.move_to(options).await;
        self.passed.clear();
    }

    /// Answers at the addresses of this machine as they come and go, until it is [closing](Self::closing). `options` are those on a machine. An
    /// address that stays is not touched, and one that cannot be bound is tried again every 5 s, however hard a failure at
    /// the start would have been.
    pub async fn follow(mut self, mut hosts: Hosts, options: impl Fn(&Host) -> AdminOptions) {
        let closing = self.closing.clone();
        loop {
            let host = tokio::select! {
                biased;
                () = closing.cancelled() => break,
                host = hosts.changed() => host,
            };
            self.move_to(&options(&host)).await;
        }
        for server in mem::take(&mut self.servers).into_values() {
            let _ = server.await; // A panic has been told.
        }
    }

    async fn move_to(&mut self, options: &AdminOptions) {
        let wanted = options.servers();
        let gone: Vec<_> = self.servers.keys().filter(|server| !wanted.contains(server)).copied().collect();
        for server in gone {
            let Some(task) = self.servers.remove(&server) else { continue };
            task.abort();
            let _ = task.await;
            self.sockets.send_modify(|sockets| drop(sockets.remove(&server.1))); // Its address is free then.
            debug!(listen = %server.1, "admin server has lost its address");
        }
        let is_wanted = |failure: &Unbound| wanted.contains(&(failure.surface, failure.address));
        self.unbound.send_if_modified(|all| {
            let before = all.len();
            all.retain(is_wanted);
            all.len() != before
        });
        for (surface, address) in wanted {
            if self.servers.contains_key(&(surface, address)) {
                continue;
            }
            match self.listen(surface, address).await {
                Ok(_) => debug!(listen = %address, "admin server has a new address"),
                Err(error) => self.try_again(surface, &error),
            }
        }
    }

    /// Answers at an address from now on; tells it with its port.
    async fn listen(&mut self, surface: Surface, address: SocketAddr) -> Result<SocketAddr, AdminError> {
        let listener = match self.passed.remove(&address) {
            Some(socket) => listen_at(socket),
            None => TcpListener::bind(address).await,
        };
        match listener {
            Ok(listener) => {
                let bound = listener.local_addr().unwrap_or(address);
                note(&self.sockets, address, &listener);
                let server = serve(listener, surface, Arc::clone(&self.view), HEADER_TIMEOUT, self.closing.clone());
                self.spawn(surface, address, server);
                Ok(bound)
            }
            Err(source) => Err(AdminError { address, remedy: remedy_of(address, &source).await, source }),
        }
    }

    /// Says that an address cannot be bound, and goes on trying.
    fn try_again(&mut self, surface: Surface, error: &AdminError) {
        let AdminError { address, remedy, source } = error;
        warn!(
            listen = %address, reason = %BindFailure::of(source), error = %source, remedy,
            "admin server cannot listen; trying again every 5 s"
        );
        let failure = Unbound { surface, address: *address, error: error.to_string() };
        self.unbound.send_modify(|all| all.push(failure.clone()));
        self.spawn(
            surface,
            *address,
            serve_once_bound(
                failure,
                self.unbound.clone(),
                self.sockets.clone(),
                Arc::clone(&self.view),
                self.closing.clone(),
            ),
        );
    }

    fn spawn(&mut self, surface: Surface, address: SocketAddr, server: impl Future<Output = ()> + Send + 'static) {
        self.servers.insert((surface, address), AbortOnDropHandle::new(tokio::spawn(server)));
    }
}

/// Binds all addresses and answers on them. One that cannot be bound is tried again every 5 s, unless `hard_fail` is set.
pub async fn start(
    options: AdminOptions,
    status: watch::Receiver<Arc<Status>>,
    readiness: Readiness,
    health: Health,
) -> Result<Admin, AdminError> {
    let view = Arc::new(View::new(status, readiness, health));
    let mut admin = Admin {
        bound: Vec::new(),
        unbound: watch::Sender::new(Vec::new()),
        servers: BTreeMap::new(),
        sockets: watch::Sender::default(),
        passed: BTreeMap::new(),
        closing: CancellationToken::new(),
        view,
    };
    for (surface, address) in options.servers() {
        match admin.listen(surface, address).await {
            Ok(bound) => admin.bound.push((surface, bound)),
            Err(error) if options.hard_fail => return Err(error),
            Err(error) => admin.try_again(surface, &error),
        }
    }
    Ok(admin)
}

/// Serves on a socket that another process has listened at.
fn listen_at(socket: OwnedFd) -> io::Result<TcpListener> {
    let listener = std::net::TcpListener::from(socket);
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// Keeps another descriptor of a socket for who takes over. Where none is left, that one binds the address anew.
fn note(sockets: &watch::Sender<AdminSockets>, address: SocketAddr, listener: &TcpListener) {
    if let Ok(copy) = listener.as_fd().try_clone_to_owned() {
        sockets.send_modify(|sockets| drop(sockets.insert(address, Arc::new(copy))));
    }
}

async fn serve_once_bound(
    failure: Unbound,
    unbound: watch::Sender<Vec<Unbound>>,
    sockets: watch::Sender<AdminSockets>,
    view: Arc<View>,
    closing: CancellationToken,
) {
    let Unbound { surface, address, .. } = failure;
    while timeout(BIND_RETRY, closing.cancelled()).await.is_err() {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                info!(listen = %address, "admin server listens now");
                unbound.send_modify(|all| all.retain(|other| *other != failure));
                note(&sockets, address, &listener);
                return serve(listener, surface, view, HEADER_TIMEOUT, closing).await;
            }
            Err(error) => debug!(listen = %address, %error, "admin server still cannot listen"),
        }
    }
}

/// Whose it is, if it is one of us, is worth more than any advice.
async fn remedy_of(address: SocketAddr, error: &io::Error) -> String {
    let failure = BindFailure::of(error);
    if failure == BindFailure::InUse
        && let Some(pid) = peer::pid(address).await
    {
        return format!("another kube-relay (pid {pid}) answers there: stop it, or give this one another address");
    }
    let key = ListenKey::at(address, Protocol::Tcp);
    remedy::remedy(failure, key).unwrap_or_else(|| "give it another address, or `none`".into())
}

/// What the servers read. Shared by all of them.
#[derive(Debug)]
struct View {
    status: watch::Receiver<Arc<Status>>,
    readiness: Readiness,
    health: Health,
    metrics: Pages<Parcel>,
}

impl View {
    fn new(status: watch::Receiver<Arc<Status>>, readiness: Readiness, health: Health) -> Self {
        let (told, ready) = (status.clone(), readiness.clone());
        let metrics = Pages::made_by(move || {
            let status = Arc::clone(&told.borrow());
            Parcel::of(metrics::render(&status, ready.is_ready()))
        });
        Self { status, readiness, health, metrics }
    }

    fn snapshot(&self) -> Arc<Status> {
        Arc::clone(&self.status.borrow())
    }

    /// A control task that is gone has nothing queued, but does nothing either. It holds the other end of the channel.
    fn checkup(&self, now: Instant) -> Checkup {
        let mut checkup = self.health.check(now);
        if self.status.has_changed().is_err() {
            checkup.families.iter_mut().for_each(|family| family.healthy = false);
        }
        checkup
    }
}

async fn serve(
    listener: TcpListener,
    surface: Surface,
    view: Arc<View>,
    header_timeout: Duration,
    closing: CancellationToken,
) {
    let answer = move |request| answer(request, surface, Arc::clone(&view));
    http_server::serve(listener, header_timeout, closing, answer).await;
}

async fn answer(request: Request<Incoming>, surface: Surface, view: Arc<View>) -> Answer {
    let mut response = if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        response
    } else if surface != Surface::Health && !host_is_allowed(&request) {
        text(StatusCode::FORBIDDEN, "ask by IP address or localhost: other names are refused (DNS rebinding)\n")
    } else {
        match surface {
            Surface::Health => health(request.uri().path(), &view),
            Surface::Metrics | Surface::Status => operators(&request, surface, view).await,
        }
    };
    let headers = response.headers_mut();
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Ok(introduction) = HeaderValue::from_str(&peer::introduction()) {
        headers.insert(SERVER, introduction);
    }
    response
}

/// A page in a browser may reach this server under a name that its author controls, and read the answer as its own. So
/// only addresses and localhost count as names of ours.
fn host_is_allowed(request: &Request<Incoming>) -> bool {
    let in_header = request.headers().get(HOST).map(|host| host.to_str().unwrap_or_default());
    match request.uri().authority().map(|authority| authority.as_str()).or(in_header) {
        Some(host) => is_address_or_localhost(host),
        // Browsers always send one; old probes do not.
        None => request.version() < Version::HTTP_11,
    }
}

/// `127.0.0.1`, `[::1]:10249`, `localhost:10249`, `view.localhost`.
fn is_address_or_localhost(host: &str) -> bool {
    if host.parse::<SocketAddr>().is_ok() || host.parse::<IpAddr>().is_ok() {
        return true;
    }
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let literal = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let name = name.to_ascii_lowercase();
    literal.is_some_and(|ip| ip.parse::<IpAddr>().is_ok()) || name == "localhost" || name.ends_with(".localhost")
}

fn health(path: &str, view: &View) -> Answer {
    let (answers, with_node) = match path {
        "/healthz" => (&PROCESS.healthz, true),
        "/livez" => (&PROCESS.livez, false),
        _ => return not_found(Surface::Health),
    };
    let now = Instant::now();
    let checkup = view.checkup(now);
    let fine = checkup.is_healthy() && (checkup.node_is_welcome() || !with_node);
    let (code, answers) = match fine {
        true => (StatusCode::OK, &answers.healthy),
        false => (StatusCode::SERVICE_UNAVAILABLE, &answers.unhealthy),
    };
    answers.increment();
    response(code, JSON, health_document(&checkup, with_node, now, SystemTime::now()).to_string())
}

/// kube-proxy's document, at a moment by both clocks.
fn health_document(checkup: &Checkup, with_node: bool, now: Instant, wall: SystemTime) -> serde_json::Value {
    // "Now" while healthy, as kube-proxy says it: readers take an old time for a stuck proxy.
    let told = |healthy: bool, updated: Instant| match healthy {
        true => rfc3339(wall),
        false => rfc3339(wall.checked_sub(now.saturating_duration_since(updated)).unwrap_or(UNIX_EPOCH)),
    };
    let families = Family::ALL.iter().zip(&checkup.families).map(|(family, FamilyCheckup { healthy, updated })| {
        let document = json!({ "lastUpdated": told(*healthy, *updated), "healthy": healthy });
        (family.to_string(), document)
    });
    let mut document = json!({
        "lastUpdated": told(checkup.is_healthy(), checkup.updated()),
        "currentTime": rfc3339(wall),
        "healthy": checkup.is_healthy(),
        "status": families.collect::<serde_json::Map<_, _>>(),
    });
    if with_node {
        document["nodeEligible"] = checkup.node_is_welcome().into();
    }
    document
}

async fn operators(request: &Request<Incoming>, surface: Surface, view: Arc<View>) -> Answer {
    match request.uri().path() {
        "/metrics" => {
            let accepted = gzip::is_accepted(request.headers());
            let Some(page) = view.metrics.get().await else { return failed() };
            let answer = off_the_workers(move || page.answer(metrics::CONTENT_TYPE, accepted)).await;
            answer.unwrap_or_else(failed)
        }
        "/" if surface == Surface::Status => page::answer(),
        "/status" if surface == Surface::Status => match StatusQuery::read(request.uri().query()) {
            Ok(StatusQuery::Summary) => {
                document(request, move || Some(Summary::of(&view.snapshot(), SystemTime::now()))).await
            }
            Ok(StatusQuery::Report(wanted)) => status(view, wanted).await,
            Err(error) => text(StatusCode::BAD_REQUEST, format!("{error}\n")),
        },
        path if surface == Surface::Status && path.starts_with(SERVICES) => {
            let name = ObjectName::parse(path.strip_prefix(SERVICES).unwrap_or_default());
            document(request, move || Closeup::of(&view.snapshot(), &name, SystemTime::now())).await
        }
        "/readyz" => readyz(&view.readiness, &view.snapshot().contact, asks_for(request, "verbose")),
        "/livez" | "/healthz" => text(StatusCode::OK, "ok"),
        "/proxyMode" => text(StatusCode::OK, "userspace"),
        _ => not_found(surface),
    }
}

/// The largest document: made while it is sent, and never there at once.
async fn status(view: Arc<View>, wanted: Excerpt) -> Answer {
    let pieces = off_the_workers(move || {
        let pauses = PauseReport::of_process(Instant::now().into());
        ReportPieces::of(view.snapshot(), pauses, wanted)
    })
    .await;
    match pieces {
        Some(Ok(pieces)) => response(StatusCode::OK, JSON, AnswerBody::in_pieces(pieces)),
        Some(Err(error)) => text(StatusCode::NOT_FOUND, format!("{error}\n")),
        None => failed(),
    }
}

fn asks_for(request: &Request<Incoming>, word: &str) -> bool {
    request.uri().query().is_some_and(|query| query.starts_with(word))
}

/// JSON of what is made; 404 where that is nothing.
async fn document<T: Serialize + 'static>(
    request: &Request<Incoming>,
    make: impl FnOnce() -> Option<T> + Send + 'static,
) -> Answer {
    let zip = gzip::is_accepted(request.headers());
    let told = move |text: String| match zip {
        true => Parcel::of(text).answer(JSON, true),
        false => response(StatusCode::OK, JSON, text),
    };
    match off_the_workers(move || make().map(|made| serde_json::to_string(&made).map(told))).await {
        Some(Some(Ok(answer))) => answer,
        Some(None) => text(StatusCode::NOT_FOUND, "there is no such Service\n"),
        Some(Some(Err(_))) | None => failed(),
    }
}

/// Rendering ten thousand Services takes milliseconds that a worker owes to its connections. `None`: it panicked.
async fn off_the_workers<T: Send + 'static>(render: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(render).await.ok()
}

/// A relay without its API server goes on with what it knows: degraded, and ready all the same. To take every node out of
/// service as the API server goes away would make of an outage nobody feels one that everybody feels.
fn readyz(readiness: &Readiness, contact: &Contact, verbose: bool) -> Answer {
    let ready = readiness.is_ready();
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let away = contact.report().filter(|report| !report.connected);
    let degraded = away.map(|report| match report.saved_at {
        Some(at) => {
            format!("[~]source degraded: the API server has not answered yet, serving the state saved at {at}\n")
        }
        None => format!("[~]source degraded: the API server was last heard {:.0} s ago\n", report.age_seconds),
    });
    let body = match (verbose, ready) {
        (false, true) if degraded.is_some() => "ok (degraded: source)\n".to_owned(),
        (false, true) => "ok".to_owned(),
        (false, false) => format!("not ready: {}\n", readiness.blockers().join(", ")),
        (true, _) => {
            let lines = readiness.checks().into_iter().map(|(name, passed)| match passed {
                true => format!("[+]{name} ok\n"),
                false => format!("[-]{name} not yet\n"),
            });
            let sum = if ready { "passed" } else { "failed" };
            lines.collect::<String>() + &degraded.unwrap_or_default() + "readyz check " + sum + "\n"
        }
    };
    text(code, body)
}

fn not_found(surface: Surface) -> Answer {
    text(StatusCode::NOT_FOUND, format!("there is:\n{}\n", surface.paths().join("\n")))
}

fn failed() -> Answer {
    text(StatusCode::INTERNAL_SERVER_ERROR, "this answer could not be made; the log may tell why\n")
}

fn text(code: StatusCode, body: impl Into<Bytes>) -> Answer {
    response(code, "text/plain; charset=utf-8", body)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::health;
    use crate::http_server::{CONNECTION_LIMIT, HEADER_LIMIT_BYTES};
    use crate::lifecycle::{LISTENERS, SOURCE};
    use crate::live::sample;
    use crate::serve::scripted::soon;
    use crate::stats::{WatchFailure, WatchedKind};

    const LOCALHOST: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

    const ALSO_LOCALHOST: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 2)), 0);

    /// All surfaces on loopback, and the three things that they read.
    struct Served {
        admin: Admin,
        status: watch::Sender<Arc<Status>>,
        readiness: Readiness,
        health: Health,
    }

    impl Served {
        async fn start() -> Self {
            let (status, receiver) = watch::channel(Arc::new(sample::status()));
            let readiness = Readiness::blocked_by(&[SOURCE, LISTENERS]);
            let (metrics, health) = (vec![LOCALHOST], vec![LOCALHOST]);
            let options = AdminOptions { metrics, status: vec![ALSO_LOCALHOST], health, hard_fail: true };
            let health = Health::new(Instant::now());
            let admin = start(options, receiver, readiness.clone(), health.clone()).await.expect("port 0 is free");
            Self { admin, status, readiness, health }
        }

        fn address(&self, surface: Surface) -> SocketAddr {
            let mut bound = self.admin.bound().iter();
            bound.find(|(found, _)| *found == surface).expect("all are bound").1
        }

        async fn get(&self, surface: Surface, path: &str) -> String {
            self.ask(surface, &format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")).await
        }

        async fn ask(&self, surface: Surface, request: &str) -> String {
            let mut stream = TcpStream::connect(self.address(surface)).await.expect("it listens");
            stream.write_all(request.as_bytes()).await.expect("it reads");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.expect("it answers");
            answer
        }
    }

    fn body(answer: &str) -> &str {
        answer.split_once("\r\n\r\n").expect("headers and body").1
    }

    #[tokio::test]
    async fn given_a_running_relay_when_metrics_are_asked_for_then_the_content_type_is_exact() {
        let served = Served::start().await;

        let answer = served.get(Surface::Metrics, "/metrics").await;

        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{answer}");
        assert!(body(&answer).contains("kuberelay_connections_total{"), "{answer}");
    }

    #[tokio::test]
    async fn given_a_scraper_that_takes_gzip_when_metrics_are_asked_for_then_it_gets_gzip_and_others_do_not() {
        let served = Served::start().await;
        let head = "HEAD /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n";

        let zipped = served.ask(Surface::Metrics, &format!("{head}accept-encoding: gzip\r\n\r\n")).await;
        let plain = served.ask(Surface::Metrics, &format!("{head}\r\n")).await;

        assert!(zipped.contains("\r\ncontent-encoding: gzip\r\n"), "{zipped}");
        assert!(zipped.contains("\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{zipped}");
        assert!(!plain.contains("content-encoding"), "{plain}");
        assert!(zipped.contains("\r\nvary: accept-encoding\r\n") && plain.contains("\r\nvary: accept-encoding\r\n"));
        assert!(plain.contains("\r\ncontent-length: "), "{plain}");
        let head = head.replace("/metrics", "/status?summary");
        let summary = served.ask(Surface::Status, &format!("{head}accept-encoding: gzip\r\n\r\n")).await;
        assert!(summary.contains("\r\ncontent-encoding: gzip\r\n"), "what a browser far away polls: {summary}");
    }

    #[tokio::test]
    async fn given_a_running_relay_when_its_status_is_asked_for_then_the_report_comes_back() {
        let served = Served::start().await;

        let live = peer::status(served.address(Surface::Status)).await.expect("a status");

        assert_eq!((live.pid, live.revision), (std::process::id(), 7));
        assert_eq!(live.report.services.len(), 3);
    }

    #[tokio::test]
    async fn given_metrics_for_other_machines_when_asked_there_then_status_is_not_told_and_all_is_where_it_is() {
        let served = Served::start().await;

        let away = served.get(Surface::Metrics, "/status").await;
        let here = served.get(Surface::Status, "/metrics").await;

        assert!(away.starts_with("HTTP/1.1 404 ") && !body(&away).contains("/status"), "{away}");
        assert!(here.starts_with("HTTP/1.1 200 "), "{here}");
    }

    #[tokio::test]
    async fn given_the_status_surface_when_a_browser_asks_then_it_gets_a_page_that_only_this_server_can_feed() {
        let served = Served::start().await;

        let [first, second] = [served.get(Surface::Status, "/").await, served.get(Surface::Status, "/").await];
        let elsewhere = served.get(Surface::Metrics, "/").await;

        assert!(first.starts_with("HTTP/1.1 200 "), "{first}");
        let headers = first.split_once("\r\n\r\n").expect("headers and body").0;
        assert!(headers.contains("content-type: text/html; charset=utf-8"), "{headers}");
        assert!(headers.contains("content-security-policy: default-src 'none'; "), "{headers}");
        assert!(headers.contains("cache-control: no-store") && headers.contains("nosniff"), "{headers}");
        assert_ne!(body(&first), body(&second), "the nonce is another one each time");
        assert!(elsewhere.starts_with("HTTP/1.1 404 "), "{elsewhere}");
    }

    #[tokio::test]
    async fn given_the_status_surface_when_a_summary_or_one_service_is_asked_for_then_no_more_than_that_is_told() {
        let served = Served::start().await;
        let json = |answer: &str| serde_json::from_str::<serde_json::Value>(body(answer)).expect("JSON");

        let summary = json(&served.get(Surface::Status, "/status?summary").await);
        let web = json(&served.get(Surface::Status, "/status/default/web").await);
        let nobody = served.get(Surface::Status, "/status/default/nobody").await;

        assert_eq!(summary["services"].as_array().map(Vec::len), Some(3));
        assert!(summary["services"][2].get("ports").is_some_and(|ports| ports[0].is_string()), "{summary}");
        assert_eq!(web["services"].as_array().map(Vec::len), Some(1));
        assert_eq!(web["services"][0]["ports"][0]["backendTraffic"][0]["pod"], "web-1");
        assert!(nobody.starts_with("HTTP/1.1 404 ") && body(&nobody) == "there is no such Service\n", "{nobody}");
        for path in ["/status?summary", "/status/default/web"] {
            assert!(served.get(Surface::Metrics, path).await.starts_with("HTTP/1.1 404 "), "{path}");
        }
    }

    #[tokio::test]
    async fn given_one_service_when_its_report_is_asked_for_then_it_is_that_of_the_whole_one_and_nothing_else() {
        let served = Served::start().await;
        let server = served.address(Surface::Status);
        let web = ObjectName::parse("web");

        let told = peer::status_of(server, &web).await.expect("it is there");
        let whole = peer::status(server).await.expect("a status").only(&web).expect("it is there");
        let nobody = served.get(Surface::Status, "/status?service=shop/web").await;
        let error = peer::status_of(server, &ObjectName::parse("shop/web")).await.expect_err("it is elsewhere");

        let [told, whole] = [told, whole].map(|report| serde_json::to_value(report).expect("JSON"));
        assert_eq!(told, whole);
        assert!(nobody.starts_with("HTTP/1.1 404 "), "{nobody}");
        assert_eq!(body(&nobody), "there is no Service shop/web, but default/web\n");
        assert_eq!(error.to_string(), format!("{server}: there is no Service shop/web, but default/web"));
        let away = served.get(Surface::Metrics, "/status?service=default/web").await;
        assert!(away.starts_with("HTTP/1.1 404 ") && !body(&away).contains("web"), "{away}");
    }

    #[tokio::test]
    async fn given_a_query_of_nobody_when_asked_then_the_answer_is_400_and_says_what_there_is() {
        let served = Served::start().await;

        for query in ["colour=red", "service=web", "service=a/b&service=a/b", "service=default/%3Cb%3E"] {
            let answer = served.get(Surface::Status, &format!("/status?{query}")).await;

            assert!(answer.starts_with("HTTP/1.1 400 "), "{query}: {answer}");
            assert!(
                body(&answer).contains("/status?service=NAMESPACE/NAME") && !body(&answer).contains("<b>"),
                "{answer}"
            );
        }
    }

    #[test]
    fn given_one_address_for_metrics_and_status_when_served_then_one_server_tells_both() {
        let [shared, other]: [SocketAddr; 2] =
            ["127.0.0.1:1", "10.0.0.5:1"].map(|text| text.parse().expect("an address"));
        let options =
            AdminOptions { metrics: vec![other, shared], status: vec![shared], health: vec![], hard_fail: false };

        assert_eq!(options.servers(), [(Surface::Status, shared), (Surface::Metrics, other)]);
        assert_eq!(AdminOptions::default().servers().len(), 2);
    }

    #[tokio::test]
    async fn t215_given_the_metrics_surface_when_the_proxy_mode_is_asked_for_then_it_is_userspace() {
        let served = Served::start().await;

        let answer = served.get(Surface::Metrics, "/proxyMode").await;

        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert_eq!(body(&answer), "userspace");
        assert!(answer.contains("\r\ncontent-type: text/plain; charset=utf-8\r\n"), "{answer}");
        assert!(answer.contains("\r\nx-content-type-options: nosniff\r\n"), "{answer}");
        for path in ["/livez", "/healthz"] {
            assert_eq!(body(&served.get(Surface::Metrics, path).await), "ok");
        }
    }

    #[tokio::test]
    async fn given_blockers_when_readiness_is_asked_for_then_they_are_named_until_cleared() {
        let served = Served::start().await;

        let blocked = served.get(Surface::Metrics, "/readyz").await;
        served.readiness.clear(SOURCE);
        let verbose = served.get(Surface::Metrics, "/readyz?verbose").await;
        served.readiness.clear(LISTENERS);
        let ready = served.get(Surface::Metrics, "/readyz").await;

        assert!(blocked.starts_with("HTTP/1.1 503 "), "{blocked}");
        assert_eq!(body(&blocked), "not ready: listeners, source\n");
        assert_eq!(body(&verbose), "[-]listeners not yet\n[+]source ok\nreadyz check failed\n");
        assert!(ready.starts_with("HTTP/1.1 200 "), "{ready}");
    }

    #[tokio::test]
    async fn f1_given_an_api_server_that_is_away_when_readiness_is_asked_for_then_it_is_ready_and_degraded() {
        let served = Served::start().await;
        [SOURCE, LISTENERS].iter().for_each(|blocker| served.readiness.clear(blocker));
        let contact = Arc::clone(&served.status.borrow().contact);
        contact.watch(WatchedKind::Service);
        contact.line(WatchedKind::Service).connect();
        let before = served.get(Surface::Metrics, "/readyz").await;
        contact.line(WatchedKind::Service).fail(WatchFailure::Unreachable);

        let plain = served.get(Surface::Metrics, "/readyz").await;
        let verbose = served.get(Surface::Metrics, "/readyz?verbose").await;
        let metrics = served.get(Surface::Metrics, "/metrics").await;

        assert_eq!(body(&before), "ok");
        assert!(plain.starts_with("HTTP/1.1 200 ") && verbose.starts_with("HTTP/1.1 200 "), "{plain}{verbose}");
        assert_eq!(body(&plain), "ok (degraded: source)\n");
        assert!(body(&verbose).contains("[~]source degraded: the API server was last heard 0 s ago\n"), "{verbose}");
        assert!(metrics.contains("\nkuberelay_source_connected 0\n"), "{metrics}");
        contact.serve_saved(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_800_000_000));
        let verbose = served.get(Surface::Metrics, "/readyz?verbose").await;
        assert!(body(&verbose).contains("serving the state saved at 2027-01-15T08:00:00Z\n"), "{verbose}");
        let errors = "\nkuberelay_kube_watch_errors_total{kind=\"Service\",reason=\"unreachable\"} 1\n";
        assert!(metrics.contains(errors), "{metrics}");
    }

    #[tokio::test]
    async fn t208_t212_given_a_live_relay_when_health_is_asked_for_then_both_families_are_well_and_livez_has_no_node() {
        let served = Served::start().await;
        let before = [&PROCESS.healthz, &PROCESS.livez].map(|answers| answers.healthy.get());

        let healthz = served.get(Surface::Health, "/healthz").await;
        let livez = served.get(Surface::Health, "/livez").await;

        assert!(healthz.starts_with("HTTP/1.1 200 ") && livez.starts_with("HTTP/1.1 200 "), "{healthz}{livez}");
        let after = [&PROCESS.healthz, &PROCESS.livez].map(|answers| answers.healthy.get());
        assert!(before[0] < after[0] && before[1] < after[1], "{before:?} {after:?}");
        let document: serde_json::Value = serde_json::from_str(body(&healthz)).expect("JSON");
        assert_eq!(document["nodeEligible"], true);
        assert_eq!(document["status"]["IPv4"]["healthy"], true);
        assert_eq!(document["status"]["IPv6"]["healthy"], true);
        assert_eq!(document["lastUpdated"], document["currentTime"], "T213: now while healthy");
        assert!(!body(&livez).contains("nodeEligible"), "{livez}");
    }

    #[tokio::test]
    async fn given_the_control_task_is_gone_when_health_is_asked_for_then_it_is_503() {
        let served = Served::start().await;
        let address = served.address(Surface::Health);
        drop(served.status);

        let mut stream = TcpStream::connect(address).await.expect("it listens");
        stream.write_all(b"GET /livez HTTP/1.0\r\n\r\n").await.expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("it answers");

        assert!(answer.starts_with("HTTP/1.0 503 "), "{answer}");
        assert!(body(&answer).contains(r#""healthy":false"#), "{answer}");
    }

    #[tokio::test]
    async fn t208_t212_given_work_that_waits_too_long_when_health_is_asked_for_then_both_paths_are_503_and_counted() {
        let served = Served::start().await;
        let late = Instant::now().checked_sub(health::TIMEOUT).expect("the machine runs for longer");
        let before = [&PROCESS.healthz, &PROCESS.livez].map(|answers| answers.unhealthy.get());

        served.health.queued(&[Family::V4], late);
        let healthz = served.get(Surface::Health, "/healthz").await;
        let livez = served.get(Surface::Health, "/livez").await;

        for answer in [&healthz, &livez] {
            assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
            let document: serde_json::Value = serde_json::from_str(body(answer)).expect("JSON");
            assert_eq!(document["status"]["IPv4"]["healthy"], false);
            assert_eq!(document["status"]["IPv6"]["healthy"], true);
        }
        let after = [&PROCESS.healthz, &PROCESS.livez].map(|answers| answers.unhealthy.get());
        assert!(before[0] < after[0] && before[1] < after[1], "{before:?} {after:?}");
        let metrics = served.get(Surface::Metrics, "/metrics").await;
        assert!(metrics.contains("\nkubeproxy_proxy_healthz_total{code=\"503\"} "), "{metrics}");
        assert!(metrics.contains("\nkubeproxy_proxy_livez_total{code=\"503\"} "), "{metrics}");
    }

    #[tokio::test]
    async fn t211_given_a_node_that_goes_when_health_is_asked_for_then_healthz_is_503_and_livez_stays_200() {
        let served = Served::start().await;

        served.health.set_node_eligible(false);
        let healthz = served.get(Surface::Health, "/healthz").await;
        let livez = served.get(Surface::Health, "/livez").await;

        assert!(healthz.starts_with("HTTP/1.1 503 "), "{healthz}");
        assert!(healthz.contains(r#""nodeEligible":false"#) && healthz.contains(r#""healthy":true"#), "{healthz}");
        assert!(livez.starts_with("HTTP/1.1 200 "), "{livez}");
    }

    #[tokio::test]
    async fn f23_given_a_process_that_is_about_to_end_when_health_is_asked_for_then_it_is_as_if_the_node_would_go() {
        let served = Served::start().await;

        served.health.leave();
        let healthz = served.get(Surface::Health, "/healthz").await;
        let livez = served.get(Surface::Health, "/livez").await;

        assert!(healthz.starts_with("HTTP/1.1 503 ") && healthz.contains(r#""nodeEligible":false"#), "{healthz}");
        assert!(livez.starts_with("HTTP/1.1 200 "), "{livez}");
    }

    #[test]
    fn t213_given_late_families_when_told_then_the_last_update_is_a_real_one_for_them_alone() {
        let now = Instant::now();
        let updated = now.checked_sub(Duration::from_secs(5)).expect("the machine runs for longer");
        let family = |healthy| FamilyCheckup { healthy, updated };
        let checkup = Checkup { families: [family(false), family(true)], node_eligible: true, leaving: false };

        let document = health_document(&checkup, true, now, UNIX_EPOCH + Duration::from_secs(65));

        assert_eq!(
            document.to_string(),
            r#"{"currentTime":"1970-01-01T00:01:05Z","healthy":false,"lastUpdated":"1970-01-01T00:01:00Z","nodeEligible":true,"status":{"IPv4":{"healthy":false,"lastUpdated":"1970-01-01T00:01:00Z"},"IPv6":{"healthy":true,"lastUpdated":"1970-01-01T00:01:05Z"}}}"#
        );
    }

    #[tokio::test]
    async fn given_an_unknown_path_when_asked_for_then_404_lists_what_there_is() {
        let served = Served::start().await;

        let metrics = served.get(Surface::Metrics, "/").await;
        let health = served.get(Surface::Health, "/status").await;

        assert!(metrics.starts_with("HTTP/1.1 404 ") && body(&metrics).contains("\n/proxyMode\n"), "{metrics}");
        assert!(health.starts_with("HTTP/1.1 404 ") && body(&health) == "there is:\n/healthz\n/livez\n", "{health}");
    }

    #[tokio::test]
    async fn given_a_foreign_host_name_when_asked_then_all_surfaces_but_health_refuse() {
        let served = Served::start().await;
        let request =
            |path: &str| format!("GET {path} HTTP/1.1\r\nhost: rebound.example:10249\r\nconnection: close\r\n\r\n");

        assert!(served.ask(Surface::Metrics, &request("/status")).await.starts_with("HTTP/1.1 403 "));
        assert!(
            served.ask(Surface::Metrics, &request("http://rebound.example/status")).await.starts_with("HTTP/1.1 403 ")
        );
        for path in ["/", "/status?summary", "/status/default/web"] {
            assert!(served.ask(Surface::Status, &request(path)).await.starts_with("HTTP/1.1 403 "), "{path}");
        }
        assert!(served.ask(Surface::Health, &request("/healthz")).await.starts_with("HTTP/1.1 200 "));
    }

    #[test]
    fn given_host_names_when_judged_then_addresses_and_localhost_pass() {
        for good in [
            "127.0.0.1",
            "127.0.0.1:10249",
            "10.0.0.5:80",
            "[::1]",
            "[::1]:80",
            "::1",
            "localhost",
            "LOCALHOST:80",
            "relay.localhost:1",
        ] {
            assert!(is_address_or_localhost(good), "{good}");
        }
        for bad in [
            "",
            "example.com",
            "localhost.example.com:80",
            "127.0.0.1.example.com",
            "notlocalhost",
            "[::1].example.com",
        ] {
            assert!(!is_address_or_localhost(bad), "{bad}");
        }
    }

    #[tokio::test]
    async fn given_head_and_post_when_asked_then_one_has_no_body_and_the_other_is_refused() {
        let served = Served::start().await;

        let head = served
            .ask(Surface::Metrics, "HEAD /proxyMode HTTP/1.1\r\nhost: [::1]:10249\r\nconnection: close\r\n\r\n")
            .await;
        let post = served
            .ask(
                Surface::Metrics,
                "POST /status HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
            )
            .await;

        assert!(head.starts_with("HTTP/1.1 200 ") && head.contains("content-length: 9\r\n"), "{head}");
        assert_eq!(body(&head), "");
        assert!(post.starts_with("HTTP/1.1 405 ") && post.contains("allow: GET, HEAD\r\n"), "{post}");
    }

    #[tokio::test]
    async fn given_each_method_that_could_change_something_when_asked_on_any_surface_then_it_is_refused() {
        let served = Served::start().await;

        for surface in [Surface::Health, Surface::Metrics, Surface::Status] {
            for method in ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "DRAIN"] {
                for path in surface.paths() {
                    let request = format!(
                        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
                    );
                    let answer = served.ask(surface, &request).await;
                    assert!(answer.starts_with("HTTP/1.1 405 "), "{surface:?} {method} {path}: {answer}");
                }
            }
        }
    }

    #[tokio::test]
    async fn given_as_many_who_never_end_their_headers_as_may_be_connected_when_somebody_asks_then_he_does_not_wait() {
        let served = Served::start().await;
        let mut slow = vec![];
        for _ in 0..CONNECTION_LIMIT {
            let mut stream = TcpStream::connect(served.address(Surface::Metrics)).await.expect("it listens");
            stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: ").await.expect("it reads");
            slow.push(stream);
        }

        let asked = Instant::now();
        let answer = served.get(Surface::Metrics, "/metrics").await;
        let took = asked.elapsed();

        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        println!("{CONNECTION_LIMIT} slow ones, an answer after {took:?}");
        assert!(took < HEADER_TIMEOUT / 5, "{took:?}: one of them had to go first");
    }

    #[tokio::test]
    async fn given_headers_that_never_end_when_the_time_is_over_then_the_connection_is_closed() {
        let served = Served::start().await;
        let listener = TcpListener::bind(LOCALHOST).await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        let (status, readiness, health) = (served.status.subscribe(), served.readiness.clone(), served.health.clone());
        let view = View::new(status, readiness, health);
        let mut servers = tokio::task::JoinSet::new();
        servers.spawn(serve(
            listener,
            Surface::Metrics,
            Arc::new(view),
            Duration::from_millis(20),
            CancellationToken::new(),
        ));

        let mut stream = TcpStream::connect(address).await.expect("it listens");
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: ").await.expect("it reads");
        let mut rest = Vec::new();

        // Ends only because the server closes; a reset counts as well.
        let _ = stream.read_to_end(&mut rest).await;
        assert!(!rest.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&rest));
    }

    #[tokio::test]
    async fn given_headers_that_are_too_large_when_sent_then_they_are_refused() {
        let served = Served::start().await;
        let large = "a".repeat(HEADER_LIMIT_BYTES);

        let request = format!("GET /livez HTTP/1.1\r\nhost: localhost\r\nx: {large}\r\n\r\n");
        let mut stream = TcpStream::connect(served.address(Surface::Metrics)).await.expect("it listens");
        stream.write_all(request.as_bytes()).await.expect("the kernel takes it");
        let mut answer = Vec::new();

        // What the server did not read makes its close a reset, which may overtake the refusal.
        let end = stream.read_to_end(&mut answer).await;
        assert!(answer.starts_with(b"HTTP/1.1 431 ") || end.is_err(), "{}", String::from_utf8_lossy(&answer));
    }

    #[tokio::test]
    async fn given_more_idle_connections_than_allowed_when_somebody_asks_then_the_oldest_made_room() {
        let served = Served::start().await;
        let address = served.address(Surface::Metrics);
        let mut idle = vec![];
        for _ in 0..CONNECTION_LIMIT {
            idle.push(TcpStream::connect(address).await.expect("it listens"));
        }

        let answer = served.get(Surface::Metrics, "/livez").await;

        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert_eq!(idle[0].read(&mut [0; 1]).await.unwrap_or(0), 0, "the oldest is closed");
    }

    #[tokio::test]
    async fn given_a_second_kube_relay_when_it_binds_the_same_address_then_the_first_is_named() {
        let first = Served::start().await;
        let address = first.address(Surface::Health);
        let options = AdminOptions { metrics: vec![], status: vec![], health: vec![address], hard_fail: true };

        let error = start(options, first.status.subscribe(), first.readiness.clone(), first.health.clone())
            .await
            .expect_err("taken");

        let text = error.to_string();
        assert!(text.contains(&address.to_string()), "{text}");
        assert!(text.contains(&format!("another kube-relay (pid {})", std::process::id())), "{text}");
    }

    #[tokio::test]
    async fn given_a_taken_address_when_started_without_hard_fail_then_the_other_surface_is_served_and_it_later() {
        let address = SocketAddr::from(([127, 85, 2, 1], 10256)); // Nobody else's, also while it is free.
        let taken = TcpListener::bind(address).await.expect("a free address");
        let (_status, receiver) = watch::channel(Arc::new(Status::default()));
        let options =
            AdminOptions { metrics: vec![LOCALHOST], status: vec![], health: vec![address], hard_fail: false };

        let admin =
            start(options, receiver, Readiness::blocked_by(&[]), Health::new(Instant::now())).await.expect("not fatal");
        let mut unbound = admin.unbound();
        let at_the_start = unbound.borrow().clone();
        drop(taken);
        soon(unbound.wait_for(Vec::is_empty)).await.expect("it is tried again");

        assert_eq!(admin.bound().len(), 1);
        assert_eq!(admin.bound()[0].0, Surface::Metrics);
        assert_eq!(at_the_start.len(), 1);
        assert_eq!((at_the_start[0].surface, at_the_start[0].address), (Surface::Health, address));
        assert!(at_the_start[0].error.starts_with(&format!("admin server: cannot listen on {address}: ")));
        TcpStream::connect(address).await.expect("it is served now");
    }

    /// Servers for health alone, on addresses of the test's own.
    async fn healthy_on(addresses: &[SocketAddr]) -> (Admin, watch::Sender<Arc<Status>>) {
        let (status, receiver) = watch::channel(Arc::new(Status::default()));
        let health = Health::new(Instant::now());
        let admin = start(health_on(addresses), receiver, Readiness::blocked_by(&[]), health).await;
        (admin.expect("free addresses"), status)
    }

    fn health_on(addresses: &[SocketAddr]) -> AdminOptions {
        AdminOptions { metrics: vec![], status: vec![], health: addresses.to_vec(), hard_fail: true }
    }

    #[tokio::test]
    async fn f31_given_addresses_that_come_and_go_when_followed_then_servers_do_so_and_the_others_stay() {
        let [first, second] = [2, 3].map(|host| SocketAddr::from(([127, 85, 2, host], 10256)));
        let (mut admin, _status) = healthy_on(&[first]).await;
        let mut open = TcpStream::connect(first).await.expect("it is served");

        admin.move_to(&health_on(&[first, second])).await;

        TcpStream::connect(second).await.expect("it is served as well");
        open.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.expect("it is open");
        let mut answer = String::new();
        open.read_to_string(&mut answer).await.expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");

        admin.move_to(&health_on(&[second])).await;

        TcpListener::bind(first).await.expect("it is free");
        TcpStream::connect(second).await.expect("it is served still");
    }

    #[tokio::test]
    async fn given_a_machine_that_changes_when_followed_then_its_servers_move() {
        let [first, second] = [4, 5].map(|host| SocketAddr::from(([127, 85, 2, host], 10256)));
        let (admin, _status) = healthy_on(&[first]).await;
        let (change, hosts) = Hosts::by_hand(Host::default());

        let following = tokio::spawn(admin.follow(hosts, move |_| health_on(&[second])));
        change(Host { default_sources: vec![second.ip()], ..Host::default() });

        soon(async { while TcpStream::connect(second).await.is_err() {} }).await;
        following.abort();
    }

    #[tokio::test]
    async fn given_an_address_that_comes_and_is_taken_when_it_goes_again_then_it_is_told_for_so_long() {
        let [first, second] = [6, 7].map(|host| SocketAddr::from(([127, 85, 2, host], 10256)));
        let _taken = TcpListener::bind(second).await.expect("a free address");
        let (mut admin, _status) = healthy_on(&[first]).await;
        let unbound = admin.unbound();

        admin.move_to(&health_on(&[first, second])).await;
        assert_eq!(unbound.borrow().iter().map(|failure| failure.address).collect::<Vec<_>>(), [second]);
        admin.move_to(&health_on(&[first])).await;

        assert!(unbound.borrow().is_empty());
        TcpStream::connect(first).await.expect("it is served");
    }
}
