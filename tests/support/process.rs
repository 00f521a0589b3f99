//! A child process that ends with its owner, whatever way the owner goes.
//!
//! Where it is started is in `namespace`.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::time::Duration;
use std::{env, fs, io};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};

/// How long a child has between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(2);

/// Where a program is, also one that is only root's by custom; `None` where it is not installed.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin", "/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// A running program with its own children. Dropping it ends them all.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
}

impl Process {
    pub(super) fn new(child: Child) -> Self {
        Self { child }
    }

    /// The pids of the program and of everything it started, as of now, parents first.
    pub(crate) fn pids(&self) -> Vec<u32> {
        let mut pids = vec![self.child.id()];
        let mut next = 0;
        while let Some(&pid) = pids.get(next) {
            pids.extend(children(pid));
            next += 1;
        }
        pids
    }

    /// The next line that it prints, without its end; nothing where it has ended. Its standard output must be piped, and it
    /// must not go on before it is asked to.
    pub(crate) fn next_line(&mut self) -> io::Result<String> {
        let output = self.child.stdout.as_mut().ok_or_else(|| io::Error::other("standard output is not piped"))?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }

    /// Writes a line to its standard input, which must be piped.
    pub(crate) fn say(&mut self, line: &str) -> io::Result<()> {
        let input = self.child.stdin.as_mut().ok_or_else(|| io::Error::other("standard input is not piped"))?;
        input.write_all(format!("{line}\n").as_bytes())
    }

    /// How it ended; `None` while it runs.
    pub(crate) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }

    /// Waits for the program's end, for as long as it has to clean up.
    fn await_end(pidfd: &OwnedFd) {
        let grace = Timespec { tv_sec: GRACE.as_secs().cast_signed(), tv_nsec: 0 };
        let _ = rustix::event::poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&grace));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        // Descriptors first: once the program is gone its pids may belong to somebody else.
        let tree: Vec<OwnedFd> = self.pids().into_iter().flat_map(pidfd).collect();
        if let Some(program) = tree.first() {
            let _ = rustix::process::pidfd_send_signal(program, Signal::TERM);
            Self::await_end(program);
        }
        for process in &tree {
            let _ = rustix::process::pidfd_send_signal(process, Signal::KILL); // gone already: fine
        }
        let _ = self.child.wait();
    }
}

fn pidfd(pid: u32) -> Option<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()
}

fn children(pid: u32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let listed = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    listed.flat_map(|pids| pids.split_whitespace().flat_map(str::parse).collect::<Vec<u32>>()).collect()
}
