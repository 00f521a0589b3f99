//! What is wrong with an object, said so that a person can mend it.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::printable::Printable;

/// Something about an object that a person should know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Kind and name: `Service default/web`; a file's path where no object could be read.
    pub object: String,
    /// The file that the object came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Line in the file, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u64>,
    /// Column in the line, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<u64>,
    /// One word of the event vocabulary.
    pub reason: Cow<'static, str>,
    /// What is wrong, with field and value, and what to do.
    pub message: String,
    /// How bad it is.
    pub severity: Severity,
}

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing; nothing is wrong.
    Note,
    /// Probably a mistake; the rest of the object is used.
    Warning,
    /// The object, or a part of it, is not used.
    Error,
}

impl Problem {
    /// A part of the object is not used. `object` is printed as kind and name.
    pub fn error(object: impl fmt::Display, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            object: object.to_string(),
            file: None,
            line: None,
            column: None,
            reason: reason.into(),
            message: message.into(),
            severity: Severity::Error,
        }
    }

    /// Worth knowing; nothing is wrong. `object` is printed as kind and name.
    pub fn note(object: impl fmt::Display, reason: &'static str, message: impl Into<String>) -> Self {
        Self { severity: Severity::Note, ..Self::error(object, reason, message) }
    }

    /// The object without its kind: `default/web`; a file's path where no object could be read.
    pub(crate) fn subject(&self) -> &str {
        self.object.rsplit(' ').next().unwrap_or_default()
    }
}

/// `web.yaml:3:5: Service default/web: message`, as compilers say it; without the place where it is not known.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}:", Printable(file))?;
            for number in [self.line, self.column].into_iter().flatten() {
                write!(f, "{number}:")?;
            }
            write!(f, " ")?;
        }
        if self.file.as_ref() != Some(&self.object) {
            write!(f, "{}: ", Printable(&self.object))?;
        }
        f.write_str(&self.message)
    }
}

/// Problems under a title, a line for each with its word; nothing at all where there are none.
pub(crate) struct Listed<'a>(pub(crate) &'static str, pub(crate) &'a [Problem]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(title, problems) = self;
        if problems.is_empty() {
            return Ok(());
        }
        writeln!(f, "{title}:")?;
        for problem in *problems {
            let text = problem.to_string();
            // Lines to paste follow the sentence, and begin at the margin.
            let (sentence, lines) = text.split_once('\n').map_or((&*text, ""), |(first, rest)| (first, rest));
            writeln!(f, "  {sentence} [{}]", problem.reason)?;
            f.write_str(lines)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_a_place_in_a_file_when_printed_then_it_comes_first_and_can_be_clicked() {
        let mut problem = Problem::error("Service default/web", "decode", "spec.ports: no entry");
        assert_eq!(problem.to_string(), "Service default/web: spec.ports: no entry");

        problem.file = Some("web.yaml".into());
        problem.line = Some(3);
        problem.column = Some(5);
        assert_eq!(problem.to_string(), "web.yaml:3:5: Service default/web: spec.ports: no entry");
    }

    #[test]
    fn given_a_file_with_an_odd_name_when_printed_then_it_forges_no_line() {
        let mut problem = Problem::error("Service default/web", "decode", "spec.ports: no entry");
        problem.file = Some("a\n\u{1b}[2Jb.yaml".into());

        assert_eq!(problem.to_string(), "a\\n\\u{1b}[2Jb.yaml: Service default/web: spec.ports: no entry");
    }

    #[test]
    fn given_a_file_that_is_no_object_when_printed_then_its_path_is_said_once() {
        let mut problem = Problem::error("web.yaml", "decode", "cannot be read");
        problem.file = Some("web.yaml".into());

        assert_eq!(problem.to_string(), "web.yaml: cannot be read");
    }
}
