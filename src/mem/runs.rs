//! The runs of caller memory that bytes of a part lie in, in the order of the bytes.
//!
//! A cursor: it moves on as bytes are copied. Knows shapes and addresses; who may touch the memory, and when, is
//! said by those who made it.

use super::stream;
use crate::block::SliceShape;

/// Bytes of memory one behind the other, in the order of the part.
enum Stretch<'a> {
    /// Bytes of the part that have no place here.
    Gap(usize),
    /// A tensor slice and its base address.
    Slice(*mut u8, &'a SliceShape),
}

/// See the head of this file. Behind its end, and where it has a gap, bytes go nowhere.
#[derive(Default)]
pub struct Runs<'a> {
    stretches: Vec<Stretch<'a>>,
    /// Bytes of all stretches.
    bytes: usize,
    /// The stretch where it stands; which of its runs, by dimension; the byte of the run.
    now: usize,
    counters: Vec<u64>,
    at: usize,
}

/// A run, or the rest of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where it is; null where its bytes go nowhere.
    pub memory: *mut u8,
    /// Bytes of it.
    pub length: usize,
}

impl<'a> Runs<'a> {
    /// Bytes that go nowhere.
    pub fn nowhere() -> Self {
        Self::default()
    }

    /// Adds a slice at the end.
    pub fn push_slice(&mut self, memory: *mut u8, shape: &'a SliceShape) {
        self.bytes += shape.bytes() as usize;
        self.stretches.push(Stretch::Slice(memory, shape));
        if self.stretches.len() == 1 {
            self.enter();
        }
    }

    /// Adds bytes that go nowhere.
    pub fn push_gap(&mut self, bytes: usize) {
        self.bytes += bytes;
        self.stretches.push(Stretch::Gap(bytes));
    }

    /// Bytes of all that was pushed.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether so much is copied, and in runs so long, that it should not go through the caches.
    pub fn is_streamed(&self) -> bool {
        self.bytes >= stream::TOGETHER_MIN && self.run_bytes() >= stream::RUN_MIN
    }

    /// Bytes of the run where it stands, from its beginning to its end.
    pub fn run_bytes(&self) -> usize {
        match self.stretches.get(self.now) {
            Some(Stretch::Slice(_, shape)) => shape.run_bytes as usize,
            Some(Stretch::Gap(bytes)) => *bytes,
            None => usize::MAX,
        }
    }

    /// The run where it stands, `limit` bytes of it at most; moves on behind them.
    pub fn next(&mut self, limit: usize) -> Run {
        let run_bytes = self.run_bytes();
        let length = limit.min(run_bytes - self.at);
        let memory = match self.stretches.get(self.now) {
            Some(Stretch::Slice(memory, shape)) => {
                let offsets = self.counters.iter().zip(&shape.dimensions);
                let offset: u64 = offsets.map(|(index, (_, stride))| index * stride).sum();
                memory.wrapping_add(offset as usize + self.at)
            }
            Some(Stretch::Gap(_)) => std::ptr::null_mut(),
            None => return Run { memory: std::ptr::null_mut(), length: limit },
        };
        self.at += length;
        if self.at == run_bytes {
            self.at = 0;
            self.leave_run();
        }
        Run { memory, length }
    }

    /// Copies the next `length` bytes of the part, which lie at `staging`, to where they go.
    ///
    /// # Safety
    /// `staging` is valid for reading so many bytes and the runs for writing them; they do not overlap.
    pub unsafe fn scatter(&mut self, staging: *const u8, length: usize) {
        let mut at = 0;
        while at < length {
            let streamed = self.is_streamed();
            let run = self.next(length - at);
            if !run.memory.is_null() {
                // SAFETY: `at + run.length` is at most `length`; the rest is the caller's promise.
                unsafe { copy(staging.add(at), run.memory, run.length, streamed) };
            }
            at += run.length;
        }
    }

    /// Copies the next `length` bytes of the part from where they are to `staging`.
    ///
    /// # Safety
    /// `staging` is valid for writing so many bytes and the runs for reading them; they do not overlap.
    pub unsafe fn gather(&mut self, staging: *mut u8, length: usize) {
        let mut at = 0;
        while at < length {
            let streamed = self.is_streamed();
            let run = self.next(length - at);
            if !run.memory.is_null() {
                // SAFETY: `at + run.length` is at most `length`; the rest is the caller's promise.
                unsafe { copy(run.memory, staging.add(at), run.length, streamed) };
            }
            at += run.length;
        }
    }

