//! The program, a directory for it to measure, and what it answered.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::time::{Duration, Instant};

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
        Answer::of(self.command(arguments).output().unwrap())
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
        Running { child, progress, seen: String::new() }
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

/// The program at work.
pub struct Running {
    child: Child,
    progress: BufReader<ChildStderr>,
    seen: String,
}

impl Running {
    /// Waits until its progress shows `word`. Lines end with a line feed, or begin again with a carriage return.
    pub fn until(&mut self, word: &str) {
        while !self.seen.contains(word) {
            let bytes = self.progress.fill_buf().unwrap();
            assert!(!bytes.is_empty(), "it ended without `{word}`:\n{}", self.seen);
            self.seen += &String::from_utf8_lossy(bytes);
            let count = bytes.len();
            self.progress.consume(count);
        }
    }

    /// Presses Ctrl-C and waits for the end.
    pub fn interrupt(mut self) -> Answer {
        let process = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(process, rustix::process::Signal::INT).unwrap();
        let begin = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            if begin.elapsed() > PATIENCE {
                self.child.kill().unwrap();
                panic!("Ctrl-C did not end it; its progress:\n{}", self.seen);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // What is still to come fits into the pipe, so the program did not wait for this.
        self.progress.read_to_string(&mut self.seen).unwrap();
        let mut answer = Answer::of(self.child.wait_with_output().unwrap());
        answer.complaint = self.seen;
        answer
    }
}
