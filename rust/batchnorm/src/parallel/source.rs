//! Whose threads work on a call: our own, or those of an OpenMP team. The choice of the process, and that of one call.

use super::pool;
use super::team::Team;
use crate::error::Error;
use arc_swap::ArcSwapOption;
use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

/// Whose threads work on a call beside the calling thread. Results do not depend on it.
#[derive(Debug, Clone, Copy)]
pub enum ThreadSource {
    /// Threads of our own.
    Own,
    /// The team of an OpenMP runtime, asked for [`crate::get_num_threads`] threads.
    OpenMp(Team),
}

impl ThreadSource {
    /// The source of a name, as [`crate::set_thread_source`] takes it: "own" or "openmp".
    ///
    /// With "openmp", `library` is where the runtime is ([`Team::find`]); `None` stands for the one that the process has,
    /// else for `libgomp.so.1`. If there is neither, the source is [`ThreadSource::Own`].
    ///
    /// # Errors
    /// [`Error::ThreadSource`] for another name, or if `library` is given with "own";
    /// [`Error::Library`] if `library` cannot be loaded or has no `GOMP_parallel`.
    pub fn find(name: &str, library: Option<&Path>) -> Result<Self, Error> {
        let team = match (name, library) {
            ("own", None) => None,
            ("own", Some(path)) => {
                return Err(Error::ThreadSource { got: format!("\"own\" with library {path:?}") });
            }
            ("openmp", Some(path)) => Team::find(Some(path))?,
            ("openmp", None) => match Team::find(None)? {
                Some(team) => Some(team),
                None => Team::find(Some(Path::new("libgomp.so.1"))).unwrap_or_default(),
            },
            _ => return Err(Error::ThreadSource { got: format!("{name:?}") }),
        };
        Ok(team.map_or(Self::Own, Self::OpenMp))
    }

    /// "own" or "openmp".
    pub fn name(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::OpenMp(_) => "openmp",
        }
    }
}

/// The choice of the process; `None` before it is made. (It holds no lock, so a forked child may read it.)
static CHOSEN: ArcSwapOption<ThreadSource> = ArcSwapOption::const_empty();

/// The choice of the process, made by `BATCHNORM_THREAD_SOURCE` if nobody else has made one.
pub(super) fn chosen() -> Result<ThreadSource, Error> {
    if let Some(source) = CHOSEN.load().as_deref() {
        return Ok(*source);
    }
    let source = match std::env::var("BATCHNORM_THREAD_SOURCE") {
        Ok(name) => ThreadSource::find(name.trim(), None),
        Err(std::env::VarError::NotPresent) => Ok(ThreadSource::Own),
        Err(e) => Err(Error::ThreadSource { got: e.to_string() }),
    };
    let source = source.map_err(|e| match e {
        Error::ThreadSource { got } => {
            Error::ThreadSource { got: format!("{got} (environment variable BATCHNORM_THREAD_SOURCE)") }
        }
        other => other,
    })?;
    // Where another thread has made a choice since, that one holds.
    let before = CHOSEN.compare_and_swap(&None::<Arc<ThreadSource>>, Some(Arc::new(source)));
    Ok(before.as_deref().copied().unwrap_or(source))
}

/// Sets whose threads work on calls. Results do not depend on it.
pub fn set_thread_source(source: ThreadSource) {
    CHOSEN.store(Some(Arc::new(source)));
}

/// Whose threads work on calls: what was set, else what `BATCHNORM_THREAD_SOURCE` says, else our own; in a forked child
/// our own, since the team does not exist there.
///
/// # Errors
/// [`Error::ThreadSource`] if `BATCHNORM_THREAD_SOURCE` is neither "own" nor "openmp".
pub fn get_thread_source() -> Result<ThreadSource, Error> {
    Ok(match chosen()? {
        ThreadSource::OpenMp(team) if !team.usable() => ThreadSource::Own,
        source => source,
    })
}

/// The choice for the calls that a thread makes now.
#[derive(Clone, Copy)]
struct Host {
    team: Option<Team>,
    threads: usize,
}

thread_local! {
    static HOST: Cell<Option<Host>> = const { Cell::new(None) };
}

/// Calls `work` as the guest of a host library: passes that it makes on this thread run on `team`, asked for exactly
/// `threads` threads, whatever is set for the process.
///
/// Without a team, or in a forked child, they run on threads of our own, at most `threads` of them and the number that is
/// set for the process. Outputs are written through the caches, since the next operator of the host reads them.
pub fn hosted<R>(team: Option<Team>, threads: usize, work: impl FnOnce() -> R) -> R {
    /// Puts the former choice back, also in a panic.
    struct Restore(Option<Host>);
    impl Drop for Restore {
        fn drop(&mut self) {
            HOST.set(self.0);
        }
    }
    let _restore = Restore(HOST.replace(Some(Host { team, threads })));
    work()
}

/// Whether this thread makes its calls as the guest of a host library.
pub(crate) fn is_hosted() -> bool {
    HOST.get().is_some()
}

/// Whose threads work on a call that this thread makes now, and at most how many, its own included.
pub(super) fn of_this_call() -> Result<(ThreadSource, usize), Error> {
    let (source, threads) = match HOST.get() {
        Some(Host { team, threads }) => (team.map_or(ThreadSource::Own, ThreadSource::OpenMp), threads),
        None => (chosen()?, pool::threads()?),
    };
    Ok(match source {
        ThreadSource::OpenMp(team) if team.usable() => (source, threads),
        _ => (ThreadSource::Own, threads.min(pool::threads()?)),
    })
}
