//! The access log: one JSON object a line. Owns the writer's thread and its bounded queue, so that
//! a slow disk or pipe never delays a request; lines over the bound are dropped and counted.

use std::fs::OpenOptions;
use std::io::{self, BufWriter, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Lines that may wait for the writer.
const LINES_WAITING_MAX: usize = 16_384;

/// Where lines go.
pub struct AccessLog {
    lines: Option<SyncSender<String>>,
}

impl AccessLog {
    /// `off`, `-` for standard output, or a path that is appended to.
    pub fn open(target: &str) -> Result<Self, String> {
        let out: Box<dyn Write + Send> = match target {
            "off" => return Ok(Self { lines: None }),
            "-" => Box::new(io::stdout()),
            path => {
                let file = OpenOptions::new().create(true).append(true).open(path);
                Box::new(file.map_err(|error| format!("access log `{path}`: {error}"))?)
            }
        };
        let (sender, receiver) = sync_channel(LINES_WAITING_MAX);
        let thread = std::thread::Builder::new().name("access-log".to_owned());
        thread
            .spawn(move || write_lines(&receiver, out))
            .map_err(|error| format!("the access log's thread did not start: {error}"))?;
        Ok(Self { lines: Some(sender) })
    }

    /// Whether lines are wanted.
    pub fn is_on(&self) -> bool {
        self.lines.is_some()
    }

    /// Hands a line over; false when it was dropped.
    pub fn line(&self, line: String) -> bool {
        self.lines.as_ref().is_none_or(|lines| lines.try_send(line).is_ok())
    }
}

/// Writes what is there and flushes when nothing more waits. Errors of the target are not the
/// requests' problem: the line is lost, the next one is tried.
fn write_lines(lines: &Receiver<String>, out: Box<dyn Write + Send>) {
    let mut out = BufWriter::new(out);
    while let Ok(line) = lines.recv() {
        let _ = writeln!(out, "{line}");
        while let Ok(line) = lines.try_recv() {
            let _ = writeln!(out, "{line}");
        }
        let _ = out.flush();
    }
}
