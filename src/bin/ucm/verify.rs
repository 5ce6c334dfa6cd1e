//! `ucm verify`: reads every part that can be found and compares checksums. Writes nothing.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use ucm::block::{PAGE, PartKey};
use ucm::posix::checksum::Identity;
use ucm::posix::format::{NO_CHECKSUM, Trailer};
use ucm::posix::names::SegmentName;

use crate::namespace::{self, Namespace, Published};
use crate::show;

/// Damaged parts that are named one by one.
const NAMED_MAX: u64 = 20;

#[derive(Default)]
struct Count {
    good: u64,
    bytes: u64,
    unchecked: u64,
    damaged: u64,
    missing: u64,
}

/// Scrubs all namespaces of a directory. True if anything is damaged.
pub fn run(directory: &Path) -> Result<bool, String> {
    let folders = namespace::find(directory)?;
    if folders.is_empty() {
        return Err(format!("{}: no namespace to verify", directory.display()));
    }
    let mut wrong = false;
    for folder in folders {
        let namespace = Namespace::read(&folder)?;
        let count = scrub(&namespace);
        println!(
            "{}: {} parts good ({}), {} without checksum, {} DAMAGED, {} in segments that are gone",
            folder.display(),
            count.good,
            show::size(count.bytes),
            count.unchecked,
            count.damaged,
            count.missing
        );
        let unreadable = namespace.manifests.iter().filter(|m| m.is_unreadable()).count();
        let bad: u64 = namespace.manifests.iter().map(|m| m.bad).sum();
        if unreadable > 0 || bad > 0 {
            println!(
                "  manifests: {unreadable} unreadable, {bad} damaged records; see `ucm rebuild`"
            );
        }
        wrong |= count.damaged > 0 || unreadable > 0 || bad > 0;
    }
    Ok(wrong)
}

fn scrub(namespace: &Namespace) -> Count {
    let mut count = Count::default();
    let Some(fingerprint) = namespace.fingerprint() else { return count };
    let mut open: HashMap<SegmentName, Option<File>> = HashMap::new();
    for part in namespace.published() {
        let segment = part.segment;
        let file = open.entry(segment).or_insert_with(|| {
            namespace.segments.get(&segment).and_then(|found| File::open(&found.path).ok())
        });
        let Some(file) = file else {
            count.missing += 1;
            continue;
        };
        match check(file, &part, fingerprint) {
            Ok(true) => {
                count.good += 1;
                count.bytes += u64::from(part.record.length);
            }
            Ok(false) => count.unchecked += 1,
            Err(reason) => {
                count.damaged += 1;
                if count.damaged <= NAMED_MAX {
                    println!(
                        "DAMAGED block {} part {} in {segment} page {}: {reason}",
                        part.record.block, part.record.part, part.record.page
                    );
                }
            }
        }
    }
    count
}

/// Compares a part with its record and its trailer; false where it was saved without checksum.
fn check(file: &File, part: &Published, fingerprint: [u8; 16]) -> Result<bool, String> {
    let record = &part.record;
    let length = u64::from(record.length);
    let padded = length.next_multiple_of(PAGE as u64) as usize;
    let mut bytes = vec![0_u8; padded + PAGE];
    let offset = u64::from(record.page) * PAGE as u64;
    file.read_exact_at(&mut bytes, offset).map_err(|error| error.to_string())?;
    let trailer = Trailer::decode(&bytes[padded..]).map_err(|r| format!("its trailer: {r:?}"))?;
    let key = PartKey { block: record.block, part: record.part };
    let named = (trailer.block, trailer.part, trailer.writer, trailer.segment);
    let place = (trailer.generation, trailer.page, trailer.checksum, trailer.fingerprint);
    if named != (key.block, key.part, part.segment.writer, part.segment.number)
        || place != (part.segment.generation, record.page, record.checksum, fingerprint)
    {
        return Err("its trailer names another part".into());
    }
    if record.checksum == NO_CHECKSUM {
        return Ok(false);
    }
    let identity = Identity { fingerprint, key, generation: part.segment.generation };
    let sum = crate::namespace::checksum(&identity, &mut bytes, length);
    if sum == record.checksum {
        Ok(true)
    } else {
        Err("its bytes do not match its checksum".into())
    }
}
