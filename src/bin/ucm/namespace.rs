//! One namespace's folder, read as any reader may read it: manifests, segments, and what the records say.
//!
//! Works on the documented format alone (`docs/format.md`), without a store and its fingerprint, so that it
//! also reads what no configuration at hand opens. Writes nothing.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use ucm::block::PAGE;
use ucm::io::DmaSlice;
use ucm::posix::checksum::Identity;
use ucm::posix::format::{
    Decoded, HEAD_PAGE_FIRST, Head, Kind, ManifestHeader, RECORD_BYTES, RECORD_PAGE_FIRST,
    RECORDS_PER_PAGE, Record, SEAL_MANIFEST, SegmentHeader, head_record, record_seal,
};
use ucm::posix::names::{
    MANIFESTS, ManifestName, NAMESPACE_FILE, SEGMENTS, SegmentName, is_dead_name,
};

/// Begin of the names of namespace folders.
const FOLDER_PREFIX: &str = "ucm";

/// A manifest file.
pub struct Manifest {
    /// What its name says.
    pub name: ManifestName,
    /// Where it is.
    pub path: PathBuf,
    /// Its first page, or why it cannot be read.
    pub header: Result<ManifestHeader, String>,
    /// Its good records, in order.
    pub records: Vec<Record>,
    /// Records that were damaged or misplaced.
    pub bad: u64,
    /// Whether a head page could be read: without one nothing of it counts.
    pub has_head: bool,
    /// When its writer last wrote, milliseconds since 1970.
    pub written_ms: u64,
}

impl Manifest {
    /// Whether nothing can be read of it.
    pub fn is_unreadable(&self) -> bool {
        self.header.is_err() || !self.has_head
    }

    /// Whether its writer closed it, or it was continued or fenced.
    pub fn is_closed(&self) -> bool {
        self.records.iter().any(|record| {
            (record.kind == Kind::Seal && record.segment == SEAL_MANIFEST)
                || (record.kind == Kind::Epoch && record.segment > self.name.epoch)
        })
    }
}

/// A segment file.
pub struct Segment {
    /// What its name says.
    pub name: SegmentName,
    /// Where it is.
    pub path: PathBuf,
    /// Length in bytes.
    pub length: u64,
    /// Bytes that storage holds for it.
    pub allocated: u64,
    /// Its first page, or why it cannot be read.
    pub header: Result<SegmentHeader, String>,
}

/// A part that a manifest says is there.
#[derive(Clone, Copy, Debug)]
pub struct Published {
    /// Segment that holds it.
    pub segment: SegmentName,
    /// Its record.
    pub record: Record,
}

/// A namespace in one backend.
pub struct Namespace {
    /// Its folder.
    pub path: PathBuf,
    /// Fields of `namespace.json`, as far as it is there.
    pub description: BTreeMap<String, String>,
    /// Manifests by name.
    pub manifests: Vec<Manifest>,
    /// Segments by name.
    pub segments: BTreeMap<SegmentName, Segment>,
    /// Files on their way out.
    pub dead_files: u64,
    /// Files that are not UCM's.
    pub foreign: Vec<PathBuf>,
}

/// The namespace folders at or below `directory`.
pub fn find(directory: &Path) -> Result<Vec<PathBuf>, String> {
    if directory.join(MANIFESTS).is_dir() {
        return Ok(vec![directory.to_path_buf()]);
    }
    let mut found: Vec<PathBuf> = list(directory)?
        .into_iter()
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(FOLDER_PREFIX) && path.join(MANIFESTS).is_dir()
        })
        .collect();
    found.sort();
    Ok(found)
}

fn list(directory: &Path) -> Result<Vec<PathBuf>, String> {
    let told = |error: std::io::Error| format!("{}: {error}", directory.display());
    let entries = std::fs::read_dir(directory).map_err(told)?;
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(told)).collect()
}

