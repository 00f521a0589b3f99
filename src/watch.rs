//! How a change of a file is noticed: which folders to watch, and when a file has come to rest.
//!
//! Folders are watched, not files: a file that is replaced by another of its name is a new one to the
//! kernel. What a file says is not looked at here; that is `manifest_file`.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind, RenameMode};
use notify::{ErrorKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::input::is_manifest;
use crate::plan::{Problem, Severity};

/// From a whole file to its reading: one reading for the files of one `cp` or `git checkout`.
const WHOLE: Duration = Duration::from_millis(5);

/// From any other change to its reading: an editor puts the new file where it took the old one away.
const CHANGED: Duration = Duration::from_millis(50);

/// From the last write to the reading of a file that its writer does not close.
const WRITING: Duration = Duration::from_secs(1);

/// No file waits longer, though it is written all the time.
const LONGEST: Duration = Duration::from_secs(5);

/// Events that wait for the reader; if they are more, one reading stands for all.
const QUEUE: usize = 1024;

/// Symlinks behind each other that are followed.
const MAX_LINKS: usize = 16;

/// What the kernel said about a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sign {
    /// It has all its content: closed by its writer, or put there under its name.
    Whole,
    /// Somebody writes.
    Writing,
    /// It came or went, or has other rights.
    Changed,
}

/// Paths that changed and are not at rest yet.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settling {
    pending: BTreeMap<PathBuf, Pending>,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    since: Instant,
    due: Instant,
    sign: Sign,
}

impl Settling {
    /// Takes a sign in.
    pub(crate) fn note(&mut self, path: PathBuf, sign: Sign, now: Instant) {
        let quiet = match sign {
            Sign::Whole => WHOLE,
            Sign::Writing => WRITING,
            Sign::Changed => CHANGED,
        };
        let due = now + quiet;
        let entry = self.pending.entry(path).or_insert(Pending { since: now, due, sign });
        // A whole file does not wait for the next one of its name, only for somebody who writes into it.
        if !(entry.sign == Sign::Whole && sign == Sign::Whole) {
            entry.due = due.min(entry.since + LONGEST);
        }
        entry.sign = sign;
    }

    /// When the next path is at rest.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.pending.values().map(|pending| pending.due).min()
    }

    /// Forgets what is at rest.
    pub(crate) fn settle(&mut self, now: Instant) {
        self.pending.retain(|_, pending| pending.due > now);
    }

    /// True where the path is better not looked at now.
    pub(crate) fn has(&self, path: &Path) -> bool {
        !self.pending.is_empty() && self.pending.contains_key(&spelled(path))
    }
}

/// The path as events have it: they name files from the root, however the folder was given to the watcher.
fn spelled(path: &Path) -> PathBuf {
    // It fails where there is no working folder; then there is nothing to look for, either.
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn folder_of(path: &Path) -> PathBuf {
    let path = spelled(path);
    path.parent().map_or_else(|| path.clone(), Path::to_owned)
}

/// The folders to watch, and the names in them that count.
#[derive(Debug, Default)]
pub(crate) struct Interest {
    folders: BTreeMap<PathBuf, Names>,
}

#[derive(Debug, Default)]
struct Names {
    /// Every manifest, and the link through which a mounted ConfigMap is swapped.
    manifests: bool,
    names: BTreeSet<OsString>,
}

impl Names {
    fn have(&self, path: &Path) -> bool {
        let name = path.file_name().unwrap_or_default();
        self.names.contains(name) || self.manifests && (name == "..data" || is_manifest(path))
    }
}

impl Interest {
    /// A file or folder that was asked for, there or not.
    pub(crate) fn path(&mut self, path: &Path) {
        self.links(path, &mut MAX_LINKS.clone());
        if path.is_dir() {
            self.folders.entry(spelled(path)).or_default().manifests = true;
        }
    }

    /// A file of a folder that was asked for: of interest is where it leads to.
    pub(crate) fn target(&mut self, path: &Path) {
        if path.is_symlink() {
            self.links(path, &mut MAX_LINKS.clone());
        }
    }

    /// The path and all links on the way to its content.
    fn links(&mut self, path: &Path, left: &mut usize) {
        self.name(path);
        for part in path.ancestors() {
            let Ok(target) = fs::read_link(part) else { continue };
            if *left == 0 {
                return;
            }
            *left -= 1;
            self.name(part);
            let rest = path.strip_prefix(part).unwrap_or(Path::new(""));
            let target = folder_of(part).join(target);
            self.links(&if rest == Path::new("") { target } else { target.join(rest) }, left);
        }
    }

    fn name(&mut self, path: &Path) {
        if let Some(name) = path.file_name() {
            self.folders.entry(folder_of(path)).or_default().names.insert(name.to_owned());
        }
    }

    /// The sign of an event, for each of its paths that count.
    fn signs(&self, event: &notify::Event) -> Vec<(PathBuf, Sign)> {
        let Some(sign) = sign(event.kind) else { return Vec::new() };
        let counts = |path: &&PathBuf| {
            let of_folder = path.parent().and_then(|folder| self.folders.get(folder));
            of_folder.is_some_and(|names| names.have(path)) || self.folders.contains_key(*path)
        };
        event.paths.iter().filter(counts).map(|path| (path.clone(), sign)).collect()
    }
}

fn sign(kind: EventKind) -> Option<Sign> {
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => Some(Sign::Whole),
        EventKind::Access(_) => None,
        EventKind::Modify(ModifyKind::Name(RenameMode::To | RenameMode::Both)) => Some(Sign::Whole),
        EventKind::Modify(ModifyKind::Data(_)) => Some(Sign::Writing),
        _ => Some(Sign::Changed),
    }
}

