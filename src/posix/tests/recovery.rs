//! Writers that die: what they published stays, what they held beyond is given back, once.

use std::sync::Arc;
use std::sync::mpsc;

use super::world::*;
use crate::posix::{Recovered, Scope, Tail, Tier};

/// A tier whose process seems dead to others, and which never closes.
fn doomed(directory: &std::path::Path) -> Arc<Tier> {
    let scope = Scope { parts: 0..1, tail: Tail::Own };
    let backends = vec![backend(directory)];
    Tier::open_as(dead_process(), &namespace(1), scope, backends, config(), deadline()).unwrap()
}

/// Goal: after a death everything published is served, segments end where publishing ended, and empty ones
/// are gone; doing it again does nothing.
#[test]
fn the_dead_keep_what_they_published_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let writer = doomed(dir.path());
    let keys: Vec<_> = (0..20).map(|number| key(number, 0)).collect();
    save_many(&writer, &keys).into_iter().for_each(|saved| saved.unwrap());
    std::mem::forget(writer);
    let heir = open(dir.path());
    // Opening has begun to recover already; whoever does the rest, it is done after this.
    recover(&heir);
    assert_eq!(recover(&heir), Recovered::default());
    assert_eq!(files_with(dir.path(), ".fenced").len(), 1);
    let segments = files_with(dir.path(), ".g0");
    assert_eq!(segments.len(), 1, "{segments:?}");
    let bytes = std::fs::metadata(&segments[0]).unwrap().len();
    assert_eq!(bytes, 4096 + 20 * heir.extent_bytes());
    refresh(&heir);
    for key in &keys {
        assert_eq!(load(&heir, key).unwrap(), expected(key));
    }
    assert_eq!(heir.stats().live_writers, 0);
}

/// Goal: a dead writer that published nothing leaves nothing behind, and neither do half-removed files.
#[test]
fn the_dead_who_published_nothing_vanish() {
    let dir = tempfile::tempdir().unwrap();
    let writer = doomed(dir.path());
    let (sender, receiver) = mpsc::channel();
    let done = Box::new(move |extent: crate::error::Result<_>| sender.send(extent).unwrap());
    writer.reserve(&key(1, 0), None, done);
    std::mem::forget(receiver.recv().unwrap().unwrap());
    std::mem::forget(writer);
    assert!(!files_with(dir.path(), ".g0").is_empty());
    let folder = files_with(dir.path(), "namespace.json").remove(0).parent().unwrap().to_path_buf();
    std::fs::write(folder.join("segments/00000000000000ff-0.g0.dead-0000000000000001"), b"x")
        .unwrap();
    let heir = open(dir.path());
    recover(&heir);
    recover(&heir);
    let left = files_with(dir.path(), "");
    assert_eq!(left, [folder.join("namespace.json")]);
}

/// Goal: a writer that lives is left alone, however many others open and recover meanwhile.
#[test]
fn the_living_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let writer = open(dir.path());
    save(&writer, key(1, 0)).unwrap();
    let others: Vec<_> = (0..3).map(|_| open(dir.path())).collect();
    others.iter().for_each(|tier| assert_eq!(recover(tier).fenced, 0));
    save(&writer, key(2, 0)).unwrap();
    refresh(&others[0]);
    assert_eq!(load(&others[0], &key(2, 0)).unwrap(), expected(&key(2, 0)));
}

/// Goal: a writer that others took for dead notices before it acknowledges, and goes on as a new one.
#[test]
fn a_paused_writer_becomes_a_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let short =
        crate::posix::TierConfig { lease: std::time::Duration::from_millis(40), ..config() };
    let scope = Scope { parts: 0..1, tail: Tail::Own };
    let backends = vec![backend(dir.path())];
    let writer =
        Tier::open_as(dead_process(), &namespace(1), scope, backends, short, deadline()).unwrap();
    save(&writer, key(1, 0)).unwrap();
    // It is fenced while it sleeps, and notices by its heartbeat, or by how long it slept.
    let heir = open(dir.path());
    recover(&heir);
    let mut failures = 0;
    loop {
        std::thread::sleep(std::time::Duration::from_millis(200));
        match save(&writer, key(2, 0)) {
            Ok(()) => break,
            Err(error) => {
                failures += 1;
                assert!(failures < 10, "{error}");
            }
        }
    }
    refresh(&heir);
    for number in [1, 2] {
        assert_eq!(load(&heir, &key(number, 0)).unwrap(), expected(&key(number, 0)));
    }
    assert!(!files_with(dir.path(), ".fenced").is_empty());
}
