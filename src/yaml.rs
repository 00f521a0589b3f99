//! Manifest text as documents, and documents as fields that take any value.
//!
//! Nothing here fails on a wrong type: a [`Scalar`], [`List`] or [`Object`] keeps what was written, and
//! `decode` says what it should have been. So one look at a document finds all that is wrong with it,
//! and only text that is no YAML or JSON at all is an error. Where a field stands is told by `locate`.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Budget, MessageFormatter, NonFiniteFloatPolicy, Options, UserMessageFormatter};

/// Containers inside each other that a document may have.
const MAX_DEPTH: usize = 64;

/// Nodes of one document: a file at its size cap holds fewer. The parser's default refuses 10,000 Services.
const MAX_NODES: usize = 128 * 1024 * 1024;

/// Events that the aliases of one document may stand for: hand-written manifests stay far below.
const MAX_REPLAYED_EVENTS: usize = 100_000;

/// Text that is neither YAML nor JSON, or breaks the parser's limits.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct SyntaxError {
    /// What the parser wants.
    pub(crate) message: String,
    /// Line in the text given to the parser, from 1.
    pub(crate) line: Option<u64>,
    /// Column in that line, from 1.
    pub(crate) column: Option<u64>,
}

/// One document of a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Document<'t> {
    /// From its first line with content.
    pub(crate) text: &'t str,
    /// That line's number in the file, from 1.
    pub(crate) line: u64,
}

/// Splits at `---` and `...` lines and leaves out documents without content.
///
/// No YAML value can contain such a line at its beginning, so that no value is ever cut. A broken
/// document then stays one broken document, and the parser's limits are per document.
pub(crate) fn documents(text: &str) -> Vec<Document<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut documents = Vec::new();
    let mut open: Option<(usize, u64)> = None;
    let mut offset = 0;
    for (number, line) in (1..).zip(text.split_inclusive('\n')) {
        let start = offset;
        offset += line.len();
        let marked = marker(line);
        if marked.is_some()
            && let Some((from, first)) = open.take()
        {
            documents.push(Document { text: &text[from..start], line: first });
        }
        let ends = marked.is_some_and(|(kind, _)| kind == "...");
        if open.is_none() && !ends && has_content(marked.map_or(line, |(_, rest)| rest)) {
            open = Some((start, number));
        }
    }
    if let Some((from, first)) = open {
        documents.push(Document { text: &text[from..], line: first });
    }
    documents
}

/// A line that begins or ends a document, split behind the marker.
fn marker(line: &str) -> Option<(&str, &str)> {
    let (kind, rest) = line.split_at_checked(3)?;
    let alone = rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']);
    (alone && matches!(kind, "---" | "...")).then_some((kind, rest))
}

/// False for blank lines, comments and directives.
fn has_content(line: &str) -> bool {
    !line.starts_with('%') && !matches!(line.trim_start().chars().next(), None | Some('#'))
}

