//! Kernels: the loops over tensor memory.
//!
//! Each is written once, over [`Lanes`], and runs through [`crate::simd::dispatch`]. *Planar* kernels work on runs of
//! adjacent values of one channel, *interleaved* ones on rows in which every column is a channel.

mod interleaved;
mod map;
mod passing;
mod patch;
mod planar;
mod transfer;

use crate::simd::Lanes;
pub(crate) use interleaved::{DxRows, GradientSumRows, MomentRows, NormalizeRows, ROWS};
pub(crate) use map::{ActivationBackward, DxCoefficients, normalize_one};
pub(crate) use patch::{GatherRows, GatherRuns, OrderedProduct, Rows, ScaleAndShift, ScatterRows, ScatterRuns};
pub(crate) use planar::{DxRuns, GradientSumRuns, MomentRuns, NormalizeRuns, TOGETHER};
pub(crate) use transfer::Transfer;

/// Number of lanes of every sum, whatever the register width. Sixteen are four AVX2 registers of float64, which hide the
/// latency of an addition.
pub(crate) const LANES: usize = 16;

/// The sixteen lanes of a sum, in vectors of four float64.
type Sum<L> = [<L as Lanes>::D; LANES / 4];

/// Adds up the lanes of a sum in a fixed tree.
#[inline(always)]
fn total<L: Lanes>(sum: Sum<L>) -> f64 {
    let eight = [L::add(sum[0], sum[2]), L::add(sum[1], sum[3])];
    let [a, b, c, d] = L::put(L::add(eight[0], eight[1]));
    (a + c) + (b + d)
}

/// Turns sums of `n` deviations from a pivot, and of their squares, into mean and M2.
///
/// The third result says whether cancellation cost M2 more than a factor of 3 in accuracy: then a second pass, with the
/// mean as pivot, is needed.
#[inline(always)]
fn close(pivot: f64, sum: f64, squares: f64, n: f64) -> (f64, f64, bool) {
    let square_of_sum = sum * sum / n;
    let m2 = squares - square_of_sum;
    // Rounding may leave M2 just below 0; a NaN stays NaN.
    (pivot + sum / n, if m2 < 0.0 { 0.0 } else { m2 }, square_of_sum > 2.0 * m2)
}
