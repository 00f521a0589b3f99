//! Where a field of a document stands: field path in, line and column out.
//!
//! Decoding keeps no positions, since almost every document is right. Only when something was found is
//! the text walked once more, for the places of all findings together.

use std::collections::HashMap;
use std::fmt;

use serde_saphyr::granit_parser::{Event, Options, Parser, Span, StrInput};

/// One step from a value to a value inside it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    /// Into a mapping.
    Key(Box<str>),
    /// Into a list, from 0.
    Index(usize),
}

/// The way from a document or an object to one of its fields: `spec.ports[0].nodePort`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Path(pub(crate) Vec<Step>);

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, step) in self.0.iter().enumerate() {
            match step {
                Step::Index(index) => write!(f, "[{index}]")?,
                Step::Key(key) if key.contains(['.', '/']) => write!(f, "[{key}]")?,
                Step::Key(key) if position == 0 => f.write_str(key)?,
                Step::Key(key) => write!(f, ".{key}")?,
            }
        }
        Ok(())
    }
}

/// A way that is still being gone: a chain on the stack, so that it costs nothing where nothing is found.
#[derive(Clone, Copy, Debug)]
pub(crate) enum At<'a> {
    /// The document or object itself.
    Root,
    /// A key of a mapping.
    Key(&'a At<'a>, &'a str),
    /// An entry of a list.
    Index(&'a At<'a>, usize),
    /// The way so far led to an object in a `List`: its fields are named from here.
    Object(&'a At<'a>),
}

impl<'a> At<'a> {
    /// One key further.
    pub(crate) fn key(&'a self, key: &'a str) -> At<'a> {
        At::Key(self, key)
    }

    /// One list entry further.
    pub(crate) fn index(&'a self, index: usize) -> At<'a> {
        At::Index(self, index)
    }

    /// The whole way from the document, as [`locate`] wants it.
    pub(crate) fn path(&self) -> Path {
        self.steps(false)
    }

    /// The way from the object, as people read it.
    pub(crate) fn field(&self) -> Path {
        self.steps(true)
    }

    fn steps(&self, of_object: bool) -> Path {
        let mut steps = Vec::new();
        let mut at = self;
        loop {
            at = match at {
                At::Root => break,
                At::Object(_) if of_object => break,
                At::Object(outer) => outer,
                At::Key(outer, key) => {
                    steps.push(Step::Key((*key).into()));
                    outer
                }
                At::Index(outer, index) => {
                    steps.push(Step::Index(*index));
                    outer
                }
            };
        }
        steps.reverse();
        Path(steps)
    }
}

/// A place in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// From 1.
    pub(crate) line: u64,
    /// From 1, in characters.
    pub(crate) column: u64,
}

/// A field whose place is wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'p> {
    /// Which field.
    pub(crate) path: &'p Path,
    /// Its name's place instead of its value's.
    pub(crate) name: bool,
}

