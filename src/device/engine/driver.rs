//! The calls that a vendor's driver offers, in one shape. Knows no job and no task.

use std::ffi::c_void;
use std::sync::Arc;

use super::plan::Piece;
use crate::device::{DeviceStaging, Direction};
use crate::error::{Error, ErrorKind};

/// A stream of the device's runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::device) struct Stream(pub(in crate::device) *mut c_void);

// SAFETY: both runtimes allow any thread to use a stream handle.
unsafe impl Send for Stream {}
// SAFETY: as above; concurrent calls are ordered by the runtime.
unsafe impl Sync for Stream {}

/// An event of the device's runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::device) struct Event(pub(in crate::device) *mut c_void);

// SAFETY: both runtimes allow any thread to use an event handle.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

/// Whether work has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::device) enum Progress {
    /// All of it.
    Done,
    /// Not yet.
    Pending,
}

/// What a failed call says of the context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::device) enum ContextState {
    /// Nothing: it may live or be broken.
    Unknown,
    /// It was destroyed, and all its work ended before that.
    Destroyed,
}

/// A call that failed.
#[derive(Clone, Debug)]
pub(in crate::device) struct Fault {
    /// What to tell.
    pub(in crate::device) error: Error,
    /// What it means for the rest.
    pub(in crate::device) context: ContextState,
}

impl Fault {
    /// A stream that a graph is being captured from was to wait for what happens now.
    pub(in crate::device) fn capturing() -> Self {
        let text = "the stream is being captured into a graph, which cannot wait for copies of this \
                    moment; wait before the capture begins, or outside the graph";
        let error = Error::new(ErrorKind::InvalidArgument, text);
        Self { error, context: ContextState::Unknown }
    }
}

/// Called by the driver on a thread of its own.
pub(in crate::device) type HostFunction = unsafe extern "C" fn(*mut c_void);

/// Staging memory as the device knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::device) enum Registration {
    /// Not registered: copies go through memory of the driver or of ours.
    Pageable,
    /// Registered: the device reaches it, at `device - host` from its host address.
    Pinned {
        /// What to add to a host address to get the device's address of it (wrapping).
        offset: usize,
    },
    /// Memory of the device itself.
    OnDevice,
}

/// One vendor's calls. Methods other than `enter` are called between `enter` and the drop of its guard.
pub(in crate::device) trait Driver: Send + Sync + Sized + 'static {
    /// `cuda`, `ascend`.
    const KIND: &'static str;
    /// What a copy stream owns besides its streams.
    type Lane: Send;
    /// What the driver may read until the copies that it describes have ended.
    type Descriptors: Send;
    /// Keeps the device's context current on this thread.
    type Entered<'a>;

    fn enter(&self) -> Result<Self::Entered<'_>, Fault>;

    fn create_stream(&self) -> Result<Stream, Fault>;
    fn destroy_stream(&self, stream: Stream);
    fn query_stream(&self, stream: Stream) -> Result<Progress, Fault>;
    /// Blocks until the stream's work has ended.
    fn synchronize(&self, stream: Stream) -> Result<(), Fault>;

    fn create_event(&self) -> Result<Event, Fault>;
    fn destroy_event(&self, event: Event);
    fn record(&self, event: Event, stream: Stream) -> Result<(), Fault>;
    /// The stream's later work waits for the event's last recording until now, whatever is recorded later.
    fn wait(&self, stream: Stream, event: Event) -> Result<(), Fault>;
    fn query_event(&self, event: Event) -> Result<Progress, Fault>;
    /// Refuses a caller's stream that cannot wait for events of other streams now.
    fn check_waitable(&self, _stream: Stream) -> Result<(), Fault> {
        Ok(())
    }

    /// Whether `notify` exists.
    fn has_host_functions(&self) -> bool;
    /// Calls `function(data)` when the stream's work so far has ended without error.
    ///
    /// # Safety
    /// `data` is what `function` expects until the call has been made or the stream is destroyed.
    unsafe fn notify(
        &self,
        stream: Stream,
        function: HostFunction,
        data: *mut c_void,
    ) -> Result<(), Fault>;

    /// Pins host memory for the device.
    ///
    /// # Safety
    /// The range is mapped until `unregister` returns.
    unsafe fn register(&self, base: *mut u8, length: usize) -> Result<Registration, Fault>;
    fn unregister(&self, base: *mut u8) -> Result<(), Fault>;

    /// Allocates staging memory on the device.
    fn staging(self: &Arc<Self>, _bytes: usize) -> Result<Arc<dyn DeviceStaging>, Error> {
        let text = format!("device: {} has no memory that a drive could reach", Self::KIND);
        Err(Error::new(ErrorKind::Unsupported, text))
    }

    fn open_lane(&self) -> Result<Self::Lane, Fault>;
    fn close_lane(&self, lane: Self::Lane);

    /// Takes what the copies enqueued since the last call still need.
    fn take_descriptors(&self, lane: &mut Self::Lane) -> Self::Descriptors;

    /// Whether the pieces can be copied at all; an error names what is wrong with an address.
    fn check(&self, lane: &Self::Lane, pieces: &[Piece]) -> Result<Reach, Error>;

    /// Enqueues the copies. After an error some of them may be on the stream.
    ///
    /// # Safety
    /// The pieces' memory is valid, and stays so, until the stream has passed these copies.
    unsafe fn copy(
        &self,
        stream: Stream,
        lane: &mut Self::Lane,
        direction: Direction,
        pieces: &[Piece],
        reach: Reach,
        staging: Registration,
    ) -> Result<(), Fault>;
}

/// What kind of memory a job's addresses name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::device) enum Reach {
    /// Memory of the device: engines and kernels reach it.
    Device,
    /// Plain host memory, or another device's: only the driver's general copy takes it.
    Host,
}
