//! The bytes of version 1: headers, head pages, records and trailers, and nothing else.
//!
//! Pure functions between structs and pages; knows no file and no memory but the slices it is given.
//! `docs/format.md` describes the same bytes in words. All integers are little-endian.

#![forbid(unsafe_code)]

use crate::block::{BlockId, FORMAT_MAJOR, PAGE};

/// First bytes of a segment.
pub const SEGMENT_MAGIC: [u8; 8] = *b"UCMSEGMT";
/// First bytes of a manifest.
pub const MANIFEST_MAGIC: [u8; 8] = *b"UCMMANIF";
/// First bytes of an extent's trailer page.
pub const TRAILER_MAGIC: [u8; 8] = *b"UCMTRAIL";
/// First bytes of a head page.
pub const HEAD_MAGIC: [u8; 8] = *b"UCMHEAD1";

/// Bytes of one manifest record.
pub const RECORD_BYTES: usize = 64;
/// Records of one full manifest page.
pub const RECORDS_PER_PAGE: usize = PAGE / RECORD_BYTES;
/// Records that a head page holds behind its own 64 bytes: the partial tail is always shorter than a page.
pub const HEAD_RECORDS_MAX: usize = RECORDS_PER_PAGE - 1;
/// Page number of the first of the two head pages.
pub const HEAD_PAGE_FIRST: u32 = 1;
/// Page number of the first page of records.
pub const RECORD_PAGE_FIRST: u32 = 3;
/// Shard checksums that a trailer page has room for.
pub const TRAILER_SHARDS_MAX: usize = (PAGE - TRAILER_FIXED_BYTES) / 8;
/// In a SEAL record, the segment number that stands for the manifest itself: its writer closed it.
pub const SEAL_MANIFEST: u32 = u32::MAX;
/// The checksum of a part that was saved with `checksum: off`.
pub const NO_CHECKSUM: u64 = 0;

const TRAILER_FIXED_BYTES: usize = 128;
const HEAD_FIXED_BYTES: usize = RECORD_BYTES;
/// Every page but a head's and the records' starts with magic and a checksum of what follows.
const PAGE_CRC_OFFSET: usize = 8;
const FLAG_OPTIONAL: u8 = 1;

/// CRC-32C (Castagnoli, as in RFC 3720).
pub fn crc32c(chunks: &[&[u8]]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    chunks.iter().for_each(|chunk| digest.update(chunk));
    digest.finalize() as u32
}

fn get<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}
fn get_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(get(bytes, at))
}
fn get_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(get(bytes, at))
}
fn get_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(get(bytes, at))
}
fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Why a page was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Not this kind of page, or not written yet.
    Magic,
    /// The bytes do not match their checksum: torn, stale or damaged.
    Checksum,
    /// Written by a newer major version.
    Version(u32),
    /// A field is outside what the format allows.
    Field,
}

fn seal_page(page: &mut [u8], magic: [u8; 8]) {
    put(page, 0, &magic);
    let crc = crc32c(&[&page[PAGE_CRC_OFFSET + 4..PAGE]]);
    put(page, PAGE_CRC_OFFSET, &crc.to_le_bytes());
}

fn open_page(page: &[u8], magic: [u8; 8]) -> Result<(), Refused> {
    if page.len() < PAGE || page[..8] != magic {
        return Err(Refused::Magic);
    }
    match crc32c(&[&page[PAGE_CRC_OFFSET + 4..PAGE]]) == get_u32(page, PAGE_CRC_OFFSET) {
        true => Ok(()),
        false => Err(Refused::Checksum),
    }
}

fn check_version(page: &[u8]) -> Result<(), Refused> {
    match get_u32(page, 12) {
        FORMAT_MAJOR => Ok(()),
        other => Err(Refused::Version(other)),
    }
}

