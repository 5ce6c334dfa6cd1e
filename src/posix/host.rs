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
    ProcessIdentity {
        boot: boot_id().unwrap_or_default(),
        pid_namespace: pid_namespace().unwrap_or_default(),
        pid,
        start_time: start_time(pid).unwrap_or_default(),
    }
}

/// Whether the process of `other` lives. `this` is this process's identity.
pub fn life_of(this: &ProcessIdentity, other: &ProcessIdentity) -> Life {
    let known = this.boot != [0; 16] && this.pid_namespace != 0 && other.start_time != 0;
    if !known || this.boot != other.boot || this.pid_namespace != other.pid_namespace {
        return Life::Unknown;
    }
    match start_time(other.pid) {
        Some(start) if start == other.start_time => Life::Alive,
        _ => Life::Dead,
    }
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

/// Field 22 of `/proc/PID/stat`. The command name before it may hold anything, so count from its `)`.
/// A zombie is dead: its files are closed.
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    match fields.next()? {
        "Z" | "X" | "x" => None,
        // Field 3 was the state; 22 is the nineteenth after it.
        _ => fields.nth(18)?.parse().ok(),
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
        let other = ProcessIdentity { pid, start_time: start_time(pid).unwrap(), ..this };
        assert_eq!(life_of(&this, &other), Life::Alive);
        let recycled = ProcessIdentity { start_time: other.start_time + 1, ..other };
        assert_eq!(life_of(&this, &recycled), Life::Dead, "the pid was given to another process");
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(life_of(&this, &other), Life::Dead);
        assert_eq!(life_of(&this, &ProcessIdentity { boot: [1; 16], ..other }), Life::Unknown);
    }
}
