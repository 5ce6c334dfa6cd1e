//! Opening a vendor's driver library at run time: where it is looked for, and what is said when it or a
//! symbol is not there.
//!
//! Knows no vendor. A library is never closed again: drivers keep threads and exit handlers.

use std::ffi::{CString, c_void};
use std::mem::ManuallyDrop;

use libloading::os::unix::{Library as Handle, RTLD_LOCAL, RTLD_NOW};

use crate::error::{Error, ErrorKind, Result};

/// What a library is called and what cures its absence.
pub struct Source {
    /// Name that the dynamic linker searches for.
    pub soname: &'static str,
    /// Environment variable that names another file.
    pub variable: &'static str,
    /// What to do when it is not found.
    pub remedy: &'static str,
}

/// A library that stays loaded until the process ends.
pub struct Library {
    handle: ManuallyDrop<Handle>,
    path: String,
    source: &'static Source,
}

impl Library {
    /// Loads the file that the environment variable names, else the soname.
    pub fn open(source: &'static Source) -> Result<Self> {
        let path = match std::env::var(source.variable) {
            Ok(path) if !path.is_empty() => path,
            _ => source.soname.to_owned(),
        };
        // SAFETY: loading runs the library's constructors; it is the platform's driver, or the file that
        // whoever owns the process's environment has named.
        let handle = unsafe { Handle::open(Some(&path), RTLD_NOW | RTLD_LOCAL) }.map_err(|e| {
            Error::new(
                ErrorKind::Device,
                format!(
                    "{path} cannot be loaded ({}); {}, or name the file in {}",
                    reason(&e),
                    source.remedy,
                    source.variable
                ),
            )
        })?;
        Ok(Self { handle: ManuallyDrop::new(handle), path, source })
    }

    /// The file as it was asked for.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Address of a symbol, or `None` where this version of the library lacks it.
    pub fn find(&self, symbol: &str) -> Option<*mut c_void> {
        let name = CString::new(symbol).ok()?;
        // SAFETY: the symbol is only read as an address here; whoever calls it gives it its type.
        let found = unsafe { self.handle.get::<*mut c_void>(name.as_bytes_with_nul()) }.ok()?;
        let address = found.into_raw();
        (!address.is_null()).then_some(address)
    }

    /// The error for a symbol that this version lacks.
    pub fn missing(&self, symbol: &str, version: &str) -> Error {
        Error::new(
            ErrorKind::Unsupported,
            format!(
                "{} (version {version}) has no symbol {symbol}; {}",
                self.path, self.source.remedy
            ),
        )
    }
}

/// What the dynamic linker says, which names a dependency that is missing; the error itself only says which
/// function failed.
fn reason(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

/// Calls a function of a table, and turns its status into a result that names it.
macro_rules! checked {
    ($api:expr, $name:ident($($argument:expr),* $(,)?)) => {
        $api.check(stringify!($name), ($api.functions.$name)($($argument),*))
    };
}

pub(super) use checked;

/// Declares a table of function pointers, each under its name in the library.
macro_rules! function_table {
    ($(#[$doc:meta])* $table:ident; required { $($name:ident: fn($($argument:ty),*);)* }
     optional { $($extra:ident: fn($($given:ty),*);)* }) => {
        $(#[$doc])*
        #[allow(non_snake_case)]
        pub(super) struct $table {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> i32,)*
            $(pub(super) $extra: Option<unsafe extern "C" fn($($given),*) -> i32>,)*
        }

        impl $table {
            /// Fills the table through `find`, which gives an address or null.
            ///
            /// # Safety
            /// Each address has the type under which the table declares its name.
            unsafe fn fill(
                mut find: impl FnMut(&'static str) -> Option<*mut std::ffi::c_void>,
                missing: impl Fn(&'static str) -> crate::error::Error,
            ) -> crate::error::Result<Self> {
                Ok(Self {
                    $($name: {
                        let name = stringify!($name);
                        let address = find(name).ok_or_else(|| missing(name))?;
                        // SAFETY: the caller of `fill` vouches for the type; the address is not null.
                        unsafe {
                            std::mem::transmute::<
                                *mut std::ffi::c_void,
                                unsafe extern "C" fn($($argument),*) -> i32,
                            >(address)
                        }
                    },)*
                    $($extra: find(stringify!($extra)).map(|address| {
                        // SAFETY: the caller of `fill` vouches for the type; the address is not null.
                        unsafe {
                            std::mem::transmute::<
                                *mut std::ffi::c_void,
                                unsafe extern "C" fn($($given),*) -> i32,
                            >(address)
                        }
                    }),)*
                })
            }
        }
    };
}
pub(super) use function_table;

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a library that is not there is an error that names the file, the variable and the remedy.
    #[test]
    fn missing_library_is_told() {
        static SOURCE: Source = Source {
            soname: "libucm-no-such-driver.so.1",
            variable: "UCM_NO_SUCH_LIBRARY",
            remedy: "install the driver",
        };
        let error = Library::open(&SOURCE).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Device);
        let text = error.to_string();
        for part in [SOURCE.soname, SOURCE.variable, SOURCE.remedy] {
            assert!(text.contains(part), "{text}");
        }
    }

    /// Goal: the error says what the dynamic linker found wrong, which for a driver is often a dependency of
    /// its own, and not only that dlopen failed.
    #[test]
    fn reason_of_the_linker_is_told() {
        static SOURCE: Source = Source {
            soname: "/proc/self/cmdline",
            variable: "UCM_NO_SUCH_LIBRARY",
            remedy: "install the driver",
        };
        let text = Library::open(&SOURCE).err().unwrap().to_string();
        assert!(!text.contains("dlopen failed"), "{text}");
        // The linker's sentence begins with the file that it could not use.
        assert!(text.matches(SOURCE.soname).count() == 2, "{text}");
    }

    /// Goal: a symbol that is not there is UNSUPPORTED and names library, version and symbol.
    #[test]
    fn missing_symbol_is_told() {
        static SOURCE: Source =
            Source { soname: "libc.so.6", variable: "UCM_NO_SUCH_LIBRARY", remedy: "update it" };
        let library = Library::open(&SOURCE).unwrap();
        assert!(library.find("malloc").is_some());
        assert!(library.find("ucm_no_such_symbol").is_none());
        let error = library.missing("ucm_no_such_symbol", "12.8");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let text = error.to_string();
        assert!(text.contains("libc.so.6") && text.contains("12.8") && text.contains("update it"));
    }
}
