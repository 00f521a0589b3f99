//! The static source: manifests in files, read again when they change.
//!
//! Here is which files there are, what of each is in use, and which of two objects of one name counts.
//! A file is taken whole or not at all: one that becomes wrong keeps its last good objects, in use until
//! it is mended. Only a file that never was right gives what is right in it, so that one mistake does not
//! keep the rest from starting. What the text says is `decode`; how changes are noticed is `watch`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::hash::BuildHasher;
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::allocate::{self, Ranges};
use crate::control::Message;
use crate::decode::{Content, Entry, Kind, decode};
use crate::findings::MAX_FINDINGS;
use crate::hints;
use crate::model::{ClusterIps, Event, Objects, Service, ServiceKind};
use crate::name::ObjectName;
use crate::plan::{Problem, Severity};
use crate::rejections::Rejections;
use crate::scaffold;
use crate::status::SourceStatus;
use crate::watch::{Interest, Settling, Sign, Watch};

/// Largest file that is read.
pub const MAX_FILE_BYTES: u64 = 256 * 1024 * 1024;

/// How often all files are read to see whether they changed, where the kernel did not tell.
pub const POLL_INTERVAL: Duration = Duration::from_secs(5);

/// Standard input in messages.
const STDIN: &str = "standard input";

/// One `--source`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A file, whatever its name, or a folder, of which `*.yaml`, `*.yml` and `*.json` are read.
    Path(PathBuf),
    /// Standard input, read once. Written as `-`.
    Stdin,
}

impl Input {
    /// The path, where nothing is there: most likely a slip of the pen, not something that is still to come.
    pub fn missing(&self) -> Option<&Path> {
        match self {
            Self::Path(path) if !path.exists() => Some(path),
            Self::Path(_) | Self::Stdin => None,
        }
    }
}

impl From<OsString> for Input {
    fn from(text: OsString) -> Self {
        if text == "-" { Self::Stdin } else { Self::Path(text.into()) }
    }
}

impl From<&str> for Input {
    fn from(text: &str) -> Self {
        OsString::from(text).into()
    }
}

/// What the inputs say at one moment.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// The objects in use, with addresses for those that name none.
    pub objects: Objects,
    /// What is wrong and what is worth knowing.
    pub problems: Vec<Problem>,
    /// Files and folders of which not all is in use.
    pub failed: Vec<String>,
    /// What was rejected since the start.
    pub rejections: Rejections,
    /// File and line of each Service.
    places: HashMap<ObjectName, (String, u64)>,
}

impl Reading {
    /// Adds file and line to what is said about a Service.
    pub fn locate(&self, problem: &mut Problem) {
        let service = problem.object.strip_prefix("Service ").map(ObjectName::parse);
        if let Some((file, line)) = service.and_then(|service| self.places.get(&service))
            && problem.file.is_none()
        {
            (problem.file, problem.line) = (Some(file.clone()), Some(*line));
        }
    }
}

/// Reads all inputs once.
pub fn read(inputs: Vec<Input>, ranges: Ranges) -> Reading {
    let mut source = Source::new(inputs, ranges);
    source.refresh(&Settling::default());
    source.reading()
}

/// The inputs and the last good state of each file. Owned by the task of [`run`].
#[derive(Debug)]
pub struct Source {
    inputs: Vec<Tracked>,
    ranges: Ranges,
    /// Since the start: what was mended counts on.
    rejections: Rejections,
}

/// What a refresh found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Changed {
    objects: bool,
    problems: bool,
}

#[derive(Debug)]
struct Tracked {
    input: Input,
    /// By path: that is the order in which they count.
    files: BTreeMap<PathBuf, File>,
    /// What is wrong with the input itself.
    problem: Option<Problem>,
}

/// One file.
#[derive(Debug, Default)]
struct File {
    /// Of the content that was last looked at; `None` where it could not be read.
    fingerprint: Option<(usize, u64)>,
    /// Its real path: a file that is named twice counts once.
    real: Option<PathBuf>,
    /// What of it is in use.
    entries: Vec<Entry>,
    /// True where `entries` is all that the file said then.
    whole: bool,
    /// True where the file says something else now, that cannot be used.
    failed: bool,
    problems: Vec<Problem>,
    /// What was rejected and is not counted yet.
    rejections: Rejections,
}

/// Why a file or folder could not be read.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("no such file or folder")]
    Missing,
    #[error("cannot be read: permission denied")]
    Permission,
    #[error("larger than {} MiB, the most that is read; split it", MAX_FILE_BYTES / 1024 / 1024)]
    TooLarge,
    #[error("not a file")]
    NotAFile,
    #[error("no manifests in this folder; it should hold *.yaml, *.yml or *.json (folders inside are not looked at)")]
    NoManifests,
    #[error("empty")]
    Empty,
    #[error("cannot be read: {0}")]
    Io(io::Error),
}

impl ReadError {
    fn of(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Missing,
            io::ErrorKind::PermissionDenied => Self::Permission,
            _ => Self::Io(error),
        }
    }

    fn reason(&self) -> &'static str {
        if matches!(self, Self::Permission) { "permission" } else { "decode" }
    }

    /// As a problem of the file or folder `name`.
    fn problem(&self, name: &str, in_use: usize) -> Problem {
        let kept = match in_use {
            0 => String::new(),
            count => format!("; its last good objects ({count}) stay in use"),
        };
        file_problem(name, self.reason(), Severity::Error, format!("{self}{kept}"))
    }
}

impl Source {
    /// Nothing is read yet.
    pub fn new(inputs: Vec<Input>, ranges: Ranges) -> Self {
        let mut tracked: Vec<Tracked> = Vec::with_capacity(inputs.len());
        for input in inputs {
            if !tracked.iter().any(|known| known.input == input) {
                tracked.push(Tracked { input, files: BTreeMap::new(), problem: None });
            }
        }
        Self { inputs: tracked, ranges, rejections: Rejections::default() }
    }

