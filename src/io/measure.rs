//! Measures a reactor beside fio: same file, same sizes, same depth, turn about. Ignored by default; run
//! with `cargo test --release -p ucm --lib io::measure -- --ignored --nocapture`. The directory is
//! `UCM_MEASURE_DIR`, else the system's temporary one; `UCM_MEASURE_ENGINE` (`IoUring`, `Psync`) picks one.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::report::Counters;
use super::*;

const FILE_BYTES: u64 = 2 << 30;
const DEPTH: usize = 32;
/// Pages are touched and the drive's queue filled before counting begins.
const WARM_UP: Duration = Duration::from_millis(300);
const RUN: Duration = Duration::from_secs(2);
const ROUNDS: usize = 5;

/// What one run cost. The engine's CPU is that of the whole process, kernel workers included; fio's is that
/// of its job thread.
#[derive(Clone, Copy, Debug)]
struct Cost {
    bytes_per_second: f64,
    cpu_seconds_per_gb: f64,
    calls_per_request: f64,
    p99_us: f64,
}

fn directory() -> PathBuf {
    std::env::var_os("UCM_MEASURE_DIR").map_or_else(std::env::temp_dir, PathBuf::from)
}

fn cpu_seconds() -> f64 {
    // SAFETY: `usage` is plain memory that getrusage fills.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Memory as the arena has it: in huge pages, touched. Leaked: one a run.
fn huge_pages(bytes: usize) -> *mut u8 {
    const HUGE_PAGE_BYTES: usize = 2 << 20;
    let bytes = bytes.next_multiple_of(HUGE_PAGE_BYTES);
    let layout = std::alloc::Layout::from_size_align(bytes, HUGE_PAGE_BYTES).unwrap();
    // SAFETY: the layout is not empty; advice and filling stay within the allocation.
    unsafe {
        let pointer = std::alloc::alloc(layout);
        assert!(!pointer.is_null());
        libc::madvise(pointer.cast(), bytes, libc::MADV_HUGEPAGE);
        pointer.write_bytes(1, bytes);
        pointer
    }
}

/// A closed loop: every end submits the next transfer, from the reactor's thread.
struct Loop {
    backend: Arc<Backend>,
    file: File,
    operation: Operation,
    block: usize,
    stop: AtomicBool,
    ended: AtomicU64,
    running: AtomicU64,
    latencies: Mutex<Vec<u32>>,
    over: mpsc::Sender<()>,
}

impl Loop {
    fn next(self: &Arc<Self>, memory: DmaSlice, mut place: u64) {
        if self.stop.load(Ordering::Relaxed) {
            if self.running.fetch_sub(1, Ordering::Relaxed) == 1 {
                let _ = self.over.send(());
            }
            return;
        }
        let blocks = FILE_BYTES / self.block as u64;
        let offset = match self.operation {
            Operation::Read => {
                place ^= place << 13;
                place ^= place >> 7;
                place ^= place << 17;
                (place % blocks) * self.block as u64
            }
            Operation::Write => {
                place = self.ended.load(Ordering::Relaxed);
                (place % blocks) * self.block as u64
            }
        };
        let this = Arc::clone(self);
        let began = Instant::now();
        let done: Done = Box::new(move |result| {
            result.unwrap();
            this.ended.fetch_add(1, Ordering::Relaxed);
            this.latencies.lock().push(began.elapsed().as_micros() as u32);
            this.next(memory, place);
        });
        self.backend.submit(Request {
            operation: self.operation,
            file: self.file.clone(),
            offset,
            memory,
            class: if self.operation == Operation::Read { Class::Load } else { Class::Save },
            expires: None,
            done,
        });
    }
}

fn engine(operation: Operation, block: usize, engine: IoEngine) -> Cost {
    let config = BackendConfig {
        engine,
        depth: DEPTH as u32,
        io_bytes: block,
        direct: DirectIo::Required,
        ..BackendConfig::default()
    };
    let backend = Backend::open(&directory(), &config, Instant::now() + RUN).unwrap();
    let path = directory().join("ucm-measure");
    let how = OpenHow { access: Access::ReadWrite, create: Create::No, direct: true };
    let file = backend.files().open(&path, how).unwrap();
    let memory = huge_pages(DEPTH * block);
    backend.register_memory(memory, DEPTH * block).unwrap();
    let (over, ended) = mpsc::channel();
    let looping = Arc::new(Loop {
        backend: Arc::clone(&backend),
        file,
        operation,
        block,
        stop: AtomicBool::new(false),
        ended: AtomicU64::new(0),
        running: AtomicU64::new(DEPTH as u64),
        latencies: Mutex::new(Vec::with_capacity(1 << 20)),
        over,
    });
    for index in 0..DEPTH {
        let memory = DmaSlice { pointer: memory.wrapping_add(index * block), length: block };
        looping.next(memory, 0x9e37_79b9_7f4a_7c15 ^ (index as u64 + 1) << 20);
    }
    std::thread::sleep(WARM_UP);
    let before = backend.report().counters;
    let (cpu, began) = (cpu_seconds(), Instant::now());
    std::thread::sleep(RUN);
    let (cpu, took) = (cpu_seconds() - cpu, began.elapsed().as_secs_f64());
    let counters = backend.report().counters;
    looping.stop.store(true, Ordering::Relaxed);
    ended.recv().unwrap();
    let moved = |counters: &Counters| counters.bytes_read + counters.bytes_written;
    let bytes = (moved(&counters) - moved(&before)) as f64;
    let calls = |counters: &Counters| counters.system_calls + counters.wakes;
    let mut latencies = looping.latencies.lock().clone();
    latencies.sort_unstable();
    backend.stop(Instant::now() + RUN);
    Cost {
        bytes_per_second: bytes / took,
        cpu_seconds_per_gb: cpu / (bytes / 1e9),
        calls_per_request: (calls(&counters) - calls(&before)) as f64
            / (counters.requests - before.requests) as f64,
        p99_us: f64::from(latencies[latencies.len() * 99 / 100]),
    }
}

fn fio(operation: Operation, block: usize, engine: IoEngine) -> Cost {
    let path = directory().join("ucm-measure");
    let rw = if operation == Operation::Read { "randread" } else { "write" };
    let mut command = Command::new("fio");
    command.args([
        "--name=m",
        "--direct=1",
        "--time_based",
        "--output-format=json",
        "--norandommap",
    ]);
    command.arg(format!("--filename={}", path.display())).arg(format!("--rw={rw}"));
    command.arg(format!("--bs={block}")).arg(format!("--runtime={}", RUN.as_secs()));
    command.arg("--size=2g");
    if engine == IoEngine::Psync {
        command.args(["--ioengine=psync", "--thread", "--group_reporting"]);
        command.arg(format!("--numjobs={DEPTH}"));
    } else {
        command.args(["--ioengine=io_uring", "--fixedbufs", "--registerfiles"]);
        command.arg(format!("--iodepth={DEPTH}"));
    }
    let output = command.output().expect("fio is installed");
    let text = String::from_utf8(output.stdout).unwrap();
    let side = if operation == Operation::Read { "\"read\" : {" } else { "\"write\" : {" };
    let number = |from: &str, key: &str| -> f64 {
        let rest = &text[text.find(from).unwrap()..];
        let rest = &rest[rest.find(&format!("\"{key}\" :")).unwrap() + key.len() + 4..];
        let end = rest.find([',', '\n']).unwrap();
        rest[..end].trim().parse().unwrap()
    };
    let bytes = number(side, "io_bytes");
    let took = number(side, "runtime") / 1e3;
    let busy = (number("\"usr_cpu\"", "usr_cpu") + number("\"usr_cpu\"", "sys_cpu")) / 100.0;
    let took_all = number("\"job_runtime\"", "job_runtime") / 1e3;
    Cost {
        bytes_per_second: bytes / took,
        cpu_seconds_per_gb: busy * took_all / (bytes / 1e9),
        calls_per_request: f64::NAN,
        p99_us: number(side, "99.000000") / 1e3,
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn compare(operation: Operation, block: usize, kind: IoEngine) {
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for _ in 0..ROUNDS {
        ours.push(engine(operation, block, kind));
        theirs.push(fio(operation, block, kind));
    }
    let of = |costs: &[Cost], field: fn(&Cost) -> f64| median(costs.iter().map(field).collect());
    let ratio = |field: fn(&Cost) -> f64| {
        let pairs = ours.iter().zip(&theirs);
        median(pairs.map(|(our, their)| field(our) / field(their)).collect())
    };
    println!(
        "{kind:?} {operation:?} {:>4} KiB: {:.2} GB/s ({:.3} of fio), {:.4} CPU s/GB ({:.3} of fio's {:.4}), \
         {:.2} calls a request, p99 {:.0} us ({:.2} of fio)",
        block >> 10,
        of(&ours, |cost| cost.bytes_per_second) / 1e9,
        ratio(|cost| cost.bytes_per_second),
        of(&ours, |cost| cost.cpu_seconds_per_gb),
        ratio(|cost| cost.cpu_seconds_per_gb),
        of(&theirs, |cost| cost.cpu_seconds_per_gb),
        of(&ours, |cost| cost.calls_per_request),
        of(&ours, |cost| cost.p99_us),
        ratio(|cost| cost.p99_us),
    );
}

/// Goal: the reactor moves as many bytes as fio at its CPU cost. Prints; the numbers are judged by people.
#[test]
#[ignore = "measures for minutes, and needs fio"]
fn beside_fio() {
    let path = directory().join("ucm-measure");
    let laid = Command::new("fio")
        .args(["--name=lay", "--rw=write", "--bs=1m", "--size=2g", "--direct=1", "--iodepth=8"])
        .arg("--ioengine=io_uring")
        .arg(format!("--filename={}", path.display()))
        .output()
        .expect("fio is installed");
    assert!(laid.status.success());
    for kind in [IoEngine::IoUring, IoEngine::Psync] {
        if std::env::var_os("UCM_MEASURE_ENGINE").is_some_and(|only| *only != *format!("{kind:?}"))
        {
            continue;
        }
        for block in [64 << 10, 256 << 10, 1 << 20, 4 << 20] {
            compare(Operation::Read, block, kind);
        }
        compare(Operation::Write, 1 << 20, kind);
    }
    std::fs::remove_file(path).unwrap();
}