/// The process that writes a manifest, so that its death is seen at once on the same host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ProcessIdentity {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot: [u8; 16],
    /// Inode of `/proc/self/ns/pid`.
    pub pid_namespace: u64,
    /// Process id inside that namespace.
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`: start time in clock ticks since boot.
    pub start_time: u64,
}

/// Page 0 of a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ManifestHeader {
    /// Fingerprint of the namespace.
    pub fingerprint: [u8; 16],
    /// Random id of the writer.
    pub writer: u64,
    /// First part that the writer saves.
    pub part_first: u16,
    /// How many parts it saves.
    pub part_number: u16,
    /// 0, and one more with every compaction.
    pub epoch: u32,
    /// Who writes.
    pub process: ProcessIdentity,
    /// Milliseconds after which a manifest that has not changed belongs to a dead writer.
    pub lease_ms: u64,
    /// Bytes of a part.
    pub part_bytes: u64,
    /// Wall clock at creation, milliseconds since 1970. For people.
    pub created_ms: u64,
}

impl ManifestHeader {
    /// Fills `page`.
    pub fn encode(&self, page: &mut [u8]) {
        page[..PAGE].fill(0);
        put(page, 12, &FORMAT_MAJOR.to_le_bytes());
        put(page, 16, &self.fingerprint);
        put(page, 32, &self.writer.to_le_bytes());
        put(page, 40, &self.part_first.to_le_bytes());
        put(page, 42, &self.part_number.to_le_bytes());
        put(page, 44, &self.epoch.to_le_bytes());
        put(page, 48, &self.process.boot);
        put(page, 64, &self.process.pid_namespace.to_le_bytes());
        put(page, 72, &self.process.pid.to_le_bytes());
        put(page, 80, &self.process.start_time.to_le_bytes());
        put(page, 88, &self.lease_ms.to_le_bytes());
        put(page, 96, &self.part_bytes.to_le_bytes());
        put(page, 104, &self.created_ms.to_le_bytes());
        seal_page(page, MANIFEST_MAGIC);
    }

    /// Reads `page`.
    pub fn decode(page: &[u8]) -> Result<Self, Refused> {
        open_page(page, MANIFEST_MAGIC)?;
        check_version(page)?;
        Ok(Self {
            fingerprint: get(page, 16),
            writer: get_u64(page, 32),
            part_first: get_u16(page, 40),
            part_number: get_u16(page, 42),
            epoch: get_u32(page, 44),
            process: ProcessIdentity {
                boot: get(page, 48),
                pid_namespace: get_u64(page, 64),
                pid: get_u32(page, 72),
                start_time: get_u64(page, 80),
            },
            lease_ms: get_u64(page, 88),
            part_bytes: get_u64(page, 96),
            created_ms: get_u64(page, 104),
        })
    }
}

/// Page 0 of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Fingerprint of the namespace.
    pub fingerprint: [u8; 16],
    /// The one that writes this segment.
    pub writer: u64,
    /// Number of the segment, by writer.
    pub number: u32,
    /// 0, and one more with every recycling.
    pub generation: u32,
    /// Bytes that were preallocated, header included.
    pub segment_bytes: u64,
    /// Bytes of a part; extents are this, rounded up to a page, and a trailer page.
    pub part_bytes: u64,
    /// Wall clock at creation, milliseconds since 1970. For people.
    pub created_ms: u64,
}

impl SegmentHeader {
    /// Fills `page`.
    pub fn encode(&self, page: &mut [u8]) {
        page[..PAGE].fill(0);
        put(page, 12, &FORMAT_MAJOR.to_le_bytes());
        put(page, 16, &self.fingerprint);
        put(page, 32, &self.writer.to_le_bytes());
        put(page, 40, &self.number.to_le_bytes());
        put(page, 44, &self.generation.to_le_bytes());
        put(page, 48, &self.segment_bytes.to_le_bytes());
        put(page, 56, &self.part_bytes.to_le_bytes());
        put(page, 64, &self.created_ms.to_le_bytes());
        seal_page(page, SEGMENT_MAGIC);
    }

    /// Reads `page`.
    pub fn decode(page: &[u8]) -> Result<Self, Refused> {
        open_page(page, SEGMENT_MAGIC)?;
        check_version(page)?;
        Ok(Self {
            fingerprint: get(page, 16),
            writer: get_u64(page, 32),
            number: get_u32(page, 40),
            generation: get_u32(page, 44),
            segment_bytes: get_u64(page, 48),
            part_bytes: get_u64(page, 56),
            created_ms: get_u64(page, 64),
        })
    }
}

/// The last page of an extent: what the part is, and its checksums.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// Fingerprint of the namespace.
    pub fingerprint: [u8; 16],
    /// The block.
    pub block: BlockId,
    /// The part.
    pub part: u16,
    /// Writer of the segment.
    pub writer: u64,
    /// Number of the segment.
    pub segment: u32,
    /// Generation of the segment.
    pub generation: u32,
    /// First page of the extent in the segment.
    pub page: u32,
    /// Bytes of the part, without padding.
    pub part_bytes: u64,
    /// Checksum of the part, [`NO_CHECKSUM`] if none was taken.
    pub checksum: u64,
    /// Bytes that each shard checksum covers; the last may cover fewer.
    pub unit_bytes: u64,
    /// Shard checksums; empty where the part is one unit, whose checksum is the part's.
    pub units: Vec<u64>,
    /// Wall clock when it was made, milliseconds since 1970.
    pub time_ms: u64,
}

impl Trailer {
    /// Fills `page`. At most [`TRAILER_SHARDS_MAX`] units.
    pub fn encode(&self, page: &mut [u8]) {
        debug_assert!(self.units.len() <= TRAILER_SHARDS_MAX);
        page[..PAGE].fill(0);
        put(page, 12, &FORMAT_MAJOR.to_le_bytes());
        put(page, 16, &self.fingerprint);
        put(page, 32, &self.block.0);
        put(page, 48, &self.part.to_le_bytes());
        put(page, 56, &self.writer.to_le_bytes());
        put(page, 64, &self.segment.to_le_bytes());
        put(page, 68, &self.generation.to_le_bytes());
        put(page, 72, &self.page.to_le_bytes());
        put(page, 76, &(self.units.len() as u32).to_le_bytes());
        put(page, 80, &self.part_bytes.to_le_bytes());
        put(page, 88, &self.checksum.to_le_bytes());
        put(page, 96, &self.unit_bytes.to_le_bytes());
        put(page, 104, &self.time_ms.to_le_bytes());
        for (index, unit) in self.units.iter().enumerate() {
            put(page, TRAILER_FIXED_BYTES + 8 * index, &unit.to_le_bytes());
        }
        seal_page(page, TRAILER_MAGIC);
    }

    /// Reads `page`.
    pub fn decode(page: &[u8]) -> Result<Self, Refused> {
        open_page(page, TRAILER_MAGIC)?;
        check_version(page)?;
        let units = get_u32(page, 76) as usize;
        let (part_bytes, unit_bytes) = (get_u64(page, 80), get_u64(page, 96));
        let covered =
            units == 0 || (unit_bytes > 0 && part_bytes.div_ceil(unit_bytes) == units as u64);
        if units > TRAILER_SHARDS_MAX || !covered {
            return Err(Refused::Field);
        }
        Ok(Self {
            fingerprint: get(page, 16),
            block: BlockId(get(page, 32)),
            part: get_u16(page, 48),
            writer: get_u64(page, 56),
            segment: get_u32(page, 64),
            generation: get_u32(page, 68),
            page: get_u32(page, 72),
            part_bytes,
            checksum: get_u64(page, 88),
            unit_bytes,
            units: (0..units).map(|i| get_u64(page, TRAILER_FIXED_BYTES + 8 * i)).collect(),
            time_ms: get_u64(page, 104),
        })
    }
}

/// What a manifest record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A part can be found at segment, generation, page.
    Publish = 1,
    /// A segment generation is gone.
    Retire = 2,
    /// A segment will not grow any more; with [`SEAL_MANIFEST`] this manifest will not.
    Seal = 3,
    /// One part is not at segment, generation, page (any more).
    Drop = 4,
    /// This manifest is continued by the next epoch; in the successor: the copy is complete.
    Epoch = 5,
    /// The writer lives.
    Heartbeat = 6,
    /// The block that was promised will not come.
    Abandoned = 7,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Publish,
            2 => Self::Retire,
            3 => Self::Seal,
            4 => Self::Drop,
            5 => Self::Epoch,
            6 => Self::Heartbeat,
            7 => Self::Abandoned,
            _ => return None,
        })
    }
}

/// One record of a manifest. Fields that a kind does not use are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it says.
    pub kind: Kind,
    /// The part.
    pub part: u16,
    /// Ordinal of the record in its manifest, from 0: also its place, so a misplaced page is recognised.
    pub sequence: u64,
    /// The block.
    pub block: BlockId,
    /// Number of the segment; for EPOCH the number of the successor epoch.
    pub segment: u32,
    /// Generation of the segment.
    pub generation: u32,
    /// First page of the extent; for SEAL the pages of the segment in use.
    pub page: u32,
    /// Bytes of the part.
    pub length: u32,
    /// Checksum of the part; for RETIRE and DROP the writer whose segment is meant, 0 for one's own;
    /// for ABANDONED the promise that is broken, 0 for all of them.
    pub checksum: u64,
    /// Wall clock, milliseconds since 1970.
    pub time_ms: u64,
}

impl Record {
    /// A record of `kind` with all else zero.
    pub fn of(kind: Kind, time_ms: u64) -> Self {
        Self {
            kind,
            part: 0,
            sequence: 0,
            block: BlockId::default(),
            segment: 0,
            generation: 0,
            page: 0,
            length: 0,
            checksum: 0,
            time_ms,
        }
    }

    /// Fills 64 bytes. `seal` is [`record_seal`] of the manifest.
    pub fn encode(&self, seal: &[u8; 12], bytes: &mut [u8]) {
        bytes[..RECORD_BYTES].fill(0);
        bytes[4] = self.kind as u8;
        // HEARTBEAT and ABANDONED change nothing about what can be found: old readers may skip them.
        bytes[5] = match self.kind {
            Kind::Heartbeat | Kind::Abandoned => FLAG_OPTIONAL,
            _ => 0,
        };
        put(bytes, 6, &self.part.to_le_bytes());
        put(bytes, 8, &self.sequence.to_le_bytes());
        put(bytes, 16, &self.block.0);
        put(bytes, 32, &self.segment.to_le_bytes());
        put(bytes, 36, &self.generation.to_le_bytes());
        put(bytes, 40, &self.page.to_le_bytes());
        put(bytes, 44, &self.length.to_le_bytes());
        put(bytes, 48, &self.checksum.to_le_bytes());
        put(bytes, 56, &self.time_ms.to_le_bytes());
        let crc = crc32c(&[seal, &bytes[4..RECORD_BYTES]]);
        put(bytes, 0, &crc.to_le_bytes());
    }

    /// Reads 64 bytes.
    pub fn decode(seal: &[u8; 12], bytes: &[u8]) -> Decoded {
        if crc32c(&[seal, &bytes[4..RECORD_BYTES]]) != get_u32(bytes, 0) {
            return Decoded::Bad;
        }
        let Some(kind) = Kind::from_byte(bytes[4]) else {
            return match bytes[5] & FLAG_OPTIONAL {
                0 => Decoded::Unknown(bytes[4]),
                _ => Decoded::Skip,
            };
        };
        Decoded::Record(Self {
            kind,
            part: get_u16(bytes, 6),
            sequence: get_u64(bytes, 8),
            block: BlockId(get(bytes, 16)),
            segment: get_u32(bytes, 32),
            generation: get_u32(bytes, 36),
            page: get_u32(bytes, 40),
            length: get_u32(bytes, 44),
            checksum: get_u64(bytes, 48),
            time_ms: get_u64(bytes, 56),
        })
    }
}

/// What 64 bytes turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// A record.
    Record(Record),
    /// A record of a later minor version that may be skipped.
    Skip,
    /// A record of a later version that must be understood: nothing behind it can be trusted.
    Unknown(u8),
    /// Damaged, or never written: skipped and counted.
    Bad,
}

/// What the checksum of each record of a manifest is salted with, so that a page of another manifest never
/// passes for one of this.
pub fn record_seal(writer: u64, epoch: u32) -> [u8; 12] {
    let mut seal = [0; 12];
    seal[..8].copy_from_slice(&writer.to_le_bytes());
    seal[8..].copy_from_slice(&epoch.to_le_bytes());
    seal
}

/// The fixed part of a head page. The newer valid one of the two holds the partial tail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// One more with every write of a head page; odd counts stand in the first head page, even in the second.
    pub commit: u64,
    /// The page of the manifest that these records will fill: all pages before it are full.
    pub page: u32,
    /// Records in this head page.
    pub count: u32,
    /// Writer of the manifest.
    pub writer: u64,
    /// Epoch of the manifest.
    pub epoch: u32,
    /// Wall clock, milliseconds since 1970.
    pub time_ms: u64,
}

impl Head {
    /// Which page of the file this head belongs to.
    pub fn place(&self) -> u32 {
        HEAD_PAGE_FIRST + (self.commit + 1) as u32 % 2
    }

    /// Fills the first bytes of `page` and seals all of it; the records stand there already.
    pub fn encode(&self, page: &mut [u8]) {
        page[..HEAD_FIXED_BYTES].fill(0);
        page[HEAD_FIXED_BYTES + self.count as usize * RECORD_BYTES..PAGE].fill(0);
        put(page, 16, &self.commit.to_le_bytes());
        put(page, 24, &self.page.to_le_bytes());
        put(page, 28, &self.count.to_le_bytes());
        put(page, 32, &self.writer.to_le_bytes());
        put(page, 40, &self.epoch.to_le_bytes());
        put(page, 48, &self.time_ms.to_le_bytes());
        put(page, 12, &FORMAT_MAJOR.to_le_bytes());
        seal_page(page, HEAD_MAGIC);
    }

    /// Reads `page`.
    pub fn decode(page: &[u8]) -> Result<Self, Refused> {
        open_page(page, HEAD_MAGIC)?;
        check_version(page)?;
        let head = Self {
            commit: get_u64(page, 16),
            page: get_u32(page, 24),
            count: get_u32(page, 28),
            writer: get_u64(page, 32),
            epoch: get_u32(page, 40),
            time_ms: get_u64(page, 48),
        };
        match head.count as usize <= HEAD_RECORDS_MAX && head.page >= RECORD_PAGE_FIRST {
            true => Ok(head),
            false => Err(Refused::Field),
        }
    }
}

/// The bytes of record `index` in a head page.
pub fn head_record(page: &[u8], index: usize) -> &[u8] {
    &page[HEAD_FIXED_BYTES + index * RECORD_BYTES..][..RECORD_BYTES]
}

/// The bytes of record `index` in a head page, for writing.
pub fn head_record_mut(page: &mut [u8], index: usize) -> &mut [u8] {
    &mut page[HEAD_FIXED_BYTES + index * RECORD_BYTES..][..RECORD_BYTES]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every page reads back as written, and one flipped bit anywhere refuses it.
    #[test]
    fn pages_round_trip_and_refuse_any_flipped_bit() {
        let trailer = Trailer {
            fingerprint: [7; 16],
            block: BlockId([9; 16]),
            part: 3,
            writer: 0x1234,
            segment: 5,
            generation: 2,
            page: 77,
            part_bytes: 4096 * 10 + 5,
            checksum: 0xdead_beef,
            unit_bytes: 4096,
            units: (0..11).collect(),
            time_ms: 99,
        };
        let mut page = vec![0xff; PAGE];
        trailer.encode(&mut page);
        assert_eq!(Trailer::decode(&page), Ok(trailer));
        for bit in (0..PAGE * 8).step_by(97) {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(Trailer::decode(&page).is_err(), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
        let header = SegmentHeader {
            fingerprint: [1; 16],
            writer: 2,
            number: 3,
            generation: 4,
            segment_bytes: 5,
            part_bytes: 6,
            created_ms: 7,
        };
        header.encode(&mut page);
        assert_eq!(SegmentHeader::decode(&page), Ok(header));
        let process = ProcessIdentity { boot: [3; 16], pid_namespace: 4, pid: 5, start_time: 6 };
        let header = ManifestHeader {
            fingerprint: [1; 16],
            writer: 2,
            part_first: 1,
            part_number: 2,
            epoch: 3,
            process,
            lease_ms: 10,
            part_bytes: 11,
            created_ms: 12,
        };
        header.encode(&mut page);
        assert_eq!(ManifestHeader::decode(&page), Ok(header));
        page[12] = 2;
        seal_page(&mut page, MANIFEST_MAGIC);
        assert_eq!(ManifestHeader::decode(&page), Err(Refused::Version(2)));
    }

    /// A record is bound to its manifest: the same bytes in another writer's or epoch's file are bad.
    #[test]
    fn records_are_bound_to_writer_and_epoch() {
        let record = Record {
            kind: Kind::Publish,
            part: 1,
            sequence: 2,
            block: BlockId([3; 16]),
            segment: 4,
            generation: 5,
            page: 6,
            length: 7,
            checksum: 8,
            time_ms: 9,
        };
        let mut bytes = [0; RECORD_BYTES];
        record.encode(&record_seal(1, 1), &mut bytes);
        assert_eq!(Record::decode(&record_seal(1, 1), &bytes), Decoded::Record(record));
        assert_eq!(Record::decode(&record_seal(1, 2), &bytes), Decoded::Bad);
        assert_eq!(Record::decode(&record_seal(2, 1), &bytes), Decoded::Bad);
        assert_eq!(Record::decode(&record_seal(1, 1), &[0; RECORD_BYTES]), Decoded::Bad);
    }

    /// A kind from a later version is skipped if it is optional and stops the reader if it is not.
    #[test]
    fn unknown_records_are_skipped_only_if_optional() {
        let seal = record_seal(1, 1);
        for (flags, expected) in [(FLAG_OPTIONAL, Decoded::Skip), (0, Decoded::Unknown(200))] {
            let mut bytes = [0; RECORD_BYTES];
            (bytes[4], bytes[5]) = (200, flags);
            let crc = crc32c(&[&seal, &bytes[4..]]);
            put(&mut bytes, 0, &crc.to_le_bytes());
            assert_eq!(Record::decode(&seal, &bytes), expected);
        }
    }

    /// Two successive commits go to different head pages, and a head reads back with its records.
    #[test]
    fn heads_alternate() {
        let mut page = vec![0xaa; PAGE];
        let head = Head { commit: 1, page: 3, count: 2, writer: 8, epoch: 0, time_ms: 5 };
        let seal = record_seal(8, 0);
        let record = Record::of(Kind::Heartbeat, 4);
        for index in 0..2 {
            record.encode(&seal, head_record_mut(&mut page, index));
        }
        head.encode(&mut page);
        assert_eq!(Head::decode(&page), Ok(head));
        assert_eq!(Record::decode(&seal, head_record(&page, 1)), Decoded::Record(record));
        assert_ne!(head.place(), Head { commit: 2, ..head }.place());
        assert!((1..=2).contains(&head.place()));
    }

    /// The check value of CRC-32C from RFC 3720.
    #[test]
    fn crc32c_is_castagnoli() {
        assert_eq!(crc32c(&[b"123456789"]), 0xe306_9283);
        assert_eq!(crc32c(&[b"12345", b"6789"]), 0xe306_9283);
    }
}
