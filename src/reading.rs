//! What all inputs say together at one moment, and which of two objects of one name counts.
//!
//! Pure: what is in use of each file is `manifest_file`.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::allocate::{self, Ranges};
use crate::decode::{Content, Entry, Kind};
use crate::findings::MAX_FINDINGS;
use crate::hints;
use crate::manifest_file::file_problem;
use crate::model::{ClusterIps, Objects, Service, ServiceKind, Slice};
use crate::name::ObjectName;
use crate::plan::{Problem, Severity};
use crate::rejections::Rejections;
use crate::scaffold;

/// The first object of each kind and name, and the file that it is in.
type Places<'a> = HashMap<(Kind, &'a ObjectName), (&'a str, &'a Entry)>;

/// What the inputs say at one moment.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// The objects in use, with addresses for those that name none.
    pub objects: Objects,
    /// Slices with the label `service.kubernetes.io/headless`: no proxy looks at them, DNS does.
    pub headless_slices: Vec<Arc<Slice>>,
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
    /// Merges what is in use of each file, named in the order in which they count: of two objects of one name the
    /// first is used.
    pub(crate) fn of<'a>(files: impl Iterator<Item = (&'a str, &'a [Entry])>, ranges: &Ranges) -> Self {
        let mut reading = Self::default();
        let mut places = Places::new();
        for (file, entries) in files {
            reading.take(file, entries, &mut places);
        }
        let services = places.iter().filter(|((kind, _), _)| *kind == Kind::Service);
        reading.places =
            services.map(|((_, name), (file, entry))| ((*name).clone(), ((*file).to_owned(), entry.line))).collect();
        reading.complete(ranges);
        reading.problems.extend(idle(&reading.objects, places.values().copied()));
        reading.shorten();
        reading
    }

    fn take<'a>(&mut self, file: &'a str, entries: &'a [Entry], places: &mut Places<'a>) {
        for entry in entries {
            match places.get(&(entry.kind, &entry.name)) {
                None => {
                    places.insert((entry.kind, &entry.name), (file, entry));
                    self.objects.add(&entry.content);
                    self.headless_slices.extend(entry.headless.clone());
                }
                Some((first, other)) => self.problems.push(conflict(entry, file, other, first)),
            }
        }
    }

    /// Adds what an API server and its controllers would add.
    fn complete(&mut self, ranges: &Ranges) {
        let mut told = allocate::fill(&mut self.objects.services, ranges);
        hints::write(&self.objects.services, &mut self.objects.slices);
        told.extend(unfed(&self.objects).into_iter().map(|service| scaffold::missing_slice(service)));
        told.iter_mut().for_each(|problem| self.locate(problem));
        self.problems.extend(told);
    }

    fn shorten(&mut self) {
        let more = self.problems.len().saturating_sub(MAX_FINDINGS);
        self.problems.truncate(MAX_FINDINGS);
        if more > 0 {
            let text = format!("{more} more findings like the last ones");
            self.problems.push(file_problem("manifests", "decode", Severity::Warning, text));
        }
    }

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

impl Objects {
    /// Adds what an object says.
    pub(crate) fn add(&mut self, content: &Content) {
        match content {
            Content::Service(service) => self.services.push(Arc::clone(service)),
            Content::Slices(slices) => self.slices.extend(slices.iter().cloned()),
        }
    }
}

impl Entry {
    fn place(&self, file: &str) -> String {
        match self.item {
            Some(item) => format!("{file}:{} (items[{item}])", self.line),
            None => format!("{file}:{}", self.line),
        }
    }
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
            && !service.slices_hidden
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
