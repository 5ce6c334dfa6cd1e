//! A copy stream: jobs go in as runs of copies, each run ends with an event, and a job is reported when
//! its run's event has happened. A job's memory is held until the device is provably done with it.

use std::collections::VecDeque;
use std::sync::Arc;

use super::accelerator::{Passed, Shared};
use super::driver::{ContextState, Driver, Fault, Progress, Reach, Registration, Stream};
use super::event::PooledEvent;
use super::gate::Captured;
use super::plan::{Piece, pieces_of};
use super::watch::Waker;
use crate::device::{CapturedEvent, CopyJob, CopyStream, Direction, Finished, Marker, Staging};
use crate::error::{Error, ErrorKind, Result};

/// A run of copies is closed after so many bytes, so that jobs are reported while later ones still
/// copy: a third of a millisecond at 50 GB/s.
const RUN_BYTES: u64 = 16 << 20;

/// How a run is known to have ended.
enum End<D: Driver> {
    /// Its event.
    Event(Arc<PooledEvent<D>>),
    /// No event could be recorded: all that the stream holds must end.
    StreamIdle,
}

struct Run<D: Driver> {
    end: End<D>,
    jobs: Vec<(u64, Result<()>)>,
    /// Held until the run has ended.
    descriptors: Option<D::Descriptors>,
}

/// What one driver call copies: jobs of one direction, one kind of memory.
struct Group {
    direction: Direction,
    reach: Reach,
    staging: Registration,
    pieces: Vec<Piece>,
    tickets: Vec<u64>,
    bytes: u64,
}

/// One vendor's copy stream.
pub(super) struct CopyQueue<D: Driver> {
    shared: Arc<Shared<D>>,
    stream: Stream,
    notifier: Stream,
    lane: Option<D::Lane>,
    waker: Arc<Waker>,
    runs: VecDeque<Run<D>>,
    finished: Vec<Finished>,
    /// Tickets of the last enqueue whose bytes will not be there.
    failed: Vec<u64>,
}

impl<D: Driver> CopyQueue<D> {
    pub(super) fn open(shared: Arc<Shared<D>>, waker: Arc<Waker>) -> Result<Self> {
        let driver = shared.driver.clone();
        let _entered = driver.enter().map_err(|fault| fault.error)?;
        let stream = driver.create_stream().map_err(|fault| fault.error)?;
        let notifier = driver.create_stream().map_err(|fault| {
            driver.destroy_stream(stream);
            fault.error
        })?;
        let lane = driver.open_lane().map_err(|fault| {
            driver.destroy_stream(stream);
            driver.destroy_stream(notifier);
            fault.error
        })?;
        Ok(Self {
            shared,
            stream,
            notifier,
            lane: Some(lane),
            waker,
            runs: VecDeque::new(),
            finished: Vec::new(),
            failed: Vec::new(),
        })
    }

    fn report(&mut self, ticket: u64, result: Result<()>, staging: Staging) {
        self.finished.push(Finished { ticket, result, staging });
    }

    /// Reports a job of which nothing was enqueued.
    fn refuse(&mut self, job: &CopyJob<'_>, error: Error) {
        self.failed.push(job.ticket);
        self.report(job.ticket, Err(error), Staging::Free);
    }

