//! Tests of what a backend does where the platform refuses things: the refusals are real, made by seccomp
//! or by a file system that lacks the thing.

use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::conformance::Memory;
use super::seccomp::{Refusal, refused};
use super::*;
use crate::error::{Error, ErrorKind};

const PATIENCE: Duration = Duration::from_secs(20);

fn open(directory: &Path, engine: IoEngine, direct: DirectIo) -> Result<Arc<Backend>> {
    let config = BackendConfig { engine, direct, ..BackendConfig::default() };
    Backend::open(directory, &config, Instant::now() + PATIENCE)
}

/// Writes and reads back, through whatever engine was chosen.
fn round_trip(backend: &Arc<Backend>) {
    let access = Access::ReadWrite;
    let how = OpenHow { access, create: Create::New, direct: backend.is_direct() };
    let file = backend.files().open(&backend.directory().join("file"), how).unwrap();
    let mut memory = Memory::new(1 << 20);
    memory.fill(1);
    let expected = memory.bytes().to_vec();
    for operation in [Operation::Write, Operation::Read] {
        let (sender, end) = mpsc::channel();
        backend.submit(Request {
            operation,
            file: file.clone(),
            offset: 0,
            memory: memory.all(),
            class: Class::Save,
            expires: None,
            done: Box::new(move |result| _ = sender.send(result)),
        });
        end.recv_timeout(PATIENCE).unwrap().unwrap();
        if operation == Operation::Write {
            memory.bytes().fill(0);
        }
    }
    assert_eq!(memory.bytes(), expected);
}

/// Goal: where io_uring_setup is refused (Docker: EPERM, gVisor: ENOSYS), `auto` runs psync and says what
/// it costs and which flag cures it.
#[test]
fn a_refused_ring_falls_back_to_psync_and_says_so() {
    for (errno, flag) in [(libc::EPERM, "seccomp=unconfined"), (libc::ENOSYS, "5.19")] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_path_buf();
        refused(vec![Refusal::of(libc::SYS_io_uring_setup, errno)], move || {
            let backend = open(&path, IoEngine::Auto, DirectIo::Auto).unwrap();
            let report = backend.report();
            assert_eq!(report.engine, "psync");
            let [fallback] = &report.fallbacks[..] else { panic!("{:?}", report.fallbacks) };
            assert!(fallback.remedy.contains(flag), "{fallback}");
            assert!(fallback.cost.contains("CPU"), "{fallback}");
            round_trip(&backend);
        });
    }
}

/// Goal: a profile that lets the ring be made and refuses to enter it is found out too.
#[test]
fn a_ring_that_cannot_be_entered_falls_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_path_buf();
    refused(vec![Refusal::of(libc::SYS_io_uring_enter, libc::EPERM)], move || {
        let backend = open(&path, IoEngine::Auto, DirectIo::Auto).unwrap();
        assert_eq!(backend.report().engine, "psync");
        round_trip(&backend);
    });
}

/// Goal: `io_uring` required and refused is an error that names the cure, not a fallback.
#[test]
fn a_required_ring_is_an_error_where_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_path_buf();
    let error = refused(vec![Refusal::of(libc::SYS_io_uring_setup, libc::EPERM)], move || {
        open(&path, IoEngine::IoUring, DirectIo::Auto).err().expect("the ring is refused")
    });
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("seccomp=unconfined"), "{error}");
}

/// Goal: a ring works with every set of flags, down to none, as kernels that lack the better ones make it.
#[test]
fn every_flag_set_makes_a_working_ring() {
    for skip in 0..super::uring_setup::FLAG_SETS_COUNT {
        let ring = super::uring::Uring::with_flags_from(skip, 8).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let config = BackendConfig { direct: DirectIo::Off, ..BackendConfig::default() };
        let files: Arc<dyn Files> = OsFiles::new();
        let backend = Backend::with_parts(directory.path(), files, vec![Box::new(ring)], &config);
        round_trip(&backend);
    }
}

/// Goal: memory that may not be locked (memlock) is a fallback that is told, and transfers work.
#[test]
fn refused_registration_is_told_and_harmless() {
    /// From linux/io_uring.h.
    const IORING_REGISTER_BUFFERS_UPDATE: u32 = 16;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_path_buf();
    let refusal = Refusal {
        equals: Some((1, IORING_REGISTER_BUFFERS_UPDATE)),
        ..Refusal::of(libc::SYS_io_uring_register, libc::ENOMEM)
    };
    refused(vec![refusal], move || {
        let backend = open(&path, IoEngine::IoUring, DirectIo::Auto).unwrap();
        let memory = Memory::new(1 << 20);
        backend.register_memory(memory.all().pointer, 1 << 20).unwrap();
        let report = backend.report();
        assert_eq!(report.registered_bytes, 0);
        let [fallback] = &report.fallbacks[..] else { panic!("{:?}", report.fallbacks) };
        assert!(fallback.remedy.contains("ulimit -l unlimited"), "{fallback}");
        round_trip(&backend);
        backend.unregister_memory(memory.all().pointer).unwrap();
    });
}

fn no_direct() -> Refusal {
    let argument = Some((2, libc::O_DIRECT as u32));
    Refusal { argument, ..Refusal::of(libc::SYS_openat, libc::EINVAL) }
}

/// Goal: a file system without O_DIRECT is used through the page cache, and that is told.
#[test]
fn refused_direct_io_falls_back_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_path_buf();
    refused(vec![no_direct()], move || {
        let backend = open(&path, IoEngine::Auto, DirectIo::Auto).unwrap();
        assert!(!backend.is_direct());
        let report = backend.report();
        let [fallback] = &report.fallbacks[..] else { panic!("{:?}", report.fallbacks) };
        assert!(fallback.what.contains("O_DIRECT"), "{fallback}");
        assert!(fallback.remedy.contains("io_direct: false"), "{fallback}");
        round_trip(&backend);
    });
}

/// Goal: direct I/O required and refused is an error that says what to do.
#[test]
fn required_direct_io_is_an_error_where_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_path_buf();
    let error = refused(vec![no_direct()], move || {
        open(&path, IoEngine::Auto, DirectIo::Required).err().expect("it is refused")
    });
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("io_direct"), "{error}");
}

/// Goal: what was configured away is not reported as a fallback.
#[test]
fn what_is_configured_off_is_no_fallback() {
    let directory = tempfile::tempdir().unwrap();
    let backend = open(directory.path(), IoEngine::Psync, DirectIo::Off).unwrap();
    assert!(backend.report().fallbacks.is_empty());
    assert!(!backend.is_direct());
    round_trip(&backend);
}

/// Goal: the probe leaves nothing behind.
#[test]
fn the_probe_leaves_no_file() {
    let directory = tempfile::tempdir().unwrap();
    drop(open(directory.path(), IoEngine::Auto, DirectIo::Auto).unwrap());
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

/// Goal: a directory that has not answered by the deadline ends with Timeout, naming it. The deadline is
/// over from the start, so that any answer comes too late.
#[test]
fn a_directory_that_does_not_answer_is_a_timeout() {
    let directory = tempfile::tempdir().unwrap();
    let opened = Backend::open(directory.path(), &BackendConfig::default(), Instant::now());
    let error = opened.err().expect("nothing answers in no time");
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.to_string().contains(&*directory.path().to_string_lossy()), "{error}");
}

/// Goal: a directory below a file, or one that may not be made, is a clear error.
#[test]
fn a_bad_directory_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let error: Error =
        open(&file.join("below"), IoEngine::Auto, DirectIo::Auto).err().expect("not a directory");
    assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
    assert!(error.to_string().contains("storage_backends"), "{error}");
}
