//! How much memory the kernel lets this process have, and how much of that is taken: the limits of its cgroups.
//!
//! A process without such a limit has none here: what the machine as a whole lacks is not looked at. Both versions are
//! read. A limit holds for a group and all below it, so each group from the process's own upwards is asked, as far as it
//! can be seen from here. What follows from it is decided in `headroom`.

use std::fs;
use std::path::{Path, PathBuf};

/// From here on a number is the kernel's way to say that there is no limit.
const NO_LIMIT_BYTES: u64 = 1 << 60;

/// The memory groups that this process was in when they were looked for, its own first. It is not moved later, but limits
/// come and go, and are read each time.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct MemoryGroups(Vec<Group>);

/// Memory that a group has taken, of what it may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Level {
    /// What is taken, without pages of files that no program has mapped: the kernel drops those before it kills anybody.
    /// Mapped ones count. They are the program itself: without them it would live, and read itself from the disk all the
    /// time.
    pub(crate) used_bytes: u64,
    pub(crate) limit_bytes: u64,
    /// It is the group of this process, not one that this is in: there others may have taken most.
    pub(crate) is_own: bool,
}

impl MemoryGroups {
    /// Those of this process. None where they cannot be found.
    pub(crate) fn of_this_process() -> Self {
        let read = |name| fs::read_to_string(Path::new("/proc/self").join(name)).unwrap_or_default();
        Self::find(&read("cgroup"), &read("mountinfo"))
    }

    /// From the texts of `/proc/self/cgroup` and `/proc/self/mountinfo`.
    fn find(memberships: &str, mounts: &str) -> Self {
        let mounts = mounts.lines().filter_map(Mount::parse);
        let groups = mounts.filter_map(|mount| Some(mount.groups(mount.version.membership(memberships)?)));
        Self(groups.flatten().filter(|group| group.folder.join(group.version.files().limit).is_file()).collect())
    }

    /// Each limit that holds now.
    pub(crate) fn levels(&self) -> impl Iterator<Item = Level> {
        self.0.iter().filter_map(Group::level)
    }
}

/// A folder of a group, in a hierarchy with files about memory.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    folder: PathBuf,
    version: Version,
    is_own: bool,
}

impl Group {
    /// `None` without a limit, and where a file is gone or says something else than a number.
    fn level(&self) -> Option<Level> {
        let files = self.version.files();
        let limit_bytes = self.number(files.limit).filter(|limit| *limit < NO_LIMIT_BYTES)?;
        let taken_bytes = self.number(files.usage)?;
        let stat = fs::read_to_string(self.folder.join("memory.stat")).unwrap_or_default();
        let used_bytes = taken_bytes.saturating_sub(idle_bytes(&stat, &files));
        Some(Level { used_bytes, limit_bytes, is_own: self.is_own })
    }

    /// A file of one number; "max" is none.
    fn number(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.folder.join(file)).ok()?.trim().parse().ok()
    }
}

/// Pages of files that nobody has mapped, from the text of `memory.stat`.
fn idle_bytes(stat: &str, files: &Files) -> u64 {
    let number = |wanted: &str| {
        let mut pairs = stat.lines().filter_map(|line| line.split_once(' '));
        pairs.find(|(word, _)| *word == wanted)?.1.trim().parse::<u64>().ok()
    };
    let all: u64 = files.of_files.into_iter().filter_map(number).sum();
    all.saturating_sub(number(files.mapped).unwrap_or(0))
}

/// Whose files and words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// How a version names things.
struct Files {
    limit: &'static str,
    usage: &'static str,
    /// Words of `memory.stat`, of a group and all below it: pages of files. Those in memory alone (tmpfs) are not among
    /// them: these stay.
    of_files: [&'static str; 2],
    /// Those of them that programs have mapped (and what they have mapped of tmpfs).
    mapped: &'static str,
}

impl Version {
    fn files(self) -> Files {
        match self {
            Self::V1 => Files {
                limit: "memory.limit_in_bytes",
                usage: "memory.usage_in_bytes",
                of_files: ["total_inactive_file", "total_active_file"],
                mapped: "total_mapped_file",
            },
            Self::V2 => Files {
                limit: "memory.max",
                usage: "memory.current",
                of_files: ["inactive_file", "active_file"],
                mapped: "file_mapped",
            },
        }
    }

    /// The group in such a hierarchy: `4:memory:/pods/a` of the first version, `0::/pods/a` of the second.
    fn membership(self, memberships: &str) -> Option<&str> {
        memberships.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (number, controllers, group) = (parts.next()?, parts.next()?, parts.next()?);
            let is_it = match self {
                Self::V1 => controllers.split(',').any(|controller| controller == "memory"),
                Self::V2 => number == "0" && controllers.is_empty(),
            };
            is_it.then_some(group)
        })
    }
}

/// Where a hierarchy can be seen.
struct Mount<'a> {
    version: Version,
    /// The group that is at the mount point: in a container often its own.
    root: &'a str,
    point: &'a Path,
}