/// Finds the places of fields, or of what is nearest around them.
///
/// `text` is one document that has been read before, so that the parser's limits were kept.
pub(crate) fn locate(text: &str, wanted: &[Wanted<'_>]) -> Vec<Option<Place>> {
    #[cfg(test)]
    WALKS.set(WALKS.get() + 1);
    let mut options = Options::default();
    options.emit_comments = false;
    let parser = Parser::new_from_str_with_options(text, options);
    let mut walk = Walk { parser, wanted, places: vec![None; wanted.len()] };
    // It ends early where the text is JSON that YAML cannot read: what was found stands.
    let _ = walk.document();
    walk.places
}

#[cfg(test)]
thread_local! {
    /// How often this thread has walked a text.
    pub(crate) static WALKS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

struct Walk<'t, 'w> {
    parser: Parser<'t, StrInput<'t>>,
    wanted: &'w [Wanted<'w>],
    places: Vec<Option<Place>>,
}

impl<'t, 'w> Walk<'t, 'w> {
    fn document(&mut self) -> Option<()> {
        loop {
            let (event, span) = self.next()?;
            if event.is_node() {
                let all: Vec<usize> = (0..self.wanted.len()).collect();
                return self.node(event, span, 0, &all);
            }
        }
    }

    fn next(&mut self) -> Option<(Event<'t>, Span)> {
        self.parser.next_event()?.ok()
    }

    /// Walks a value that the fields `here` go through or end at.
    fn node(&mut self, event: Event<'t>, span: Span, depth: usize, here: &[usize]) -> Option<()> {
        // Nothing behind the colon has a place, but none that anybody would look at.
        let empty = matches!(event, Event::Scalar(..)) && span.is_empty();
        for &index in here {
            let Wanted { path, name } = self.wanted[index];
            let keeps_name = self.places[index].is_some() && (empty || name && path.0.len() == depth);
            if !keeps_name {
                self.places[index] = Some(place(&span));
            }
        }
        match event {
            Event::MappingStart(..) => self.mapping(depth, here),
            Event::SequenceStart(..) => self.sequence(depth, here),
            _ => Some(()),
        }
    }

    fn mapping(&mut self, depth: usize, here: &[usize]) -> Option<()> {
        let inside = self.group(depth, here);
        loop {
            let (event, span) = self.next()?;
            let key = match event {
                Event::MappingEnd => return Some(()),
                Event::Scalar(key, ..) => Some(key),
                other => {
                    self.skip(other)?;
                    None
                }
            };
            let matching = key.and_then(|key| inside.get(&Step::Key((*key).into())));
            for &index in matching.into_iter().flatten() {
                self.places[index] = Some(place(&span));
            }
            self.value(depth, matching)?;
        }
    }

    fn sequence(&mut self, depth: usize, here: &[usize]) -> Option<()> {
        let inside = self.group(depth, here);
        for index in 0.. {
            let (event, span) = self.next()?;
            if event == Event::SequenceEnd {
                break;
            }
            match inside.get(&Step::Index(index)) {
                Some(matching) => self.node(event, span, depth + 1, matching)?,
                None => self.skip(event)?,
            }
        }
        Some(())
    }

    fn value(&mut self, depth: usize, matching: Option<&Vec<usize>>) -> Option<()> {
        let (event, span) = self.next()?;
        match matching {
            Some(matching) => self.node(event, span, depth + 1, matching),
            None => self.skip(event),
        }
    }

    /// Sorts fields by their next step.
    fn group(&self, depth: usize, here: &[usize]) -> HashMap<&'w Step, Vec<usize>> {
        let mut inside = HashMap::<_, Vec<usize>>::new();
        for &index in here {
            if let Some(step) = self.wanted[index].path.0.get(depth) {
                inside.entry(step).or_default().push(index);
            }
        }
        inside
    }

    fn skip(&mut self, first: Event<'t>) -> Option<()> {
        let mut open = opens(&first);
        while open > 0 {
            open += opens(&self.next()?.0);
        }
        Some(())
    }
}

fn opens(event: &Event<'_>) -> i64 {
    match event {
        Event::MappingStart(..) | Event::SequenceStart(..) => 1,
        Event::MappingEnd | Event::SequenceEnd => -1,
        _ => 0,
    }
}

fn place(span: &Span) -> Place {
    Place { line: span.start.line() as u64, column: span.start.col() as u64 + 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "kind: Service\nspec:\n  ports:\n  - name: http # note\n    port: eighty\n  - {port: 1, nodeport: 2}\n  empty:\n";

    fn find(at: At<'_>, name: bool) -> (u64, u64) {
        let path = at.path();
        let place = locate(TEXT, &[Wanted { path: &path, name }])[0].expect("a place");
        (place.line, place.column)
    }

    #[test]
    fn given_a_path_when_located_then_value_and_name_have_their_places() {
        let (root, spec) = (At::Root, At::Root.key("spec"));
        let ports = spec.key("ports");
        let (first, second) = (ports.index(0), ports.index(1));

        assert_eq!(find(first.key("port"), false), (5, 11));
        assert_eq!(find(first.key("port"), true), (5, 5));
        assert_eq!(find(second.key("nodeport"), true), (6, 15));
        assert_eq!(find(spec.key("empty"), false), (7, 3));
        assert_eq!(find(root.key("kind"), false), (1, 7));
    }

    #[test]
    fn given_a_field_that_is_not_there_when_located_then_the_nearest_around_it_is_told() {
        let spec = At::Root.key("spec");
        let ports = spec.key("ports");
        let first = ports.index(0);

        assert_eq!(find(first.key("targetPort"), false), (4, 5));
    }

    #[test]
    fn given_a_path_when_printed_then_it_reads_as_kubectl_writes_it() {
        let spec = At::Root.key("spec");
        let ports = spec.key("ports");
        let first = ports.index(0);
        let metadata = At::Root.key("metadata");
        let annotations = metadata.key("annotations");

        assert_eq!(first.key("nodePort").path().to_string(), "spec.ports[0].nodePort");
        assert_eq!(annotations.key("a.b/c").path().to_string(), "metadata.annotations[a.b/c]");
    }

    #[test]
    fn given_text_that_ends_early_when_located_then_nothing_panics() {
        let spec = At::Root.key("spec");
        let path = spec.key("x").path();

        assert_eq!(locate("spec: [", &[Wanted { path: &path, name: false }]).len(), 1);
        assert_eq!(locate("", &[Wanted { path: &path, name: false }]), [None]);
    }
}
