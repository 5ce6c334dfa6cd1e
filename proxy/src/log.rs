//! The proxy's own log: one line an event, on standard error. Owns the line's form; the access
//! log, one JSON object a request, is another file.

use crate::clock;

/// Says what went well or what was decided.
pub fn info(message: impl AsRef<str>) {
    line("INFO", message.as_ref());
}

/// Says what somebody should look at.
pub fn warn(message: impl AsRef<str>) {
    line("WARNING", message.as_ref());
}

fn line(level: &str, message: &str) {
    eprintln!("{} {level} ucm-proxy: {message}", clock::rfc3339_now());
}
