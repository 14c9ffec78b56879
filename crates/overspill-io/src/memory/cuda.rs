//! Memory that CUDA copies from and to at the full speed of the bus.
//!
//! [`Pool::register_with_cuda`](crate::Pool::register_with_cuda) loads the driver at run time, so that nothing of CUDA
//! is needed to build, or to run without a GPU. It happens on request only: a driver takes its time to start, and
//! memory for a context. The arena is registered once, as a whole, for every context of the process, and the
//! registration ends when the arena goes, before its pages are unmapped.
//!
//! The driver has a current context for each thread. Ours, the primary one of the first device, which the CUDA runtime
//! uses too, is retained as long as the registration lasts; it is current only during a call that needs it, on the
//! thread that makes the call, and what was current before is current after. Overspill itself never copies to a GPU.

#![expect(unsafe_code, reason = "loads the driver's library and calls its functions")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};

use libloading::Library;

/// The name under which systems have the driver.
pub(super) const DRIVER: &str = "libcuda.so.1";

/// The answer of a function of the driver that did what it was asked for.
const SUCCESS: c_int = 0;
/// Asks for memory that is pinned for all contexts, not only for the current one.
const PORTABLE: c_uint = 1;

/// What CUDA knows of a pool's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaReport {
    /// Bytes that are registered: the whole memory of the pool.
    pub registered_bytes: usize,
    /// Number of devices that the driver lets this process see.
    pub devices: usize,
}

/// Why a pool's memory is not registered with CUDA.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no driver, or it cannot be loaded.
    #[error("no CUDA driver: {reason}")]
    NoDriver {
        /// The library that was looked for.
        library: PathBuf,
        /// What the dynamic linker says about it.
        reason: String,
    },
    /// The driver lacks a function that every driver since 2020 has.
    #[error("the CUDA driver {} is too old: it has no {function}", library.display())]
    TooOld {
        /// The driver's library.
        library: PathBuf,
        /// The function.
        function: &'static str,
    },
    /// The driver works, and there is nothing to drive.
    #[error("the CUDA driver sees no device")]
    NoDevice,
    /// The driver did not do what it was asked for.
    #[error("{function} failed: {}", Code { code: *code, name: name.as_deref() })]
    Refused {
        /// The function that was called.
        function: &'static str,
        /// Its answer, a `CUresult`.
        code: i32,
        /// The driver's name for that, such as `CUDA_ERROR_OUT_OF_MEMORY`.
        name: Option<String>,
    },
}

/// A `CUresult`, with its name if it has one.
struct Code<'a> {
    code: i32,
    name: Option<&'a str>,
}

impl fmt::Display for Code<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name {
            Some(name) => write!(f, "{name} (CUDA error {})", self.code),
            None => write!(f, "CUDA error {}", self.code),
        }
    }
}

/// A range of memory that the driver has pinned.
pub(super) struct Registration {
    context: Context,
    start: NonNull<u8>,
    report: CudaReport,
}

// SAFETY: the driver's functions may be called from any thread, and the addresses are passed on, never dereferenced.
unsafe impl Send for Registration {}

impl Registration {
    /// Loads `library` and registers the `bytes` bytes at `start` with it. The caller keeps them mapped until
    /// [`Registration::end`].
    pub(super) fn make(library: &Path, start: NonNull<u8>, bytes: usize) -> Result<Registration, CudaError> {
        let driver = Driver::load(library)?;
        let devices = driver.start()?;
        let context = Context::retain(driver)?;
        context.lend(|driver| driver.register(start, bytes))?;
        Ok(Registration { context, start, report: CudaReport { registered_bytes: bytes, devices } })
    }

    pub(super) fn report(&self) -> &CudaReport {
        &self.report
    }

    /// Ends the registration. After a refusal the driver still takes the addresses for its own.
    pub(super) fn end(self) -> Result<(), CudaError> {
        self.context.lend(|driver| driver.unregister(self.start))
    }
}

/// The primary context of the first device, which lives at least until this is dropped.
struct Context {
    driver: Driver,
    device: c_int,
    handle: *mut c_void,
}

impl Context {
    fn retain(driver: Driver) -> Result<Context, CudaError> {
        let mut device = 0;
        // SAFETY: the function writes one number where it is told to.
        let found = unsafe { (driver.device_get)(&raw mut device, 0) };
        driver.check("cuDeviceGet", found)?;
        let mut handle = ptr::null_mut();
        // SAFETY: the function writes one pointer where it is told to; the driver has just named the device.
        let retained = unsafe { (driver.primary_retain)(&raw mut handle, device) };
        driver.check("cuDevicePrimaryCtxRetain", retained)?;
        Ok(Context { driver, device, handle })
    }