/// Reads the values of a document: one of YAML, any number of JSON written one after the other.
///
/// Returns what could be read, each with its document, and the error that ended it.
pub(crate) fn read<'t, T: Fields>(document: Document<'t>) -> (Vec<(Document<'t>, Object<T>)>, Option<SyntaxError>) {
    if document.text.trim_start().starts_with('{') {
        let (values, error) = read_json(document);
        match error {
            // Not JSON from its first value on: YAML has braces, too.
            Some(error) if values.is_empty() => match read_yaml(document.text) {
                Ok(value) => (vec![(document, value)], None),
                Err(yaml) => (values, Some(if claims_json(document.text) { error } else { yaml })),
            },
            error => (values, error),
        }
    } else {
        match read_yaml(document.text) {
            Ok(value) => (vec![(document, value)], None),
            Err(error) => (Vec::new(), Some(error)),
        }
    }
}

fn claims_json(text: &str) -> bool {
    text.trim_start().strip_prefix('{').is_some_and(|rest| rest.trim_start().starts_with('"'))
}

fn read_json<'t, T: Fields>(document: Document<'t>) -> (Vec<(Document<'t>, Object<T>)>, Option<SyntaxError>) {
    let mut stream = serde_json::Deserializer::from_str(document.text).into_iter::<Object<T>>();
    let mut values = Vec::new();
    let (mut from, mut line) = (0, document.line);
    loop {
        let blank = document.text[from..].len() - document.text[from..].trim_start().len();
        line += newlines(&document.text[from..from + blank]);
        from += blank;
        match stream.next() {
            None => return (values, None),
            Some(Err(error)) => return (values, Some(json_error(&error))),
            Some(Ok(value)) => {
                let to = stream.byte_offset();
                let text = &document.text[from..to];
                values.push((Document { text, line }, value));
                line += newlines(text);
                from = to;
            }
        }
    }
}

fn newlines(text: &str) -> u64 {
    text.bytes().filter(|byte| *byte == b'\n').count() as u64
}

fn json_error(error: &serde_json::Error) -> SyntaxError {
    let text = error.to_string();
    let message = text.rsplit_once(" at line ").map_or(text.as_str(), |(message, _)| message);
    SyntaxError {
        message: message.to_owned(),
        line: Some(error.line() as u64).filter(|line| *line > 0),
        column: Some((error.column() as u64).max(1)),
    }
}

fn read_yaml<T: Fields>(text: &str) -> Result<Object<T>, SyntaxError> {
    serde_saphyr::from_str_with_options(text, options()).map_err(|error| {
        let error = error.without_snippet();
        let at = error.location().filter(|at| at.line() > 0);
        let message = UserMessageFormatter.format_message(error);
        SyntaxError {
            message: message.replace(char::is_control, " "),
            line: at.map(|at| at.line()),
            column: at.map(|at| at.column().max(1)),
        }
    })
}

/// Limits are explicit: nesting and aliases stay as tight as the parser's defaults, sizes are those of a cluster.
fn options() -> Options {
    let mut budget = Budget::default();
    budget.max_depth = MAX_DEPTH;
    budget.flow_nesting_limit = MAX_DEPTH;
    budget.max_documents = 1;
    budget.max_nodes = MAX_NODES;
    budget.max_events = 2 * MAX_NODES;
    budget.max_total_scalar_bytes = usize::MAX; // The file's size cap is the limit.
    budget.enforce_alias_anchor_ratio = true;
    let mut options = Options::default();
    options.budget = Some(budget);
    options.alias_limits.max_total_replayed_events = MAX_REPLAYED_EVENTS;
    options.emit_comments = false;
    options.with_snippet = false;
    options.non_finite_float_policy = NonFiniteFloatPolicy::AsString;
    options
}

/// A value as it was written, before anybody asks what it should be.
#[derive(Clone, Debug, Default)]
pub(crate) enum Scalar {
    /// The field is not there.
    #[default]
    Absent,
    /// `null`, `~` or nothing behind the colon.
    Null,
    /// `true` or `false`.
    Flag(bool),
    /// A whole number.
    Whole(i64),
    /// Any other number.
    Float(f64),
    /// Text.
    Text(Arc<str>),
    /// `[…]`: its contents are left out.
    List,
    /// `{…}`: its contents are left out.
    Map,
}

impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("nothing"),
            Self::Null => f.write_str("null"),
            Self::Flag(flag) => write!(f, "{flag}"),
            Self::Whole(number) => write!(f, "{number}"),
            Self::Float(number) => write!(f, "{number}"),
            Self::Text(text) => write!(f, "{:?}", shortened(text)),
            Self::List => f.write_str("a list"),
            Self::Map => f.write_str("a mapping"),
        }
    }
}

/// Enough of a value to recognize it, for messages.
fn shortened(text: &str) -> Cow<'_, str> {
    const SHOWN: usize = 60;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]).into(),
        None => text.into(),
    }
}

/// A field that should hold a list.
#[derive(Debug, Default)]
pub(crate) enum List<T> {
    /// Not there, or null: an API server writes empty lists so.
    #[default]
    Empty,
    /// A list.
    Items(Vec<T>),
    /// Something else.
    Wrong(Scalar),
}

