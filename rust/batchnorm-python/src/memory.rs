//! Memory of large outputs, kept for reuse: page faults of fresh memory take longer than the arithmetic that fills it.
//!
//! An array's base is the [`Memory`] that it lies in, so the block comes back when the last view is dropped, in whatever
//! thread that happens. Each block is a memory mapping of its own: it is aligned to pages, and unmapping it returns it to
//! the system.

use batchnorm::PerProcess;
use memmap2::MmapMut;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};

/// Bytes from which the memory of an output is kept. Smaller arrays come from NumPy, since the C library's heap already
/// keeps their memory.
const WORTH_KEEPING: usize = 128 * 1024;

/// Bytes from which huge pages are asked for, as NumPy does: one page fault for 2 MiB instead of one for 4 KiB.
#[cfg(target_os = "linux")]
const WORTH_HUGE_PAGES: usize = 4 << 20;

/// Most bytes that are kept in all, unless one block alone is larger.
const MOST_KEPT: usize = 256 << 20;

/// Kept blocks, which no array uses, the oldest first. A forked child begins with none.
static KEPT: PerProcess<Mutex<Vec<MmapMut>>> = PerProcess::new();

/// Calls `f` with the kept blocks, under their lock. `f` must only move a few pointers, and run no Python code.
fn with_kept<R>(f: impl FnOnce(&mut Vec<MmapMut>) -> R) -> R {
    let Ok(kept) = KEPT.get(|_| Ok::<_, Infallible>(Mutex::default()));
    // Blocks are moved whole, so a panic cannot have left one half moved.
    f(&mut kept.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Whether `BATCHNORM_KEEP_MEMORY` allows memory to be kept. A valid value is read once.
fn keeps() -> Result<bool, String> {
    /// `UNKNOWN` until it is read. (A `OnceLock` that another thread fills during a fork would block the child for ever.)
    static KEEPS: AtomicU8 = AtomicU8::new(UNKNOWN);
    const UNKNOWN: u8 = 2;
    match KEEPS.load(Ordering::Relaxed) {
        UNKNOWN => {
            let keeps = match std::env::var_os("BATCHNORM_KEEP_MEMORY") {
                None => true,
                Some(text) if text == "1" => true,
                Some(text) if text == "0" => false,
                Some(text) => return Err(format!("BATCHNORM_KEEP_MEMORY is {text:?}; wanted 0 or 1")),
            };
            KEEPS.store(keeps.into(), Ordering::Relaxed);
            Ok(keeps)
        }
        keeps => Ok(keeps == 1),
    }
}

/// Frees all kept blocks; returns their bytes.
pub(crate) fn release() -> usize {
    let blocks = with_kept(std::mem::take);
    blocks.iter().map(|block| block.len()).sum()
}

/// The memory that an array lies in, as the array's base.
#[pyclass(frozen, module = "batchnorm._core")]
pub(crate) struct Memory(Option<MmapMut>);

impl Memory {
    /// Memory for an output of `bytes`, or `None` if NumPy should allocate it: it is small, no memory is to be kept, or
    /// the system has no more.
    pub(crate) fn worth_keeping(bytes: usize) -> PyResult<Option<Self>> {
        let worth = bytes >= WORTH_KEEPING && keeps().map_err(PyValueError::new_err)?;
        Ok(if worth { Self::new(bytes) } else { None })
    }

    /// The newest kept block that is large enough and at most a quarter larger than needed, else a fresh block.
    fn new(bytes: usize) -> Option<Self> {
        let fits = |block: &MmapMut| (bytes..=bytes.saturating_add(bytes / 4)).contains(&block.len());
        let reused = with_kept(|kept| kept.iter().rposition(fits).map(|i| kept.remove(i)));
        let fresh = || map(bytes).or_else(|| (release() > 0).then(|| map(bytes)).flatten());
        reused.or_else(fresh).map(|block| Self(Some(block)))
    }

    /// The address of the first byte, which stays the same as long as this lives.
    pub(crate) fn start(&mut self) -> *mut u8 {
        self.0.as_mut().map_or(std::ptr::null_mut(), |block| block.as_mut_ptr())
    }
}

fn map(bytes: usize) -> Option<MmapMut> {
    let block = MmapMut::map_anon(bytes).ok()?;
    #[cfg(target_os = "linux")]
    if bytes >= WORTH_HUGE_PAGES {
        // Only a hint: it works without huge pages too.
        let _ = block.advise(memmap2::Advice::HugePage);
    }
    Some(block)
}

impl Drop for Memory {
    fn drop(&mut self) {
        let Some(block) = self.0.take() else { return };
        // Unmapping takes long, so it is done after the lock is released.
        let surplus: Vec<MmapMut> = with_kept(|kept| {
            let mut bytes = block.len() + kept.iter().map(|old| old.len()).sum::<usize>();
            let mut oldest = 0;
            while bytes > MOST_KEPT && oldest < kept.len() {
                bytes -= kept[oldest].len();
                oldest += 1;
            }
            let surplus = kept.drain(..oldest).collect();
            kept.push(block);
            surplus
        });
        drop(surplus);
    }
}
