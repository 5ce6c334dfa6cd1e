//! The system's fio as the other side of a comparison: how it is called, and what its JSON says.

#![forbid(unsafe_code)]

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;

use crate::meter::Cpu;
use crate::run::Context;

/// How often Ctrl-C is looked at while fio runs: before a second signal counts as impatience, and seldom,
/// because system calls are counted too.
const TICK: Duration = Duration::from_millis(250);

/// What a person without fio reads.
const MISSING: &str = "fio is not installed; the comparison needs it:\n  \
    Debian, Ubuntu:  apt-get install fio\n  Fedora, RHEL:    dnf install fio\n  openSUSE:        zypper install fio";

/// One fio run.
#[derive(Clone, Debug)]
pub struct FioJob {
    /// `read`, `write`, `randread`.
    pub rw: &'static str,
    /// `io_uring` or `psync`.
    pub engine: String,
    /// Bytes of an I/O.
    pub block_size: u64,
    /// Bytes in all.
    pub size: u64,
    /// I/Os in flight (io_uring), or threads (psync).
    pub iodepth: u32,
    /// O_DIRECT or not.
    pub direct: bool,
    /// fdatasync after that many writes; 0: never.
    pub fdatasync: u32,
    /// More flags, as the user gave them.
    pub extra: Vec<String>,
}

/// What fio measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct FioResult {
    /// 10^9 bytes a second.
    pub gb_per_second: f64,
    /// CPU seconds of its job threads.
    pub cpu: Cpu,
    /// Bytes moved.
    pub bytes: u64,
    /// I/Os.
    pub ios: u64,
    /// 99 % of the completion latencies are below this, in seconds.
    pub p99: f64,
    /// System calls of the whole process, where they can be counted.
    pub syscalls: Option<u64>,
}

/// Version text of the installed fio, or how to install it.
pub fn version() -> Result<String, String> {
    let output = Command::new("fio").arg("--version").output().map_err(|error| {
        if error.kind() == std::io::ErrorKind::NotFound {
            String::from(MISSING)
        } else {
            format!("fio: {error}")
        }
    })?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

impl FioJob {
    /// The flags of this job on a file.
    pub fn arguments(&self, file: &Path) -> Vec<String> {
        let mut flags = vec![
            String::from("--name=fio"),
            format!("--filename={}", file.display()),
            format!("--rw={}", self.rw),
            format!("--bs={}", self.block_size),
            format!("--direct={}", u8::from(self.direct)),
            format!("--ioengine={}", self.engine),
            String::from("--thread"),
            String::from("--randrepeat=0"),
        ];
        if self.engine == "io_uring" {
            flags.push(format!("--size={}", self.size));
            flags.push(format!("--iodepth={}", self.iodepth));
            flags.extend(["--fixedbufs=1", "--registerfiles=1"].map(String::from));
        } else {
            // Threads, each over a stretch of its own of one file.
            let each = self.size / u64::from(self.iodepth) / self.block_size * self.block_size;
            flags.push(format!("--size={}", each.max(self.block_size)));
            flags.push(format!("--offset_increment={}", each.max(self.block_size)));
            flags.push(format!("--numjobs={}", self.iodepth));
            flags.push(String::from("--group_reporting"));
        }
        if self.fdatasync > 0 {
            flags.push(format!("--fdatasync={}", self.fdatasync));
        }
        flags.extend(self.extra.iter().cloned());
        flags
    }

    /// Runs it on a file; a write run gets a fresh one.
    pub fn run(&self, file: &Path, context: &Context) -> Result<FioResult, String> {
        if self.rw == "write" {
            // Not there is as good as removed.
            let _ = std::fs::remove_file(file);
        }
        let before = context.syscalls.count();
        let text = call(&self.arguments(file), context)?;
        let mut result = parse(&text, 0)?;
        result.syscalls = context.syscalls.count().zip(before).map(|(now, then)| now - then);
        Ok(result)
    }
}

/// Calls fio and returns its JSON.
pub fn call(arguments: &[String], context: &Context) -> Result<String, String> {
    let mut command = Command::new("fio");
    command.args(arguments).arg("--output-format=json");
    capture(command, context)
}

/// What a program prints. It gets a process group of its own: Ctrl-C reaches this process alone, which ends
/// the program and then reports what was measured before.
fn capture(mut command: Command, context: &Context) -> Result<String, String> {
    let shown = format!("{command:?}").replace('"', "");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|_| String::from(MISSING))?;
    let group = Pid::from_child(&child);
    let (output, message) = (child.stdout.take(), child.stderr.take());
    let (ended, ends) = channel::<()>();
    let (output, message) = std::thread::scope(|scope| {
        let also_ended = ended.clone();
        let output = scope.spawn(move || text_of(output, also_ended));
        let message = scope.spawn(move || text_of(message, ended));
        while let Err(RecvTimeoutError::Timeout) = ends.recv_timeout(TICK) {
            if context.is_interrupted() {
                // Not waited for yet, so the number is still its own; gone already is as good.
                let _ = kill_process_group(group, Signal::KILL);
            }
        }
        (output.join().unwrap_or_default(), message.join().unwrap_or_default())
    });
    let status = child.wait().map_err(|error| format!("fio: {error}"))?;
    if context.is_interrupted() && !status.success() {
        return Err("interrupted while fio ran; there is nothing to report yet".into());
    }
    if !status.success() {
        return Err(format!("{shown} failed: {}", message.trim()));
    }
    Ok(output)
}

