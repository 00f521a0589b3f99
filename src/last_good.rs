//! The last state of an API server that was served, kept in a file: what a relay begins with when the server is away.
//!
//! The file is a manifest, one JSON object a line, and `run -f` reads it, too: a head that says whose state it is and of when,
//! the Node, the objects (`saved_object`), and an end, without which the file counts for nothing. Whether it is
//! served is up to `api_report`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::Instant;

use crate::cluster::Cluster;
use crate::decode::decode;
use crate::model::Objects;
use crate::own_node::OwnNode;
use crate::saved_object::{service_manifest, slice_manifest};
use crate::timestamp::rfc3339;

/// Its name in `--state-dir`.
const FILE: &str = "last-known-good.json";
/// How often the state is saved, where it changed.
const SAVE_INTERVAL: Duration = Duration::from_secs(10);
/// Of its first and its last line.
const API_VERSION: &str = "kube-relay.dev/v1alpha1";

/// What is kept.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Whose it is.
    pub(crate) origin: Origin,
    /// Services and endpoints.
    pub(crate) objects: Objects,
    /// The Node that the relay ran on.
    pub(crate) node: Option<OwnNode>,
}

/// Whose state it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// The address that the server was asked at. For people.
    pub(crate) server: String,
    /// The cluster.
    #[serde(default, rename = "authorities")]
    pub(crate) cluster: Cluster,
}

/// A state that was read back.
#[derive(Debug)]
pub(crate) struct Saved {
    pub(crate) state: State,
    /// When it was written.
    pub(crate) at: SystemTime,
}

/// A file that holds no state.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// It is there, and cannot be read.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// Its first line is no head.
    #[error("its first line does not say whose state it is, and of when")]
    Head,
    /// Its last line is no end, or that of a longer file.
    #[error("it is cut off: it does not end with a line that counts its objects")]
    Cut,
}

/// The first line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    api_version: String,
    kind: HeadKind,
    /// In RFC 3339.
    saved_at: String,
    #[serde(flatten)]
    origin: Origin,
}

/// The last line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct End {
    api_version: String,
    kind: EndKind,
    /// Lines between the first and this one.
    objects: usize,
}

#[derive(Debug, Serialize, Deserialize)]
enum HeadKind {
    SavedState,
}

#[derive(Debug, Serialize, Deserialize)]
enum EndKind {
    SavedStateEnd,
}

/// Who keeps the last state in its file.
#[derive(Debug)]
pub(crate) struct Keeper {
    path: Option<PathBuf>,
    /// When to save next.
    due: Option<Instant>,
    running: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Of the file at this path; of none, without.
    pub(crate) fn new(path: Option<PathBuf>) -> Self {
        Self { path, due: None, running: None }
    }

    /// When to save next.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// The first change is saved at once, others with those that follow it.
    pub(crate) fn note(&mut self, changed: bool) {
        if changed && self.path.is_some() && self.due.is_none() {
            let wait = if self.running.is_some() { SAVE_INTERVAL } else { Duration::ZERO };
            self.due = Some(Instant::now() + wait);
        }
    }

    /// On a thread of its own, as disks may be slow.
    pub(crate) fn save(&mut self, state: State) {
        self.due = None;
        let Some(path) = self.path.clone() else { return };
        if self.running.as_ref().is_some_and(|running| !running.is_finished()) {
            self.due = Some(Instant::now() + SAVE_INTERVAL);
            return;
        }
        self.running = Some(spawn_blocking(move || {
            if let Err(error) = save(&path, &state, SystemTime::now()) {
                tracing::warn!(file = %path.display(), %error, "the state cannot be saved for the next start");
            }
        }));
    }
}

/// Where the file of a state folder is.
pub(crate) fn path(state_dir: &Path) -> PathBuf {
    state_dir.join(FILE)
}

/// Reads a state; `None` where none was ever saved. What of its objects cannot be used is left out.
pub(crate) fn load(path: &Path) -> Result<Option<Saved>, LoadError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(LoadError::Read(error)),
    };
    let (head, lines) = parts(&text)?;
    let at = head.saved_at.parse::<Timestamp>().map_err(|_| LoadError::Head)?.into();
    let mut objects = Objects::default();
    decode(&text, FILE).objects.iter().for_each(|entry| objects.add(&entry.content));
    let empty = objects.services.is_empty() && objects.slices.is_empty();
    let state = State { origin: head.origin, objects, node: lines.first().and_then(|line| node(line)) };
    Ok((!empty).then_some(Saved { state, at }))
}

/// The head and the lines up to the end, which says how many these are.
fn parts(text: &[u8]) -> Result<(Head, Vec<&[u8]>), LoadError> {
    let mut lines = text.split(|byte| *byte == b'\n');
    let head = lines.next().and_then(|line| serde_json::from_slice(line).ok()).ok_or(LoadError::Head)?;
    let mut lines: Vec<_> = lines.collect();
    // Behind the last line break nothing is left.
    let whole = lines.pop().is_some_and(<[u8]>::is_empty);
    let end = lines.pop().and_then(|line| serde_json::from_slice::<End>(line).ok());
    match end {
        Some(end) if whole && end.objects == lines.len() => Ok((head, lines)),
        _ => Err(LoadError::Cut),
    }
}

fn node(line: &[u8]) -> Option<OwnNode> {
    let value: Value = serde_json::from_slice(line).ok()?;
    (value["kind"] == "Node").then(|| OwnNode::of(&value))
}

