//! The four element types, and the precision in which each is normalized.

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

/// The precision in which x is normalized (contract 1): float64 for 32- and 64-bit tensors,
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
    /// Converts from float64; rounds to nearest, ties to even.
    fn from_f64(value: f64) -> Self;
    /// Converts to float64, exactly.
    fn to_f64(self) -> f64;
    /// The numbers themselves, where this precision is float64.
    fn shared(numbers: &[f64]) -> Option<&[Self]>;
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
    fn shared(_: &[f64]) -> Option<&[Self]> {
        None
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
    fn shared(numbers: &[f64]) -> Option<&[Self]> {
        Some(numbers)
    }
}

/// An element of a tensor: [`f32`], [`f64`], [`struct@f16`] or [`bf16`]. Sealed: the numerical contract is stated for these.
pub trait Element: sealed::Sealed + Vectors<Wide: Wide> + Copy + Send + Sync + 'static {
    /// Whether the mean is subtracted as a high and a low part, because one `Wide` is not precise enough for it.
    const SPLIT_MEAN: bool;
    /// The largest `Wide` that rounds to 0 in this type: half its least positive number, since ties go to even.
    const ROUNDS_TO_ZERO: Self::Wide;
    /// The least `Wide` that rounds to 6 in this type: halfway to the number before it, since ties go to even.
    const ROUNDS_TO_SIX: Self::Wide;

    /// Converts to the precision in which x is normalized, exactly.
    fn widen(self) -> Self::Wide;
    /// Converts from the precision in which x is normalized; rounds to nearest, ties to even.
    fn narrow(wide: Self::Wide) -> Self;

    /// Its place in the order of all numbers of the type, from −∞ to ∞; −0 comes just before 0. NaN is beyond either end.
    #[doc(hidden)]
    fn rank(self) -> i64;
    /// The number at a place.
    #[doc(hidden)]
    fn of_rank(rank: i64) -> Self;

    /// Converts to float64, exactly.
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self.widen().to_f64()
    }
    /// Converts from float64; rounds to nearest. 16-bit types are rounded to float32 first and then to 16 bits, which is
    /// the one way that hardware and software share.
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        Self::narrow(Self::Wide::from_f64(value))
    }
}

/// Implements the order of a type's numbers by their bits: read as an integer, those of negative numbers are in reverse order.
macro_rules! ordered_as {
    ($Int:ty, $Bits:ty) => {
        #[inline(always)]
        fn rank(self) -> i64 {
            let bits = self.to_bits() as $Int;
            (if bits < 0 { bits ^ <$Int>::MAX } else { bits }).into()
        }
        #[inline(always)]
        fn of_rank(rank: i64) -> Self {
            let rank = rank as $Int;
            Self::from_bits((if rank < 0 { rank ^ <$Int>::MAX } else { rank }) as $Bits)
        }
    };
}

impl Element for f64 {
    const SPLIT_MEAN: bool = false;
    const ROUNDS_TO_ZERO: Self::Wide = 0.0;
    const ROUNDS_TO_SIX: Self::Wide = 6.0;
    #[inline(always)]
    fn widen(self) -> f64 {
        self
    }
    #[inline(always)]
    fn narrow(wide: f64) -> Self {
        wide
    }
    ordered_as!(i64, u64);
}

impl Element for f32 {
    const SPLIT_MEAN: bool = false;
    const ROUNDS_TO_ZERO: Self::Wide = f64::from_bits((1023 - 150) << 52); // 2^-150
    const ROUNDS_TO_SIX: Self::Wide = 6.0 - 1.0 / (1u64 << 22) as f64;
    #[inline(always)]
    fn widen(self) -> f64 {
        self.into()
    }
    #[inline(always)]
    fn narrow(wide: f64) -> Self {
        wide as f32
    }
    ordered_as!(i32, u32);
}

impl Element for f16 {
    const SPLIT_MEAN: bool = true;
    const ROUNDS_TO_ZERO: Self::Wide = f32::from_bits((127 - 25) << 23); // 2^-25
    const ROUNDS_TO_SIX: Self::Wide = 6.0 - 1.0 / (1u64 << 9) as f32;
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn narrow(wide: f32) -> Self {
        Self::from_f32(wide)
    }
    ordered_as!(i16, u16);
}

impl Element for bf16 {
    const SPLIT_MEAN: bool = true;
    const ROUNDS_TO_ZERO: Self::Wide = f32::from_bits(1 << 15); // 2^-134, subnormal
    const ROUNDS_TO_SIX: Self::Wide = 6.0 - 1.0 / (1u64 << 6) as f32;
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn narrow(wide: f32) -> Self {
        Self::from_f32(wide)
    }
    ordered_as!(i16, u16);
}
