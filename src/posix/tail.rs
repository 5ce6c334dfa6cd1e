//! Reading one manifest of another writer, again and again: one small read tells whether there is more.
//!
//! Owns the held descriptor and how far it has read. Hands records to whoever asked; knows nothing of what
//! they mean, except those that end the manifest.

#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

use crate::block::PAGE;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Access, File};
use crate::posix::format::{
    Decoded, HEAD_PAGE_FIRST, Head, Kind, ManifestHeader, RECORD_BYTES, RECORD_PAGE_FIRST,
    RECORDS_PER_PAGE, Record, Refused, SEAL_MANIFEST, head_record, record_seal,
};
use crate::posix::home::Home;
use crate::posix::host::{Life, boot_time, life_of};
use crate::posix::manifest::sequence_of;
use crate::posix::names::{Fence, ManifestName};
use crate::posix::pages::Pages;

/// Full pages that are read at once: 1 MiB.
const CHUNK_PAGES: u32 = 256;

/// A writer counts as dead after its lease and this share of it (one part in so many): clocks drift.
const LEASE_SLACK: u32 = 4;

/// Whether there can be more in a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Growth {
    /// Its writer may append.
    Live,
    /// Closed by its writer, continued by another epoch, or fenced and read to its end.
    Final,
    /// Of another namespace or a newer version: not read, and nothing may be concluded from it.
    Unreadable,
}

/// Whoever asked for records.
pub trait Taker {
    /// About so many will come.
    fn expect(&mut self, records: usize);
    /// Here is one.
    fn take(&mut self, record: &Record);
}

/// What a manifest says that outlives its own segments.
#[derive(Clone, Debug, Default)]
pub struct Says {
    /// Writers whose extents it has dropped.
    pub dropped: HashSet<u64>,
    /// Whether it has abandoned blocks.
    pub abandoned: bool,
}

impl Says {
    fn note(&mut self, record: &Record, writer: u64) {
        match record.kind {
            Kind::Drop if record.checksum != 0 && record.checksum != writer => {
                self.dropped.insert(record.checksum);
            }
            Kind::Abandoned => self.abandoned = true,
            _ => {}
        }
    }
}

/// A lease and what clocks may drift in it.
pub fn with_slack(lease: Duration) -> Duration {
    lease + lease / LEASE_SLACK
}

/// One manifest and how far it was read.
pub struct ManifestTail {
    /// Its name.
    pub name: ManifestName,
    /// Whether there can be more.
    pub growth: Growth,
    /// Its first page, once read.
    pub header: Option<ManifestHeader>,
    /// Records that failed their checksum or stood in the wrong place.
    pub bad_records: u64,
    /// When it was last seen to have grown, on this host's clock.
    pub changed_at: Duration,
    /// When it was last read without an error, on this host's clock.
    pub polled_at: Duration,
    /// When it became final, on this host's clock.
    pub final_at: Duration,
    /// What it says about others, for which it must stay.
    pub says: Says,
    path: PathBuf,
    file: Option<File>,
    commit: u64,
    /// First page of records that was not read as a full page.
    page: u32,
    /// Sequence of the next record to hand out.
    next: u64,
}

impl ManifestTail {
    /// A manifest that was found in a listing.
    pub fn new(home: &Home, name: ManifestName) -> Self {
        Self {
            name,
            growth: Growth::Live,
            header: None,
            bad_records: 0,
            changed_at: boot_time(),
            polled_at: boot_time(),
            final_at: Duration::ZERO,
            says: Says::default(),
            path: home.manifests.join(name.to_string()),
            file: None,
            commit: 0,
            page: RECORD_PAGE_FIRST,
            next: 0,
        }
    }

    /// It goes by another name now (it was fenced): one more poll reads its end.
    pub fn renamed(&mut self, home: &Home, name: ManifestName) {
        self.path = home.manifests.join(name.to_string());
        self.name = name;
        if self.growth == Growth::Live {
            self.file = None;
        }
    }