/// Writes a state beside its place and renames it into it: whoever reads sees a whole one, whenever power fails.
pub(crate) fn save(path: &Path, state: &State, at: SystemTime) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = BufWriter::new(create_anew(&new)?);
    let State { origin, objects, node } = state;
    let (api_version, saved_at) = (API_VERSION.to_owned(), rfc3339(at));
    write(&mut file, &Head { api_version, kind: HeadKind::SavedState, saved_at, origin: origin.clone() })?;
    if let Some(node) = node {
        write(&mut file, &node.manifest())?;
    }
    objects.services.iter().try_for_each(|service| write(&mut file, &service_manifest(service)))?;
    objects.slices.iter().try_for_each(|slice| write(&mut file, &slice_manifest(slice)))?;
    let objects = usize::from(node.is_some()) + objects.services.len() + objects.slices.len();
    write(&mut file, &End { api_version: API_VERSION.to_owned(), kind: EndKind::SavedStateEnd, objects })?;
    file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    fs::rename(new, path)
}

/// A file of our own that nobody else may read: a cluster's addresses are its own business. What is left of an earlier try,
/// or was put there by somebody, is not written through.
fn create_anew(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// As one line.
fn write(file: &mut impl Write, object: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *file, object)?;
    file.write_all(b"\n")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::{Slice, SliceName};

    fn objects(text: &[u8]) -> Objects {
        let mut objects = Objects::default();
        decode(text, "a.yaml").objects.iter().for_each(|entry| objects.add(&entry.content));
        objects
    }

    fn every_field() -> State {
        let manifests = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/manifests/every_field.yaml");
        State {
            origin: Origin {
                server: "https://10.0.0.1:6443".into(),
                cluster: Cluster::vouched_for_by(&[b"a".to_vec(), b"b".to_vec()]),
            },
            objects: objects(&fs::read(manifests).expect("the test's manifest")),
            node: Some(OwnNode { name: "worker-1".into(), zone: Some("eu-1a".into()), ..OwnNode::default() }),
        }
    }

    /// A moment without fractions of a second.
    fn moment() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    #[test]
    fn given_every_field_when_saved_and_loaded_then_nothing_changed() {
        let folder = tempfile::tempdir().expect("a folder");
        let whole = every_field();
        assert!(!whole.objects.services.is_empty() && !whole.objects.slices.is_empty());
        let named = |state: &Objects| -> Vec<Slice> {
            let plain = |slice: &Arc<Slice>| matches!(slice.name, SliceName::EndpointSlice(_));
            state.slices.iter().filter(|slice| plain(slice)).map(|slice| (**slice).clone()).collect()
        };

        save(&path(folder.path()), &whole, moment()).expect("saved");
        let Saved { state: saved, at } = load(&path(folder.path())).expect("read").expect("there is one");

        assert_eq!(saved.objects.services, whole.objects.services);
        assert_eq!(named(&saved.objects)[..named(&whole.objects).len()], named(&whole.objects));
        assert_eq!(saved.objects.slices.len(), whole.objects.slices.len());
        assert_eq!((saved.node, saved.origin, at), (whole.node, whole.origin, moment()));
    }

    #[test]
    fn given_a_link_in_place_of_the_new_file_when_saved_then_nothing_is_written_through_it_and_nobody_else_may_read() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let folder = tempfile::tempdir().expect("a folder");
        let (path, elsewhere) = (path(folder.path()), folder.path().join("elsewhere"));
        fs::write(&elsewhere, "theirs").expect("written");
        symlink(&elsewhere, path.with_extension("new")).expect("a link");

        save(&path, &every_field(), moment()).expect("saved");

        assert_eq!(fs::read_to_string(&elsewhere).expect("read"), "theirs");
        let metadata = fs::symlink_metadata(&path).expect("it is there");
        assert!(metadata.is_file());
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        assert!(load(&path).expect("read").is_some());
    }

    #[test]
    fn f2_given_no_file_or_one_that_is_no_state_when_loaded_then_there_is_no_state() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(load(&path(folder.path())).expect("no file is fine").is_none());

        for text in [&b"\xff{{{"[..], b"", b"\n", b"{}\n", b"kind: Service\n"] {
            fs::write(path(folder.path()), text).expect("a file");
            assert!(matches!(load(&path(folder.path())), Err(LoadError::Head)), "{text:?}");
        }
    }

    #[test]
    fn f2_given_a_file_that_is_cut_anywhere_or_lacks_a_line_when_loaded_then_it_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = path(folder.path());
        save(&path, &every_field(), moment()).expect("saved");
        let text = fs::read(&path).expect("just written");
        let refused = |text: &[u8]| {
            fs::write(&path, text).expect("a file");
            matches!(load(&path), Err(LoadError::Head | LoadError::Cut))
        };

        for length in (0..text.len()).rev().take(300).chain((0..text.len()).step_by(97)) {
            assert!(refused(&text[..length]), "{length} of {} bytes", text.len());
        }
        let lines: Vec<_> = text.split_inclusive(|byte| *byte == b'\n').collect();
        for left_out in 0..lines.len() {
            let others = lines.iter().enumerate().filter(|(number, _)| *number != left_out);
            assert!(refused(&others.flat_map(|(_, line)| line.to_vec()).collect::<Vec<_>>()), "line {left_out}");
        }
        assert!(!refused(&text));
    }
}
