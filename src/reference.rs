//! Keeps generated tables of the documentation equal to the code. Only tests use it.

#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Mutex;

/// Set to rewrite the tables instead of comparing them.
const BLESS: &str = "UCM_BLESS";
/// Tests run side by side, and two of them may rewrite one file.
static WRITING: Mutex<()> = Mutex::new(());

/// Fails where the generated section of `file` (below the root of the repository) is not `expected`; with
/// `UCM_BLESS=1` in the environment rewrites it. `section` names one of several; empty where there is one.
pub(crate) fn check(file: &str, section: &str, expected: &str) {
    let name = if section.is_empty() { String::new() } else { format!(" {section}") };
    let (begin, end) =
        (format!("<!-- generated: begin{name} -->\n"), format!("<!-- generated: end{name} -->\n"));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let _guard = WRITING.lock();
    let text = std::fs::read_to_string(&path).unwrap();
    let (head, rest) = text.split_once(&begin).expect("the marker of the generated section");
    let (found, tail) = rest.split_once(&end).expect("the end of the generated section");
    if std::env::var_os(BLESS).is_some() {
        std::fs::write(&path, format!("{head}{begin}{expected}{end}{tail}")).unwrap();
        return;
    }
    assert!(
        found == expected,
        "{file} is stale: run `{BLESS}=1 cargo test --lib reference` and commit it"
    );
}
