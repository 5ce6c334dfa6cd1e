//! Huge pages: which ones the machine has, which ones memory lies in, and what gives it more.
//!
//! Reads `/sys` and `/proc`; maps nothing. The size of a huge page follows from that of the base page. With 4 KiB
//! there are 2 MiB ones, reserved and transparent. With 64 KiB (some aarch64 kernels) transparent ones have
//! 512 MiB, and so has what `vm.nr_hugepages` reserves; 2 MiB pages come from the pool of their own size only.

#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;

/// Size of the huge pages that are asked for.
pub const HUGE_PAGE: usize = 2 << 20;
/// The pool of 2 MiB pages, whatever the default size is.
const POOL: &str = "sys/kernel/mm/hugepages/hugepages-2048kB";
const TRANSPARENT: &str = "sys/kernel/mm/transparent_hugepage";

/// What a machine has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HugePages {
    /// Pages of [`HUGE_PAGE`] that are reserved, and those of them that can still be had.
    pub pool: u64,
    /// See `pool`.
    pub pool_free: u64,
    /// Whether transparent ones are to be had on advice.
    pub transparent: bool,
    /// Bytes of a transparent one; 0 where the kernel has none.
    pub transparent_bytes: u64,
}

impl HugePages {
    /// Those of this machine.
    pub fn here() -> Self {
        Self::below(Path::new("/"))
    }

    /// As [`HugePages::here`], with another root directory in the place of `/`.
    pub fn below(root: &Path) -> Self {
        let text = |path: String| fs::read_to_string(root.join(path)).unwrap_or_default();
        let pool = |name: &str| number(&text(format!("{POOL}/{name}")));
        let enabled = text(format!("{TRANSPARENT}/enabled"));
        let transparent_bytes = number(&text(format!("{TRANSPARENT}/hpage_pmd_size")));
        Self {
            pool: pool("nr_hugepages"),
            pool_free: pool("free_hugepages").saturating_sub(pool("resv_hugepages")),
            transparent: enabled.contains("[always]") || enabled.contains("[madvise]"),
            transparent_bytes,
        }
    }

    /// The commands that make room for so many bytes.
    pub fn remedy(&self, bytes: u64) -> String {
        let wanted = bytes.div_ceil(HUGE_PAGE as u64);
        let pages = self.pool + wanted.saturating_sub(self.pool_free);
        let reserve = format!("reserve some (`echo {pages} > /{POOL}/nr_hugepages`)");
        match self.transparent_bytes == HUGE_PAGE as u64 {
            true => format!(
                "{reserve} or allow transparent ones (`echo madvise > /{TRANSPARENT}/enabled`)"
            ),
            false => reserve,
        }
    }
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

/// Bytes of this range that really lie in transparent huge pages.
pub fn transparent_within(base: usize, length: usize) -> u64 {
    let maps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let mut inside = false;
    let mut kib = 0;
    for line in maps.lines() {
        if let Some(range) = address_range(line) {
            inside = range.0 < base + length && base < range.1;
        } else if inside && let Some(rest) = line.strip_prefix("AnonHugePages:") {
            kib += number(rest.trim_end_matches("kB"));
        }
    }
    kib * 1024
}

/// The addresses at the head of a mapping in smaps: `start-end perms ...`.
fn address_range(line: &str) -> Option<(usize, usize)> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[(&str, &str)]) -> HugePages {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        HugePages::below(root.path())
    }

    /// Goal: the remedy reserves what is missing beside what others use, from the pool of 2 MiB pages, and offers
    /// transparent pages where they have that size.
    #[test]
    fn a_machine_with_pages_of_4_kib_has_two_remedies() {
        let machine = machine(&[
            (&format!("{POOL}/nr_hugepages"), "10\n"),
            (&format!("{POOL}/free_hugepages"), "7\n"),
            (&format!("{POOL}/resv_hugepages"), "3\n"),
            (&format!("{TRANSPARENT}/enabled"), "always madvise [never]\n"),
            (&format!("{TRANSPARENT}/hpage_pmd_size"), "2097152\n"),
        ]);
        let expected = HugePages {
            pool: 10,
            pool_free: 4,
            transparent: false,
            transparent_bytes: HUGE_PAGE as u64,
        };
        assert_eq!(machine, expected);
        let remedy = machine.remedy(20 << 20);
        assert!(
            remedy.contains("echo 16 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
        );
        assert!(remedy.contains("echo madvise"), "{remedy}");
    }

    /// Goal: with base pages of 64 KiB the remedy was `sysctl vm.nr_hugepages`, which reserves pages of 512 MiB
    /// there, and transparent pages, which have that size too.
    #[test]
    fn a_machine_with_pages_of_64_kib_is_not_told_to_reserve_half_gigabytes() {
        let machine = machine(&[
            (&format!("{POOL}/nr_hugepages"), "0\n"),
            (&format!("{TRANSPARENT}/enabled"), "always [madvise] never\n"),
            (&format!("{TRANSPARENT}/hpage_pmd_size"), "536870912\n"),
        ]);
        assert!(machine.transparent);
        let remedy = machine.remedy(1 << 30);
        assert_eq!(
            remedy,
            "reserve some (`echo 512 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages`)"
        );
    }
}
