//! Where the bench's files lie: a folder of its own in each directory, made with room to spare, removed at
//! the end unless told.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::units::show_size;

/// Folder that `--keep` uses, in each directory.
pub const KEPT: &str = "ucm-bench-keep";
/// Begin of the names of other folders.
const PREFIX: &str = "ucm-bench-run-";
/// What must stay free beyond the data: segments are whole, and a full file system slows others.
const SPARE_BYTES: u64 = 512 << 20;

/// What becomes of the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// They are removed.
    Remove,
    /// They stay.
    Keep,
}

/// The folders of one run.
pub struct Ground {
    folders: Vec<PathBuf>,
    /// Directories that did not exist before.
    made: Vec<PathBuf>,
    after: After,
}

impl Ground {
    /// Makes a folder in each directory; refuses where the file system has less room than the data of
    /// `bytes`, spread evenly, needs.
    pub fn new(directories: &[PathBuf], bytes: u64, after: After) -> Result<Self, String> {
        static COUNTER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let mut ground = Self { folders: Vec::new(), made: Vec::new(), after };
        let each = bytes / directories.len().max(1) as u64 + SPARE_BYTES;
        for directory in directories {
            if !directory.exists() {
                // Its parents are not made: where they are missing too, the path is mistyped.
                make(directory)?;
                eprintln!("ucm-bench: {} is made for this run", directory.display());
                ground.made.push(directory.clone());
            }
            tell_leftovers(directory);
            let available = available(directory)?;
            if available < each && !(after == After::Keep && directory.join(KEPT).exists()) {
                return Err(format!(
                    "{}: {} are free, the run needs {}; give a smaller --size or another --directory",
                    directory.display(),
                    show_size(available),
                    show_size(each)
                ));
            }
            let number = COUNTER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let folder = match after {
                After::Keep => directory.join(KEPT),
                After::Remove => directory.join(format!("{PREFIX}{}-{number}", std::process::id())),
            };
            make(&folder)?;
            ground.folders.push(folder);
        }
        Ok(ground)
    }

    /// The folders.
    pub fn folders(&self) -> &[PathBuf] {
        &self.folders
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if self.after == After::Keep {
            return;
        }
        for folder in &self.folders {
            if let Err(error) = std::fs::remove_dir_all(folder) {
                eprintln!("ucm-bench: {} is left behind: {error}", folder.display());
            }
        }
        for directory in &self.made {
            // Not empty means somebody else uses it by now.
            let _ = std::fs::remove_dir(directory);
        }
    }
}

/// One folder; that it is there already is as good.
fn make(directory: &Path) -> Result<(), String> {
    if directory.is_dir() {
        return Ok(());
    }
    std::fs::DirBuilder::new().mode(0o700).create(directory).map_err(|error| {
        format!(
            "{}: cannot be made: {error}; give a --directory you may write to",
            directory.display()
        )
    })
}

/// A run that was killed cannot clean up; the next one says so. It may run on another host, so it is told
/// and not removed.
fn tell_leftovers(directory: &Path) {
    let own = format!("{PREFIX}{}-", std::process::id());
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let Some(rest) = name.strip_prefix(PREFIX).filter(|_| !name.starts_with(&own)) else {
            continue;
        };
        let process = rest.split('-').next().unwrap_or_default();
        if !Path::new("/proc").join(process).exists() {
            eprintln!(
                "ucm-bench: {} is left from a run that was killed (unless it runs on another host); remove it",
                entry.path().display()
            );
        }
    }
}

/// Bytes that may still be written below `directory`.
pub fn available(directory: &Path) -> Result<u64, String> {
    let path = CString::new(directory.as_os_str().as_bytes())
        .map_err(|_| String::from("a NUL in --directory"))?;
    // SAFETY: an all-zero statvfs is a value of the struct.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: a NUL-terminated path and a local.
    if unsafe { libc::statvfs(path.as_ptr(), &mut stat) } != 0 {
        return Err(format!("{}: {}", directory.display(), std::io::Error::last_os_error()));
    }
    Ok(stat.f_bavail as u64 * stat.f_frsize as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: nothing is left behind, not even the directory where the bench made it.
    #[test]
    fn leaves_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("new");
        let ground = Ground::new(std::slice::from_ref(&directory), 1, After::Remove).unwrap();
        std::fs::write(ground.folders()[0].join("x"), "x").unwrap();
        drop(ground);
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    /// Goal: a path whose parent is missing is mistyped; nothing is made.
    #[test]
    fn a_missing_parent_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("mistyped").join("kv");
        let error = Ground::new(&[directory], 1, After::Remove).err().expect("no parent");
        assert!(error.contains("mistyped/kv"), "{error}");
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    /// Goal: too little space is refused, with numbers, before anything is made.
    #[test]
    fn refuses_without_room() {
        let parent = tempfile::tempdir().unwrap();
        let error = Ground::new(&[parent.path().to_path_buf()], 1 << 60, After::Remove)
            .err()
            .expect("an exbibyte does not fit");
        assert!(error.contains("are free") && error.contains("--size"), "{error}");
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    /// Goal: with --keep the folder has a name that the next run finds, and stays.
    #[test]
    fn keeps() {
        let parent = tempfile::tempdir().unwrap();
        drop(Ground::new(&[parent.path().to_path_buf()], 1, After::Keep).unwrap());
        assert!(parent.path().join(KEPT).is_dir());
    }
}
