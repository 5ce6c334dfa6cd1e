//! An extent that was handed out: room for one part in a segment, until it is written or given back.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Saver, Writer};
use crate::block::{PAGE, PartKey};
use crate::posix::format::NO_CHECKSUM;
use crate::posix::segment::OwnSegment;

/// Room for one part in a segment. Dropped unwritten, it goes back to its segment.
pub struct Extent {
    key: PartKey,
    saver: Arc<Saver>,
    writer: Arc<Writer>,
    segment: Arc<OwnSegment>,
    page: u32,
    checksum: AtomicU64,
    spent: bool,
}

impl Extent {
    pub(super) fn new(
        key: PartKey,
        saver: Arc<Saver>,
        writer: Arc<Writer>,
        segment: Arc<OwnSegment>,
        page: u32,
    ) -> Self {
        Self {
            key,
            saver,
            writer,
            segment,
            page,
            checksum: AtomicU64::new(NO_CHECKSUM),
            spent: false,
        }
    }

    /// The part it is for.
    pub fn key(&self) -> &PartKey {
        &self.key
    }

    /// Its segment.
    pub fn segment(&self) -> &Arc<OwnSegment> {
        &self.segment
    }

    /// Its writer.
    pub fn writer(&self) -> &Arc<Writer> {
        &self.writer
    }

    /// Its saver.
    pub fn saver(&self) -> &Arc<Saver> {
        &self.saver
    }

    /// Its first page in the segment.
    pub fn page(&self) -> u32 {
        self.page
    }

    /// Byte offset in the segment.
    pub fn offset(&self) -> u64 {
        u64::from(self.page) * PAGE as u64
    }

    /// The checksum of the part, once taken.
    pub fn checksum(&self) -> u64 {
        self.checksum.load(Ordering::Acquire)
    }

    /// Sets the checksum.
    pub fn set_checksum(&self, checksum: u64) {
        self.checksum.store(checksum, Ordering::Release);
    }

    /// Bytes may have been written: it can never be handed out again.
    pub fn spend(mut self) {
        self.spent = true;
        let closing = self.segment.written();
        self.saver.seal(&self.writer, &self.segment, closing);
    }
}

impl Drop for Extent {
    fn drop(&mut self) {
        if !self.spent {
            let closing = self.segment.give_back(self.page);
            self.saver.seal(&self.writer, &self.segment, closing);
        }
    }
}
