//! A file system that does not answer: a FUSE mount without anybody behind it. Needs the right to mount, and
//! says so where there is none.

mod common;

use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use common::*;
use tempfile::TempDir;
use ucm::error::ErrorKind;
use ucm::store::Store;

const BLOCK: usize = 64 << 10;

/// A mount that hangs; dropped, everything that waits for it fails and it is gone.
struct HungMount {
    path: PathBuf,
    /// The end where a file server would read requests.
    device: Option<File>,
}

impl HungMount {
    /// `None` where mounting is not allowed.
    fn on(path: &Path) -> Option<Self> {
        std::fs::create_dir_all(path).unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse").ok()?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let options = CString::new(options).unwrap();
        let target = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: strings that end with zero, alive during the call.
        let mounted = unsafe {
            libc::mount(
                c"ucm-hung".as_ptr(),
                target.as_ptr(),
                c"fuse".as_ptr(),
                0,
                options.as_ptr().cast(),
            )
        };
        (mounted == 0).then(|| Self { path: path.to_path_buf(), device: Some(device) })
    }
}

impl Drop for HungMount {
    fn drop(&mut self) {
        // Closing the device fails what waits; only then can the mount go.
        drop(self.device.take());
        let target = CString::new(self.path.as_os_str().as_bytes()).unwrap();
        // SAFETY: a string that ends with zero, alive during the call.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

/// Goal: opening a store on a mount that hangs ends, with `Timeout`.
#[test]
fn opening_on_a_mount_that_hangs_ends_with_timeout() {
    let directory = TempDir::new().unwrap();
    let Some(hung) = HungMount::on(&directory.path().join("hung")) else {
        println!("skipped: mounting is not allowed here");
        return;
    };
    let pairs = pairs_in(hung.path.to_str().unwrap(), &[("timeout_ms", "1000")]);
    let error = Store::open(options(&pairs).build().unwrap()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert!(error.to_string().contains("hung"), "it names the directory: {error}");
}

/// Goal: of two directories one hangs; the store opens, saves and loads with the other.
#[test]
fn two_backends_do_not_share_their_fate() {
    let directory = TempDir::new().unwrap();
    let Some(hung) = HungMount::on(&directory.path().join("hung")) else {
        println!("skipped: mounting is not allowed here");
        return;
    };
    let good = directory.path().join("good");
    let both = format!("{}:{}", hung.path.display(), good.display());
    let extra = [("timeout_ms", "4000"), ("namespace_extra", "hung")];
    let pairs = pairs_in(&both, &extra);
    let store = Store::open(options(&pairs).build().unwrap()).unwrap();
    let numbers: Vec<u64> = (0..40).collect();
    save_blocks(&store, &numbers, BLOCK);
    let other = store_in(&good, &[extra[1]]);
    assert_eq!(load_blocks(&other, &numbers, BLOCK), []);
    store.close();
}
