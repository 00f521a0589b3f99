//! The static source: manifests in files and folders.
//!
//! Here is which files there are. What is in use of each is `manifest_file`, what all say together `reading`, and how
//! a running relay follows them `follow`.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::allocate::Ranges;
pub use crate::follow::{POLL_INTERVAL, run};
pub use crate::input::{Input, MAX_FILE_BYTES};
use crate::input::{ReadError, STDIN, manifests_in, read_file, read_stdin, read_stream};
use crate::manifest_file::{Changed, File};
use crate::plan::Problem;
pub use crate::reading::Reading;
use crate::rejections::Rejections;
use crate::watch::{Interest, Settling};

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

#[derive(Debug)]
struct Tracked {
    input: Input,
    /// By path: that is the order in which they count.
    files: BTreeMap<PathBuf, File>,
    /// What is wrong with the input itself.
    problem: Option<Problem>,
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
    pub(crate) fn refresh(&mut self, settling: &Settling) -> Changed {
        let mut changed = Changed::default();
        self.inputs.iter_mut().for_each(|tracked| tracked.refresh(settling, &mut changed));
        for file in self.inputs.iter_mut().flat_map(|tracked| tracked.files.values_mut()) {
            self.rejections.add(file.take_rejections());
        }
        changed
    }

    /// What is in use of all files, and what is wrong with them.
    pub fn reading(&self) -> Reading {
        let (mut failed, mut problems, mut files) = (Vec::new(), Vec::new(), Vec::new());
        let mut seen = HashSet::new();
        for tracked in &self.inputs {
            if let Some(problem) = &tracked.problem {
                failed.push(problem.object.clone());
                problems.push(problem.clone());
            }
            for (path, file) in &tracked.files {
                if file.real().is_some_and(|real| !seen.insert(real)) {
                    continue;
                }
                let name = path.to_string_lossy();
                if file.failed() {
                    failed.push(name.clone().into_owned());
                }
                problems.extend(file.problems().iter().cloned());
                files.push((name, file.entries()));
            }
        }
        let mut reading = Reading::of(files.iter().map(|(name, entries)| (&**name, *entries)), &self.ranges);
        reading.problems.splice(0..0, problems);
        (reading.failed, reading.rejections) = (failed, self.rejections.clone());
        reading
    }

    /// The folders in which changes would show.
    pub(crate) fn interest(&self) -> Interest {
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

impl Tracked {
    pub(crate) fn refresh(&mut self, settling: &Settling, changed: &mut Changed) {
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
        let in_use = self.files.values().map(|file| file.entries().len()).sum();
        let problem = problem.err().map(|error| error.problem(&self.name(), in_use));
        if problem.is_some() {
            // What comes back is looked at even if it is the same: it is no longer missing.
            self.files.values_mut().for_each(File::look_again);
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
            changed.objects |= !stays && !file.entries().is_empty();
            changed.problems |= !stays;
            stays
        });
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::PermissionsExt;

    use tempfile::TempDir;
    use tokio::time::Instant;

    use super::*;
    use crate::model::Objects;
    use crate::name::Family;
    use crate::plan::Severity;
    use crate::watch::Sign;

    pub(crate) fn service(name: &str) -> String {
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 80}}]}}\n---\n")
    }

    pub(crate) fn folder(files: &[(&str, &str)]) -> TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        files.iter().for_each(|(name, text)| put(&folder, name, text));
        folder
    }

    pub(crate) fn put(folder: &TempDir, name: &str, text: &str) {
        fs::write(folder.path().join(name), text).expect("a file");
    }

    pub(crate) fn source(paths: &[PathBuf]) -> Source {
        Source::new(paths.iter().cloned().map(Input::Path).collect(), Ranges::default())
    }

    pub(crate) fn refresh(source: &mut Source) -> (Changed, Reading) {
        let changed = source.refresh(&Settling::default());
        (changed, source.reading())
    }

    pub(crate) fn names(objects: &Objects) -> Vec<&str> {
        objects.services.iter().map(|service| &*service.name.name).collect()
    }

    pub(crate) fn messages(reading: &Reading) -> Vec<&str> {
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
