//! The servers at health ports (`spec.healthCheckNodePort`): they tell load balancers how many endpoints of a Service are
//! on this node, and so whether to send its traffic here.
//!
//! Which ports there are, and the numbers, is planned in `health_port`; how HTTP is spoken is `http_server`'s; `/healthz`
//! is `admin`'s. A port is answered on all of its addresses or on none: a balancer that gets an answer at one of them may
//! be about to send traffic to another.

use std::collections::{BTreeMap, BTreeSet};
use std::future::ready;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use hyper::StatusCode;
use hyper::header::{CONNECTION, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::health::Health;
use crate::health_port::HealthPort;
use crate::http_server::{Answer, Connections, HEADER_TIMEOUT, converse, response};
use crate::listener_set::{Calls, ListenerSet, Number, listener_set};
use crate::name::{ListenKey, ObjectName};
use crate::serve::fresh::Fresh;
use crate::serve::passed::Passed;
use crate::serve::{next_wait, socket};

/// Connections to all health ports together; one more, and the oldest makes room. Whoever opens 10,000 a second leaves
/// the others 25 ms each: a balancer, which asks once in some seconds, needs less than that.
const CONNECTION_LIMIT: usize = 256;

/// By these shares a balancer spreads what it sends.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// A health port could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{service}: cannot answer health checks at {key}")]
pub(crate) struct HealthPortError {
    /// Whose it is.
    pub(crate) service: ObjectName,
    /// The address that failed; nothing listens at the others either.
    pub(crate) key: ListenKey,
    /// What the kernel said.
    pub(crate) source: io::Error,
}

/// What a Service is to have from now on; `None`: no health port.
pub(crate) type Change = (ObjectName, Option<Arc<HealthPort>>);

/// The health ports that are open, and those that should be. Owned by `control`, by value; one task answers at all of
/// them. Dropped, they are closed.
#[derive(Debug)]
pub(crate) struct HealthPorts {
    /// `None` once they are closed for good.
    listeners: Option<ListenerSet<Arc<Notice>>>,
    server: JoinHandle<()>,
    open: BTreeMap<ObjectName, Open>,
    failed: BTreeMap<ObjectName, Failed>,
    /// Sockets of another process, while ports are opened on them.
    passed: BTreeMap<ListenKey, OwnedFd>,
    /// The Services whose failure may be another one than was told.
    news: BTreeSet<ObjectName>,
    /// How many are open, and failed, as was logged.
    told: (usize, usize),
}

/// What one health port tells. Control writes the number, connections read it.
#[derive(Debug)]
struct Notice {
    service: ObjectName,
    local_endpoints: AtomicUsize,
    /// True once the port is closed. Whoever has kept a connection hears so once, and has to find out what is there now.
    withdrawn: AtomicBool,
}

#[derive(Debug)]
struct Open {
    notice: Arc<Notice>,
    sockets: BTreeMap<ListenKey, Number>,
}

#[derive(Debug)]
struct Failed {
    wanted: Arc<HealthPort>,
    error: HealthPortError,
    wait: Duration,
    due: Instant,
}

impl HealthPorts {
    /// None open yet. Needs a tokio runtime.
    ///
    /// # Errors
    /// No descriptor or no memory is left.
    pub(crate) fn start(health: Health) -> io::Result<Self> {
        let (listeners, calls) = listener_set()?;
        Ok(Self {
            listeners: Some(listeners),
            server: tokio::spawn(serve(calls, health)),
            open: BTreeMap::new(),
            failed: BTreeMap::new(),
            passed: BTreeMap::new(),
            news: BTreeSet::new(),
            told: (0, 0),
        })
    }

    /// False for nearly all Services: there is nothing to close.
    pub(crate) fn knows(&self, service: &ObjectName) -> bool {
        self.open.contains_key(service) || self.failed.contains_key(service)
    }

    /// Closes what is not wanted any more, so that others can have its address. [`open`](Self::open) does the rest.
    pub(crate) async fn release(&mut self, changes: &[Change]) {
        for (service, wanted) in changes {
            if wanted.is_none() && self.failed.remove(service).is_some() {
                self.news.insert(service.clone());
            }
            let Some(mut open) = self.open.remove(service) else { continue };
            let is_wanted = |key: &ListenKey| wanted.iter().any(|port| port.keys().any(|wanted| wanted == *key));
            let (kept, closed): (BTreeMap<_, _>, BTreeMap<_, _>) =
                open.sockets.into_iter().partition(|(key, _)| is_wanted(key));
            for number in closed.into_values() {
                self.close_socket(number).await;
            }
            open.sockets = kept;
            match open.sockets.is_empty() {
                true => open.notice.withdraw(),
                false => drop(self.open.insert(service.clone(), open)),
            }
        }
    }

    /// Opens what is wanted and not open, and tells the new numbers.
    pub(crate) async fn open(&mut self, changes: Vec<Change>, now: Instant) {
        for (service, wanted) in changes {
            let Some(wanted) = wanted else { continue };
            match self.failed.get_mut(&service) {
                // It is tried again in its turn.
                Some(failed) if failed.wanted.keys().eq(wanted.keys()) => failed.wanted = wanted,
                _ => self.try_open(service, wanted, None, now).await,
            }
        }
        let (open, failed) = (self.open.len(), self.failed.len());
        if std::mem::replace(&mut self.told, (open, failed)) != (open, failed) {
            info!(open, failed, "health ports");
        }
    }

    /// When the next one that failed is due for another try.
    pub(crate) fn next_retry(&self) -> Option<Instant> {
        self.failed.values().map(|failed| failed.due).min()
    }

    /// All that failed for another process's sake is due: it has let go.
    pub(crate) fn hasten_all(&mut self, now: Instant) {
        for failed in self.failed.values_mut() {
            (failed.due, failed.wait) = (now, Duration::ZERO);
        }
    }

    /// Copies of all sockets, for another process. They are answered at as before.
    ///
    /// # Errors
    /// No descriptor is left for them.
    pub(crate) async fn lend(&self) -> io::Result<Vec<Passed>> {
        let Some(listeners) = &self.listeners else { return Ok(Vec::new()) };
        let mut passed = Vec::new();
        for (key, number) in self.open.values().flat_map(|open| &open.sockets) {
            let sockets = vec![Arc::new(listeners.copy(*number).await?)];
            passed.push(Passed { key: *key, parked: false, sockets });
        }
        Ok(passed)
    }

    /// Opens what failed as another process has had it, on that one's sockets where they are like `fresh` ones: no
    /// balancer is refused in between.
    pub(crate) async fn inherit(&mut self, passed: Vec<Passed>, fresh: &Fresh, now: Instant) {
        let fitting = passed.into_iter().filter(|passed| passed.check(1, fresh).is_ok());
        let socket = |Passed { key, mut sockets, .. }: Passed| Some((key, Arc::into_inner(sockets.pop()?)?));
        self.passed = fitting.filter_map(socket).collect();
        self.hasten_all(now);
        self.retry(now).await;
        self.passed.clear(); // Nobody wants those.
    }

    /// These addresses are local from now on: what failed there is due.
    pub(crate) fn hasten(&mut self, came: &BTreeSet<IpAddr>, now: Instant) {
        let concerned = |failed: &&mut Failed| came.contains(&failed.error.key.ip());
        for failed in self.failed.values_mut().filter(concerned) {
            (failed.due, failed.wait) = (now, Duration::ZERO);
        }
    }

    /// Tries those that are due.
    pub(crate) async fn retry(&mut self, now: Instant) {
        let due = self.failed.iter().filter(|(_, failed)| failed.due <= now);
        let due: Vec<_> =
            due.map(|(service, failed)| (service.clone(), Arc::clone(&failed.wanted), failed.wait)).collect();
        for (service, wanted, waited) in due {
            self.try_open(service, wanted, Some(waited), now).await;
        }
    }

    /// Why a health port that should be open is not: the error of the last try.
    pub(crate) fn failure(&self, service: &ObjectName) -> Option<&HealthPortError> {
        self.failed.get(service).map(|failed| &failed.error)
    }

    /// The Services whose [failure](Self::failure) may be another one than when this was asked last.
    pub(crate) fn take_failure_news(&mut self) -> BTreeSet<ObjectName> {
        std::mem::take(&mut self.news)
    }

    /// Closes all of them, and opens none from now on. A second call changes nothing.
    pub(crate) async fn close(&mut self) {
        if self.listeners.take().is_some() {
            self.open.clear();
            self.news.extend(std::mem::take(&mut self.failed).into_keys());
            let _ = (&mut self.server).await; // A panic has been told.
        }
    }

    /// Opens a port at the addresses where it is not open yet, or closes it altogether. One that has `waited` for this try
    /// waits longer for the next.
    async fn try_open(&mut self, service: ObjectName, wanted: Arc<HealthPort>, waited: Option<Duration>, now: Instant) {
        if self.listeners.is_none() {
            return;
        }
        let mut open = self.open.remove(&service).unwrap_or_else(|| Open::new(&service));
        open.notice.tell(wanted.local_endpoints);
        let missing: Vec<_> = wanted.keys().filter(|key| !open.sockets.contains_key(key)).collect();
        match self.listen(&missing, &mut open).await {
            Ok(()) => {
                if self.failed.remove(&service).is_some() {
                    self.news.insert(service.clone());
                }
                self.open.insert(service, open);
            }
            Err((key, source)) => {
                open.notice.withdraw();
                for number in open.sockets.into_values() {
                    self.close_socket(number).await;
                }
                let wait = next_wait(waited);
                let error = HealthPortError { service: service.clone(), key, source };
                self.news.insert(service.clone());
                self.failed.insert(service, Failed { wanted, error, wait, due: now + wait });
            }
        }
    }

    /// Binds all before anybody can connect to one.
    async fn listen(&mut self, keys: &[ListenKey], open: &mut Open) -> Result<(), (ListenKey, io::Error)> {
        let Some(listeners) = &mut self.listeners else { return Ok(()) };
        let passed = &mut self.passed;
        let bind = |key: &ListenKey| {
            let socket = passed.remove(key).map_or_else(|| socket::bind_tcp(*key), Ok);
            socket.map(|socket| (*key, socket)).map_err(|error| (*key, error))
        };
        let bound = keys.iter().map(bind).collect::<Result<Vec<(ListenKey, OwnedFd)>, _>>()?;
        for (key, socket) in &bound {
            socket::listen(socket).map_err(|error| (*key, error))?;
        }
        for (key, socket) in bound {
            let added = listeners.add(socket, Arc::clone(&open.notice)).await;
            open.sockets.insert(key, added.map_err(|error| (key, error))?);
        }
        Ok(())
    }

    async fn close_socket(&self, number: Number) {
        if let Some(listeners) = &self.listeners {
            listeners.close(number).await;
        }
    }
}

impl Open {
    fn new(service: &ObjectName) -> Self {
        let (service, local_endpoints, withdrawn) = (service.clone(), AtomicUsize::new(0), AtomicBool::new(false));
        Self { notice: Arc::new(Notice { service, local_endpoints, withdrawn }), sockets: BTreeMap::new() }
    }
}

/// Answers at all health ports until they are dropped.
async fn serve(mut calls: Calls<Arc<Notice>>, health: Health) {
    let mut connections = Connections::at_most(CONNECTION_LIMIT);
    while let Some((stream, notice)) = calls.next().await {
        let health = health.clone();
        // Whatever is asked for, and however.
        let answer = move |_| ready(notice.answer(health.check(Instant::now()).proxy_is_well()));
        connections.add(converse(stream, HEADER_TIMEOUT, CancellationToken::new(), answer));
    }
}

impl Notice {
    fn tell(&self, local_endpoints: usize) {
        self.local_endpoints.store(local_endpoints, Ordering::Relaxed); // True by itself.
    }

    fn withdraw(&self) {
        self.tell(0);
        self.withdrawn.store(true, Ordering::Relaxed);
    }

    /// kube-proxy's answer, to the byte.
    fn answer(&self, proxy_healthy: bool) -> Answer {
        let local_endpoints = self.local_endpoints.load(Ordering::Relaxed);
        let code = match proxy_healthy && local_endpoints > 0 {
            true => StatusCode::OK,
            false => StatusCode::SERVICE_UNAVAILABLE,
        };
        let (namespace, name) = (&*self.service.namespace, &*self.service.name);
        let service = NameDocument { namespace, name };
        let document = Document { service, local_endpoints, service_proxy_healthy: proxy_healthy };
        let mut answer = response(code, "application/json", document.to_json());
        answer.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        answer.headers_mut().insert(WEIGHT, local_endpoints.into());
        if self.withdrawn.load(Ordering::Relaxed) {
            answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        answer
    }
}

/// What a health port says.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'n> {
    service: NameDocument<'n>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

#[derive(Serialize)]
struct NameDocument<'n> {
    namespace: &'n str,
    name: &'n str,
}

impl Document<'_> {
    /// In lines, with tabs: people's scripts look for `"localEndpoints": 1`.
    fn to_json(&self) -> Vec<u8> {
        let mut text = Vec::new();
        let mut writer = Serializer::with_formatter(&mut text, PrettyFormatter::with_indent(b"\t"));
        self.serialize(&mut writer).expect("text and numbers are JSON, and memory takes it");
        text
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::serve::scripted::soon;

    const FIRST: Duration = Duration::from_millis(500);

    fn notice(local_endpoints: usize) -> Notice {
        let Open { notice, .. } = Open::new(&ObjectName::parse("shop/web"));
        notice.tell(local_endpoints);
        Arc::into_inner(notice).expect("nobody else has it")
    }

    fn health_ports() -> HealthPorts {
        HealthPorts::start(Health::new(Instant::now())).expect("a descriptor")
    }

    /// Of the Service `web`, at the test's own address and number.
    fn wanted(host: u8, number: u16) -> Vec<Change> {
        let addresses = [IpAddr::from([127, 85, 2, host])].into();
        vec![(ObjectName::parse("web"), Some(Arc::new(HealthPort { number, addresses, local_endpoints: 1 })))]
    }

    #[test]
    fn t205_given_a_count_and_a_proxy_when_answered_then_code_and_body_are_exact() {
        let answered = |local_endpoints, proxy_healthy| {
            let answer = notice(local_endpoints).answer(proxy_healthy);
            (answer.status().as_u16(), answer.headers()[WEIGHT].to_str().expect("a number").to_owned())
        };
        let service = NameDocument { namespace: "shop", name: "web" };
        let document = Document { service, local_endpoints: 0, service_proxy_healthy: false };

        assert_eq!(answered(18, true), (200, "18".into()));
        assert_eq!(answered(0, true), (503, "0".into()));
        assert_eq!(answered(3, false), (503, "3".into()), "the count stays what it is");
        assert_eq!(
            String::from_utf8(document.to_json()).expect("text"),
            "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t},\n\
             \t\"localEndpoints\": 0,\n\t\"serviceProxyHealthy\": false\n}"
        );
    }

    #[tokio::test]
    async fn t207_f32_given_a_port_that_stays_taken_when_tried_then_waits_double_and_it_is_told_once_it_is_open() {
        let (mut ports, now, web) = (health_ports(), Instant::now(), ObjectName::parse("web"));
        let stranger = TcpListener::bind("127.85.2.1:7500").expect("a free address");

        ports.open(wanted(1, 7500), now).await;
        assert_eq!(ports.take_failure_news(), [web.clone()].into());
        assert!(ports.failure(&web).is_some() && ports.next_retry() == Some(now + FIRST));
        ports.open(wanted(1, 7500), now + FIRST / 2).await;
        assert_eq!(ports.next_retry(), Some(now + FIRST), "a change of the number brings no try of its own");
        ports.retry(now + FIRST).await;
        assert_eq!(ports.next_retry(), Some(now + 3 * FIRST));
        drop(stranger);
        ports.retry(now + 3 * FIRST).await;

        assert_eq!(ports.take_failure_news(), [web.clone()].into());
        assert!(ports.failure(&web).is_none() && ports.next_retry().is_none() && ports.knows(&web));
    }

    #[tokio::test]
    async fn t207_given_a_port_that_is_taken_when_another_is_wanted_then_it_is_opened_at_once() {
        let mut ports = health_ports();
        let _stranger = TcpListener::bind("127.85.2.2:7500").expect("a free address");
        ports.open(wanted(2, 7500), Instant::now()).await;

        let other = wanted(2, 7501);
        ports.release(&other).await;
        ports.open(other, Instant::now()).await;

        assert!(ports.failure(&ObjectName::parse("web")).is_none());
        std::net::TcpStream::connect("127.85.2.2:7501").expect("it listens");
    }

    #[tokio::test]
    async fn t205_f25_given_a_port_of_another_process_when_it_is_handed_over_then_it_listens_all_the_time() {
        let (mut old, mut new, now, web) = (health_ports(), health_ports(), Instant::now(), ObjectName::parse("web"));
        let is_open = || std::net::TcpStream::connect("127.85.2.4:7500").is_ok();
        old.open(wanted(4, 7500), now).await;
        new.open(wanted(4, 7500), now).await;
        assert!(new.failure(&web).is_some(), "the other one has it");

        let passed = old.lend().await.expect("descriptors are left");
        assert_eq!(passed.len(), 1);
        new.inherit(passed, &Fresh::look().expect("descriptors are left"), now).await;

        assert!(new.failure(&web).is_none() && is_open());
        soon(old.close()).await;
        assert!(is_open());
        soon(new.close()).await;
        assert!(!is_open(), "nobody else has it");
    }

    #[tokio::test]
    async fn given_health_ports_when_closed_twice_then_addresses_are_free_and_nothing_is_opened_any_more() {
        let mut ports = health_ports();
        ports.open(wanted(3, 7500), Instant::now()).await;

        soon(ports.close()).await;
        soon(ports.close()).await;
        ports.open(wanted(3, 7500), Instant::now()).await;

        TcpListener::bind("127.85.2.3:7500").expect("free");
        assert!(!ports.knows(&ObjectName::parse("web")));
    }
}
