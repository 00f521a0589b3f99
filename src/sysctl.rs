//! A setting of the kernel under `/proc/sys`: read by whoever likes, set only where somebody has asked for that.
//!
//! Those of the network are the ones of this process's network namespace. Which of them matter, and what they are to be,
//! is for who reads them to say (`arp`, `arp_tuning`).

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A setting with a number, by its path below `/proc/sys`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Sysctl(String);

/// A setting stays as it is.
#[derive(Debug, thiserror::Error)]
#[error("cannot set {} to {value}", .file.display())]
pub(crate) struct SysctlError {
    /// What would have to be written.
    file: PathBuf,
    value: i32,
    /// What the kernel said.
    pub(crate) source: io::Error,
}

impl Sysctl {
    /// One of those that IPv4 has for each interface, and for `all`.
    pub(crate) fn of_interface(interface: &str, name: &str) -> Self {
        Self(format!("net/ipv4/conf/{interface}/{name}"))
    }

    /// Its value; `None` where there is no such setting, and where it is no number.
    pub(crate) fn read(&self) -> Option<i32> {
        fs::read_to_string(self.file()).ok()?.trim().parse().ok()
    }

    /// Sets it.
    ///
    /// # Errors
    /// Nobody but root and who has `CAP_NET_ADMIN` may, and in most containers all of `/proc/sys` is read-only.
    pub(crate) fn set(&self, value: i32) -> Result<(), SysctlError> {
        let file = self.file();
        fs::write(&file, value.to_string()).map_err(|source| SysctlError { file, value, source })
    }

    /// True where this process could set it; what it is stays.
    pub(crate) fn may_set(&self) -> bool {
        fs::OpenOptions::new().write(true).open(self.file()).is_ok()
    }

    fn file(&self) -> PathBuf {
        Path::new("/proc/sys").join(&self.0)
    }
}

/// As `sysctl` wants it: `net.ipv4.conf.eth0.arp_ignore`. A dot inside a name is a slash there.
impl fmt::Display for Sysctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let swapped = |letter| match letter {
            '/' => '.',
            '.' => '/',
            other => other,
        };
        f.write_str(&self.0.chars().map(swapped).collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::causes::causes;

    #[test]
    fn given_a_setting_of_an_interface_with_a_dot_when_printed_then_sysctl_understands_it() {
        let setting = Sysctl::of_interface("eth0.100", "arp_ignore");

        assert_eq!(setting.to_string(), "net.ipv4.conf.eth0/100.arp_ignore");
    }

    #[test]
    fn given_settings_when_read_then_those_that_are_there_have_a_number() {
        assert!(Sysctl::of_interface("lo", "arp_ignore").read().is_some());
        assert_eq!(Sysctl::of_interface("nothing-is-called-so", "arp_ignore").read(), None);
    }

    #[test]
    fn given_a_setting_that_cannot_be_set_when_tried_then_the_file_is_named() {
        let setting = Sysctl::of_interface("nothing-is-called-so", "arp_ignore");

        let error = setting.set(1).expect_err("there is no such interface");

        let file = "cannot set /proc/sys/net/ipv4/conf/nothing-is-called-so/arp_ignore to 1: No such file";
        assert!(causes(&error).starts_with(file), "{}", causes(&error));
    }
}