/// A field that should hold a mapping.
#[derive(Debug, Default)]
pub(crate) enum Object<T> {
    /// Not there, or null.
    #[default]
    Absent,
    /// A mapping, and its keys that nobody knows.
    Fields(Box<T>, Vec<Box<str>>),
    /// Something else.
    Wrong(Scalar),
}

/// The fields of one kind of mapping. Made by [`fields!`].
pub(crate) trait Fields: Default {
    /// Keys that are read.
    const READ: &'static [&'static str];
    /// Keys of the API that a proxy has no use for.
    const UNUSED: &'static [&'static str];
    /// True where people choose the keys, as in labels.
    const FREE: bool;

    /// Takes the value of a key that is read; false for another key.
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error>;
}

/// Declares a mapping: which keys are read into which field, and which others the API has.
macro_rules! fields {
    ($(#[$doc:meta])* $name:ident { $($key:literal => $field:ident: $type:ty,)* } unused $unused:expr) => {
        fields!($(#[$doc])* $name { $($key => $field: $type,)* } unused $unused, free false);
    };
    ($(#[$doc:meta])* $name:ident { $($key:literal => $field:ident: $type:ty,)* } free) => {
        fields!($(#[$doc])* $name { $($key => $field: $type,)* } unused &[], free true);
    };
    ($(#[$doc:meta])* $name:ident { $($key:literal => $field:ident: $type:ty,)* } unused $unused:expr, free $free:expr) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub(crate) struct $name { $(pub(crate) $field: $type,)* }

        impl $crate::yaml::Fields for $name {
            const READ: &'static [&'static str] = &[$($key),*];
            const UNUSED: &'static [&'static str] = $unused;
            const FREE: bool = $free;

            fn take<'de, A: serde::de::MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
                match key {
                    $($key => self.$field = map.next_value()?,)*
                    _ => return Ok(false),
                }
                Ok(true)
            }
        }
    };
}
pub(crate) use fields;

struct ScalarVisitor;

impl<'de> Visitor<'de> for ScalarVisitor {
    type Value = Scalar;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Scalar, E> {
        Ok(Scalar::Null)
    }

    fn visit_none<E>(self) -> Result<Scalar, E> {
        Ok(Scalar::Null)
    }

    fn visit_bool<E>(self, flag: bool) -> Result<Scalar, E> {
        Ok(Scalar::Flag(flag))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Scalar, E> {
        Ok(Scalar::Whole(number))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Scalar, E> {
        Ok(i64::try_from(number).map_or(Scalar::Float(number as f64), Scalar::Whole))
    }

    fn visit_i128<E>(self, number: i128) -> Result<Scalar, E> {
        Ok(i64::try_from(number).map_or(Scalar::Float(number as f64), Scalar::Whole))
    }

    fn visit_u128<E>(self, number: u128) -> Result<Scalar, E> {
        Ok(i64::try_from(number).map_or(Scalar::Float(number as f64), Scalar::Whole))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Scalar, E> {
        Ok(Scalar::Float(number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Scalar, E> {
        Ok(Scalar::Text(text.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Scalar, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Scalar::List)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Scalar, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Scalar::Map)
    }
}

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ScalarVisitor)
    }
}

/// Forwards what is no container to [`ScalarVisitor`] and judges the outcome with `$other`.
macro_rules! visit_other {
    ($other:expr) => {
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a value")
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(Self::Value::default())
        }

        fn visit_none<E>(self) -> Result<Self::Value, E> {
            Ok(Self::Value::default())
        }

        fn visit_bool<E: serde::de::Error>(self, flag: bool) -> Result<Self::Value, E> {
            ScalarVisitor.visit_bool(flag).map($other)
        }

        fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Self::Value, E> {
            ScalarVisitor.visit_i64(number).map($other)
        }

        fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Self::Value, E> {
            ScalarVisitor.visit_u64(number).map($other)
        }

        fn visit_i128<E: serde::de::Error>(self, number: i128) -> Result<Self::Value, E> {
            ScalarVisitor.visit_i128(number).map($other)
        }

        fn visit_u128<E: serde::de::Error>(self, number: u128) -> Result<Self::Value, E> {
            ScalarVisitor.visit_u128(number).map($other)
        }

        fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<Self::Value, E> {
            ScalarVisitor.visit_f64(number).map($other)
        }

        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
            ScalarVisitor.visit_str(text).map($other)
        }
    };
}

struct ListVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ListVisitor<T> {
    type Value = List<T>;

    visit_other!(List::Wrong);

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<List<T>, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(if items.is_empty() { List::Empty } else { List::Items(items) })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<List<T>, A::Error> {
        ScalarVisitor.visit_map(map).map(List::Wrong)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ListVisitor(PhantomData))
    }
}

struct ObjectVisitor<T>(PhantomData<T>);

impl<'de, T: Fields> Visitor<'de> for ObjectVisitor<T> {
    type Value = Object<T>;

    visit_other!(Object::Wrong);

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Object<T>, A::Error> {
        ScalarVisitor.visit_seq(seq).map(Object::Wrong)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object<T>, A::Error> {
        let mut fields = Box::<T>::default();
        let mut unknown = Vec::new();
        while let Some(Key(key)) = map.next_key()? {
            if fields.take(&key, &mut map)? {
                continue;
            }
            map.next_value::<IgnoredAny>()?;
            if !T::FREE && !T::UNUSED.contains(&&*key) {
                unknown.push(key.into());
            }
        }
        Ok(Object::Fields(fields, unknown))
    }
}

impl<'de, T: Fields> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ObjectVisitor(PhantomData))
    }
}

/// A key of a mapping: YAML also has numbers and `true` there.
struct Key<'de>(Cow<'de, str>);

struct KeyVisitor;

impl<'de> Visitor<'de> for KeyVisitor {
    type Value = Key<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field name")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Key<'de>, E> {
        Ok(Key(text.into()))
    }

    fn visit_str<E>(self, text: &str) -> Result<Key<'de>, E> {
        Ok(Key(text.to_owned().into()))
    }

    fn visit_string<E>(self, text: String) -> Result<Key<'de>, E> {
        Ok(Key(text.into()))
    }

    fn visit_bool<E>(self, flag: bool) -> Result<Key<'de>, E> {
        Ok(Key(flag.to_string().into()))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Key<'de>, E> {
        Ok(Key(number.to_string().into()))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Key<'de>, E> {
        Ok(Key(number.to_string().into()))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Key<'de>, E> {
        Ok(Key(number.to_string().into()))
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Key<'de>, E> {
        Err(E::custom("a field name is missing in front of the colon"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _seq: A) -> Result<Key<'de>, A::Error> {
        Err(A::Error::custom("a list where a field name is wanted"))
    }

    fn visit_map<A: MapAccess<'de>>(self, _map: A) -> Result<Key<'de>, A::Error> {
        Err(A::Error::custom("a mapping where a field name is wanted"))
    }
}

