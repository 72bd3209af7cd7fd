//! Threads: the map over tasks, and those who work on them.
//!
//! The calling thread works too, so a pool of n threads has n − 1 workers. Which thread computes what is left to
//! chance; what is computed is not (see [`crate::partition`]). No other module names rayon or OpenMP.

mod affinity;
mod pool;
mod process;
mod source;
mod team;
#[cfg(test)]
mod tests;

use crate::error::Error;
use crate::float_mode::FloatMode;
use crate::memory::{collected, with_capacity};
pub use pool::{get_num_threads, set_num_threads};
pub use process::{Owned, PerProcess};
pub(crate) use source::is_hosted;
pub use source::{ThreadSource, get_thread_source, hosted, set_thread_source};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
pub use team::Team;

/// Below this many bytes the work is done before a sleeping thread of our own has woken.
const WORTH_A_THREAD: usize = 1 << 20;
/// Below this many bytes the work is done before the threads of a team have begun and come together again.
const WORTH_A_TEAM: usize = 128 << 10;

/// Checks the values of `BATCHNORM_NUM_THREADS` and `BATCHNORM_THREAD_SOURCE`.
pub(crate) fn check() -> Result<(), Error> {
    pool::default_threads()?;
    source::chosen().map(drop)
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
    let Some(crew) = crew(tasks, bytes) else {
        let _mode = FloatMode::standard();
        for i in 0..tasks {
            list.push(f(i)?);
        }
        return Ok(list);
    };
    let next = AtomicUsize::new(0);
    let results: Vec<OnceLock<Result<R, Error>>> = collected((0..tasks).map(|_| OnceLock::new()))?;
    let work = || {
        let _mode = FloatMode::standard();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(slot) = results.get(i) else { break };
            let _ = slot.set(f(i)); // `i` is handed out once, so the slot is empty
        }
    };
    match crew {
        Crew::Own { pool, helpers } => pool.run(helpers, &work),
        Crew::Team { team, threads } => team.run(threads, &work),
    }
    for slot in results {
        list.push(slot.into_inner().expect("every task was handed out and is done")?);
    }
    Ok(list)
}

/// Those who work on a call together.
enum Crew {
    /// The caller, and up to so many workers of our own.
    Own { pool: pool::Pool, helpers: usize },
    /// A team of so many threads, the caller's included, whatever the number of tasks.
    Team { team: Team, threads: usize },
}

/// Those who work on a call; `None` if the caller had better do it alone.
fn crew(tasks: usize, bytes: usize) -> Option<Crew> {
    if tasks < 2 || bytes < WORTH_A_TEAM {
        return None;
    }
    // What the environment says is checked at the start of a pass, and a pool that the system refuses costs time, not
    // correctness.
    match source::of_this_call().ok()? {
        (_, ..2) => None,
        (ThreadSource::OpenMp(team), threads) => Some(Crew::Team { team, threads }),
        (ThreadSource::Own, _) if bytes < WORTH_A_THREAD => None,
        (ThreadSource::Own, threads) => Some(Crew::Own { pool: pool::pool().ok()?, helpers: threads.min(tasks) - 1 }),
    }
}
