//! Kernels, the instruction-set levels they are compiled for, and the choice between them.
//!
//! A kernel is written once, in [`Lanes`], and compiled once a level. Since no level fuses a multiply with an add, and
//! lanes are combined in an order that does not depend on the register width, all levels give the same bits (contract 3).

#![allow(unsafe_code, reason = "instruction sets and the floating-point mode")]

mod elements;
mod interleaved;
mod lanes;
mod level;
mod map;
mod mode;
mod planar;

pub(crate) use elements::Vectors;
pub(crate) use interleaved::{DxRows, GradientSumRows, MomentRows, NormalizeRows, ROWS};
use lanes::Lanes;
pub(crate) use level::dispatch;
pub use level::{Level, set_simd_level, simd_level, simd_levels};
pub(crate) use map::{DxCoefficients, ReluBackward, Transfer};
pub(crate) use mode::FloatMode;
pub(crate) use planar::{DxRuns, GradientSumRuns, MomentRuns, NormalizeRuns, TOGETHER};

/// A piece of work compiled once for each level.
pub(crate) trait Kernel {
    type Output;
    /// Must be `#[inline(always)]`, and so must all that it calls: only then is it compiled for the level.
    fn run<L: Lanes>(self) -> Self::Output;
}

/// Lanes of every sum, whatever the register width: four AVX2 registers of float64, so that the latency of an addition
/// is hidden.
pub(crate) const LANES: usize = 16;

/// Sixteen lanes of a sum.
type Sum<L> = [<L as Lanes>::D; LANES / 4];

/// Adds up lanes in a fixed tree.
#[inline(always)]
fn total<L: Lanes>(sum: Sum<L>) -> f64 {
    let eight = [L::add(sum[0], sum[2]), L::add(sum[1], sum[3])];
    let [a, b, c, d] = L::put(L::add(eight[0], eight[1]));
    (a + c) + (b + d)
}

/// Closes sums of deviations from a pivot: mean, M2, and whether M2 lost more than a factor of 3 in accuracy to
/// cancellation, so that a pass about the mean itself is due.
#[inline(always)]
fn close(pivot: f64, sum: f64, squares: f64, n: f64) -> (f64, f64, bool) {
    let square_of_sum = sum * sum / n;
    let m2 = squares - square_of_sum;
    // Rounding may leave a sum of squares just below 0; a NaN stays one.
    (pivot + sum / n, if m2 < 0.0 { 0.0 } else { m2 }, square_of_sum > 2.0 * m2)
}
