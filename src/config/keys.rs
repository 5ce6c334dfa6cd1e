//! The table of keys: names, kinds, ranges, defaults and what each means. `docs/configuration.md` is
//! checked against it, so a key that is not here does not exist.

/// Who reads a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The store; written below `ucm_connector_config`, or given to `ucm_options_set`.
    Store,
    /// The vLLM connector; written at the top of the file. The store only checks its form.
    Connector,
}

/// The form of a value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// `true` or `false`; also yes, no, on, off, 1, 0.
    Bool,
    /// A whole number from the first to the second.
    Integer(i64, i64),
    /// A number, fractions allowed, from the first to the second.
    Number(f64, f64),
    /// One of these words.
    Word(&'static [&'static str]),
    /// One of these words, or a whole number up to the bound.
    WordOrInteger(&'static [&'static str], i64),
    /// Any text of at most so many bytes.
    Text(usize),
    /// Letters, digits, `.`, `_` and `-`, at most so many.
    Name(usize),
    /// Directories: one, several joined by `:`, or a list.
    Directories,
    /// A list of whole numbers, or numbers joined by `,`, each from the first to the second.
    Integers(i64, i64),
    /// Slice shapes: see the section "Strided slices" of the reference.
    Shapes,
}

impl Kind {
    /// What is allowed, as an error message and the reference say it.
    pub fn allowed(&self) -> String {
        match self {
            Kind::Bool => "true, false".into(),
            Kind::Integer(min, max) => format!("whole numbers from {min} to {max}"),
            Kind::Number(min, max) => format!("numbers from {min} to {max}"),
            Kind::Word(words) => words.join(", "),
            Kind::WordOrInteger(words, max) => {
                format!("{}, or a whole number from 0 to {max}", words.join(", "))
            }
            Kind::Text(max) => format!("text of at most {max} bytes"),
            Kind::Name(max) => {
                format!("1 to {max} letters, digits, dots, underscores and hyphens")
            }
            Kind::Directories => "a directory, several joined by a colon, or a list".into(),
            Kind::Integers(min, max) => format!("a list of whole numbers from {min} to {max}"),
            Kind::Shapes => "a list of {run, counts, strides}, or text like 256,16:4096".into(),
        }
    }
}

/// One key of the configuration.
#[derive(Debug)]
pub struct Key {
    /// The name, the same in YAML, C, Python and on the command line.
    pub name: &'static str,
    /// Other names that mean the same.
    pub aliases: &'static [&'static str],
    /// Who reads it.
    pub scope: Scope,
    /// Form and range.
    pub kind: Kind,
    /// The value of a key that is not given, as it would be written; empty: derived or none.
    pub default: &'static str,
    /// Unit of the number; empty where there is none.
    pub unit: &'static str,
    /// What it means, in a sentence or two.
    pub doc: &'static str,
}

/// Most bytes that a shard, a part or the owned parts may have; the geometry is checked more closely.
const BYTES_MAX: i64 = 1 << 41;
const HOUR_MS: i64 = 3_600_000;

const fn store(
    name: &'static str,
    kind: Kind,
    default: &'static str,
    unit: &'static str,
    doc: &'static str,
) -> Key {
    Key { name, aliases: &[], scope: Scope::Store, kind, default, unit, doc }
}

const fn connector(
    name: &'static str,
    kind: Kind,
    default: &'static str,
    doc: &'static str,
) -> Key {
    Key { name, aliases: &[], scope: Scope::Connector, kind, default, unit: "", doc }
}

