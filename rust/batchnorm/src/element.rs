//! The four element types, and in what precision each is computed.

use crate::simd::Vectors;
use half::{bf16, f16};
use std::ops::{Add, Mul, Sub};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// The precision in which the affine form of inference is evaluated (contract 1): float64 for 32- and 64-bit tensors,
/// float32 for 16-bit ones.
pub trait Wide:
    sealed::Sealed
    + Copy
    + Default
    + PartialOrd
    + Send
    + Sync
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Add<Output = Self>
    + 'static
{
    /// Rounds to nearest, ties to even.
    fn from_f64(value: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
}

impl Wide for f32 {
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self.into()
    }
}

impl Wide for f64 {
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
}

/// An element of a tensor: [`f32`], [`f64`], [`struct@f16`] or [`bf16`]. Sealed: the numerical contract is stated for these.
pub trait Element: sealed::Sealed + Vectors<Wide: Wide> + Copy + Send + Sync + 'static {
    /// Whether the mean enters the affine form as a high and a low part, since one `Wide` could not hold it.
    const SPLIT_MEAN: bool;
    /// The largest number of that precision that rounds to 0, which is half the least positive number (ties go to even).
    const ROUNDS_TO_ZERO: Self::Wide;

    /// To the precision of the affine form; exact.
    fn widen(self) -> Self::Wide;
    /// From the precision of the affine form; rounds to nearest, ties to even.
    fn narrow(wide: Self::Wide) -> Self;

    /// Exact.
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self.widen().to_f64()
    }
    /// Rounds to nearest; 16-bit types by way of float32, which is the one rounding that hardware and software share.
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        Self::narrow(Self::Wide::from_f64(value))
    }
}

impl Element for f64 {
    const SPLIT_MEAN: bool = false;
    const ROUNDS_TO_ZERO: Self::Wide = 0.0;
    #[inline(always)]
    fn widen(self) -> f64 {
        self
    }
    #[inline(always)]
    fn narrow(wide: f64) -> Self {
        wide
    }
}

impl Element for f32 {
    const SPLIT_MEAN: bool = false;
    const ROUNDS_TO_ZERO: Self::Wide = f64::from_bits((1023 - 150) << 52); // 2^-150
    #[inline(always)]
    fn widen(self) -> f64 {
        self.into()
    }
    #[inline(always)]
    fn narrow(wide: f64) -> Self {
        wide as f32
    }
}

impl Element for f16 {
    const SPLIT_MEAN: bool = true;
    const ROUNDS_TO_ZERO: Self::Wide = f32::from_bits((127 - 25) << 23); // 2^-25
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn narrow(wide: f32) -> Self {
        Self::from_f32(wide)
    }
}

impl Element for bf16 {
    const SPLIT_MEAN: bool = true;
    const ROUNDS_TO_ZERO: Self::Wide = f32::from_bits(1 << 15); // 2^-134, subnormal
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn narrow(wide: f32) -> Self {
        Self::from_f32(wide)
    }
}
