//! A borrowed team: the threads of an OpenMP runtime that another library of the process works with.
//!
//! Such threads go on spinning after each parallel region of their library. Threads of our own would share the CPUs with
//! them; a task given to the team itself starts within microseconds.
//!
//! GNU's runtime keeps the team of a calling thread as long as every region asks for the same number of threads. It ends
//! the threads above that number, and makes them again for the next region that asks for more. So whoever runs on a team
//! asks for the number that its library asks for, however few tasks there are, or works alone.

#![allow(unsafe_code, reason = "the C interface of OpenMP runtimes and of the dynamic linker")]

#[cfg(target_os = "linux")]
mod linux {
    use crate::error::Error;
    use std::any::Any;
    use std::ffi::{CStr, CString, c_uint, c_void};
    use std::os::unix::ffi::OsStrExt;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use std::path::Path;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::{Mutex, PoisonError};

    const ENTRY: &CStr = c"GOMP_parallel";

    /// What every thread of a team is told to call, with the data that it is told to pass.
    type OnThread = unsafe extern "C" fn(data: *mut c_void);
    /// `GOMP_parallel(fn, data, num_threads, flags)`: what compilers make of `#pragma omp parallel`. GNU's runtime has it,
    /// and on Linux LLVM's and Intel's.
    type GompParallel = unsafe extern "C" fn(OnThread, *mut c_void, c_uint, c_uint);

    /// The process in which a team was first found, 0 before. The threads of its teams do not exist in a forked child,
    /// where GNU's runtime waits for them for ever, so there is no team in a child.
    static HOME: AtomicU32 = AtomicU32::new(0);

    /// The threads of an OpenMP runtime, which work on a call beside the calling thread.
    ///
    /// Linux only. A forked child has no team: work for this one is then done by threads of our own.
    #[derive(Debug, Clone, Copy)]
    pub struct Team {
        parallel: GompParallel,
    }

    impl Team {
        /// Finds the OpenMP runtime that the process is bound to, or the one in `library`, which stays loaded.
        ///
        /// `library` is a path, or a name that the dynamic linker searches for, and must be an OpenMP runtime or depend on
        /// one. `None` stands for the runtime that the process shows to all of its libraries (with `import torch`, that
        /// of PyTorch). Returns `None` if there is none, in a child that was forked after a team was found, and on systems
        /// other than Linux.
        ///
        /// # Errors
        /// [`Error::Library`] if `library` cannot be loaded, or has no `GOMP_parallel`.
        pub fn find(library: Option<&Path>) -> Result<Option<Self>, Error> {
            let handle = library.map_or(Ok(libc::RTLD_DEFAULT), open)?;
            // SAFETY: the handle is the constant, or that of a library that is never closed; the name ends in NUL.
            let address = unsafe { libc::dlsym(handle, ENTRY.as_ptr()) };
            if address.is_null() {
                let missing = |path| failed(path, format!("it has no {}", ENTRY.to_string_lossy()));
                return library.map_or(Ok(None), |path| Err(missing(path)));
            }
            // SAFETY: it is a function's address, not null, and what the OpenMP runtimes export under this name has this
            // type. The library is never unloaded by us, and those that the process is bound to are not by others.
            let parallel = unsafe { std::mem::transmute::<*mut c_void, GompParallel>(address) };
            let _ = HOME.compare_exchange(0, std::process::id(), Ordering::Relaxed, Ordering::Relaxed);
            Ok(Some(Self { parallel }).filter(Self::usable))
        }

        /// Whether the team exists in this process: not in a forked child.
        pub fn usable(&self) -> bool {
            HOME.load(Ordering::Relaxed) == std::process::id()
        }

        /// Calls `work` once on each thread of a team of `threads`, or of fewer if the runtime gives no more; one of them is
        /// the calling thread. Panics if `work` panicked on any of them, after all are done.
        pub(in super::super) fn run<F: Fn() + Sync>(&self, threads: usize, work: &F) {
            let job = Job { work, panic: Mutex::new(None) };
            let threads = c_uint::try_from(threads).unwrap_or(c_uint::MAX);
            // SAFETY: `on_thread::<F>` gets the pointer to a `Job<F>`, which lives until the call returns, and the call
            // returns after every thread of the team has; flags 0 leave the placement of threads as it is.
            unsafe { (self.parallel)(on_thread::<F>, (&raw const job).cast_mut().cast(), threads, 0) };
            if let Some(panic) = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
                resume_unwind(panic);
            }
        }
    }

    /// What the threads of a team share.
    struct Job<'a, F> {
        work: &'a F,
        /// What the first of those that panicked left. A panic must not unwind through the runtime's frames, which are C.
        panic: Mutex<Option<Box<dyn Any + Send>>>,
    }

    /// # Safety
    /// `job` must point to a `Job<F>`, which threads may share.
    unsafe extern "C" fn on_thread<F: Fn() + Sync>(job: *mut c_void) {
        // SAFETY: it points to a job, as the caller promises; a job is only read, or locked.
        let job = unsafe { &*job.cast::<Job<'_, F>>() };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(job.work)) {
            job.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }

    /// Loads a library, for as long as the process lives.
    fn open(path: &Path) -> Result<*mut c_void, Error> {
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|e| failed(path, e.to_string()))?;
        // SAFETY: the name ends in NUL. Loading runs the library's initializers, which is what the user asks for.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if !handle.is_null() {
            return Ok(handle);
        }
        // SAFETY: no arguments; the message is this thread's.
        let message = unsafe { libc::dlerror() };
        let reason = if message.is_null() {
            String::from("it cannot be loaded")
        } else {
            // SAFETY: not null, ends in NUL, and stays until this thread's next call of the dynamic linker.
            unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()
        };
        Err(failed(path, reason))
    }

    fn failed(path: &Path, reason: String) -> Error {
        Error::Library { got: path.display().to_string(), reason }
    }
}

#[cfg(target_os = "linux")]
pub use linux::Team;

#[cfg(not(target_os = "linux"))]
mod elsewhere {
    use crate::error::Error;
    use std::convert::Infallible;
    use std::path::Path;

    /// The threads of an OpenMP runtime, of which there are none on this system: work is done by threads of our own.
    #[derive(Debug, Clone, Copy)]
    pub struct Team(Infallible);

    impl Team {
        /// Finds no OpenMP runtime, since this system is not Linux.
        ///
        /// # Errors
        /// None.
        pub fn find(_library: Option<&Path>) -> Result<Option<Self>, Error> {
            Ok(None)
        }

        /// Whether the team exists in this process.
        pub fn usable(&self) -> bool {
            match self.0 {}
        }

        pub(in super::super) fn run<F: Fn() + Sync>(&self, _threads: usize, _work: &F) {
            match self.0 {}
        }
    }
}

#[cfg(not(target_os = "linux"))]
pub use elsewhere::Team;