/// All that a pipe gives; `_ended` is dropped when it is closed.
fn text_of(pipe: Option<impl Read>, _ended: std::sync::mpsc::Sender<()>) -> String {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        // What came before an error is shown as it is; the exit status tells whether it is whole.
        let _ = pipe.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Reads the figures of job `index` from fio's JSON.
pub fn parse(text: &str, index: usize) -> Result<FioResult, String> {
    // Warnings may stand before the JSON.
    let start = text.find('{').ok_or("fio printed no JSON")?;
    let root: Value =
        serde_json::from_str(&text[start..]).map_err(|error| format!("fio's JSON: {error}"))?;
    let job = &root["jobs"][index];
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let side = ["read", "write"]
        .iter()
        .map(|side| &job[*side])
        .max_by(|a, b| number(&a["io_bytes"]).total_cmp(&number(&b["io_bytes"])))
        .filter(|side| number(&side["io_bytes"]) > 0.0)
        .ok_or("fio's JSON names no bytes")?;
    // Percent of the time of its job threads, from their getrusage; the time is summed over threads.
    let thread_seconds = number(&job["job_runtime"]) * 1e-3;
    Ok(FioResult {
        gb_per_second: number(&side["bw_bytes"]) / 1e9,
        cpu: Cpu {
            user: number(&job["usr_cpu"]) * 0.01 * thread_seconds,
            system: number(&job["sys_cpu"]) * 0.01 * thread_seconds,
        },
        bytes: number(&side["io_bytes"]) as u64,
        ios: number(&side["total_ios"]) as u64,
        p99: number(&side["clat_ns"]["percentile"]["99.000000"]) * 1e-9,
        syscalls: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    /// Goal: Ctrl-C ends a fio that would run on, and says so instead of calling it a failure of fio.
    #[test]
    fn ctrl_c_left_fio_running() {
        let context = Context::for_test();
        let mut echo = Command::new("echo");
        echo.arg("{}");
        assert_eq!(capture(echo, &context).unwrap(), "{}\n");
        let failed = capture(Command::new("false"), &context).unwrap_err();
        assert!(failed.contains("false failed"), "{failed}");
        context.interrupted.store(true, std::sync::atomic::Ordering::Relaxed);
        let begin = Instant::now();
        let mut sleep = Command::new("sleep");
        sleep.arg("60");
        let message = capture(sleep, &context).unwrap_err();
        assert!(message.contains("interrupted"), "{message}");
        assert!(begin.elapsed() < Duration::from_secs(30));
    }

    /// Goal: bytes, rate and CPU are read from where fio 3 puts them, behind a warning line.
    #[test]
    fn reads_json() {
        let text = r#"fio: a warning
            {"jobs":[{"job_runtime":2000,"usr_cpu":10.0,"sys_cpu":5.0,
              "read":{"io_bytes":4000000000,"bw_bytes":2000000000,"total_ios":4000,
                      "clat_ns":{"percentile":{"99.000000":1500000}}},
              "write":{"io_bytes":0,"bw_bytes":0,"total_ios":0}}]}"#;
        let result = parse(text, 0).unwrap();
        assert_eq!((result.bytes, result.ios), (4_000_000_000, 4000));
        assert!((result.gb_per_second - 2.0).abs() < 1e-9 && (result.p99 - 1.5e-3).abs() < 1e-9);
        assert!((result.cpu.user - 0.2).abs() < 1e-9 && (result.cpu.system - 0.1).abs() < 1e-9);
        assert!(parse("nothing", 0).is_err());
    }

    /// Goal: psync gets as many threads as the engine has blocks in flight, over the same bytes.
    #[test]
    fn psync_threads() {
        let job = FioJob {
            rw: "randread",
            engine: "psync".into(),
            block_size: 1 << 20,
            size: 64 << 20,
            iodepth: 8,
            direct: true,
            fdatasync: 0,
            extra: vec![],
        };
        let flags = job.arguments(Path::new("/x")).join(" ");
        assert!(flags.contains("--numjobs=8") && flags.contains("--size=8388608"), "{flags}");
        assert!(!flags.contains("fixedbufs"));
    }
}
