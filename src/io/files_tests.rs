//! Tests of path operations, on what file systems offer and on what they refuse.

use super::conformance::Memory;
use super::seccomp::{Refusal, refused};
use super::*;
use crate::error::ErrorKind;

fn create(files: &Arc<OsFiles>, path: &Path) -> Result<File> {
    let how = OpenHow { access: Access::ReadWrite, create: Create::New, direct: false };
    files.open(path, how)
}

/// Renames, in every way a file system may force on us, replace nothing and move the file.
fn rename_replaces_nothing(refusals: Vec<Refusal>) {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::write(at("a"), "first").unwrap();
    std::fs::write(at("b"), "second").unwrap();
    let (a, b, c, d) = (at("a"), at("b"), at("c"), at("d"));
    refused(refusals, move || {
        let files = OsFiles::new();
        assert_eq!(files.rename(&a, &b).unwrap_err().errno(), Some(libc::EEXIST));
        files.rename(&a, &c).unwrap();
        let gone = files.rename(&a, &d).unwrap_err();
        assert_eq!(gone.errno(), Some(libc::ENOENT), "somebody else renamed it first");
        assert_eq!(std::fs::read(&b).unwrap(), b"second");
        assert_eq!(std::fs::read(&c).unwrap(), b"first");
        assert!(!a.exists() && !d.exists());
    });
}

/// Goal: rename replaces nothing, on file systems with RENAME_NOREPLACE.
#[test]
fn rename_replaces_nothing_natively() {
    rename_replaces_nothing(Vec::new());
}

/// Goal: the same where the flag is refused, as on NFS.
#[test]
fn rename_replaces_nothing_by_link() {
    rename_replaces_nothing(vec![Refusal::of(libc::SYS_renameat2, libc::EINVAL)]);
}

/// Goal: the same where there are no hard links either.
#[test]
fn rename_replaces_nothing_by_claim() {
    rename_replaces_nothing(vec![
        Refusal { equals: Some((4, 1)), ..Refusal::of(libc::SYS_renameat2, libc::EINVAL) },
        Refusal::of(libc::SYS_linkat, libc::EPERM),
    ]);
}

/// Goal: files are private, and an existing one is not opened as new.
#[test]
fn files_are_private_and_created_once() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let files = OsFiles::new();
    let below = directory.path().join("x/y");
    files.create_dir_all(&below).unwrap();
    let mode = std::fs::metadata(&below).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    let path = below.join("file");
    let file = create(&files, &path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(create(&files, &path).err().unwrap().errno(), Some(libc::EEXIST));
    assert_eq!(files.list(&below).unwrap(), ["file"]);
    let raw = file.raw();
    drop(file);
    // SAFETY: asks about a descriptor; at worst it is another test's by now, which has CLOEXEC too.
    let flags = unsafe { libc::fcntl(raw, libc::F_GETFD) };
    assert!(flags == -1 || flags & libc::FD_CLOEXEC != 0);
    files.unlink(&path).unwrap();
    assert_eq!(files.unlink(&path).unwrap_err().kind(), ErrorKind::NotFound);
    files.revalidate_dir(&below).unwrap();
    files.sync_dir(&below).unwrap();
    assert!(files.space(&below).unwrap().total > 0);
}

/// Goal: allocate extends and never shrinks, with fallocate and without.
#[test]
fn allocate_extends_and_never_shrinks() {
    for errno in [0, libc::EOPNOTSUPP] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let refusals = match errno {
            0 => Vec::new(),
            errno => vec![Refusal::of(libc::SYS_fallocate, errno)],
        };
        refused(refusals, move || {
            let files = OsFiles::new();
            let file = create(&files, &path).unwrap();
            files.allocate(&file, 1 << 20).unwrap();
            assert_eq!(files.file_metadata(&file).unwrap().length, 1 << 20);
            files.allocate(&file, 4096).unwrap();
            assert_eq!(files.metadata(&path).unwrap().length, 1 << 20);
            files.truncate(&file, 100).unwrap();
            assert_eq!(files.metadata(&path).unwrap().length, 100);
            let identity = files.metadata(&path).unwrap().identity;
            assert_eq!(files.file_metadata(&file).unwrap().identity, identity);
        });
    }
}

/// Goal: blocking transfers move all bytes, stop at the end of the file, and name what failed.
#[test]
fn blocking_transfers_are_whole() {
    let directory = tempfile::tempdir().unwrap();
    let files = OsFiles::new();
    let file = create(&files, &directory.path().join("file")).unwrap();
    let mut memory = Memory::new(64 << 10);
    memory.fill(2);
    let expected = memory.bytes().to_vec();
    // SAFETY: the memory outlives the blocking calls.
    unsafe {
        files.write_at(&file, 4096, memory.all()).unwrap();
        memory.bytes().fill(0);
        assert_eq!(files.read_at(&file, 4096, memory.all()).unwrap(), 64 << 10);
        assert_eq!(memory.bytes(), expected);
        files.truncate(&file, 5000).unwrap();
        assert_eq!(files.read_at(&file, 4096, memory.all()).unwrap(), 904);
        assert_eq!(files.read_at(&file, 1 << 20, memory.all()).unwrap(), 0);
    }
    let reading = OpenHow { access: Access::Read, create: Create::No, direct: false };
    let file = files.open(file.path(), reading).unwrap();
    // SAFETY: as above.
    let error = unsafe { files.write_at(&file, 8192, memory.all()) }.unwrap_err();
    assert_eq!(error.errno(), Some(libc::EBADF));
    assert!(error.to_string().contains("byte 8192"), "{error}");
}

/// Goal: a registered file is released by the ring when it is closed: the space of an unlinked file comes
/// back though the ring lives on.
#[test]
fn a_closed_file_is_not_kept_by_the_ring() {
    use super::conformance::{Kind, open};
    let bench = open(Kind::Uring, |_| ());
    let path = bench.backend.directory().join("segment");
    let file = bench.create("segment");
    let memory = Memory::new(4096);
    bench.transfer(Operation::Write, &file, 0, memory.all()).unwrap();
    // A lease is granted only while nobody else has the file open, the ring included.
    bench.backend.files().unlink(&path).unwrap();
    let link = format!("/proc/self/fd/{}", file.raw());
    let other = std::fs::File::open(link).unwrap();
    drop(file);
    let lease = || {
        use std::os::fd::AsRawFd;
        // SAFETY: asks for a lease on a descriptor that lives.
        unsafe { libc::fcntl(other.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) }
    };
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while lease() != 0 {
        assert!(std::time::Instant::now() < deadline, "the ring still holds the file");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
