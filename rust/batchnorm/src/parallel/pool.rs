//! The thread pool: one of our own for each process, never rayon's global one.

use super::affinity::Places;
use super::process::PerProcess;
use crate::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long a caller spins while its helpers finish their last tasks.
const LAST_TASK: Duration = Duration::from_micros(200);
const MOST_THREADS: usize = 1024;

/// The worker threads of the pool, which work beside the calling threads.
pub(super) struct Workers {
    pub(super) pool: rayon::ThreadPool,
    /// Number of workers that are not reserved by a call.
    idle: AtomicUsize,
    places: Arc<Places>,
}

impl Workers {
    /// Reserves up to `most` idle workers. A call never waits for workers that are reserved by another call.
    pub(super) fn reserve(&self, most: usize) -> Reserved<'_> {
        let take = |idle: usize| Some(idle - idle.min(most));
        let idle = self.idle.fetch_update(Ordering::Acquire, Ordering::Relaxed, take);
        let count = idle.map_or(0, |idle| idle.min(most));
        if count > 0 {
            self.places.leave_callers_cpu();
        }
        Reserved { workers: self, count }
    }
}

/// The workers that one call has reserved; they are idle again when this is dropped.
pub(super) struct Reserved<'a> {
    workers: &'a Workers,
    pub(super) count: usize,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.workers.idle.fetch_add(self.count, Ordering::Release);
    }
}

#[derive(Clone)]
pub(super) struct Pool {
    pub(super) threads: usize,
    /// `None` if the caller's thread is the only one.
    pub(super) workers: Option<Arc<Workers>>,
}

impl Pool {
    /// Calls `work` on the calling thread, and on as many of up to `helpers` workers as are idle.
    pub(super) fn run(&self, helpers: usize, work: &(impl Fn() + Sync)) {
        let Some(workers) = &self.workers else { return work() };
        let helpers = workers.reserve(helpers);
        let at_work = AtomicUsize::new(helpers.count);
        workers.pool.in_place_scope(|scope| {
            for _ in 0..helpers.count {
                scope.spawn(|_| {
                    work();
                    at_work.fetch_sub(1, Ordering::Release);
                });
            }
            work();
            // Helpers are on their last task. To sleep until they are done and be woken takes longer than that mostly does.
            let start = Instant::now();
            while at_work.load(Ordering::Acquire) > 0 && start.elapsed() < LAST_TASK {
                std::hint::spin_loop();
            }
        });
    }
}

static POOL: PerProcess<Pool> = PerProcess::new();

fn build(threads: usize) -> Result<Pool, Error> {
    let workers = match threads {
        1 => None,
        n => {
            let places = Arc::new(Places::default());
            let arrivals = Arc::clone(&places);
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(n - 1)
                .thread_name(|i| format!("batchnorm-{i}"))
                .start_handler(move |_| arrivals.arrive())
                .build()
                .map_err(|e| Error::Threads { got: format!("{n} ({e})") })?;
            Some(Arc::new(Workers { pool, idle: AtomicUsize::new(n - 1), places }))
        }
    };
    Ok(Pool { threads, workers })
}

/// The default number of threads: `BATCHNORM_NUM_THREADS`, or the number of CPUs that the affinity mask and the cgroup
/// quota leave to this process. It is determined once.
pub(super) fn default_threads() -> Result<usize, Error> {
    /// 0 until it is known. (A `OnceLock` that another thread fills during a fork would block the child for ever.)
    static DEFAULT: AtomicUsize = AtomicUsize::new(0);
    match DEFAULT.load(Ordering::Relaxed) {
        0 => read_default_threads().inspect(|&n| DEFAULT.store(n, Ordering::Relaxed)),
        n => Ok(n),
    }
}

fn read_default_threads() -> Result<usize, Error> {
    match std::env::var("BATCHNORM_NUM_THREADS") {
        Ok(text) => match text.trim().parse() {
            Ok(n) if (1..=MOST_THREADS).contains(&n) => Ok(n),
            _ => Err(Error::Threads { got: format!("{text:?} (environment variable BATCHNORM_NUM_THREADS)") }),
        },
        Err(std::env::VarError::NotPresent) => Ok(std::thread::available_parallelism().map_or(1, usize::from)),
        Err(e) => Err(Error::Threads { got: format!("{e} (environment variable BATCHNORM_NUM_THREADS)") }),
    }
}

/// The pool of this process, made at first use; in a forked child with as many threads as its parent had.
pub(super) fn pool() -> Result<Pool, Error> {
    let pool = POOL.get(|of_parent| build(of_parent.map_or_else(default_threads, |pool| Ok(pool.threads))?))?;
    Ok((**pool).clone())
}

/// The number of threads that the pool has, or will have when it is made.
pub(super) fn threads() -> Result<usize, Error> {
    POOL.found().map_or_else(default_threads, |pool| Ok(pool.threads))
}

/// Sets the number of threads that work on one call, including the caller's. Results do not depend on it.
///
/// # Errors
/// [`Error::Threads`] unless 1 ≤ `n` ≤ 1024 and the system can start that many.
pub fn set_num_threads(n: usize) -> Result<(), Error> {
    if !(1..=MOST_THREADS).contains(&n) {
        return Err(Error::Threads { got: n.to_string() });
    }
    POOL.set(build(n)?);
    Ok(())
}

/// The number of threads that work on one call, including the caller's.
///
/// # Errors
/// [`Error::Threads`] if `BATCHNORM_NUM_THREADS` is not a number from 1 to 1024.
pub fn get_num_threads() -> Result<usize, Error> {
    threads()
}