    fn enter(&mut self) {
        self.counters.clear();
        if let Some(Stretch::Slice(_, shape)) = self.stretches.get(self.now) {
            self.counters.resize(shape.dimensions.len(), 0);
        }
    }

    /// Goes to the next run: like an odometer, the last dimension fastest.
    fn leave_run(&mut self) {
        if let Some(Stretch::Slice(_, shape)) = self.stretches.get(self.now) {
            for (counter, (count, _)) in self.counters.iter_mut().zip(&shape.dimensions).rev() {
                *counter += 1;
                if *counter < *count {
                    return;
                }
                *counter = 0;
            }
        }
        self.now += 1;
        self.enter();
    }
}

/// # Safety
/// As for `ptr::copy_nonoverlapping`.
unsafe fn copy(source: *const u8, to: *mut u8, length: usize, streamed: bool) {
    // SAFETY: the caller's promise.
    unsafe {
        match streamed {
            true => stream::copy(source, to, length),
            false => std::ptr::copy_nonoverlapping(source, to, length),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shapes() -> impl Strategy<Value = SliceShape> {
        let dimensions = proptest::collection::vec((1..4_u64, 0..3_u64), 0..3);
        (1..3000_u64, dimensions).prop_map(|(run_bytes, dimensions)| {
            let mut shape = SliceShape::contiguous(run_bytes);
            for (count, apart) in dimensions.into_iter().rev() {
                let stride = shape.span() + apart;
                shape.dimensions.insert(0, (count, stride));
            }
            shape
        })
    }

    /// Every byte of a shape, as offsets from its base.
    fn offsets(shape: &SliceShape) -> Vec<usize> {
        let mut runs = vec![0];
        for (count, stride) in &shape.dimensions {
            let inner = |run: usize| (0..*count).map(move |i| run + (i * stride) as usize);
            runs = runs.into_iter().flat_map(inner).collect();
        }
        let bytes = |run: usize| (0..shape.run_bytes as usize).map(move |byte| run + byte);
        runs.into_iter().flat_map(bytes).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 200 }))]

        /// Goal: in steps of any length, bytes go to and come from where a naive walk over the shapes says.
        #[test]
        fn runs_lie_where_the_shapes_say(
            shapes in proptest::collection::vec((shapes(), any::<bool>()), 1..5),
            steps in proptest::collection::vec(1..5000_usize, 1..20),
        ) {
            let spans: usize = shapes.iter().map(|(shape, _)| shape.span() as usize).sum();
            let mut memory = vec![0_u8; spans];
            let mut expected = memory.clone();
            let total: usize = shapes.iter().map(|(shape, _)| shape.bytes() as usize).sum();
            let staging: Vec<u8> = (0..total as u32).map(|i| ((i * 31) >> 3) as u8 | 1).collect();
            let make = |memory: *mut u8| {
                let (mut runs, mut base) = (Runs::nowhere(), 0);
                for (shape, is_gap) in &shapes {
                    match is_gap {
                        true => runs.push_gap(shape.bytes() as usize),
                        false => runs.push_slice(memory.wrapping_add(base), shape),
                    }
                    base += shape.span() as usize;
                }
                runs
            };
            let (mut base, mut from) = (0, 0);
            let mut gathered = vec![0; total];
            for (shape, is_gap) in &shapes {
                for offset in offsets(shape) {
                    if !is_gap {
                        expected[base + offset] = staging[from];
                        gathered[from] = staging[from];
                    }
                    from += 1;
                }
                base += shape.span() as usize;
            }
            let mut runs = make(memory.as_mut_ptr());
            let mut at = 0;
            for step in steps.iter().chain([&total]) {
                let step = (*step).min(total - at);
                // SAFETY: `at + step` is inside the staging bytes, and the spans inside the memory.
                unsafe { runs.scatter(staging[at..].as_ptr(), step) };
                at += step;
            }
            prop_assert_eq!(&memory, &expected);
            let mut back = vec![0; total];
            // SAFETY: as above.
            unsafe { make(memory.as_mut_ptr()).gather(back.as_mut_ptr(), total) };
            prop_assert_eq!(back, gathered);
        }
    }
}
