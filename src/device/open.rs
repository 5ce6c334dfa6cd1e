//! Choosing the device of a store.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::Device;
use super::host::Host;
use super::{ascend, cuda};
use crate::config::{DeviceKind, Facility};
use crate::error::{Error, ErrorKind, Result};
use crate::log::{self, Level};

/// Opens the device of a store. `auto` takes the first of CUDA and Ascend whose driver loads and shows a
/// device, else host memory; on an accelerator, addresses of plain host memory work too.
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

/// Answers the option `gpu_direct`. There is no direct path between drive and device memory in this
/// version: every load is verified by the CPU before the device sees its bytes, and a direct path would
/// have to verify on the device.
pub fn check_gpu_direct(need: Facility) -> Result<()> {
    match need {
        Facility::Required => Err(Error::new(
            ErrorKind::Unsupported,
            "gpu_direct: required, but this version of UCM has no direct path between drive and device \
             memory: it does not use libcufile, because bytes that the drive puts into device memory would \
             reach the model before their checksum is verified; set gpu_direct: off, and transfers go \
             through pinned memory",
        )),
        Facility::Auto => {
            log::once(
                Level::Info,
                "gpu_direct",
                format_args!(
                    "gpu_direct: auto uses pinned memory; this version has no direct path between drive and \
                     device memory"
                ),
            );
            Ok(())
        }
        Facility::Off => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a direct path that is demanded is refused at open, and one that is only wished for is not.
    #[test]
    fn a_demanded_direct_path_is_refused() {
        let error = check_gpu_direct(Facility::Required).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(
            ["gpu_direct", "libcufile", "checksum"].iter().all(|t| error.to_string().contains(t))
        );
        assert!(
            check_gpu_direct(Facility::Auto).is_ok() && check_gpu_direct(Facility::Off).is_ok()
        );
    }
}