impl<'de> Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(KeyVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fields!(Sample { "port" => port: Scalar, "names" => names: List<Scalar>, } unused &["later"]);

    fn texts(text: &str) -> Vec<(&str, u64)> {
        documents(text).into_iter().map(|document| (document.text, document.line)).collect()
    }

    fn sample(text: &str) -> (Sample, Vec<Box<str>>) {
        let (mut values, error) = read::<Sample>(Document { text, line: 1 });
        assert!(error.is_none(), "{error:?}");
        match values.pop() {
            Some((_, Object::Fields(fields, unknown))) => (*fields, unknown),
            other => panic!("no mapping: {other:?}"),
        }
    }

    #[test]
    fn given_separators_comments_and_ends_when_split_then_only_documents_with_content_remain() {
        let text =
            "# head\n---\n# nothing\n---\na: 1\n...\n%YAML 1.2\n---\n\nb: |\n  ---\n  x\n--- # last\nc: 1\n---\n";

        assert_eq!(texts(text), [("a: 1\n", 5), ("b: |\n  ---\n  x\n", 10), ("c: 1\n", 14)]);
    }

    #[test]
    fn given_byte_order_mark_and_crlf_when_split_then_lines_count_and_markers_are_seen() {
        assert_eq!(texts("\u{feff}a: 1\r\n---\r\nb: 1\r\n"), [("a: 1\r\n", 1), ("b: 1\r\n", 3)]);
    }

    #[test]
    fn given_a_longer_run_of_dashes_when_split_then_it_is_no_separator() {
        assert_eq!(texts("----\nx\n").len(), 1);
        assert_eq!(texts("---x\n").len(), 1);
    }

    #[test]
    fn given_content_behind_the_marker_when_split_then_the_marker_stays_with_it() {
        assert_eq!(texts("--- {port: 1}\n"), [("--- {port: 1}\n", 1)]);
        assert!(matches!(sample("--- {port: 1}\n").0.port, Scalar::Whole(1)));
    }

    #[test]
    fn given_any_value_when_read_then_it_is_kept_as_written() {
        assert!(matches!(sample("port: 80").0.port, Scalar::Whole(80)));
        assert!(matches!(sample("port: 8080.").0.port, Scalar::Float(8080.0)));
        assert!(matches!(sample("port: \"80\"").0.port, Scalar::Text(text) if &*text == "80"));
        assert!(matches!(sample("port: .nan").0.port, Scalar::Text(_)));
        assert!(matches!(sample("port: 99999999999999999999999").0.port, Scalar::Float(_)));
        assert!(matches!(sample("port: [1]").0.port, Scalar::List));
        assert!(matches!(sample("port:").0.port, Scalar::Null));
        assert!(matches!(sample("names: {a: 1}").0.names, List::Wrong(Scalar::Map)));
        assert!(matches!(sample("names: null").0.names, List::Empty));
    }

    #[test]
    fn given_keys_of_the_api_and_others_when_read_then_only_the_others_are_unknown() {
        let (_, unknown) = sample("later: {x: [1]}\nsooner: 1\n8: 1\n");

        assert_eq!(unknown, ["sooner".into(), Box::<str>::from("8")]);
    }

    #[test]
    fn given_json_values_in_a_row_when_read_then_each_has_its_line() {
        let text = "{\"port\": 1}\n\n{\n\"port\": 2}\n";

        let (values, error) = read::<Sample>(Document { text, line: 10 });

        assert!(error.is_none());
        assert_eq!(values.iter().map(|(document, _)| document.line).collect::<Vec<_>>(), [10, 12]);
    }

    #[test]
    fn given_braces_that_are_yaml_when_read_then_yaml_reads_them() {
        assert!(matches!(sample("{port: 3, }").0.port, Scalar::Whole(3)));
    }

    #[test]
    fn given_broken_text_when_read_then_the_error_has_a_place() {
        let (_, yaml) = read::<Sample>(Document { text: "port: 1\nnames: [a\n", line: 1 });
        let (_, json) = read::<Sample>(Document { text: "{\"port\": 1,\n \"names\" 2}", line: 1 });
        let (_, twice) = read::<Sample>(Document { text: "port: 1\nport: 2\n", line: 1 });

        assert!(yaml.is_some_and(|error| error.line.is_some()));
        assert_eq!(json.and_then(|error| error.line), Some(2));
        let twice = twice.expect("the same key twice is an error");
        assert_eq!((twice.line, twice.column), (Some(2), Some(1)));
        assert!(twice.message.contains("port"), "{}", twice.message);
    }

    #[test]
    fn given_an_alias_bomb_when_read_then_it_is_refused() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..9 {
            let inner = format!("*a{}, ", level - 1).repeat(10);
            text.push_str(&format!("a{level}: &a{level} [{inner}]\n"));
        }
        text.push_str("names: *a8\n");

        let (_, error) = read::<Sample>(Document { text: &text, line: 1 });

        assert!(error.is_some());
    }

    #[test]
    fn given_deep_nesting_when_read_then_it_is_refused() {
        let (_, flow) = read::<Sample>(Document { text: &format!("names: {}", "[".repeat(100_000)), line: 1 });
        let (_, json) = read::<Sample>(Document { text: &format!("{{\"a\":{}", "[".repeat(100_000)), line: 1 });

        assert!(flow.is_some() && json.is_some());
    }
}
