//! The engine of a simulated disk: holds operations for a while, and ends them out of order.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::SimDisk;
use super::content::Open;
use super::faults::{Call, Dice, Fate};
use crate::error::Result;
use crate::io::engine::{Ended, Io, Op, Patience, Registration, Token, Wake};
use crate::io::{DmaSlice, Operation};

/// An engine on a [`SimDisk`].
pub(super) struct SimIo {
    disk: Arc<SimDisk>,
    depth: u32,
    held: Vec<Held>,
    bell: Arc<Bell>,
    dice: Dice,
    waits: u64,
}

/// An operation that has begun and not ended.
struct Held {
    token: Token,
    operation: Operation,
    raw: i32,
    open: std::result::Result<Open, i32>,
    offset: u64,
    memory: DmaSlice,
    errno: Option<i32>,
    dice: Dice,
    due: Instant,
}

#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    ringing: Condvar,
}

impl Wake for Bell {
    fn wake(&self) {
        *self.rung.lock() = true;
        self.ringing.notify_one();
    }
}

impl SimIo {
    pub(super) fn new(disk: Arc<SimDisk>, depth: u32) -> Self {
        let dice = Dice::new(disk.state.lock().config.seed);
        Self { disk, depth: depth.max(1), held: Vec::new(), bell: Arc::default(), dice, waits: 0 }
    }

    /// Ends a random choice of what is due.
    fn end_due(&mut self, ended: &mut Vec<Ended>) {
        let now = Instant::now();
        let mut due: Vec<usize> =
            (0..self.held.len()).filter(|&index| self.held[index].due <= now).collect();
        let keep = if due.len() > 1 { self.dice.roll(due.len() as u64) as usize } else { 0 };
        for _ in 0..keep {
            let spared = self.dice.roll(due.len() as u64) as usize;
            due.swap_remove(spared);
        }
        due.sort_unstable();
        let mut ending: Vec<Held> =
            due.into_iter().rev().map(|index| self.held.swap_remove(index)).collect();
        while !ending.is_empty() {
            let next = self.dice.roll(ending.len() as u64) as usize;
            ended.push(self.end(ending.swap_remove(next)));
        }
    }

    fn end(&self, held: Held) -> Ended {
        let mut state = self.disk.state.lock();
        // The file must still be open: whoever began the operation owns it until this moment.
        assert!(
            held.open.is_err() || state.content.opened(held.raw).is_ok(),
            "a file was closed under an operation in flight"
        );
        let outcome = held.open.and_then(|open| {
            // SAFETY: the contract of `Io::push`: the memory is valid until the end is handed out.
            unsafe {
                state.transfer(
                    held.operation,
                    open,
                    held.offset,
                    held.memory,
                    held.errno,
                    held.dice,
                )
            }
        });
        let result = outcome.map_or_else(|errno| -errno, |moved| moved as i32);
        Ended { token: held.token, result }
    }
}

impl Io for SimIo {
    fn name(&self) -> &'static str {
        "sim"
    }

    fn depth(&self) -> u32 {
        self.depth
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.bell) as Arc<dyn Wake>
    }

    fn push(&mut self, op: &Op<'_>) {
        assert!(self.held.len() < self.depth as usize, "more was pushed than the depth allows");
        let call = if op.operation == Operation::Read { Call::Read } else { Call::Write };
        let bytes = op.offset..op.offset + op.memory.length as u64;
        let mut state = self.disk.state.lock();
        let Fate { errno, delay, mut dice } = state.fates.decide(call, op.file.path(), bytes);
        let delay_max = state.config.delay_max.as_nanos() as u64;
        let delay = delay + Duration::from_nanos(dice.roll(delay_max + 1));
        self.held.push(Held {
            token: op.token,
            operation: op.operation,
            raw: op.file.raw(),
            open: state.content.opened(op.file.raw()),
            offset: op.offset,
            memory: op.memory,
            errno,
            dice,
            due: Instant::now() + delay,
        });
    }

    fn wait(&mut self, patience: Patience, ended: &mut Vec<Ended>) -> Result<()> {
        self.waits += 1;
        let before = ended.len();
        loop {
            self.end_due(ended);
            let mut rung = self.bell.rung.lock();
            let now = Instant::now();
            let late = patience.until.is_some_and(|until| until <= now);
            let enough = patience.at_least == 0 || ended.len() > before;
            if std::mem::take(&mut *rung) || late || enough {
                return Ok(());
            }
            let next = self.held.iter().map(|held| held.due).min();
            match next.into_iter().chain(patience.until).min() {
                Some(until) => drop(self.bell.ringing.wait_until(&mut rung, until)),
                None => self.bell.ringing.wait(&mut rung),
            }
        }
    }

    fn register_memory(&mut self, _memory: DmaSlice) -> Registration {
        Registration::NotUsed
    }

    fn system_calls(&self) -> u64 {
        self.waits
    }
}
