//! What an API server says of one kind of object, and what of it is in use: pure, fed by the watch of `kubernetes`.
//!
//! A list is gathered aside and takes the place of the old state as a whole. An object that cannot be used keeps its last
//! good version, and is told once for each of its versions.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::SystemTime;

use crate::decode::{Content, Kind, Observed};
use crate::model::{Event, Objects};
use crate::name::ObjectName;
use crate::plan::{Problem, Severity};
use crate::rejections::Rejections;

/// The objects of one kind. Owned by the task of the source; contents are shared with the model.
#[derive(Debug)]
pub(crate) struct Mirror {
    kind: Kind,
    objects: HashMap<ObjectName, Content>,
    /// What is being listed, until the list is complete.
    arriving: Option<Arriving>,
    flaws: BTreeMap<ObjectName, Flaw>,
    /// Since the start: what was mended counts on.
    pub(crate) rejections: Rejections,
    /// True where what is wrong changed since somebody asked.
    news: bool,
    /// When what was taken since somebody asked had come about, as far as it is told.
    triggers: Vec<SystemTime>,
}

/// What is wrong with an object.
#[derive(Debug, PartialEq, Eq)]
struct Flaw {
    version: Arc<str>,
    problems: Vec<Problem>,
}

/// A list that is not complete yet.
#[derive(Debug, Default)]
struct Arriving {
    objects: HashMap<ObjectName, Content>,
    flaws: BTreeMap<ObjectName, Flaw>,
    changed: bool,
    triggers: Vec<SystemTime>,
}

impl Mirror {
    pub(crate) fn new(kind: Kind) -> Self {
        let (objects, flaws, rejections, triggers) = Default::default();
        Self { kind, objects, arriving: None, flaws, rejections, news: false, triggers }
    }

    /// Another kind says the same from now on. What is in use stays until its first list is complete.
    pub(crate) fn turn_to(&mut self, kind: Kind) {
        (self.kind, self.arriving) = (kind, None);
    }

    /// True while a list is not complete.
    pub(crate) fn is_arriving(&self) -> bool {
        self.arriving.is_some()
    }

    /// A list begins. One that was broken off is forgotten.
    pub(crate) fn begin(&mut self) {
        self.arriving = Some(Arriving::default());
    }

    /// An object of the list. What is the same as before is shared with it.
    pub(crate) fn list(&mut self, observed: Observed) {
        let triggered = observed.triggered;
        let Some((name, content, flaw)) = self.judge(observed) else { return };
        let arriving = self.arriving.get_or_insert_default();
        let known = self.objects.get(&name);
        let content = match (known, content) {
            (Some(known), None) => Some(known.clone()),
            (Some(known), Some(new)) if *known == new => Some(known.clone()),
            (_, new) => {
                arriving.changed |= new.is_some();
                arriving.triggers.extend(triggered.filter(|_| new.is_some()));
                new
            }
        };
        if let Some(flaw) = flaw {
            arriving.flaws.insert(name.clone(), flaw);
        }
        if let Some(content) = content {
            arriving.objects.insert(name, content);
        }
    }

    /// The list is complete: what is not in it is gone. True where the objects in use changed.
    pub(crate) fn complete(&mut self) -> bool {
        let Some(mut arrived) = self.arriving.take() else { return false };
        // An object that stayed or came is in the list; so whoever went shows in the number of those that stayed.
        let gone = self.objects.keys().any(|name| !arrived.objects.contains_key(name));
        arrived.objects.shrink_to_fit();
        self.objects = arrived.objects;
        self.triggers.append(&mut arrived.triggers);
        self.news |= self.flaws != arrived.flaws;
        self.flaws = arrived.flaws;
        arrived.changed || gone
    }

    /// One object was added or changed: what the model is to hear, nothing where it says the same as before.
    pub(crate) fn put(&mut self, observed: Observed) -> Vec<Event> {
        let triggered = observed.triggered;
        let Some((name, content, flaw)) = self.judge(observed) else { return Vec::new() };
        self.news |= flaw.is_some() || self.flaws.contains_key(&name);
        match flaw {
            Some(flaw) => drop(self.flaws.insert(name.clone(), flaw)),
            None => drop(self.flaws.remove(&name)),
        }
        match content {
            Some(content) if self.objects.get(&name) != Some(&content) => {
                self.triggers.extend(triggered);
                let before = self.objects.insert(name, content.clone());
                let mut events = before.map_or(Vec::new(), |before| leavers(&before, &content));
                events.extend(arrivals(content));
                events
            }
            _ => Vec::new(),
        }
    }

    /// One object is gone: what the model is to hear.
    pub(crate) fn remove(&mut self, name: &ObjectName) -> Vec<Event> {
        self.news |= self.flaws.remove(name).is_some();
        self.objects.remove(name).map_or(Vec::new(), |content| leavers(&content, &Content::Slices(Box::default())))
    }

    /// Adds the objects in use.
    pub(crate) fn add_to(&self, objects: &mut Objects) {
        self.objects.values().for_each(|content| objects.add(content));
    }