    /// Makes `call` with the context current on this thread.
    fn lend(&self, call: impl FnOnce(&Driver) -> Result<(), CudaError>) -> Result<(), CudaError> {
        // SAFETY: the context is retained, so it exists.
        let pushed = unsafe { (self.driver.push)(self.handle) };
        self.driver.check("cuCtxPushCurrent", pushed)?;
        let answer = call(&self.driver);
        let mut popped = ptr::null_mut();
        // SAFETY: the function writes one pointer where it is told to; it takes off what was pushed above. If it
        // complains, then of work that others gave the GPU before, which is theirs to hear of.
        let _complaint = unsafe { (self.driver.pop)(&raw mut popped) };
        answer
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: pairs with the call that retained it. A driver that has shut down already refuses, and has let go.
        let _refusal = unsafe { (self.driver.primary_release)(self.device) };
    }
}

/// The functions of a driver. They stay valid, for a library that was loaded here is never unloaded: the driver has
/// threads and exit handlers of its own.
struct Driver {
    init: unsafe extern "C" fn(c_uint) -> c_int,
    device_get_count: unsafe extern "C" fn(*mut c_int) -> c_int,
    device_get: unsafe extern "C" fn(*mut c_int, c_int) -> c_int,
    primary_retain: unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int,
    primary_release: unsafe extern "C" fn(c_int) -> c_int,
    push: unsafe extern "C" fn(*mut c_void) -> c_int,
    pop: unsafe extern "C" fn(*mut *mut c_void) -> c_int,
    host_register: unsafe extern "C" fn(*mut c_void, usize, c_uint) -> c_int,
    host_unregister: unsafe extern "C" fn(*mut c_void) -> c_int,
    error_name: Option<unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int>,
}

impl Driver {
    fn load(path: &Path) -> Result<Driver, CudaError> {
        // SAFETY: loading runs the library's initializers. It is the one that the system has under the driver's name,
        // in the folders that it trusts with all libraries, or one that a test has made.
        let library = unsafe { Library::new(path) };
        let library = ManuallyDrop::new(
            library
                .map_err(|error| CudaError::NoDriver { library: path.to_owned(), reason: reason(&error) })?,
        );
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the field that the function goes to has the type that the driver's header declares for it,
                // and so has had since the version that the name ends in.
                unsafe { library.get($name) }
                    .map(|function| *function)
                    .map_err(|_| CudaError::TooOld { library: path.to_owned(), function: $name })
            };
        }
        Ok(Driver {
            init: function!("cuInit")?,
            device_get_count: function!("cuDeviceGetCount")?,
            device_get: function!("cuDeviceGet")?,
            primary_retain: function!("cuDevicePrimaryCtxRetain")?,
            primary_release: function!("cuDevicePrimaryCtxRelease_v2")?,
            push: function!("cuCtxPushCurrent_v2")?,
            pop: function!("cuCtxPopCurrent_v2")?,
            host_register: function!("cuMemHostRegister_v2")?,
            host_unregister: function!("cuMemHostUnregister")?,
            error_name: function!("cuGetErrorName").ok(),
        })
    }

    /// Starts the driver, unless it runs, and counts its devices.
    fn start(&self) -> Result<usize, CudaError> {
        // SAFETY: the function takes no pointer; zero is the one flag it has.
        let started = unsafe { (self.init)(0) };
        self.check("cuInit", started)?;
        let mut devices = 0;
        // SAFETY: the function writes one number where it is told to.
        let counted = unsafe { (self.device_get_count)(&raw mut devices) };
        self.check("cuDeviceGetCount", counted)?;
        usize::try_from(devices).ok().filter(|&devices| devices > 0).ok_or(CudaError::NoDevice)
    }

    /// Needs a current context.
    fn register(&self, start: NonNull<u8>, bytes: usize) -> Result<(), CudaError> {
        // SAFETY: pins pages and changes no byte. The maker of the registration keeps them mapped.
        let registered = unsafe { (self.host_register)(start.as_ptr().cast(), bytes, PORTABLE) };
        self.check("cuMemHostRegister", registered)
    }

    /// Needs a current context.
    fn unregister(&self, start: NonNull<u8>) -> Result<(), CudaError> {
        // SAFETY: pairs with the registration of the same address; the driver waits for its own copies first.
        let unregistered = unsafe { (self.host_unregister)(start.as_ptr().cast()) };
        self.check("cuMemHostUnregister", unregistered)
    }

    fn check(&self, function: &'static str, code: c_int) -> Result<(), CudaError> {
        if code == SUCCESS {
            return Ok(());
        }
        Err(CudaError::Refused { function, code, name: self.name(code) })
    }

    /// What the driver calls one of its answers.
    fn name(&self, code: c_int) -> Option<String> {
        let mut name = ptr::null();
        // SAFETY: the function writes one pointer where it is told to.
        let named = unsafe { self.error_name?(code, &raw mut name) };
        if named != SUCCESS || name.is_null() {
            return None;
        }
        // SAFETY: the driver has said that it wrote the address of a text of its own, which ends with a zero.
        Some(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
    }
}

/// The dynamic linker's own words, which the error keeps behind a general sentence.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

#[cfg(test)]
mod tests;
