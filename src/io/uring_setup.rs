//! How a ring is made: with the best flags that the kernel takes.

#![forbid(unsafe_code)]

use io_uring::IoUring;

use crate::error::{Error, Result};

/// Set-up flags from best to plainest, with the kernel that brought each. The probe steps down until the
/// kernel accepts.
pub(super) const FLAG_SETS: [(&str, Flags); 4] = [
    ("SINGLE_ISSUER|DEFER_TASKRUN", Flags::DeferTaskrun), // 6.1
    ("SINGLE_ISSUER|COOP_TASKRUN", Flags::SingleIssuer),  // 6.0
    ("COOP_TASKRUN", Flags::CoopTaskrun),                 // 5.19
    ("none", Flags::Plain),                               // 5.11 (EXT_ARG)
];

/// For tests that go through them.
#[cfg(test)]
pub(super) const FLAG_SETS_COUNT: usize = FLAG_SETS.len();

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Flags {
    DeferTaskrun,
    SingleIssuer,
    CoopTaskrun,
    Plain,
}

/// Makes a ring with the first of the flag sets that the kernel does not refuse as unknown, and tells which.
pub(super) fn build_ring(
    flag_sets: &[(&'static str, Flags)],
    entries: u32,
) -> Result<(IoUring, &'static str)> {
    let mut refused = libc::EINVAL;
    for &(name, flags) in flag_sets {
        let mut builder = IoUring::builder();
        builder.dontfork();
        if flags != Flags::Plain {
            builder.setup_submit_all().setup_coop_taskrun();
        }
        if matches!(flags, Flags::DeferTaskrun | Flags::SingleIssuer) {
            // Disabled at first, so that the issuer is the thread that calls `start`, not this one.
            builder.setup_single_issuer().setup_r_disabled();
        }
        if flags == Flags::DeferTaskrun {
            builder.setup_defer_taskrun();
        }
        match builder.build(entries) {
            Ok(ring) => return Ok((ring, name)),
            Err(error) => refused = error.raw_os_error().unwrap_or(libc::EINVAL),
        }
        if refused != libc::EINVAL {
            break; // Not for the flags' sake: plainer ones would be refused too.
        }
    }
    Err(Error::os("io_uring_setup", None, None, refused))
}
