//! Who this process is, whether another process of this host still lives, and the clocks.
//!
//! Reads `/proc` only; knows no namespace and no file of UCM.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::posix::format::ProcessIdentity;

/// What is known about the process that wrote a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It runs on this host.
    Alive,
    /// It ran on this host, in this pid namespace, and does not any more.
    Dead,
    /// It runs or ran elsewhere: only its lease can tell.
    Unknown,
}

/// The identity of this process.
pub fn this_process() -> ProcessIdentity {
    let pid = std::process::id();
    // Where /proc is that of another pid namespace, nothing in it is told by our pids.
    let start_time = match (look_up(&format!("/proc/{pid}")), look_up("/proc/self")) {
        (Entry::Runs(by_pid), Entry::Runs(own)) if by_pid == own => own,
        _ => 0,
    };
    ProcessIdentity {
        boot: boot_id().unwrap_or_default(),
        pid_namespace: pid_namespace().unwrap_or_default(),
        pid,
        start_time,
    }
}

/// Whether the process of `other` lives. `this` is this process's identity.
pub fn life_of(this: &ProcessIdentity, other: &ProcessIdentity) -> Life {
    let known = this.boot != [0; 16]
        && this.pid_namespace != 0
        && this.start_time != 0
        && other.start_time != 0;
    if !known || this.boot != other.boot || this.pid_namespace != other.pid_namespace {
        return Life::Unknown;
    }
    match look_up(&format!("/proc/{}", other.pid)) {
        Entry::Runs(start) if start == other.start_time => Life::Alive,
        Entry::Runs(_) | Entry::Gone => Life::Dead,
        Entry::Unreadable => Life::Unknown,
    }
}

/// What `/proc` says of a process.
#[derive(Debug, PartialEq, Eq)]
enum Entry {
    /// It runs since this tick.
    Runs(u64),
    /// There is none, or only its exit status is left.
    Gone,
    /// It cannot be told: no descriptor is left, no right to look.
    Unreadable,
}

/// Wall clock in milliseconds since 1970.
pub fn wall_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}

/// Time since boot, suspended time included: a lease runs on while a machine sleeps.
pub fn boot_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec for the call to fill; on failure it stays zero.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// 64 random bits, for writer ids.
pub fn random_id() -> u64 {
    let mut bytes = [0u8; 8];
    // SAFETY: `bytes` is valid for writing 8 bytes; at most 256 bytes are never cut short.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    match got == 8 {
        true => u64::from_ne_bytes(bytes),
        // Before the entropy pool is ready, or under a filter: std's hasher keys are random too.
        false => {
            use std::hash::BuildHasher;
            std::hash::RandomState::new().hash_one(std::process::id())
        }
    }
}

fn boot_id() -> Option<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let hex: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    Some(u128::from_str_radix(&hex, 16).ok()?.to_be_bytes())
}

fn pid_namespace() -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    Some(std::fs::metadata("/proc/self/ns/pid").ok()?.ino())
}

/// Reads `stat` in a folder of `/proc`.
fn look_up(folder: &str) -> Entry {
    match std::fs::read_to_string(format!("{folder}/stat")) {
        Ok(stat) => read_stat(folder, &stat),
        Err(error) => match error.raw_os_error() {
            // ESRCH: it ended between open and read.
            Some(libc::ENOENT | libc::ESRCH) => Entry::Gone,
            _ => Entry::Unreadable,
        },
    }
}

/// The command name may hold anything, so fields count from its `)`: the state is field 3, the start field 22.
fn read_stat(folder: &str, stat: &str) -> Entry {
    let fields = || Some(stat.rsplit_once(')')?.1.split_ascii_whitespace());
    let state = fields().and_then(|mut fields| fields.next());
    let start = fields().and_then(|mut fields| fields.nth(19)?.parse().ok());
    match (state, start) {
        (Some("X" | "x"), _) => Entry::Gone,
        // A zombie's files are closed, unless only its first thread has ended.
        (Some("Z"), Some(start)) => {
            match std::fs::read_dir(format!("{folder}/task")).map(Iterator::count) {
                Ok(0..=1) => Entry::Gone,
                Ok(_) => Entry::Runs(start),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Entry::Gone,
                Err(_) => Entry::Unreadable,
            }
        }
        (Some(_), Some(start)) => Entry::Runs(start),
        _ => Entry::Unreadable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This process is alive, a child that has ended is dead, another boot is unknown.
    #[test]
    fn death_is_seen_on_this_host_only() {
        let this = this_process();
        assert_eq!(life_of(&this, &this), Life::Alive);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id();
        let Entry::Runs(start_time) = look_up(&format!("/proc/{pid}")) else { panic!("it sleeps") };
        let other = ProcessIdentity { pid, start_time, ..this };
        assert_eq!(life_of(&this, &other), Life::Alive);
        let recycled = ProcessIdentity { start_time: other.start_time + 1, ..other };
        assert_eq!(life_of(&this, &recycled), Life::Dead, "the pid was given to another process");
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(life_of(&this, &other), Life::Dead);
        assert_eq!(life_of(&this, &ProcessIdentity { boot: [1; 16], ..other }), Life::Unknown);
    }

    /// A process whose first thread has ended lives as long as another one runs: its files are open.
    #[test]
    fn a_process_without_its_first_thread_lives() {
        extern "C" fn nap(_: *mut libc::c_void) -> *mut libc::c_void {
            // SAFETY: neither call takes memory.
            unsafe {
                libc::sleep(60);
                libc::_exit(0)
            }
        }
        // SAFETY: the child starts one thread and ends its first; it allocates nothing and never returns.
        let pid = unsafe {
            match libc::fork() {
                0 => {
                    let mut thread = std::mem::zeroed();
                    libc::pthread_create(
                        &raw mut thread,
                        std::ptr::null(),
                        nap,
                        std::ptr::null_mut(),
                    );
                    libc::syscall(libc::SYS_exit, 0);
                    libc::_exit(1)
                }
                pid => pid,
            }
        };
        let folder = format!("/proc/{pid}");
        let is_zombie =
            || std::fs::read_to_string(format!("{folder}/stat")).unwrap().contains(") Z ");
        while !is_zombie() {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(matches!(look_up(&folder), Entry::Runs(_)));
        // SAFETY: the child is ours, and `waitpid` may leave the status out.
        unsafe {
            libc::kill(pid, libc::SIGKILL);
            libc::waitpid(pid, std::ptr::null_mut(), 0);
        }
        assert_eq!(look_up(&folder), Entry::Gone);
    }

    /// What cannot be read says nothing about life.
    #[test]
    fn an_unreadable_entry_is_no_death() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().to_str().unwrap();
        assert_eq!(look_up(folder), Entry::Gone);
        std::fs::create_dir(dir.path().join("stat")).unwrap();
        assert_eq!(look_up(folder), Entry::Unreadable);
    }
}
