//! cuFile itself, open in this process without any way through host memory.
//!
//! cuFile is one for a process, and takes settings only before it is opened: settings that were made and not
//! used are forgotten by an open that fails. So one lock is held from the settings to the end of the opening.
//!
//! Nobody here closes it. An open is not counted: who finds cuFile open (KvikIO, PyTorch, another store) uses it too,
//! and a close would take it from all of them. It ends with the process.

use std::ffi::{c_int, c_uint};

use parking_lot::Mutex;

use super::api::{
    Api, DRIVER_ALREADY_OPEN, INDIRECT_FLAGS, INDIRECT_PARAMETERS, Properties, known,
};
use crate::error::{Error, ErrorKind, Result};
use crate::io::thread::quietly;

static OPENING: Mutex<()> = Mutex::new(());

/// A use of cuFile, which is open.
pub(super) struct Driver {
    api: Api,
    /// What was found, for reports.
    features: Vec<String>,
}

impl Driver {
    /// Opens cuFile, or joins those who have.
    ///
    /// # Errors
    /// What is missing, or which setting allows a way through host memory.
    pub(super) fn open() -> Result<Self> {
        let _opening = OPENING.lock();
        let api = start()?;
        Ok(Self { features: features(&api)?, api })
    }

    pub(super) fn api(&self) -> &Api {
        &self.api
    }

    pub(super) fn features(&self) -> &[String] {
        &self.features
    }
}

/// Opens cuFile with every way through host memory forbidden.
fn start() -> Result<Api> {
    let api = Api::load()?;
    if let Some(set) = api.functions.set_bool {
        for parameter in known(INDIRECT_PARAMETERS, api.version) {
            // SAFETY: this version has the parameter. What could not be set, because cuFile is open already, shows
            // in the properties.
            let _ = unsafe { set(parameter.number as c_int, false) };
        }
    }
    // Its threads take no signals of the program.
    // SAFETY: no arguments; the lock keeps others of this library from it.
    let status = quietly(|| unsafe { (api.functions.driver_open)() });
    if status.code != DRIVER_ALREADY_OPEN {
        api.check("cuFileDriverOpen", status)?;
    }
    Ok(api)
}

/// What runs; an error where bytes could go through host memory.
fn features(api: &Api) -> Result<Vec<String>> {
    let mut properties = Properties::default();
    // SAFETY: the place is larger than the structure of any version so far.
    let status = unsafe { (api.functions.properties)(&mut properties) };
    api.check("cuFileDriverGetProperties", status)?;
    if let Some(setting) = indirect(properties.control_flags, api.version) {
        let text = format!(
            "{} is open in this process with {setting}, so bytes may go through host memory; set it to false in \
             /etc/cufile.json (or the file that CUFILE_ENV_PATH_JSON names)",
            api.name
        );
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    let module = match (properties.driver_major, properties.driver_minor) {
        (0, 0) => "without nvidia-fs".into(),
        (major, minor) => format!("nvidia-fs {major}.{minor}"),
    };
    Ok(vec![api.name.clone(), module, "compatibility mode forbidden".into()])
}

fn indirect(flags: c_uint, version: c_int) -> Option<&'static str> {
    known(INDIRECT_FLAGS, version)
        .find(|flag| flags & (1 << flag.number) != 0)
        .map(|flag| flag.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: each way through host memory is recognised by its bit, where the version's header has that bit; polling
    /// is none.
    #[test]
    fn ways_through_host_memory_are_recognised() {
        let found = |flags, version| indirect(flags, version).unwrap_or("none");
        assert_eq!(found(0b1, 1200), "none");
        assert_eq!(found(0b10, 0), "properties.allow_compat_mode");
        assert!(found(0b100, 1170).contains("posix_io_mode"));
        assert_eq!(found(0b10001, 1170), "properties.gds_fallback_io");
        assert_eq!(found(0b10101, 1160), "none");
    }
}
