//! Tests of the arena: its pages, its refusals, and what a fork costs beside it.

use std::time::{Duration, Instant};

use super::arena::{Arena, ArenaRequest, PageKind};
use super::huge::HUGE_PAGE;
use crate::config::Facility;
use crate::error::ErrorKind;

#[test]
fn an_arena_is_aligned_and_writable_to_the_last_byte() {
    // Goal: every byte of an arena of an odd size belongs to us, the base suits huge pages.
    let arena = Arena::map(5 << 20, None).unwrap();
    assert_eq!(arena.len(), 6 << 20);
    assert_eq!(arena.base() as usize % HUGE_PAGE, 0);
    // SAFETY: the range is the arena's own, and nobody else has its address.
    let bytes = unsafe { std::slice::from_raw_parts_mut(arena.base(), arena.len()) };
    assert!(bytes.iter().all(|byte| *byte == 0));
    bytes.fill(0xA5);
    assert_eq!(bytes[bytes.len() - 1], 0xA5);
    if arena.pages() == PageKind::Small {
        assert!(arena.notes().iter().any(|note| note.contains("huge")), "{:?}", arena.notes());
    }
}

#[test]
fn an_arena_larger_than_memory_is_refused_untouched() {
    // Goal: the refusal comes at once and names the key and a number that fits.
    let start = Instant::now();
    let error = Arena::map(1 << 50, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    let text = error.to_string();
    assert!(text.contains("cache_buffer_capacity_gb") && text.contains("at most"), "{text}");
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[test]
fn small_pages_are_used_when_huge_ones_are_switched_off() {
    // Goal: `huge_pages: off` is obeyed, and is no cause for a note.
    let request =
        ArenaRequest { bytes: 4 << 20, numa_node: None, huge_pages: Facility::Off, ranks: 1 };
    let arena = Arena::open(&request).unwrap();
    assert_eq!(arena.pages(), PageKind::Small);
    assert!(arena.notes().is_empty());
}

#[test]
fn a_node_that_does_not_exist_is_a_note() {
    // Goal: a wrong NUMA node costs locality, not the start.
    let arena = Arena::map(2 << 20, Some(1000)).unwrap();
    assert!(
        arena.notes().iter().any(|note| note.contains("NUMA node 1000")),
        "{:?}",
        arena.notes()
    );
}

/// Whether a process maps any byte of this range.
fn maps(process: i32, base: usize, length: usize) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
    assert!(text.contains("[stack]"), "the mappings of the child can be read");
    text.lines().any(|line| {
        let (start, end) =
            line.split_once(' ').and_then(|(range, _)| range.split_once('-')).unwrap();
        let [start, end] = [start, end].map(|number| usize::from_str_radix(number, 16).unwrap());
        start < base + length && base < end
    })
}

/// Set in the environment of the process that a fork is measured in.
const ALONE: &str = "UCM_TEST_FORK_ALONE";

#[test]
fn a_fork_beside_a_registered_2_gib_arena_is_fast_and_copies_nothing() {
    // Goal: with 2 GiB touched, and registered with io_uring where the kernel allows it, fork() takes at
    // most 5 ms and the child has no copy of the arena, nor the arena at all.
    //
    // A fork pays for everything that its process has touched, and the tests beside this one touch
    // gigabytes: so it is measured in a process of its own.
    if std::env::var_os(ALONE).is_none() {
        let own = std::env::current_exe().unwrap();
        let name =
            "mem::arena_tests::a_fork_beside_a_registered_2_gib_arena_is_fast_and_copies_nothing";
        let output = std::process::Command::new(own)
            .args(["--exact", name, "--nocapture"])
            .env(ALONE, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}{errors}");
        assert!(text.contains("fork beside a 2 GiB arena"), "the test ran there: {text}{errors}");
        return;
    }
    const BYTES: usize = 2 << 30;
    const FORKS: usize = 9;
    let arena = Arena::map(BYTES, None).unwrap();
    let ring = register(&arena);
    let mut times = Vec::new();
    for _ in 0..FORKS {
        let before = Instant::now();
        // SAFETY: the child calls nothing but pause and _exit, which are safe after a fork of a process
        // with threads.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: as above.
            unsafe {
                libc::pause();
                libc::_exit(0);
            }
        }
        times.push(before.elapsed());
        assert!(child > 0, "fork failed");
        let has_arena = maps(child, arena.base() as usize, BYTES);
        // SAFETY: kills and reaps the child that was just made.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, std::ptr::null_mut(), 0);
        }
        assert!(!has_arena, "the child maps the arena");
    }
    times.sort();
    println!(
        "fork beside a 2 GiB arena ({:?} pages, registered: {}): {times:?}",
        arena.pages(),
        ring.is_some(),
    );
    // The cost of a fork is its best time: the rest is what else the processors did. A copy of the arena
    // would take seconds every time.
    assert!(times[0] <= Duration::from_millis(5), "{times:?}");
}

/// Registers the arena as fixed buffers of 1 GiB, the largest the kernel takes. `None` where the kernel
/// refuses io_uring or the locked memory.
fn register(arena: &Arena) -> Option<io_uring::IoUring> {
    const CHUNK: usize = 1 << 30;
    let ring = io_uring::IoUring::new(4).ok()?;
    let chunks: Vec<_> = (0..arena.len() / CHUNK)
        .map(|index| libc::iovec {
            // SAFETY: the offset lies inside the arena.
            iov_base: unsafe { arena.base().add(index * CHUNK) }.cast(),
            iov_len: CHUNK,
        })
        .collect();
    // SAFETY: the chunks lie in the arena, which the caller keeps until after the ring is gone.
    unsafe { ring.submitter().register_buffers(&chunks) }.ok()?;
    Some(ring)
}
