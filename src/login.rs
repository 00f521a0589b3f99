//! Who we are to an API server: credentials as they are now, and the client that has them.
//!
//! Tokens are read again by `kube` itself: each minute where they are in a file, before their end where a plugin says when
//! that is. All else it reads once: certificates, keys, the authority of the server, a token without an end, the kubeconfig.
//! Here these are read anew where their files changed, where the server does not take them, and before their end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use hyper::{Request, Response, StatusCode};
use kube::client::{AuthError, Body};
use kube::{Client, Config, Error};
use tokio::runtime::Handle;
use tokio::sync::Mutex;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, timeout};
use tower::BoxError;

use crate::api_client::{ApiError, ApiOptions, Credentials, address_of, read};
use crate::causes::causes;
use crate::cluster::Cluster;

/// Credentials are read anew once in this time at most: a server that takes none must not have a plugin run all the time.
const PACE: Duration = Duration::from_secs(10);
/// So long a request waits for what is read anew; then it goes with what there is. Plugins ask servers of their own.
const PATIENCE: Duration = Duration::from_secs(3);
/// So long before their end credentials are renewed.
const MARGIN: Duration = Duration::from_secs(60);

/// The credentials of one server. Shared by all clients of it, behind a lock: one of them reads anew, and the others are to
/// wait for that, not to do the same.
pub(crate) struct Login {
    options: ApiOptions,
    /// True where the server did not take the credentials of some request since they were read.
    refused: AtomicBool,
    cluster: ArcSwap<Cluster>,
    state: Mutex<State>,
}

struct State {
    credentials: Credentials,
    client: Option<Client>,
    /// Nothing is read anew before.
    not_before: Instant,
    /// What reads anew, on a thread of its own: plugins may take their time.
    renewing: Option<JoinHandle<Result<(Credentials, Client), ApiError>>>,
    /// True where it was told that they could not be read anew, and nothing better since.
    failed: bool,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Login {
    /// With credentials that were read just now. Does nothing with them yet.
    pub(crate) fn new(options: ApiOptions, credentials: Credentials) -> Self {
        let cluster = ArcSwap::from_pointee(cluster_of(&credentials.config));
        let not_before = Instant::now();
        let state = State { credentials, client: None, not_before, renewing: None, failed: false };
        Self { options, refused: AtomicBool::new(false), cluster, state: Mutex::new(state) }
    }

    /// The cluster, as the authorities of its server tell.
    pub(crate) fn cluster(&self) -> Arc<Cluster> {
        self.cluster.load_full()
    }

    /// Makes the first client, on the current runtime. Where there is one nothing happens.
    pub(crate) fn begin(&self) -> Result<(), ApiError> {
        // Where it is locked somebody asks already, and so there is one.
        self.state.try_lock().map_or(Ok(()), |mut state| state.client().map(drop))
    }

    /// Asks the server, with credentials that are fresh.
    pub(crate) async fn send(&self, request: Request<Body>) -> Result<Response<Body>, BoxError> {
        let client = self.client().await?;
        let response = client.send(request).await.map_err(without_secrets)?;
        if response.status() == StatusCode::UNAUTHORIZED {
            self.refused.store(true, Ordering::Relaxed);
        }
        Ok(response)
    }

    async fn client(&self) -> Result<Client, ApiError> {
        let mut state = self.state.lock().await;
        if let Some(reason) = self.is_stale(&state, Instant::now(), SystemTime::now()) {
            self.renew(&mut state, reason).await;
        }
        state.client()
    }

    /// Why credentials are to be read anew, if they are. Looks at the files: a few times a minute.
    fn is_stale(&self, state: &State, now: Instant, wall: SystemTime) -> Option<&'static str> {
        if now < state.not_before {
            return None;
        }
        if self.refused.load(Ordering::Relaxed) {
            return Some("refused");
        }
        if state.credentials.files.are_outdated() {
            return Some("changed");
        }
        state.end().is_some_and(|end| end <= wall + MARGIN).then_some("expiring")
    }

    /// Where that fails, or does not come to its end, the old ones stay.
    async fn renew(&self, state: &mut State, reason: &'static str) {
        if state.renewing.as_ref().is_some_and(|renewing| !renewing.is_finished()) {
            return; // Somebody has waited for it long enough.
        }
        let options = self.options.clone();
        let renewing = state.renewing.get_or_insert_with(|| spawn_blocking(move || renewed(&options)));
        let Ok(renewed) = timeout(PATIENCE, renewing).await else {
            return state.fail(reason, "it takes too long");
        };
        state.renewing = None;
        state.not_before = Instant::now() + PACE;
        self.refused.store(false, Ordering::Relaxed);
        match renewed {
            Ok(Ok((credentials, client))) => {
                self.cluster.store(Arc::new(cluster_of(&credentials.config)));
                let end_before = state.end();
                (state.credentials, state.client, state.failed) = (credentials, Some(client), false);
                // A server that takes none at all, and a plugin that has no others, have this come up for ever.
                if reason == "changed" || state.end() > end_before {
                    tracing::info!(reason, "credentials for the API server were read anew");
                } else {
                    tracing::debug!(reason, "credentials for the API server were read anew");
                }
            }
            Ok(Err(error)) => state.fail(reason, &causes(&error)),
            Err(panic) => state.fail(reason, &panic.to_string()),
        }
    }
}