    /// Looks at all files again, except those that `settling` says are being written.
    fn refresh(&mut self, settling: &Settling) -> Changed {
        let mut changed = Changed::default();
        self.inputs.iter_mut().for_each(|tracked| tracked.refresh(settling, &mut changed));
        for file in self.inputs.iter_mut().flat_map(|tracked| tracked.files.values_mut()) {
            self.rejections.add(std::mem::take(&mut file.rejections));
        }
        changed
    }

    /// Merges what is in use: of two objects of one name the first counts.
    pub fn reading(&self) -> Reading {
        let mut reading = Reading { rejections: self.rejections.clone(), ..Reading::default() };
        let mut derived = Vec::new();
        let mut places = HashMap::new();
        let mut seen = HashSet::new();
        for tracked in &self.inputs {
            if let Some(problem) = &tracked.problem {
                reading.failed.push(problem.object.clone());
                reading.problems.push(problem.clone());
            }
            for (path, file) in &tracked.files {
                if file.real.as_ref().is_some_and(|real| !seen.insert(real)) {
                    continue;
                }
                let name = path.to_string_lossy();
                if file.failed || !file.whole {
                    reading.failed.push(name.clone().into_owned());
                }
                reading.problems.extend(file.problems.iter().cloned());
                for entry in &file.entries {
                    match places.get(&(entry.kind, &entry.name)) {
                        None => {
                            places.insert((entry.kind, &entry.name), (name.clone(), entry));
                            reading.objects.add(&entry.content);
                        }
                        Some((first, other)) => derived.push(conflict(entry, &name, other, first)),
                    }
                }
            }
        }
        let mut told = allocate::fill(&mut reading.objects.services, &self.ranges);
        hints::write(&reading.objects.services, &mut reading.objects.slices);
        told.extend(unfed(&reading.objects).into_iter().map(|service| scaffold::missing_slice(service)));
        reading.places = places
            .iter()
            .filter(|((kind, _), _)| *kind == Kind::Service)
            .map(|((_, name), (file, entry))| ((*name).clone(), (file.to_string(), entry.line)))
            .collect();
        told.iter_mut().for_each(|problem| reading.locate(problem));
        derived.extend(told);
        derived.extend(idle(&reading.objects, places.values().map(|(file, entry)| (&**file, *entry))));
        let more = derived.len().saturating_sub(MAX_FINDINGS);
        derived.truncate(MAX_FINDINGS);
        reading.problems.extend(derived);
        if more > 0 {
            let text = format!("{more} more findings like the last ones");
            reading.problems.push(file_problem("manifests", "decode", Severity::Warning, text));
        }
        reading
    }

    /// The folders in which changes would show.
    fn interest(&self) -> Interest {
        let mut interest = Interest::default();
        for tracked in &self.inputs {
            if let Input::Path(path) = &tracked.input {
                interest.path(path);
                tracked.files.keys().filter(|file| *file != path).for_each(|file| interest.target(file));
            }
        }
        interest
    }
}

impl Objects {
    /// Adds what an object says.
    pub(crate) fn add(&mut self, content: &Content) {
        match content {
            Content::Service(service) => self.services.push(Arc::clone(service)),
            Content::Slices(slices) => self.slices.extend(slices.iter().cloned()),
        }
    }
}

impl Tracked {
    fn refresh(&mut self, settling: &Settling, changed: &mut Changed) {
        let problem = match self.input.clone() {
            Input::Stdin => self.refresh_once(Path::new(STDIN), read_stdin, changed),
            Input::Path(path) => match fs::metadata(&path) {
                Ok(metadata) if metadata.is_dir() => self.refresh_folder(&path, settling, changed),
                Ok(metadata) if metadata.is_file() => self.refresh_file(&path, settling, changed),
                Ok(_) => self.refresh_once(&path, || read_stream(fs::File::open(&path)), changed),
                // It may be on its way from one name to another.
                Err(_) if settling.has(&path) => return,
                Err(error) => Err(ReadError::of(error)),
            },
        };
        let in_use = self.files.values().map(|file| file.entries.len()).sum();
        let problem = problem.err().map(|error| error.problem(&self.name(), in_use));
        if problem.is_some() {
            // What comes back is looked at even if it is the same: it is no longer missing.
            self.files.values_mut().for_each(|file| file.fingerprint = None);
        }
        changed.problems |= problem != self.problem;
        self.problem = problem;
    }

    fn name(&self) -> String {
        match &self.input {
            Input::Stdin => STDIN.to_owned(),
            Input::Path(path) => path.to_string_lossy().into_owned(),
        }
    }

    /// A stream cannot be read twice.
    fn refresh_once(
        &mut self,
        path: &Path,
        read: impl FnOnce() -> Result<Vec<u8>, ReadError>,
        changed: &mut Changed,
    ) -> Result<(), ReadError> {
        if !self.files.contains_key(path) {
            self.files.entry(path.to_owned()).or_default().update(path, read(), changed);
        }
        Ok(())
    }

    fn refresh_file(&mut self, path: &Path, settling: &Settling, changed: &mut Changed) -> Result<(), ReadError> {
        self.keep(|file| file == path, changed);
        if !settling.has(path) {
            self.files.entry(path.to_owned()).or_default().update(path, read_file(path), changed);
        }
        Ok(())
    }

