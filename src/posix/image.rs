//! A whole manifest written at once, from records that are known: what a rebuild leaves.
//!
//! Written under a name that is no manifest's and renamed into place, so that nobody reads half of it.

#![forbid(unsafe_code)]

use std::path::Path;

use crate::block::PAGE;
use crate::error::Result;
use crate::io::{Access, Create, File, Files, OpenHow};
use crate::posix::format::{
    Head, ManifestHeader, RECORD_BYTES, RECORD_PAGE_FIRST, RECORDS_PER_PAGE, Record,
    head_record_mut, record_seal,
};
use crate::posix::host::wall_ms;
use crate::posix::names::ManifestName;
use crate::posix::pages::Pages;

/// Pages that are written at once: 1 MiB.
const CHUNK_PAGES: usize = 256;

/// Writes the manifest `name` with `records` into `folder`; `EEXIST` where it is there already. Blocks.
pub fn write(
    files: &dyn Files,
    folder: &Path,
    name: ManifestName,
    header: &ManifestHeader,
    records: &[Record],
    direct: bool,
) -> Result<()> {
    let temporary = folder.join(format!(".new-{name}"));
    // One that a crash has left; two processes that rebuild at once are the operator's mistake.
    let _ = files.unlink(&temporary);
    let how = OpenHow { access: Access::ReadWrite, create: Create::New, direct };
    let file = files.open(&temporary, how)?;
    let written = fill(files, &file, header, records)
        .and_then(|()| files.sync_data(&file))
        .and_then(|()| files.rename(&temporary, &folder.join(name.to_string())));
    written.map_err(|error| {
        let _ = files.unlink(&temporary);
        error.at(&temporary)
    })
}

fn fill(files: &dyn Files, file: &File, header: &ManifestHeader, records: &[Record]) -> Result<()> {
    let seal = record_seal(header.writer, header.epoch);
    let numbered: Vec<Record> =
        (0..).zip(records).map(|(sequence, record)| Record { sequence, ..*record }).collect();
    let full = numbered.len() / RECORDS_PER_PAGE * RECORDS_PER_PAGE;
    let (full, tail) = numbered.split_at(full);
    let mut page = RECORD_PAGE_FIRST;
    for chunk in full.chunks(CHUNK_PAGES * RECORDS_PER_PAGE) {
        let count = chunk.len() / RECORDS_PER_PAGE;
        let mut pages = Pages::new(count);
        let places = pages.bytes_mut().chunks_exact_mut(RECORD_BYTES);
        chunk.iter().zip(places).for_each(|(record, place)| record.encode(&seal, place));
        pages.write_to(files, file, u64::from(page) * PAGE as u64, 0, count)?;
        page += count as u32;
    }
    let mut pages = Pages::new(RECORD_PAGE_FIRST as usize);
    let head = Head {
        commit: 1,
        page,
        count: tail.len() as u32,
        writer: header.writer,
        epoch: header.epoch,
        time_ms: wall_ms(),
    };
    let at = head.place() as usize * PAGE;
    let head_page = &mut pages.bytes_mut()[at..at + PAGE];
    for (index, record) in tail.iter().enumerate() {
        record.encode(&seal, head_record_mut(head_page, index));
    }
    head.encode(head_page);
    header.encode(&mut pages.bytes_mut()[..PAGE]);
    pages.write_to(files, file, 0, 0, RECORD_PAGE_FIRST as usize)
}
