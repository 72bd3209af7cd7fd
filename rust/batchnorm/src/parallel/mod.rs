//! Threads: the map over tasks, and the pool that works on them.
//!
//! The calling thread works too, so a pool of n threads has n − 1 workers. Which thread computes what is left to
//! chance; what is computed is not (see [`crate::partition`]). No other module names rayon.

mod affinity;
mod pool;
mod process;

use crate::error::Error;
use crate::float_mode::FloatMode;
use crate::memory::{collected, with_capacity};
pub use pool::{get_num_threads, set_num_threads};
pub use process::{Owned, PerProcess};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Below this many bytes the work is done before a sleeping thread has woken.
const WORTH_A_THREAD: usize = 1 << 20;
/// How long a caller spins while its helpers finish their last tasks.
const LAST_TASK: Duration = Duration::from_micros(200);

/// Checks the value of `BATCHNORM_NUM_THREADS`.
pub(crate) fn check() -> Result<(), Error> {
    pool::default_threads().map(drop)
}

/// Calls `f(0)`, …, `f(tasks − 1)`, on several threads if `bytes` of memory traffic make it worth while, and returns
/// the results in order. Floating point is in the standard mode throughout.
///
/// # Errors
/// [`Error::NoMemory`] before `f` is called, or the first that `f` returned.
#[allow(clippy::expect_used, reason = "a lost result is a defect, and must not become a shorter list")]
pub(crate) fn map<R: Send + Sync, F>(tasks: usize, bytes: usize, f: F) -> Result<Vec<R>, Error>
where
    F: Fn(usize) -> Result<R, Error> + Sync,
{
    let mut list = with_capacity(tasks)?;
    let alone = |mut list: Vec<R>| {
        let _mode = FloatMode::standard();
        for i in 0..tasks {
            list.push(f(i)?);
        }
        Ok(list)
    };
    if tasks < 2 || bytes < WORTH_A_THREAD {
        return alone(list);
    }
    // A pool that the system refuses costs time, not correctness.
    let Ok(pool::Pool { threads, workers: Some(workers) }) = pool::pool() else {
        return alone(list);
    };
    let helpers = workers.reserve((threads - 1).min(tasks - 1));
    if helpers.count == 0 {
        return alone(list);
    }
    let next = AtomicUsize::new(0);
    let results: Vec<OnceLock<Result<R, Error>>> = collected((0..tasks).map(|_| OnceLock::new()))?;
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
    for slot in results {
        list.push(slot.into_inner().expect("every task was handed out and is done")?);
    }
    Ok(list)
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
                    Ok(())
                })
            });
            started.wait();
            scope.spawn(move || done.send(map(4, WORTH_A_THREAD, Ok)));
            let other = result.recv_timeout(Duration::from_secs(20));
            finish.wait();
            assert_eq!(other.unwrap().unwrap(), [0, 1, 2, 3]);
        });
        let workers = pool::pool().unwrap().workers.unwrap();
        assert_eq!(workers.reserve(2).count, 1, "the worker is idle again");
    }
}
