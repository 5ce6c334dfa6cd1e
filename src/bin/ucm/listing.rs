//! `ucm ls` and `ucm stat`: what is in a directory.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use ucm::posix::host::{Life, life_of, this_process, wall_ms};
use ucm::posix::names::Fence;

use crate::namespace::{self, Manifest, Namespace};
use crate::show;

/// One line a namespace.
pub fn ls(directory: &Path) -> Result<(), String> {
    let folders = namespace::find(directory)?;
    if folders.is_empty() {
        println!("{}: no namespace; nothing has been saved here", directory.display());
        return Ok(());
    }
    println!("{:<58}{:>8}{:>10}{:>12}  model", "namespace", "writers", "parts", "bytes");
    for folder in folders {
        let namespace = Namespace::read(&folder)?;
        let writers: HashSet<u64> = namespace.manifests.iter().map(|m| m.name.writer).collect();
        let bytes: u64 = namespace.segments.values().map(|s| s.allocated).sum();
        println!(
            "{:<58}{:>8}{:>10}{:>12}  {}",
            folder.file_name().unwrap_or_default().to_string_lossy(),
            writers.len(),
            namespace.published().len(),
            show::size(bytes),
            namespace.description.get("model_id").map_or("?", String::as_str),
        );
    }
    Ok(())
}

/// All of each namespace. True if something is wrong.
pub fn stat(directory: &Path, segments: bool) -> Result<bool, String> {
    let mut wrong = false;
    for folder in namespace::find(directory)? {
        wrong |= one(&Namespace::read(&folder)?, segments);
    }
    Ok(wrong)
}

fn one(namespace: &Namespace, segments: bool) -> bool {
    println!("{}", namespace.path.display());
    for (name, value) in &namespace.description {
        println!("  {name:<22}{value}");
    }
    let published = namespace.published();
    let part_count: usize =
        namespace.description.get("part_count").and_then(|n| n.parse().ok()).unwrap_or(1);
    let mut parts_of: BTreeMap<[u8; 16], HashSet<u16>> = BTreeMap::new();
    for part in &published {
        parts_of.entry(part.record.block.0).or_default().insert(part.record.part);
    }
    let whole = parts_of.values().filter(|parts| parts.len() >= part_count).count();
    let allocated: u64 = namespace.segments.values().map(|s| s.allocated).sum();
    let live: u64 = published.iter().map(|part| u64::from(part.record.length)).sum();
    println!(
        "  blocks                {} whole, {} with parts missing",
        whole,
        parts_of.len() - whole
    );
    println!("  parts                 {} ({})", published.len(), show::size(live));
    println!(
        "  segments              {} ({} on storage)",
        namespace.segments.len(),
        show::size(allocated)
    );
    println!("  writers");
    let mut wrong = false;
    for manifest in &namespace.manifests {
        println!("    {}", writer_line(manifest));
        wrong |= manifest.is_unreadable() || manifest.bad > 0;
    }
    let known: HashSet<u64> = namespace.manifests.iter().map(|m| m.name.writer).collect();
    let orphans = namespace.segments.keys().filter(|name| !known.contains(&name.writer)).count();
    if orphans > 0 {
        wrong = true;
        println!(
            "  WITHOUT MANIFEST      {orphans} segments; `ucm rebuild` makes their parts findable again"
        );
    }
    for segment in namespace.segments.values() {
        if let Err(reason) = &segment.header {
            println!("  UNREADABLE            {}: {reason}", segment.path.display());
            wrong = true;
        }
        if segments {
            let name = segment.name;
            let here = published.iter().filter(|part| part.segment == name).count();
            println!(
                "    {name}  {here} parts, {} of {} on storage",
                show::size(segment.allocated),
                show::size(segment.length)
            );
        }
    }
    if namespace.dead_files > 0 {
        println!("  on their way out      {} files", namespace.dead_files);
    }
    for path in &namespace.foreign {
        println!("  not UCM's             {}", path.display());
    }
    println!();
    wrong
}

fn writer_line(manifest: &Manifest) -> String {
    let name = manifest.name;
    let header = match &manifest.header {
        Ok(header) if manifest.has_head => header,
        Ok(_) => return format!("{name}  UNREADABLE: no valid head page; see `ucm rebuild`"),
        Err(reason) => return format!("{name}  UNREADABLE: {reason}; see `ucm rebuild`"),
    };
    let silent_ms = wall_ms().saturating_sub(manifest.written_ms);
    let state = match (name.fence, manifest.is_closed(), life_of(&this_process(), &header.process))
    {
        (Fence::Fenced, ..) => "fenced".to_owned(),
        (_, true, _) => "closed".to_owned(),
        (_, _, Life::Alive) => format!("alive, pid {}", header.process.pid),
        (_, _, Life::Dead) => format!("dead, was pid {}", header.process.pid),
        (_, _, Life::Unknown) if silent_ms > header.lease_ms => {
            "on another host, silent longer than its lease".to_owned()
        }
        (_, _, Life::Unknown) => "on another host".to_owned(),
    };
    let damaged = match manifest.bad {
        0 => String::new(),
        bad => format!(", {bad} DAMAGED RECORDS"),
    };
    format!(
        "{name}  {state}; {} records{damaged}, last {}",
        manifest.records.len(),
        show::age(manifest.written_ms)
    )
}
