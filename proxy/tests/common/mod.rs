//! What the tests share: scripted servers, a proxy process, a client that sees every byte.
#![allow(dead_code, missing_docs, reason = "each test binary uses its own part")]
#![forbid(unsafe_code)]

pub mod client;
pub mod proxy;
pub mod raw;
pub mod scripted;

use std::future::Future;
use std::time::{Duration, Instant};

/// Runs a test on its own runtime.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.expect("a runtime").block_on(future)
}

/// Waits until `holds`, at most ten seconds.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "did not come true in 10 s: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