impl<'a> Mount<'a> {
    /// A line of `mountinfo`, as proc(5) tells it; `None` for what is no hierarchy of memory. Spaces in a mount point are
    /// written as escapes, and not looked for: nobody mounts a hierarchy there.
    fn parse(line: &'a str) -> Option<Self> {
        let (place, what) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let (root, point) = (place.next()?, Path::new(place.next()?));
        let mut what = what.split(' ');
        let (kind, options) = (what.next()?, what.nth(1)?);
        let version = match kind {
            "cgroup2" => Version::V2,
            "cgroup" if options.split(',').any(|option| option == "memory") => Version::V1,
            _ => return None,
        };
        Some(Self { version, root, point })
    }

    /// The folder of a group and of those that it is in. Where the group is not below what is mounted, as in a container
    /// that has the paths of its host, only what is mounted.
    fn groups(&self, group: &str) -> Vec<Group> {
        let below = Path::new(group).strip_prefix(self.root).unwrap_or(Path::new(""));
        let group = |folder| Group { folder: self.point.join(folder), version: self.version, is_own: folder == below };
        below.ancestors().map(group).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A folder with files, each with its text.
    fn fixture(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().expect("a file is in a folder")).expect("a folder");
            fs::write(path, text).expect("a file");
        }
        folder
    }

    fn mount(root: &str, point: &Path, what: &str) -> String {
        format!(
            "22 1 0:21 / /proc rw - proc proc rw\n31 24 0:27 {root} {} rw,nosuid - {what}\nodd line\n",
            point.display()
        )
    }

    fn levels(groups: &MemoryGroups) -> Vec<(u64, u64)> {
        groups.levels().map(|level| (level.used_bytes / MIB, level.limit_bytes / MIB)).collect()
    }

    #[test]
    fn f22_given_groups_of_version_2_when_read_then_each_limit_counts_and_files_only_where_mapped() {
        let root = fixture(&[
            ("pods/memory.max", "104857600\n"),
            ("pods/memory.current", "73400320\n"),
            (
                "pods/memory.stat",
                "anon 1\nfile 31457280\nfile_mapped 5242880\nshmem 1\ninactive_file 10485760\nactive_file 10485760\n",
            ),
            ("pods/a/memory.max", "max\n"),
            ("pods/a/memory.current", "1048576\n"),
        ]);

        let mounts = mount("/", root.path(), "cgroup2 cgroup2 rw,nsdelegate");
        let groups = MemoryGroups::find("1:name=systemd:/elsewhere\n0::/pods/a\n", &mounts);

        assert_eq!(groups.0.len(), 2, "the root has no such file: {groups:?}");
        assert_eq!(levels(&groups), [(55, 100)]);
    }

    #[test]
    fn f22_given_groups_of_version_1_when_read_then_their_limits_count_and_the_word_for_none_is_none() {
        let root = fixture(&[
            ("memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory.usage_in_bytes", "4194304000\n"),
            ("box/memory.limit_in_bytes", "67108864\n"),
            ("box/memory.usage_in_bytes", "57671680\n"),
            ("box/memory.stat", "inactive_file 1\ntotal_inactive_file 4194304\ntotal_active_file 0\ntotal_rss 9\n"),
        ]);

        let mounts = mount("/", root.path(), "cgroup cgroup rw,memory");
        let groups = MemoryGroups::find("5:devices:/x\n4:cpu,memory:/box\n0::/\n", &mounts);

        assert_eq!(groups.0.len(), 2);
        assert_eq!(levels(&groups), [(51, 64)]);
    }

    #[test]
    fn f22_given_a_container_with_the_paths_of_its_host_when_read_then_what_it_sees_is_its_own() {
        let own = fixture(&[("memory.max", "1048576"), ("memory.current", "0")]);

        for (root, group) in [("/pods/a", "/pods/a"), ("/", "/pods/a"), ("/", "/"), ("/../..", "/pods/a")] {
            let mounts = mount(root, own.path(), "cgroup2 cgroup2 rw");
            let groups = MemoryGroups::find(&format!("0::{group}\n"), &mounts);

            assert_eq!(levels(&groups), [(0, 1)], "{root} {group}");
        }
    }

    #[test]
    fn given_files_that_make_no_sense_when_read_then_there_is_no_limit() {
        let root = fixture(&[("memory.max", "many"), ("a/memory.max", "1"), ("b/memory.current", "1")]);
        let mounts = mount("/", root.path(), "cgroup2 cgroup2 rw");

        for group in ["/a", "/b", "/none", ""] {
            assert!(levels(&MemoryGroups::find(&format!("0::{group}"), &mounts)).is_empty(), "{group}");
        }
        assert_eq!(MemoryGroups::find("", ""), MemoryGroups::default());
        assert_eq!(MemoryGroups::find("0::/a", "31 24 0:27 / - cgroup2"), MemoryGroups::default());
    }

    #[test]
    fn given_this_process_when_its_groups_are_read_then_what_is_used_is_within_what_is_allowed() {
        for level in MemoryGroups::of_this_process().levels() {
            assert!(level.used_bytes <= level.limit_bytes, "{level:?}");
        }
    }
}
