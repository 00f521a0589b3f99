//! What was read of this machine, or why it could not be: files of the kernel, and nothing that changes any.

use std::fs;
use std::io;
use std::str::FromStr;

/// Something that was to be read.
pub(super) type Fact<T> = Result<T, Unreadable>;

/// Why something is not known: which file or question, and what the kernel or the server said.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {why}")]
pub(super) struct Unreadable {
    what: String,
    why: String,
}

impl Unreadable {
    pub(super) fn new(what: impl Into<String>, why: impl ToString) -> Self {
        Self { what: what.into(), why: why.to_string() }
    }
}

/// The text of a file; `None` where there is none.
pub(super) fn file(path: &str) -> Fact<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Unreadable::new(path, error)),
    }
}

/// The names in a folder, sorted; none where there is no such folder.
pub(super) fn names_in(path: &str) -> Fact<Vec<String>> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Unreadable::new(path, error)),
    };
    let mut names: Vec<String> = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into()).collect();
    names.sort();
    Ok(names)
}

/// A setting, by the name that `sysctl` has for it (without dots in its parts); `None` where this kernel has none such.
pub(super) fn sysctl<T: FromStr>(name: &str) -> Fact<Option<T>> {
    let Some(text) = file(&format!("/proc/sys/{}", name.replace('.', "/")))? else { return Ok(None) };
    parsed(name, &text).map(Some)
}

/// The interfaces where a setting of `net.ipv4.conf` is not 0, and of `all` (it holds for each) and `default` (for each that is
/// new) those that are.
pub(super) fn interfaces_with(setting: &str) -> Fact<Vec<String>> {
    const INTERFACES: &str = "/proc/sys/net/ipv4/conf";
    let mut set = Vec::new();
    for interface in names_in(INTERFACES)? {
        let value = file(&format!("{INTERFACES}/{interface}/{setting}"))?;
        if value.is_some_and(|value| value.trim() != "0") {
            set.push(interface);
        }
    }
    Ok(set)
}

/// What `sysctl -w` is to be given so that a setting of `net.ipv4.conf` is 0 there.
pub(super) fn off(setting: &str, interface: &str) -> String {
    format!("net.ipv4.conf.{}.{setting}=0", interface.replace('.', "/"))
}

/// The two numbers of a setting like `net.ipv4.ip_local_port_range`.
pub(super) fn sysctl_pair<T: FromStr>(name: &str) -> Fact<Option<(T, T)>> {
    let Some(text) = sysctl::<String>(name)? else { return Ok(None) };
    match text.split_whitespace().collect::<Vec<_>>().as_slice() {
        [first, second] => Ok(Some((parsed(name, first)?, parsed(name, second)?))),
        _ => Err(Unreadable::new(name, format!("{text:?} are no two numbers"))),
    }
}

fn parsed<T: FromStr>(name: &str, text: &str) -> Fact<T> {
    let text = text.trim();
    text.parse().map_err(|_| Unreadable::new(name, format!("{text:?} is not understood")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_settings_when_read_then_missing_ones_are_none_and_odd_ones_are_told() {
        assert_eq!(sysctl::<u64>("net.ipv4.nobody_has_this"), Ok(None));
        assert!(matches!(sysctl::<u64>("net.core.somaxconn"), Ok(Some(_)) | Err(_)));
        assert!(interfaces_with("route_localnet").is_ok() && interfaces_with("nobody_has_this") == Ok(vec![]));
        assert_eq!(parsed::<u16>("a.b", " 7\n"), Ok(7));
        let error = parsed::<u16>("a.b", "seven").expect_err("no number").to_string();
        assert_eq!(error, "a.b: \"seven\" is not understood");
    }

    #[test]
    fn given_a_folder_that_is_not_there_when_listed_then_it_is_empty() {
        assert_eq!(names_in("/nonexistent/folder"), Ok(Vec::new()));
    }
}
