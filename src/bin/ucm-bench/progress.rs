//! The line that a waiting person watches: quiet when standard error is not a terminal.

#![forbid(unsafe_code)]

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::transfer::Shared;
use crate::units::{show_size, show_time};

/// How often the line changes.
const EVERY: Duration = Duration::from_millis(500);

/// The progress of one group of jobs.
pub struct Progress {
    enabled: bool,
    title: String,
    total: Option<u64>,
    begin: Instant,
    /// When it was last shown, and the bytes and blocks then.
    last: Mutex<(Instant, u64, u64)>,
}

/// Whether standard error is a terminal.
pub fn is_watched() -> bool {
    std::io::stderr().is_terminal()
}

impl Progress {
    /// A line named `title`; `total` blocks are the end of it, if that is known.
    pub fn new(enabled: bool, title: &str, total: Option<u64>) -> Self {
        let now = Instant::now();
        Self { enabled, title: title.to_owned(), total, begin: now, last: Mutex::new((now, 0, 0)) }
    }

    /// Shows the line, not more often than twice a second. `time` is the time spent and the time given.
    pub fn show(&self, shared: &[&Shared], time: Option<(Duration, Duration)>) {
        let Ok(mut last) = self.last.lock() else { return };
        if !self.enabled || last.0.elapsed() < EVERY {
            return;
        }
        let blocks: u64 = shared.iter().map(|s| s.blocks.load(Ordering::Relaxed)).sum();
        let bytes: u64 = shared.iter().map(|s| s.bytes.load(Ordering::Relaxed)).sum();
        let seconds = last.0.elapsed().as_secs_f64();
        let (byte_rate, block_rate) =
            ((bytes - last.1) as f64 / seconds, (blocks - last.2) as f64 / seconds);
        *last = (Instant::now(), bytes, blocks);
        let by_blocks = self.total.filter(|&n| n > 0).map(|total| blocks as f64 / total as f64);
        let by_time = time.map(|(spent, all)| spent.as_secs_f64() / all.as_secs_f64().max(1e-9));
        let done = by_blocks.unwrap_or(0.0).max(by_time.unwrap_or(0.0)).min(1.0);
        let eta = if done > 0.0 {
            show_time(self.begin.elapsed().as_secs_f64() * (1.0 - done) / done)
        } else {
            String::from("?")
        };
        eprint!(
            "\r\x1b[K{}: {:3.0} %  {}/s  {block_rate:.0} blocks/s  eta {eta}",
            self.title,
            done * 100.0,
            show_size(byte_rate as u64),
        );
        let _ = std::io::stderr().flush();
    }

    /// Removes the line.
    pub fn end(&self) {
        if self.enabled {
            eprint!("\r\x1b[K");
            let _ = std::io::stderr().flush();
        }
    }
}
