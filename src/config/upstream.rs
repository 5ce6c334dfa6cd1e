//! Keys of upstream UCM that mean nothing here: accepted, so that its files work unchanged, each with one
//! warning that says why.

/// Keys of upstream UCM that mean nothing here, and why.
pub static UPSTREAM_KEYS: &[(&str, &str)] = &[
    ("store_backend", "the pipeline is built by the store"),
    ("role", "a store both saves and loads; device_id -1 makes it lookup only"),
    (
        "use_gdr",
        "GPUDirect RDMA copies are not used; see gpu_direct for the direct path to the drive",
    ),
    ("store_health", "a failing directory is degraded by itself, without settings"),
    ("buffer_number", "cache_buffer_capacity_gb sizes the arena"),
    ("buffer_size", "cache_buffer_capacity_gb sizes the arena"),
    ("share_buffer_capacity_gb", "cache_buffer_capacity_gb sizes the arena"),
    ("cache_load_exclusive_buffer_number", "loads go before saves without a reserve of buffers"),
    ("cache_data_setup_timeout_ms", "timeout_ms bounds the opening of a store"),
    ("cache_sdma_direct", "the copy path is chosen by calibration when the store opens"),
    ("cache_io_aggregation", "the copy path is chosen by calibration when the store opens"),
    (
        "cache_load_backend_only",
        "it served tests only; use store_pipeline: Posix to bypass the cache",
    ),
    ("cache_detected_numa_node", "numa_node places the arena"),
    ("cache_fallback_numa_rank", "numa_node places the arena"),
    ("cache_h2d_transport", "the copy path is chosen by calibration when the store opens"),
    (
        "cache_h2d_ffts_pipeline_depth",
        "the copy path is chosen by calibration when the store opens",
    ),
    (
        "cache_h2d_ffts_max_ready_lanes",
        "the copy path is chosen by calibration when the store opens",
    ),
    (
        "gpu_kv_buffer_addrs",
        "addresses come with each batch; memory is registered by ucm_memory_register",
    ),
    (
        "gpu_kv_buffer_sizes",
        "addresses come with each batch; memory is registered by ucm_memory_register",
    ),
    ("layer_size", "shard_size says how a part is cut into layers"),
    ("chunk_size", "block_size says how large a block is"),
    ("compress_ratio", "there is no compressing tier"),
    ("transfer_io_direct", "io_direct says it for saves and loads"),
    ("transferIoDirect", "io_direct says it for saves and loads"),
    ("transferStreamNumber", "stream_number sets the copy streams"),
    ("transfer_stream_number", "stream_number sets the copy streams"),
    ("posix_data_trans_concurrency", "io_depth and io_threads bound the I/O in flight"),
    ("posix_lookup_concurrency", "lookups are answered from memory"),
    ("posix_open_concurrency", "segments stay open"),
    ("posix_commit_concurrency", "a block is published by a record, not by a rename"),
    ("data_dir_shard_bytes", "blocks are not spread over directories by name"),
    ("shard_data_dir", "blocks are not spread over directories by name"),
    ("hotness_interval", "hotness is kept in memory"),
    ("enable_hotness", "hotness is kept in memory"),
    ("hotness_enable", "hotness is kept in memory"),
    ("posix_gc_concurrency", "reclaim drops whole segments, which needs no pool of threads"),
    (
        "posix_gc_max_recycle_count_per_shard",
        "reclaim drops whole segments, not files of a directory",
    ),
    ("posix_gc_shard_sample_ratio", "the bytes in use are known, not sampled"),
    ("posix_gc_task_timeout_ms", "reclaim drops whole segments; timeout_ms bounds each step"),
    ("posix_gc_precise_mode", "reclaim chooses the coldest segments of the whole namespace"),
    ("storage_capacity", "posix_capacity_gb bounds the bytes"),
    ("recycle_enable", "posix_gc_enable switches reclaim"),
    ("recycle_threshold_ratio", "posix_gc_trigger_threshold_ratio sets where reclaim begins"),
    ("kv_block_size", "block_size says how large a block is"),
    ("io_size", "io_size_kb bounds a single read or write"),
    ("max_cache_size", "cache_buffer_capacity_gb sizes the arena"),
    ("enable_metrics", "metrics are always kept; they cost nothing to speak of"),
    ("enable_record_traces", "requests are not recorded"),
    (
        "use_lite",
        "there is no connector without data; store_pipeline: Empty measures without storage",
    ),
    ("wa_dump_block_wise", "every full block is saved"),
    (
        "load_only_first_rank",
        "each rank loads what it needs; ranks of a host share the cache's index",
    ),
    ("use_inference_duration_monitor", "the engine's own metrics time its stages"),
    ("inference_duration_monitor_fake_hit_ratio", "hits are never invented"),
    ("ucm_sparse_config", "sparse attention is no part of this store"),
    ("ucm_sparse_method", "sparse attention is no part of this store"),
    ("use_hybrid_connector", "groups of KV caches are recognised without being told"),
];

/// Families of such keys, by how they begin.
pub static UPSTREAM_PREFIXES: &[(&str, &str)] = &[
    ("yuanrong_", "there is no YuanRong tier"),
    ("mooncake_", "there is no Mooncake tier"),
    ("memory_", "there is no separate memory store; the Cache tier keeps blocks in DRAM"),
    ("context_", "there is no context store; the Cache tier keeps blocks in DRAM"),
    ("ds3fs_", "there is no 3FS tier; a mounted 3FS is a directory of storage_backends"),
];