    /// The kind.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// How many objects are in use.
    pub(crate) fn len(&self) -> usize {
        self.objects.len()
    }

    /// What is wrong with objects of this kind now.
    pub(crate) fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.flaws.values().flat_map(|flaw| &flaw.problems)
    }

    /// When the changes that were taken since the last call had come about. A deletion has no time.
    pub(crate) fn take_triggers(&mut self) -> Vec<SystemTime> {
        std::mem::take(&mut self.triggers)
    }

    /// True where what is wrong changed since the last call.
    pub(crate) fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    /// Name, what of it can be used, and what is wrong with it. `None` for an object without a name.
    fn judge(&mut self, observed: Observed) -> Option<(ObjectName, Option<Content>, Option<Flaw>)> {
        let Observed { name, version, content, problems, .. } = observed;
        let known = name.as_ref().and_then(|name| self.flaws.get(name)).is_some_and(|flaw| flaw.version == version);
        if content.is_none() && !known {
            self.rejections.count(Some(self.kind.as_str()), "decode");
            self.news = true;
        }
        let flaw = (content.is_none() || problems.iter().any(|problem| problem.severity > Severity::Note))
            .then_some(Flaw { version, problems });
        Some((name?, content, flaw))
    }
}

/// What the model is to forget of an object that was `before` and is `now`.
fn leavers(before: &Content, now: &Content) -> Vec<Event> {
    match (before, now) {
        (Content::Service(before), Content::Slices(_)) => vec![Event::DeleteService(before.name.clone())],
        (Content::Slices(before), Content::Slices(now)) => {
            let stays = |name| now.iter().any(|slice| slice.name == name);
            before
                .iter()
                .map(|slice| slice.name.clone())
                .filter(|name| !stays(name.clone()))
                .map(Event::DeleteSlice)
                .collect()
        }
        (_, Content::Service(_)) => Vec::new(),
    }
}

