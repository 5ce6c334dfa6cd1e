//! Names of manifests and segments: who wrote what, which generation, and whether it still counts.
//!
//! Pure; knows no file system. A rename from one of these names to another is what arbitrates between
//! processes, so every state that matters to others is in the name.

#![forbid(unsafe_code)]

/// Folder of the manifests inside the namespace's folder.
pub const MANIFESTS: &str = "manifests";
/// Folder of the segments inside the namespace's folder.
pub const SEGMENTS: &str = "segments";
/// The namespace in plain words.
pub const NAMESPACE_FILE: &str = "namespace.json";

/// Whether a manifest may still grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fence {
    /// Its writer may append.
    Open,
    /// Its writer was found dead and may not append any more.
    Fenced,
}

/// Name of a manifest: `<writer>-p<first>+<number>.e<epoch>[.fenced]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ManifestName {
    /// Random id of the writer.
    pub writer: u64,
    /// First part that the writer saves.
    pub part_first: u16,
    /// How many parts it saves.
    pub part_number: u16,
    /// 0, and one more with every compaction.
    pub epoch: u32,
    /// Whether it may grow.
    pub fence: Fence,
}

impl ManifestName {
    /// Reads a file name; `None` for names that are not manifests (dead names, foreign files).
    pub fn parse(name: &str) -> Option<Self> {
        let (name, fence) = match name.strip_suffix(".fenced") {
            Some(rest) => (rest, Fence::Fenced),
            None => (name, Fence::Open),
        };
        let (writer, rest) = name.split_once("-p")?;
        let (parts, epoch) = rest.split_once(".e")?;
        let (first, number) = parts.split_once('+')?;
        Some(Self {
            writer: parse_writer(writer)?,
            part_first: first.parse().ok()?,
            part_number: number.parse().ok()?,
            epoch: epoch.parse().ok()?,
            fence,
        })
    }

    /// Whether any of `parts` is among the writer's.
    pub fn overlaps(&self, parts: &std::ops::Range<u16>) -> bool {
        let first = u32::from(self.part_first);
        u32::from(parts.start) < first + u32::from(self.part_number) && first < parts.end.into()
    }
}

impl std::fmt::Display for ManifestName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { writer, part_first, part_number, epoch, fence } = self;
        write!(f, "{writer:016x}-p{part_first}+{part_number}.e{epoch}")?;
        match fence {
            Fence::Open => Ok(()),
            Fence::Fenced => f.write_str(".fenced"),
        }
    }
}

/// Name of a segment: `<writer>-<number>.g<generation>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentName {
    /// Random id of the writer.
    pub writer: u64,
    /// Number of the segment, by writer.
    pub number: u32,
    /// 0, and one more with every recycling.
    pub generation: u32,
}

impl SegmentName {
    /// Reads a file name; `None` for names that are not segments (dead names, foreign files).
    pub fn parse(name: &str) -> Option<Self> {
        let (writer, rest) = name.split_once('-')?;
        let (number, generation) = rest.split_once(".g")?;
        Some(Self {
            writer: parse_writer(writer)?,
            number: number.parse().ok()?,
            generation: generation.parse().ok()?,
        })
    }
}

impl std::fmt::Display for SegmentName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}-{}.g{}", self.writer, self.number, self.generation)
    }
}

/// The name under which `by` removes the file `name`. Whoever renames a file to it has won the right to.
pub fn dead_name(name: &str, by: u64) -> String {
    format!("{name}.dead-{by:016x}")
}

/// Whether `name` is on its way out.
pub fn is_dead_name(name: &str) -> bool {
    name.rsplit_once(".dead-").is_some_and(|(_, by)| parse_writer(by).is_some())
}

fn parse_writer(text: &str) -> Option<u64> {
    match text.len() == 16 {
        true => u64::from_str_radix(text, 16).ok(),
        false => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names read back as written; dead names and strangers are not taken for live files.
    #[test]
    fn names_round_trip() {
        let mut manifest = ManifestName {
            writer: 0xabc,
            part_first: 2,
            part_number: 4,
            epoch: 7,
            fence: Fence::Open,
        };
        assert_eq!(manifest.to_string(), "0000000000000abc-p2+4.e7");
        assert_eq!(ManifestName::parse(&manifest.to_string()), Some(manifest));
        manifest.fence = Fence::Fenced;
        assert_eq!(ManifestName::parse(&manifest.to_string()), Some(manifest));
        let segment = SegmentName { writer: u64::MAX, number: 12, generation: 3 };
        assert_eq!(SegmentName::parse(&segment.to_string()), Some(segment));
        for name in [manifest.to_string(), segment.to_string()] {
            let dead = dead_name(&name, 5);
            assert!(is_dead_name(&dead) && !is_dead_name(&name));
            assert_eq!(ManifestName::parse(&dead), None);
            assert_eq!(SegmentName::parse(&dead), None);
        }
        for name in ["", "x", "lost+found", ".nfs0001", "12-3.g4", "namespace.json"] {
            assert_eq!(ManifestName::parse(name), None);
            assert_eq!(SegmentName::parse(name), None);
        }
    }

    /// A reader of some parts tails exactly the manifests that can hold them.
    #[test]
    fn part_ranges_overlap() {
        let name = ManifestName::parse("0000000000000abc-p2+2.e0").unwrap();
        for (parts, expected) in
            [(0..2, false), (0..3, true), (2..4, true), (3..8, true), (4..8, false)]
        {
            assert_eq!(name.overlaps(&parts), expected, "{parts:?}");
        }
    }
}
