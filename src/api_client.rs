//! The way to an API server: which one, with what credentials, and how patiently.
//!
//! Each watched kind has a [`Client`] of its own, whose `Wire` sees all that goes over it: when the server last said
//! something, when it wants to be asked again, and how soon a watch may follow another. What is asked is `kubernetes`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use hyper::body::{Body, Bytes, Frame};
use hyper::header::RETRY_AFTER;
use hyper::{Request, Response, Uri};
use kube::client::{Body as RequestBody, ClientBuilder};
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use rand::RngExt;
use tokio::time::{Instant, sleep_until, timeout};
use tower::{BoxError, Layer, Service};

use crate::contact::Contact;
use crate::heard::{Heard, Limit};
use crate::stats::WatchedKind;

/// From a request to the first byte of its answer. A list of a hundred thousand endpoints takes a server seconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Watches that may follow each other at once; then one in [`WATCH_PACE`]. A proxy in between may cut each as soon as it begins.
const WATCH_BURST: u32 = 3;
/// Time in which one more watch may begin. A server lets them live for about a minute.
const WATCH_PACE: Duration = Duration::from_secs(6);
/// From a connect to its answer. Long enough for three tries; where nobody serves the address, soon enough for the log.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest time that a server can make us wait, but for [`RETRY_JITTER`].
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);
/// A server tells all nodes the same time: this part of it may be added, so that they do not come back as one.
const RETRY_JITTER: f64 = 0.2;
/// One event of a watch. A server takes objects of 3 MB, and the largest slice, of a thousand endpoints, is a fifth of that.
const MAX_EVENT_BYTES: usize = 8 << 20;
/// One list. The endpoints of the largest cluster that is supported, 150,000 pods, are a third of that.
const MAX_LIST_BYTES: usize = 256 << 20;
/// One answer that says why not.
const MAX_REFUSAL_BYTES: usize = 1 << 20;

/// Which API server, as an operator says it. Without either of both: the one of the cluster that this pod runs in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApiOptions {
    /// Server and credentials. From `--kubeconfig`.
    pub kubeconfig: Option<PathBuf>,
    /// Address of the server, in place of the one that the kubeconfig or the pod's environment names. From `--master`.
    pub master: Option<String>,
}

/// It cannot be known whom to ask, or how.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The kubeconfig cannot be used.
    #[error("{}: cannot be used as a kubeconfig", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        source: KubeconfigError,
    },
    /// The kubeconfig is no YAML, or of another shape.
    ///
    /// Only the place is told: the parser's own text shows the lines around it, and with them tokens and keys.
    #[error("{}:{line}:{column}: not the YAML of a kubeconfig", path.display())]
    KubeconfigSyntax {
        /// The file.
        path: PathBuf,
        /// From 1; 0 where it is not known.
        line: u64,
        /// From 1; 0 where it is not known.
        column: u64,
    },
    /// Neither a file nor a cluster around us.
    #[error("no API server is known here: give --kubeconfig, or run in a pod with a service account")]
    NotInCluster(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// `--master` is no address.
    #[error("{0}: not the address of an API server; write https://192.168.1.10:6443")]
    Master(String),
    /// Certificates or keys that cannot be used.
    #[error("{server}: cannot be asked with these credentials")]
    Credentials {
        /// The server.
        server: String,
        /// Why.
        source: Box<kube::Error>,
    },
}

/// Server and credentials.
#[derive(Clone, Debug)]
pub struct Api {
    config: Config,
}

impl Api {
    /// Reads where the server is, and how to ask it. Sends nothing.
    ///
    /// # Errors
    /// Where files are missing or wrong: a person has to mend them.
    pub async fn find(options: &ApiOptions) -> Result<Self, ApiError> {
        let mut config = match (&options.kubeconfig, &options.master) {
            (Some(path), _) => from_file(path.clone()).await?,
            (None, Some(_)) => Config::incluster().unwrap_or_else(|_| Config::new(Uri::default())),
            (None, None) => Config::incluster().map_err(|error| ApiError::NotInCluster(error.into()))?,
        };
        if let Some(master) = &options.master {
            config.cluster_url = address(master).ok_or_else(|| ApiError::Master(master.clone()))?;
        }
        // Its own retries are not seen by anybody, and do not keep to Retry-After.
        config.default_retry = false;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        Ok(Self { config })
    }

    /// The address of the server, without what may be secret in it.
    pub fn server(&self) -> String {
        let url = &self.config.cluster_url;
        let host = url.authority().map(|authority| authority.as_str().rsplit('@').next().unwrap_or_default());
        format!("{}://{}", url.scheme_str().unwrap_or("https"), host.unwrap_or_default())
    }

