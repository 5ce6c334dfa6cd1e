//! Who a process is, beyond its number, and whether it still lives. Numbers are used again; the start time,
//! the boot and the namespace of the number tell two bearers apart.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use crate::error::{Error, Result};

/// A process, for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: u32,
    /// Clock ticks from boot to its start (`/proc/PID/stat`, field 22).
    pub(super) start: u64,
    /// Hash of the kernel's boot id.
    pub(super) boot: u64,
    /// Inode of the PID namespace in which `pid` is meant.
    pub(super) namespace: u64,
}

impl Process {
    /// This one.
    pub(super) fn current() -> Result<Self> {
        let pid = std::process::id();
        let attempt = || -> std::io::Result<Self> {
            let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
            let hash = blake3::hash(boot.trim().as_bytes());
            let (boot, _) = hash.as_bytes().split_at(8);
            Ok(Self {
                pid,
                start: start_time(pid)?,
                boot: boot.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)),
                namespace: fs::metadata("/proc/self/ns/pid")?.ino(),
            })
        };
        attempt().map_err(|error| Error::io("reading the identity of this process", None, &error))
    }

    /// Whether `pid` of this process means the same to `here`, so that `here` can judge its life.
    pub(super) fn is_visible_from(&self, here: &Process) -> bool {
        self.boot == here.boot && self.namespace == here.namespace
    }

    /// Whether it certainly is no more. Processes that cannot be seen from here are not judged, but for
    /// those of an earlier boot.
    pub(super) fn is_gone(&self, here: &Process) -> bool {
        match self.is_visible_from(here) {
            true => start_time(self.pid).ok() != Some(self.start),
            false => self.boot != here.boot,
        }
    }

    /// A descriptor that becomes readable when it ends; `None` where it has, or the kernel gives none.
    pub(super) fn watch(&self) -> Option<OwnedFd> {
        // SAFETY: pidfd_open takes a number and flags and touches no memory.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid as libc::pid_t, 0) };
        if fd < 0 {
            return None;
        }
        // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        // The descriptor is of whoever bears the number now; it is of the right one if that has the right
        // start, because the number cannot pass on while it bears it.
        (start_time(self.pid).ok() == Some(self.start)).then_some(fd)
    }
}

/// Whether the process of each descriptor still runs, by one system call that does not wait.
pub(super) fn running<'a>(watches: impl Iterator<Item = &'a OwnedFd>) -> Vec<bool> {
    let mut polls: Vec<_> = watches
        .map(|fd| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 })
        .collect();
    if polls.is_empty() {
        return Vec::new();
    }
    // SAFETY: `polls` has as many entries as are announced, and lives until the call returns.
    let ready = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, 0) };
    // A failed poll (EINTR, ENOMEM) proves no life, and a hit that is missed costs little.
    polls.iter().map(|poll| ready >= 0 && poll.revents == 0).collect()
}

/// Says with a lock on `file` that this process is what it was: the kernel lets go of the lock when the process
/// ends, and also when it executes another program, which keeps number and start time.
pub(super) fn hold(file: &File) -> std::io::Result<()> {
    flock(file, libc::LOCK_EX)
}

/// Whether anybody holds the file. Where the system does not say, it counts as held.
pub(super) fn is_held(file: &File) -> bool {
    match flock(file, libc::LOCK_SH) {
        // Readers' locks do not exclude each other, and a writer takes its own before there are readers.
        Ok(()) => flock(file, libc::LOCK_UN).is_err(),
        Err(_) => true,
    }
}

fn flock(file: &File, operation: libc::c_int) -> std::io::Result<()> {
    // SAFETY: flock takes an open descriptor and touches no memory of this process.
    match unsafe { libc::flock(file.as_raw_fd(), operation | libc::LOCK_NB) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn start_time(pid: u32) -> std::io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may hold anything, also spaces and parentheses; 20 fields follow it up to the
    // start time, of which the state is the first. A zombie has ended.
    let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    let state = fields.next().unwrap_or_default();
    let start = fields.nth(18).and_then(|field| field.parse().ok());
    match start {
        Some(start) if !matches!(state, "Z" | "X") => Ok(start),
        _ => Err(std::io::ErrorKind::NotFound.into()),
    }
}