    /// Reads what is new and hands it to `taker`, in order. Blocks; on a path pool only. A manifest that is
    /// not fully created yet has nothing new.
    pub fn poll(&mut self, home: &Home, taker: &mut dyn Taker) -> Result<()> {
        if self.growth != Growth::Live {
            return Ok(());
        }
        let files = home.backend.files();
        if self.file.is_none() {
            self.file = Some(files.open(&self.path, home.open_how(Access::Read))?);
        }
        let polled = self.poll_open(home, taker);
        if polled.is_ok() {
            // A read that failed has not seen that nothing changed.
            self.polled_at = boot_time();
        }
        if polled.is_ok() && self.growth == Growth::Live && self.is_over(home) {
            self.growth = Growth::Final;
        }
        if self.growth == Growth::Final {
            self.final_at = boot_time();
        }
        // A buffered descriptor on a network file system shows old bytes for seconds: opening again is
        // what revalidates.
        if self.growth != Growth::Live || !home.can_hold() || polled.is_err() {
            self.file = None;
        }
        polled.map_err(|error| error.at(&self.path))
    }

    /// Whether a fenced manifest cannot grow any more. Whoever fenced it may have acted late, on a writer that
    /// had woken up: that one finds out within its lease, and what it published until then counts.
    fn is_over(&self, home: &Home) -> bool {
        if self.name.fence == Fence::Open {
            return false;
        }
        let died = self
            .header
            .is_some_and(|header| life_of(&home.layout.process, &header.process) == Life::Dead);
        let own = home.layout.config.lease;
        let lease = self.header.map_or(own, |header| Duration::from_millis(header.lease_ms));
        died || self.unchanged() >= with_slack(lease)
    }

    /// How long it has been read again and again without change.
    pub fn unchanged(&self) -> Duration {
        self.polled_at.saturating_sub(self.changed_at)
    }