/// The kernel's eye on the folders. Owned by the task of the source.
pub(crate) struct Watch {
    watcher: Option<RecommendedWatcher>,
    events: mpsc::Receiver<notify::Event>,
    /// Set where events were lost: everything may have changed.
    lost: Arc<AtomicBool>,
    interest: Interest,
    /// What is watched: a folder of the same name may be another one now.
    watched: BTreeMap<PathBuf, (u64, u64)>,
    /// Why changes are seen only by looking.
    failure: Option<String>,
}

impl Watch {
    /// Watches nothing yet. Where the kernel cannot watch, [`Watch::problem`] says so.
    pub(crate) fn start() -> Self {
        let (sender, events) = mpsc::channel(QUEUE);
        let lost = Arc::new(AtomicBool::new(false));
        let flag = lost.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let Ok(event) = event else { return };
            // Release, with the Acquire in `next`: whoever takes this event sees the flag.
            if event.need_rescan() {
                flag.store(true, Ordering::Release);
            }
            if sender.try_send(event).is_err() {
                // The queue is full: one of its events brings the task here.
                flag.store(true, Ordering::Release);
            }
        });
        let (watcher, failure) = match watcher {
            Ok(watcher) => (Some(watcher), None),
            Err(error) => (None, Some(error.to_string())),
        };
        Self { watcher, events, lost, interest: Interest::default(), watched: BTreeMap::new(), failure }
    }

    /// Watches these folders and no others. True where one was not watched before.
    pub(crate) fn look_at(&mut self, interest: Interest) -> bool {
        let Some(watcher) = &mut self.watcher else { return false };
        let identity = |path: &Path| fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
        let wanted: BTreeMap<PathBuf, (u64, u64)> =
            interest.folders.keys().filter_map(|path| Some((path.clone(), identity(path)?))).collect();
        self.watched.retain(|path, identity| {
            let stays = wanted.get(path) == Some(identity);
            if !stays {
                // It fails where the folder is gone, and the watch with it.
                let _ = watcher.unwatch(path);
            }
            stays
        });
        self.interest = interest;
        self.failure = None;
        let mut more = false;
        for (path, identity) in wanted {
            if self.watched.contains_key(&path) {
                continue;
            }
            match watcher.watch(&path, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    self.watched.insert(path, identity);
                    more = true;
                }
                Err(error) if matches!(error.kind, ErrorKind::PathNotFound) => {}
                Err(error) => self.failure = Some(format!("{}: {error}", path.display())),
            }
        }
        more
    }

    /// The next signs of change, perhaps none. Does not return where nothing is watched.
    pub(crate) async fn next(&mut self) -> Vec<(PathBuf, Sign)> {
        let Some(event) = self.events.recv().await else { return std::future::pending().await };
        self.forget_gone(&event);
        let mut signs = self.interest.signs(&event);
        if self.lost.swap(false, Ordering::Acquire) {
            signs.push((PathBuf::new(), Sign::Changed));
        }
        signs
    }

    /// A folder that comes back under its name is to be watched anew, even where it has the same inode.
    fn forget_gone(&mut self, event: &notify::Event) {
        let Some(watcher) = &mut self.watcher else { return };
        if !matches!(event.kind, EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_))) {
            return;
        }
        for path in &event.paths {
            if self.watched.remove(path).is_some() {
                // It fails where the kernel has ended the watch with the folder.
                let _ = watcher.unwatch(path);
            }
        }
    }

    /// What a person should know where the kernel does not tell of changes.
    pub(crate) fn problem(&self) -> Option<Problem> {
        let failure = self.failure.as_ref()?;
        Some(Problem {
            object: "manifests".to_owned(),
            file: None,
            line: None,
            column: None,
            reason: "fd_limit".into(),
            message: format!(
                "changes are seen only every few seconds, as they cannot be watched ({failure}); raise fs.inotify.max_user_instances or fs.inotify.max_user_watches"
            ),
            severity: Severity::Warning,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use notify::event::{CreateKind, DataChange, MetadataKind};

    use super::*;

    fn settling(signs: &[(Sign, u64)]) -> (Settling, Instant) {
        let begin = Instant::now();
        let mut settling = Settling::default();
        for (sign, ms) in signs {
            settling.note("/a/b.yaml".into(), *sign, begin + Duration::from_millis(*ms));
        }
        (settling, begin)
    }

    fn due_ms(signs: &[(Sign, u64)]) -> Option<u128> {
        let (settling, begin) = settling(signs);
        settling.due().map(|due| (due - begin).as_millis())
    }

    #[test]
    fn given_a_write_when_noted_then_the_file_rests_only_when_it_is_closed() {
        assert_eq!(due_ms(&[(Sign::Writing, 0)]), Some(1000));
        assert_eq!(due_ms(&[(Sign::Writing, 0), (Sign::Writing, 500)]), Some(1500));
        assert_eq!(due_ms(&[(Sign::Writing, 0), (Sign::Whole, 20)]), Some(25));
        assert_eq!(due_ms(&[(Sign::Whole, 0), (Sign::Writing, 2)]), Some(1002));
    }

    #[test]
    fn given_an_editors_rename_dance_when_noted_then_the_gap_is_not_seen() {
        assert_eq!(due_ms(&[(Sign::Changed, 0)]), Some(50));
        assert_eq!(due_ms(&[(Sign::Changed, 0), (Sign::Changed, 1), (Sign::Writing, 2), (Sign::Whole, 3)]), Some(8));
    }

    #[test]
    fn given_signs_without_end_when_noted_then_the_file_is_read_all_the_same() {
        let whole: Vec<_> = (0..100).map(|ms| (Sign::Whole, ms)).collect();
        let writing: Vec<_> = (0..100).map(|step| (Sign::Writing, step * 100)).collect();

        assert_eq!(due_ms(&whole), Some(5));
        assert_eq!(due_ms(&writing), Some(5000));
    }

    #[test]
    fn given_two_files_when_one_rests_then_the_other_is_still_left_alone() {
        let (mut settling, begin) = settling(&[(Sign::Whole, 0)]);
        settling.note(spelled(Path::new("c.yaml")), Sign::Writing, begin);

        settling.settle(begin + Duration::from_millis(5));

        assert!(!settling.has(Path::new("/a/b.yaml")));
        assert!(settling.has(Path::new("c.yaml")));
    }

    #[test]
    fn given_events_of_the_kernel_when_read_then_reading_a_file_is_no_change() {
        let of = |kind| sign(kind);

        assert_eq!(of(EventKind::Access(AccessKind::Open(AccessMode::Any))), None);
        assert_eq!(of(EventKind::Access(AccessKind::Close(AccessMode::Read))), None);
        assert_eq!(of(EventKind::Access(AccessKind::Close(AccessMode::Write))), Some(Sign::Whole));
        assert_eq!(of(EventKind::Modify(ModifyKind::Name(RenameMode::To))), Some(Sign::Whole));
        assert_eq!(of(EventKind::Modify(ModifyKind::Name(RenameMode::From))), Some(Sign::Changed));
        assert_eq!(of(EventKind::Modify(ModifyKind::Data(DataChange::Any))), Some(Sign::Writing));
        assert_eq!(of(EventKind::Modify(ModifyKind::Metadata(MetadataKind::Any))), Some(Sign::Changed));
        assert_eq!(of(EventKind::Create(CreateKind::File)), Some(Sign::Changed));
    }

    #[test]
    fn given_a_busy_folder_when_a_file_in_it_is_of_interest_then_its_neighbours_are_not() {
        let mut interest = Interest::default();
        interest.path(Path::new("/nowhere/a.yaml"));
        let event = |path: &str| notify::Event::new(EventKind::Create(CreateKind::File)).add_path(path.into());

        assert_eq!(interest.signs(&event("/nowhere/a.yaml")), [("/nowhere/a.yaml".into(), Sign::Changed)]);
        assert_eq!(interest.signs(&event("/nowhere/b.yaml")), []);
    }

    #[test]
    fn given_a_path_from_the_working_folder_when_an_event_names_it_from_the_root_then_it_counts() {
        let here = std::env::current_dir().expect("a working folder");
        let event = |name: &str| notify::Event::new(EventKind::Create(CreateKind::File)).add_path(here.join(name));

        for path in ["a.yaml", "./a.yaml"] {
            let mut interest = Interest::default();
            interest.path(Path::new(path));
            assert_eq!(interest.signs(&event("a.yaml")), [(here.join("a.yaml"), Sign::Changed)]);
        }
        let mut folder = Interest::default();
        folder.path(Path::new("src"));
        assert_eq!(folder.signs(&event("src/a.yaml")), [(here.join("src/a.yaml"), Sign::Changed)]);
    }

    #[test]
    fn given_links_in_a_circle_when_followed_then_it_ends() {
        let folder = tempfile::tempdir().expect("a folder");
        symlink("b", folder.path().join("a")).expect("a link");
        symlink("a", folder.path().join("b")).expect("a link");
        let mut interest = Interest::default();

        interest.path(&folder.path().join("a"));

        assert!(interest.folders.contains_key(folder.path()));
    }
}
