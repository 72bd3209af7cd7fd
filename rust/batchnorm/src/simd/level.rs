//! The table of instruction-set levels, and the choice of the one in use.

use super::Kernel;
#[cfg(target_arch = "x86_64")]
use super::lanes::avx2;
use super::lanes::portable;
use crate::error::Error;
use std::sync::atomic::{AtomicU8, Ordering};

/// An instruction-set level that kernels are compiled for.
///
/// To add a level, add a variant, its place in `ALL` and its arms below, and its lanes as a file in `lanes/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Level {
    /// The instructions of the compiler's target: SSE2 on x86-64, NEON on AArch64.
    Baseline,
    /// AVX2 and F16C; FMA is not used.
    Avx2,
}

impl Level {
    /// Every level, lowest first; each stands at the index that is its variant's number.
    const ALL: [Self; 2] = [Self::Baseline, Self::Avx2];

    /// The name of the level, as [`set_simd_level`] and `BATCHNORM_SIMD` take it.
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
            Self::Avx2 => avx2::Token::detect().is_some(),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 => false,
        }
    }

    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => match avx2::Token::detect() {
                Some(token) => token.run(kernel),
                None => portable::run(kernel),
            },
            _ => portable::run(kernel),
        }
    }
}

/// The number of the level in use, or `UNKNOWN` before it is chosen.
static CHOSEN: AtomicU8 = AtomicU8::new(UNKNOWN);
const UNKNOWN: u8 = u8::MAX;

#[inline]
fn chosen() -> Option<Level> {
    Level::ALL.get(usize::from(CHOSEN.load(Ordering::Relaxed))).copied()
}

/// The levels that this machine can run, lowest first.
pub fn simd_levels() -> Vec<Level> {
    Level::ALL.into_iter().filter(|level| level.available()).collect()
}

fn highest() -> Level {
    Level::ALL.into_iter().rfind(|level| level.available()).unwrap_or(Level::Baseline)
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
/// [`Error::Level`] if `BATCHNORM_SIMD` is not the name of a level that this machine can run.
pub fn simd_level() -> Result<Level, Error> {
    match chosen() {
        Some(level) => Ok(level),
        None => set_simd_level(None),
    }
}

/// Forces a level by name, or with `None` makes the default choice again; returns the level now in use.
///
/// Results do not depend on the level.
///
/// # Errors
/// [`Error::Level`] if the name (or with `None`, that in `BATCHNORM_SIMD`) is not in [`simd_levels`].
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
    chosen().unwrap_or(Level::Baseline).run(kernel)
}

#[cfg(test)]
mod tests {
    use super::Level;

    #[test]
    fn the_index_of_a_level_is_its_number() {
        for (i, level) in Level::ALL.into_iter().enumerate() {
            assert_eq!(level as usize, i);
        }
        assert!(Level::Baseline.available());
    }
}
