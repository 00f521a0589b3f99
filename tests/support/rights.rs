//! With which rights a program starts: those of a pod, of a system service, and what it may write to.
//!
//! Each function has a [`Command`] do so before it becomes the program. What it needs until then, to enter a namespace
//! say, it keeps until then.
#![allow(unsafe_code)] // pre_exec: between fork and exec all of them make system calls, and neither allocate nor lock.

use std::ffi::CStr;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::fs::{Gid, StatVfsMountFlags, Uid};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::thread::{self, CapabilitySet, CapabilitySets, UnshareFlags};

use super::namespace::unshare;

/// A user without rights, as systemd and most images have it.
pub(crate) const NOBODY: u32 = 65_534;

const ROOT: &CStr = c"/";
const SETTINGS: &CStr = c"/proc/sys";

/// As root with these capabilities alone: the pod's form, as Kubernetes gives nobody else any.
pub(crate) fn with_only(kept: CapabilitySet, command: &mut Command) {
    let before_exec = move || {
        for capability in CapabilitySet::all().difference(kept).iter() {
            match thread::remove_capability_from_bounding_set(capability) {
                Ok(()) | Err(Errno::INVAL) => {} // This kernel may not know the newest ones.
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    };
    // SAFETY: it makes system calls, and neither allocates nor locks.
    unsafe { command.pre_exec(before_exec) };
}

/// As [`NOBODY`] with these capabilities as ambient ones: systemd's form.
pub(crate) fn as_nobody_with(kept: CapabilitySet, command: &mut Command) {
    let before_exec = move || {
        let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        thread::set_keep_capabilities(true)?;
        thread::set_thread_groups(&[])?;
        thread::set_thread_res_gid(group, group, group)?;
        thread::set_thread_res_uid(user, user, user)?;
        let all = thread::capabilities(None)?.permitted;
        thread::set_capabilities(None, CapabilitySets { effective: all, permitted: all, inheritable: kept })?;
        // Of all these exec leaves the ambient ones, to whom is not root.
        kept.iter().try_for_each(|capability| thread::configure_capability_in_ambient_set(capability, true))?;
        Ok(())
    };
    // SAFETY: as above.
    unsafe { command.pre_exec(before_exec) };
}

/// With a root file system that nobody can write to, in a mount namespace of its own.
pub(crate) fn on_a_read_only_root(command: &mut Command) {
    // SAFETY: as above.
    unsafe { command.pre_exec(make_root_read_only) };
}

/// Where no setting of the kernel can be changed, as in most containers.
pub(crate) fn with_settings_read_only(command: &mut Command) {
    // SAFETY: as above.
    unsafe { command.pre_exec(make_settings_read_only) };
}

fn make_settings_read_only() -> io::Result<()> {
    unshare(UnshareFlags::NEWNS)?;
    rustix::mount::mount_bind_recursive(SETTINGS, SETTINGS)?;
    // What is mounted at /proc may have all of them, and none may be taken away.
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(rustix::mount::mount_remount(SETTINGS, MountFlags::BIND | MountFlags::RDONLY | flags, c"")?)
}

fn make_root_read_only() -> io::Result<()> {
    unshare(UnshareFlags::NEWNS)?;
    // In a user namespace of ours nothing may be allowed that was not allowed before.
    let known = rustix::fs::statvfs(ROOT)?.f_flag;
    let kept = [
        (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
        (StatVfsMountFlags::RELATIME, MountFlags::RELATIME),
    ];
    let kept = kept.into_iter().filter(|(is, _)| known.contains(*is)).map(|(_, flag)| flag);
    let flags = kept.fold(MountFlags::BIND | MountFlags::RDONLY, MountFlags::union);
    Ok(rustix::mount::mount_remount(ROOT, flags, c"")?)
}

/// As on a kernel that has no netfilter.
pub(crate) fn without_netfilter(command: &mut Command) {
    let step = |code: u32, operand: u32, otherwise: u8| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: otherwise,
        k: operand,
    };
    // Offsets of `struct seccomp_data`: the number of the call, the halves of its arguments that count.
    let (load, is_equal) = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K);
    let (end, half) = (libc::BPF_RET | libc::BPF_K, if cfg!(target_endian = "big") { 4 } else { 0 });
    let steps = [
        step(load, 0, 0),
        step(is_equal, libc::SYS_socket as u32, 5),
        step(load, 16 + half, 0),
        step(is_equal, libc::AF_NETLINK as u32, 3),
        step(load, 32 + half, 0),
        step(is_equal, libc::NETLINK_NETFILTER as u32, 1),
        step(end, libc::SECCOMP_RET_ERRNO | libc::EPROTONOSUPPORT as u32, 0),
        step(end, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let before_exec = move || {
        thread::set_no_new_privs(true)?;
        let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_ptr().cast_mut() };
        // SAFETY: the kernel reads the program, which lives as long as the call, and keeps a copy of its own.
        let outcome = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
        if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: it makes system calls, and neither allocates nor locks.
    unsafe { command.pre_exec(before_exec) };
}
