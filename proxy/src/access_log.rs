//! The access log: one JSON object a line. Owns the writer's thread and its bounded queue, so that
//! a slow disk or pipe never delays a request; lines over the bound are dropped and counted.

use std::fs::OpenOptions;
use std::io::{self, BufWriter, Write};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;

/// Lines that may wait for the writer.
const LINES_WAITING_MAX: usize = 16_384;
/// Lines are gathered for so long, so that a busy proxy wakes the writer a hundred times a second
/// and not once a request.
const GATHERING: Duration = Duration::from_millis(10);
/// At the end of the proxy its last lines get this long: a pipe that nobody reads holds nobody up.
const LAST_LINES_MAX: Duration = Duration::from_secs(1);

/// Where lines go.
pub struct AccessLog {
    lines: Option<SyncSender<String>>,
    /// Ends when the writer has.
    written: Mutex<Receiver<()>>,
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        self.lines = None; // the writer ends behind the last line
        let _ = self.written.lock().expect("no panic while held").recv_timeout(LAST_LINES_MAX);
    }
}

impl AccessLog {
    /// `off`, `-` for standard output, or a path that is appended to.
    pub fn open(target: &str) -> Result<Self, String> {
        let (writing, written) = channel();
        let written = Mutex::new(written);
        let out: Box<dyn Write + Send> = match target {
            "off" => return Ok(Self { lines: None, written }),
            "-" => Box::new(io::stdout()),
            path => {
                let file = OpenOptions::new().create(true).append(true).open(path);
                Box::new(file.map_err(|error| format!("access log `{path}`: {error}"))?)
            }
        };
        let (sender, receiver) = sync_channel(LINES_WAITING_MAX);
        let thread = std::thread::Builder::new().name("access-log".to_owned());
        thread
            .spawn(move || write_lines(&receiver, out, writing))
            .map_err(|error| format!("the access log's thread did not start: {error}"))?;
        Ok(Self { lines: Some(sender), written })
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
/// requests' problem: the line is lost, the next one is tried. Drops `_writing` when it ends.
fn write_lines(lines: &Receiver<String>, out: Box<dyn Write + Send>, _writing: Sender<()>) {
    let mut out = BufWriter::new(out);
    while let Ok(line) = lines.recv() {
        let _ = writeln!(out, "{line}");
        std::thread::sleep(GATHERING);
        while let Ok(line) = lines.try_recv() {
            let _ = writeln!(out, "{line}");
        }
        let _ = out.flush();
    }
}
