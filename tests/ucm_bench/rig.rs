//! The program, a directory for it to measure, and what it answered.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// Blocks of a small data set: `SIZE` in blocks of `BLOCK`.
pub const BLOCKS: u64 = 32;
/// Bytes of such a block.
pub const BLOCK: u64 = 64 << 10;
/// A data set that takes no time, in segments that take no room.
pub const SMALL: [&str; 4] = ["--bs=64k", "--size=2m", "--cache-size=16m", "--segment-size-mb=8"];
/// How long a program may take to end on a busy machine before its test fails instead of hanging.
const PATIENCE: Duration = Duration::from_secs(120);

/// A directory to measure.
pub struct Bench {
    directory: TempDir,
}

/// What the program answered.
pub struct Answer {
    /// Its exit status.
    pub code: Option<i32>,
    /// What it printed.
    pub text: String,
    /// What it complained about.
    pub complaint: String,
}

impl Bench {
    /// A new directory.
    pub fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// The program with these arguments.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ucm-bench"));
        command.args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs it.
    pub fn run(&self, arguments: &[&str]) -> Answer {
        let mut command = self.command(arguments);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let _limit = Limit::of(&child);
        Answer::of(child.wait_with_output().unwrap())
    }

    /// Runs it on the directory with a small data set.
    pub fn small(&self, arguments: &[&str]) -> Answer {
        let directory = format!("--directory={}", self.path().display());
        self.run(&[&[directory.as_str()][..], &SMALL, arguments].concat())
    }

    /// The same, giving the JSON of a run that went well.
    pub fn json(&self, arguments: &[&str]) -> Value {
        self.small(&[arguments, &["--output-format=json"]].concat()).json()
    }

    /// Starts it with its progress shown.
    pub fn start(&self, arguments: &[&str]) -> Running {
        self.start_with(self.command(arguments))
    }

    /// Starts a command of this program with its progress shown.
    pub fn start_with(&self, mut command: Command) -> Running {
        command.arg("--eta=always").stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let progress = BufReader::new(child.stderr.take().unwrap());
        let limit = Limit::of(&child);
        Running { child: Some(child), progress, seen: String::new(), _limit: limit }
    }

    /// What lies in the directory.
    pub fn entries(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Answer {
    fn of(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Self {
            code: output.status.code(),
            text: text(output.stdout),
            complaint: text(output.stderr),
        }
    }

    /// Its text, of a run that went well.
    pub fn good(self) -> String {
        assert_eq!(self.code, Some(0), "{}{}", self.text, self.complaint);
        self.text
    }

    /// Its JSON, of a run that went well.
    pub fn json(self) -> Value {
        let text = self.good();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in\n{text}"))
    }
}

/// Kills a program that is still there when all patience is over.
struct Limit {
    _over: Sender<()>,
}

impl Limit {
    fn of(child: &Child) -> Self {
        let process = Pid::from_child(child);
        let (over, is_over) = channel::<()>();
        std::thread::spawn(move || {
            if is_over.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                let _ = kill_process(process, Signal::KILL);
            }
        });
        Self { _over: over }
    }
}

/// The program at work. Ends with the test.
pub struct Running {
    child: Option<Child>,
    progress: BufReader<ChildStderr>,
    seen: String,
    _limit: Limit,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Running {
    /// Waits until its progress shows `word`. Lines end with a line feed, or begin again with a carriage return.
    pub fn until(&mut self, word: &str) {
        self.until_times(word, 1);
    }

    /// The same, `times` times.
    pub fn until_times(&mut self, word: &str, times: usize) {
        while self.seen.matches(word).count() < times {
            let bytes = self.progress.fill_buf().unwrap();
            assert!(!bytes.is_empty(), "it ended without `{word}`:\n{}", self.seen);
            self.seen += &String::from_utf8_lossy(bytes);
            let count = bytes.len();
            self.progress.consume(count);
        }
    }

    /// Presses Ctrl-C and waits for the end.
    pub fn interrupt(mut self) -> Answer {
        let child = self.child.take().unwrap();
        kill_process(Pid::from_child(&child), Signal::INT).unwrap();
        self.progress.read_to_string(&mut self.seen).unwrap();
        let mut answer = Answer::of(child.wait_with_output().unwrap());
        answer.complaint = std::mem::take(&mut self.seen);
        answer
    }
}
