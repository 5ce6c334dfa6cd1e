//! Tests of the simulated disk itself: it must lie as told, the same way each time, and never otherwise.

use super::*;
use crate::error::{ErrorKind, Result};
use crate::io::{Access, Create, DmaSlice, OpenHow};

const NEW: OpenHow = OpenHow { access: Access::ReadWrite, create: Create::New, direct: false };

fn write(files: &Arc<dyn Files>, file: &File, offset: u64, bytes: &[u8]) -> Result<()> {
    let memory = DmaSlice { pointer: bytes.as_ptr().cast_mut(), length: bytes.len() };
    // SAFETY: the bytes outlive the blocking call, which only reads them.
    unsafe { files.write_at(file, offset, memory) }
}

/// Two files: one flushed with its name, one not at all; then a flushed one overwritten without a flush.
fn scenario(files: &Arc<dyn Files>) -> Result<()> {
    let directory = Path::new("/d");
    files.create_dir_all(directory)?;
    let kept = files.open(Path::new("/d/kept"), NEW)?;
    write(files, &kept, 0, &[1; 8192])?;
    files.sync_data(&kept)?;
    files.sync_dir(directory)?;
    let loose = files.open(Path::new("/d/loose"), NEW)?;
    write(files, &loose, 0, &[2; 4096])?;
    write(files, &kept, 4096, &[3; 4096])?;
    files.rename(Path::new("/d/loose"), Path::new("/d/named"))
}

/// Goal: at every step and for many seeds, power loss keeps what was flushed, byte for byte, and of the rest
/// only old or new sectors; and both outcomes happen.
#[test]
fn power_loss_keeps_what_was_flushed() {
    let total = {
        let disk = SimDisk::new(SimConfig::default());
        scenario(&disk.files()).unwrap();
        disk.steps()
    };
    let (mut lost, mut torn, mut whole) = (0, 0, 0);
    for crash_at in 1..=total {
        for seed in 0..20 {
            let config = SimConfig { seed, crash_at: Some(crash_at), ..SimConfig::default() };
            let disk = SimDisk::new(config);
            assert!(scenario(&disk.files()).is_err(), "step {crash_at} fails");
            assert!(disk.is_dark());
            let config = SimConfig { seed, ..SimConfig::default() };
            let after = disk.reboot(Survival::PowerLoss, config);
            let flushed = crash_at > 4; // create, write, sync, sync_dir have all been whole.
            match after.peek(Path::new("/d/kept")) {
                Some(bytes) if flushed => {
                    assert_eq!(bytes.len(), 8192);
                    assert!(bytes[..4096].iter().all(|byte| *byte == 1));
                    let new = bytes[4096..].chunks(512).filter(|sector| sector[0] == 3).count();
                    assert!(bytes[4096..].chunks(512).all(|s| s.iter().all(|b| *b == s[0])));
                    whole += usize::from(new == 8);
                    torn += usize::from((1..8).contains(&new));
                    lost += usize::from(new == 0);
                }
                None => assert!(!flushed, "a flushed name was lost at step {crash_at}"),
                Some(_) => {}
            }
        }
    }
    assert!(lost > 0 && torn > 0 && whole > 0, "{lost} lost, {torn} torn, {whole} whole");
}

/// Goal: the death of the process alone loses nothing that was done.
#[test]
fn process_death_keeps_what_was_done() {
    let disk = SimDisk::new(SimConfig::default());
    scenario(&disk.files()).unwrap();
    disk.pull_plug();
    let after = disk.reboot(Survival::ProcessDeath, SimConfig::default());
    assert_eq!(after.paths(), [Path::new("/d/kept"), Path::new("/d/named")]);
    assert_eq!(after.peek(Path::new("/d/named")).unwrap(), [2; 4096]);
    assert_eq!(after.peek(Path::new("/d/kept")).unwrap()[4096..], [3; 4096]);
    let dead = disk.files().list(Path::new("/d")).unwrap_err();
    assert_eq!(dead.errno(), Some(libc::EIO));
}

/// Goal: the same seed gives the same faults, another seed others.
#[test]
fn a_seed_repeats() {
    let faults_of = |seed: u64| -> Vec<bool> {
        let disk = SimDisk::new(SimConfig { seed, ..SimConfig::default() });
        let files = disk.files();
        files.create_dir_all(Path::new("/d")).unwrap();
        let file = files.open(Path::new("/d/f"), NEW).unwrap();
        let effect = Effect::Errno(libc::EIO);
        disk.inject(Fault { call: Call::Write, occasion: Occasion::OneIn(3), effect });
        (0..64).map(|index| write(&files, &file, index * 4096, &[7; 4096]).is_err()).collect()
    };
    assert_eq!(faults_of(1), faults_of(1));
    assert_ne!(faults_of(1), faults_of(2));
    let count = faults_of(1).iter().filter(|failed| **failed).count();
    assert!((8..=40).contains(&count), "{count} of 64 at one in three");
}

/// Goal: space is bounded, reservations count, and what is removed and closed comes back.
#[test]
fn space_runs_out_and_comes_back() {
    let disk = SimDisk::new(SimConfig { space_bytes: 64 << 10, ..SimConfig::default() });
    let files = disk.files();
    files.create_dir_all(Path::new("/d")).unwrap();
    let first = files.open(Path::new("/d/first"), NEW).unwrap();
    files.allocate(&first, 48 << 10).unwrap();
    let second = files.open(Path::new("/d/second"), NEW).unwrap();
    write(&files, &second, 0, &[1; 16 << 10]).unwrap();
    let full = write(&files, &second, 16 << 10, &[1; 4096]).unwrap_err();
    assert_eq!(full.kind(), ErrorKind::NoSpace);
    write(&files, &first, 0, &[1; 48 << 10]).unwrap();
    assert_eq!(files.allocate(&second, 20 << 10).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(files.space(Path::new("/d")).unwrap().available, 0);
    files.unlink(Path::new("/d/first")).unwrap();
    assert_eq!(disk.usage(), (64 << 10, 2), "an open file keeps its space");
    drop(first);
    assert_eq!(disk.usage(), (16 << 10, 1));
}

/// Goal: a file that is cut reads as zeros when it grows again.
#[test]
fn a_cut_file_forgets() {
    let disk = SimDisk::new(SimConfig::default());
    let files = disk.files();
    files.create_dir_all(Path::new("/d")).unwrap();
    let file = files.open(Path::new("/d/f"), NEW).unwrap();
    write(&files, &file, 0, &[9; 8192]).unwrap();
    files.truncate(&file, 100).unwrap();
    files.truncate(&file, 8192).unwrap();
    let bytes = disk.peek(Path::new("/d/f")).unwrap();
    assert!(bytes[..100].iter().all(|byte| *byte == 9));
    assert!(bytes[100..].iter().all(|byte| *byte == 0));
}