    fn refresh_folder(&mut self, folder: &Path, settling: &Settling, changed: &mut Changed) -> Result<(), ReadError> {
        let listed = manifests_in(folder)?;
        self.keep(|file| listed.iter().any(|listed| listed == file) || settling.has(file), changed);
        for path in listed.iter().filter(|path| !settling.has(path)) {
            self.files.entry(path.clone()).or_default().update(path, read_file(path), changed);
        }
        if self.files.is_empty() && listed.is_empty() { Err(ReadError::NoManifests) } else { Ok(()) }
    }

    /// Forgets files that are gone, with their objects.
    fn keep(&mut self, stays: impl Fn(&Path) -> bool, changed: &mut Changed) {
        self.files.retain(|path, file| {
            let stays = stays(path);
            changed.objects |= !stays && !file.entries.is_empty();
            changed.problems |= !stays;
            stays
        });
    }
}

impl File {
    /// Takes what was read, or the failure to read it.
    fn update(&mut self, path: &Path, content: Result<Vec<u8>, ReadError>, changed: &mut Changed) {
        let name = path.to_string_lossy();
        match content {
            Ok(bytes) => {
                let fingerprint = (bytes.len(), foldhash::quality::FixedState::default().hash_one(&bytes[..]));
                if self.fingerprint != Some(fingerprint) {
                    self.fingerprint = Some(fingerprint);
                    self.real = fs::canonicalize(path).ok();
                    self.take(&name, &bytes, changed);
                }
            }
            Err(error) => {
                if self.fingerprint.take().is_some() || !self.failed {
                    self.rejections.count(None, error.reason());
                }
                self.fail(vec![error.problem(&name, self.entries.len())], changed);
            }
        }
    }

    fn take(&mut self, name: &str, bytes: &[u8], changed: &mut Changed) {
        // Editors and shells empty a file before they write it.
        if bytes.iter().all(u8::is_ascii_whitespace) {
            let problem = ReadError::Empty.problem(name, self.entries.len());
            self.rejections.count(None, ReadError::Empty.reason());
            return self.fail(vec![problem], changed);
        }
        let mut decoded = decode(bytes, name);
        self.rejections.add(std::mem::take(&mut decoded.rejections));
        if !decoded.whole && self.whole {
            let text =
                format!("rejected; its last good objects ({}) stay in use until it is mended", self.entries.len());
            decoded.problems.push(file_problem(name, "decode", Severity::Error, text));
            return self.fail(decoded.problems, changed);
        }
        if !decoded.whole {
            // It never was right: nothing that is in use goes, and what is right counts.
            let known: HashSet<_> = decoded.objects.iter().map(|entry| (entry.kind, entry.name.clone())).collect();
            let kept = self.entries.drain(..).filter(|entry| !known.contains(&(entry.kind, entry.name.clone())));
            decoded.objects.extend(kept);
        }
        let same = self.entries.len() == decoded.objects.len()
            && self.entries.iter().zip(&decoded.objects).all(|(a, b)| a.says_the_same(b));
        changed.objects |= !same;
        changed.problems = true;
        *self = Self {
            fingerprint: self.fingerprint,
            real: self.real.take(),
            entries: decoded.objects,
            whole: decoded.whole,
            failed: false,
            problems: decoded.problems,
            rejections: std::mem::take(&mut self.rejections),
        };
    }

    /// Keeps what is in use.
    fn fail(&mut self, problems: Vec<Problem>, changed: &mut Changed) {
        changed.problems |= !self.failed || self.problems != problems;
        self.failed = true;
        self.problems = problems;
    }
}

impl Entry {
    fn says_the_same(&self, other: &Self) -> bool {
        self.kind == other.kind && self.name == other.name && self.content == other.content
    }

    fn place(&self, file: &str) -> String {
        match self.item {
            Some(item) => format!("{file}:{} (items[{item}])", self.line),
            None => format!("{file}:{}", self.line),
        }
    }
}

/// The manifests of a folder, in the order of their names.
fn manifests_in(folder: &Path) -> Result<Vec<PathBuf>, ReadError> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(ReadError::of)? {
        let entry = entry.map_err(ReadError::of)?;
        let path = entry.path();
        // Through symlinks, as those of a mounted ConfigMap.
        if is_manifest(&path) && !path.is_dir() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// True for `*.yaml`, `*.yml` and `*.json` that do not begin with a dot.
pub(crate) fn is_manifest(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    !hidden && path.extension().is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|known| extension == *known))
}

fn read_file(path: &Path) -> Result<Vec<u8>, ReadError> {
    let metadata = fs::metadata(path).map_err(ReadError::of)?;
    if !metadata.is_file() {
        return Err(ReadError::NotAFile);
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Err(ReadError::TooLarge);
    }
    read_stream(fs::File::open(path))
}

fn read_stdin() -> Result<Vec<u8>, ReadError> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        tracing::info!("reading manifests from this terminal; end them with Ctrl-D");
    }
    read_stream(Ok(stdin.lock()))
}

fn read_stream(stream: io::Result<impl Read>) -> Result<Vec<u8>, ReadError> {
    let mut bytes = Vec::new();
    let stream = stream.map_err(ReadError::of)?;
    stream.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(ReadError::of)?;
    if bytes.len() as u64 > MAX_FILE_BYTES { Err(ReadError::TooLarge) } else { Ok(bytes) }
}

fn conflict(entry: &Entry, name: &str, first: &Entry, first_name: &str) -> Problem {
    Problem {
        object: entry.label(),
        file: Some(name.to_owned()),
        line: Some(entry.line),
        column: None,
        reason: "conflict".into(),
        message: format!(
            "{} has an object of this kind and name, too, and the first one counts; this one, {}, is left out",
            first.place(first_name),
            entry.place(name)
        ),
        severity: Severity::Error,
    }
}

