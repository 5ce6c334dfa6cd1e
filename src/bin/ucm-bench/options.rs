//! From a job's settings to the store's options.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use crate::job::Job;

/// Arena of the bench's stores, where the job does not say: small, so that drives are measured.
const CACHE_GB: &str = "0.25";

/// The options of the store of a job whose data lies in `folders`.
pub fn of(job: &Job, folders: &[PathBuf]) -> Result<Vec<(String, String)>, String> {
    let shape = job.shape()?;
    let (shard, slices) = if job.layerwise {
        (shape.layer_bytes(), shape.layer_slices.clone())
    } else {
        let all = (0..shape.layers).flat_map(|_| shape.layer_slices.iter().copied()).collect();
        (shape.bytes(), all)
    };
    let list: Vec<String> = slices.iter().map(u64::to_string).collect();
    let mut options: Vec<(String, String)> = Vec::new();
    let mut push = |key: &str, value: String| options.push((key.to_owned(), value));
    push("block_size", shape.bytes().to_string());
    push("shard_size", shard.to_string());
    push("tensor_size_list", format!("[{}]", list.join(", ")));
    push("model_id", format!("ucm-bench {}", job.model.as_deref().unwrap_or("numbers")));
    push("block_tokens", job.block_tokens.to_string());
    push("device", job.device.clone());
    push("device_id", job.device_id.to_string());
    if job.uses_storage() {
        let paths: Vec<_> = folders.iter().map(|path| path.display().to_string()).collect();
        push("storage_backends", paths.join(":"));
    } else if job.store_setting("store_pipeline").is_none() {
        push("store_pipeline", "Cache|Empty".to_owned());
    }
    if job.store_setting("cache_buffer_capacity_gb").is_none() {
        push("cache_buffer_capacity_gb", CACHE_GB.to_owned());
    }
    options.extend(job.store.iter().cloned());
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value<'a>(options: &'a [(String, String)], key: &str) -> &'a str {
        options.iter().rev().find(|(name, _)| name == key).map_or("", |(_, value)| value)
    }

    /// Goal: whole-part and layer-wise jobs describe the same block of the same namespace in their own slices.
    #[test]
    fn geometry() {
        let whole = Job { model: Some("deepseek-v3".into()), ..Job::default() };
        let layers = Job { layerwise: true, ..whole.clone() };
        let (whole, layers) = (of(&whole, &[]).unwrap(), of(&layers, &[]).unwrap());
        assert_eq!(value(&whole, "block_size"), value(&layers, "block_size"));
        assert_eq!(value(&layers, "shard_size"), (144 << 10).to_string());
        assert_eq!(value(&whole, "tensor_size_list").split(',').count(), 61);
        assert_eq!(value(&whole, "model_id"), value(&layers, "model_id"));
    }

    /// Goal: what the job says about the store wins over the bench's defaults.
    #[test]
    fn settings_win() {
        let mut job = Job::default();
        job.set_store("cache_buffer_capacity_gb", "2");
        assert_eq!(value(&of(&job, &[]).unwrap(), "cache_buffer_capacity_gb"), "2");
    }
}
