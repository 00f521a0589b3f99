//! How files looked when they were read: whether another version of one has come since.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Files, each with what tells its versions apart.
#[derive(Clone, Debug, Default)]
pub(crate) struct FileStamps(Vec<(PathBuf, Option<Stamp>)>);

/// What tells two versions of a file apart. Of the file that a link leads to, as mounted secrets are replaced by a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let metadata = fs::metadata(path).ok()?;
        let modified = (metadata.mtime(), metadata.mtime_nsec());
        Some(Self { inode: metadata.ino(), bytes: metadata.len(), modified })
    }
}

impl FileStamps {
    /// Adds a file, as it looks now. To be called before it is read.
    pub(crate) fn take(&mut self, path: &Path) {
        self.0.push((path.to_owned(), Stamp::of(path)));
    }

    /// True where another version of a file is there. One that is gone is none: some take secrets away once they are read.
    pub(crate) fn are_outdated(&self) -> bool {
        self.0.iter().any(|(path, stamp)| Stamp::of(path).is_some_and(|now| *stamp != Some(now)))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn stamps(path: &Path) -> FileStamps {
        let mut stamps = FileStamps::default();
        stamps.take(path);
        stamps
    }

    #[test]
    fn given_a_file_when_it_is_replaced_or_comes_then_it_is_noticed_and_not_when_it_goes() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tls.crt");
        let before = stamps(&path);
        fs::write(&path, "a").expect("written");
        assert!(before.are_outdated(), "it came");

        let before = stamps(&path);
        assert!(!before.are_outdated());
        fs::write(folder.path().join("new"), "b").expect("written");
        fs::rename(folder.path().join("new"), &path).expect("renamed");
        assert!(before.are_outdated(), "of the same size");

        let before = stamps(&path);
        fs::remove_file(&path).expect("removed");
        assert!(!before.are_outdated());
    }

    #[test]
    fn given_a_mounted_secret_when_its_link_leads_elsewhere_then_it_is_noticed() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["1", "2"] {
            fs::create_dir(folder.path().join(name)).expect("a folder");
            fs::write(folder.path().join(name).join("tls.crt"), name).expect("written");
        }
        let link = folder.path().join("..data");
        symlink("1", &link).expect("a link");
        let before = stamps(&link.join("tls.crt"));

        symlink("2", folder.path().join("next")).expect("a link");
        fs::rename(folder.path().join("next"), &link).expect("renamed");

        assert!(before.are_outdated());
    }
}
