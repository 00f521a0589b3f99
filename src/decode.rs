//! Manifest text in, the objects that a proxy reads out, with everything that is wrong with them.
//!
//! Here are documents, lists, kinds and names. The fields of a Service are in `decode_service`, those of
//! endpoints in `decode_endpoints`, the text itself in `yaml`. Which of two objects of one name counts is
//! `reading`; files are `manifest`.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::thread::available_parallelism;
#[cfg(feature = "kubernetes")]
use std::time::SystemTime;

#[cfg(feature = "kubernetes")]
use k8s_openapi::jiff::Timestamp;
use serde::de::MapAccess;
#[cfg(feature = "kubernetes")]
use serde::de::{Deserialize, Deserializer};

use crate::decode_endpoints::{self, EndpointPort, RawSlice, SliceEndpoint, Subset};
use crate::decode_service::{self, PREFIX, Spec, Status};
use crate::findings::{self, Finding, Findings, MAX_FINDINGS, closest, is_name, name_rule};
use crate::large_list::{self, Cut};
use crate::locate::At;
use crate::model::{Service, Slice};
use crate::name::ObjectName;
use crate::parts::in_parts;
use crate::plan::{Problem, Severity};
use crate::printable::Printable;
use crate::texts::Texts;
use crate::timestamp::Moment;
use crate::yaml::{self, Document, Fields, List, Object, Scalar, SyntaxError, fields};

/// Kinds that are named in the note about objects that nobody reads.
const MAX_KINDS_TOLD: usize = 10;

/// Findings that are told of one object of an API server.
#[cfg(feature = "kubernetes")]
const MAX_FINDINGS_PER_OBJECT: usize = 10;

/// Text that one thread reads in about 100 ms; below that, more of them would not be noticed.
const BYTES_PER_WORKER: usize = 1024 * 1024;

/// Threads that read one file, on however many processors.
const MAX_WORKERS: usize = 4;

/// What one file says.
#[derive(Debug, Default)]
pub struct Decoded {
    /// Its objects, in their order; a name may be there twice.
    pub objects: Vec<Entry>,
    /// What is wrong and what is worth knowing, each with line and column.
    pub problems: Vec<Problem>,
    /// True where nothing had to be left out because of an error.
    pub whole: bool,
    /// What was left out because of errors: objects, and documents in which none could be read.
    pub rejected: Vec<Rejected>,
}

/// One object, and where it came from.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its kind: with the name, its identity.
    pub kind: Kind,
    /// Its name.
    pub name: ObjectName,
    /// The line that its document begins at, from 1.
    pub line: u64,
    /// Its position among the `items` of a list, from 0.
    pub item: Option<u32>,
    /// What it says.
    pub content: Content,
    /// An EndpointSlice with the label `service.kubernetes.io/headless`: nothing for a proxy, so `content` is without it,
    /// but DNS tells its addresses.
    pub headless: Option<Arc<Slice>>,
}

impl Entry {
    /// Kind and name: `Service default/web`.
    pub fn label(&self) -> String {
        format!("{} {}", self.kind, self.name)
    }
}

/// An object that is left out because of an error, or a document or list in which none could be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Its kind, where that can be read.
    pub kind: Option<Kind>,
    /// Its name, where that can be read.
    pub name: Option<ObjectName>,
    /// The line that its document begins at, from 1.
    pub line: u64,
    /// Its position among the `items` of a list, from 0.
    pub item: Option<u32>,
    /// Follows from what is wrong: the same as long as it is wrong in the same way.
    pub fault: u64,
}

impl Rejected {
    /// Which object it is. `None` where it may be any.
    pub fn identity(&self) -> Option<(Kind, &ObjectName)> {
        self.kind.zip(self.name.as_ref())
    }
}

/// The kinds that are read. Two objects may have one name if their kinds differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `Service`, v1.
    Service,
    /// `EndpointSlice`, discovery.k8s.io/v1 (and v1beta1).
    EndpointSlice,
    /// `Endpoints`, v1.
    Endpoints,
}

impl Kind {
    /// Each of them.
    pub(crate) const ALL: [Self; 3] = [Self::Service, Self::EndpointSlice, Self::Endpoints];

    /// The word of the field `kind`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Endpoints => "Endpoints",
        }
    }

    /// The versions that are read; the first is the one to write.
    fn versions(self) -> &'static [&'static str] {
        match self {
            Self::Service | Self::Endpoints => &["v1"],
            Self::EndpointSlice => &["discovery.k8s.io/v1", "discovery.k8s.io/v1beta1"],
        }
    }

    /// The fields beside its metadata.
    fn fields(self) -> &'static [&'static str] {
        match self {
            Self::Service => &["spec", "status"],
            Self::EndpointSlice => &["addressType", "endpoints", "ports"],
            Self::Endpoints => &["subsets"],
        }
    }

    /// Letters that a name may have: a Service's becomes a DNS label.
    fn name_length(self) -> usize {
        if self == Self::Service { 63 } else { 253 }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What an object says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A Service.
    Service(Arc<Service>),
    /// An EndpointSlice (none where a proxy has no use for it), or the slices of an Endpoints object.
    Slices(Box<[Arc<Slice>]>),
}

/// What is read for DNS alone: a proxy has nothing to say about it, such as that it lacks ports, and takes no harm from it.
fn unheard<T>(read: impl FnOnce(&mut Findings) -> Option<T>) -> Option<T> {
    let mut found = Findings::new(0);
    read(&mut found).filter(|_| found.errors() == 0)
}

/// Reads one file. `file` is its name in problems.
pub fn decode(bytes: &[u8], file: &str) -> Decoded {
    let mut reading = Reading::new(file);
    match std::str::from_utf8(bytes) {
        Ok(text) => reading.text(text),
        Err(error) => reading.foreign(&bytes[..error.valid_up_to()]),
    }
    reading.end()
}

