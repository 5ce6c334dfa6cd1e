//! `ucm rebuild`: a manifest is a cache of the trailers; where it is gone it is written anew from them.
//!
//! Only for writers whose manifest is missing or cannot be read: nobody writes into another's file. The new
//! manifest is fenced (its writer may not go on with it) and lists what the trailers of its segments say.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use ucm::block::PAGE;
use ucm::posix::format::{
    HEAD_PAGE_FIRST, Head, Kind, ManifestHeader, ProcessIdentity, RECORD_BYTES, RECORD_PAGE_FIRST,
    RECORDS_PER_PAGE, Record, SEAL_MANIFEST, SegmentHeader, Trailer, head_record_mut, record_seal,
};
use ucm::posix::host::{Life, life_of, random_id, this_process, wall_ms};
use ucm::posix::names::{Fence, MANIFESTS, ManifestName, dead_name};

use crate::namespace::{self, Manifest, Namespace, Segment};

/// Rebuilds what is missing in all namespaces of a directory. True if something could not be.
pub fn run(directory: &Path, dry_run: bool) -> Result<bool, String> {
    let folders = namespace::find(directory)?;
    if folders.is_empty() {
        return Err(format!("{}: no namespace to rebuild", directory.display()));
    }
    let mut wrong = false;
    for folder in folders {
        let namespace = Namespace::read(&folder)?;
        let writers = to_rebuild(&namespace);
        if writers.is_empty() {
            println!("{}: every segment has a manifest; nothing to do", folder.display());
        }
        for writer in writers {
            match rebuild(&namespace, writer, dry_run) {
                Ok(line) => println!("{}: {line}", folder.display()),
                Err(reason) => {
                    println!("{}: writer {writer:016x}: {reason}", folder.display());
                    wrong = true;
                }
            }
        }
    }
    Ok(wrong)
}

/// Writers that have segments but no manifest that can be read.
fn to_rebuild(namespace: &Namespace) -> BTreeSet<u64> {
    let readable: BTreeSet<u64> = namespace
        .manifests
        .iter()
        .filter(|manifest| !manifest.is_unreadable())
        .map(|manifest| manifest.name.writer)
        .collect();
    let writers = namespace.segments.keys().map(|name| name.writer);
    writers.filter(|writer| !readable.contains(writer)).collect()
}

fn rebuild(namespace: &Namespace, writer: u64, dry_run: bool) -> Result<String, String> {
    let broken: Vec<&Manifest> =
        namespace.manifests.iter().filter(|m| m.name.writer == writer).collect();
    for manifest in &broken {
        let alive = manifest
            .header
            .as_ref()
            .is_ok_and(|header| life_of(&this_process(), &header.process) == Life::Alive);
        if alive {
            return Err("its process still runs; stop it, then rebuild".into());
        }
    }
    let mut records = Vec::new();
    let mut parts = BTreeSet::new();
    let mut header = None;
    let segments = namespace.segments.values().filter(|segment| segment.name.writer == writer);
    for segment in segments {
        let Ok(first) = &segment.header else { continue };
        header = header.or(Some(*first));
        let found = trailers(segment, first)?;
        parts.extend(found.values().map(|trailer| trailer.part));
        records.extend(found.values().map(publish));
        records.push(seal(segment, first, &found));
    }
    let Some(header) = header else {
        return Err("none of its segments has a readable first page".into());
    };
    let published = records.iter().filter(|record| record.kind == Kind::Publish).count();
    records.push(Record { segment: SEAL_MANIFEST, ..Record::of(Kind::Seal, wall_ms()) });
    let (first, last) = match (parts.first(), parts.last()) {
        (Some(first), Some(last)) => (*first, *last),
        _ => return Ok(format!("writer {writer:016x}: no whole part in its segments")),
    };
    let name = ManifestName {
        writer,
        part_first: first,
        part_number: last - first + 1,
        epoch: broken.iter().map(|manifest| manifest.name.epoch + 1).max().unwrap_or(0),
        fence: Fence::Fenced,
    };
    if dry_run {
        return Ok(format!("writer {writer:016x}: would write {name} with {published} parts"));
    }
    write(namespace, name, &header, &records)?;
    for manifest in broken {
        let by = random_id();
        let old = manifest.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        std::fs::rename(&manifest.path, manifest.path.with_file_name(dead_name(&old, by)))
            .map_err(|error| format!("{}: {error}", manifest.path.display()))?;
    }
    Ok(format!("writer {writer:016x}: wrote {name} with {published} parts"))
}