/// Services that wait for somebody to write their endpoints, where nobody does.
fn unfed(objects: &Objects) -> Vec<&Arc<Service>> {
    let fed: HashSet<&ObjectName> = objects.slices.iter().map(|slice| &slice.service).collect();
    let waits = |service: &&Arc<Service>| {
        service.has_selector
            && service.proxy_name.is_none()
            && service.kind != ServiceKind::ExternalName
            && service.cluster_ips != ClusterIps::Headless
            && !fed.contains(&service.name)
    };
    objects.services.iter().filter(waits).collect()
}

/// Endpoints of Services that are not there: most likely a slip in a name.
fn idle<'a>(objects: &Objects, placed: impl Iterator<Item = (&'a str, &'a Entry)>) -> Vec<Problem> {
    let there: HashSet<&ObjectName> = objects.services.iter().map(|service| &service.name).collect();
    let problem = |(file, entry): (&str, &Entry)| {
        let Content::Slices(slices) = &entry.content else { return None };
        let service = &slices.iter().find(|slice| !there.contains(&slice.service))?.service;
        Some(Problem {
            object: entry.label(),
            file: Some(file.to_owned()),
            line: Some(entry.line),
            column: None,
            reason: "no_service".into(),
            message: format!("its endpoints are not used: there is no Service {service}"),
            severity: Severity::Note,
        })
    };
    let mut problems: Vec<_> = placed.filter_map(problem).collect();
    problems.sort_by(|a, b| (&a.file, a.line).cmp(&(&b.file, b.line)));
    problems
}

fn file_problem(name: &str, reason: &'static str, severity: Severity, message: String) -> Problem {
    let (object, file) = (name.to_owned(), Some(name.to_owned()));
    Problem { object, file, line: None, column: None, reason: reason.into(), message, severity }
}

/// Reads the inputs, and again each time that they change or `reload` says so, until `cancel`.
///
/// Sends the objects whenever they changed, what is wrong whenever that changed, and `Synced` behind the
/// first of both. A change is sent about 5 ms after its writer closed the file.
pub async fn run(source: Source, messages: mpsc::Sender<Message>, reload: Arc<Notify>, cancel: CancellationToken) {
    tokio::select! {
        biased;
        () = cancel.cancelled() => {}
        () = follow(source, messages, &reload) => {}
    }
}

/// Ends when nobody listens any more.
async fn follow(source: Source, messages: mpsc::Sender<Message>, reload: &Notify) {
    let mut watch = Watch::start();
    watch.look_at(source.interest());
    let mut reader = match Reader::start(source) {
        Ok(reader) => reader,
        Err(error) => return tracing::error!(%error, "cannot start a thread to read manifests"),
    };
    let mut report = Report { messages, status: SourceStatus::default(), problems: Vec::new(), synced: false };
    let mut settling = Settling::default();
    let mut poll = interval_at(Instant::now() + POLL_INTERVAL, POLL_INTERVAL);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let Some((refreshed, interest)) = reader.refresh(settling.clone()).await else { return };
        if watch.look_at(interest) {
            // Something may have changed before it was watched.
            settling.note(PathBuf::new(), Sign::Changed, Instant::now());
        }
        if report.send(refreshed, watch.problem()).await.is_err() {
            return;
        }
        loop {
            let due = settling.due();
            tokio::select! {
                biased;
                () = reload.notified() => break,
                signs = watch.next() => {
                    signs.into_iter().for_each(|(path, sign)| settling.note(path, sign, Instant::now()));
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    settling.settle(Instant::now());
                    break;
                }
                _ = poll.tick() => break,
            }
        }
    }
}

/// What changed, and all that is so now if anything did.
type Refreshed = Option<(Changed, Reading)>;

/// The thread that owns the source: a file may be large, and standard input slow, even at the end of the process.
struct Reader {
    ask: mpsc::Sender<Settling>,
    answers: mpsc::Receiver<(Refreshed, Interest)>,
}

