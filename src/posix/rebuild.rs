//! Rebuilding manifests from the trailers of segments, for an operator whose manifests are lost.
//!
//! Reads a namespace's folder as it is and writes a manifest for every writer that has segments and no
//! manifest. Knows no running store: nobody should save into the folder meanwhile.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::block::{PAGE, PartKey};
use crate::error::{Error, ErrorKind, Result};
use crate::io::backend::Backend;
use crate::io::{Access, Create, File, OpenHow};
use crate::posix::catalog::extent_pages;
use crate::posix::checksum::Identity;
use crate::posix::format::{
    Kind, ManifestHeader, NO_CHECKSUM, ProcessIdentity, Record, SegmentHeader, Trailer,
};
use crate::posix::host::wall_ms;
use crate::posix::image;
use crate::posix::names::{Fence, MANIFESTS, ManifestName, SEGMENTS, SegmentName};
use crate::posix::pages::Pages;

/// How much of an extent is read before it is listed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// The trailer. Quick; a load still verifies the payload.
    Trailers,
    /// The payload too, against its checksum.
    Payload,
}

/// What becomes of an extent that was saved with `checksum: off`. Payload and trailer are written side by side,
/// so a writer that dies may leave the trailer alone: without its record nothing tells that the payload is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unproven {
    /// It is counted and not listed.
    LeftOut,
    /// It is listed like any other.
    Trusted,
}

/// What a rebuild did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rebuilt {
    /// Manifests written.
    pub manifests: u64,
    /// Segments read.
    pub segments: u64,
    /// Parts that can be found again.
    pub parts: u64,
    /// Extents that cannot be read, or with a payload that does not match its checksum.
    pub damaged: u64,
    /// Extents without a checksum that were left out.
    pub unproven: u64,
    /// Segments that could not be read, or are of another namespace.
    pub unreadable: u64,
}

struct Rebuild<'a> {
    backend: &'a Arc<Backend>,
    folder: PathBuf,
    depth: Depth,
    unproven: Unproven,
    done: Rebuilt,
}

/// What the segments of one writer hold.
struct Holdings {
    header: SegmentHeader,
    records: Vec<Record>,
}

/// Writes the missing manifests of the namespace's folder `folder` (`ucm1-...`) of a backend. Blocks for as
/// long as reading every trailer takes.
pub fn rebuild(
    backend: &Arc<Backend>,
    folder: &str,
    depth: Depth,
    unproven: Unproven,
) -> Result<Rebuilt> {
    let folder = backend.directory().join(folder);
    let mut rebuild = Rebuild { backend, folder, depth, unproven, done: Rebuilt::default() };
    rebuild.run()?;
    Ok(rebuild.done)
}