/// What an API server says of one object, with what is wrong with it.
#[cfg(feature = "kubernetes")]
#[derive(Clone, Debug)]
pub(crate) struct Observed {
    /// Its name, also where the rest cannot be used. `None` where it has none.
    pub(crate) name: Option<ObjectName>,
    /// From `metadata.resourceVersion`; empty where there is none.
    pub(crate) version: Arc<str>,
    /// From the annotation `endpoints.kubernetes.io/last-change-trigger-time`; `None` where there is none that can be read.
    pub(crate) triggered: Option<SystemTime>,
    /// What it says; `None` where an error forbids to use it.
    pub(crate) content: Option<Content>,
    /// What is wrong with it. Fields that nobody knows are left out: a server may be newer than we are.
    pub(crate) problems: Vec<Problem>,
}

#[cfg(feature = "kubernetes")]
impl Observed {
    /// Reads an object of a kind. Fails on text that is no object at all, never on a wrong field: one bad object must
    /// not take the whole list with it that it came in.
    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D, kind: Kind) -> Result<Self, D::Error> {
        let value = Object::<Manifest>::deserialize(deserializer)?;
        let mut reading = Reading::new("API server");
        let mut found = Findings::new(MAX_FINDINGS_PER_OBJECT);
        reading.manifest(&mut found, At::Root, &value, Slot { line: 0, item: None, kind: Some(kind) });
        let ((name, version), triggered) = (name_and_version(&value), triggered(&value));
        let content = reading.decoded.objects.pop().map(|entry| entry.content);
        let told = found.list.into_iter().filter(|finding| finding.reason != "unknown_field");
        let problems = told.map(|Finding { object, reason, message, severity, .. }| Problem {
            severity,
            ..Problem::error(object, reason, message)
        });
        Ok(Self { name, version, triggered, content, problems: problems.collect() })
    }
}

#[cfg(feature = "kubernetes")]
fn triggered(value: &Object<Manifest>) -> Option<SystemTime> {
    let Object::Fields(raw, _) = value else { return None };
    let Object::Fields(metadata, _) = &raw.metadata else { return None };
    let Object::Fields(annotations, _) = &metadata.annotations else { return None };
    let Scalar::Text(text) = &annotations.trigger_time else { return None };
    text.parse::<Timestamp>().ok().map(SystemTime::from)
}

/// As far as they can be read, whatever else is wrong.
#[cfg(feature = "kubernetes")]
fn name_and_version(value: &Object<Manifest>) -> (Option<ObjectName>, Arc<str>) {
    let Object::Fields(raw, _) = value else { return (None, "".into()) };
    let Object::Fields(metadata, _) = &raw.metadata else { return (None, "".into()) };
    let text = |value: &Scalar| match value {
        Scalar::Text(text) => Some(Arc::from(&**text)),
        _ => None,
    };
    let namespace = text(&metadata.namespace).unwrap_or_else(|| "default".into());
    let name = text(&metadata.name).map(|name| ObjectName::new(namespace, name));
    (name, text(&metadata.resource_version).unwrap_or_default())
}

fields!(
    /// All fields of all kinds: one look at a document is enough, though `kind` may come last.
    Manifest {
        "apiVersion" => api_version: Scalar,
        "kind" => kind: Scalar,
        "metadata" => metadata: Object<Metadata>,
        "spec" => spec: Object<Spec>,
        "status" => status: Object<Status>,
        "addressType" => address_type: Scalar,
        "endpoints" => endpoints: List<Object<SliceEndpoint>>,
        "ports" => ports: List<Object<EndpointPort>>,
        "subsets" => subsets: List<Object<Subset>>,
        "items" => items: List<Object<Manifest>>,
    }
    unused &[]
);

impl Manifest {
    /// The fields that say something, beside those that each object has.
    fn present(&self) -> impl Iterator<Item = &'static str> {
        [
            ("spec", !matches!(self.spec, Object::Absent)),
            ("status", !matches!(self.status, Object::Absent)),
            ("addressType", !matches!(self.address_type, Scalar::Absent)),
            ("endpoints", !matches!(self.endpoints, List::Empty)),
            ("ports", !matches!(self.ports, List::Empty)),
            ("subsets", !matches!(self.subsets, List::Empty)),
            ("items", !matches!(self.items, List::Empty)),
        ]
        .into_iter()
        .filter_map(|(key, present)| present.then_some(key))
    }
}

fields!(Metadata {
    "name" => name: Scalar,
    "generateName" => generate_name: Scalar,
    "namespace" => namespace: Scalar,
    "creationTimestamp" => created: Scalar,
    "resourceVersion" => resource_version: Scalar,
    "labels" => labels: Object<Labels>,
    "annotations" => annotations: Object<Annotations>,
} unused &[
    "clusterName",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generation",
    "initializers",
    "managedFields",
    "ownerReferences",
    "selfLink",
    "uid",
]);

fields!(Labels {
    "kubernetes.io/service-name" => service: Scalar,
    "service.kubernetes.io/headless" => headless: Scalar,
    "service.kubernetes.io/service-proxy-name" => proxy_name: Scalar,
} free);

/// When what endpoints stand for last changed, as the control plane noticed it.
#[cfg(feature = "kubernetes")]
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// The annotations that are ours, and when endpoints changed; others are nobody's business here.
#[derive(Debug, Default)]
pub(crate) struct Annotations {
    ours: Vec<(Box<str>, Scalar)>,
    #[cfg(feature = "kubernetes")]
    trigger_time: Scalar,
}

impl Fields for Annotations {
    const READ: &'static [&'static str] = &[];
    const UNUSED: &'static [&'static str] = &[];
    const FREE: bool = true;

    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        #[cfg(feature = "kubernetes")]
        if key == TRIGGER_TIME {
            self.trigger_time = map.next_value()?;
            return Ok(true);
        }
        let ours = key.starts_with(PREFIX);
        if ours {
            self.ours.push((key.into(), map.next_value()?));
        }
        Ok(ours)
    }
}

