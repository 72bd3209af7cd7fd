//! Threads. The only file that names rayon: a pool of our own, never the global one.
//!
//! The calling thread works too, so a pool of n threads has n − 1 workers. Which thread computes what is left to
//! chance; what is computed is not (see [`crate::blocks`]).

use crate::{error::Error, simd::FloatMode};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Below this many bytes the work is done before a sleeping thread has woken.
const WORTH_A_THREAD: usize = 1 << 20;
const MOST_THREADS: usize = 1024;
/// How long a caller stays awake for the last tasks of its helpers.
const LAST_TASK: Duration = Duration::from_micros(200);

/// The threads beside the callers'.
struct Workers {
    pool: rayon::ThreadPool,
    /// How many are not at work for some call.
    idle: AtomicUsize,
    places: Arc<Places>,
}

impl Workers {
    /// Takes up to `most` idle workers. A call never waits for one that is at work for another call.
    fn reserve(&self, most: usize) -> Reserved<'_> {
        let take = |idle: usize| Some(idle - idle.min(most));
        let idle = self.idle.fetch_update(Ordering::Acquire, Ordering::Relaxed, take);
        let count = idle.map_or(0, |idle| idle.min(most));
        if count > 0 {
            self.places.leave_callers_cpu();
        }
        Reserved { workers: self, count }
    }
}

/// Where workers may run: anywhere but on the CPU of the caller.
///
/// Linux likes to wake a thread on the CPU of the one that wakes it, which here goes on working: of two threads on two
/// CPUs one then waits for the other until the call is over. Measured on such a machine after 30 ms of rest: 16 MB are
/// normalized in 2.4 ms by one thread, in 2.4 ms by two as they come, in 1.4 ms by two told apart.
#[derive(Default)]
struct Places {
    #[cfg(target_os = "linux")]
    workers: Mutex<Vec<(rustix::thread::Pid, rustix::thread::CpuSet)>>,
    /// One more than the CPU that workers now keep away from; 0 before the first call.
    #[cfg(target_os = "linux")]
    left: AtomicUsize,
}

#[cfg(target_os = "linux")]
impl Places {
    /// A worker begins: wherever it may run now, it may run later.
    fn arrive(&self) {
        if let Ok(cpus) = rustix::thread::sched_getaffinity(None) {
            self.workers.lock().unwrap_or_else(PoisonError::into_inner).push((rustix::thread::gettid(), cpus));
            self.left.store(0, Ordering::Relaxed); // calls that came before know nothing of it
        }
    }

    /// Keeps workers off the CPU that the caller is on. Where that cannot be, they stay as they are: it is about time,
    /// not about results.
    fn leave_callers_cpu(&self) {
        let cpu = rustix::thread::sched_getcpu();
        if self.left.swap(cpu + 1, Ordering::Relaxed) == cpu + 1 {
            return;
        }
        for (worker, cpus) in self.workers.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let mut others = *cpus;
            if cpu < rustix::thread::CpuSet::MAX_CPU {
                others.unset(cpu);
            }
            if others.count() > 0 {
                let _ = rustix::thread::sched_setaffinity(Some(*worker), &others);
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
impl Places {
    fn arrive(&self) {}
    fn leave_callers_cpu(&self) {}
}

/// Workers of one call, idle again when it is dropped.
struct Reserved<'a> {
    workers: &'a Workers,
    count: usize,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.workers.idle.fetch_add(self.count, Ordering::Release);
    }
}

struct Pool {
    /// The process that made the pool: its threads do not exist in a forked child.
    process: u32,
    threads: usize,
    /// `None` where one thread is all there is.
    workers: Option<Arc<Workers>>,
}

static POOL: Mutex<Option<Pool>> = Mutex::new(None);

fn lock() -> MutexGuard<'static, Option<Pool>> {
    // The guarded value is replaced whole, so a panic elsewhere cannot have left it half made.
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

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
    Ok(Pool { process: std::process::id(), threads, workers })
}

