//! Tests of the configuration: its forms, its refusals, and that the reference is complete.

use proptest::prelude::*;

use super::*;
use crate::block::SliceShape;
use crate::error::ErrorKind;
use crate::reference;

const UPSTREAM_FILE: &str = r#"
ucm_connectors:
  - ucm_connector_name: "UcmPipelineStore"
    ucm_connector_config:
      store_pipeline: "Cache|Posix"
      storage_backends: "/mnt/test1"        # a comment
      cache_buffer_capacity_gb: 32
enable_event_sync: true
use_layerwise: false
"#;

/// A complete inner mapping but for the keys under test.
fn with(keys: &str) -> String {
    format!("model_id: m\nstorage_backends: /a\n{keys}")
}

fn built(yaml: &str) -> Config {
    Options::from_yaml(yaml).and_then(|options| options.build()).unwrap()
}

/// The message of the refusal; the kind is checked.
fn refused(yaml: &str) -> String {
    let error = Options::from_yaml(yaml).and_then(|options| options.build()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
    error.to_string()
}

fn assert_refused(yaml: &str, words: &[&str]) {
    let message = refused(yaml);
    for word in words {
        assert!(message.contains(word), "no \"{word}\" in: {message}");
    }
}

#[test]
fn an_upstream_file_works_unchanged() {
    // Goal: the example file of UCM is taken as it is; only the geometry, which the connector adds, is set.
    let mut options = Options::from_yaml(UPSTREAM_FILE).unwrap();
    options.set("block_size", "1048576").unwrap();
    let config = options.build().unwrap();
    assert_eq!(config.pipeline.name(), "Cache|Posix");
    assert_eq!(config.storage_backends, [PathBuf::from("/mnt/test1")]);
    assert_eq!(config.cache_bytes, 32 << 30);
    assert_eq!(config.geometry.part_bytes, 1 << 20);
    assert_eq!(config.geometry.slices, [SliceShape::contiguous(1 << 20)]);
    assert_eq!(config.timeout, Duration::from_secs(30));
    assert_eq!(config.warnings.len(), 1, "only the missing model_id: {:?}", config.warnings);
}

#[test]
fn shared_capacity_is_divided_among_the_ranks() {
    // Goal: share_buffer_enable divides the capacity by local_rank_size, in whole arena units; alone it does
    // nothing and says so; where a share is too small, the message counts all ranks.
    let share = |keys: &str| with(&format!("block_size: 1048576\n{keys}"));
    let both = share("cache_buffer_capacity_gb: 1\nshare_buffer_enable: true\nlocal_rank_size: 3");
    let config = built(&both);
    assert!(config.share_buffer && config.warnings.is_empty(), "{:?}", config.warnings);
    assert_eq!((config.cache_bytes, config.local_ranks), (342 << 20, 3));
    let apart = built(&share("cache_buffer_capacity_gb: 1\nlocal_rank_size: 3"));
    assert_eq!(apart.cache_bytes, 1 << 30);
    let alone = built(&share("cache_buffer_capacity_gb: 1\nshare_buffer_enable: true"));
    assert_eq!(alone.cache_bytes, 1 << 30);
    let [warning] = &alone.warnings[..] else { panic!("{:?}", alone.warnings) };
    assert!(warning.contains("local_rank_size"), "{warning}");
    let small = "cache_buffer_capacity_gb: 0.001\nshare_buffer_enable: true\nlocal_rank_size: 64";
    // 4 MiB for each of 64 ranks.
    assert_refused(&share(small), &["64 ranks", "at least 0.250"]);
    built(&share(&small.replace("0.001", "0.250")));
}

#[test]
fn upstream_developer_settings_are_warnings_not_errors() {
    // Goal: a file with everything that upstream documents is accepted, one warning a key.
    let config = built(
        r#"
ucm_connectors:
  - ucm_connector_name: "UcmNfsStore"
    ucm_connector_config:
      storage_backends: "/mnt/a:/mnt/b"
      io_direct: true
      use_gdr: false
      store_health: {enabled: true, failure_threshold: 2}
      posix_io_engine: aio
      posix_capacity_gb: 1024
      posix_gc_concurrency: 16
      posix_data_trans_concurrency: 128
      unique_id: "abc"
      yuanrong_port: 18483
      block_size: 65536
      model_id: m
      waiting_queue_depth: 8192
      running_queue_depth: 524288
ucm_sparse_config: {GSAOnDevice: {}}
load_only_first_rank: false
enable_record_traces: false
hit_ratio: 0.9
"#,
    );
    assert_eq!(config.storage_backends.len(), 2);
    assert_eq!(config.io_direct, DirectIo::Required);
    assert_eq!(config.io_engine, IoEngine::Auto);
    assert_eq!(config.capacity_bytes, Some(1 << 40));
    assert_eq!(config.running_queue_depth, 524_288);
    for key in [
        "UcmNfsStore",
        "use_gdr",
        "store_health",
        "posix_io_engine: aio",
        "posix_gc_concurrency",
        "posix_data_trans_concurrency",
        "yuanrong_port",
        "ucm_sparse_config",
        "load_only_first_rank",
        "enable_record_traces",
    ] {
        let told = config.warnings.iter().filter(|warning| warning.contains(key)).count();
        assert_eq!(told, 1, "{key}: {:?}", config.warnings);
    }
    assert_eq!(config.warnings.len(), 10, "{:?}", config.warnings);
}

#[test]
fn the_inner_mapping_alone_is_a_file_too() {
    // Goal: the second form, with lists in each of their notations.
    let config = built(
        "storage_backends: [/a, '/b:c']\nmodel_id: 1.10\ntensor_size_list: [4096, 8_192]\ncpu_affinity_cores: 3\nblock_size: 24576\nposix_capacity_gb: null\nio_engine: psync\n",
    );
    assert_eq!(config.storage_backends, [PathBuf::from("/a"), PathBuf::from("/b:c")]);
    assert_eq!(config.namespace.model_id, "1.10", "a text stays as it is written");
    assert_eq!(config.cpu_affinity, [3]);
    assert_eq!(config.geometry.shard_bytes, 12288);
    assert_eq!(config.geometry.shard_count(), 2);
    assert_eq!(config.capacity_bytes, None);
    assert_eq!(config.io_engine, IoEngine::Psync);
    assert!(config.warnings.is_empty(), "{:?}", config.warnings);
}

#[test]
fn text_and_yaml_mean_the_same() {
    // Goal: what `set` takes as text gives the configuration that YAML gives.
    let yaml = built(concat!(
        "model_id: m\nstorage_backends: [/a, /b]\n",
        "tensor_size_list: [4096, 4096]\nchecksum: off\nio_direct: false\ncache_buffer_capacity_gb: 0.25\ncpu_affinity_cores: [0, 2]\n",
    ));
    let mut options = Options::new();
    for (key, value) in [
        ("model_id", "m"),
        ("storage_backends", "[/a, /b]"),
        ("tensor_size_list", "4096, 4096"),
        ("checksum", "off"),
        ("io_direct", "false"),
        ("cache_buffer_capacity_gb", "0.25"),
        ("cpu_affinity_cores", "[0, 2]"),
    ] {
        options.set(key, value).unwrap();
    }
    assert_eq!(options.build().unwrap(), yaml);
    assert_eq!(yaml.checksum, Checksum::Off);
    assert_eq!(yaml.io_direct, DirectIo::Off);
    assert_eq!(yaml.cache_bytes, 256 << 20);
    options.set("storage_backends", "/a:/b").unwrap();
    assert_eq!(options.build().unwrap(), yaml);
}

#[test]
fn the_connectors_keys_pass_through() {
    // Goal: a file with every key of the connector, and one connector that is no list, is accepted; their
    // values are checked.
    let file = |top: &str| {
        format!(
            "ucm_connectors:\n  ucm_connector_name: UcmPipelineStore\n  ucm_connector_config:\n    storage_backends: /a\n    block_size: 4096\n    model_id: m\n{top}"
        )
    };
    let all: String = KEYS
        .iter()
        .filter(|key| key.scope == Scope::Connector && !key.default.is_empty())
        .map(|key| format!("{}: {}\n", key.name, key.default))
        .collect();
    assert_eq!(built(&file(&all)).warnings, [] as [String; 0]);
    assert_refused(&file("handoff: never"), &["handoff", "promise, blocking"]);
    assert_refused(&file("use_layerwise: sometimes"), &["use_layerwise"]);
    assert_refused(&file("use_layrwise: true"), &["use_layrwise", "use_layerwise"]);
}

#[test]
fn required_turns_a_fallback_into_an_error() {
    // Goal: every key with a fallback takes `required`; YAML's `off` and `false` mean the same.
    let config = built(&with(
        "block_size: 4096\nio_engine: required\nio_direct: required\nhuge_pages: required\nregister_memory: required\ngpu_direct: required\n",
    ));
    assert_eq!((config.io_engine, config.io_direct), (IoEngine::IoUring, DirectIo::Required));
    for facility in [config.huge_pages, config.register_memory, config.gpu_direct] {
        assert_eq!(facility, Facility::Required);
    }
    let config = built(&with(
        "block_size: 4096\nio_direct: off\nhuge_pages: false\nregister_memory: no\nnuma_node: off\nchecksum: false\n",
    ));
    assert_eq!((config.io_direct, config.huge_pages), (DirectIo::Off, Facility::Off));
    assert_eq!((config.register_memory, config.numa), (Facility::Off, NumaPolicy::Off));
    assert_eq!(config.checksum, Checksum::Off);
    assert_eq!(built(&with("block_size: 4096\nnuma_node: 1")).numa, NumaPolicy::Node(1));
    assert_refused(&with("block_size: 4096\nio_engine: true"), &["io_engine"]);
}

#[test]
fn empty_texts_are_mappings_without_keys() {
    // Goal: an empty file is no options, not a failure of the YAML reader.
    for text in ["", "\n", "# nothing\n", "---\n", "{}"] {
        assert_eq!(Options::from_yaml(text).unwrap(), Options::new(), "{text:?}");
    }
    let empty =
        "ucm_connectors:\n  - ucm_connector_name: UcmPipelineStore\n    ucm_connector_config:\n";
    assert_eq!(Options::from_yaml(empty).unwrap(), Options::new());
}

#[test]
fn unknown_keys_name_the_nearest() {
    // Goal: the message has the key, the value, the nearest key and what that allows.
    assert_refused(
        &with("io_engin: psync"),
        &["\"io_engin\"", "\"psync\"", "io_engine", "auto, io_uring, psync"],
    );
    assert_refused(&with("qqqqqqqq: [1]"), &["qqqqqqqq", "a list", "docs/configuration.md"]);
    let error = Options::new().set("Storage_backend", "/a").unwrap_err().to_string();
    assert!(error.contains("storage_backends"), "{error}");
}

#[test]
fn bad_values_name_the_key_and_what_is_allowed() {
    // Goal: each kind of value has its refusal.
    for (keys, words) in [
        ("io_engine: uring", &["io_engine", "\"uring\"", "io_uring", "psync"][..]),
        ("timeout_ms: soon", &["timeout_ms", "\"soon\"", "from 1 to"]),
        ("timeout_ms: 0", &["timeout_ms", "\"0\"", "from 1 to"]),
        ("timeout_ms: 1.5", &["timeout_ms", "\"1.5\"", "whole"]),
        ("timeout_ms: [1]", &["timeout_ms"]),
        ("cache_buffer_capacity_gb: -1", &["cache_buffer_capacity_gb", "\"-1\""]),
        ("cache_buffer_capacity_gb: .nan", &["cache_buffer_capacity_gb"]),
        ("share_buffer_enable: maybe", &["share_buffer_enable", "true, false"]),
        ("storage_backends: []", &["storage_backends"]),
        ("storage_backends: '/a::/b'", &["storage_backends"]),
        ("storage_backends: {a: b}", &["storage_backends", "a mapping"]),
        ("tensor_size_list: [1, x]", &["tensor_size_list"]),
        ("order: ../up", &["order", "\"../up\""]),
        ("store_pipeline: Cache|Mooncake", &["store_pipeline", "Cache|Posix"]),
        ("device: gpu", &["device", "cuda, ascend"]),
    ] {
        assert_refused(
            &with(&format!("block_size: 4096\n{keys}")).replace("storage_backends: /a\n", ""),
            words,
        );
    }
}

#[test]
fn broken_files_are_configuration_errors() {
    // Goal: what is no YAML, no mapping, or the wrong form is refused with a place or a name.
    for text in ["a: [", "- 1\n- 2\n", "just text", "a: 1\na: 2\n", "\u{0}", "ucm_connectors: 5"] {
        refused(text);
    }
    assert_refused("ucm_connectors: []", &["ucm_connectors", "empty"]);
    assert_refused(
        "ucm_connectors:\n  - ucm_connector_name: UcmPipelinStore\n",
        &["UcmPipelinStore", "did you mean UcmPipelineStore?"],
    );
    assert_refused("ucm_connectors:\n  - name: x\n", &["\"name\"", "ucm_connector_config"]);
    assert_refused(
        "ucm_connectors:\n  - ucm_connector_config: {}\ntimeout_ms: 5\n",
        &["timeout_ms", "below ucm_connector_config"],
    );
    let missing =
        Options::from_yaml_file(std::path::Path::new("/does/not/exist.yaml")).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert!(missing.to_string().contains("/does/not/exist.yaml"));
}

#[test]
fn sizes_are_derived_as_documented() {
    // Goal: every row of the table "Sizes", and the examples below it.
    let geometry = |keys: &str| built(&with(keys)).geometry;
    let whole = geometry("block_size: 8192");
    assert_eq!((whole.shard_bytes, whole.slices.len()), (8192, 1));
    let parts = geometry("block_size: 8192\nparts_owned: 2\npart_count: 4\npart_index: 2");
    assert_eq!((parts.part_bytes, parts.shard_bytes, parts.shard_count()), (4096, 4096, 2));
    let listed = geometry("tensor_size_list: [100, 200]");
    assert_eq!((listed.part_bytes, listed.shard_bytes), (300, 300));
    let equal = geometry("tensor_size: 1024\nshard_size: 4096\nblock_size: 16384");
    assert_eq!((equal.slices.len(), equal.shard_count()), (4, 4));
    let layers = geometry("tensor_size_list: [131072, 131072]\nblock_size: 7340032");
    assert_eq!((layers.shard_count(), layers.is_layerwise()), (28, true));
    assert_eq!(geometry("tensor_size: 131072\nblock_size: 7340032").slices.len(), 56);
    let llama = geometry("tensor_size: 32768\nblock_size: 5242880\npart_count: 8\npart_index: 3");
    assert_eq!((llama.slices.len(), llama.part_index), (160, 3));
}

#[test]
fn sizes_that_do_not_fit_together_are_refused() {
    // Goal: each contradiction names the key to change.
    for (keys, word) in [
        ("device_id: 0", "block_size: missing"),
        ("block_size: 4097\nparts_owned: 2\npart_count: 2", "block_size: 4097"),
        ("block_size: 8192\nshard_size: 3000", "shard_size"),
        ("block_size: 6000\nshard_size: 3000", "multiple of 4096"),
        ("block_size: 8192\ntensor_size_list: [4096, 4000]\nshard_size: 8192", "tensor_size_list"),
        ("block_size: 8192\ntensor_size: 3000", "tensor_size"),
        ("tensor_size: 4096\ntensor_size_list: [4096, 8192]", "tensor_size"),
        ("block_size: 4096\npart_index: 1", "part_index"),
        ("block_size: 4096\ncache_buffer_capacity_gb: 0", "cache_buffer_capacity_gb"),
        ("block_size: 1073741824", "cache_buffer_capacity_gb"),
        ("block_size: 4096\nio_size_kb: 6", "io_size_kb"),
        ("block_size: 268435456\nposix_capacity_gb: 1", "posix_capacity_gb"),
        ("block_size: 4096\nstorage_backends: [/a, /a]", "listed twice"),
        (
            "block_size: 4096\nposix_gc_recycle_percent: 0.9\nposix_gc_trigger_threshold_ratio: 0.5",
            "posix_gc_recycle_percent",
        ),
        ("tensor_size: 1\nblock_size: 1048576", "tensor_size"),
    ] {
        let yaml = match keys.contains("storage_backends") {
            true => format!("model_id: m\n{keys}"),
            false => with(keys),
        };
        assert_refused(&yaml, &[word]);
    }
}

#[test]
fn a_lookup_only_store_needs_only_the_size_of_a_part() {
    // Goal: device_id -1 takes a block size alone, and ignores slices that would not do for transfers.
    let config = built(&with(
        "device_id: -1\nblock_size: 8192\npart_count: 8\ncache_buffer_capacity_gb: 0\n",
    ));
    assert!(config.is_lookup_only());
    assert_eq!((config.geometry.part_bytes, config.geometry.part_count), (8192, 8));
    let config = built(&with("device_id: -1\nblock_size: 8192\nshard_size: 3000\n"));
    assert_eq!(config.geometry.slices, [SliceShape::contiguous(8192)]);
}

#[test]
fn strided_slices_have_two_notations() {
    // Goal: the mapping and the compact text mean the same; what is contiguous is recognised.
    let yaml = built(&with(
        "tensor_shape_list:\n  - {run: 256, counts: [16], strides: [4096]}\n  - {run: 256, counts: [8, 2], strides: [65536, 512]}\n  - {run: 100}\n",
    ));
    let mut options = Options::from_yaml(&with("")).unwrap();
    options.set("tensor_shape_list", "256,16:4096; 256,8:65536,2:512;100").unwrap();
    assert_eq!(options.build().unwrap(), yaml);
    let slices = &yaml.geometry.slices;
    assert_eq!(slices[0].dimensions, [(16, 4096)]);
    assert_eq!(slices[1].dimensions, [(8, 65536), (2, 512)]);
    assert_eq!(yaml.geometry.shard_bytes, 4096 + 4096 + 100);
    options.set("tensor_shape_list", "256,4:4096,1:7,16:256").unwrap();
    let merged = options.build().unwrap().geometry.slices;
    assert_eq!(merged, [SliceShape::contiguous(16384)]);
}

#[test]
fn slices_that_write_a_byte_twice_are_refused() {
    // Goal: overlap is found in nested and in crossed strides; runs that only interleave are allowed.
    let set = |text: &str| Options::new().set("tensor_shape_list", text);
    for text in ["256,4:255", "256,2:0", "10,3:25,3:20", "256,1000000:100,2:50", "4,2:8,2:10"] {
        let error = set(text).unwrap_err().to_string();
        assert!(
            error.contains("overlap") && error.contains("tensor_shape_list"),
            "{text}: {error}"
        );
    }
    for text in ["256,4:256", "10,2:100,3:60", "4,2:4,2:100", "256,1:0"] {
        set(text).unwrap();
    }
    for text in [
        "",
        "x",
        "0",
        "5,3",
        "5,0:9",
        "1,2:3,2:9,2:99,2:999,2:9999,2:99999,2:999999",
        "[{counts: [2]}]",
        "[{run: 4, counts: [2], strides: []}]",
        "[{run: 4, stride: 3}]",
        "999999999999999,2:999999999999999",
    ] {
        let error = set(text).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{text}: {error}");
    }
    assert_refused(
        &with("tensor_shape_list: '256,2:512'\ntensor_size_list: [256]"),
        &["tensor_shape_list", "512", "256"],
    );
}

#[test]
fn segments_follow_the_size_of_parts_and_the_capacity() {
    // Goal: a segment holds four parts, a bounded namespace eight segments; a given size that is changed
    // is told.
    assert_eq!(built(&with("block_size: 4096")).segment_bytes, 256 << 20);
    let large = built(&with("block_size: 134217728\nsegment_size_mb: 64"));
    assert_eq!(large.segment_bytes, (4 * (128 << 20) + 4 * 4096_u64).next_multiple_of(1 << 20));
    assert!(
        large.warnings.iter().any(|w| w.starts_with("segment_size_mb: 64")),
        "{:?}",
        large.warnings
    );
    assert_eq!(built(&with("block_size: 4096\nposix_capacity_gb: 0.125")).segment_bytes, 16 << 20);
}

#[test]
fn every_default_has_the_form_of_its_key() {
    // Goal: the table contradicts itself nowhere: defaults parse, names and aliases are unique.
    let mut names: Vec<_> =
        KEYS.iter().flat_map(|key| key.aliases.iter().chain([&key.name])).collect();
    for key in KEYS.iter().filter(|key| !key.default.is_empty()) {
        Options::new().set(key.name, key.default).unwrap();
    }
    assert!(UPSTREAM_KEYS.iter().all(|(name, _)| !names.contains(&name)));
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
}

#[test]
fn the_reference_lists_every_key() {
    // Goal: docs/configuration.md has every key with its default, unit, range and meaning, and no others.
    let cell = |text: &str| text.replace('|', "\\|");
    let code = |text: &str| match text {
        "" => String::new(),
        text => format!("`{}`", cell(text)),
    };
    let rows: Vec<_> = KEYS
        .iter()
        .map(|key| {
            let aliases: String = key.aliases.iter().map(|alias| format!(", `{alias}`")).collect();
            let scope = match key.scope {
                Scope::Store => "store",
                Scope::Connector => "connector",
            };
            format!(
                "| `{}`{aliases} | {scope} | {} | {} | {} | {} |",
                key.name,
                code(key.default),
                key.unit,
                cell(&key.kind.allowed()),
                cell(key.doc)
            )
        })
        .collect();
    let table = format!(
        "| key | scope | default | unit | allowed | meaning |\n|---|---|---|---|---|---|\n{}\n",
        rows.join("\n")
    );
    reference::check("docs/configuration.md", "", &table);
    let rows: Vec<_> =
        UPSTREAM_KEYS.iter().map(|(name, why)| format!("| `{name}` | {} |", cell(why))).collect();
    let table = format!("| key | why |\n|---|---|\n{}\n", rows.join("\n"));
    reference::check("docs/configuration.md", "upstream", &table);
}

#[test]
fn the_examples_of_the_reference_are_valid() {
    // Goal: every YAML block of docs/configuration.md is accepted as it stands.
    let text = include_str!("../../docs/configuration.md");
    let examples: Vec<_> =
        text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(examples.len() >= 6);
    for example in examples {
        let mut options = Options::from_yaml(example).unwrap();
        let complete = ["block_size", "tensor_shape_list"].iter().any(|key| example.contains(key));
        if !complete {
            options.set("block_size", "4096").unwrap();
        }
        if !example.contains("storage_backends") {
            options.set("storage_backends", "/a").unwrap();
        }
        options.build().unwrap();
    }
}

proptest! {
    #[test]
    fn no_text_makes_the_reader_panic(text in "\\PC{0,200}") {
        // Goal: any text is options or an error of the configuration.
        if let Err(error) = Options::from_yaml(&text) {
            prop_assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        }
    }

    #[test]
    fn no_yaml_of_known_keys_makes_the_reader_panic(
        lines in prop::collection::vec(
            (0..KEYS.len(), "(\\[)?[-0-9a-z.:;,/{}' _]{0,24}(\\])?"), 0..12)
    ) {
        // Goal: the same for texts that reach the values, and for what is built from them.
        let text: String =
            lines.iter().map(|(key, value)| format!("{}: {value}\n", KEYS[*key].name)).collect();
        if let Err(error) = Options::from_yaml(&text).and_then(|options| options.build()) {
            prop_assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        }
        let mut options = Options::new();
        for (key, value) in &lines {
            if let Err(error) = options.set(KEYS[*key].name, value) {
                prop_assert_eq!(error.kind(), ErrorKind::InvalidConfig);
                prop_assert!(error.to_string().starts_with(KEYS[*key].name));
            }
        }
    }

    #[test]
    fn any_geometry_that_is_accepted_is_consistent(
        block in 1_u64..100_000,
        shard in prop::option::of(1_u64..100_000),
        tensor in prop::option::of(1_u64..5_000),
        owned in 1_u32..5,
        index in 0_u32..5,
        count in 1_u32..9,
    ) {
        // Goal: what passes has slices that fill a shard, shards that fill the parts, and owned parts
        // inside the block.
        let mut options = Options::from_yaml(&with("")).unwrap();
        options.set("block_size", &block.to_string()).unwrap();
        for (key, value) in [("parts_owned", owned), ("part_index", index), ("part_count", count)] {
            options.set(key, &value.to_string()).unwrap();
        }
        for (key, value) in [("shard_size", shard), ("tensor_size", tensor)] {
            if let Some(value) = value {
                options.set(key, &value.to_string()).unwrap();
            }
        }
        if let Ok(config) = options.build() {
            let geometry = config.geometry;
            prop_assert_eq!(geometry.owned_bytes(), block);
            let sliced: u64 = geometry.slices.iter().map(SliceShape::bytes).sum();
            prop_assert_eq!(sliced, geometry.shard_bytes);
            prop_assert_eq!(u64::from(geometry.shard_count()) * geometry.shard_bytes, block);
            prop_assert!(geometry.part_index + geometry.parts_owned <= geometry.part_count);
            prop_assert_eq!(config.namespace.part_bytes, geometry.part_bytes);
        }
    }
}