impl Namespace {
    /// Reads a namespace's folder: all manifests whole, of segments the first page.
    pub fn read(path: &Path) -> Result<Self, String> {
        let mut namespace = Self {
            path: path.to_path_buf(),
            description: description(path),
            manifests: Vec::new(),
            segments: BTreeMap::new(),
            dead_files: 0,
            foreign: Vec::new(),
        };
        for path in list(&path.join(MANIFESTS))? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match ManifestName::parse(&name) {
                Some(name) => namespace.manifests.push(read_manifest(name, &path)?),
                None => namespace.note_other(&name, path),
            }
        }
        namespace.manifests.sort_by_key(|m| (m.name.writer, m.name.epoch));
        for path in list(&path.join(SEGMENTS)).unwrap_or_default() {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match SegmentName::parse(&name) {
                Some(name) => {
                    // Gone meanwhile: its writer reclaimed it.
                    if let Some(segment) = read_segment(name, &path)? {
                        namespace.segments.insert(name, segment);
                    }
                }
                None => namespace.note_other(&name, path),
            }
        }
        Ok(namespace)
    }

    fn note_other(&mut self, name: &str, path: PathBuf) {
        if is_dead_name(name) {
            self.dead_files += 1;
        } else {
            self.foreign.push(path);
        }
    }

    /// The fingerprint that checksums are seeded with, from any manifest or segment.
    pub fn fingerprint(&self) -> Option<[u8; 16]> {
        let manifests = self.manifests.iter().filter_map(|m| m.header.as_ref().ok());
        let segments = self.segments.values().filter_map(|s| s.header.as_ref().ok());
        manifests.map(|h| h.fingerprint).chain(segments.map(|h| h.fingerprint)).next()
    }

    /// The parts that can be found, as a reader with all manifests sees them: published, not dropped, in a
    /// segment that was not retired. Of several copies of a part all are listed.
    pub fn published(&self) -> Vec<Published> {
        let mut retired: HashSet<SegmentName> = HashSet::new();
        let mut dropped: HashSet<(SegmentName, u32)> = HashSet::new();
        let mut published: HashMap<(SegmentName, u32), Record> = HashMap::new();
        for manifest in &self.manifests {
            for record in &manifest.records {
                let writer = match record.kind {
                    Kind::Retire | Kind::Drop if record.checksum != 0 => record.checksum,
                    _ => manifest.name.writer,
                };
                let number = record.segment;
                let segment = SegmentName { writer, number, generation: record.generation };
                match record.kind {
                    Kind::Publish => {
                        published.insert((segment, record.page), *record);
                    }
                    Kind::Drop => {
                        dropped.insert((segment, record.page));
                    }
                    Kind::Retire => {
                        retired.insert(segment);
                    }
                    Kind::Seal | Kind::Epoch | Kind::Heartbeat | Kind::Abandoned => {}
                }
            }
        }
        let mut found: Vec<Published> = published
            .into_iter()
            .filter(|(place, _)| !retired.contains(&place.0) && !dropped.contains(place))
            .map(|((segment, _), record)| Published { segment, record })
            .collect();
        // In the order of the drive.
        found.sort_by_key(|part| (part.segment, part.record.page));
        found
    }
}

fn description(folder: &Path) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(folder.join(NAMESPACE_FILE)).unwrap_or_default();
    let parsed: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let fields = parsed.as_object().cloned().unwrap_or_default();
    fields
        .into_iter()
        .map(|(name, value)| match value {
            serde_json::Value::String(text) => (name, text),
            other => (name, other.to_string()),
        })
        .collect()
}

fn open(path: &Path) -> Result<Option<File>, String> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

fn read_segment(name: SegmentName, path: &Path) -> Result<Option<Segment>, String> {
    let Some(file) = open(path)? else { return Ok(None) };
    let metadata = file.metadata().map_err(|error| format!("{}: {error}", path.display()))?;
    let mut page = vec![0; PAGE];
    let header = match file.read_exact_at(&mut page, 0) {
        Ok(()) => SegmentHeader::decode(&page).map_err(|refused| format!("{refused:?}")),
        Err(error) => Err(error.to_string()),
    };
    Ok(Some(Segment {
        name,
        path: path.to_path_buf(),
        length: metadata.len(),
        allocated: metadata.blocks() * 512,
        header,
    }))
}

fn read_manifest(name: ManifestName, path: &Path) -> Result<Manifest, String> {
    let mut manifest = Manifest {
        name,
        path: path.to_path_buf(),
        header: Err(String::from("it is shorter than its header")),
        records: Vec::new(),
        bad: 0,
        has_head: false,
        written_ms: 0,
    };
    // Read once, whole: what is appended meanwhile belongs to the next look.
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) => {
            manifest.header = Err(error.to_string());
            return Ok(manifest);
        }
    };
    let page = |number: u32| bytes.get(number as usize * PAGE..(number as usize + 1) * PAGE);
    if let Some(first) = page(0) {
        manifest.header = ManifestHeader::decode(first).map_err(|refused| format!("{refused:?}"));
    }
    let heads = (HEAD_PAGE_FIRST..RECORD_PAGE_FIRST).filter_map(page);
    let newest = heads
        .filter_map(|page| Some((Head::decode(page).ok()?, page)))
        .filter(|(head, _)| head.writer == name.writer && head.epoch == name.epoch)
        .max_by_key(|(head, _)| head.commit);
    let Some((head, tail)) = newest else { return Ok(manifest) };
    manifest.has_head = true;
    manifest.written_ms = head.time_ms;
    let seal = record_seal(name.writer, name.epoch);
    let mut take = |bytes: &[u8], sequence: u64| match Record::decode(&seal, bytes) {
        Decoded::Record(record) if record.sequence == sequence => manifest.records.push(record),
        Decoded::Skip => {}
        Decoded::Record(_) | Decoded::Unknown(_) | Decoded::Bad => manifest.bad += 1,
    };
    for number in RECORD_PAGE_FIRST..head.page {
        let Some(page) = page(number) else { break };
        let first = u64::from(number - RECORD_PAGE_FIRST) * RECORDS_PER_PAGE as u64;
        for (index, record) in page.chunks_exact(RECORD_BYTES).enumerate() {
            take(record, first + index as u64);
        }
    }
    let first = u64::from(head.page - RECORD_PAGE_FIRST) * RECORDS_PER_PAGE as u64;
    for index in 0..head.count as usize {
        take(head_record(tail, index), first + index as u64);
    }
    Ok(manifest)
}

/// Checksum of the first `length` bytes of `memory` under an identity.
#[allow(unsafe_code)]
pub fn checksum(identity: &Identity, memory: &mut [u8], length: u64) -> u64 {
    let piece = DmaSlice { pointer: memory.as_mut_ptr(), length: memory.len() };
    // SAFETY: the piece is the slice, borrowed for the call.
    unsafe { identity.part(&[piece], length) }
}