/// `BATCHNORM_NUM_THREADS`, or the CPUs that the affinity mask and the cgroup quota leave to this process. Read once.
fn default_threads() -> Result<usize, Error> {
    static DEFAULT: OnceLock<Result<usize, Error>> = OnceLock::new();
    DEFAULT.get_or_init(read_default_threads).clone()
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

/// The pool of this process, made at first use and again in a forked child.
fn pool() -> Result<(usize, Option<Arc<Workers>>), Error> {
    let mut slot = lock();
    let threads = match &*slot {
        Some(pool) if pool.process == std::process::id() => return Ok((pool.threads, pool.workers.clone())),
        Some(of_parent) => of_parent.threads,
        None => default_threads()?,
    };
    let pool = build(threads)?;
    let found = (pool.threads, pool.workers.clone());
    // A parent's pool is leaked in the child: dropping it would signal threads that do not exist here.
    std::mem::forget(slot.replace(pool));
    Ok(found)
}

/// Sets the number of threads that work on one call, the caller's own included. Results do not depend on it.
///
/// # Errors
/// [`Error::Threads`] unless 1 ≤ `n` ≤ 1024 and the system gives that many.
pub fn set_num_threads(n: usize) -> Result<(), Error> {
    if !(1..=MOST_THREADS).contains(&n) {
        return Err(Error::Threads { got: n.to_string() });
    }
    let pool = build(n)?;
    let old = lock().replace(pool);
    if old.as_ref().is_some_and(|old| old.process != std::process::id()) {
        std::mem::forget(old);
    }
    Ok(())
}

/// The number of threads that work on one call.
///
/// # Errors
/// [`Error::Threads`] where `BATCHNORM_NUM_THREADS` is not a number from 1 to 1024.
pub fn get_num_threads() -> Result<usize, Error> {
    Ok(pool()?.0)
}

/// Refuses what `BATCHNORM_NUM_THREADS` may say wrongly, before a verb does anything.
pub(crate) fn check() -> Result<(), Error> {
    default_threads().map(drop)
}

/// Calls `f(0)`, …, `f(tasks − 1)`, on several threads where `bytes` of memory traffic make it worth while, and gives
/// the results in order. Floating point is in the standard mode throughout.
pub(crate) fn map<R: Send + Sync>(tasks: usize, bytes: usize, f: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let alone = || {
        let _mode = FloatMode::standard();
        (0..tasks).map(&f).collect()
    };
    if tasks < 2 || bytes < WORTH_A_THREAD {
        return alone();
    }
    // A pool that the system refuses costs time, not correctness.
    let Ok((threads, Some(workers))) = pool() else {
        return alone();
    };
    let helpers = workers.reserve((threads - 1).min(tasks - 1));
    if helpers.count == 0 {
        return alone();
    }
    let next = AtomicUsize::new(0);
    let results: Vec<OnceLock<R>> = (0..tasks).map(|_| OnceLock::new()).collect();
    let at_work = AtomicUsize::new(helpers.count);
    let work = || {
        let _mode = FloatMode::standard();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(slot) = results.get(i) else { break };
            let _ = slot.set(f(i)); // `i` is handed out once, so the slot is empty
        }
    };
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
    results.into_iter().filter_map(OnceLock::into_inner).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]
    use super::*;
    use std::sync::{Barrier, mpsc};

    #[test]
    fn a_call_does_not_wait_for_the_workers_of_another() {
        set_num_threads(2).unwrap();
        let (started, finish) = (Barrier::new(3), Barrier::new(3));
        let (done, result) = mpsc::channel();
        std::thread::scope(|scope| {
            // Both threads of the pool hang in this call until the other one has come back.
            scope.spawn(|| {
                map(2, WORTH_A_THREAD, |_| {
                    started.wait();
                    finish.wait();
                })
            });
            started.wait();
            scope.spawn(move || done.send(map(4, WORTH_A_THREAD, |i| i)));
            let other = result.recv_timeout(Duration::from_secs(20));
            finish.wait();
            assert_eq!(other.unwrap(), [0, 1, 2, 3]);
        });
        let (_, workers) = pool().unwrap();
        assert_eq!(workers.unwrap().idle.load(Ordering::Relaxed), 1, "the worker is idle again");
    }
}
