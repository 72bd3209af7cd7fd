//! The start of every pass: the environment's settings are checked, and floating point is put in the standard mode.

use crate::error::Error;
use crate::float_mode::FloatMode;
use crate::{parallel, simd};

/// Puts floating point in the standard mode for as long as the result lives.
///
/// # Errors
/// [`Error::Level`], [`Error::Threads`] for a wrong value of an environment variable.
pub(crate) fn begin() -> Result<FloatMode, Error> {
    simd::simd_level()?;
    parallel::check()?;
    Ok(FloatMode::standard())
}
