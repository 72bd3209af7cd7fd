//! Lanes as arrays, for every machine.

use super::Lanes;
use crate::simd::Kernel;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::array::from_fn;

/// Runs a kernel with the instructions of the compiler's target.
#[inline(never)]
pub(in crate::simd) fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Portable>()
}

/// Lanes as arrays, which the compiler vectorizes as it can.
#[derive(Clone, Copy)]
pub(super) struct Portable;

#[inline(always)]
fn zip<V: Copy, const N: usize>(a: [V; N], b: [V; N], f: impl Fn(V, V) -> V) -> [V; N] {
    from_fn(|lane| f(a[lane], b[lane]))
}

impl Lanes for Portable {
    type D = [f64; 4];
    type S = [f32; 8];
    type Mask = [bool; 8];

    #[inline(always)]
    fn splat(value: f64) -> Self::D {
        [value; 4]
    }
    #[inline(always)]
    fn get(values: [f64; 4]) -> Self::D {
        values
    }
    #[inline(always)]
    fn put(d: Self::D) -> [f64; 4] {
        d
    }
    #[inline(always)]
    fn add(a: Self::D, b: Self::D) -> Self::D {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(a: Self::D, b: Self::D) -> Self::D {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(a: Self::D, b: Self::D) -> Self::D {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn relu(v: Self::D) -> Self::D {
        v.map(|v| if v <= 0.0 { 0.0 } else { v })
    }
    #[inline(always)]
    fn at_most(v: Self::D, top: Self::D) -> Self::D {
        zip(v, top, |v, top| if v > top { top } else { v })
    }
    #[inline(always)]
    fn above(a: [Self::D; 2], b: [Self::D; 2]) -> [bool; 8] {
        from_fn(|lane| a[lane / 4][lane % 4] > b[lane / 4][lane % 4])
    }
    #[inline(always)]
    fn within(d: [Self::D; 2], least: [Self::D; 2], most: [Self::D; 2]) -> [bool; 8] {
        from_fn(|lane| (least[lane / 4][lane % 4]..=most[lane / 4][lane % 4]).contains(&d[lane / 4][lane % 4]))
    }
    #[inline(always)]
    fn masked(d: [Self::D; 2], mask: [bool; 8]) -> [Self::D; 2] {
        from_fn(|half| from_fn(|lane| if mask[4 * half + lane] { d[half][lane] } else { 0.0 }))
    }
    #[inline(always)]
    fn keep(d: Self::D, mask: [u64; 4]) -> Self::D {
        from_fn(|lane| f64::from_bits(d[lane].to_bits() & mask[lane]))
    }
    #[inline(always)]
    fn of_f32(values: [f32; 4]) -> Self::D {
        values.map(f64::from)
    }
    #[inline(always)]
    fn to_f32(d: Self::D) -> [f32; 4] {
        d.map(|d| d as f32)
    }
    #[inline(always)]
    fn splat_s(value: f32) -> Self::S {
        [value; 8]
    }
    #[inline(always)]
    fn get_s(values: [f32; 8]) -> Self::S {
        values
    }
    #[inline(always)]
    fn put_s(s: Self::S) -> [f32; 8] {
        s
    }
    #[inline(always)]
    fn add_s(a: Self::S, b: Self::S) -> Self::S {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub_s(a: Self::S, b: Self::S) -> Self::S {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul_s(a: Self::S, b: Self::S) -> Self::S {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn relu_s(v: Self::S) -> Self::S {
        v.map(|v| if v <= 0.0 { 0.0 } else { v })
    }
    #[inline(always)]
    fn at_most_s(v: Self::S, top: Self::S) -> Self::S {
        zip(v, top, |v, top| if v > top { top } else { v })
    }
    #[inline(always)]
    fn above_s(a: Self::S, b: Self::S) -> [bool; 8] {
        from_fn(|lane| a[lane] > b[lane])
    }
    #[inline(always)]
    fn within_s(s: Self::S, least: Self::S, most: Self::S) -> [bool; 8] {
        from_fn(|lane| (least[lane]..=most[lane]).contains(&s[lane]))
    }
    #[inline(always)]
    fn masked_s(s: Self::S, mask: [bool; 8]) -> Self::S {
        from_fn(|lane| if mask[lane] { s[lane] } else { 0.0 })
    }
    #[inline(always)]
    fn masked_16(bits: [u16; 8], mask: [bool; 8]) -> [u16; 8] {
        from_fn(|lane| if mask[lane] { bits[lane] } else { 0 })
    }
    #[inline(always)]
    fn of_f16(values: [f16; 8]) -> Self::S {
        let mut wide = [0.0; 8];
        values.convert_to_f32_slice(&mut wide);
        wide
    }
    #[inline(always)]
    fn to_f16(s: Self::S) -> [f16; 8] {
        let mut narrow = [f16::ZERO; 8];
        narrow.convert_from_f32_slice(&s);
        narrow
    }
    #[inline(always)]
    fn of_bf16(values: [bf16; 8]) -> Self::S {
        values.map(bf16::to_f32)
    }
    #[inline(always)]
    fn to_bf16(s: Self::S) -> [bf16; 8] {
        s.map(bf16::from_f32)
    }
    #[inline(always)]
    fn widen(s: Self::S) -> [Self::D; 2] {
        [from_fn(|lane| s[lane].into()), from_fn(|lane| s[lane + 4].into())]
    }
    #[inline(always)]
    fn narrow([low, high]: [Self::D; 2]) -> Self::S {
        from_fn(|lane| if lane < 4 { low[lane] as f32 } else { high[lane - 4] as f32 })
    }
}