/// Every key, in the order of the reference.
pub static KEYS: &[Key] = &[
    // Tiers.
    store(
        "store_pipeline",
        Kind::Word(&["Cache|Posix", "Posix", "Cache|Empty", "Empty"]),
        "Cache|Posix",
        "",
        "The tiers in order. `Posix` stages in DRAM and keeps nothing there; `Cache|Empty` is DRAM only; `Empty` swallows saves and finds nothing, for measuring.",
    ),
    store(
        "storage_backends",
        Kind::Directories,
        "",
        "",
        "Directories of the Posix tier, at least one; created with mode 0700 if missing. Blocks are spread over them.",
    ),
    store(
        "cache_buffer_capacity_gb",
        Kind::Number(0.0, 65536.0),
        "1",
        "GiB",
        "Size of the arena that stages and caches, per rank unless shared. Checked at open against the memory limit of the cgroup and the available memory, before pages are touched.",
    ),
    store(
        "share_buffer_enable",
        Kind::Bool,
        "false",
        "",
        "Whether cache_buffer_capacity_gb is meant for all ranks of the host together: each of the local_rank_size ranks then maps an arena of its own with an equal share of it. Room and blocks are not shared: a rank neither uses what another leaves free nor loads from its DRAM.",
    ),
    store(
        "local_rank_size",
        Kind::Integer(1, 1024),
        "1",
        "ranks",
        "Ranks of this host that open a store with the same arena size: the memory ceiling is divided by it, and so is the arena where share_buffer_enable is set.",
    ),
    store(
        "huge_pages",
        Kind::Word(&["auto", "required", "off"]),
        "auto",
        "",
        "Whether the arena lies in huge pages. `auto` takes 2 MiB pages from the pool, else asks for transparent ones; `required` makes their absence an error.",
    ),
    store(
        "register_memory",
        Kind::Word(&["auto", "required", "off"]),
        "auto",
        "",
        "Whether the arena is registered with io_uring, which saves CPU on every transfer. The usual obstacle is `ulimit -l`; `required` makes a refusal an error.",
    ),
    store(
        "numa_node",
        Kind::WordOrInteger(&["auto", "off"], 1023),
        "auto",
        "",
        "NUMA node of the arena. `auto` takes the node of the device, else of `cpu_affinity_cores`.",
    ),
    // Device.
    store(
        "device",
        Kind::Word(&["auto", "host", "cuda", "ascend"]),
        "auto",
        "",
        "Whose memory the addresses of a batch name. `auto` takes the accelerator whose driver is loaded, else host memory. CUDA takes addresses of host memory too; on an Ascend machine they need `host`.",
    ),
    store(
        "device_id",
        Kind::Integer(-1, 1023),
        "0",
        "",
        "Ordinal of the device. -1: lookup only; the store transfers nothing and needs of the geometry only `block_size`, `part_count` and `parts_owned`.",
    ),
    store(
        "gpu_direct",
        Kind::Word(&["off", "auto", "required"]),
        "off",
        "",
        "The direct path between drive and device memory (GPUDirect Storage), with checksums computed by the GPU. Needs `device: cuda`, `store_pipeline: Posix`, libcufile and a file system that it supports; its compatibility mode counts as not supported. cache_buffer_capacity_gb is device memory then. `auto` uses pinned host memory where something is missing, `required` makes that an error at open.",
    ),
    Key {
        name: "stream_number",
        aliases: &["cache_stream_number"],
        scope: Scope::Store,
        kind: Kind::Integer(1, 32),
        default: "2",
        unit: "streams",
        doc: "Copy streams between caller memory and the arena.",
    },
    // Geometry.
    store(
        "tensor_size_list",
        Kind::Integers(1, BYTES_MAX),
        "",
        "bytes",
        "Length of each tensor slice of a shard, in the order of a batch's addresses. Default: `tensor_shape_list`, else one slice.",
    ),
    store(
        "tensor_size",
        Kind::Integer(1, BYTES_MAX),
        "",
        "bytes",
        "Length of every tensor slice, where all are equal; instead of `tensor_size_list`.",
    ),
    store(
        "tensor_shape_list",
        Kind::Shapes,
        "",
        "bytes",
        "Strided slices: run bytes, counts and strides of each slice. See \"Strided slices\".",
    ),
    store(
        "shard_size",
        Kind::Integer(1, BYTES_MAX),
        "",
        "bytes",
        "What is transferred as a unit: a part, one layer of it, or several parts. Default: the sum of the slices, else one part. A layer-wise shard must be a multiple of 4096.",
    ),
    store(
        "block_size",
        Kind::Integer(1, BYTES_MAX),
        "",
        "bytes",
        "Bytes of the parts this store owns, together. Default: `shard_size`.",
    ),
    store(
        "part_count",
        Kind::Integer(1, 1024),
        "1",
        "parts",
        "Parts of a block, the same for every store of the namespace (slices by KV head; 1 for MLA).",
    ),
    store(
        "part_index",
        Kind::Integer(0, 1023),
        "0",
        "",
        "The first part that this store saves and loads.",
    ),
    store(
        "parts_owned",
        Kind::Integer(1, 1024),
        "1",
        "parts",
        "How many parts it saves and loads, from `part_index` on.",
    ),
    // Namespace.
    store(
        "model_id",
        Kind::Text(4096),
        "",
        "",
        "Fingerprint of the model. Stores share blocks only where this, `dtype`, `block_tokens`, `namespace_extra` and the part geometry agree.",
    ),
    store("dtype", Kind::Text(256), "", "", "Element type of the KV cache, part of the namespace."),
    store(
        "block_tokens",
        Kind::Integer(0, 1 << 20),
        "0",
        "tokens",
        "Tokens of a block, part of the namespace; 0: not said.",
    ),
    store(
        "namespace_extra",
        Kind::Text(65536),
        "",
        "",
        "Anything else that decides content: scales, adapters, a tenant.",
    ),
    store(
        "order",
        Kind::Name(64),
        "native",
        "",
        "Name of the order of bytes inside a part. Stores with other orders keep their blocks in a namespace beside this one.",
    ),
    store(
        "unique_id",
        Kind::Text(256),
        "",
        "",
        "Name of the engine instance on this host: a lookup-only store sees what is in the DRAM of transferring stores with the same name. Blocks on storage are shared whatever it is.",
    ),
    // Input and output.
    Key {
        name: "io_engine",
        aliases: &["posix_io_engine"],
        scope: Scope::Store,
        kind: Kind::Word(&["auto", "io_uring", "psync", "required"]),
        default: "auto",
        unit: "",
        doc: "How files are read and written. `auto` probes io_uring and falls back to `psync`, a pool of threads; `io_uring` (or `required`) makes its refusal an error. Upstream's `posix_io_engine: aio` means `auto`.",
    },
    store(
        "io_direct",
        Kind::Word(&["auto", "true", "false", "required"]),
        "auto",
        "",
        "Bypass of the page cache (O_DIRECT). `auto` probes and falls back to buffered files; `true` and `required` make a refusal an error.",
    ),
    store(
        "io_threads",
        Kind::Integer(1, 64),
        "1",
        "threads",
        "Reactors of each directory, a ring each. One saturates most drives.",
    ),
    store(
        "io_depth",
        Kind::Integer(1, 4096),
        "64",
        "operations",
        "Operations in flight in each ring.",
    ),
    store(
        "io_size_kb",
        Kind::Integer(4, 65536),
        "4096",
        "KiB",
        "Largest single read or write, a multiple of 4; the last one of a transfer may be a sixteenth larger.",
    ),
    store(
        "cpu_affinity_cores",
        Kind::Integers(0, 4095),
        "",
        "",
        "CPUs that the reactors are pinned to. Default: not pinned.",
    ),
    store(
        "segment_size_mb",
        Kind::Integer(1, 65536),
        "256",
        "MiB",
        "Size of a segment file. Raised where fewer than four parts would fit, lowered where `posix_capacity_gb` is small.",
    ),
    store(
        "durability",
        Kind::Word(&["none", "ordered", "durable"]),
        "none",
        "",
        "What PERSISTED survives. `none`: the death of the process; `ordered`: data is flushed before its record; `durable`: a power cut.",
    ),
    store(
        "checksum",
        Kind::Word(&["full", "off"]),
        "full",
        "",
        "Verification of every load from storage. `off` saves about 0.03 CPU seconds per GB and gives up the detection of damaged bytes; segments are then never recycled in place.",
    ),
    // Capacity.
    store(
        "posix_capacity_gb",
        Kind::Number(0.0, 1_048_576.0),
        "0",
        "GiB",
        "Bound on the bytes of the namespace in all directories together; 0: none.",
    ),
    store(
        "posix_gc_enable",
        Kind::Bool,
        "true",
        "",
        "Whether this store reclaims space when `posix_capacity_gb` is set. The bound holds for its own saves either way.",
    ),
    store(
        "posix_gc_trigger_threshold_ratio",
        Kind::Number(0.01, 1.0),
        "0.9",
        "share",
        "Share of the capacity at which reclaim begins.",
    ),
    store(
        "posix_gc_recycle_percent",
        Kind::Number(0.001, 0.99),
        "0.1",
        "share",
        "Share of the capacity that one round frees: it ends at the trigger less this.",
    ),
    store(
        "posix_gc_check_interval_sec",
        Kind::Integer(1, 86400),
        "30",
        "seconds",
        "Time between two looks at the bytes in use.",
    ),
    // Time and queues.
    store(
        "lookup_refresh_ms",
        Kind::Integer(0, HOUR_MS),
        "100",
        "milliseconds",
        "How stale the index may be: a lookup that finds it older starts a refresh. 0: every lookup does.",
    ),
    store(
        "timeout_ms",
        Kind::Integer(1, 24 * HOUR_MS),
        "30000",
        "milliseconds",
        "Deadline of a task, and of opening the store.",
    ),
    store(
        "lease_ms",
        Kind::Integer(1000, HOUR_MS),
        "10000",
        "milliseconds",
        "After how long without a heartbeat other stores may take this writer for dead.",
    ),
    store(
        "waiting_queue_depth",
        Kind::Integer(1, 1 << 24),
        "8192",
        "tasks",
        "Tasks that wait; a submit beyond it gets BUSY.",
    ),
    store(
        "running_queue_depth",
        Kind::Integer(1, 1 << 24),
        "16384",
        "entries",
        "Entries of tasks in work at a time.",
    ),
    // Read by the connector.
    connector(
        "enable_event_sync",
        Kind::Bool,
        "true",
        "Order copies behind the compute stream by device events instead of waiting on the CPU.",
    ),
    connector(
        "use_layerwise",
        Kind::Bool,
        "false",
        "Save and load layer by layer, overlapped with computation.",
    ),
    connector(
        "handoff",
        Kind::Word(&["promise", "blocking"]),
        "promise",
        "When blocks that a prefill server announces can be loaded. `promise`: the answer announces them and the decode server waits for them; `blocking`: the step that finishes a prompt waits until they are persisted.",
    ),
    Key {
        unit: "milliseconds",
        ..connector(
            "handoff_wait_ms",
            Kind::Integer(0, HOUR_MS),
            "5000",
            "How long a decode server waits for announced blocks before it computes them.",
        )
    },
    Key {
        unit: "milliseconds",
        ..connector(
            "save_wait_ms",
            Kind::Integer(0, HOUR_MS),
            "5000",
            "Bound of every wait for saves: preemption, blocking handoff, shutdown.",
        )
    },
    connector(
        "strict_load_failure",
        Kind::Bool,
        "false",
        "Obey vLLM's `kv_load_failure_policy: fail`. By default blocks that cannot be loaded are recomputed.",
    ),
    connector(
        "metrics_config_path",
        Kind::Text(4096),
        "",
        "A metrics file of upstream's form; accepted, metrics need none.",
    ),
    connector(
        "hit_ratio",
        Kind::Number(0.0, 1.0),
        "1",
        "Upper bound on the share of a prompt that is loaded, for experiments.",
    ),
    connector(
        "save_decode_blocks",
        Kind::Bool,
        "true",
        "Save the blocks that fill up while decoding, so that the next turn hits them.",
    ),
    connector(
        "persist_token_threshold",
        Kind::Integer(0, 1 << 31),
        "0",
        "Prompts of fewer tokens are neither saved nor loaded.",
    ),
    connector(
        "load_tokens_threshold",
        Kind::Integer(0, 1 << 31),
        "0",
        "Fewer external hit tokens than this are recomputed instead of loaded.",
    ),
];
