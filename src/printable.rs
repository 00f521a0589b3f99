//! Text of others on its way to a terminal: what would move the cursor, colour the screen or begin a line is spelled out.
//!
//! Whoever may write an object could otherwise have `check`, `status` and the log say what is not so. Names of objects need
//! none of this, as they are checked when they are read.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_text_that_would_forge_lines_when_printed_then_it_is_spelled_out_and_all_else_is_as_it_was() {
        let printed = |text| Printable(text).to_string();

        assert_eq!(printed("web\n2026 ERROR forged\r\t\u{1b}[2J"), r"web\n2026 ERROR forged\r\t\u{1b}[2J");
        assert_eq!(printed("right to left: \u{202e}, \u{9b}1m"), r"right to left: \u{202e}, \u{9b}1m");
        assert_eq!(printed("it's \"größer\" \\ 東京"), "it's \"größer\" \\ 東京");
    }
}
