//! Kernels, the instruction-set levels they are compiled for, and the choice between them.
//!
//! A kernel is written once, over a fixed number of lanes, and compiled once a level. Since no level fuses a multiply
//! with an add, and lanes are combined in an order that does not depend on the register width, all levels give the
//! same bits (contract 3).

#![allow(unsafe_code, reason = "instruction sets and the floating-point mode")]

use crate::element::Element;

mod interleaved;
mod level;
mod mode;
mod planar;

pub(crate) use interleaved::{AffineRows, ApplyRows, MomentRows, SumRows};
pub(crate) use level::dispatch;
pub use level::{Level, set_simd_level, simd_level, simd_levels};
pub(crate) use mode::FloatMode;
pub(crate) use planar::{AffineRuns, ApplyRuns, MomentRuns, SumRuns};

/// A piece of work compiled once for each level.
pub(crate) trait Kernel {
    type Output;
    /// Must be `#[inline(always)]`, and so must all that it calls: only then is it compiled for the level.
    fn run(self) -> Self::Output;
}

/// Lanes of every sum, whatever the register width: four AVX2 registers of float64, so that the latency of an addition
/// is hidden.
pub(crate) const LANES: usize = 16;

/// An empty instruction that the compiler cannot see through. A loop that holds it is left as it is written, one step of
/// lanes at a time: regrouped across steps, lanes would be gathered one by one (measured: five times slower).
#[inline(always)]
fn step_barrier() {
    // SAFETY: no instruction is emitted, and nothing is touched.
    unsafe { std::arch::asm!("", options(nomem, nostack, preserves_flags)) };
}

/// Adds up lanes in a fixed tree.
#[inline(always)]
fn total(mut lanes: [f64; LANES]) -> f64 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
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

/// The expression that defines inference (contract 1), each operation rounded: (x − mean)·s + β.
#[inline(always)]
fn affine<T: Element>(x: T, [high, low, s, beta]: [T::Wide; 4]) -> T {
    let d = x.widen() - high;
    let d = if T::SPLIT_MEAN { d - low } else { d };
    T::narrow(d * s + beta)
}

/// What dx needs of a channel: dx = ((dy − dβ/m) − (x − mean)·(dγ/(m·√(σ²+ε)))) · γ/√(σ²+ε), in float64.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Apply {
    pub(crate) mean: f64,
    /// dβ/m
    pub(crate) offset: f64,
    /// dγ/(m·√(σ²+ε))
    pub(crate) slope: f64,
    /// γ/√(σ²+ε)
    pub(crate) scale: f64,
}

impl Apply {
    #[inline(always)]
    fn dx<T: Element>(self, dy: T, x: T) -> T {
        T::from_f64(((dy.to_f64() - self.offset) - (x.to_f64() - self.mean) * self.slope) * self.scale)
    }
}
