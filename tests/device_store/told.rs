//! What is told of a device when a store opens it.

use std::sync::{Arc, Mutex};

use tempfile::TempDir;
use ucm::log::{self, Level};

use crate::common::store_in;
use crate::fakes::{EACH_DRIVER, Fake};

/// Goal: what a device fell back from reaches the log, once however many stores are opened; each of them tells
/// how it copies.
#[test]
fn a_way_of_copying_that_is_unknown_is_told_once() {
    for &kind in EACH_DRIVER {
        let _fake = Fake::take(kind);
        // SAFETY: under the fake's turn, which sets the variable anew each time.
        unsafe { std::env::set_var(kind.strategy_variable, "nonsense") };
        let heard = Arc::new(Mutex::new(Vec::new()));
        let ears = Arc::clone(&heard);
        let sink = move |level, text: &str| ears.lock().unwrap().push((level, text.to_owned()));
        log::set_sink(Some(Arc::new(sink)), Some(Level::Info)).unwrap();
        for _ in 0..2 {
            let directory = TempDir::new().unwrap();
            let store = store_in(directory.path(), &[("device", kind.device), ("device_id", "0")]);
            store.close();
        }
        log::set_sink(None, Some(Level::Warning)).unwrap();
        let heard = heard.lock().unwrap();
        let told = |level, part: &str| {
            heard.iter().filter(|(at, text)| *at == level && text.contains(part)).count()
        };
        let named = format!("{}=nonsense", kind.strategy_variable);
        assert_eq!(told(Level::Warning, &named), 1, "{heard:?}");
        assert_eq!(told(Level::Info, "save: 4 KiB"), 2, "{heard:?}");
        assert_eq!(told(Level::Info, "load: 4 KiB"), 2, "{heard:?}");
    }
}