/// What the metadata of an object says to a proxy.
pub(crate) struct Identity {
    /// Namespace and name.
    pub(crate) name: ObjectName,
    /// From `creationTimestamp`.
    pub(crate) created: Arc<str>,
    /// From the label `service.kubernetes.io/service-proxy-name`.
    pub(crate) proxy_name: Option<Arc<str>>,
    /// From the label `kubernetes.io/service-name`.
    pub(crate) service: Option<Arc<str>>,
    /// True with the label `service.kubernetes.io/headless`.
    pub(crate) headless: bool,
    /// Annotations under `kube-relay.dev/`, with the prefix.
    pub(crate) annotations: Vec<(Box<str>, Scalar)>,
}

/// What a document holds.
enum Sort {
    Object(Kind),
    /// A list, and the kind of items that do not say theirs.
    List(Option<Kind>),
    /// Nothing for a proxy.
    Other(String),
}

/// The reading of one file, or of a part of a large one.
struct Reading<'f> {
    file: &'f str,
    decoded: Decoded,
    others: BTreeMap<String, usize>,
    untold: usize,
    /// Of all documents so far.
    texts: Texts,
}

impl<'f> Reading<'f> {
    fn new(file: &'f str) -> Self {
        let decoded = Decoded { whole: true, ..Decoded::default() };
        Self { file, decoded, others: BTreeMap::new(), untold: 0, texts: Texts::default() }
    }

    fn text(&mut self, text: &str) {
        let documents = yaml::documents(text);
        if text.len() <= BYTES_PER_WORKER {
            return documents.into_iter().for_each(|document| self.document(document));
        }
        let processors = available_parallelism().map_or(1, usize::from);
        let workers = text.len().div_ceil(BYTES_PER_WORKER).min(max_workers(processors));
        if let [document] = documents[..]
            && self.large_list(document, workers)
        {
            return;
        }
        let parts = in_parts(&documents, workers, |part| {
            let mut reading = Reading::new(self.file);
            part.iter().for_each(|document| reading.document(*document));
            reading
        });
        parts.into_iter().for_each(|part| self.join(part));
    }

    /// Reads a list of JSON in parts; false where it is none, or where something around its items is wrong or something
    /// in it no JSON: then it is to be read as one, to tell where. With one worker, too: no item waits in memory for the
    /// last.
    fn large_list(&mut self, document: Document<'_>, workers: usize) -> bool {
        let Some(Cut { envelope, items }) = large_list::cut(document.text) else { return false };
        let Ok(Object::Fields(list, _)) = serde_json::from_str::<Object<Manifest>>(&envelope) else { return false };
        let mut found = Findings::new(0);
        let Some(Sort::List(kind)) = sort(&mut found, At::Root, &list, None) else { return false };
        if found.errors() > 0 {
            return false;
        }
        let items: Vec<_> = items.into_iter().enumerate().collect();
        let parts = in_parts(&items, workers, |part| self.items(part, document.line, kind));
        let Some(parts) = parts.into_iter().collect::<Option<Vec<_>>>() else { return false };
        // One walk for all: each goes through the whole document.
        let mut findings = Vec::new();
        for (part, found) in parts {
            self.join(part);
            findings.extend(found);
        }
        self.tell(document, findings);
        true
    }

    /// Reads some items of the list that begins at `line`, with what is found in them; `None` where one is no JSON.
    fn items(&self, items: &[(usize, &str)], line: u64, kind: Option<Kind>) -> Option<(Self, Vec<Finding>)> {
        let mut reading = Reading::new(self.file);
        let mut found = Findings::new(MAX_FINDINGS);
        for (index, item) in items {
            let value = serde_json::from_str(item).ok()?;
            let slot = Slot { line, item: Some(*index), kind };
            reading.manifest(&mut found, At::Object(&At::Root.key("items").index(*index)), &value, slot);
        }
        let findings = reading.count(found);
        Some((reading, findings))
    }

    /// Adds what another worker read behind what this one did.
    fn join(&mut self, part: Self) {
        self.decoded.objects.extend(part.decoded.objects);
        self.decoded.problems.extend(part.decoded.problems);
        self.decoded.whole &= part.decoded.whole;
        self.decoded.rejected.extend(part.decoded.rejected);
        self.untold += part.untold;
        part.others.into_iter().for_each(|(kind, count)| *self.others.entry(kind).or_default() += count);
    }

    fn document(&mut self, document: Document<'_>) {
        let (values, error) = yaml::read::<Manifest>(document);
        for (document, value) in values {
            self.value(document, At::Root, &value, Slot { line: document.line, item: None, kind: None });
        }
        if let Some(error) = error {
            self.broken(document, error);
        }
    }

    /// Reads what stands somewhere in a document.
    fn value(&mut self, document: Document<'_>, at: At<'_>, value: &Object<Manifest>, slot: Slot) {
        let mut found = Findings::new(MAX_FINDINGS.saturating_sub(self.decoded.problems.len()));
        found.texts = std::mem::take(&mut self.texts);
        self.manifest(&mut found, at, value, slot);
        let findings = self.count(found);
        self.tell(document, findings);
    }

    /// Keeps the sums of what was found, and returns it.
    fn count(&mut self, found: Findings) -> Vec<Finding> {
        self.decoded.whole &= found.errors() == 0;
        self.untold += found.untold;
        self.texts = found.texts;
        found.list
    }

    /// Reads an object or a list, which may stand in a list itself.
    fn manifest(&mut self, found: &mut Findings, at: At<'_>, value: &Object<Manifest>, slot: Slot) {
        found.of(self.file);
        let first = found.list.len();
        let (raw, unknown) = match value {
            Object::Absent => return,
            Object::Fields(raw, unknown) => (raw, unknown),
            Object::Wrong(value) => {
                found.error(at, format!("{value} where an object with apiVersion, kind and metadata is wanted"));
                return self.reject(None, None, slot, fault(&found.list[first..]));
            }
        };
        let errors = found.errors();
        match sort(found, at, raw, slot.kind) {
            _ if found.errors() > errors => {
                self.reject(likely_kind(raw, slot.kind), likely_name(raw), slot, fault(&found.list[first..]));
            }
            None => {}
            Some(Sort::Other(kind)) => *self.others.entry(kind).or_default() += 1,
            Some(Sort::List(kind)) => {
                let at = at.key("items");
                let items = found.list(at, &raw.items);
                if found.errors() > errors {
                    self.reject(None, None, slot, fault(&found.list[first..]));
                }
                for (index, item) in items.iter().enumerate() {
                    let slot = Slot { line: slot.line, item: Some(index), kind };
                    self.manifest(found, At::Object(&at.index(index)), item, slot);
                }
            }
            Some(Sort::Object(kind)) => self.object(found, at, kind, raw, unknown, slot),
        }
    }