fn arrivals(content: Content) -> Vec<Event> {
    match content {
        Content::Service(service) => vec![Event::ApplyService(service)],
        Content::Slices(slices) => slices.into_iter().map(Event::ApplySlice).collect(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::model::SliceName;

    fn service(name: &str, port: impl Into<Value>) -> Observed {
        let object = json!({
            "metadata": {"name": name, "namespace": "default", "resourceVersion": "7"},
            "spec": {"clusterIP": "10.96.0.9", "ports": [{"port": port.into()}], "fieldOfTomorrow": 1},
        });
        Observed::deserialize(object, Kind::Service).expect("an object")
    }

    /// Services with these names and ports, listed.
    fn listed(mirror: &mut Mirror, services: &[(&str, i32)]) -> bool {
        mirror.begin();
        services.iter().for_each(|(name, port)| mirror.list(service(name, *port)));
        mirror.complete()
    }

    fn in_use(mirror: &Mirror) -> Vec<(String, u16)> {
        let mut objects = Objects::default();
        mirror.add_to(&mut objects);
        let mut all: Vec<_> =
            objects.services.iter().map(|service| (service.name.name.to_string(), service.ports[0].port)).collect();
        all.sort();
        all
    }

    #[test]
    fn t225_given_a_relist_when_nothing_or_something_changed_then_that_is_told_and_it_counts_as_a_whole() {
        let mut mirror = Mirror::new(Kind::Service);
        assert!(listed(&mut mirror, &[("a", 1), ("b", 2)]));
        assert!(!listed(&mut mirror, &[("b", 2), ("a", 1)]), "the same");

        mirror.begin();
        mirror.list(service("a", 3));
        assert_eq!(in_use(&mirror), [("a".into(), 1), ("b".into(), 2)], "not before the list is complete");

        assert!(mirror.complete());
        assert_eq!(in_use(&mirror), [("a".into(), 3)], "deleted while we were away");
    }

    #[test]
    fn f3_given_a_list_that_breaks_off_when_another_is_complete_then_only_that_counts() {
        let mut mirror = Mirror::new(Kind::Service);
        listed(&mut mirror, &[("a", 1)]);
        mirror.begin();
        mirror.list(service("b", 2));

        assert!(!listed(&mut mirror, &[("a", 1)]));

        assert_eq!(in_use(&mirror), [("a".into(), 1)]);
    }

    #[test]
    fn t009_given_an_object_when_it_comes_again_unchanged_then_the_model_hears_nothing() {
        let mut mirror = Mirror::new(Kind::Service);

        assert_eq!(mirror.put(service("a", 1)).len(), 1);
        assert!(mirror.put(service("a", 1)).is_empty());
        assert!(matches!(mirror.remove(&ObjectName::parse("default/a"))[..], [Event::DeleteService(_)]));
        assert!(mirror.remove(&ObjectName::parse("default/a")).is_empty());
    }

    #[test]
    fn t064_given_the_time_of_a_change_when_endpoints_are_taken_then_each_change_has_it_once_and_nothing_else_does() {
        let slice = |address: &str, time: Value| {
            let labels = json!({"kubernetes.io/service-name": "web"});
            let annotations = json!({"endpoints.kubernetes.io/last-change-trigger-time": time});
            let object = json!({
                "metadata": {"name": "web-1", "labels": labels, "annotations": annotations},
                "addressType": "IPv4", "endpoints": [{"addresses": [address]}], "ports": [{"port": 80}],
            });
            Observed::deserialize(object, Kind::EndpointSlice).expect("an object")
        };
        let mut mirror = Mirror::new(Kind::EndpointSlice);
        let at = |seconds| SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(seconds);

        mirror.put(slice("10.0.0.1", "1970-01-01T00:00:01.5Z".into()));
        assert_eq!(mirror.take_triggers(), [at(1_500)]);
        mirror.put(slice("10.0.0.1", "1970-01-01T00:00:02Z".into()));
        assert!(mirror.take_triggers().is_empty(), "nothing changed");
        for wrong in [Value::Null, 5.into(), "yesterday".into()] {
            mirror.put(slice("10.0.0.2", wrong));
            mirror.put(slice("10.0.0.1", Value::Null));
            assert!(mirror.take_triggers().is_empty());
        }
        mirror.begin();
        mirror.list(slice("10.0.0.3", "1970-01-01T00:00:03Z".into()));
        assert!(mirror.take_triggers().is_empty(), "not before the list is complete");
        mirror.complete();
        assert_eq!(mirror.take_triggers(), [at(3_000)]);
    }

    #[test]
    fn f4_given_a_bad_version_of_an_object_when_it_comes_then_the_last_good_one_stays_and_it_counts_once() {
        let mut mirror = Mirror::new(Kind::Service);
        mirror.put(service("a", 1));

        assert!(mirror.put(service("a", "x")).is_empty());
        mirror.begin();
        mirror.list(service("a", "x"));
        mirror.list(service("b", 2));
        assert!(mirror.complete());

        assert_eq!(in_use(&mirror), [("a".into(), 1), ("b".into(), 2)]);
        assert_eq!(mirror.rejections.iter().collect::<Vec<_>>(), [("Service", "decode", 1)]);
        let problems: Vec<_> = mirror.problems().collect();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].object == "Service default/a" && problems[0].message.contains("spec.ports[0].port"));
        assert!(mirror.take_news());

        mirror.put(service("a", 3));
        assert!(mirror.take_news() && mirror.problems().next().is_none(), "mended");
    }

    #[test]
    fn f4_given_an_object_without_a_name_when_it_comes_then_it_is_counted_and_passed_over() {
        let mut mirror = Mirror::new(Kind::Service);
        let nameless = Observed::deserialize(json!({"metadata": 5}), Kind::Service).expect("an object");

        assert!(mirror.put(nameless).is_empty());

        assert_eq!(mirror.rejections.iter().count(), 1);
    }

    #[test]
    fn t229_given_slices_when_endpoints_take_their_place_then_they_stay_until_these_are_listed() {
        let slice = json!({
            "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv4",
            "endpoints": [{"addresses": ["10.0.0.1"]}], "ports": [{"port": 80}],
        });
        let endpoints = json!({"metadata": {"name": "web"}, "subsets": [{"addresses": [{"ip": "10.0.0.1"}], "ports": [{"port": 80}]}]});
        let mut mirror = Mirror::new(Kind::EndpointSlice);
        mirror.put(Observed::deserialize(slice, Kind::EndpointSlice).expect("an object"));

        mirror.turn_to(Kind::Endpoints);
        mirror.begin();
        mirror.list(Observed::deserialize(endpoints, Kind::Endpoints).expect("an object"));
        let slices = |mirror: &Mirror| {
            let mut objects = Objects::default();
            mirror.add_to(&mut objects);
            objects.slices.iter().map(|slice| slice.name.clone()).collect::<Vec<_>>()
        };
        assert!(matches!(slices(&mirror)[..], [SliceName::EndpointSlice(_)]));

        assert!(mirror.complete());
        assert!(matches!(slices(&mirror)[..], [SliceName::Endpoints(..)]));
    }

    #[test]
    fn t229_given_an_endpoints_object_when_a_subset_goes_then_its_slice_is_deleted() {
        let endpoints = |subsets: Value| {
            let object = json!({"metadata": {"name": "db"}, "subsets": subsets});
            Observed::deserialize(object, Kind::Endpoints).expect("an object")
        };
        let subset = |port: u16| json!({"addresses": [{"ip": "10.0.0.1"}], "ports": [{"port": port}]});
        let mut mirror = Mirror::new(Kind::Endpoints);
        assert_eq!(mirror.put(endpoints(json!([subset(1), subset(2)]))).len(), 2);

        let events = mirror.put(endpoints(json!([subset(1)])));

        assert!(matches!(events[..], [Event::DeleteSlice(_), Event::ApplySlice(_)]), "{events:?}");
    }
}
