//! One file of manifests: what it says, and what of that is in use.
//!
//! One bad object does not hold up the others of its file. Where its kind and name can be read, it alone keeps its last
//! good version, and all others are as the file has them now, also those that are gone. Where something cannot even be
//! named (no YAML, a cut file), what is in use and not found any more may be just that, and stays. Which files there
//! are is `manifest`.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::hash::BuildHasher;
use std::mem;
use std::path::{Path, PathBuf};

use crate::decode::{Decoded, Entry, Kind, Rejected, decode};
use crate::findings::MAX_FINDINGS;
use crate::input::ReadError;
use crate::name::ObjectName;
use crate::plan::{Problem, Severity};
use crate::rejections::Rejections;

/// Objects that are named one by one where one sentence is about many.
const NAMED: usize = 10;

/// What a look at the files found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changed {
    /// Other objects are in use.
    pub(crate) objects: bool,
    /// Something else is wrong.
    pub(crate) problems: bool,
}

/// One file. Owned by the source.
#[derive(Debug, Default)]
pub(crate) struct File {
    /// Of the content that was last looked at; `None` where it could not be read.
    fingerprint: Option<(usize, u64)>,
    real: Option<PathBuf>,
    entries: Vec<Entry>,
    failed: bool,
    problems: Vec<Problem>,
    /// What was wrong in the content that was last decoded.
    faults: HashSet<Fault>,
    /// What was rejected and is not counted yet.
    rejections: Rejections,
}

/// What is rejected, and what is wrong with it: one version of an object.
type Fault = (Option<Kind>, Option<ObjectName>, u64);

impl File {
    /// Its real path: a file that is named twice counts once.
    pub(crate) fn real(&self) -> Option<&Path> {
        self.real.as_deref()
    }

    /// What of it is in use: what it says, and behind that what stays as it was.
    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// True where something that it says now cannot be used.
    pub(crate) fn failed(&self) -> bool {
        self.failed
    }

    /// What is wrong with it and what is worth knowing.
    pub(crate) fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// What was rejected since this was last asked. An object that stays wrong in the same way counts once.
    pub(crate) fn take_rejections(&mut self) -> Rejections {
        mem::take(&mut self.rejections)
    }

    /// Takes the next content even if it is the same as before.
    pub(crate) fn look_again(&mut self) {
        self.fingerprint = None;
    }

    /// Takes what was read, or the failure to read it.
    pub(crate) fn update(&mut self, path: &Path, content: Result<Vec<u8>, ReadError>, changed: &mut Changed) {
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
                self.fail(error.problem(&name, self.entries.len()), changed);
            }
        }
    }

    fn take(&mut self, name: &str, bytes: &[u8], changed: &mut Changed) {
        // Editors and shells empty a file before they write it.
        if bytes.iter().all(u8::is_ascii_whitespace) {
            self.rejections.count(None, ReadError::Empty.reason());
            return self.fail(ReadError::Empty.problem(name, self.entries.len()), changed);
        }
        let decoded = decode(bytes, name);
        let kept = Kept::of(&self.entries, &decoded, is_cut(bytes, &decoded));
        self.count(&decoded.rejected);
        self.failed = !decoded.whole;
        self.problems = decoded.problems;
        self.problems.extend(kept.problems(name, MAX_FINDINGS.saturating_sub(self.problems.len())));
        let mut entries = decoded.objects;
        entries.extend(kept.rejected);
        entries.extend(kept.missing);
        changed.problems = true;
        changed.objects |= !say_the_same(&self.entries, &entries);
        self.entries = entries;
    }

    fn count(&mut self, rejected: &[Rejected]) {
        let before = mem::take(&mut self.faults);
        for Rejected { kind, name, fault, .. } in rejected {
            let fault = (*kind, name.clone(), *fault);
            if !before.contains(&fault) {
                self.rejections.count(kind.map(Kind::as_str), "decode");
            }
            self.faults.insert(fault);
        }
    }

    /// Nothing of it can be read: all that is in use stays.
    fn fail(&mut self, problem: Problem, changed: &mut Changed) {
        let problems = vec![problem];
        changed.problems |= !self.failed || self.problems != problems;
        self.failed = true;
        self.problems = problems;
    }
}

