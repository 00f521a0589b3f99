//! Text of others on its way to a terminal: what would move the cursor, colour the screen or begin a line is spelled out.
//!
//! Whoever may write an object could otherwise have `check`, `status` and the log say what is not so. Names of objects need
//! none of this, as they are checked when they are read; but whoever sits where a kube-relay is asked may answer with any.

use std::fmt::{self, Write};

/// A text that prints as what it is: `\n` and `\u{1b}` in place of the characters themselves, and so for all others that
/// cannot be seen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Printable<'t>(pub(crate) &'t str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|character| match character {
            '\'' | '"' | '\\' => f.write_char(character),
            _ => write!(f, "{}", character.escape_debug()),
        })
    }
}

/// A text of several lines as it is, but for what cannot be seen in them.
pub fn lines(text: &str) -> String {
    text.split_inclusive('\n').fold(String::with_capacity(text.len()), |mut seen, line| {
        let (line, end) = line.strip_suffix('\n').map_or((line, ""), |line| (line, "\n"));
        // Writing to a string cannot fail.
        let _ = write!(seen, "{}{end}", Printable(line));
        seen
    })
}

/// A JSON text that says the same without control characters but line feeds: those that JSON lets pass move cursors, too.
pub fn json(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut seen, character| {
        let _ = match character {
            '\n' => seen.write_char(character),
            _ if character.is_control() => write!(seen, "\\u{:04x}", u32::from(character)),
            _ => seen.write_char(character),
        };
        seen
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_lines_when_printed_then_they_stay_lines_and_what_is_in_them_is_spelled_out() {
        assert_eq!(lines("a → b\n\n  c\u{9b}1m\u{7f}\n"), "a → b\n\n  c\\u{9b}1m\\u{7f}\n");
        assert_eq!(lines("no end"), "no end");
    }

    #[test]
    fn given_json_with_control_characters_when_printed_then_it_says_the_same_without_them() {
        let names = ["a\u{9b}1m\u{7f}", "größer\u{1b}\n"];

        let text = json(&serde_json::to_string_pretty(&names).expect("JSON"));

        assert!(text.chars().all(|letter| letter == '\n' || !letter.is_control()), "{text:?}");
        assert_eq!(serde_json::from_str::<[String; 2]>(&text).expect("JSON"), names);
    }

    #[test]
    fn given_text_that_would_forge_lines_when_printed_then_it_is_spelled_out_and_all_else_is_as_it_was() {
        let printed = |text| Printable(text).to_string();

        assert_eq!(printed("web\n2026 ERROR forged\r\t\u{1b}[2J"), r"web\n2026 ERROR forged\r\t\u{1b}[2J");
        assert_eq!(printed("right to left: \u{202e}, \u{9b}1m"), r"right to left: \u{202e}, \u{9b}1m");
        assert_eq!(printed("it's \"größer\" \\ 東京"), "it's \"größer\" \\ 東京");
    }
}
