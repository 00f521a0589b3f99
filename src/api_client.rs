//! Which API server is asked, and with what credentials, as files and flags say.
//!
//! Who keeps credentials fresh is `login`; what goes over the wire is heard by `wire`; what is asked is `kubernetes`.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper::Uri;
use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};

use crate::cluster::Cluster;
use crate::contact::Contact;
use crate::file_stamps::FileStamps;
use crate::login::Login;
use crate::stats::WatchedKind;
use crate::wire::{self, Wire};

/// From a connect to its answer. Long enough for three tries; where nobody serves the address, soon enough for the log.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

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
    /// Certificates, keys or a plugin that cannot be used.
    #[error("{server}: cannot be asked with these credentials")]
    Credentials {
        /// The server.
        server: String,
        /// Why.
        source: Box<kube::Error>,
    },
}

/// Server and credentials. Clones share one login.
#[derive(Clone, Debug)]
pub struct Api {
    url: Uri,
    login: Arc<Login>,
}

impl Api {
    /// Reads where the server is, and how to ask it. Sends nothing.
    ///
    /// # Errors
    /// Where files are missing or wrong: a person has to mend them.
    pub async fn find(options: &ApiOptions) -> Result<Self, ApiError> {
        let credentials = read(options).await?;
        let api = Self {
            url: credentials.config.cluster_url.clone(),
            login: Arc::new(Login::new(options.clone(), credentials.clone())),
        };
        if let Some(error) = &credentials.missing {
            tracing::warn!(
                server = api.server(),
                error,
                "--master without --kubeconfig, and no service account here: the API server is asked without credentials"
            );
        }
        Ok(api)
    }

    /// The address of the server, without what may be secret in it.
    pub fn server(&self) -> String {
        address_of(&self.url)
    }

    /// The IP that the server is asked at; `None` where it is a name.
    pub fn ip(&self) -> Option<IpAddr> {
        let host = self.url.host()?;
        host.trim_matches(['[', ']']).parse().ok()
    }

    /// The cluster that the server is of, as far as its credentials tell.
    pub(crate) fn cluster(&self) -> Arc<Cluster> {
        self.login.cluster()
    }

    /// A client for the watch of one kind, and what it tells of its wire. To be called on the runtime that it is used on.
    pub(crate) fn client(&self, kind: WatchedKind, contact: &Arc<Contact>) -> Result<(Client, Arc<Wire>), ApiError> {
        self.login.begin()?;
        let wire = Arc::new(Wire::new(kind, Arc::clone(contact)));
        Ok((wire::client(&self.login, Some(&wire)), wire))
    }

    /// A client for what is no watch, and says nothing of the contact with the server.
    pub(crate) fn plain_client(&self) -> Result<Client, ApiError> {
        self.login.begin()?;
        Ok(wire::client(&self.login, None))
    }
}

/// Server and credentials as they were read.
#[derive(Clone, Debug)]
pub(crate) struct Credentials {
    pub(crate) config: Config,
    /// What they were read from. Not the files of tokens: those are read again every minute, by `kube`.
    pub(crate) files: FileStamps,
    /// Why there are none, where the server is asked all the same.
    missing: Option<String>,
}

/// Reads files and the environment of a pod.
pub(crate) async fn read(options: &ApiOptions) -> Result<Credentials, ApiError> {
    let mut credentials = match (&options.kubeconfig, &options.master) {
        (Some(path), _) => from_file(path).await?,
        (None, None) => of_pod(Config::incluster).map_err(|error| ApiError::NotInCluster(error.into()))?,
        // The files of a service account are enough: the address is known.
        (None, Some(_)) => of_pod(Config::incluster_dns).unwrap_or_else(|error| Credentials {
            config: Config::new(Uri::default()),
            files: FileStamps::default(),
            missing: Some(error.to_string()),
        }),
    };
    let config = &mut credentials.config;
    if let Some(master) = &options.master {
        config.cluster_url = address(master).ok_or_else(|| ApiError::Master(master.clone()))?;
    }
    // Its own retries are not seen by anybody, and do not keep to Retry-After.
    config.default_retry = false;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    Ok(credentials)
}

fn of_pod(read: fn() -> Result<Config, InClusterError>) -> Result<Credentials, InClusterError> {
    let mut files = FileStamps::default();
    read()?.root_cert_file.iter().for_each(|path| files.take(path));
    let config = read()?; // Again, as stamps come before what they stand for.
    Ok(Credentials { config, files, missing: None })
}

async fn from_file(path: &Path) -> Result<Credentials, ApiError> {
    let mut files = FileStamps::default();
    files.take(path); // Before it is read: what is written meanwhile is seen as a change.
    let read = async {
        let kubeconfig = Kubeconfig::read_from(path)?;
        files_of(&kubeconfig).iter().for_each(|path| files.take(path));
        Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await
    };
    let config = read.await;
    match config {
        Ok(config) => Ok(Credentials { config, files, missing: None }),
        Err(KubeconfigError::Parse(error)) => {
            let (line, column) = error.location().map_or((0, 0), |at| (at.line(), at.column()));
            Err(ApiError::KubeconfigSyntax { path: path.to_owned(), line, column })
        }
        Err(source) => Err(ApiError::Kubeconfig { path: path.to_owned(), source }),
    }
}

/// The certificates and keys that a kubeconfig names.
fn files_of(kubeconfig: &Kubeconfig) -> Vec<PathBuf> {
    let clusters = kubeconfig.clusters.iter().filter_map(|named| named.cluster.as_ref());
    let authorities = clusters.filter_map(|cluster| cluster.certificate_authority.as_ref());
    let users = kubeconfig.auth_infos.iter().filter_map(|named| named.auth_info.as_ref());
    let own = users.flat_map(|user| [&user.client_certificate, &user.client_key]).flatten();
    authorities.chain(own).map(PathBuf::from).collect()
}

/// A server as it may be shown: what stands before the `@` may be a password.
pub(crate) fn address_of(url: &Uri) -> String {
    let host = url.authority().map(|authority| authority.as_str().rsplit('@').next().unwrap_or_default());
    format!("{}://{}", url.scheme_str().unwrap_or("https"), host.unwrap_or_default())
}

/// `https://host:port`, or as much of it as is there.
fn address(text: &str) -> Option<Uri> {
    let text = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let uri: Uri = text.parse().ok()?;
    let known = matches!(uri.scheme_str(), Some("http" | "https"));
    (known && uri.host().is_some_and(|host| !host.is_empty())).then_some(uri)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn given_a_kubeconfig_with_a_slip_beside_a_token_when_read_then_the_error_has_the_place_and_no_secret() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let text = "apiVersion: v1\nkind: Config\nusers:\n- name: me\n  user:\n    token: s3cr3t\n   as: [\n";
        std::fs::write(file.path(), text).expect("written");

        let error = from_file(file.path()).await.expect_err("no YAML");

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
