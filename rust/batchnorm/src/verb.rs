//! What every verb does first.

use crate::error::Error;
use crate::float_mode::FloatMode;
use crate::{parallel, simd};

/// Refuses what the environment names wrongly, and puts floating point in the standard mode while the result lives.
pub(crate) fn begin() -> Result<FloatMode, Error> {
    simd::simd_level()?;
    parallel::check()?;
    Ok(FloatMode::standard())
}