impl State {
    fn client(&mut self) -> Result<Client, ApiError> {
        let client = match self.client.take() {
            Some(client) => client,
            None => client(&self.credentials.config)?,
        };
        Ok(self.client.insert(client).clone())
    }

    /// When the credentials end, where they do.
    fn end(&self) -> Option<SystemTime> {
        let seconds = self.client.as_ref()?.valid_until().as_ref()?.as_second();
        Some(UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default()))
    }

    fn fail(&mut self, reason: &str, error: &str) {
        if !std::mem::replace(&mut self.failed, true) {
            tracing::warn!(
                reason,
                error,
                "credentials for the API server cannot be read anew; the old ones stay in use, and it is tried again"
            );
        }
    }
}

fn cluster_of(config: &Config) -> Cluster {
    Cluster::vouched_for_by(config.root_cert.as_deref().unwrap_or_default())
}

/// Reads all, and runs a plugin where there is one: blocks.
fn renewed(options: &ApiOptions) -> Result<(Credentials, Client), ApiError> {
    let credentials = Handle::current().block_on(read(options))?;
    let client = client(&credentials.config)?;
    Ok((credentials, client))
}

fn client(config: &Config) -> Result<Client, ApiError> {
    let server = address_of(&config.cluster_url);
    let failed = |error| ApiError::Credentials { server, source: Box::new(without_secrets(error)) };
    Client::try_from(config.clone()).map_err(failed)
}

/// The same error, as one of credentials where it is one, and without what is secret in it.
fn without_secrets(error: Error) -> Error {
    match error {
        Error::Auth(cause) => Error::Auth(told(cause)),
        // Of what `kube` itself reads again.
        Error::Service(cause) => match cause.downcast::<AuthError>() {
            Ok(cause) => Error::Auth(told(*cause)),
            Err(cause) => Error::Service(cause),
        },
        other => other,
    }
}