    /// The IP that the server is asked at; `None` where it is a name.
    pub fn ip(&self) -> Option<IpAddr> {
        let host = self.config.cluster_url.host()?;
        host.trim_matches(['[', ']']).parse().ok()
    }

    /// A client for the watch of one kind, and what it tells of its wire.
    pub(crate) fn client(&self, kind: WatchedKind, contact: &Arc<Contact>) -> Result<(Client, Arc<Wire>), ApiError> {
        let failed = |source| ApiError::Credentials { server: self.server(), source: Box::new(source) };
        let wire = Arc::new(Wire::new(kind, Arc::clone(contact)));
        let client = ClientBuilder::try_from(self.config.clone()).map_err(failed)?.with_layer(&Tap(Arc::clone(&wire)));
        Ok((client.build(), wire))
    }
}

async fn from_file(path: PathBuf) -> Result<Config, ApiError> {
    let read = async {
        let kubeconfig = Kubeconfig::read_from(&path)?;
        Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await
    };
    read.await.map_err(|source| match source {
        KubeconfigError::Parse(error) => {
            let (line, column) = error.location().map_or((0, 0), |at| (at.line(), at.column()));
            ApiError::KubeconfigSyntax { path, line, column }
        }
        source => ApiError::Kubeconfig { path, source },
    })
}

/// `https://host:port`, or as much of it as is there.
fn address(text: &str) -> Option<Uri> {
    let text = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let uri: Uri = text.parse().ok()?;
    let known = matches!(uri.scheme_str(), Some("http" | "https"));
    (known && uri.host().is_some_and(|host| !host.is_empty())).then_some(uri)
}

/// What is known of the connection of one kind. Shared by its client and its watch.
#[derive(Debug)]
pub(crate) struct Wire {
    kind: WatchedKind,
    contact: Arc<Contact>,
    since: Instant,
    /// Until when the server wants to be left alone, in milliseconds after `since`.
    retry_ms: AtomicU64,
    heard_bytes: AtomicU64,
}

impl Wire {
    pub(crate) fn new(kind: WatchedKind, contact: Arc<Contact>) -> Self {
        Self { kind, contact, since: Instant::now(), retry_ms: AtomicU64::new(0), heard_bytes: AtomicU64::new(0) }
    }

    /// When the server may be asked again, as far as it has said so.
    pub(crate) fn retry_at(&self) -> Instant {
        self.since + Duration::from_millis(self.retry_ms.load(Ordering::Relaxed))
    }

    /// Bytes of answers so far.
    pub(crate) fn heard_bytes(&self) -> u64 {
        self.heard_bytes.load(Ordering::Relaxed)
    }

    /// A part of a good answer has come.
    pub(crate) fn hear(&self, frame: &Frame<Bytes>) {
        self.contact.hear(self.kind);
        self.heard_bytes.fetch_add(frame.data_ref().map_or(0, |data| data.len() as u64), Ordering::Relaxed);
    }

    /// Keeps to what the answer asks for.
    fn note<B>(&self, response: &Response<B>) {
        if response.status().is_success() {
            self.contact.hear(self.kind);
            self.contact.line(self.kind).connect();
        }
        let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        if let Some(seconds) = seconds.filter(|_| !response.status().is_success()) {
            let until = self.since.elapsed() + patience(seconds, rand::rng().random());
            self.retry_ms.store(u64::try_from(until.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
    }
}

/// How long nothing is asked when the server wants to be left alone for some seconds. `share` of the jitter, 0 to 1.
fn patience(seconds: u64, share: f64) -> Duration {
    Duration::from_secs(seconds).min(MAX_RETRY_AFTER).mul_f64(1.0 + RETRY_JITTER * share)
}

/// Watches that may begin: some at once, then one after the other.
#[derive(Debug)]
struct Pace {
    /// When all of [`WATCH_BURST`] are free again.
    full_at: Instant,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { full_at: now }
    }

    /// When the next one may begin, which is counted as begun.
    fn take(&mut self, now: Instant) -> Instant {
        self.full_at = self.full_at.max(now) + WATCH_PACE;
        (self.full_at - WATCH_PACE * WATCH_BURST).max(now)
    }
}

/// Puts a [`Wire`] around a client.
struct Tap(Arc<Wire>);

impl<S> Layer<S> for Tap {
    type Service = Tapped<S>;

    fn layer(&self, inner: S) -> Tapped<S> {
        Tapped { inner, wire: Arc::clone(&self.0), watches: Pace::new(Instant::now()) }
    }
}

/// A client whose traffic is heard.
struct Tapped<S> {
    inner: S,
    wire: Arc<Wire>,
    watches: Pace,
}

impl<S, B> Service<Request<RequestBody>> for Tapped<S>
where
    S: Service<Request<RequestBody>, Response = Response<B>, Error = BoxError> + Send + 'static,
    S::Future: Send + 'static,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<Heard<B>>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<RequestBody>) -> Self::Future {
        let now = Instant::now();
        let (turn, limit) = if is_watch(request.uri()) {
            (self.watches.take(now), Limit::Line(MAX_EVENT_BYTES))
        } else {
            (now, Limit::Whole(MAX_LIST_BYTES))
        };
        let wire = Arc::clone(&self.wire);
        let answer = self.inner.call(request); // Lazy: nothing is sent before it is polled.
        Box::pin(async move {
            sleep_until(turn).await;
            let response = timeout(ANSWER_TIMEOUT, answer).await??;
            wire.note(&response);
            let good = response.status().is_success();
            let (wire, limit) = if good { (Some(wire), limit) } else { (None, Limit::Whole(MAX_REFUSAL_BYTES)) };
            Ok(response.map(|body| Heard::new(body, wire, limit)))
        })
    }
}

