//! Instruction-set levels.

use super::Kernel;
#[cfg(target_arch = "x86_64")]
use super::lanes::avx2;
use super::lanes::portable;
use crate::error::Error;
use std::sync::atomic::{AtomicU8, Ordering};

/// An instruction-set level that kernels are compiled for.
///
/// A level is added here and nowhere else: a variant, its place in `ALL`, its arms below, and its lanes in `lanes/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Level {
    /// What the compiler's target has: SSE2 on x86-64, NEON on AArch64.
    Baseline,
    /// AVX2 and F16C; FMA is not used.
    Avx2,
}

impl Level {
    /// Every level, lowest first; the place is the variant's number.
    const ALL: [Self; 2] = [Self::Baseline, Self::Avx2];

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

/// The number of the level in use; `UNKNOWN` until it is chosen.
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
/// [`Error::Level`] where `BATCHNORM_SIMD` names a level that this machine cannot run.
pub fn simd_level() -> Result<Level, Error> {
    match chosen() {
        Some(level) => Ok(level),
        None => set_simd_level(None),
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
    chosen().unwrap_or(Level::Baseline).run(kernel)
}

#[cfg(test)]
mod tests {
    use super::Level;

    #[test]
    fn levels_stand_at_their_numbers() {
        for (i, level) in Level::ALL.into_iter().enumerate() {
            assert_eq!(level as usize, i);
        }
        assert!(Level::Baseline.available());
    }
}
