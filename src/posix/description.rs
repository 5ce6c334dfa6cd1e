//! `namespace.json`: a namespace in plain words, for people and for naming what keeps two namespaces apart.
//!
//! One field a line, so that comparing lines compares fields. Nothing depends on the file.

#![forbid(unsafe_code)]

use std::path::Path;

use crate::block::{FORMAT_MAJOR, Namespace, PAGE};
use crate::error::{ErrorKind, Result};
use crate::io::{Access, Create, OpenHow};
use crate::posix::home::Home;
use crate::posix::names::NAMESPACE_FILE;
use crate::posix::pages::Pages;

/// Neighbours that are compared with a new namespace.
const NEIGHBOURS_MAX: usize = 8;
/// Pages of a description that are read.
const PAGES_MAX: usize = 4;

/// Writes the description of a namespace that is new in its backend and tells how it differs from its
/// neighbours there: that is where "why are there no hits" begins. Blocks.
pub fn write_once(home: &Home, namespace: &Namespace) -> Result<()> {
    let Some(folder) = home.folder() else { return Ok(()) };
    let text = describe(namespace);
    match write(home, &folder.join(NAMESPACE_FILE), &text) {
        Ok(()) => {
            tell_neighbours(home, namespace, &text);
            Ok(())
        }
        Err(error) if error.errno() == Some(libc::EEXIST) => Ok(()),
        Err(error) if error.kind() == ErrorKind::Permission => Err(error),
        Err(error) => {
            crate::log::warning(format_args!("the namespace's description is missing: {error}"));
            Ok(())
        }
    }
}

fn describe(namespace: &Namespace) -> String {
    let hex = |bytes: [u8; 16]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let fields = [
        ("format", FORMAT_MAJOR.to_string()),
        ("model_id", quote(&namespace.model_id)),
        ("dtype", quote(&namespace.dtype)),
        ("block_tokens", namespace.block_tokens.to_string()),
        ("namespace_extra", quote(&namespace.extra)),
        ("part_count", namespace.part_count.to_string()),
        ("part_bytes", namespace.part_bytes.to_string()),
        ("order", quote(&namespace.order)),
        ("logical_fingerprint", quote(&hex(namespace.logical_fingerprint()))),
        ("fingerprint", quote(&hex(namespace.fingerprint()))),
    ];
    let lines: Vec<String> =
        fields.iter().map(|(name, value)| format!("  \"{name}\": {value}")).collect();
    format!("{{\n{}\n}}\n", lines.join(",\n"))
}

fn quote(text: &str) -> String {
    let mut out = String::from("\"");
    for char in text.chars() {
        match char {
            '"' | '\\' => out.extend(['\\', char]),
            '\u{0}'..='\u{1f}' => out.push_str(&format!("\\u{:04x}", char as u32)),
            _ => out.push(char),
        }
    }
    out + "\""
}

/// Padded with blanks to whole pages, which direct I/O needs and JSON allows.
fn write(home: &Home, path: &Path, text: &str) -> Result<()> {
    let files = home.backend.files();
    let how = OpenHow { access: Access::ReadWrite, create: Create::New, direct: home.is_direct() };
    let file = files.open(path, how)?;
    let count = text.len().div_ceil(PAGE);
    let mut pages = Pages::new(count);
    pages.bytes_mut().fill(b' ');
    pages.bytes_mut()[..text.len()].copy_from_slice(text.as_bytes());
    pages.write_to(&**files, &file, 0, 0, count)
}

fn read(home: &Home, path: &Path) -> Result<String> {
    let files = home.backend.files();
    let file = files.open(path, home.open_how(Access::Read))?;
    let mut pages = Pages::new(PAGES_MAX);
    let got = pages.read_from(&**files, &file, 0, 0, PAGES_MAX)?;
    Ok(String::from_utf8_lossy(&pages.bytes()[..got]).into_owned())
}

fn tell_neighbours(home: &Home, namespace: &Namespace, text: &str) {
    let directory = home.backend.directory();
    let Ok(names) = home.backend.files().list(directory) else { return };
    let own = namespace.folder();
    let names = names.iter().filter_map(|name| name.to_str());
    let others = names.filter(|name| name.starts_with("ucm") && *name != own);
    for other in others.take(NEIGHBOURS_MAX) {
        let Ok(theirs) = read(home, &directory.join(other).join(NAMESPACE_FILE)) else { continue };
        crate::log::info(format_args!(
            "{}: new namespace {own}; nothing is shared with {other}, which has another {}",
            directory.display(),
            differences(text, &theirs).join(", ")
        ));
    }
}

/// Names of the fields whose lines differ; the fingerprints follow from the others.
fn differences(ours: &str, theirs: &str) -> Vec<String> {
    let lines = |text: &str| -> Vec<(String, String)> {
        let fields = text.lines().filter_map(|line| line.split_once(": "));
        fields
            .map(|(name, value)| {
                let name = name.trim().trim_matches('"').to_owned();
                (name, value.trim_end_matches(',').to_owned())
            })
            .filter(|(name, _)| !name.ends_with("fingerprint"))
            .collect()
    };
    let theirs = lines(theirs);
    lines(ours)
        .into_iter()
        .filter(|field| !theirs.contains(field))
        .map(|(name, ours)| {
            let there = theirs.iter().find(|(other, _)| *other == name);
            format!("{name} ({ours} here, {} there)", there.map_or("nothing", |(_, v)| v.as_str()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two namespaces that differ in one field are told apart by the name of that field.
    #[test]
    fn differences_are_named() {
        let ours = Namespace {
            model_id: "a \"quoted\"\nname".into(),
            dtype: "bf16".into(),
            block_tokens: 128,
            extra: String::new(),
            part_count: 8,
            part_bytes: 1 << 20,
            order: "raw".into(),
        };
        let theirs = Namespace { dtype: "fp8".into(), ..ours.clone() };
        assert_eq!(
            differences(&describe(&ours), &describe(&theirs)),
            ["dtype (\"bf16\" here, \"fp8\" there)"]
        );
        assert!(differences(&describe(&ours), &describe(&ours)).is_empty());
    }
}
