//! Where manifests come from: paths and standard input in, bytes out, or why there are none.
//!
//! What the bytes say is `decode`; which of them are in use is `manifest_file`.

use std::ffi::OsString;
use std::fs;
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};

use crate::manifest_file::file_problem;
use crate::plan::{Problem, Severity};

/// Largest file that is read.
pub const MAX_FILE_BYTES: u64 = 256 * 1024 * 1024;

/// Standard input in messages.
pub(crate) const STDIN: &str = "standard input";

/// One `--source`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A file, whatever its name, or a folder, of which `*.yaml`, `*.yml` and `*.json` are read.
    Path(PathBuf),
    /// Standard input, read once. Written as `-`.
    Stdin,
}

impl Input {
    /// The path, where nothing is there: most likely a slip of the pen, not something that is still to come.
    pub fn missing(&self) -> Option<&Path> {
        match self {
            Self::Path(path) if !path.exists() => Some(path),
            Self::Path(_) | Self::Stdin => None,
        }
    }
}

impl From<OsString> for Input {
    fn from(text: OsString) -> Self {
        if text == "-" { Self::Stdin } else { Self::Path(text.into()) }
    }
}

impl From<&str> for Input {
    fn from(text: &str) -> Self {
        OsString::from(text).into()
    }
}

/// Why a file or folder could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("no such file or folder")]
    Missing,
    #[error("cannot be read: permission denied")]
    Permission,
    #[error("larger than {} MiB, the most that is read; split it", MAX_FILE_BYTES / 1024 / 1024)]
    TooLarge,
    #[error("not a file")]
    NotAFile,
    #[error("no manifests in this folder; it should hold *.yaml, *.yml or *.json (folders inside are not looked at)")]
    NoManifests,
    #[error("empty")]
    Empty,
    #[error("cannot be read: {0}")]
    Io(io::Error),
}

impl ReadError {
    pub(crate) fn of(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Missing,
            io::ErrorKind::PermissionDenied => Self::Permission,
            _ => Self::Io(error),
        }
    }

    pub(crate) fn reason(&self) -> &'static str {
        if matches!(self, Self::Permission) { "permission" } else { "decode" }
    }

    /// As a problem of the file or folder `name`.
    pub(crate) fn problem(&self, name: &str, in_use: usize) -> Problem {
        let kept = match in_use {
            0 => String::new(),
            count => format!("; its last good objects ({count}) stay in use"),
        };
        file_problem(name, self.reason(), Severity::Error, format!("{self}{kept}"))
    }
}

/// The manifests of a folder, in the order of their names.
pub(crate) fn manifests_in(folder: &Path) -> Result<Vec<PathBuf>, ReadError> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(ReadError::of)? {
        let entry = entry.map_err(ReadError::of)?;
        let path = entry.path();
        // Through symlinks, as those of a mounted ConfigMap.
        if is_manifest(&path) && !path.is_dir() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// True for `*.yaml`, `*.yml` and `*.json` that do not begin with a dot.
pub(crate) fn is_manifest(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    !hidden && path.extension().is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|known| extension == *known))
}

pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>, ReadError> {
    let metadata = fs::metadata(path).map_err(ReadError::of)?;
    if !metadata.is_file() {
        return Err(ReadError::NotAFile);
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Err(ReadError::TooLarge);
    }
    read_stream(fs::File::open(path))
}

pub(crate) fn read_stdin() -> Result<Vec<u8>, ReadError> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        tracing::info!("reading manifests from this terminal; end them with Ctrl-D");
    }
    read_stream(Ok(stdin.lock()))
}

pub(crate) fn read_stream(stream: io::Result<impl Read>) -> Result<Vec<u8>, ReadError> {
    let mut bytes = Vec::new();
    let stream = stream.map_err(ReadError::of)?;
    stream.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(ReadError::of)?;
    if bytes.len() as u64 > MAX_FILE_BYTES { Err(ReadError::TooLarge) } else { Ok(bytes) }
}
