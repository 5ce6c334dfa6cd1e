//! Open segment files, at most so many: the least recently used ones are closed.
//!
//! Owns descriptors by segment handle. Opening happens on the path pool; reads that arrive meanwhile wait
//! for it together.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::Result;
use crate::io::{Access, File};
use crate::posix::home::Home;
use crate::posix::names::SegmentName;
use crate::posix::reply::Reply;

/// Open segments of a tier. `ulimit -n` is 1024 on many systems and the program has files of its own.
pub const OPEN_MAX: usize = 384;

enum Slot {
    Open { file: File, used: u64 },
    Opening(Vec<Reply<File>>),
}

#[derive(Default)]
struct State {
    slots: HashMap<u32, Slot>,
    uses: u64,
    /// Reads by segment since the last round of reclaim: who is read stays.
    reads: HashMap<u32, u32>,
}

/// Open segment files.
#[derive(Default)]
pub struct OpenFiles {
    state: Mutex<State>,
}

impl OpenFiles {
    /// Keeps a file that was opened elsewhere (a writer's own segment).
    pub fn insert(&self, handle: u32, file: File) {
        let mut state = self.state.lock();
        let waiting = state.put(handle, file.clone());
        let evicted = state.evict();
        drop(state);
        drop(evicted);
        waiting.into_iter().for_each(|reply| reply.send(Ok(file.clone())));
    }

    /// Closes a file, once its last reader is done.
    pub fn remove(&self, handle: u32) {
        let removed = {
            let mut state = self.state.lock();
            match state.slots.get(&handle) {
                Some(Slot::Open { .. }) => state.slots.remove(&handle),
                _ => None,
            }
        };
        drop(removed);
    }

    /// The file if it is open.
    pub fn get(&self, handle: u32) -> Option<File> {
        let mut state = self.state.lock();
        state.uses += 1;
        *state.reads.entry(handle).or_default() += 1;
        let now = state.uses;
        match state.slots.get_mut(&handle) {
            Some(Slot::Open { file, used }) => {
                *used = now;
                Some(file.clone())
            }
            _ => None,
        }
    }

    /// The file, opened if need be.
    pub fn open(
        self: &Arc<Self>,
        home: &Arc<Home>,
        handle: u32,
        name: SegmentName,
        reply: Reply<File>,
    ) {
        if let Some(file) = self.get(handle) {
            return reply.send(Ok(file));
        }
        let mut state = self.state.lock();
        match state.slots.get_mut(&handle) {
            Some(Slot::Opening(waiting)) => return waiting.push(reply),
            Some(Slot::Open { file, .. }) => {
                let file = file.clone();
                drop(state);
                return reply.send(Ok(file));
            }
            None => {
                state.slots.insert(handle, Slot::Opening(vec![reply]));
            }
        }
        drop(state);
        let files = Arc::clone(self);
        let opened = Reply::new(move |opened| files.opened(handle, opened));
        let home = Arc::clone(home);
        let backend = Arc::clone(&home.backend);
        opened.run_on(&backend, move |opened| {
            let path = home.segments.join(name.to_string());
            opened.send(home.backend.files().open(&path, home.open_how(Access::Read)));
        });
    }

    fn opened(&self, handle: u32, opened: Result<File>) {
        let mut state = self.state.lock();
        let waiting = match &opened {
            Ok(file) => state.put(handle, file.clone()),
            Err(_) => match state.slots.remove(&handle) {
                Some(Slot::Opening(waiting)) => waiting,
                _ => Vec::new(),
            },
        };
        let evicted = state.evict();
        drop(state);
        drop(evicted);
        waiting.into_iter().for_each(|reply| reply.send(opened.clone()));
    }

    /// Reads of a segment since this was last asked.
    pub fn take_reads(&self, handle: u32) -> u32 {
        self.state.lock().reads.remove(&handle).unwrap_or(0)
    }

    /// How many are open.
    pub fn count(&self) -> usize {
        self.state.lock().slots.len()
    }

    /// Closes all.
    pub fn clear(&self) {
        let slots = std::mem::take(&mut self.state.lock().slots);
        drop(slots);
    }
}

impl State {
    /// Returns those who waited for the file.
    fn put(&mut self, handle: u32, file: File) -> Vec<Reply<File>> {
        self.uses += 1;
        match self.slots.insert(handle, Slot::Open { file, used: self.uses }) {
            Some(Slot::Opening(waiting)) => waiting,
            _ => Vec::new(),
        }
    }

    /// Takes the least recently used file out where there are too many; closing it is the caller's, without
    /// the lock.
    fn evict(&mut self) -> Option<Slot> {
        if self.slots.len() <= OPEN_MAX {
            return None;
        }
        let open = self.slots.iter().filter_map(|(handle, slot)| match slot {
            Slot::Open { used, .. } => Some((*used, *handle)),
            Slot::Opening(_) => None,
        });
        let (_, handle) = open.min()?;
        self.slots.remove(&handle)
    }
}
