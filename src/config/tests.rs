//! Tests of the configuration: its forms, its refusals, and that the reference is complete.

use super::*;
use crate::block::SliceShape;
use crate::error::ErrorKind;

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

fn built(yaml: &str) -> Config {
    Options::from_yaml(yaml).and_then(|options| options.build()).unwrap()
}

fn refused(yaml: &str) -> String {
    let error = Options::from_yaml(yaml).and_then(|options| options.build()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
    error.to_string()
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
}
