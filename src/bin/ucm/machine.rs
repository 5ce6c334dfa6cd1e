//! What this machine offers a store: memory, huge pages, locked memory, NUMA, accelerators. Reads `/proc` and
//! `/sys`, and asks the drivers' libraries whether they load.

use std::path::Path;

use ucm::mem::huge::{HUGE_PAGE, HugePages};

use crate::doctor::Finding;
use crate::show;

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// All findings about the machine.
pub fn findings() -> Vec<Finding> {
    let mut findings =
        vec![kernel(), memory(), memlock(), huge_pages(&HugePages::here()), open_files(), numa()];
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

fn huge_pages(there: &HugePages) -> Finding {
    let pool = there.pool_free * HUGE_PAGE as u64;
    let transparent = show::size(there.transparent_bytes);
    if pool > 0 {
        let text = format!("{} free in the pool ({})", there.pool_free, show::size(pool));
        return Finding::good("huge pages", text);
    }
    let suitable = there.transparent_bytes == HUGE_PAGE as u64;
    if there.transparent && suitable {
        return Finding::good(
            "huge pages",
            format!("transparent ones of {transparent}; none in the pool"),
        );
    }
    Finding::missing(
        "huge pages",
        match there.transparent {
            true => format!(
                "none in the pool; transparent ones have {transparent}, which few arenas fill"
            ),
            false => "neither transparent nor in the pool".into(),
        },
        "with base pages of 4 KiB registering a GiB takes 35 ms instead of 2, and transfers of 1 MiB may be split in two",
        &format!("for each GiB of cache_buffer_capacity_gb {}", there.remedy(1 << 30)),
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
