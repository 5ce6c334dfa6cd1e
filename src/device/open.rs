//! Choosing the device of a store.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::Device;
use super::host::Host;
use super::{ascend, cuda};
use crate::config::DeviceKind;
use crate::error::Result;

/// Opens the device of a store. `auto` takes the first of CUDA and Ascend whose driver loads and shows a
/// device, else host memory. On CUDA addresses of plain host memory work too; on Ascend each such entry fails.
///
/// A negative `device_id` means a store that transfers nothing: host memory, no driver is touched.
pub fn open(kind: DeviceKind, device_id: i32) -> Result<Arc<dyn Device>> {
    if device_id < 0 {
        return Ok(Arc::new(Host));
    }
    match kind {
        DeviceKind::Host => Ok(Arc::new(Host)),
        DeviceKind::Cuda => Ok(Arc::new(cuda::open(device_id)?)),
        DeviceKind::Ascend => Ok(Arc::new(ascend::open(device_id)?)),
        DeviceKind::Auto => {
            // A driver that is not there, cannot start or shows no device only means that the next is
            // asked: no address of its memory can exist in this process then.
            if cuda::is_present().unwrap_or(false) {
                return Ok(Arc::new(cuda::open(device_id)?));
            }
            if ascend::is_present().unwrap_or(false) {
                return Ok(Arc::new(ascend::open(device_id)?));
            }
            Ok(Arc::new(Host))
        }
    }
}