/// True where the file seems to end too early: in the middle of a line, and its last document is wrong. JSON is left
/// out, as a part of it is no JSON.
fn is_cut(bytes: &[u8], decoded: &Decoded) -> bool {
    // Items of a list stand in one document.
    let last_good = decoded.objects.last().map(|entry| (entry.line, entry.item));
    let ends_wrong = decoded.rejected.last().is_some_and(|rejected| Some((rejected.line, rejected.item)) > last_good);
    ends_wrong && !bytes.ends_with(b"\n") && !bytes.trim_ascii_start().starts_with(b"{")
}

/// What stays in use though the file does not say it any more.
#[derive(Debug, Default)]
struct Kept {
    /// The last good versions of objects that are rejected, at the place of these.
    rejected: Vec<Entry>,
    /// Objects that are not found any more, where something is there of which nobody knows what it is.
    missing: Vec<Entry>,
}

impl Kept {
    /// Compares what is in use of a file with what it says now, which may be `cut`.
    fn of(in_use: &[Entry], decoded: &Decoded, cut: bool) -> Self {
        if decoded.rejected.is_empty() {
            return Self::default();
        }
        let said: HashSet<_> = decoded.objects.iter().map(Entry::identity).collect();
        let mut left: BTreeMap<_, &Entry> = BTreeMap::new();
        for entry in in_use.iter().filter(|entry| !said.contains(&entry.identity())) {
            left.entry(entry.identity()).or_insert(entry);
        }
        let last_good = decoded.rejected.iter().filter_map(|rejected| {
            let entry = left.remove(&rejected.identity()?)?;
            Some(Entry { line: rejected.line, item: rejected.item, ..entry.clone() })
        });
        let rejected = last_good.collect();
        let nameless = decoded.rejected.iter().any(|rejected| rejected.identity().is_none());
        let missing = if nameless || cut { left.into_values().cloned().collect() } else { Vec::new() };
        Self { rejected, missing }
    }

    /// Names what stays: one by one as long as there is room.
    fn problems(&self, file: &str, room: usize) -> Vec<Problem> {
        let (named, more) = self.rejected.split_at(self.rejected.len().min(room));
        let last_good = |entry: &Entry| Problem {
            line: Some(entry.line),
            object: entry.label(),
            ..kept_problem(file, "its last good version stays in use until this one is mended".to_owned())
        };
        let mut problems: Vec<_> = named.iter().map(last_good).collect();
        if !more.is_empty() {
            let text = format!("the last good versions of {} objects that are not named here stay in use", more.len());
            problems.push(kept_problem(file, text));
        }
        if !self.missing.is_empty() {
            let text = "that were in use and are not found any more stay in use, as they may be in what cannot be read";
            let text = format!("objects ({}) {text}: {}", self.missing.len(), listed(&self.missing));
            problems.push(kept_problem(file, text));
        }
        problems
    }
}

fn listed(entries: &[Entry]) -> String {
    let (named, more) = entries.split_at(entries.len().min(NAMED));
    let names = named.iter().map(Entry::label).collect::<Vec<_>>().join(", ");
    if more.is_empty() { names } else { format!("{names} and {} more", more.len()) }
}

fn kept_problem(file: &str, message: String) -> Problem {
    file_problem(file, "decode", Severity::Warning, message)
}

impl Entry {
    fn identity(&self) -> (Kind, &ObjectName) {
        (self.kind, &self.name)
    }
}

/// True where the same objects are in use, in whatever order. Of several that have one name the first counts: these
/// are compared in theirs.
fn say_the_same(before: &[Entry], now: &[Entry]) -> bool {
    fn sorted(entries: &[Entry]) -> Vec<&Entry> {
        let mut sorted: Vec<_> = entries.iter().collect();
        sorted.sort_by_key(|entry| entry.identity());
        sorted
    }
    let same = |(a, b): (&Entry, &Entry)| a.identity() == b.identity() && a.content == b.content;
    before.len() == now.len() && sorted(before).into_iter().zip(sorted(now)).all(same)
}