impl Rebuild<'_> {
    fn run(&mut self) -> Result<()> {
        let files = self.backend.files();
        let (manifests, segments) = (self.folder.join(MANIFESTS), self.folder.join(SEGMENTS));
        files.create_dir_all(&manifests)?;
        let listed = files.list(&manifests)?;
        let known: HashSet<u64> = listed
            .iter()
            .filter_map(|name| Some(ManifestName::parse(name.to_str()?)?.writer))
            .collect();
        let mut orphans: BTreeMap<u64, Vec<SegmentName>> = BTreeMap::new();
        for name in files.list(&segments)? {
            let Some(name) = name.to_str().and_then(SegmentName::parse) else { continue };
            if !known.contains(&name.writer) {
                orphans.entry(name.writer).or_default().push(name);
            }
        }
        for (writer, mut names) in orphans {
            names.sort_unstable();
            if let Some(holdings) = self.read_writer(&segments, &names) {
                self.write_manifest(&manifests, writer, &holdings)?;
            }
        }
        Ok(())
    }

    fn read_writer(&mut self, folder: &Path, names: &[SegmentName]) -> Option<Holdings> {
        let mut holdings: Option<Holdings> = None;
        for name in names {
            match self.read_segment(&folder.join(name.to_string()), *name) {
                Ok((header, records)) => {
                    self.done.segments += 1;
                    holdings
                        .get_or_insert_with(|| Holdings { header, records: Vec::new() })
                        .records
                        .extend(records);
                }
                Err(error) => {
                    self.done.unreadable += 1;
                    crate::log::warning(format_args!("a segment is left out: {error}"));
                }
            }
        }
        holdings.filter(|holdings| !holdings.records.is_empty())
    }

    fn read_segment(
        &mut self,
        path: &Path,
        name: SegmentName,
    ) -> Result<(SegmentHeader, Vec<Record>)> {
        let files = self.backend.files();
        let how =
            OpenHow { access: Access::Read, create: Create::No, direct: self.backend.is_direct() };
        let file = files.open(path, how)?;
        let length = files.file_metadata(&file)?.length;
        let mut page = Pages::new(1);
        page.read_from(&**files, &file, 0, 0, 1)?;
        let header = SegmentHeader::decode(page.bytes())
            .ok()
            .filter(|header| (header.writer, header.number) == (name.writer, name.number))
            .filter(|header| header.generation == name.generation && header.part_bytes > 0)
            .ok_or_else(|| {
                Error::new(ErrorKind::Corrupt, "the segment's header does not fit its name")
                    .at(path)
            })?;
        let stride = extent_pages(header.part_bytes);
        let extents = (length / PAGE as u64).saturating_sub(1) / u64::from(stride);
        let mut records = Vec::new();
        for extent in 0..extents as u32 {
            let first = 1 + extent * stride;
            let offset = u64::from(first + stride - 1) * PAGE as u64;
            match page.read_from(&**files, &file, offset, 0, 1) {
                Ok(PAGE) => {}
                Ok(_) => break,
                // A bad sector costs its own part.
                Err(_) => {
                    self.done.damaged += 1;
                    continue;
                }
            }
            let Some(trailer) = fitting_trailer(page.bytes(), &header, first) else { continue };
            if trailer.checksum == NO_CHECKSUM {
                match self.unproven {
                    Unproven::Trusted => records.push(publish(&trailer)),
                    Unproven::LeftOut => self.done.unproven += 1,
                }
                continue;
            }
            let deep = self.depth == Depth::Payload;
            if deep && !self.payload_is_whole(&file, &trailer).unwrap_or(false) {
                self.done.damaged += 1;
                continue;
            }
            records.push(publish(&trailer));
        }
        Ok((header, records))
    }

    fn payload_is_whole(&self, file: &File, trailer: &Trailer) -> Result<bool> {
        let count = extent_pages(trailer.part_bytes) as usize - 1;
        let mut pages = Pages::new(count);
        let offset = u64::from(trailer.page) * PAGE as u64;
        pages.read_from(&**self.backend.files(), file, offset, 0, count)?;
        let identity = Identity {
            fingerprint: trailer.fingerprint,
            key: PartKey { block: trailer.block, part: trailer.part },
            generation: trailer.generation,
        };
        let part = &pages.bytes()[..trailer.part_bytes as usize];
        Ok(identity.part_in(part) == trailer.checksum)
    }

    /// Fenced from the start: its writer, wherever it is, does not append to it.
    fn write_manifest(&mut self, folder: &Path, writer: u64, holdings: &Holdings) -> Result<()> {
        let parts = holdings.records.iter().map(|record| record.part);
        let first = parts.clone().min().unwrap_or(0);
        let number = parts.max().unwrap_or(0) - first + 1;
        let name = ManifestName {
            writer,
            part_first: first,
            part_number: number,
            epoch: 0,
            fence: Fence::Fenced,
        };
        let header = ManifestHeader {
            fingerprint: holdings.header.fingerprint,
            writer,
            part_first: first,
            part_number: number,
            epoch: 0,
            process: ProcessIdentity::default(),
            lease_ms: 0,
            part_bytes: holdings.header.part_bytes,
            created_ms: wall_ms(),
        };
        let files = self.backend.files();
        let direct = self.backend.is_direct();
        image::write(&**files, folder, name, &header, &holdings.records, direct)?;
        self.done.manifests += 1;
        self.done.parts += holdings.records.len() as u64;
        Ok(())
    }
}

/// The trailer in `page` if it is one of this generation of this segment: stale ones are not.
fn fitting_trailer(page: &[u8], header: &SegmentHeader, first: u32) -> Option<Trailer> {
    Trailer::decode(page).ok().filter(|trailer| {
        trailer.fingerprint == header.fingerprint
            && (trailer.writer, trailer.segment) == (header.writer, header.number)
            && trailer.generation == header.generation
            && trailer.page == first
            && trailer.part_bytes == header.part_bytes
    })
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