/// What a plugin prints and what it is given shows in the errors about it, and with that tokens and keys.
fn told(error: AuthError) -> AuthError {
    match error {
        AuthError::AuthExecParse(error) => {
            let (line, column) = error.location().map_or((0, 0), |at| (at.line(), at.column()));
            AuthError::AuthExec(format!("what the plugin printed is no credential (line {line}, column {column})"))
        }
        AuthError::AuthExecRun { out, .. } => AuthError::AuthExec(format!("the plugin ended with {}", out.status)),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;

    /// A kubeconfig with this user.
    fn write(path: &Path, user: &Value) {
        write_with(path, &json!({"server": "http://127.0.0.1:1"}), user);
    }

    fn write_with(path: &Path, cluster: &Value, user: &Value) {
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": cluster}], "users": [{"name": "u", "user": user}],
        });
        fs::write(path, kubeconfig.to_string()).expect("the test's folder can be written");
    }

    async fn login(kubeconfig: &Path) -> Login {
        let options = ApiOptions { kubeconfig: Some(kubeconfig.to_owned()), master: None };
        let credentials = read(&options).await.expect("a kubeconfig");
        let login = Login::new(options, credentials);
        login.begin().expect("credentials that can be used");
        login
    }

    /// Why it would read anew, so many seconds after its last try.
    async fn stale(login: &Login, seconds: u64) -> Option<&'static str> {
        let (state, later) = (login.state.lock().await, Duration::from_secs(seconds));
        login.is_stale(&state, state.not_before + later, SystemTime::now() + later)
    }

    #[tokio::test]
    async fn given_a_certificate_when_its_file_is_replaced_then_it_is_read_anew_and_before_nothing_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, certificate) = (folder.path().join("config"), folder.path().join("ca.crt"));
        fs::write(&certificate, include_str!("../tests/api/authority-1.pem")).expect("written");
        let cluster = json!({"server": "http://127.0.0.1:1", "certificate-authority": "ca.crt"});
        write_with(&path, &cluster, &json!({"token": "a"}));
        let login = login(&path).await;
        let before = login.cluster();
        assert_eq!(stale(&login, 3600).await, None);

        fs::write(&certificate, include_str!("../tests/api/authority-2.pem")).expect("written");
        assert_eq!(stale(&login, 0).await, Some("changed"));
        login.client().await.expect("a client");

        assert_eq!(stale(&login, 3600).await, None);
        assert!(login.cluster().is_not(&before), "another authority");
    }

    #[tokio::test]
    async fn given_credentials_that_are_refused_when_they_stay_so_then_they_are_read_anew_now_and_then() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("config");
        write(&path, &json!({"token": "a"}));
        let login = login(&path).await;

        login.refused.store(true, Ordering::Relaxed);
        assert_eq!(stale(&login, 0).await, Some("refused"));
        login.client().await.expect("a client");
        assert_eq!(stale(&login, 0).await, None, "not until it is refused again");
        login.refused.store(true, Ordering::Relaxed);

        let now = Instant::now();
        let state = login.state.lock().await;
        assert_eq!(login.is_stale(&state, now, SystemTime::now()), None, "too soon");
        assert_eq!(login.is_stale(&state, now + PACE, SystemTime::now()), Some("refused"));
    }

    #[tokio::test]
    async fn given_a_file_that_is_written_in_two_pieces_when_read_in_between_then_the_old_client_stays_until_it_is_whole()
     {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("config");
        write(&path, &json!({"token": "a"}));
        let login = login(&path).await;

        fs::write(&path, "apiVersion: v1\nkind: [").expect("written");
        login.client().await.expect("the old one");
        assert!(login.state.lock().await.failed);
        write(&path, &json!({"token": "b"}));
        login.state.lock().await.not_before = Instant::now();
        login.client().await.expect("a new one");

        assert!(!login.state.lock().await.failed);
        assert_eq!(stale(&login, 3600).await, None);
    }

    /// A plugin that prints this.
    fn plugin(text: &str) -> Value {
        command("/bin/echo", &[text])
    }

    fn command(command: &str, args: &[&str]) -> Value {
        let env = json!([{"name": "KEY", "value": "s3cr3t"}]);
        json!({"exec": {
            "apiVersion": "client.authentication.k8s.io/v1", "command": command, "args": args, "env": env,
            "interactiveMode": "Never",
        }})
    }

    fn credential(status: &Value) -> String {
        let (version, kind) = ("client.authentication.k8s.io/v1", "ExecCredential");
        json!({"apiVersion": version, "kind": kind, "status": status}).to_string()
    }

    #[tokio::test]
    async fn given_a_plugin_that_prints_nonsense_or_fails_when_run_then_the_error_has_no_secret() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("config");
        let nonsense = plugin("{\"status\": {\"token\": \"s3cr3t\", \"expirationTimestamp\": [}}");
        let failing = command("/bin/sh", &["-c", "echo s3cr3t; echo $KEY >&2; exit 7"]);

        for (user, words) in
            [(nonsense, "what the plugin printed is no credential"), (failing, "the plugin ended with exit status: 7")]
        {
            write(&path, &user);
            let options = ApiOptions { kubeconfig: Some(path.clone()), master: None };
            let credentials = read(&options).await.expect("a kubeconfig");
            let error = Login::new(options, credentials).begin().expect_err("no credential");

            let told = format!("{error:?} {}", causes(&error));
            assert!(told.contains(words) && !told.contains("s3cr3t"), "{told}");
        }
    }

    #[test]
    fn given_credentials_that_kube_cannot_read_again_when_told_then_they_are_the_trouble_and_not_the_way() {
        let cause = AuthError::AuthExec("gone".into());

        assert!(matches!(without_secrets(Error::Service(cause.into())), Error::Auth(_)));
        assert!(matches!(without_secrets(Error::Service("reset".into())), Error::Service(_)));
    }

    #[tokio::test]
    async fn given_a_plugin_that_hangs_when_asked_again_then_requests_go_on_with_the_old_credentials() {
        let folder = tempfile::tempdir().expect("a folder");
        let [path, printed, pipe] = ["config", "printed", "pipe"].map(|name| folder.path().join(name));
        let text = credential(&json!({"token": "a"}));
        fs::write(&printed, &text).expect("written");
        write(&path, &command("/bin/cat", &[&printed.display().to_string()]));
        let login = login(&path).await;
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo runs").success());
        fs::rename(&pipe, &printed).expect("renamed");

        login.refused.store(true, Ordering::Relaxed);
        login.client().await.expect("the old one");
        assert!(login.state.lock().await.failed, "it was told");
        let began = Instant::now();
        login.client().await.expect("the old one");
        assert!(began.elapsed() < PATIENCE, "nobody waits again");

        fs::rename(&printed, &pipe).expect("renamed");
        fs::write(&printed, &text).expect("written");
        fs::write(&pipe, &text).expect("the plugin that hangs reads it");
        while login.state.lock().await.failed {
            login.client().await.expect("a client");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(stale(&login, 0).await, None);
    }

    #[tokio::test]
    async fn given_a_certificate_of_a_plugin_when_its_end_comes_near_then_another_one_is_asked_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("config");
        let (certificate, key) = (include_str!("../tests/api/client-1.pem"), include_str!("../tests/api/client-1.key"));
        let ends = crate::timestamp::rfc3339(SystemTime::now() + Duration::from_secs(600));
        let status = json!({"clientCertificateData": certificate, "clientKeyData": key, "expirationTimestamp": ends});
        write(&path, &plugin(&credential(&status)));
        let login = login(&path).await;

        assert_eq!(stale(&login, 530).await, None);
        assert_eq!(stale(&login, 545).await, Some("expiring"));
    }
}
