//! What a submit costs its caller on a device: 64 blocks of 56 tensor slices, behind an event.
//!
//! The device is the fake driver of the tests (a C compiler is needed), so the counts have no driver's work in them but
//! all of the engine's.

use std::ffi::c_void;

use ucm::capi::batch::{ucm_batch_t, ucm_load, ucm_save};
use ucm::capi::lookup::ucm_block_id_t;
use ucm::capi::store::{ucm_store_close, ucm_store_t};
use ucm::capi::task::{ucm_task_free, ucm_task_t, ucm_task_wait};

use super::fakes::{ALL, Fake};
use super::{COPIED, Case, LOADED, block, open_store};

const BLOCKS: usize = 64;
const SLICES: usize = 56;
/// Small, so that the fake's threads have little to copy.
const SLICE: usize = 256;

/// `UCM_STAGE_RELEASED`.
const RELEASED: u32 = 4;

/// A store on the fake CUDA driver, and a page of device memory for each block.
struct Model {
    store: *mut ucm_store_t,
    addresses: Vec<*mut c_void>,
    event: *mut c_void,
    next: u64,
}

impl Model {
    fn open() -> Self {
        // Every call in its own way, without measuring; for as long as the program runs.
        let fake: &'static Fake = Box::leak(Box::new(Fake::take(ALL[1])));
        let memory = Box::leak(Box::new(fake.alloc(BLOCKS * SLICES * SLICE)));
        let stream = Box::leak(Box::new(fake.stream()));
        let event = Box::leak(Box::new(fake.event()));
        event.record(stream);
        stream.sync();
        let slice = |block: usize, slice: usize| (slice * BLOCKS + block) * SLICE;
        let offsets = (0..BLOCKS * SLICES).map(|at| slice(at / SLICES, at % SLICES));
        let addresses = offsets.map(|offset| memory.base.wrapping_add(offset).cast()).collect();
        let block_size = (SLICES * SLICE).to_string();
        let settings = [
            ("store_pipeline", "Cache|Empty"),
            ("cache_buffer_capacity_gb", "0.008"),
            ("device", "cuda"),
            ("device_id", "0"),
            ("tensor_size", "256"),
            ("block_size", block_size.as_str()),
        ];
        Self { store: open_store(&settings), addresses, event: event.event, next: 0 }
    }

    /// Blocks from this number on, to the stage and to the end.
    fn transfer(
        &self,
        first: u64,
        submit: unsafe extern "C" fn(
            *mut ucm_store_t,
            *const ucm_batch_t,
            *mut *mut ucm_task_t,
        ) -> i32,
        stage: u32,
    ) {
        let ids: Vec<_> = (first..first + BLOCKS as u64)
            .map(|number| ucm_block_id_t { bytes: block(number).0 })
            .collect();
        let batch = ucm_batch_t {
            struct_size: size_of::<ucm_batch_t>(),
            blocks: ids.as_ptr(),
            shards: std::ptr::null(),
            addresses: self.addresses.as_ptr(),
            count: BLOCKS,
            wait_event: self.event,
            flags: 0,
            user_data: 0,
            timeout_ms: 0,
        };
        let mut task = std::ptr::null_mut();
        // SAFETY: arrays have `count` elements, event and device memory are never freed, the task is waited for.
        unsafe {
            assert_eq!(submit(self.store, &batch, &mut task), 0);
            assert_eq!(ucm_task_wait(task, stage, 10_000), 0);
            assert_eq!(ucm_task_wait(task, RELEASED, 10_000), 0);
            ucm_task_free(task);
        }
    }

    /// Blocks that nobody has saved.
    fn save(&mut self) {
        self.next += BLOCKS as u64;
        self.transfer(self.next, ucm_save, COPIED);
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: opened by `open`, closed once.
        unsafe { ucm_store_close(self.store) };
    }
}

/// A save into a store that has to evict, and a load from DRAM.
pub(super) fn cases() -> Vec<Case> {
    let items = (BLOCKS * SLICES) as u64;
    let model = std::rc::Rc::new(std::cell::RefCell::new(Model::open()));
    let loads = std::rc::Rc::clone(&model);
    let case = |name, run| Case { name, items, unit: "slice", run };
    vec![
        case(
            "device/save of 64 blocks of 56 slices",
            Box::new(move || model.borrow_mut().save()) as Box<dyn FnMut()>,
        ),
        case(
            "device/load of 64 blocks of 56 slices",
            Box::new(move || {
                let mut loads = loads.borrow_mut();
                if loads.next == 0 {
                    loads.save();
                }
                loads.transfer(loads.next, ucm_load, LOADED);
            }),
        ),
    ]
}
