//! What CUDA and Ascend have in common: streams, events, and copies that are learned of without
//! spinning. Generic over a [`Driver`], which is a vendor's calls and nothing else.
//!
//! Completion: each run of copies ends with an event on the copy stream; a second stream waits for that
//! event and runs a host function that wakes the copy worker, so that the copy stream never stalls for
//! the host. The worker then queries events. Drivers skip host functions once a context has failed, and
//! some have none, so a watch thread wakes workers with copies in flight at a slow beat as well.

mod accelerator;
mod calibration;
mod driver;
mod event;
mod gate;
mod plan;
mod queue;
mod watch;

pub(super) use accelerator::Accelerator;
pub(super) use calibration::{Choices, PATTERN_BYTES, Pattern, Strategy, StrategySet, cost};
pub(super) use driver::{
    ContextState, Driver, Event, Fault, HostFunction, Progress, Reach, Registration, Stream,
};
pub(super) use plan::Piece;
