//! A large JSON list cut into its items, so that several threads can read it and no item waits in memory for the last.
//!
//! Nothing is judged here: brackets and quotes are counted, and whoever reads the pieces finds what is wrong with them.

/// All that JSON has between its tokens: less than Rust and YAML call blank.
const BLANKS: [char; 4] = [' ', '\t', '\n', '\r'];

/// A list, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Cut<'t> {
    /// All of the text but the items: the list as if it had none.
    pub(crate) envelope: String,
    /// What stands between the commas.
    pub(crate) items: Vec<&'t str>,
}

/// Cuts the array that the outermost mapping has under the key `items`; `None` where there is not exactly one, and where
/// a key is spelled with a `\`, as it may be another one of that name.
///
/// From text that is no JSON come pieces that are none.
pub(crate) fn cut(text: &str) -> Option<Cut<'_>> {
    let mut scan = Scan { bytes: text.as_bytes(), at: 0 };
    let mut array = None;
    scan.expect(b'{')?;
    loop {
        let key = text[scan.value(b":")?].trim_matches(BLANKS);
        scan.expect(b':')?;
        scan.skip_blanks();
        if key.contains('\\') {
            return None;
        } else if key != "\"items\"" {
            scan.value(b",}")?;
        } else if array.is_some() {
            return None;
        } else {
            let from = scan.at;
            let items = scan.items(text)?;
            array = Some((from..scan.at, items));
        }
        if scan.next()? == b'}' {
            break;
        }
    }
    let (array, items) = array?;
    let envelope = [&text[..array.start], "[]", &text[array.end..]].concat();
    Some(Cut { envelope, items })
}

struct Scan<'t> {
    bytes: &'t [u8],
    at: usize,
}

impl Scan<'_> {
    /// The items of the array that begins here.
    fn items<'t>(&mut self, text: &'t str) -> Option<Vec<&'t str>> {
        self.expect(b'[')?;
        let mut items = Vec::new();
        loop {
            let item = text[self.value(b",]")?].trim_matches(BLANKS);
            let last = self.next()? == b']';
            if !(last && items.is_empty() && item.is_empty()) {
                items.push(item);
            }
            if last {
                self.skip_blanks();
                return Some(items);
            }
        }
    }

    /// Everything up to one of these bytes that is neither in quotes nor in brackets.
    fn value(&mut self, ends: &[u8]) -> Option<std::ops::Range<usize>> {
        let (from, mut depth) = (self.at, 0_usize);
        loop {
            let byte = *self.bytes.get(self.at)?;
            match byte {
                _ if depth == 0 && ends.contains(&byte) => return Some(from..self.at),
                b'"' => self.skip_text()?,
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth = depth.checked_sub(1)?,
                _ => {}
            }
            self.at += 1;
        }
    }

    /// From a quote to the one that closes it.
    fn skip_text(&mut self) -> Option<()> {
        loop {
            self.at += 1;
            match self.bytes.get(self.at)? {
                b'"' => return Some(()),
                b'\\' => self.at += 1,
                _ => {}
            }
        }
    }

    fn skip_blanks(&mut self) {
        self.at += self.bytes[self.at..].iter().take_while(|byte| BLANKS.contains(&char::from(**byte))).count();
    }

    fn expect(&mut self, wanted: u8) -> Option<()> {
        self.skip_blanks();
        (self.next()? == wanted).then_some(())
    }

    fn next(&mut self) -> Option<u8> {
        let byte = self.bytes.get(self.at).copied();
        self.at += 1;
        byte
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn items(text: &str) -> Option<Vec<&str>> {
        cut(text).map(|cut| cut.items)
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let text = "[a-z\\\\\"{}\\[\\],: é]{0,6}";
        let leaf = prop_oneof![any::<i32>().prop_map(Value::from), text.prop_map(Value::from)];
        leaf.prop_recursive(3, 16, 4, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((text, inner), 0..4)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn given_any_list_when_cut_then_each_piece_is_an_item_and_the_envelope_the_rest(
            list in prop::collection::vec(any_json(), 0..6), other in any_json(), pretty in any::<bool>(),
        ) {
            let whole = json!({"kind": "List", "items": list.clone(), "metadata": other.clone()});
            let text = if pretty { serde_json::to_string_pretty(&whole) } else { serde_json::to_string(&whole) };
            let text = text.expect("text");

            let cut = cut(&text).expect("a list");

            let pieces: Vec<Value> = cut.items.iter().map(|item| serde_json::from_str(item).expect("JSON")).collect();
            prop_assert_eq!(pieces, list);
            let envelope: Value = serde_json::from_str(&cut.envelope).expect("JSON");
            prop_assert_eq!(envelope, json!({"kind": "List", "items": [], "metadata": other}));
        }

        #[test]
        fn given_any_text_when_cut_then_nothing_panics(text in "[{}\\[\\]\",:\\\\ items\n]{0,40}") {
            let _ = cut(&text);
        }
    }

    #[test]
    fn given_no_list_or_two_when_cut_then_it_stays_whole() {
        for text in ["", "{", "[]", "{}", "items: []", r#"{"items": {}}"#, r#"{"a": {"items": []}}"#, r#"{"items": [1"#]
        {
            assert_eq!(items(text), None, "{text}");
        }
        assert_eq!(items(r#"{"items": [1], "items": [2]}"#), None);
        assert_eq!(items(r#"{"items": [1], "\u0069tems": [2]}"#), None);
        assert_eq!(items(r#"{"items": [1], "a": "\u0069tems"}"#), Some(vec!["1"]));
    }

    #[test]
    fn given_a_list_that_is_no_json_when_cut_then_a_piece_is_none() {
        assert_eq!(items(r#"{"items": [1,]}"#), Some(vec!["1", ""]));
        assert_eq!(items(r#"{"items": [{} {}]}"#), Some(vec!["{} {}"]));
    }

    #[test]
    fn given_blanks_that_json_has_not_when_cut_then_they_stay_where_they_are() {
        for blank in ['\u{a0}', '\u{c}'] {
            assert_eq!(items(&format!("{{\"items\": [{blank}1]}}")), Some(vec![&*format!("{blank}1")]));
            assert_eq!(items(&format!("{{\"items\": [{blank}]}}")), Some(vec![&*blank.to_string()]));
            assert_eq!(items(&format!("{{\"items\": {blank}[1]}}")), None);
            assert_eq!(items(&format!("{{{blank}\"items\": [1]}}")), None);
        }
        assert_eq!(items("{ \"items\"\t: [\r\n1 ] \n}"), Some(vec!["1"]));
    }
}