fn is_watch(uri: &Uri) -> bool {
    uri.query().is_some_and(|query| query.split('&').any(|pair| matches!(pair, "watch=true" | "watch=1")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f3_given_watches_that_end_at_once_when_they_begin_again_then_three_go_and_then_one_in_six_seconds() {
        let start = Instant::now();
        let mut pace = Pace::new(start);

        let waits: Vec<u64> = (0..5).map(|_| (pace.take(start) - start).as_secs()).collect();

        assert_eq!(waits, [0, 0, 0, 6, 12]);
        assert_eq!(pace.take(start + Duration::from_secs(60)), start + Duration::from_secs(60), "forgiven");
    }

    #[test]
    fn f3_given_a_time_to_wait_when_jittered_then_it_is_never_shorter_and_has_an_end() {
        assert_eq!(patience(10, 0.0), Duration::from_secs(10));
        assert_eq!(patience(10, 1.0), Duration::from_secs(12));
        assert_eq!(patience(u64::MAX, 1.0), Duration::from_secs(72));
    }

    #[tokio::test]
    async fn given_a_kubeconfig_with_a_slip_beside_a_token_when_read_then_the_error_has_the_place_and_no_secret() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let text = "apiVersion: v1\nkind: Config\nusers:\n- name: me\n  user:\n    token: s3cr3t\n   as: [\n";
        std::fs::write(file.path(), text).expect("written");

        let error = from_file(file.path().into()).await.expect_err("no YAML");

        let debug = format!("{error:?}");
        let told = format!("{debug} {:#}", anyhow::Error::from(error));
        assert!(told.contains(": not the YAML of a kubeconfig"), "{told}");
        assert!(!told.contains("s3cr3t"), "{told}");
    }

    #[test]
    fn given_addresses_of_servers_when_read_then_only_http_with_a_host_passes() {
        let read = |text| address(text).map(|uri| uri.to_string());

        assert_eq!(read("https://[fd00::1]:6443").as_deref(), Some("https://[fd00::1]:6443/"));
        assert_eq!(read("192.168.1.10:6443").as_deref(), Some("https://192.168.1.10:6443/"));
        for text in ["", "https://", "ftp://a", "a b"] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn given_requests_when_looked_at_then_watches_are_told_from_lists() {
        let is_watch = |text: &str| is_watch(&text.parse().expect("an address"));

        assert!(is_watch("/api/v1/services?&watch=true&resourceVersion=1"));
        assert!(!is_watch("/api/v1/services?labelSelector=watch"));
    }

    #[tokio::test]
    async fn given_a_master_when_found_then_it_stands_in_place_of_the_kubeconfigs_server() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("config");
        let text = "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: c, user: u}}]\n\
                    clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}]\nusers: [{name: u, user: {}}]\n";
        std::fs::write(&path, text).expect("a file");
        let kubeconfig = Some(path);

        let plain = Api::find(&ApiOptions { kubeconfig: kubeconfig.clone(), master: None }).await.expect("found");
        let other = Api::find(&ApiOptions { kubeconfig, master: Some("10.0.0.1:6443".into()) }).await.expect("found");

        assert_eq!(other.ip(), Some([10, 0, 0, 1].into()));
        assert_eq!((plain.server().as_str(), other.server().as_str()), ("http://127.0.0.1:1", "https://10.0.0.1:6443"));
    }

    #[tokio::test]
    async fn given_a_kubeconfig_that_is_not_there_when_looked_for_then_the_error_names_it() {
        let kubeconfig = Some(PathBuf::from("/nonexistent/config"));

        let error = Api::find(&ApiOptions { kubeconfig, master: None }).await.expect_err("no such file");

        assert!(error.to_string().starts_with("/nonexistent/config: "), "{error}");
    }
}
