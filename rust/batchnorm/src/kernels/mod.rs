//! Kernels: the loops over tensor memory. Each is written once, over [`Lanes`], and runs through [`crate::simd::dispatch`].

mod interleaved;
mod map;
mod planar;

use crate::simd::Lanes;
pub(crate) use interleaved::{DxRows, GradientSumRows, MomentRows, NormalizeRows, ROWS};
pub(crate) use map::{DxCoefficients, ReluBackward, Transfer};
pub(crate) use planar::{DxRuns, GradientSumRuns, MomentRuns, NormalizeRuns, TOGETHER};

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
