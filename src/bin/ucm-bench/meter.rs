//! What the process costs: CPU time from getrusage, system calls from the kernel's tracepoint.
//!
//! Counts the whole process, so one group of jobs at a time is measured. Knows no jobs.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// CPU time of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cpu {
    /// Seconds in user mode.
    pub user: f64,
    /// Seconds in the kernel.
    pub system: f64,
}

impl Cpu {
    /// Of this process so far, all threads.
    pub fn now() -> Self {
        // SAFETY: an all-zero rusage is a value of the struct.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: the out pointer is a local.
        unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) };
        let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
        Self { user: seconds(usage.ru_utime), system: seconds(usage.ru_stime) }
    }

    /// The difference since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self { user: self.user - earlier.user, system: self.system - earlier.system }
    }

    /// Both.
    pub fn total(self) -> f64 {
        self.user + self.system
    }
}

/// Counts system calls of this process, its later threads and its later children.
pub struct Syscalls(Option<OwnedFd>);

/// Where tracefs says which number the tracepoint has.
const TRACEPOINT_IDS: [&str; 2] = [
    "/sys/kernel/tracing/events/raw_syscalls/sys_enter/id",
    "/sys/kernel/debug/tracing/events/raw_syscalls/sys_enter/id",
];

impl Syscalls {
    /// Starts to count; to be called before threads are made. Where tracefs or the permission
    /// (CAP_PERFMON) is missing, every count is unknown.
    pub fn start() -> Self {
        let id = TRACEPOINT_IDS
            .iter()
            .find_map(|path| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok());
        Self(id.and_then(Self::open))
    }

    fn open(tracepoint: u64) -> Option<OwnedFd> {
        const PERF_TYPE_TRACEPOINT: u64 = 2;
        const ATTRIBUTE_BYTES: u64 = 128;
        const FLAG_INHERIT: u64 = 1 << 1;
        // struct perf_event_attr as 64-bit words: (type, size), config, .., flags at word 5.
        let mut attribute = [0_u64; (ATTRIBUTE_BYTES / 8) as usize];
        attribute[0] = PERF_TYPE_TRACEPOINT | (ATTRIBUTE_BYTES << 32);
        attribute[1] = tracepoint;
        attribute[5] = FLAG_INHERIT;
        // SAFETY: the attribute has the size it states; this process, any CPU, no group.
        let descriptor = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                attribute.as_ptr(),
                0,
                -1,
                -1,
                8, /* CLOEXEC */
            )
        };
        // SAFETY: a new descriptor that nothing else owns.
        (descriptor >= 0).then(|| unsafe { OwnedFd::from_raw_fd(descriptor as i32) })
    }

    /// System calls so far.
    pub fn count(&self) -> Option<u64> {
        let mut value = 0_u64;
        let descriptor = self.0.as_ref()?.as_raw_fd();
        // SAFETY: eight bytes into a local of eight bytes.
        let read = unsafe { libc::read(descriptor, (&raw mut value).cast(), 8) };
        (read == 8).then_some(value)
    }
}

/// What a stretch of time cost.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Wall time.
    pub elapsed: Duration,
    /// CPU time.
    pub cpu: Cpu,
    /// System calls, where they can be counted.
    pub syscalls: Option<u64>,
}

/// The begin of a stretch.
pub struct Mark {
    at: Instant,
    cpu: Cpu,
    syscalls: Option<u64>,
}

impl Mark {
    /// Now.
    pub fn now(syscalls: &Syscalls) -> Self {
        Self { at: Instant::now(), cpu: Cpu::now(), syscalls: syscalls.count() }
    }

    /// What has been spent since.
    pub fn cost(&self, syscalls: &Syscalls) -> Cost {
        Cost {
            elapsed: self.at.elapsed(),
            cpu: Cpu::now().since(self.cpu),
            syscalls: syscalls.count().zip(self.syscalls).map(|(now, then)| now - then),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: work of another thread is counted, and time asleep is not.
    #[test]
    fn cpu_of_all_threads() {
        let syscalls = Syscalls::start();
        let mark = Mark::now(&syscalls);
        let burn = || {
            let begin = Instant::now();
            let mut n = 0_u64;
            while begin.elapsed() < Duration::from_millis(50) {
                n = std::hint::black_box(n + 1);
            }
        };
        std::thread::spawn(burn).join().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let cost = mark.cost(&syscalls);
        assert!(cost.cpu.total() > 0.01 && cost.elapsed >= Duration::from_millis(70), "{cost:?}");
    }
}