    fn object(
        &mut self,
        found: &mut Findings,
        at: At<'_>,
        kind: Kind,
        raw: &Manifest,
        unknown: &[Box<str>],
        slot: Slot,
    ) {
        let (errors, first) = (found.errors(), found.list.len());
        let identity = identity(found, at, kind, &raw.metadata);
        let known: Vec<&str> = ["apiVersion", "kind", "metadata"].iter().chain(kind.fields()).copied().collect();
        unknown.iter().for_each(|key| found.unknown(at, key, &known));
        raw.present().filter(|key| !known.contains(key)).for_each(|key| found.unknown(at, key, &known));
        let Some(identity) = identity else {
            return self.reject(Some(kind), None, slot, fault(&found.list[first..]));
        };
        let (name, mut headless) = (identity.name.clone(), None);
        let content = match kind {
            Kind::Service => decode_service::service(found, at, identity, &raw.spec, &raw.status)
                .map(|service| Content::Service(Arc::new(service))),
            Kind::EndpointSlice => {
                let raw = RawSlice { address_type: &raw.address_type, endpoints: &raw.endpoints, ports: &raw.ports };
                if identity.headless {
                    headless = unheard(|found| decode_endpoints::slice(found, at, &identity, &raw)).map(Arc::new);
                    Some(Content::Slices(Box::default()))
                } else {
                    let slice = decode_endpoints::slice(found, at, &identity, &raw);
                    Some(Content::Slices(slice.into_iter().map(Arc::new).collect()))
                }
            }
            Kind::Endpoints => {
                let slices = decode_endpoints::endpoints(found, at, &identity, &raw.subsets);
                Some(Content::Slices(slices.into_iter().map(Arc::new).collect()))
            }
        };
        match content {
            _ if found.errors() > errors => {
                self.reject(Some(kind), Some(name), slot, fault(&found.list[first..]));
            }
            Some(content) => {
                let (line, item) = (slot.line, slot.item());
                self.decoded.objects.push(Entry { kind, name, line, item, content, headless });
            }
            None => {}
        }
    }

    /// Notes an object that is left out because of an error.
    fn reject(&mut self, kind: Option<Kind>, name: Option<ObjectName>, slot: Slot, fault: u64) {
        self.decoded.rejected.push(Rejected { kind, name, line: slot.line, item: slot.item(), fault });
    }

    /// Adds what was found in a document, with the places. Walks through all of it.
    fn tell(&mut self, document: Document<'_>, findings: Vec<Finding>) {
        self.decoded.problems.extend(findings::located(findings, document, self.file));
    }

    fn broken(&mut self, document: Document<'_>, error: SyntaxError) {
        let slot = Slot { line: document.line, item: None, kind: None };
        self.reject(None, None, slot, hash([&*error.message]));
        let line = document.line + error.line.map_or(0, |line| line.saturating_sub(1));
        self.problem(Some(line), error.column, format!("cannot be read: {error}"), Severity::Error, "decode");
    }

    fn foreign(&mut self, sound: &[u8]) {
        self.reject(None, None, Slot { line: 1, item: None, kind: None }, hash([]));
        let line = 1 + sound.iter().filter(|byte| **byte == b'\n').count() as u64;
        let column = sound.iter().rev().take_while(|byte| **byte != b'\n').count() as u64 + 1;
        let text = "not UTF-8 text; save the file as UTF-8".to_owned();
        self.problem(Some(line), Some(column), text, Severity::Error, "decode");
    }

    fn end(mut self) -> Decoded {
        let more = self.decoded.problems.len().saturating_sub(MAX_FINDINGS);
        self.decoded.problems.truncate(MAX_FINDINGS);
        self.untold += more;
        if self.untold > 0 {
            let text = format!("{} more findings in this file", self.untold);
            self.problem(None, None, text, Severity::Warning, "decode");
        }
        if !self.others.is_empty() {
            let mut kinds: Vec<String> =
                self.others.iter().map(|(kind, count)| format!("{count} {}", Printable(kind))).collect();
            if kinds.len() > MAX_KINDS_TOLD {
                kinds.truncate(MAX_KINDS_TOLD);
                kinds.push("…".to_owned());
            }
            let kinds = kinds.join(", ");
            let text = format!("passed over, as a proxy reads Service, EndpointSlice and Endpoints: {kinds}");
            self.problem(None, None, text, Severity::Note, "other_kind");
        }
        self.decoded
    }

    fn problem(
        &mut self,
        line: Option<u64>,
        column: Option<u64>,
        text: String,
        severity: Severity,
        reason: &'static str,
    ) {
        self.decoded.whole &= severity != Severity::Error;
        self.decoded.problems.push(Problem {
            object: self.file.to_owned(),
            file: Some(self.file.to_owned()),
            line,
            column,
            reason: reason.into(),
            message: text,
            severity,
        });
    }
}

/// Threads that may read one file. One processor is left to the relay, but of two both are used: a start, where nobody
/// is served yet, is faster by it, and at a reload the scheduler shares them.
fn max_workers(processors: usize) -> usize {
    processors.saturating_sub(1).clamp(2, MAX_WORKERS).min(processors)
}

/// Where an object stands.
#[derive(Clone, Copy)]
struct Slot {
    line: u64,
    item: Option<usize>,
    /// What it is if it does not say.
    kind: Option<Kind>,
}

impl Slot {
    fn item(self) -> Option<u32> {
        self.item.and_then(|item| item.try_into().ok())
    }
}

/// What is wrong, as a number.
fn fault(findings: &[Finding]) -> u64 {
    let errors = findings.iter().filter(|finding| finding.severity == Severity::Error);
    hash(errors.map(|finding| &*finding.message))
}

