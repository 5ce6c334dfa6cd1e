//! `include/ucm.h` and `include/symbols.txt`: what the C ABI offers, written from `src/capi`.

use std::collections::BTreeSet;
use std::path::Path;

use crate::Outcome;

/// The files of `src/capi` that have public items, in the order in which the header has them.
const SOURCES: &[&str] = &[
    "status",
    "pointers",
    "options",
    "store",
    "lookup",
    "batch",
    "task",
    "completion",
    "memory",
    "hash",
    "stats",
    "log",
];

const HEADER: &str = "include/ucm.h";
const SYMBOLS: &str = "include/symbols.txt";

/// Writes both files.
pub fn write(root: &Path) -> Outcome {
    let header = generate(root)?;
    put(root, SYMBOLS, &symbols(&header))?;
    put(root, HEADER, &header)
}

/// Fails when a committed file is not what would be written.
pub fn check(root: &Path) -> Outcome {
    let header = generate(root)?;
    for (name, expected) in [(HEADER, header.as_str()), (SYMBOLS, &symbols(&header))] {
        let path = root.join(name);
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        if found != expected {
            let line = found.lines().zip(expected.lines()).take_while(|(a, b)| a == b).count() + 1;
            return Err(format!(
                "{name} is stale from line {line} on; run `cargo xtask header` and commit it"
            ));
        }
    }
    Ok(())
}

fn put(root: &Path, name: &str, text: &str) -> Outcome {
    std::fs::write(root.join(name), text).map_err(|error| format!("{name}: {error}"))?;
    println!("wrote {name}");
    Ok(())
}

/// The header's text.
fn generate(root: &Path) -> Result<String, String> {
    let config = cbindgen::Config::from_file(root.join("include/cbindgen.toml"))?;
    let mut builder = cbindgen::Builder::new().with_config(config);
    for source in SOURCES {
        builder = builder.with_src(root.join(format!("src/capi/{source}.rs")));
    }
    let bindings = builder.generate().map_err(|error| format!("cbindgen: {error}"))?;
    let mut text = Vec::new();
    bindings.write(&mut text);
    String::from_utf8(text).map_err(|error| format!("cbindgen: {error}"))
}

/// The functions that the header declares, sorted, one a line: exactly what the library exports.
fn symbols(header: &str) -> String {
    let names: BTreeSet<&str> = header
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| line.split_inclusive('('))
        .filter_map(|piece| piece.strip_suffix('('))
        .filter_map(|piece| piece.rsplit(|c: char| !(c.is_alphanumeric() || c == '_')).next())
        .filter(|name| name.starts_with("ucm_"))
        .collect();
    names.into_iter().map(|name| format!("{name}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: the committed header and symbol list are what src/capi says.
    #[test]
    fn committed_header_is_current() {
        check(&crate::root()).unwrap();
    }

    // Goal: names are taken from declarations only, whatever stands around them.
    #[test]
    fn symbols_are_the_declared_functions() {
        let header = "// calls ucm_x(1)\nint ucm_b(const ucm_t *t);\nconst char *ucm_a(void);\n\
                      typedef void (*ucm_log_fn)(void *c);\n#define UCM_C(x) x\n";
        assert_eq!(symbols(header), "ucm_a\nucm_b\n");
    }
}