impl Reader {
    fn start(mut source: Source) -> io::Result<Self> {
        let (ask, mut asked) = mpsc::channel::<Settling>(1);
        let (answer, answers) = mpsc::channel(1);
        let read = move || {
            let mut first = true;
            while let Some(settling) = asked.blocking_recv() {
                let mut changed = source.refresh(&settling);
                changed.objects |= first;
                first = false;
                let refreshed = (changed != Changed::default()).then(|| (changed, source.reading()));
                if answer.blocking_send((refreshed, source.interest())).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("manifests".to_owned()).spawn(read)?;
        Ok(Self { ask, answers })
    }

    async fn refresh(&mut self, settling: Settling) -> Option<(Refreshed, Interest)> {
        self.ask.send(settling).await.ok()?;
        let answer = self.answers.recv().await;
        if answer.is_none() {
            tracing::error!("the reader of manifests is gone; changes are no longer seen, restart the relay");
        }
        answer
    }
}

/// What was said to the control task.
struct Report {
    messages: mpsc::Sender<Message>,
    status: SourceStatus,
    problems: Vec<Problem>,
    synced: bool,
}

impl Report {
    /// Says what is new.
    async fn send(
        &mut self,
        refreshed: Refreshed,
        unwatched: Option<Problem>,
    ) -> Result<(), mpsc::error::SendError<Message>> {
        let Some((changed, Reading { objects, mut problems, failed, rejections, .. })) = refreshed else {
            return Ok(());
        };
        problems.extend(unwatched);
        let mut status = self.status.clone();
        status.kind = "static".into();
        status.last_reload_successful = failed.is_empty();
        status.config_revision += u64::from(changed.objects);
        status.rejections = rejections;
        let revision = status.config_revision;
        if changed.objects {
            let (services, slices) = (objects.services.len(), objects.slices.len());
            tracing::info!(revision, services, slices, "manifests taken");
            self.messages.send(Message::Event(Event::Replace(objects))).await?;
        }
        if status != self.status || problems != self.problems {
            (self.status, self.problems) = (status.clone(), problems.clone());
            self.messages.send(Message::Source { status, problems }).await?;
        }
        if !self.synced {
            self.synced = true;
            self.messages.send(Message::Synced).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use tempfile::TempDir;
    use tokio::task::JoinHandle;
    use tokio::time::timeout;

    use super::*;
    use crate::name::Family;

    /// Below the poll: what is seen in time was seen by the watch.
    const DEADLINE: Duration = Duration::from_secs(4);

    fn service(name: &str) -> String {
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 80}}]}}\n---\n")
    }

    fn folder(files: &[(&str, &str)]) -> TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        files.iter().for_each(|(name, text)| put(&folder, name, text));
        folder
    }

    fn put(folder: &TempDir, name: &str, text: &str) {
        fs::write(folder.path().join(name), text).expect("a file");
    }

    fn source(paths: &[PathBuf]) -> Source {
        Source::new(paths.iter().cloned().map(Input::Path).collect(), Ranges::default())
    }

    fn refresh(source: &mut Source) -> (Changed, Reading) {
        let changed = source.refresh(&Settling::default());
        (changed, source.reading())
    }

    fn names(objects: &Objects) -> Vec<&str> {
        objects.services.iter().map(|service| &*service.name.name).collect()
    }

    fn messages(reading: &Reading) -> Vec<&str> {
        reading.problems.iter().map(|problem| &*problem.message).collect()
    }

    #[test]
    fn given_a_folder_when_read_then_its_manifests_are_taken_in_the_order_of_names() {
        let folder = folder(&[
            ("b.yml", &service("b")),
            ("a.yaml", &service("a")),
            ("c.json", r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"c"},"spec":{"ports":[{"port":1}]}}"#),
            (".hidden.yaml", &service("hidden")),
            ("notes.txt", "not a manifest"),
        ]);
        fs::create_dir(folder.path().join("inner.yaml")).expect("a folder");

        let reading = read(vec![Input::Path(folder.path().into())], Ranges::default());

        assert_eq!(names(&reading.objects), ["a", "b", "c"]);
        assert!(reading.problems.is_empty() && reading.failed.is_empty(), "{:?}", reading.problems);
        assert!(reading.objects.services.iter().all(|service| service.cluster_ips.allocated()));
    }

    #[test]
    fn f4_f20_given_files_that_are_wrong_when_read_again_and_again_then_each_version_is_counted_once() {
        let folder = folder(&[("a.yaml", &service("a")), ("b.yaml", "kind: [")]);
        let mut source = source(&[folder.path().into()]);
        let mut counted = |text: Option<&str>| {
            text.into_iter().for_each(|text| put(&folder, "a.yaml", text));
            let rejections = refresh(&mut source).1.rejections;
            rejections.iter().map(|(kind, reason, count)| format!("{kind} {reason} {count}")).collect::<Vec<_>>()
        };

        assert_eq!(counted(None), ["unknown decode 1"]);
        assert_eq!(counted(None), ["unknown decode 1"]);
        let wrong = service("a").replace("80", "x");
        assert_eq!(counted(Some(&wrong)), ["Service decode 1", "unknown decode 1"]);
        assert_eq!(counted(Some("")), ["Service decode 1", "unknown decode 2"]);
        assert_eq!(counted(Some(&service("a"))), ["Service decode 1", "unknown decode 2"], "what is mended counts on");
        assert_eq!(counted(Some(&wrong)), ["Service decode 2", "unknown decode 2"]);
    }

    #[test]
    fn given_inputs_that_cannot_be_read_when_read_then_each_says_why() {
        let folder = folder(&[("secret", &service("a")), ("empty.yaml", ""), ("wrong", "kind: Service\n")]);
        let at = |name: &str| folder.path().join(name);
        fs::set_permissions(at("secret"), fs::Permissions::from_mode(0o000)).expect("rights");
        fs::create_dir(at("bare")).expect("a folder");
        let large = fs::File::create(at("large")).expect("a file");
        large.set_len(MAX_FILE_BYTES + 1).expect("a size");
        let told = |name: &str| {
            let reading = read(vec![Input::Path(at(name))], Ranges::default());
            assert_eq!(reading.failed, [at(name).to_string_lossy()]);
            assert_eq!(reading.problems[0].severity, Severity::Error);
            messages(&reading)[0].to_owned()
        };

        assert_eq!(told("nowhere"), "no such file or folder");
        assert!(told("bare").starts_with("no manifests in this folder; it should hold *.yaml"));
        assert_eq!(told("empty.yaml"), "empty");
        assert_eq!(told("large"), "larger than 256 MiB, the most that is read; split it");
        assert_eq!(told("wrong"), "apiVersion: missing; write v1");
        if fs::File::open(at("secret")).is_err() {
            assert_eq!(told("secret"), "cannot be read: permission denied");
        } else {
            eprintln!("skipped: this user may read every file");
        }
    }

    #[test]
    fn given_one_name_twice_when_read_then_the_first_counts_and_both_places_are_told() {
        let endpoints = "apiVersion: v1\nkind: Endpoints\nmetadata: {name: a}\nsubsets: [{addresses: [{ip: 10.0.0.1}], ports: [{port: 1}]}]\n";
        let folder = folder(&[("1.yaml", &format!("{}{endpoints}", service("a"))), ("2.yaml", &service("a"))]);
        let second = format!("# more\n{}", service("a").replace("port: 80", "port: 81"));
        put(&folder, "2.yaml", &second);

        let reading = read(vec![Input::Path(folder.path().into())], Ranges::default());

        assert_eq!(reading.objects.services[0].ports[0].port, 80);
        assert_eq!((reading.objects.services.len(), reading.objects.slices.len()), (1, 1));
        let problem = &reading.problems[0];
        assert_eq!((&*problem.reason, &*problem.object, problem.line), ("conflict", "Service default/a", Some(2)));
        assert!(problem.message.contains("1.yaml:1 ") && problem.message.contains("2.yaml:2,"), "{}", problem.message);
    }

    #[test]
    fn given_one_file_named_in_two_ways_when_read_then_it_counts_once() {
        let folder = folder(&[("a.yaml", &service("a"))]);

        let inputs = vec![Input::Path(folder.path().into()), Input::Path(folder.path().join("a.yaml"))];
        let reading = read(inputs, Ranges::default());

        assert_eq!(names(&reading.objects), ["a"]);
        assert_eq!(reading.problems, []);
    }

    #[test]
    fn given_a_selector_and_no_slice_when_read_then_the_slice_to_add_is_told_with_the_line() {
        let waiting = service("b").replace("{ports", "{selector: {app: b}, ports");
        let folder = folder(&[("a.yaml", &format!("{}{waiting}", service("a")))]);

        let reading = read(vec![Input::Path(folder.path().into())], Ranges::default());

        assert_eq!(reading.problems.len(), 1);
        let note = &reading.problems[0];
        assert_eq!((&*note.object, note.line, note.severity), ("Service default/b", Some(6), Severity::Note));
        assert!(note.message.contains("kubernetes.io/service-name: b\n"));
    }

    #[test]
    fn t228_given_a_broken_reload_when_refreshed_then_the_last_good_state_stays_until_it_is_mended() {
        let folder = folder(&[("a.yaml", &service("a")), ("b.yaml", &service("b"))]);
        let mut source = source(&[folder.path().into()]);
        refresh(&mut source);

        put(&folder, "a.yaml", "kind: [\n");
        put(&folder, "b.yaml", &service("c"));
        let (changed, broken) = refresh(&mut source);
        let (again, _) = refresh(&mut source);
        put(&folder, "a.yaml", &service("d"));
        let (_, mended) = refresh(&mut source);

        assert_eq!((changed, again), (Changed { objects: true, problems: true }, Changed::default()));
        assert_eq!(names(&broken.objects), ["a", "c"]);
        assert_eq!(broken.failed.len(), 1);
        assert!(broken.problems[0].line.is_some() && broken.problems[0].message.starts_with("cannot be read"));
        assert!(messages(&broken)[1].starts_with("rejected; its last good objects (1) stay in use"));
        assert_eq!(names(&mended.objects), ["d", "c"]);
        assert!(mended.problems.is_empty() && mended.failed.is_empty());
    }

    #[test]
    fn t228_given_a_wrong_object_in_a_reload_when_refreshed_then_nothing_of_its_file_changes() {
        let folder = folder(&[("a.yaml", &(service("a") + &service("b")))]);
        let mut source = source(&[folder.path().into()]);
        refresh(&mut source);

        put(&folder, "a.yaml", &(service("c") + &service("b").replace("80", "eighty")));
        let (changed, reading) = refresh(&mut source);

        assert!(!changed.objects);
        assert_eq!(names(&reading.objects), ["a", "b"]);
    }

    #[test]
    fn given_a_file_that_never_was_right_when_read_then_what_is_right_in_it_counts() {
        let wrong = service("b").replace("80", "eighty");
        let folder = folder(&[("a.yaml", &(service("a") + &wrong))]);
        let mut source = source(&[folder.path().into()]);

        let (_, first) = refresh(&mut source);
        put(&folder, "a.yaml", &(service("c") + &wrong));
        let (_, second) = refresh(&mut source);
        put(&folder, "a.yaml", &service("d"));
        let (_, whole) = refresh(&mut source);

        assert_eq!(names(&first.objects), ["a"]);
        assert_eq!(names(&second.objects), ["c", "a"]);
        assert_eq!((second.failed.len(), whole.failed.len()), (1, 0));
        assert_eq!(names(&whole.objects), ["d"]);
    }

    #[test]
    fn given_a_file_that_was_emptied_when_refreshed_then_its_objects_stay() {
        let folder = folder(&[("a.yaml", &service("a"))]);
        let mut source = source(&[folder.path().into()]);
        refresh(&mut source);

        put(&folder, "a.yaml", "\n");
        let (changed, reading) = refresh(&mut source);

        assert_eq!(changed, Changed { objects: false, problems: true });
        assert_eq!(names(&reading.objects), ["a"]);
        assert_eq!(messages(&reading), ["empty; its last good objects (1) stay in use"]);
    }

    #[test]
    fn t228_given_a_removed_file_when_refreshed_then_a_folder_forgets_it_and_a_named_file_stays() {
        let folder = folder(&[("a.yaml", &service("a")), ("b.yaml", &service("b"))]);
        let named = folder.path().join("a.yaml");
        let mut of_folder = source(&[folder.path().into()]);
        let mut of_file = source(std::slice::from_ref(&named));
        refresh(&mut of_folder);
        refresh(&mut of_file);

        fs::remove_file(&named).expect("a file");
        let (_, folder_reading) = refresh(&mut of_folder);
        let (_, file_reading) = refresh(&mut of_file);
        put(&folder, "a.yaml", &service("a"));
        let (changed, back) = refresh(&mut of_file);

        assert_eq!(names(&folder_reading.objects), ["b"]);
        assert_eq!(names(&file_reading.objects), ["a"]);
        assert_eq!(messages(&file_reading), ["no such file or folder; its last good objects (1) stay in use"]);
        assert_eq!(changed, Changed { objects: false, problems: true });
        assert!(back.problems.is_empty() && back.failed.is_empty());
    }

    #[test]
    fn given_a_folder_that_is_gone_when_refreshed_then_its_objects_stay() {
        let outer = folder(&[]);
        let inner = outer.path().join("inner");
        fs::create_dir(&inner).expect("a folder");
        fs::write(inner.join("a.yaml"), service("a")).expect("a file");
        let mut source = source(std::slice::from_ref(&inner));
        refresh(&mut source);

        fs::rename(&inner, outer.path().join("elsewhere")).expect("a rename");
        let (_, reading) = refresh(&mut source);

        assert_eq!(names(&reading.objects), ["a"]);
        assert_eq!(reading.failed.len(), 1);
    }

    #[test]
    fn given_a_file_that_is_written_when_refreshed_then_it_is_left_alone() {
        let folder = folder(&[("a.yaml", &service("a")), ("b.yaml", &service("b"))]);
        let mut source = source(&[folder.path().into()]);
        refresh(&mut source);
        put(&folder, "a.yaml", &service("half"));
        fs::remove_file(folder.path().join("b.yaml")).expect("a file");
        let mut settling = Settling::default();
        settling.note(folder.path().join("a.yaml"), Sign::Writing, Instant::now());
        settling.note(folder.path().join("b.yaml"), Sign::Changed, Instant::now());

        let changed = source.refresh(&settling);

        assert_eq!(changed, Changed::default());
        assert_eq!(names(&source.reading().objects), ["a", "b"]);
    }

    /// A source that runs, and what it says.
    struct Running {
        messages: mpsc::Receiver<Message>,
        reload: Arc<Notify>,
        cancel: CancellationToken,
        task: JoinHandle<()>,
    }

    impl Running {
        async fn start(path: PathBuf) -> Self {
            let (sender, messages) = mpsc::channel(16);
            let (reload, cancel) = (Arc::new(Notify::new()), CancellationToken::new());
            let task = tokio::spawn(run(source(&[path]), sender, reload.clone(), cancel.clone()));
            let mut running = Self { messages, reload, cancel, task };
            while !matches!(running.next().await, Message::Synced) {}
            running
        }

        async fn next(&mut self) -> Message {
            let message = timeout(DEADLINE, self.messages.recv()).await;
            message.expect("a message in time").expect("a source that runs")
        }

        /// The names of the next objects.
        async fn services(&mut self) -> Vec<String> {
            loop {
                if let Message::Event(Event::Replace(objects)) = self.next().await {
                    return names(&objects).into_iter().map(str::to_owned).collect();
                }
            }
        }

        /// The next state of the source; no objects may come before it.
        async fn status(&mut self) -> (SourceStatus, Vec<Problem>) {
            match self.next().await {
                Message::Source { status, problems } => (status, problems),
                other => panic!("not a state of the source: {other:?}"),
            }
        }

        async fn end(self) {
            self.cancel.cancel();
            timeout(DEADLINE, self.task).await.expect("an end in time").expect("an end without panic");
        }
    }

    #[tokio::test]
    async fn given_a_source_when_started_then_objects_state_and_synced_come_in_this_order() {
        let folder = folder(&[("a.yaml", &service("a")), ("b.yaml", "kind: [\n")]);
        let (sender, mut messages) = mpsc::channel(16);
        let source = source(&[folder.path().into()]);
        let cancel = CancellationToken::new();
        let task = tokio::spawn(run(source, sender, Arc::default(), cancel.clone()));

        let first = messages.recv().await.expect("objects");
        let second = messages.recv().await.expect("a state");
        let third = messages.recv().await.expect("synced");

        assert!(matches!(first, Message::Event(Event::Replace(objects)) if names(&objects) == ["a"]));
        let Message::Source { status, problems } = second else { panic!("{second:?}") };
        assert_eq!((&*status.kind, status.last_reload_successful, status.config_revision), ("static", false, 1));
        assert_eq!(problems.len(), 1);
        assert!(matches!(third, Message::Synced));
        cancel.cancel();
        task.await.expect("an end without panic");
    }

    #[tokio::test]
    async fn t228_given_a_file_written_in_place_when_followed_then_it_is_noticed() {
        let folder = folder(&[("a.yaml", &service("a"))]);
        let mut running = Running::start(folder.path().join("a.yaml")).await;

        put(&folder, "a.yaml", &service("b"));

        assert_eq!(running.services().await, ["b"]);
        running.end().await;
    }

    #[tokio::test]
    async fn t228_given_a_file_replaced_by_rename_when_followed_then_it_is_noticed() {
        let folder = folder(&[("a.yaml", &service("a"))]);
        let mut running = Running::start(folder.path().join("a.yaml")).await;

        for name in ["b", "c"] {
            put(&folder, "a.yaml.tmp", &service(name));
            fs::rename(folder.path().join("a.yaml.tmp"), folder.path().join("a.yaml")).expect("a rename");

            assert_eq!(running.services().await, [name]);
        }
        running.end().await;
    }

    #[tokio::test]
    async fn t228_given_a_broken_write_when_followed_then_only_the_state_tells_and_mending_is_noticed() {
        let folder = folder(&[("a.yaml", &service("a"))]);
        let mut running = Running::start(folder.path().into()).await;

        put(&folder, "a.yaml", "kind: [\n");
        let (broken, problems) = running.status().await;
        put(&folder, "a.yaml", &service("b"));
        let services = running.services().await;
        let (mended, none) = running.status().await;

        assert_eq!((broken.last_reload_successful, broken.config_revision), (false, 1));
        assert!(problems[0].line.is_some());
        assert_eq!(services, ["b"]);
        assert_eq!((mended.last_reload_successful, mended.config_revision), (true, 2));
        assert_eq!(none, []);
        running.end().await;
    }

    #[tokio::test]
    async fn given_a_file_written_in_parts_when_followed_then_only_the_whole_is_taken() {
        let folder = folder(&[("a.yaml", &service("a"))]);
        let mut running = Running::start(folder.path().into()).await;

        let mut file = fs::File::create(folder.path().join("a.yaml")).expect("a file");
        for part in [service("b"), service("c")] {
            file.write_all(part.as_bytes()).expect("a part");
        }
        drop(file);

        assert_eq!(running.services().await, ["b", "c"]);
        running.end().await;
    }

    #[tokio::test]
    async fn given_a_mounted_config_map_when_its_link_is_swapped_then_it_is_noticed() {
        let folder = folder(&[]);
        let version = |name: &str, text: &str| {
            fs::create_dir(folder.path().join(name)).expect("a folder");
            fs::write(folder.path().join(name).join("a.yaml"), text).expect("a file");
        };
        version("..1", &service("a"));
        symlink("..1", folder.path().join("..data")).expect("a link");
        symlink("..data/a.yaml", folder.path().join("a.yaml")).expect("a link");
        let mut of_folder = Running::start(folder.path().into()).await;
        let mut of_file = Running::start(folder.path().join("a.yaml")).await;

        for (old, new, name) in [("..1", "..2", "b"), ("..2", "..3", "c")] {
            version(new, &service(name));
            symlink(new, folder.path().join("..data_tmp")).expect("a link");
            fs::rename(folder.path().join("..data_tmp"), folder.path().join("..data")).expect("a rename");
            fs::remove_dir_all(folder.path().join(old)).expect("a folder");

            assert_eq!(of_folder.services().await, [name]);
            assert_eq!(of_file.services().await, [name]);
        }
        of_folder.end().await;
        of_file.end().await;
    }

    #[tokio::test]
    async fn t228_given_files_that_come_and_go_when_followed_then_the_folder_counts() {
        let folder = folder(&[("a.yaml", &service("a"))]);
        let mut running = Running::start(folder.path().into()).await;

        put(&folder, "b.yaml", &service("b"));
        let more = running.services().await;
        fs::remove_file(folder.path().join("a.yaml")).expect("a file");
        let less = running.services().await;

        assert_eq!((more, less), (vec!["a".to_owned(), "b".to_owned()], vec!["b".to_owned()]));
        running.end().await;
    }

    #[tokio::test]
    async fn t228_given_a_named_file_when_removed_and_back_then_the_state_tells_both() {
        let folder = folder(&[("a.yaml", &service("a"))]);
        let mut running = Running::start(folder.path().join("a.yaml")).await;

        fs::remove_file(folder.path().join("a.yaml")).expect("a file");
        let (gone, problems) = running.status().await;
        put(&folder, "a.yaml", &service("a"));
        let (back, none) = running.status().await;

        assert!(!gone.last_reload_successful && problems[0].message.starts_with("no such file"));
        assert!(back.last_reload_successful && none.is_empty());
        assert_eq!(back.config_revision, 1);
        running.end().await;
    }

    #[tokio::test]
    async fn given_a_folder_that_is_replaced_when_followed_then_the_new_one_is_watched() {
        let outer = folder(&[]);
        let inner = outer.path().join("inner");
        let fill = |name: &str| {
            fs::create_dir(&inner).expect("a folder");
            fs::write(inner.join("a.yaml"), service(name)).expect("a file");
        };
        fill("a");
        let mut running = Running::start(inner.clone()).await;

        fs::remove_dir_all(&inner).expect("a folder");
        fill("b");
        let replaced = running.services().await;
        fs::write(inner.join("a.yaml"), service("c")).expect("a file");
        let written = running.services().await;

        assert_eq!((replaced.last(), written.last()), (Some(&"b".to_owned()), Some(&"c".to_owned())));
        running.end().await;
    }

    #[tokio::test]
    async fn given_unchanged_content_when_reloaded_then_nothing_is_said() {
        let folder = folder(&[("a.yaml", &service("a"))]);
        let mut running = Running::start(folder.path().into()).await;

        put(&folder, "a.yaml", &service("a"));
        running.reload.notify_one();
        put(&folder, "b.yaml", &service("b"));

        assert!(matches!(running.next().await, Message::Event(_)), "the next word is about b.yaml");
        running.end().await;
    }

    #[tokio::test]
    async fn given_a_reload_when_nobody_saw_the_change_then_it_is_read() {
        let folder = folder(&[("a.yaml", &service("a"))]);
        let elsewhere = tempfile::tempdir().expect("a folder");
        let linked = elsewhere.path().join("a.yaml");
        fs::hard_link(folder.path().join("a.yaml"), &linked).expect("a link");
        let mut running = Running::start(folder.path().into()).await;

        // Written through another name: the watched folder hears nothing.
        fs::write(&linked, service("b")).expect("a file");
        running.reload.notify_one();

        assert_eq!(running.services().await, ["b"]);
        running.end().await;
    }

    #[test]
    fn given_an_endpoints_object_of_a_services_name_when_read_then_both_count() {
        let text = format!(
            "{}apiVersion: v1\nkind: Endpoints\nmetadata: {{name: mysql}}\nsubsets: [{{addresses: [{{ip: 10.0.0.1}}], ports: [{{port: 3306}}]}}]\n",
            service("mysql")
        );
        let folder = folder(&[("a.yaml", &text)]);

        let reading = read(vec![Input::Path(folder.path().into())], Ranges::default());

        assert_eq!(reading.problems, []);
        assert_eq!(reading.objects.slices[0].family, Family::V4);
    }
}