fn hash<'m>(messages: impl IntoIterator<Item = &'m str>) -> u64 {
    foldhash::quality::FixedState::default().hash_one(messages.into_iter().collect::<Vec<_>>())
}

/// Tells by apiVersion and kind what an object is. `None` where they are wrong.
fn sort(found: &mut Findings, at: At<'_>, raw: &Manifest, default: Option<Kind>) -> Option<Sort> {
    let version = found.text(at.key("apiVersion"), &raw.api_version);
    let kind = match found.text(at.key("kind"), &raw.kind).filter(|kind| !kind.is_empty()) {
        Some(kind) => kind,
        None if default.is_some() => return default.map(Sort::Object),
        None if matches!(raw.kind, Scalar::Absent | Scalar::Null | Scalar::Text(_)) => {
            found.error(at.key("kind"), "missing; write Service or EndpointSlice");
            return None;
        }
        None => return None,
    };
    let item = kind.strip_suffix("List");
    let Some(known) = Kind::ALL.into_iter().find(|known| [Some(&*kind), item].contains(&Some(known.as_str()))) else {
        if &*kind == "List" {
            return Some(Sort::List(None));
        }
        let ours = version.is_none_or(|version| Kind::ALL.iter().any(|kind| kind.versions().contains(&&*version)));
        let near = closest(&kind, Kind::ALL.iter().map(|kind| kind.as_str())).filter(|_| ours);
        return match near {
            // Passed over, it would leave without a word what is served now.
            Some(near) => {
                found.of(likely_label(&kind, raw));
                found.error(at.key("kind"), format!("{kind:?} is not known, did you mean {near}?"));
                None
            }
            None => Some(Sort::Other(kind.to_string())),
        };
    };
    let version = match version {
        Some(version) => version,
        None if default == Some(known) => known.versions()[0].into(),
        None => {
            found.of(likely_label(&kind, raw));
            found.error(at.key("apiVersion"), format!("missing; write {}", known.versions()[0]));
            return None;
        }
    };
    if known.versions().contains(&&*version) {
        return Some(if item.is_some() { Sort::List(Some(known)) } else { Sort::Object(known) });
    }
    // Other people have kinds of these names, too: those are no mistake.
    let group = version.split_once('/').map(|(group, _)| group);
    let own_group = known.versions()[0].split_once('/').map(|(group, _)| group);
    if group.is_some() && group != own_group {
        return Some(Sort::Other(format!("{version} {kind}")));
    }
    found.of(likely_label(&kind, raw));
    found.error(at.key("apiVersion"), format!("{version:?} has no {kind}; write {}", known.versions()[0]));
    None
}

/// Kind and name of an object that is not looked at closely.
fn likely_label(kind: &str, raw: &Manifest) -> String {
    likely_name(raw).map_or_else(|| format!("{kind} (without a name)"), |name| format!("{kind} {name}"))
}

/// The kind of an object whose version is wrong.
fn likely_kind(raw: &Manifest, default: Option<Kind>) -> Option<Kind> {
    match &raw.kind {
        Scalar::Text(word) if !word.is_empty() => Kind::ALL.into_iter().find(|kind| kind.as_str() == &**word),
        Scalar::Absent | Scalar::Null | Scalar::Text(_) => default,
        _ => None,
    }
}

/// Its name.
fn likely_name(raw: &Manifest) -> Option<ObjectName> {
    let Object::Fields(metadata, _) = &raw.metadata else { return None };
    let namespace: Arc<str> = match &metadata.namespace {
        Scalar::Absent | Scalar::Null => "default".into(),
        Scalar::Text(text) if text.is_empty() => "default".into(),
        Scalar::Text(text) if is_name(text, 63) => (**text).into(),
        _ => return None,
    };
    match &metadata.name {
        Scalar::Text(text) if is_name(text, 253) => Some(ObjectName::new(namespace, &**text)),
        _ => None,
    }
}

/// Reads the metadata and makes the object known to `found` by its name. `None` without a name.
fn identity(found: &mut Findings, at: At<'_>, kind: Kind, metadata: &Object<Metadata>) -> Option<Identity> {
    found.of(format!("{kind} (without a name)"));
    let at = at.key("metadata");
    let raw = match metadata {
        Object::Fields(raw, _) => &**raw,
        Object::Wrong(_) => found.object(at, metadata)?,
        Object::Absent => {
            found.error(at, "missing; write metadata with a name");
            return None;
        }
    };
    let errors = found.errors();
    let namespace = found.text(at.key("namespace"), &raw.namespace).filter(|namespace| !namespace.is_empty());
    if found.errors() > errors {
        return None;
    }
    let namespace = namespace.unwrap_or_else(|| "default".into());
    if !is_name(&namespace, 63) {
        found.error(at.key("namespace"), format!("{} is not a name; write {}", raw.namespace, name_rule(63)));
        return None;
    }
    let most = kind.name_length();
    let name = match found.text(at.key("name"), &raw.name).filter(|name| !name.is_empty()) {
        Some(name) if is_name(&name, most) => found.texts.name(namespace, name),
        Some(_) => {
            found.error(at.key("name"), format!("{} is not a name; write {}", raw.name, name_rule(most)));
            return None;
        }
        None => {
            if matches!(raw.name, Scalar::Absent | Scalar::Null | Scalar::Text(_)) {
                let generated = !matches!(raw.generate_name, Scalar::Absent | Scalar::Null);
                let more = if generated { "; generateName is for an API server" } else { "" };
                found.error(at.key("name"), format!("missing{more}"));
            }
            return None;
        }
    };
    found.of(format!("{kind} {name}"));
    found.object(at, metadata);
    let created = created(found, at.key("creationTimestamp"), &raw.created);
    let labels_at = at.key("labels");
    let labels = found.object(labels_at, &raw.labels);
    let service = labels.and_then(|labels| found.text(labels_at.key("kubernetes.io/service-name"), &labels.service));
    let proxy_name = labels.filter(|labels| !matches!(labels.proxy_name, Scalar::Absent)).map(|labels| {
        found.text(labels_at.key("service.kubernetes.io/service-proxy-name"), &labels.proxy_name).unwrap_or_default()
    });
    let headless = labels.is_some_and(|labels| !matches!(labels.headless, Scalar::Absent));
    let annotations = found.object(at.key("annotations"), &raw.annotations);
    let annotations = annotations.map_or(Vec::new(), |annotations| annotations.ours.clone());
    let service = service.filter(|service| !service.is_empty());
    Some(Identity { name, created, proxy_name, service, headless, annotations })
}

