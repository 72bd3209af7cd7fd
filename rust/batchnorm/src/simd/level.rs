//! Instruction-set levels.

use super::Kernel;
use super::lanes::Portable;
use crate::error::Error;
use std::sync::atomic::{AtomicU8, Ordering};

/// An instruction-set level that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Level {
    /// What the compiler's target has: SSE2 on x86-64, NEON on AArch64.
    Baseline = 1,
    /// AVX2 and F16C; FMA is not used.
    Avx2 = 2,
}

impl Level {
    /// The name by which a level is forced.
    pub fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::Avx2 => "avx2",
        }
    }

    fn available(self) -> bool {
        match self {
            Self::Baseline => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c"),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 => false,
        }
    }
}

/// The level in use; 0 until it is chosen.
static CHOSEN: AtomicU8 = AtomicU8::new(0);

/// The levels that this machine can run, lowest first.
pub fn simd_levels() -> Vec<Level> {
    [Level::Baseline, Level::Avx2].into_iter().filter(|level| level.available()).collect()
}

fn highest() -> Level {
    if Level::Avx2.available() { Level::Avx2 } else { Level::Baseline }
}

fn by_name(name: &str, source: &str) -> Result<Level, Error> {
    simd_levels().into_iter().find(|level| level.name() == name).ok_or_else(|| Error::Level {
        got: format!("{name:?}{source}"),
        wanted: simd_levels().iter().map(|level| level.name()).collect::<Vec<_>>().join(", "),
    })
}

/// The level in use: the one that was set, else the one that `BATCHNORM_SIMD` names, else the highest.
///
/// # Errors
/// [`Error::Level`] where `BATCHNORM_SIMD` names a level that this machine cannot run.
pub fn simd_level() -> Result<Level, Error> {
    match CHOSEN.load(Ordering::Relaxed) {
        1 => Ok(Level::Baseline),
        2 => Ok(Level::Avx2),
        _ => set_simd_level(None),
    }
}

/// Forces a level by name, or (`None`) goes back to the choice made at first use; gives the level now in use. Results
/// do not depend on it.
///
/// # Errors
/// [`Error::Level`] where the name is none of [`simd_levels`].
pub fn set_simd_level(name: Option<&str>) -> Result<Level, Error> {
    let level = match (name, std::env::var("BATCHNORM_SIMD")) {
        (Some(name), _) => by_name(name, "")?,
        (None, Ok(name)) => by_name(name.trim(), " (environment variable BATCHNORM_SIMD)")?,
        (None, Err(_)) => highest(),
    };
    CHOSEN.store(level as u8, Ordering::Relaxed);
    Ok(level)
}

/// Runs a kernel at the level in use.
#[inline]
pub(crate) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    if CHOSEN.load(Ordering::Relaxed) == Level::Avx2 as u8 {
        // SAFETY: `Avx2` is only ever chosen where `available` has found AVX2 and F16C.
        return unsafe { avx2(kernel) };
    }
    baseline(kernel)
}

#[inline(never)]
fn baseline<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Portable>()
}

#[cfg(target_arch = "x86_64")]
#[inline(never)]
#[target_feature(enable = "avx2,f16c")]
fn avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<super::lanes::Avx2>()
}
