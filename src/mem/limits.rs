//! How much memory this process may still take: the limits of its control groups, and what the machine has
//! left. Reads `/proc` and `/sys/fs/cgroup`; takes no memory itself.

#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

const GIB: f64 = (1_u64 << 30) as f64;
/// One part in so many is left to everything else: page tables, the index, the server itself.
const RESERVE_SHARE: u64 = 32;
/// A v1 group without a limit reports a number near the top of 63 bits.
const UNLIMITED: u64 = 1 << 60;

/// One bound, and who sets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    /// Bytes that may ever be taken.
    pub total: u64,
    /// Bytes that are left now.
    pub available: u64,
    /// Where the bound comes from, for messages.
    pub source: String,
}

/// The bounds that hold for this process.
pub fn bounds() -> Vec<Bound> {
    bounds_below(Path::new("/"))
}

/// As [`bounds`], with another root directory in the place of `/`.
fn bounds_below(root: &Path) -> Vec<Bound> {
    let mut bounds: Vec<_> = machine(root).into_iter().collect();
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        if controllers.is_empty() {
            // Version 2, at its own mount or beside version 1.
            for mount in ["sys/fs/cgroup", "sys/fs/cgroup/unified"] {
                walk(&root.join(mount), path, &mut bounds, group_v2);
            }
        } else if controllers.split(',').any(|name| name == "memory") {
            walk(&root.join("sys/fs/cgroup/memory"), path, &mut bounds, group_v1);
        }
    }
    bounds
}

fn machine(root: &Path) -> Option<Bound> {
    let text = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let kib = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Some(Bound {
        total: kib("MemTotal")? * 1024,
        available: kib("MemAvailable")? * 1024,
        source: "memory available on this machine".into(),
    })
}

/// The group and all above it: the tightest holds. Inside a container the path may name a directory that is
/// not mounted; the mount itself then is the container's group.
fn walk(mount: &Path, path: &str, bounds: &mut Vec<Bound>, read: fn(&Path) -> Option<Bound>) {
    let inside = mount.join(path.trim_start_matches('/'));
    let mut group: PathBuf = if inside.is_dir() { inside } else { mount.to_path_buf() };
    loop {
        bounds.extend(read(&group));
        if group == mount || !group.pop() {
            return;
        }
    }
}

fn group_v2(group: &Path) -> Option<Bound> {
    group_bound(group, "memory.max", "memory.current", "inactive_file")
}

fn group_v1(group: &Path) -> Option<Bound> {
    group_bound(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
}

/// The limit of one group, where it has one. Cached file pages count as left: the kernel drops them first.
fn group_bound(group: &Path, limit: &str, usage: &str, dropped: &str) -> Option<Bound> {
    let number = |name: &str| -> Option<u64> {
        fs::read_to_string(group.join(name)).ok()?.trim().parse().ok()
    };
    let total = number(limit).filter(|limit| *limit < UNLIMITED)?;
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let droppable: u64 = stat
        .lines()
        .find_map(|line| line.strip_prefix(dropped)?.strip_prefix(' ')?.trim().parse().ok())
        .unwrap_or(0);
    let used = number(usage)?.saturating_sub(droppable);
    Some(Bound {
        total,
        available: total.saturating_sub(used),
        source: format!("left under the limit of the control group {}", group.display()),
    })
}

/// Whether `bytes` of ordinary memory fit, for each of `ranks` processes of this host. The error names the
/// key to change and the largest number that fits.
pub fn check(bytes: u64, ranks: u32) -> Result<()> {
    check_against(&bounds(), bytes, ranks)
}

fn check_against(bounds: &[Bound], bytes: u64, ranks: u32) -> Result<()> {
    let ranks = u64::from(ranks.max(1));
    for bound in bounds {
        // Other ranks may have taken their share already, so what is left must hold one arena and the
        // whole must hold them all.
        let left = bound.available - bound.available / RESERVE_SHARE;
        let share = (bound.total - bound.total / RESERVE_SHARE) / ranks;
        let fits = left.min(share);
        if bytes <= fits {
            continue;
        }
        let whose = match share < left {
            true => format!("{:.2} GiB for each of {ranks} ranks", share as f64 / GIB),
            false => format!("{:.2} GiB", left as f64 / GIB),
        };
        return Err(Error::new(
            ErrorKind::OutOfMemory,
            format!(
                "cache_buffer_capacity_gb: {:.2} GiB do not fit into {whose} ({}); set it to at most {:.2}",
                bytes as f64 / GIB,
                bound.source,
                (fits as f64 / GIB * 100.0).floor() / 100.0
            ),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    const MEMINFO: &str =
        "MemTotal:       33554432 kB\nMemFree: 1 kB\nMemAvailable:   16777216 kB\n";

    #[test]
    fn version_2_groups_bound_with_their_parents() {
        // Goal: the tightest of a v2 group and its parents is found, dropped file pages count as left.
        let root = tree(&[
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "0::/pod/worker\n"),
            ("sys/fs/cgroup/pod/memory.max", "4294967296\n"),
            ("sys/fs/cgroup/pod/memory.current", "3221225472\n"),
            ("sys/fs/cgroup/pod/memory.stat", "anon 5\ninactive_file 1073741824\n"),
            ("sys/fs/cgroup/pod/worker/memory.max", "max\n"),
            ("sys/fs/cgroup/pod/worker/memory.current", "0\n"),
        ]);
        let bounds = bounds_below(root.path());
        assert_eq!(bounds.len(), 2, "{bounds:?}");
        assert_eq!((bounds[0].total, bounds[0].available), (32 << 30, 16 << 30));
        assert_eq!((bounds[1].total, bounds[1].available), (4 << 30, 2 << 30));
        assert!(check_against(&bounds, 1 << 30, 1).is_ok());
        let error = check_against(&bounds, 2 << 30, 1).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfMemory);
        let text = error.to_string();
        assert!(text.starts_with("cache_buffer_capacity_gb: 2.00 GiB"), "{text}");
        assert!(text.ends_with("set it to at most 1.93"), "{text}");
    }

    #[test]
    fn version_1_groups_bound_and_a_huge_number_does_not() {
        // Goal: v1 files are read, the "no limit" number is no limit, a container's mount is its group.
        let root = tree(&[
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/docker/abc\n0::/a\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1073741824"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "73741824"),
        ]);
        let bounds = bounds_below(root.path());
        assert_eq!(bounds.last().unwrap().available, 1_000_000_000);
        let root = tree(&[
            ("proc/self/cgroup", "4:memory:/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1"),
        ]);
        assert_eq!(bounds_below(root.path()), []);
    }

    #[test]
    fn ranks_share_the_whole_not_what_is_left() {
        // Goal: eight arenas of 2 GiB fit into a group of 20 GiB, also for the rank that comes last.
        let bound = |available| Bound { total: 20 << 30, available, source: "the test".into() };
        assert!(check_against(&[bound(20 << 30)], 2 << 30, 8).is_ok());
        assert!(check_against(&[bound(3 << 30)], 2 << 30, 8).is_ok());
        let error = check_against(&[bound(20 << 30)], 3 << 30, 8).unwrap_err().to_string();
        assert!(error.contains("each of 8 ranks"), "{error}");
    }

    #[test]
    fn this_machine_has_bounds() {
        // Goal: on a real system at least the machine's own bound is found, and an exabyte does not fit.
        assert!(bounds().iter().any(|bound| bound.available > 0));
        assert!(check(1 << 60, 1).is_err());
    }
}