/// Empty where nothing is said, or no moment.
fn created(found: &mut Findings, at: At<'_>, value: &Scalar) -> Arc<str> {
    let text = found.text(at, value).unwrap_or_default();
    if text.is_empty() || Moment::parse(&text).is_some() {
        return text;
    }
    found.warn(at, "decode", format!("{value} is no moment, it is passed over; write one like 2026-01-31T23:59:59Z"));
    Arc::default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::locate::WALKS;

    const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: [{port: 80}]}\n";

    fn labels(decoded: &Decoded) -> Vec<String> {
        decoded.objects.iter().map(Entry::label).collect()
    }

    fn read(text: &str) -> Decoded {
        decode(text.as_bytes(), "a.yaml")
    }

    fn only_problem(decoded: &Decoded) -> &Problem {
        assert_eq!(decoded.problems.len(), 1, "{:?}", decoded.problems);
        &decoded.problems[0]
    }

    #[test]
    fn t229_given_many_documents_when_read_then_each_is_an_object_with_its_line() {
        let two = SERVICE.replace("web", "api");

        let decoded = read(&format!("# all\n---\n{SERVICE}---\n---\n{two}"));

        assert_eq!(labels(&decoded), ["Service default/web", "Service default/api"]);
        assert_eq!(decoded.objects.iter().map(|entry| entry.line).collect::<Vec<_>>(), [3, 9]);
        assert!(decoded.whole && decoded.problems.is_empty());
    }

    #[test]
    fn t229_given_a_list_with_a_wrong_item_when_read_then_the_others_are_taken() {
        let decoded = read(
            "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {name: bad}\n  spec: {ports: [{port: x}]}\n- apiVersion: v1\n  kind: Service\n  metadata: {name: good}\n  spec: {ports: [{port: 80}]}\n- 5\n",
        );

        assert_eq!(labels(&decoded), ["Service default/good"]);
        assert_eq!(decoded.objects[0].item, Some(1));
        assert!(!decoded.whole);
        let problem = &decoded.problems[0];
        assert_eq!((&*problem.object, problem.line, problem.column), ("Service default/bad", Some(7), Some(25)));
        assert!(problem.message.starts_with("spec.ports[0].port: \"x\""));
        assert_eq!(decoded.problems[1].line, Some(12));
    }

    #[test]
    fn t229_given_json_as_kubectl_prints_it_when_read_then_its_items_are_taken() {
        let text = r#"{
    "apiVersion": "v1",
    "items": [
        {
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "web", "namespace": "shop", "managedFields": [{"fieldsV1": {"f:spec": {}}}]},
            "spec": {"ports": [{"port": 80, "nodePort": 70000}]}
        },
        {
            "apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "web", "namespace": "shop"}, "subsets": null
        }
    ],
    "kind": "List",
    "metadata": {"resourceVersion": "", "selfLink": ""}
}"#;

        let decoded = read(text);

        assert_eq!(labels(&decoded), ["Endpoints shop/web"]);
        let problem = only_problem(&decoded);
        assert_eq!((problem.line, problem.column), (Some(7), Some(57)));
        assert_eq!(problem.object, "Service shop/web");
    }

    #[test]
    fn t229_given_a_typed_list_when_read_then_items_need_no_kind() {
        let decoded =
            read("kind: ServiceList\napiVersion: v1\nitems: [{metadata: {name: web}, spec: {ports: [{port: 80}]}}]\n");

        assert_eq!(labels(&decoded), ["Service default/web"]);
        assert!(decoded.problems.is_empty());
    }

    #[test]
    fn given_a_broken_document_when_read_then_the_others_are_taken_and_the_place_is_told() {
        let decoded = read(&format!("{SERVICE}---\nkind: Service\n  bad: [\n---\n{}", SERVICE.replace("web", "api")));

        assert_eq!(labels(&decoded), ["Service default/web", "Service default/api"]);
        let problem = only_problem(&decoded);
        assert_eq!((problem.line, problem.severity), (Some(7), Severity::Error));
        assert!(problem.message.starts_with("cannot be read: "), "{}", problem.message);
        assert!(!decoded.whole);
    }

    #[test]
    fn given_other_kinds_when_read_then_one_note_counts_them() {
        let deployment =
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec: {replicas: 3, ports: x}\n";
        let foreign = "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: web}\n";

        let decoded = read(&[deployment, foreign, SERVICE, deployment].join("---\n"));

        assert_eq!(labels(&decoded), ["Service default/web"]);
        let note = only_problem(&decoded);
        assert_eq!((note.severity, &*note.reason), (Severity::Note, "other_kind"));
        assert_eq!(
            note.message,
            "passed over, as a proxy reads Service, EndpointSlice and Endpoints: 2 Deployment, 1 serving.knative.dev/v1 Service"
        );
        assert!(decoded.whole);
    }

    #[test]
    fn given_a_wrong_or_missing_version_or_kind_when_read_then_the_right_one_is_told() {
        let told = |text: &str| only_problem(&read(text)).message.clone();

        assert_eq!(
            told("apiVersion: v1\nkind: service\nmetadata: {name: web}\n"),
            "kind: \"service\" is not known, did you mean Service?"
        );
        assert_eq!(told("kind: Endpoint\n"), "kind: \"Endpoint\" is not known, did you mean Endpoints?");

        assert_eq!(told("kind: Service\nmetadata: {name: web}\n"), "apiVersion: missing; write v1");
        assert_eq!(
            told("apiVersion: v1\nkind: EndpointSlice\n"),
            "apiVersion: \"v1\" has no EndpointSlice; write discovery.k8s.io/v1"
        );
        assert_eq!(told("apiVersion: v1\nmetadata: {name: web}\n"), "kind: missing; write Service or EndpointSlice");
        assert_eq!(told("hello\n"), "\"hello\" where an object with apiVersion, kind and metadata is wanted");
    }

    #[test]
    fn given_a_wrong_name_when_read_then_it_is_told() {
        let named = |metadata: &str| {
            let decoded = read(&format!(
                "apiVersion: v1\nkind: Service\nmetadata: {metadata}\nspec: {{ports: [{{port: 80}}]}}\n"
            ));
            assert!(decoded.objects.is_empty());
            let problem = only_problem(&decoded);
            (problem.object.clone(), problem.message.clone())
        };

        let (object, message) = named("{generateName: web-}");
        assert_eq!(
            (&*object, &*message),
            ("Service (without a name)", "metadata.name: missing; generateName is for an API server")
        );
        assert!(named("{name: Web}").1.starts_with("metadata.name: \"Web\" is not a name; write lower-case"));
        assert_eq!(named("{name: 8080}").1, "metadata.name: 8080 where text is wanted; put it in quotes");
        assert!(named("{name: web, namespace: 'a/b'}").1.starts_with("metadata.namespace"));
    }

    #[test]
    fn t230_given_fields_of_another_kind_when_read_then_they_are_unknown() {
        let decoded = read(&format!("{SERVICE}subsets: [{{}}]\nselector: {{app: web}}\n"));

        let told: Vec<&str> = decoded.problems.iter().map(|problem| &*problem.message).collect();
        assert_eq!(told, ["subsets: unknown field, it is ignored", "selector: unknown field, it is ignored"]);
        assert_eq!(decoded.objects.len(), 1);
    }

    #[test]
    fn t016_given_the_label_of_another_proxy_when_read_then_it_is_kept() {
        let decoded = read(
            "apiVersion: v1\nkind: Service\nmetadata: {name: web, labels: {service.kubernetes.io/service-proxy-name: mesh, app: x}}\nspec: {ports: [{port: 80}]}\n",
        );

        let Content::Service(service) = &decoded.objects[0].content else { panic!("a Service") };
        assert_eq!(service.proxy_name.as_deref(), Some("mesh"));
    }

    #[test]
    fn t029_given_an_age_that_is_no_moment_when_read_then_it_is_passed_over_with_a_warning() {
        let decoded = read(&SERVICE.replace("{name: web}", "{name: web, creationTimestamp: yesterday}"));

        let Content::Service(service) = &decoded.objects[0].content else { panic!("a Service") };
        assert_eq!(&*service.created, "");
        let said = "metadata.creationTimestamp: \"yesterday\" is no moment, it is passed over";
        assert!(only_problem(&decoded).message.starts_with(said));
    }

    #[test]
    fn given_bytes_that_are_no_text_when_read_then_the_place_is_told() {
        let decoded = decode(b"kind: Service\nab\xff\xfe", "a.yaml");

        let problem = only_problem(&decoded);
        assert_eq!((problem.line, problem.column), (Some(2), Some(3)));
        assert!(!decoded.whole);
    }

    #[test]
    fn given_byte_order_mark_and_crlf_when_read_then_nothing_is_wrong() {
        let decoded = read(&format!("\u{feff}{}", SERVICE.replace('\n', "\r\n")));

        assert_eq!(labels(&decoded), ["Service default/web"]);
        assert!(decoded.problems.is_empty());
    }

    #[test]
    fn given_anchors_and_merge_keys_when_read_then_they_are_followed() {
        let decoded = read(
            "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {name: a}\n  spec: &spec {ports: [{port: 80}]}\n- apiVersion: v1\n  kind: Service\n  metadata: {name: b}\n  spec: {<<: *spec, type: NodePort}\n",
        );

        assert_eq!(labels(&decoded), ["Service default/a", "Service default/b"], "{:?}", decoded.problems);
    }

    #[test]
    fn given_a_large_file_when_read_by_several_threads_then_order_and_lines_stay() {
        let filler = format!("# {}\n", "x".repeat(BYTES_PER_WORKER));
        let text: String =
            (0..5).map(|number| format!("---\n{}{filler}", SERVICE.replace("web", &format!("web-{number}")))).collect();

        let decoded = read(&text);

        let names: Vec<String> = (0..5).map(|number| format!("Service default/web-{number}")).collect();
        assert_eq!(labels(&decoded), names);
        assert_eq!(decoded.objects.iter().map(|entry| entry.line).collect::<Vec<_>>(), [2, 8, 14, 20, 26]);
    }

    #[test]
    fn given_few_processors_when_a_large_file_is_read_then_one_is_left_to_the_relay_where_there_are_three() {
        assert_eq!([1, 2, 3, 4, 5, 64].map(max_workers), [1, 2, 2, 3, 4, 4]);
    }

    /// Blanks that make a text a large one, and change nothing else.
    fn enlarged(text: &str) -> String {
        format!("{text}{}", " ".repeat(BYTES_PER_WORKER))
    }

    #[test]
    fn given_findings_in_each_item_of_a_large_list_when_read_then_the_text_is_walked_once() {
        let item = |number| {
            let name = format!(r#"{{"name": "web-{number}"}}"#);
            format!(
                r#"{{"apiVersion": "v1", "kind": "Service", "metadata": {name}, "spec": {{"ports": [{{"port": 80}}]}}, "zz": 1}}"#
            )
        };
        let items = (0..2_000).map(item).collect::<Vec<_>>().join(",\n");
        let text = enlarged(&format!("{{\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": [\n{items}]}}"));
        let walks = WALKS.get();

        let decoded = read(&text);

        assert_eq!(WALKS.get() - walks, 1);
        let unknown = decoded.problems.iter().filter(|problem| problem.reason == "unknown_field");
        let lines: Vec<u64> = unknown.filter_map(|problem| problem.line).collect();
        assert_eq!(lines, (2..).take(MAX_FINDINGS).collect::<Vec<_>>());
        assert_eq!(decoded.problems.len(), MAX_FINDINGS + 1);
    }

    #[test]
    fn given_a_list_when_it_is_large_then_it_is_read_as_a_small_one() {
        let item = |name: &str| {
            format!(
                r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"{name}"}},"spec":{{"ports":[{{"port":80}}]}}}}"#
            )
        };
        let (a, b) = (item("a"), item("b"));
        let list = format!(r#""apiVersion":"v1","kind":"List","items":[{a}]"#);
        let in_parts = [
            format!("{{{list}}}"),
            format!("{{{}}}", list.replace("80", "\"x\"")),
            format!("{{ {list}\t,\r\n\"metadata\": {{}} }}"),
        ];
        let as_one = [
            format!("{{{}}}", list.replace("\"v1\"", "1")),
            format!("{{{}}}", list.replace("\"List\"", "5")),
            format!(r#"{{{list},"\u0069tems":[{b}]}}"#),
            format!(r#"{{"\u0069tems":[{b}],{list}}}"#),
            format!(r#"{{{list},"\u0069tems":[]}}"#),
            format!(r#"{{{list},"items":[{b}]}}"#),
            format!("{{{list}\u{a0}}}"),
            format!("{{{list}\u{c}}}"),
            format!("{{{}}}", list.replace("[{\"api", "[\u{a0}{\"api")),
            format!("{{{}}}", list.replace(":[{\"api", ":\u{c}[{\"api")),
            format!("{{{list}}} x"),
        ];
        let document = |text| Document { text, line: 1 };

        for text in &in_parts {
            assert!(Reading::new("a.yaml").large_list(document(text), 2), "{text}");
        }
        for text in &as_one {
            assert!(!Reading::new("a.yaml").large_list(document(text), 2), "{text}");
        }
        for text in in_parts.iter().chain(&as_one) {
            let (small, large) = (read(text), read(&enlarged(text)));

            assert_eq!(labels(&large), labels(&small), "{text}");
            assert_eq!((large.problems, large.whole), (small.problems, small.whole), "{text}");
            assert_eq!(large.rejected, small.rejected, "{text}");
        }
    }

    #[test]
    fn given_more_findings_than_are_told_when_read_then_the_rest_is_counted() {
        let unknown: String = (0..MAX_FINDINGS + 500).map(|number| format!("zz{number}: 1\n")).collect();

        let decoded = read(&format!("{SERVICE}{unknown}"));

        assert_eq!(decoded.problems.len(), MAX_FINDINGS + 1);
        assert_eq!(decoded.problems.last().map(|last| &*last.message), Some("500 more findings in this file"));
    }

    #[test]
    fn f4_given_objects_that_are_rejected_when_read_then_each_is_noted_with_what_can_be_read_of_it() {
        let bad = SERVICE.replace("80", "eighty");
        let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: web-1}\n";
        let version = "apiVersion: v2\nkind: Service\nmetadata: {name: web, namespace: shop}\n";
        let namespace = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: 5}\n";
        let documents = [&bad, SERVICE, slice, "kind: 5\n", "items: [\n", "5\n", version, namespace];

        let decoded = read(&documents.join("---\n"));

        let noted = |rejected: &Rejected| match rejected.identity() {
            Some((kind, name)) => format!("{}: {kind} {name}", rejected.line),
            None => format!("{}: {:?}", rejected.line, rejected.kind),
        };
        assert_eq!(
            decoded.rejected.iter().map(noted).collect::<Vec<_>>(),
            [
                "1: Service default/web",
                "11: EndpointSlice default/web-1",
                "15: None",
                "17: None",
                "19: None",
                "21: Service shop/web",
                "25: Some(Service)",
            ]
        );
    }

    #[test]
    fn f4_given_an_object_that_is_wrong_when_something_else_changes_then_its_fault_is_the_same() {
        let fault = |text: &str| read(text).rejected[0].fault;
        let bad = SERVICE.replace("80", "eighty");

        assert_eq!(fault(&bad), fault(&format!("{SERVICE}---\n{bad}")));
        assert_ne!(fault(&bad), fault(&SERVICE.replace("80", "ninety")));
    }

    const SAMPLE: &str = include_str!("../tests/manifests/every_field.yaml");

    #[test]
    fn given_every_field_of_the_api_when_read_then_nothing_is_wrong() {
        let decoded = read(SAMPLE);

        // Annotations of ours are known, and said to wait for a later version.
        let wrong = decoded.problems.iter().find(|problem| problem.reason != "unsupported");
        assert_eq!(wrong, None);
        assert_eq!(labels(&decoded), ["Service shop/web", "EndpointSlice shop/web-1", "Endpoints shop/web"]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

        #[test]
        fn given_any_bytes_when_read_then_nothing_panics(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            decode(&bytes, "a.yaml");
        }

        #[test]
        fn given_any_yaml_like_text_when_read_then_nothing_panics(text in "[a-z:{}\\[\\],&*#|>\"'\n -]{0,200}") {
            decode(text.as_bytes(), "a.yaml");
        }

        #[test]
        fn given_a_mutated_manifest_when_read_then_nothing_panics_and_each_error_has_a_line(
            at in 0..SAMPLE.len(),
            cut in 0..40_usize,
            put in "([\\[{]{0,3}|[0-9.]{1,22}|null|~|- |: |\"|'|\t|\r|&a|\\*a|true|[a-z]{1,8})",
        ) {
            let mut bytes = SAMPLE.as_bytes().to_vec();
            let end = (at + cut).min(bytes.len());
            bytes.splice(at..end, put.bytes());

            let decoded = decode(&bytes, "a.yaml");

            let errors = decoded.problems.iter().filter(|problem| problem.severity == Severity::Error);
            prop_assert!(errors.clone().all(|problem| problem.line.is_some()));
            prop_assert_eq!(errors.count() == 0, decoded.whole);
            prop_assert_eq!(decoded.rejected.is_empty(), decoded.whole);
        }

        #[test]
        fn given_a_cut_manifest_when_read_then_nothing_panics(end in 0..SAMPLE.len()) {
            decode(&SAMPLE.as_bytes()[..end], "a.yaml");
        }
    }
}