    fn poll_open(&mut self, home: &Home, taker: &mut dyn Taker) -> Result<()> {
        let Some(file) = self.file.clone() else { return Ok(()) };
        let files = home.backend.files();
        let mut pages = Pages::new(RECORD_PAGE_FIRST as usize);
        let first = if self.header.is_none() { 0 } else { HEAD_PAGE_FIRST };
        let count = (RECORD_PAGE_FIRST - first) as usize;
        let offset = u64::from(first) * PAGE as u64;
        let got = pages.read_from(&**files, &file, offset, first as usize, count)?;
        if got < count * PAGE {
            // Just being created, or truncated by whoever reclaims it.
            return Ok(());
        }
        if self.header.is_none() && !self.read_header(home, &pages.bytes()[..PAGE])? {
            return Ok(());
        }
        let heads = self.heads(pages.bytes());
        let Some((newest, _)) = heads.last() else {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "neither head page of the manifest is whole; its parts are missing until it is",
            ));
        };
        let commit = newest.commit;
        if commit == self.commit {
            return Ok(());
        }
        // The older one first: a power cut may keep the newer head and lose the full page that it counts, into
        // which the records of the older one went.
        for (head, at) in heads {
            self.read_full_pages(home, &file, head.page, taker)?;
            let page = &pages.bytes()[at * PAGE..][..PAGE];
            for index in 0..head.count as usize {
                self.take_record(head_record(page, index), sequence_of(head.page, index), taker);
            }
        }
        self.commit = commit;
        self.changed_at = boot_time();
        Ok(())
    }

    /// Whether the header is there and is one of ours.
    fn read_header(&mut self, home: &Home, page: &[u8]) -> Result<bool> {
        let header = match ManifestHeader::decode(page) {
            Ok(header) => header,
            Err(Refused::Version(version)) => {
                self.growth = Growth::Unreadable;
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("format version {version} is newer than this program; update it"),
                ));
            }
            // Not written yet. Anything else is damage, from which nothing may be concluded.
            Err(_) if page.iter().all(|byte| *byte == 0) => return Ok(false),
            Err(_) => {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    "the header of the manifest is damaged; remove the file and run `ucm rebuild`",
                ));
            }
        };
        let ours = header.fingerprint == home.layout.fingerprint
            && header.part_bytes == home.layout.part_bytes
            && header.writer == self.name.writer
            && header.epoch == self.name.epoch;
        if !ours {
            self.growth = Growth::Unreadable;
            return Err(Error::new(
                ErrorKind::Corrupt,
                "the manifest belongs to another namespace or was renamed; remove it",
            ));
        }
        self.header = Some(header);
        Ok(true)
    }

    /// The valid head pages, the newer one last: a torn one leaves the other.
    fn heads(&self, pages: &[u8]) -> Vec<(Head, usize)> {
        let mut heads: Vec<(Head, usize)> = (HEAD_PAGE_FIRST as usize..RECORD_PAGE_FIRST as usize)
            .filter_map(|at| Some((Head::decode(&pages[at * PAGE..][..PAGE]).ok()?, at)))
            .filter(|(head, at)| {
                head.place() as usize == *at
                    && head.writer == self.name.writer
                    && head.epoch == self.name.epoch
            })
            .collect();
        heads.sort_unstable_by_key(|(head, _)| head.commit);
        heads
    }

    fn read_full_pages(
        &mut self,
        home: &Home,
        file: &File,
        end: u32,
        taker: &mut dyn Taker,
    ) -> Result<()> {
        if self.page >= end {
            return Ok(());
        }
        let count = end - self.page;
        if count > CHUNK_PAGES {
            // Many at once, as at a restart. What the head says is believed as far as the file reaches.
            let length = home.backend.files().file_metadata(file)?.length / PAGE as u64;
            let there = length.saturating_sub(u64::from(self.page)).min(u64::from(count));
            taker.expect(there as usize * RECORDS_PER_PAGE);
        }
        let mut chunk = Pages::new(count.min(CHUNK_PAGES) as usize);
        while self.page < end {
            let count = (end - self.page).min(CHUNK_PAGES) as usize;
            let offset = u64::from(self.page) * PAGE as u64;
            let got = chunk.read_from(&**home.backend.files(), file, offset, 0, count)? / PAGE;
            if got == 0 {
                return Err(Error::new(ErrorKind::Corrupt, "the manifest is shorter than it says"));
            }
            for (index, bytes) in chunk.bytes()[..got * PAGE].chunks_exact(RECORD_BYTES).enumerate()
            {
                let page = self.page + (index / RECORDS_PER_PAGE) as u32;
                self.take_record(bytes, sequence_of(page, index % RECORDS_PER_PAGE), taker);
            }
            self.page += got as u32;
        }
        Ok(())
    }

    /// A bad record before a good one is skipped and counted, never taken as the end.
    fn take_record(&mut self, bytes: &[u8], sequence: u64, taker: &mut dyn Taker) {
        if sequence < self.next || self.growth == Growth::Unreadable {
            return;
        }
        self.next = sequence + 1;
        let seal = record_seal(self.name.writer, self.name.epoch);
        match Record::decode(&seal, bytes) {
            Decoded::Record(record) if record.sequence == sequence => {
                let closes = record.kind == Kind::Seal && record.segment == SEAL_MANIFEST;
                let continues = record.kind == Kind::Epoch && record.segment > self.name.epoch;
                if closes || continues {
                    self.growth = Growth::Final;
                }
                self.says.note(&record, self.name.writer);
                taker.take(&record);
            }
            Decoded::Skip => {}
            Decoded::Unknown(kind) => {
                crate::log::warning(format_args!(
                    "{}: record kind {kind} is newer than this program, which cannot read on; update it",
                    self.path.display()
                ));
                self.growth = Growth::Unreadable;
            }
            Decoded::Record(_) | Decoded::Bad => self.bad_records += 1,
        }
    }
}
