//! All settings of a node's network, to be compared with what they were.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use crate::rig::Namespace;

/// The settings that are not what they were, but for those that the stage itself sets, and a number that is no setting.
pub(crate) fn changed(before: &BTreeMap<String, String>, node: &Namespace) -> Vec<String> {
    let is_changed = |(path, value): &(String, String)| {
        let passed_over = path.ends_with("ratelimit") || path.ends_with("nf_conntrack_count");
        before.get(path) != Some(value) && !passed_over
    };
    let changed = sysctls(node).into_iter().filter(is_changed);
    changed.map(|(path, value)| format!("{path}: {}", value.trim_end())).collect()
}

/// Each setting that can be read.
pub(crate) fn sysctls(node: &Namespace) -> BTreeMap<String, String> {
    fn read(folder: &Path, settings: &mut BTreeMap<String, String>) -> io::Result<()> {
        for entry in fs::read_dir(folder)?.flatten() {
            let path = entry.path();
            if path.is_dir() {
                read(&path, settings)?;
            } else if let Ok(value) = fs::read_to_string(&path) {
                settings.insert(path.display().to_string(), value);
            }
        }
        Ok(())
    }
    let all = node.run(|| {
        let mut settings = BTreeMap::new();
        read(Path::new("/proc/sys/net"), &mut settings)?;
        Ok(settings)
    });
    all.expect("settings are listed")
}
