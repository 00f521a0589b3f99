//! Network namespaces without root: making them, being in them, starting programs in them. With which rights is in `rights`.
//!
//! A namespace is held by a descriptor and has no name outside this process: it ends with the last
//! descriptor, thread and child in it. Which namespaces there are and how they are wired is in `rig`.
#![allow(unsafe_code)] // unshare and pre_exec: one call a block.

use std::fs::{self, File};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::{fmt, io};

use kube_relay::name::Family;
use rustix::mount::MountPropagationFlags;
use rustix::process::Signal;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::process::Process;
use super::rights::NOBODY;

/// Both families, IPv4 first.
pub(crate) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// An address of each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DualAddress {
    /// The IPv4 address.
    pub(crate) v4: IpAddr,
    /// The IPv6 address.
    pub(crate) v6: IpAddr,
}

impl DualAddress {
    /// The address of one family.
    pub(crate) fn of(self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }
}

/// Why this process cannot have namespaces of its own here.
#[derive(Debug, thiserror::Error)]
#[error("no namespaces of our own: {0}")]
pub(crate) struct Unavailable(String);

/// Moves the whole process into its own user, network and mount namespace, in which it is root.
///
/// Call it first in `main`: the kernel refuses a user namespace once a second thread exists. Without user
/// namespaces root's own rights serve.
pub(crate) fn isolate() -> Result<(), Unavailable> {
    let threads = fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    if threads != 1 {
        return Err(Unavailable(format!("called with {threads} threads running, must be the first call of main")));
    }
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    let own = UnshareFlags::NEWNET | UnshareFlags::NEWNS;
    let outside = uid.is_root().then(stay_outside);
    match unshare(own | UnshareFlags::NEWUSER) {
        Ok(()) => map_users(outside, uid.as_raw(), gid.as_raw())
            .map_err(|error| Unavailable(format!("this kernel gives user namespaces without rights: {error}")))?,
        Err(_) if uid.is_root() => unshare(own).map_err(|error| Unavailable(format!("unshare, as root: {error}")))?,
        Err(error) => return Err(Unavailable(format!("user namespaces are switched off here: {error}"))),
    }
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(|error| Unavailable(format!("mount namespace: {error}")))
}

/// Maps root and nobody, where we were root and so may have somebody outside do that; else root alone.
fn map_users(outside: Option<io::Result<Child>>, uid: u32, gid: u32) -> io::Result<()> {
    if let Some(Ok(child)) = outside
        && child.wait_with_output()?.status.success()
    {
        return Ok(());
    }
    become_root(uid, gid)
}

/// Starts a child that maps root and nobody once its standard input ends, from the user namespace that we are about to leave.
fn stay_outside() -> io::Result<Child> {
    let map = format!("printf '0 0 1\\n{NOBODY} {NOBODY} 1\\n'");
    let script = format!("read -r end; {map} >/proc/$PPID/uid_map && {map} >/proc/$PPID/gid_map");
    Command::new("sh").args(["-c", &script]).stdin(Stdio::piped()).stderr(Stdio::null()).spawn()
}

/// Maps our user to root of the fresh user namespace: the one mapping that needs no rights outside.
fn become_root(uid: u32, gid: u32) -> io::Result<()> {
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1"))
}

pub(super) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    debug_assert!(!flags.contains(UnshareFlags::FILES));
    // SAFETY: descriptors stay shared with all threads, as FILES is never among the flags.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

/// A network namespace and the addresses by which others reach it.
pub(crate) struct Namespace {
    name: String,
    addresses: DualAddress,
    /// `None`: where the process is anyway, for runs on loopback.
    descriptor: Option<OwnedFd>,
}

impl Namespace {
    /// Makes an empty namespace; its loopback is still down.
    pub(crate) fn create(name: impl Into<String>, addresses: DualAddress) -> io::Result<Self> {
        let descriptor = thread::scope(|scope| scope.spawn(unshared_network).join().expect("it does not panic"))?;
        Ok(Self { name: name.into(), addresses, descriptor: Some(descriptor) })
    }

    /// Takes over a descriptor of a namespace that somebody else made.
    pub(crate) fn held(name: impl Into<String>, addresses: DualAddress, descriptor: OwnedFd) -> Self {
        Self { name: name.into(), addresses, descriptor: Some(descriptor) }
    }

    /// Stands for the namespace that the process is in, under an address of its own.
    pub(crate) fn here(name: impl Into<String>, addresses: DualAddress) -> Self {
        Self { name: name.into(), addresses, descriptor: None }
    }

    /// What messages call it: `client`, `router`, `node0`, `pod0-2`.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Where others reach it.
    pub(crate) fn address(&self, family: Family) -> IpAddr {
        self.addresses.of(family)
    }

    /// The descriptor that keeps it alive; `None` on loopback.
    pub(crate) fn descriptor(&self) -> Option<&OwnedFd> {
        self.descriptor.as_ref()
    }

    /// Moves the calling thread in, for good. Sockets stay where they were made.
    pub(crate) fn enter(&self) -> io::Result<()> {
        self.descriptor.as_ref().map_or(Ok(()), enter)
    }

    /// Runs `work` inside, on a thread of its own, and waits for it.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        let inside = || self.enter().and_then(|()| work());
        thread::scope(|scope| scope.spawn(inside).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    }

    /// Starts a thread inside.
    pub(crate) fn thread<T, W>(&self, work: W) -> io::Result<JoinHandle<T>>
    where
        T: Send + 'static,
        W: FnOnce() -> T + Send + 'static,
    {
        let descriptor = self.descriptor.as_ref().map(OwnedFd::try_clone).transpose()?;
        thread::Builder::new().name(self.name.clone()).spawn(move || {
            descriptor.as_ref().map_or(Ok(()), enter).expect("the namespace is ours and alive");
            drop(descriptor);
            work()
        })
    }

    /// Starts a program inside. It gets SIGTERM when the calling *thread* ends, however that happens.
    pub(crate) fn spawn(&self, mut command: Command) -> io::Result<Process> {
        let descriptor = self.descriptor.as_ref().map(OwnedFd::try_clone).transpose()?;
        let before_exec = move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
            descriptor.as_ref().map_or(Ok(()), enter)
        };
        // SAFETY: between fork and exec it makes two system calls and neither allocates nor locks.
        let child = unsafe { command.pre_exec(before_exec) }.spawn()?;
        Ok(Process::new(child))
    }

    /// Sets a `net.*` sysctl inside, named by its path: `net/ipv4/ip_forward`.
    pub(crate) fn sysctl(&self, path: &str, value: &str) -> io::Result<()> {
        let place = format!("/proc/sys/{path}");
        self.run(|| fs::write(&place, value))
            .map_err(|error| io::Error::new(error.kind(), format!("{}: sysctl {path}={value}: {error}", self.name)))
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, {})", self.name, self.addresses.v4, self.addresses.v6)
    }
}

fn enter(descriptor: &OwnedFd) -> io::Result<()> {
    Ok(rustix::thread::move_into_link_name_space(descriptor.as_fd(), Some(LinkNameSpaceType::Network))?)
}

/// Gives the calling thread a network namespace of its own and a descriptor that outlives the thread.
fn unshared_network() -> io::Result<OwnedFd> {
    unshare(UnshareFlags::NEWNET)?;
    Ok(File::open("/proc/thread-self/ns/net")?.into())
}
