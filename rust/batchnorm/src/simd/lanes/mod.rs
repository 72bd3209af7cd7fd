//! Lanes: arithmetic on four float64 or eight float32 at a time, and conversions of elements to and from them.
//!
//! Kernels call these operations instead of writing loops over lanes, since whether a compiler vectorizes such a loop
//! changes with every edit (measured: up to five times slower). No operation fuses a multiply with an add, so every level
//! rounds alike.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
pub(super) mod portable;

use half::{bf16, f16};

/// The vectors of an instruction-set level.
pub trait Lanes: Copy + 'static {
    /// A vector of four float64.
    type D: Copy;
    /// A vector of eight float32.
    type S: Copy;
    /// Which of eight lanes.
    type Mask: Copy;

    /// One value in all lanes.
    fn splat(value: f64) -> Self::D;
    /// Loads four lanes.
    fn get(values: [f64; 4]) -> Self::D;
    /// Stores four lanes.
    fn put(d: Self::D) -> [f64; 4];
    /// a + b
    fn add(a: Self::D, b: Self::D) -> Self::D;
    /// a − b
    fn sub(a: Self::D, b: Self::D) -> Self::D;
    /// a · b
    fn mul(a: Self::D, b: Self::D) -> Self::D;
    /// 0 where v ≤ 0, else v.
    fn relu(v: Self::D) -> Self::D;
    /// top where v > top, else v.
    fn at_most(v: Self::D, top: Self::D) -> Self::D;
    /// Where a > b, in eight lanes.
    fn above(a: [Self::D; 2], b: [Self::D; 2]) -> Self::Mask;
    /// Whether least ≤ d ≤ most; no for NaN.
    fn within(d: [Self::D; 2], least: [Self::D; 2], most: [Self::D; 2]) -> Self::Mask;
    /// d in the lanes of the mask, else 0.
    fn masked(d: [Self::D; 2], mask: Self::Mask) -> [Self::D; 2];
    /// Bitwise AND of each lane with its mask.
    fn keep(d: Self::D, mask: [u64; 4]) -> Self::D;
    /// Converts four float32, exactly.
    fn of_f32(values: [f32; 4]) -> Self::D;
    /// Rounds to float32, to nearest.
    fn to_f32(d: Self::D) -> [f32; 4];

    /// One value in all lanes.
    fn splat_s(value: f32) -> Self::S;
    /// Loads eight lanes.
    fn get_s(values: [f32; 8]) -> Self::S;
    /// Stores eight lanes.
    fn put_s(s: Self::S) -> [f32; 8];
    /// a + b
    fn add_s(a: Self::S, b: Self::S) -> Self::S;
    /// a − b
    fn sub_s(a: Self::S, b: Self::S) -> Self::S;
    /// a · b
    fn mul_s(a: Self::S, b: Self::S) -> Self::S;
    /// 0 where v ≤ 0, else v.
    fn relu_s(v: Self::S) -> Self::S;
    /// top where v > top, else v.
    fn at_most_s(v: Self::S, top: Self::S) -> Self::S;
    /// Where a > b.
    fn above_s(a: Self::S, b: Self::S) -> Self::Mask;
    /// Whether least ≤ s ≤ most; no for NaN.
    fn within_s(s: Self::S, least: Self::S, most: Self::S) -> Self::Mask;
    /// s in the lanes of the mask, else 0.
    fn masked_s(s: Self::S, mask: Self::Mask) -> Self::S;
    /// Bits in the lanes of the mask, else 0.
    fn masked_16(bits: [u16; 8], mask: Self::Mask) -> [u16; 8];
    /// Converts eight float16, exactly.
    fn of_f16(values: [f16; 8]) -> Self::S;
    /// Rounds to float16, to nearest.
    fn to_f16(s: Self::S) -> [f16; 8];
    /// Converts eight bfloat16, exactly.
    fn of_bf16(values: [bf16; 8]) -> Self::S;
    /// Rounds to bfloat16, to nearest.
    fn to_bf16(s: Self::S) -> [bf16; 8];
    /// Converts the low four and the high four lanes to float64, exactly.
    fn widen(s: Self::S) -> [Self::D; 2];
    /// Rounds the low four and the high four lanes to float32, to nearest.
    fn narrow(d: [Self::D; 2]) -> Self::S;
}
