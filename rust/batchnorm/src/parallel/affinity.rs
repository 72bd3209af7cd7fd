//! The CPUs that workers may run on: any but that of the caller.
//!
//! Linux tends to wake a thread on the CPU of the thread that wakes it. Here the waking thread goes on working, so with two
//! threads on two CPUs, one waits for the other until the call is over. Measured on such a machine after 30 ms of rest:
//! 16 MB are normalized in 2.4 ms by one thread, in 2.4 ms by two threads wherever Linux puts them, and in 1.4 ms by two
//! threads kept on different CPUs.

#[cfg(target_os = "linux")]
mod linux {
    use rustix::thread::{CpuSet, Pid, gettid, sched_getaffinity, sched_getcpu, sched_setaffinity};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Mutex, PoisonError};

    /// The workers of a pool, and the CPU that they are kept off.
    #[derive(Default)]
    pub(crate) struct Places {
        /// Each worker, with the CPUs that it could run on when it began.
        workers: Mutex<Vec<(Pid, CpuSet)>>,
        /// One more than the number of the CPU that workers are now kept off; 0 before the first call.
        left: AtomicUsize,
    }

    impl Places {
        /// Records the calling thread as a worker, with the CPUs that it may run on.
        pub(crate) fn arrive(&self) {
            if let Ok(cpus) = sched_getaffinity(None) {
                self.workers.lock().unwrap_or_else(PoisonError::into_inner).push((gettid(), cpus));
                self.left.store(0, Ordering::Relaxed); // earlier calls did not move this worker
            }
        }

        /// Keeps workers off the CPU that the caller runs on. If the system does not allow it, they stay as they are: this
        /// affects the time a call takes, not its result.
        pub(crate) fn leave_callers_cpu(&self) {
            let cpu = sched_getcpu();
            if self.left.swap(cpu + 1, Ordering::Relaxed) == cpu + 1 {
                return;
            }
            for (worker, cpus) in self.workers.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                let mut others = *cpus;
                if cpu < CpuSet::MAX_CPU {
                    others.unset(cpu);
                }
                if others.count() > 0 {
                    let _ = sched_setaffinity(Some(*worker), &others);
                }
            }
        }
    }
}

#[cfg(target_os = "linux")]
pub(super) use linux::Places;

/// On other systems, threads run where the system puts them.
#[cfg(not(target_os = "linux"))]
#[derive(Default)]
pub(super) struct Places;

#[cfg(not(target_os = "linux"))]
impl Places {
    pub(super) fn arrive(&self) {}
    pub(super) fn leave_callers_cpu(&self) {}
}
