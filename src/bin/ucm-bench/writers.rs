//! Other writers: a child process that keeps stores open in the same namespace, so that what they cost the
//! measured process can be told from what they cost themselves.

#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

use crate::abi::Store;

/// The hidden subcommand of the child.
pub const SUBCOMMAND: &str = "hold-stores";

/// A child process with open stores; it closes them and ends when this is dropped.
pub struct Writers(Child);

impl Writers {
    /// Opens `count` stores with these options in a new process.
    pub fn start(count: u32, options: &[(String, String)]) -> Result<Self, String> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut command = Command::new(program);
        command.arg(SUBCOMMAND).arg(count.to_string());
        command.args(options.iter().map(|(key, value)| format!("{key}={value}")));
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("the process of the other writers: {error}"))?;
        let mut line = String::new();
        if let Some(out) = child.stdout.take() {
            let _ = BufReader::new(out).read_line(&mut line);
        }
        let writers = Self(child);
        if line.trim() == "open" {
            Ok(writers)
        } else {
            Err(format!("the process of the other writers could not open them: {}", line.trim()))
        }
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        // End of its standard input is the word to end.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// The child: opens the stores, says `open`, and holds them until its standard input ends.
pub fn hold(count: u32, options: &[String]) -> Result<(), String> {
    let mut options: Vec<(String, String)> = options
        .iter()
        .filter_map(|option| option.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    options.retain(|(key, _)| key != "cache_buffer_capacity_gb");
    options.push(("cache_buffer_capacity_gb".into(), "0.02".into()));
    let mut stores = Vec::new();
    for _ in 0..count {
        match Store::open(&options) {
            Ok(store) => stores.push(store),
            Err(failure) => {
                println!("{failure}");
                return Err(failure.to_string());
            }
        }
    }
    println!("open");
    let mut end = Vec::new();
    let _ = std::io::stdin().read_to_end(&mut end);
    drop(stores);
    Ok(())
}
