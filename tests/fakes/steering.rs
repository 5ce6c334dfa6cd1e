//! What tests tell every fake library alike, by functions that each exports under a prefix of its own.

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_uint};

use libloading::Library;

/// A fake library, and what its functions for tests begin with.
pub trait Steering {
    const PREFIX: &'static str;

    fn library(&self) -> &Library;

    /// The function of this name behind the prefix.
    ///
    /// # Safety
    /// The library exports it with this signature.
    unsafe fn function<F: Copy>(&self, name: &str) -> F {
        let symbol = format!("{}_{name}", Self::PREFIX);
        // SAFETY: passed on from the caller.
        *unsafe { self.library().get::<F>(symbol.as_bytes()) }.unwrap()
    }

    /// Forgets failures, counts and delays.
    fn reset(&self) {
        // SAFETY: every fake exports it so.
        unsafe { self.function::<unsafe extern "C" fn()>("reset")() };
    }

    /// The nth call of this name from now fails with this code.
    fn fail_call(&self, name: &str, nth: i64, code: i32) {
        type Fail = unsafe extern "C" fn(*const c_char, c_long, c_int);
        let name = CString::new(name).unwrap();
        // SAFETY: as above; the fake copies the name.
        unsafe { self.function::<Fail>("fail_call")(name.as_ptr(), nth, code) };
    }

    /// The call that failed on request.
    fn failed(&self) -> Option<String> {
        // SAFETY: as above.
        let name = unsafe { self.function::<unsafe extern "C" fn() -> *const c_char>("failed")() };
        // SAFETY: a NUL-terminated string that lives as long as the library.
        (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
    }

    /// Calls since the last reset.
    fn calls(&self) -> i64 {
        // SAFETY: as above.
        unsafe { self.function::<unsafe extern "C" fn() -> c_long>("calls")() }
    }

    /// Transfers pause for so long at most.
    fn delay(&self, micros: u32) {
        // SAFETY: as above.
        unsafe { self.function::<unsafe extern "C" fn(c_uint)>("delay")(micros) };
    }

    /// Transfers stop where they are, or go on.
    fn hold(&self, hold: bool) {
        // SAFETY: as above.
        unsafe { self.function::<unsafe extern "C" fn(c_int)>("hold")(i32::from(hold)) };
    }
}
