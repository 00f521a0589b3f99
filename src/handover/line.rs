//! The line of pods that have served with a state folder: who came after whom.
//!
//! While a pod takes the place of another one, both are there, and the kubelet starts a container of either again that ends. One
//! whose place was taken would take it back: the rollout would wait for the newer pod for ever, as that one serves no more.
//! So each pod enters the line once, when it serves for the first time, and only the last one, or one that is not in
//! it yet, takes over from a process that runs. A folder that nobody has is for anybody: better an older pod than none.
//!
//! Written by who has the folder's lock.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Its name in the folder: an UID on each line, the last one at the end.
const FILE: &str = "kube-relay.pods";
const MODE: u32 = 0o600;
/// How many are kept. There are two at a time, and more only while some are slow to end.
const LENGTH: usize = 16;
/// The longest file that is read: as many names as are kept, each as long as the API lets it be.
const LONGEST_TEXT: u64 = 16 * 256;

/// Adds a pod that serves now to the end of a folder's line, where it is not in it yet.
///
/// # Errors
/// The folder cannot be written.
pub fn enter(folder: &Path, pod: &str) -> io::Result<()> {
    let mut line = read(folder);
    if line.iter().any(|known| known == pod) {
        return Ok(());
    }
    line.push(pod.to_owned());
    write(folder, &line[line.len().saturating_sub(LENGTH)..])
}

/// True where another pod has taken this one's place.
pub(super) fn is_past(folder: &Path, pod: &str) -> bool {
    let line = read(folder);
    line.iter().any(|known| known == pod) && line.last().is_some_and(|last| last != pod)
}

/// Empty where it cannot be read: then nobody is kept from anything.
fn read(folder: &Path) -> Vec<String> {
    let mut text = Vec::new();
    // A link or a pipe of that name is nothing of ours.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(folder.join(FILE));
    match file.and_then(|file| file.take(LONGEST_TEXT).read_to_end(&mut text)) {
        Ok(_) => String::from_utf8_lossy(&text).lines().map(str::to_owned).collect(),
        Err(_) => Vec::new(),
    }
}

/// As a whole or not at all.
fn write(folder: &Path, line: &[String]) -> io::Result<()> {
    let new = folder.join(FILE).with_extension("pods.new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(MODE).open(&new)?;
    file.write_all(line.iter().map(|pod| format!("{pod}\n")).collect::<String>().as_bytes())?;
    file.sync_all()?;
    fs::rename(new, folder.join(FILE))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn t234_given_a_pod_whose_place_another_has_taken_when_it_comes_again_then_it_is_past_and_the_other_is_not() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let folder = folder.path();
        assert!(!is_past(folder, "old"), "nobody has served yet");

        enter(folder, "old").expect("the test's folder can be written");
        assert!(!is_past(folder, "old") && !is_past(folder, "new"));
        enter(folder, "new").expect("the test's folder can be written");

        assert!(is_past(folder, "old") && !is_past(folder, "new") && !is_past(folder, "newer"));
        let mode = fs::metadata(folder.join(FILE)).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o777, MODE);
    }

    #[test]
    fn t234_given_a_past_pod_that_serves_for_want_of_another_when_the_last_one_comes_again_then_that_is_not_past() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        for pod in ["old", "new", "old"] {
            enter(folder.path(), pod).expect("the test's folder can be written");
        }

        assert!(is_past(folder.path(), "old") && !is_past(folder.path(), "new"));
    }

    #[test]
    fn given_pods_without_end_when_they_enter_then_the_last_ones_are_kept() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        for number in 0..3 * LENGTH {
            enter(folder.path(), &format!("pod-{number}")).expect("the test's folder can be written");
        }

        let line = read(folder.path());

        assert_eq!((line.len(), line.last().map(String::as_str)), (LENGTH, Some("pod-47")));
        assert!(is_past(folder.path(), "pod-46") && !is_past(folder.path(), "pod-1"), "that one is forgotten");
    }

    #[test]
    fn given_something_else_in_place_of_the_line_when_read_then_nobody_is_past() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let elsewhere = folder.path().join("elsewhere");
        fs::write(&elsewhere, "old\nnew\n").expect("the test's folder can be written");
        std::os::unix::fs::symlink(&elsewhere, folder.path().join(FILE)).expect("the test's folder can be written");

        assert!(!is_past(folder.path(), "old"));

        enter(folder.path(), "old").expect("the link is replaced");
        assert_eq!(fs::read_to_string(elsewhere).expect("it is there"), "old\nnew\n", "and not written through");
    }
}
