//! Cleaning up after writers that died: their manifests are fenced, the unpublished ends of their segments
//! given back, and what holds nothing is removed.
//!
//! Knows who is dead and what of theirs counts; changes no byte in anybody's files. Every step is a rename
//! that one process wins, so any number of processes may recover at once, and die while doing so.

#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::block::PAGE;
use crate::error::{ErrorKind, Result};
use crate::io::{Access, Files};
use crate::posix::catalog::Catalog;
use crate::posix::home::Home;
use crate::posix::host::{Life, life_of, random_id};
use crate::posix::names::{Fence, ManifestName, SegmentName, dead_name, is_dead_name};
use crate::posix::refresh::{Known, Refresher};
use crate::posix::tail::{Growth, with_slack};

/// What a recovery did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Manifests of dead writers that were fenced.
    pub fenced: u64,
    /// Segments that were cut to what was published.
    pub trimmed: u64,
    /// Files that held nothing and were removed.
    pub removed: u64,
}

impl Recovered {
    /// Adds another home's.
    pub fn add(&mut self, other: &Self) {
        self.fenced += other.fenced;
        self.trimmed += other.trimmed;
        self.removed += other.removed;
    }
}

/// Recovers one home.
pub struct Recovery<'a> {
    home: &'a Arc<Home>,
    catalog: &'a Catalog,
    refresher: &'a Refresher,
    /// Under which dead names this process removes files.
    by: u64,
    done: Recovered,
}

/// Cleans up in a home, after a refresh. Blocks; on a path pool only.
pub fn recover(home: &Arc<Home>, catalog: &Catalog, refresher: &Refresher) -> Result<Recovered> {
    let mut recovery =
        Recovery { home, catalog, refresher, by: random_id(), done: Recovered::default() };
    recovery.sweep(&home.manifests)?;
    recovery.sweep(&home.segments)?;
    recovery.fence_the_dead()?;
    recovery.clean_the_final()?;
    Ok(recovery.done)
}

/// Whether the writer of a manifest that can grow is dead. `lease` is this store's, for manifests whose
/// writer died before it had written its own.
pub fn is_dead(home: &Home, known: &Known, lease: Duration) -> bool {
    let expired = |lease: Duration| known.unchanged > with_slack(lease);
    match &known.header {
        None => expired(lease),
        Some(header) => match life_of(&home.layout.process, &header.process) {
            Life::Dead => true,
            Life::Alive => false,
            Life::Unknown => expired(Duration::from_millis(header.lease_ms)),
        },
    }
}

/// Removes a file so that its space comes back even where somebody has it open, and so that only one process
/// does. `NotFound`: another one was faster.
pub fn remove(files: &dyn Files, folder: &Path, name: &str, by: u64, home: &Home) -> Result<()> {
    let dead = folder.join(dead_name(name, by));
    files.rename(&folder.join(name), &dead)?;
    bury(files, &dead, home)
}

/// Truncates first: on NFS an unlinked file that is open somewhere still holds its space.
fn bury(files: &dyn Files, path: &Path, home: &Home) -> Result<()> {
    let file = files.open(path, home.open_how(Access::ReadWrite))?;
    files.truncate(&file, 0)?;
    files.unlink(path)
}