/// The valid trailers of a segment, by first page of their extent.
fn trailers(segment: &Segment, header: &SegmentHeader) -> Result<BTreeMap<u32, Trailer>, String> {
    let told = |error: std::io::Error| format!("{}: {error}", segment.path.display());
    let file = File::open(&segment.path).map_err(told)?;
    let payload_pages = header.part_bytes.div_ceil(PAGE as u64) as u32;
    let mut page = vec![0; PAGE];
    let mut found = BTreeMap::new();
    let pages = (segment.length / PAGE as u64) as u32;
    let mut first = 1;
    while first + payload_pages < pages {
        let at = u64::from(first + payload_pages) * PAGE as u64;
        file.read_exact_at(&mut page, at).map_err(told)?;
        if let Ok(trailer) = Trailer::decode(&page) {
            let ours = trailer.fingerprint == header.fingerprint
                && trailer.writer == segment.name.writer
                && trailer.segment == segment.name.number
                && trailer.generation == segment.name.generation
                && trailer.page == first
                && trailer.part_bytes == header.part_bytes;
            if ours {
                found.insert(first, trailer);
            }
        }
        first += payload_pages + 1;
    }
    Ok(found)
}

fn publish(trailer: &Trailer) -> Record {
    Record {
        part: trailer.part,
        block: trailer.block,
        segment: trailer.segment,
        generation: trailer.generation,
        page: trailer.page,
        length: trailer.part_bytes as u32,
        checksum: trailer.checksum,
        ..Record::of(Kind::Publish, trailer.time_ms)
    }
}

fn seal(segment: &Segment, header: &SegmentHeader, found: &BTreeMap<u32, Trailer>) -> Record {
    let extent = header.part_bytes.div_ceil(PAGE as u64) as u32 + 1;
    Record {
        segment: segment.name.number,
        generation: segment.name.generation,
        page: found.last_key_value().map_or(1, |(first, _)| first + extent),
        ..Record::of(Kind::Seal, wall_ms())
    }
}

/// Lays a whole manifest out and writes it under a temporary name first, so that no reader sees half of it.
fn write(
    namespace: &Namespace,
    name: ManifestName,
    segment: &SegmentHeader,
    records: &[Record],
) -> Result<(), String> {
    let sealing = record_seal(name.writer, name.epoch);
    let full = records.len() / RECORDS_PER_PAGE;
    let mut bytes = vec![0; (RECORD_PAGE_FIRST as usize + full) * PAGE];
    ManifestHeader {
        fingerprint: segment.fingerprint,
        writer: name.writer,
        part_first: name.part_first,
        part_number: name.part_number,
        epoch: name.epoch,
        process: ProcessIdentity::default(),
        lease_ms: 0,
        part_bytes: segment.part_bytes,
        created_ms: wall_ms(),
    }
    .encode(&mut bytes[..PAGE]);
    let head = Head {
        commit: 1,
        page: RECORD_PAGE_FIRST + full as u32,
        count: (records.len() % RECORDS_PER_PAGE) as u32,
        writer: name.writer,
        epoch: name.epoch,
        time_ms: wall_ms(),
    };
    let record_area = RECORD_PAGE_FIRST as usize * PAGE;
    for (sequence, record) in records.iter().enumerate() {
        let record = Record { sequence: sequence as u64, ..*record };
        if sequence / RECORDS_PER_PAGE < full {
            let at = record_area + sequence * RECORD_BYTES;
            record.encode(&sealing, &mut bytes[at..at + RECORD_BYTES]);
        } else {
            let page = &mut bytes[HEAD_PAGE_FIRST as usize * PAGE..][..PAGE];
            record.encode(&sealing, head_record_mut(page, sequence % RECORDS_PER_PAGE));
        }
    }
    head.encode(&mut bytes[head.place() as usize * PAGE..][..PAGE]);
    let folder = namespace.path.join(MANIFESTS);
    let path = folder.join(name.to_string());
    let temporary = folder.join(format!(".rebuild-{:016x}", random_id()));
    let told = |error: std::io::Error| format!("{}: {error}", path.display());
    if path.exists() {
        return Err(format!("{} is there already", path.display()));
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(told)?;
    let written = file.write_all(&bytes).and_then(|()| file.sync_all());
    let renamed = written.and_then(|()| std::fs::rename(&temporary, &path));
    if renamed.is_err() {
        // The error is told; what is left of the attempt goes.
        let _ = std::fs::remove_file(&temporary);
    }
    renamed.map_err(told)
}
