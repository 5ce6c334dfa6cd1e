//! Reading extents: pages of a segment into memory of the caller, not verified.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::Tier;
use super::verdict::gone;
use crate::block::{PAGE, PartKey};
use crate::error::{Error, ErrorKind, Result};
use crate::io::backend::Backend;
use crate::io::{Class, DmaSlice, Done, File, Operation, Request};
use crate::posix::index::Found;
use crate::posix::reply::{Join, Reply};

impl Tier {
    /// Reads a range of pages of an extent into `pieces`, end to end; not verified. The range may include
    /// the trailer page, which is the last of [`Tier::extent_bytes`]. The memory must stay valid until `done`
    /// has been called or leaked.
    #[allow(clippy::too_many_arguments)]
    pub fn read(
        self: &Arc<Self>,
        key: &PartKey,
        found: &Found,
        range: Range<u64>,
        pieces: Vec<DmaSlice>,
        class: Class,
        expires: Option<Instant>,
        done: Done,
    ) {
        let total: usize = pieces.iter().map(|piece| piece.length).sum();
        if range.end > self.extent_bytes() || range.start + total as u64 != range.end {
            return done(Err(Error::new(
                ErrorKind::Internal,
                format!("a read of {range:?} into {total} bytes does not fit part {key:?}"),
            )));
        }
        let Some(segment) = self.catalog.segment(found.location.segment) else {
            return done(Err(gone(key)));
        };
        let home = &self.savers[usize::from(segment.home)].home;
        let offset = u64::from(found.location.page) * PAGE as u64 + range.start;
        let backend = Arc::clone(&home.backend);
        let submit = move |file: File, reply: Reply<()>| {
            transfer(&backend, Operation::Read, &file, offset, pieces, class, expires, reply);
        };
        let reply = Reply::boxed(done);
        if let Some(file) = self.files.get(found.location.segment) {
            return submit(file, reply);
        }
        let opened = Reply::new(move |file: Result<File>| match file {
            Ok(file) => submit(file, reply),
            Err(error) => reply.send(Err(error)),
        });
        self.files.open(home, found.location.segment, segment.name, opened);
    }
}

/// Moves `pieces`, end to end, from or to `offset`.
#[allow(clippy::too_many_arguments)]
pub(super) fn transfer(
    backend: &Backend,
    operation: Operation,
    file: &File,
    offset: u64,
    pieces: Vec<DmaSlice>,
    class: Class,
    expires: Option<Instant>,
    reply: Reply<()>,
) {
    let request = |offset, memory, done: Done| Request {
        operation,
        file: file.clone(),
        offset,
        memory,
        class,
        expires,
        done,
    };
    if let [memory] = pieces[..] {
        return backend.submit(request(offset, memory, reply.into_done()));
    }
    if pieces.is_empty() {
        return reply.send(Ok(()));
    }
    let join = Join::new(pieces.len(), reply);
    let mut at = offset;
    let requests = pieces.into_iter().map(|memory| {
        let join = Arc::clone(&join);
        let request = request(at, memory, Box::new(move |result| join.ended(result)));
        at += memory.length as u64;
        request
    });
    backend.submit_all(requests.collect());
}
