//! What this machine offers a store: memory, huge pages, locked memory, NUMA, accelerators. Reads `/proc` and
//! `/sys`, and asks the drivers' libraries whether they load.

use std::path::Path;

use crate::doctor::Finding;
use crate::show;

/// Huge page size that is looked for.
const HUGE_BYTES: u64 = 2 << 20;

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn number(path: &str) -> Option<u64> {
    read(path)?.parse().ok()
}

/// All findings about the machine.
pub fn findings() -> Vec<Finding> {
    let mut findings = vec![kernel(), memory(), memlock(), huge_pages(), open_files(), numa()];
    findings.extend(devices());
    findings
}

fn kernel() -> Finding {
    let release = read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let mut finding = Finding::good("kernel", format!("Linux {release}, {processors} processors"));
    if matches!(read("/proc/sys/kernel/io_uring_disabled").as_deref(), Some("1" | "2")) {
        finding = Finding::missing(
            "kernel",
            format!("Linux {release}; io_uring is switched off"),
            "1.6 to 4.6 times the CPU per GB: psync threads carry the I/O",
            "sysctl -w kernel.io_uring_disabled=0",
        );
    }
    finding
}

fn memory() -> Finding {
    let tightest = ucm::mem::limits::bounds().into_iter().min_by_key(|bound| bound.available);
    match tightest {
        Some(bound) => Finding::good(
            "memory",
            format!(
                "{} of {} left ({})",
                show::size(bound.available),
                show::size(bound.total),
                bound.source
            ),
        ),
        None => Finding::good("memory", "no bound could be read".into()),
    }
}

fn memlock() -> Finding {
    let line = read("/proc/self/limits").unwrap_or_default();
    let limit = line
        .lines()
        .find(|line| line.starts_with("Max locked memory"))
        .and_then(|line| line.split_whitespace().nth(3).map(str::to_owned))
        .unwrap_or_default();
    // CAP_IPC_LOCK is bit 14 of the effective capabilities; it lifts the limit.
    let status = read("/proc/self/status").unwrap_or_default();
    let capable = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> 14 & 1 == 1);
    match limit.parse::<u64>() {
        Ok(bytes) if !capable => Finding::missing(
            "locked memory",
            format!("{} may be locked", show::size(bytes)),
            "the arena cannot be registered with io_uring: 1.6 to 4.6 times the CPU per GB",
            "ulimit -l unlimited (docker run --ulimit memlock=-1:-1; systemd: LimitMEMLOCK=infinity)",
        ),
        Ok(_) => Finding::good("locked memory", "no limit (CAP_IPC_LOCK)".into()),
        Err(_) => Finding::good("locked memory", "no limit".into()),
    }
}

fn huge_pages() -> Finding {
    let free = number("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap_or(0);
    let transparent = read("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    if free > 0 {
        let bytes = free * HUGE_BYTES;
        return Finding::good(
            "huge pages",
            format!("{free} free in the pool ({})", show::size(bytes)),
        );
    }
    if transparent.contains("[always]") || transparent.contains("[madvise]") {
        return Finding::good(
            "huge pages",
            format!("transparent ({transparent}); none in the pool"),
        );
    }
    Finding::missing(
        "huge pages",
        "neither transparent nor in the pool".into(),
        "registering a GiB takes 35 ms instead of 2, and transfers of 1 MiB may be split in two",
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
    )
}

fn open_files() -> Finding {
    /// Segments and manifests that are held open, with room for the server's own.
    const ENOUGH: u64 = 4096;
    let text = read("/proc/self/limits").unwrap_or_default();
    let limit: Option<u64> = text
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .and_then(|line| line.split_whitespace().nth(3)?.parse().ok());
    match limit {
        Some(count) if count < ENOUGH => Finding::missing(
            "open files",
            format!("{count} a process"),
            "many writers or a large store run out of descriptors",
            "ulimit -n 65536",
        ),
        Some(count) => Finding::good("open files", format!("{count} a process")),
        None => Finding::good("open files", "no limit".into()),
    }
}

fn numa() -> Finding {
    let nodes = ucm::mem::numa::node_count();
    Finding::good(
        "NUMA",
        if nodes > 1 {
            format!("{nodes} nodes; numa_node: auto places the arena beside the device")
        } else {
            "one node".into()
        },
    )
}

fn devices() -> Vec<Finding> {
    let mut findings = Vec::new();
    let nvidia =
        Path::new("/proc/driver/nvidia/version").exists() || Path::new("/dev/nvidia0").exists();
    let ascend = Path::new("/dev/davinci0").exists() || Path::new("/dev/davinci_manager").exists();
    for (name, there, library, remedy) in [
        (
            "cuda",
            nvidia,
            "libcuda.so.1",
            "start the container with --gpus all (NVIDIA container toolkit)",
        ),
        ("ascend", ascend, "libascendcl.so", "source /usr/local/Ascend/ascend-toolkit/set_env.sh"),
    ] {
        let loads = loads(library);
        findings.push(match (there, loads) {
            (true, true) => Finding::good(name, format!("device and {library} are there")),
            (true, false) => Finding::missing(
                name,
                format!("a device is there, but {library} does not load"),
                "device: auto falls back to host memory, and batches with device addresses fail",
                remedy,
            ),
            (false, true) => {
                Finding::good(name, format!("{library} loads, but no device is there"))
            }
            (false, false) => Finding::good(name, "no device".into()),
        });
    }
    if nvidia {
        findings.push(gpu_direct());
    }
    findings
}

/// What there is of GPUDirect Storage. Nobody misses it who has not asked for it, so that it is no trouble.
fn gpu_direct() -> Finding {
    let module = read("/proc/driver/nvidia-fs/version");
    let module = module.map_or("nvidia-fs is not loaded".into(), |version| {
        format!("nvidia-fs {}", version.lines().next().unwrap_or_default())
    });
    let state = match ucm::cufile::library() {
        Ok(library) => format!("{library}, {module}; gpu_direct tries each directory out at open"),
        Err(error) => format!("{error}; {module}"),
    };
    Finding::good("gpu_direct", state)
}

#[allow(unsafe_code)]
fn loads(library: &str) -> bool {
    // SAFETY: a vendor's driver library; its initialisers are the vendor's word. It is not unloaded, since
    // drivers start threads.
    match unsafe { libloading::Library::new(library) } {
        Ok(library) => {
            std::mem::forget(library);
            true
        }
        Err(_) => false,
    }
}