    fn refuse_all(&mut self, jobs: &[CopyJob<'_>], error: &Error) {
        jobs.iter().for_each(|job| self.refuse(job, error.clone()));
    }

    /// Enqueues a group's copies; the jobs join `jobs` either way, because some copies may be running.
    ///
    /// # Safety
    /// As [`CopyStream::enqueue`].
    unsafe fn copy(&mut self, group: Group, jobs: &mut Vec<(u64, Result<()>)>) {
        if group.tickets.is_empty() {
            return;
        }
        let Some(lane) = self.lane.as_mut() else { return };
        let Group { direction, reach, staging, pieces, tickets, .. } = group;
        // SAFETY: the caller vouches for the jobs' memory until `poll` reports them.
        let copied = unsafe {
            self.shared.driver.copy(self.stream, lane, direction, &pieces, reach, staging)
        };
        let result = copied.map_err(|fault| fault.error);
        if result.is_err() {
            self.failed.extend(&tickets);
        }
        jobs.extend(tickets.into_iter().map(|ticket| (ticket, result.clone())));
    }

    /// Ends a run: from here on its event says when its jobs are done.
    fn close_run(&mut self, jobs: &mut Vec<(u64, Result<()>)>, marker: &mut Option<Passed<D>>) {
        if jobs.is_empty() {
            return;
        }
        let jobs = std::mem::take(jobs);
        let driver = &self.shared.driver;
        let descriptors = self.lane.as_mut().map(|lane| driver.take_descriptors(lane));
        let recorded =
            self.shared.pool.take().and_then(|event| {
                driver.record(event.event(), self.stream).map(|()| Arc::new(event))
            });
        let event = match recorded {
            Ok(event) => event,
            Err(fault) => {
                self.runs.push_back(Run { end: End::StreamIdle, jobs, descriptors });
                *marker = Some(Passed::Refused(fault.error));
                return;
            }
        };
        if driver.has_host_functions() {
            // What fails here only costs time: the watch wakes the worker too.
            let _ = driver.wait(self.notifier, event.event()).and_then(|()| {
                let data = Arc::as_ptr(&self.waker).cast_mut().cast();
                // SAFETY: `self.waker` lives until drop has drained the notifier, or for ever.
                unsafe { driver.notify(self.notifier, Waker::called_by_driver, data) }
            });
        }
        self.runs.push_back(Run { end: End::Event(event.clone()), jobs, descriptors });
        *marker = Some(Passed::Event(event));
    }

    /// Whether the oldest run has ended; an error means that the device is lost.
    fn front_progress(&self) -> std::result::Result<Progress, Fault> {
        let driver = &self.shared.driver;
        let Some(run) = self.runs.front() else { return Ok(Progress::Pending) };
        if let End::Event(event) = &run.end
            && let Ok(progress) = driver.query_event(event.event())
        {
            return Ok(progress);
        }
        // A failed query says little; an idle stream says that its copies have ended. Two different
        // calls that fail one after the other are a dead context.
        driver.query_stream(self.stream)
    }

    /// Reports everything in flight as failed with the device.
    fn fail_all(&mut self) {
        let Some((error, context)) = self.shared.lost().cloned() else { return };
        let staging = match context {
            ContextState::Destroyed => Staging::Free,
            ContextState::Unknown => Staging::Lost,
        };
        for run in std::mem::take(&mut self.runs) {
            if staging == Staging::Lost {
                std::mem::forget(run.descriptors);
            }
            for (ticket, _) in run.jobs {
                self.report(ticket, Err(error.clone()), staging);
            }
        }
    }

    /// Moves ended runs to `finished`.
    fn advance(&mut self) {
        if self.runs.is_empty() {
            return;
        }
        if self.shared.lost().is_none() {
            let driver = self.shared.driver.clone();
            // Entering may fail for want of memory; twice in a row is a dead context.
            match driver.enter().or_else(|_| driver.enter()) {
                Ok(_entered) => self.advance_entered(),
                Err(fault) => {
                    self.shared.lose(fault);
                }
            };
        }
        self.fail_all();
        self.waker.set_in_flight(self.runs.len());
    }

    fn advance_entered(&mut self) {
        while !self.runs.is_empty() {
            match self.front_progress() {
                Ok(Progress::Pending) => return,
                Ok(Progress::Done) => {
                    let Some(run) = self.runs.pop_front() else { return };
                    for (ticket, result) in run.jobs {
                        self.report(ticket, result, Staging::Free);
                    }
                }
                Err(fault) => {
                    self.shared.lose(fault);
                    return;
                }
            }
        }
    }

    /// Makes the stream wait for a captured event.
    fn gate(&self, wait: &CapturedEvent) -> Result<()> {
        let captured = wait.downcast_ref::<Captured<D>>().ok_or_else(|| {
            Error::new(ErrorKind::Internal, "an event of another device; a defect in UCM")
        })?;
        match &captured.event {
            None => Ok(()),
            Some(event) => {
                self.shared.driver.wait(self.stream, event.event()).map_err(|fault| fault.error)
            }
        }
    }

    /// Adds a job to the group, or starts a new one where they cannot be copied together.
    ///
    /// # Safety
    /// As [`CopyStream::enqueue`].
    unsafe fn add(
        &mut self,
        job: &CopyJob<'_>,
        group: &mut Option<Group>,
        jobs: &mut Vec<(u64, Result<()>)>,
    ) {
        let mut pieces = Vec::new();
        let addresses = job.addresses.iter().map(|address| *address as usize);
        pieces_of(addresses, job.slices, job.staging as usize, &mut pieces);
        let bytes: u64 = job.slices.iter().map(crate::block::SliceShape::bytes).sum();
        let Some(lane) = &self.lane else { return };
        let reach = match self.shared.driver.check(lane, &pieces) {
            Ok(reach) => reach,
            Err(error) => return self.refuse(job, error),
        };
        let staging = self.shared.registration(job.staging as usize, bytes as usize);
        let fits = group.as_ref().is_some_and(|group| {
            group.direction == job.direction && group.reach == reach && group.staging == staging
        });
        if !fits && let Some(full) = group.take() {
            // SAFETY: as of this function.
            unsafe { self.copy(full, jobs) };
        }
        let group = group.get_or_insert_with(|| Group {
            direction: job.direction,
            reach,
            staging,
            pieces: Vec::new(),
            tickets: Vec::new(),
            bytes: 0,
        });
        group.pieces.append(&mut pieces);
        group.tickets.push(job.ticket);
        group.bytes += bytes;
    }
}

impl<D: Driver> CopyStream for CopyQueue<D> {
    unsafe fn enqueue(&mut self, jobs: &[CopyJob<'_>]) -> Option<Marker> {
        self.failed.clear();
        if jobs.is_empty() {
            return None;
        }
        if let Some((error, _)) = self.shared.lost() {
            let error = error.clone();
            self.refuse_all(jobs, &error);
            return None;
        }
        let driver = self.shared.driver.clone();
        let _entered = match driver.enter() {
            Ok(entered) => entered,
            Err(fault) => {
                let error = match fault.context {
                    ContextState::Destroyed => self.shared.lose(fault).0.clone(),
                    ContextState::Unknown => fault.error,
                };
                self.refuse_all(jobs, &error);
                return None;
            }
        };
        let (mut group, mut open, mut marker) = (None::<Group>, Vec::new(), None);
        let mut waited: Option<&CapturedEvent> = None;
        for job in jobs {
            if let Some(wait) = job.wait
                && !waited.is_some_and(|waited| Arc::ptr_eq(waited, wait))
            {
                if let Some(full) = group.take() {
                    // SAFETY: the caller vouches for the jobs' memory.
                    unsafe { self.copy(full, &mut open) };
                }
                if let Err(error) = self.gate(wait) {
                    self.refuse(job, error);
                    continue;
                }
                waited = Some(wait);
            }
            // SAFETY: as above.
            unsafe { self.add(job, &mut group, &mut open) };
            if group.as_ref().is_some_and(|group| group.bytes >= RUN_BYTES)
                && let Some(full) = group.take()
            {
                // SAFETY: as above.
                unsafe { self.copy(full, &mut open) };
                self.close_run(&mut open, &mut marker);
            }
        }
        if let Some(full) = group.take() {
            // SAFETY: as above.
            unsafe { self.copy(full, &mut open) };
        }
        self.close_run(&mut open, &mut marker);
        self.waker.set_in_flight(self.runs.len());
        if !self.runs.is_empty() {
            self.shared.watch.stir();
        }
        if !self.finished.is_empty() {
            self.waker.wake();
        }
        marker.map(|passed| Arc::new(passed) as Marker)
    }

    fn failed(&self) -> &[u64] {
        &self.failed
    }

    fn poll(&mut self, finished: &mut Vec<Finished>) {
        self.advance();
        finished.append(&mut self.finished);
    }
}

impl<D: Driver> Drop for CopyQueue<D> {
    fn drop(&mut self) {
        let driver = self.shared.driver.clone();
        let drained = self.shared.lost().is_none()
            && driver.enter().is_ok_and(|_entered| {
                let drained = driver.synchronize(self.stream).is_ok()
                    && driver.synchronize(self.notifier).is_ok();
                if drained {
                    driver.destroy_stream(self.stream);
                    driver.destroy_stream(self.notifier);
                    if let Some(lane) = self.lane.take() {
                        driver.close_lane(lane);
                    }
                }
                drained
            });
        if !drained {
            // The driver may still call the waker, and copies may still use the lane.
            std::mem::forget(self.waker.clone());
            std::mem::forget(self.lane.take());
            std::mem::forget(std::mem::take(&mut self.runs));
        }
    }
}