impl Recovery<'_> {
    fn files(&self) -> &dyn Files {
        &**self.home.backend.files()
    }

    /// Finishes what others began to remove.
    fn sweep(&mut self, folder: &Path) -> Result<()> {
        for name in names(&self.files().list(folder)?) {
            if is_dead_name(name) && bury(self.files(), &folder.join(name), self.home).is_ok() {
                self.done.removed += 1;
            }
        }
        Ok(())
    }

    /// From its new name on a manifest is final: a writer that was only paused finds its name gone.
    fn fence_the_dead(&mut self) -> Result<()> {
        let lease = self.home.layout.config.lease;
        for known in self.refresher.known(self.home.number) {
            let is_dead = |known: &Known| {
                let open = known.growth == Growth::Live && known.name.fence == Fence::Open;
                open && is_dead(self.home, known, lease)
            };
            // What is known may be old: a writer that was paused when it was last read may work by now.
            if !is_dead(&known) || !self.look_again(&known.name).is_some_and(|now| is_dead(&now)) {
                continue;
            }
            let fenced = ManifestName { fence: Fence::Fenced, ..known.name };
            let from = self.home.manifests.join(known.name.to_string());
            let to = self.home.manifests.join(fenced.to_string());
            match self.files().rename(&from, &to) {
                Ok(()) => {
                    self.done.fenced += 1;
                    // One that cannot be read keeps what it has; the others' turn comes all the same.
                    if let Err(error) = self.refresher.renamed(self.home.number, fenced) {
                        crate::log::warning(format_args!(
                            "a fenced manifest cannot be read: {error}"
                        ));
                    }
                }
                // Somebody else was faster; the next refresh tells.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads a manifest again.
    fn look_again(&self, name: &ManifestName) -> Option<Known> {
        self.refresher.poll_writer(self.home.number, name.writer).ok()?;
        let known = self.refresher.known(self.home.number);
        known.into_iter().find(|known| known.name == *name)
    }

    /// Gives back what the writers of final manifests hold and nobody can find.
    fn clean_the_final(&mut self) -> Result<()> {
        let known = self.refresher.known(self.home.number);
        // What could not be read in full may have published more than is known: hands off.
        let complete = |known: &Known| known.growth == Growth::Final && known.bad_records == 0;
        let mut kept: HashSet<u64> =
            known.iter().filter(|known| !complete(known)).map(|known| known.name.writer).collect();
        let listed = self.files().list(&self.home.segments)?;
        let mut segments: HashMap<u64, Vec<SegmentName>> = HashMap::new();
        for segment in names(&listed).filter_map(SegmentName::parse) {
            segments.entry(segment.writer).or_default().push(segment);
        }
        // A manifest is there before the first segment: without its header it has lost what it said.
        let mute = known.iter().filter(|known| known.header.is_none()).map(|k| k.name.writer);
        kept.extend(mute.filter(|writer| segments.contains_key(writer)));
        let ended: HashSet<u64> = known
            .iter()
            .map(|known| known.name.writer)
            .filter(|writer| !kept.contains(writer))
            .collect();
        for writer in &ended {
            let Some(own) = segments.remove(writer) else { continue };
            let mut left = Vec::new();
            for segment in own {
                if self.clean_segment(segment)? {
                    left.push(segment);
                }
            }
            if !left.is_empty() {
                segments.insert(*writer, left);
            }
        }
        for known in known.iter().filter(|known| ended.contains(&known.name.writer)) {
            if !segments.contains_key(&known.name.writer) && !self.is_needed(known, &segments) {
                self.remove_manifest(known)?;
            }
        }
        Ok(())
    }

    /// Whether a manifest without segments still has something to say: that an extent of somebody else's
    /// segment is bad, or, to those who read it at every refresh only, that a block will not come.
    fn is_needed(&self, known: &Known, segments: &HashMap<u64, Vec<SegmentName>>) -> bool {
        let dropped = known.says.dropped.iter().any(|writer| segments.contains_key(writer));
        dropped || (known.says.abandoned && known.ended < self.grace())
    }

    /// After this time nobody reads what was retired before, and everybody has read what was written.
    fn grace(&self) -> Duration {
        let config = &self.home.layout.config;
        config.lookup_refresh + config.timeout
    }

    /// Cuts a segment to what was published, or removes it where nothing was. Whether it is left.
    fn clean_segment(&mut self, name: SegmentName) -> Result<bool> {
        let handle = self.catalog.intern(self.home.number, name);
        let segment = self.catalog.segment(handle);
        let end = segment.map_or(0, |segment| segment.end_page);
        let grace = self.grace();
        // Retired, but whoever did it did not live to remove it.
        if end == 0 || segment.is_some_and(|segment| segment.is_retired_for(grace)) {
            let removed =
                remove(self.files(), &self.home.segments, &name.to_string(), self.by, self.home);
            return gone_or(removed).map(|()| {
                self.done.removed += 1;
                false
            });
        }
        let path = self.home.segments.join(name.to_string());
        let bytes = u64::from(end) * PAGE as u64;
        let trimmed = self.files().metadata(&path).and_then(|metadata| {
            if metadata.length <= bytes {
                return Ok(0);
            }
            let file = self.files().open(&path, self.home.open_how(Access::ReadWrite))?;
            self.files().truncate(&file, bytes).map(|()| 1)
        });
        match trimmed {
            Ok(count) => {
                self.done.trimmed += count;
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A final manifest without segments says nothing any more. One that carries RETIRE records of others'
    /// segments has served: those segments are gone, or found again until somebody else retires them.
    fn remove_manifest(&mut self, known: &Known) -> Result<()> {
        let name = known.name.to_string();
        let removed = remove(self.files(), &self.home.manifests, &name, self.by, self.home);
        gone_or(removed).map(|()| self.done.removed += 1)
    }
}

/// Being too late is as good as having done it.
fn gone_or(result: Result<()>) -> Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn names(listed: &[OsString]) -> impl Iterator<Item = &str> {
    listed.iter().filter_map(|name| name.to_str())
}