/// Something about a whole file or folder.
pub(crate) fn file_problem(name: &str, reason: &'static str, severity: Severity, message: String) -> Problem {
    let (object, file) = (name.to_owned(), Some(name.to_owned()));
    Problem { object, file, line: None, column: None, reason: reason.into(), message, severity }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use serde_json::json;
    use tempfile::TempDir;

    use super::*;
    use crate::allocate::Ranges;
    use crate::decode::Content;
    use crate::manifest::tests::{folder, messages, names, refresh, service, source};
    use crate::manifest::{self, Input, Reading, Source};

    /// A running source and its only file.
    struct Live {
        folder: TempDir,
        source: Source,
    }

    impl Live {
        fn start(text: &str) -> Self {
            let folder = folder(&[("a.yaml", text)]);
            let mut source = source(&[folder.path().into()]);
            refresh(&mut source);
            Self { folder, source }
        }

        fn edit(&mut self, text: impl AsRef<[u8]>) -> (Changed, Reading) {
            fs::write(self.folder.path().join("a.yaml"), text).expect("a file");
            refresh(&mut self.source)
        }

        /// What `check` and a restart make of the file.
        fn check(&self) -> Reading {
            manifest::read(vec![Input::Path(self.folder.path().into())], Ranges::default())
        }
    }

    fn broken(name: &str) -> String {
        service(name).replace("port: 80", "port: eighty")
    }

    fn slice(service: &str, address: &str) -> String {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {service}-1, labels: {{kubernetes.io/service-name: {service}}}}}\n\
             addressType: IPv4\nports: [{{port: 80}}]\nendpoints: [{{addresses: [{address}]}}]\n---\n"
        )
    }

    /// Services and the addresses of their slices.
    fn addresses(reading: &Reading) -> Vec<String> {
        let told = |slice: &Arc<crate::model::Slice>| format!("{} {}", slice.service.name, slice.endpoints[0].address);
        reading.objects.slices.iter().map(told).collect()
    }

    fn counts(reading: &Reading) -> Vec<String> {
        reading.rejections.iter().map(|(kind, reason, count)| format!("{kind} {reason} {count}")).collect()
    }

    #[test]
    fn f4_given_a_bad_object_from_the_start_when_another_is_deleted_from_its_file_then_it_is_gone() {
        let mut live = Live::start(&(broken("bad") + &service("a") + &service("c")));

        let (changed, reading) = live.edit(broken("bad") + &service("a"));

        assert!(changed.objects);
        assert_eq!(names(&reading.objects), ["a"]);
        assert_eq!(names(&reading.objects), names(&live.check().objects));
        assert_eq!(messages(&reading).len(), 1, "nothing is kept: {:?}", messages(&reading));
    }

    #[test]
    fn f4_given_an_object_that_breaks_when_others_of_its_file_change_then_they_are_as_the_file_has_them_now() {
        let others = |address| service("new") + &slice("new", address);
        let mut live =
            Live::start(&(service("web") + &slice("web", "10.0.0.1") + &others("10.0.0.2") + &service("old")));

        let bad_slice = slice("web", "10.0.0.1").replace("port: 80", "port: eighty");
        let (changed, reading) = live.edit(service("web") + &bad_slice + &others("10.0.0.3") + &service("more"));

        assert!(changed.objects);
        assert_eq!(names(&reading.objects), ["web", "new", "more"]);
        assert_eq!(addresses(&reading), ["new 10.0.0.3", "web 10.0.0.1"]);
        assert_eq!((reading.failed.len(), counts(&reading)), (1, vec!["EndpointSlice decode 1".to_owned()]));
        let kept = reading
            .problems
            .iter()
            .find(|problem| problem.message.contains("last good"))
            .expect("said that it is kept");
        assert_eq!(
            (&*kept.object, kept.line, kept.severity),
            ("EndpointSlice default/web-1", Some(6), Severity::Warning)
        );
        assert_eq!(kept.message, "its last good version stays in use until this one is mended");
        assert_eq!(addresses(&live.check()), ["new 10.0.0.3"], "it is what a restart loses");
    }

    #[test]
    fn f4_given_an_object_that_is_new_and_bad_when_its_file_is_read_then_only_it_is_left_out() {
        let mut live = Live::start(&service("a"));

        let (_, reading) = live.edit(broken("bad") + &service("a").replace("80", "81") + &service("b"));

        assert_eq!(names(&reading.objects), ["a", "b"]);
        assert_eq!(reading.objects.services[0].ports[0].port, 81);
        assert_eq!(messages(&reading).len(), 1, "{:?}", messages(&reading));
    }

    #[test]
    fn f4_given_a_kept_object_when_it_is_mended_or_deleted_then_the_file_counts_again() {
        let mut live = Live::start(&(service("a") + &service("b")));

        let (_, kept) = live.edit(broken("a") + &broken("b"));
        let (mending, mended) = live.edit(service("b") + &service("a"));
        live.edit(broken("a") + &service("b"));
        let (_, deleted) = live.edit(service("b"));

        assert_eq!(names(&kept.objects), ["a", "b"]);
        assert!(!mending.objects, "the same objects are in use all along, whatever their order");
        assert!(mended.problems.is_empty() && mended.failed.is_empty());
        assert_eq!(names(&deleted.objects), ["b"]);
        assert!(deleted.problems.is_empty());
    }

    #[test]
    fn f4_given_a_version_or_kind_that_nobody_knows_when_the_object_has_a_name_then_it_alone_is_kept() {
        let mut live = Live::start(&(service("a") + &service("b")));

        let (_, reading) = live.edit(service("a").replace(" v1", " v2"));

        assert_eq!(names(&reading.objects), ["a"]);
        assert!(messages(&reading)[1].starts_with("its last good version stays"));
    }

    #[test]
    fn f4_given_an_object_that_stays_wrong_when_its_neighbours_change_then_it_is_counted_once() {
        let mut live = Live::start(&(broken("bad") + &service("a")));

        let (_, neighbour) = live.edit(service("b") + &broken("bad"));
        let (_, other) = live.edit(service("b") + &broken("bad").replace("eighty", "ninety"));
        live.edit("kind: [");
        let (_, again) = live.edit("kind: [\n---\n".to_owned() + &service("c"));

        assert_eq!(counts(&neighbour), ["Service decode 1"]);
        assert_eq!(counts(&other), ["Service decode 2"]);
        assert_eq!(counts(&again), ["Service decode 2", "unknown decode 1"]);
    }

    #[test]
    fn f20_t228_given_text_that_is_no_yaml_when_read_then_what_may_be_in_it_stays_and_is_told() {
        let mut live = Live::start(&(service("a") + &service("b") + &service("c")));

        let (changed, reading) = live.edit(service("c").replace("80", "81") + "kind: [\n---\n" + &service("new"));
        let (again, _) = refresh(&mut live.source);
        let (_, mended) = live.edit(service("c"));

        assert_eq!((changed, again), (Changed { objects: true, problems: true }, Changed::default()));
        assert_eq!(names(&reading.objects), ["c", "new", "a", "b"]);
        assert_eq!(reading.objects.services[0].ports[0].port, 81);
        assert!(reading.problems[0].line.is_some() && reading.problems[0].message.starts_with("cannot be read"));
        assert_eq!(
            reading.problems[1].message,
            "objects (2) that were in use and are not found any more stay in use, as they may be in what cannot be read: Service default/a, Service default/b"
        );
        assert_eq!(reading.failed.len(), 1);
        assert_eq!(names(&mended.objects), ["c"]);
        assert!(mended.problems.is_empty() && mended.failed.is_empty());
    }

    #[test]
    fn f20_given_an_object_whose_name_cannot_be_read_when_another_is_missing_then_that_stays() {
        for nameless in ["{name: Web}", "{}", "[]", "{name: a, namespace: 5}"] {
            let mut live = Live::start(&(service("a") + &service("b")));

            let (_, reading) = live.edit(service("a").replace("{name: a}", nameless) + &service("b"));

            assert_eq!(names(&reading.objects), ["b", "a"], "{nameless}");
            assert!(messages(&reading)[1].starts_with("objects (1) that were in use"), "{:?}", messages(&reading));
        }
    }

    #[test]
    fn f20_given_a_file_that_is_cut_in_a_line_when_it_is_read_then_nothing_is_gone_unless_it_reads_as_whole() {
        let text = service("a") + &service("b") + &service("c");
        let in_line = |end: &usize| text.as_bytes()[end - 1] != b'\n';
        for end in (1..text.len()).filter(in_line) {
            let mut live = Live::start(&text);

            let (_, reading) = live.edit(&text[..end]);

            let whole = reading.failed.is_empty();
            assert!(whole || reading.objects.services.len() == 3, "cut at {end}: {:?}", messages(&reading));
        }
    }

    #[test]
    fn f20_given_a_bad_last_object_and_a_last_line_without_end_when_another_is_deleted_then_json_shows_that_it_is_whole()
     {
        let json = |names: &[&str]| {
            let item = |name: &&str| match *name {
                "bad" => json!({"metadata": {"name": "bad"}, "spec": {}}),
                name => json!({"metadata": {"name": name}, "spec": {"ports": [{"port": 80}]}}),
            };
            let items: Vec<_> = names.iter().map(item).collect();
            json!({"apiVersion": "v1", "kind": "ServiceList", "items": items}).to_string()
        };
        let mut live = Live::start(&json(&["a", "b", "bad"]));

        let (_, reading) = live.edit(json(&["a", "bad"]));

        assert_eq!(names(&reading.objects), ["a"]);
    }

    #[test]
    fn f20_given_more_bad_objects_than_are_named_when_read_then_all_are_kept_and_counted() {
        let many: Vec<String> = (0..MAX_FINDINGS + 10).map(|number| format!("a{number}")).collect();
        let mut live = Live::start(&many.iter().map(|name| service(name)).collect::<String>());

        let (changed, reading) = live.edit(many.iter().map(|name| broken(name)).collect::<String>());

        assert!(!changed.objects);
        assert_eq!(reading.objects.services.len(), many.len());
        assert_eq!(counts(&reading), ["Service decode 1010"]);
        assert!(reading.problems.len() <= MAX_FINDINGS + 2);
        assert!(messages(&reading).iter().any(|message| message.contains("1010 objects that are not named here")));
    }

    /// A few documents and damage to their bytes: begin, length and what is put there.
    type Damage = (usize, usize, &'static str);

    fn damage() -> impl Strategy<Value = Damage> {
        let put =
            prop::sample::select(vec!["", "[", "{", "x", "80", "---\n", ": ", "\n", "kind: Service\n", "~", "- "]);
        (any::<usize>(), 0..60_usize, put)
    }

    fn damaged(text: &str, damages: &[Damage]) -> Vec<u8> {
        let mut bytes = text.as_bytes().to_vec();
        for (at, length, put) in damages {
            let at = at % (bytes.len() + 1);
            let end = (at + length).min(bytes.len());
            bytes.splice(at..end, put.bytes());
        }
        bytes
    }

    /// The objects of a file by kind and name; of several the first.
    fn by_identity(entries: &[Entry]) -> BTreeMap<(Kind, ObjectName), Content> {
        let mut all = BTreeMap::new();
        for entry in entries {
            all.entry((entry.kind, entry.name.clone())).or_insert_with(|| entry.content.clone());
        }
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

        #[test]
        fn f4_f20_given_any_edits_of_a_file_when_followed_then_what_is_right_is_used_and_only_what_may_be_meant_is_kept(
            edits in prop::collection::vec(prop::collection::vec(damage(), 0..4), 1..6),
        ) {
            let text = service("a") + &slice("a", "10.0.0.1") + &service("b") + &slice("b", "10.0.0.2") + &service("c");
            let mut file = File::default();
            for damages in edits {
                let before = by_identity(file.entries());
                let bytes = damaged(&text, &damages);
                let decoded = decode(&bytes, "a.yaml");

                file.update(Path::new("a.yaml"), Ok(bytes.clone()), &mut Changed::default());

                if bytes.iter().all(u8::is_ascii_whitespace) {
                    prop_assert_eq!(by_identity(file.entries()), before);
                    continue;
                }
                let mut expected = by_identity(&decoded.objects);
                let nameless = decoded.rejected.iter().any(|rejected| rejected.identity().is_none());
                let nameless = nameless || is_cut(&bytes, &decoded);
                for ((kind, name), content) in before {
                    if nameless || decoded.rejected.iter().any(|rejected| rejected.identity() == Some((kind, &name))) {
                        expected.entry((kind, name)).or_insert(content);
                    }
                }
                prop_assert_eq!(by_identity(file.entries()), expected);
                prop_assert_eq!(file.failed(), !decoded.rejected.is_empty());
            }
        }
    }
}
