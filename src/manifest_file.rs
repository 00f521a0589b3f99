//! One file of manifests: what it says, and what of that is in use.
//!
//! A file is taken whole or not at all: one that becomes wrong keeps its last good objects, in use until
//! it is mended. Only a file that never was right gives what is right in it, so that one mistake does not
//! keep the rest from starting. Which files there are is `manifest`.

use std::collections::HashSet;
use std::fs;
use std::hash::BuildHasher;
use std::path::{Path, PathBuf};

use crate::decode::{Entry, decode};
use crate::input::ReadError;
use crate::plan::{Problem, Severity};
use crate::rejections::Rejections;

/// What a look at the files found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changed {
    /// Other objects are in use.
    pub(crate) objects: bool,
    /// Something else is wrong.
    pub(crate) problems: bool,
}

/// One file.
#[derive(Debug, Default)]
pub(crate) struct File {
    /// Of the content that was last looked at; `None` where it could not be read.
    fingerprint: Option<(usize, u64)>,
    /// Its real path: a file that is named twice counts once.
    pub(crate) real: Option<PathBuf>,
    /// What of it is in use.
    pub(crate) entries: Vec<Entry>,
    /// True where `entries` is all that the file said then.
    pub(crate) whole: bool,
    /// True where the file says something else now, that cannot be used.
    pub(crate) failed: bool,
    /// What is wrong with it and what is worth knowing.
    pub(crate) problems: Vec<Problem>,
    /// What was rejected and is not counted yet.
    pub(crate) rejections: Rejections,
}

impl File {
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
                self.fail(vec![error.problem(&name, self.entries.len())], changed);
            }
        }
    }

    /// Takes the next content even if it is the same as before.
    pub(crate) fn look_again(&mut self) {
        self.fingerprint = None;
    }

    fn take(&mut self, name: &str, bytes: &[u8], changed: &mut Changed) {
        // Editors and shells empty a file before they write it.
        if bytes.iter().all(u8::is_ascii_whitespace) {
            let problem = ReadError::Empty.problem(name, self.entries.len());
            self.rejections.count(None, ReadError::Empty.reason());
            return self.fail(vec![problem], changed);
        }
        let mut decoded = decode(bytes, name);
        self.rejections.add(std::mem::take(&mut decoded.rejections));
        if !decoded.whole && self.whole {
            let text =
                format!("rejected; its last good objects ({}) stay in use until it is mended", self.entries.len());
            decoded.problems.push(file_problem(name, "decode", Severity::Error, text));
            return self.fail(decoded.problems, changed);
        }
        if !decoded.whole {
            // It never was right: nothing that is in use goes, and what is right counts.
            let known: HashSet<_> = decoded.objects.iter().map(|entry| (entry.kind, entry.name.clone())).collect();
            let kept = self.entries.drain(..).filter(|entry| !known.contains(&(entry.kind, entry.name.clone())));
            decoded.objects.extend(kept);
        }
        let same = self.entries.len() == decoded.objects.len()
            && self.entries.iter().zip(&decoded.objects).all(|(a, b)| a.says_the_same(b));
        changed.objects |= !same;
        changed.problems = true;
        *self = Self {
            fingerprint: self.fingerprint,
            real: self.real.take(),
            entries: decoded.objects,
            whole: decoded.whole,
            failed: false,
            problems: decoded.problems,
            rejections: std::mem::take(&mut self.rejections),
        };
    }

    /// Keeps what is in use.
    fn fail(&mut self, problems: Vec<Problem>, changed: &mut Changed) {
        changed.problems |= !self.failed || self.problems != problems;
        self.failed = true;
        self.problems = problems;
    }
}

impl Entry {
    fn says_the_same(&self, other: &Self) -> bool {
        self.kind == other.kind && self.name == other.name && self.content == other.content
    }
}

/// Something about a whole file or folder.
pub(crate) fn file_problem(name: &str, reason: &'static str, severity: Severity, message: String) -> Problem {
    let (object, file) = (name.to_owned(), Some(name.to_owned()));
    Problem { object, file, line: None, column: None, reason: reason.into(), message, severity }
}
