//! Lanes as AVX2 registers; F16C converts 16-bit floats. FMA is not used.

use super::Lanes;
use crate::simd::Kernel;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Proof that this machine has AVX2 and F16C: only [`Token::detect`] makes one.
#[derive(Clone, Copy)]
pub(in crate::simd) struct Token(());

impl Token {
    /// A token if this machine has the instructions; the standard library remembers the answer.
    #[inline]
    pub(in crate::simd) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")).then_some(Self(()))
    }

    /// Runs a kernel with AVX2 and F16C.
    #[inline]
    pub(in crate::simd) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token proves that this machine has the instructions.
        unsafe { run(kernel) }
    }
}

#[inline(never)]
#[target_feature(enable = "avx2,f16c")]
fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2>()
}

/// Lanes as AVX2 registers. Private, since its safe functions rely on the [`Token`] with which [`run`] was called.
#[derive(Clone, Copy)]
struct Avx2;

/// Calls an intrinsic, or turns an array into the register of its size.
macro_rules! avx2 {
    ($e:expr) => {
        // SAFETY: nothing outside this file can name `Avx2`, and `Token::run` uses it where AVX2 and F16C were found;
        // arrays and registers that are transmuted are plain data of one size.
        unsafe { $e }
    };
}

/// The masks of two vectors of four float64 as one of eight lanes.
#[inline(always)]
fn narrowed(low: __m256d, high: __m256d) -> __m256i {
    avx2!({
        // Every second half of them: lanes 0, 1, 4, 5, 2, 3, 6, 7; then in order.
        let mixed = _mm256_shuffle_ps::<0b10_00_10_00>(_mm256_castpd_ps(low), _mm256_castpd_ps(high));
        _mm256_castpd_si256(_mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(mixed)))
    })
}

impl Lanes for Avx2 {
    type D = __m256d;
    type S = __m256;
    /// All bits of a 32-bit lane, or none.
    type Mask = __m256i;

    #[inline(always)]
    fn splat(value: f64) -> __m256d {
        avx2!(_mm256_set1_pd(value))
    }
    #[inline(always)]
    fn get(values: [f64; 4]) -> __m256d {
        avx2!(std::mem::transmute(values))
    }
    #[inline(always)]
    fn put(d: __m256d) -> [f64; 4] {
        avx2!(std::mem::transmute(d))
    }
    #[inline(always)]
    fn add(a: __m256d, b: __m256d) -> __m256d {
        avx2!(_mm256_add_pd(a, b))
    }
    #[inline(always)]
    fn sub(a: __m256d, b: __m256d) -> __m256d {
        avx2!(_mm256_sub_pd(a, b))
    }
    #[inline(always)]
    fn mul(a: __m256d, b: __m256d) -> __m256d {
        avx2!(_mm256_mul_pd(a, b))
    }
    #[inline(always)]
    fn relu(v: __m256d) -> __m256d {
        avx2!(_mm256_and_pd(v, _mm256_cmp_pd::<_CMP_NLE_UQ>(v, _mm256_setzero_pd())))
    }
    /// The instruction returns its second operand where one is NaN.
    #[inline(always)]
    fn at_most(v: __m256d, top: __m256d) -> __m256d {
        avx2!(_mm256_min_pd(top, v))
    }
    #[inline(always)]
    fn above(a: [__m256d; 2], b: [__m256d; 2]) -> __m256i {
        avx2!(narrowed(_mm256_cmp_pd::<_CMP_GT_OQ>(a[0], b[0]), _mm256_cmp_pd::<_CMP_GT_OQ>(a[1], b[1])))
    }
    #[inline(always)]
    fn within(d: [__m256d; 2], least: [__m256d; 2], most: [__m256d; 2]) -> __m256i {
        avx2!({
            let from = [_mm256_cmp_pd::<_CMP_GE_OQ>(d[0], least[0]), _mm256_cmp_pd::<_CMP_GE_OQ>(d[1], least[1])];
            let to = [_mm256_cmp_pd::<_CMP_LE_OQ>(d[0], most[0]), _mm256_cmp_pd::<_CMP_LE_OQ>(d[1], most[1])];
            narrowed(_mm256_and_pd(from[0], to[0]), _mm256_and_pd(from[1], to[1]))
        })
    }
    #[inline(always)]
    fn masked([low, high]: [__m256d; 2], mask: __m256i) -> [__m256d; 2] {
        avx2!({
            let (mask_low, mask_high) = (_mm256_castsi256_si128(mask), _mm256_extracti128_si256::<1>(mask));
            let wide = |mask| _mm256_castsi256_pd(_mm256_cvtepi32_epi64(mask));
            [_mm256_and_pd(low, wide(mask_low)), _mm256_and_pd(high, wide(mask_high))]
        })
    }
    #[inline(always)]
    fn keep(d: __m256d, mask: [u64; 4]) -> __m256d {
        avx2!(_mm256_and_pd(d, std::mem::transmute::<[u64; 4], __m256d>(mask)))
    }
    #[inline(always)]
    fn of_f32(values: [f32; 4]) -> __m256d {
        avx2!(_mm256_cvtps_pd(std::mem::transmute::<[f32; 4], __m128>(values)))
    }
    #[inline(always)]
    fn to_f32(d: __m256d) -> [f32; 4] {
        avx2!(std::mem::transmute(_mm256_cvtpd_ps(d)))
    }
    #[inline(always)]
    fn splat_s(value: f32) -> __m256 {
        avx2!(_mm256_set1_ps(value))
    }
    #[inline(always)]
    fn get_s(values: [f32; 8]) -> __m256 {
        avx2!(std::mem::transmute(values))
    }
    #[inline(always)]
    fn put_s(s: __m256) -> [f32; 8] {
        avx2!(std::mem::transmute(s))
    }
    #[inline(always)]
    fn add_s(a: __m256, b: __m256) -> __m256 {
        avx2!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub_s(a: __m256, b: __m256) -> __m256 {
        avx2!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul_s(a: __m256, b: __m256) -> __m256 {
        avx2!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn relu_s(v: __m256) -> __m256 {
        avx2!(_mm256_and_ps(v, _mm256_cmp_ps::<_CMP_NLE_UQ>(v, _mm256_setzero_ps())))
    }
    /// The instruction returns its second operand where one is NaN.
    #[inline(always)]
    fn at_most_s(v: __m256, top: __m256) -> __m256 {
        avx2!(_mm256_min_ps(top, v))
    }
    #[inline(always)]
    fn above_s(a: __m256, b: __m256) -> __m256i {
        avx2!(_mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b)))
    }
    #[inline(always)]
    fn within_s(s: __m256, least: __m256, most: __m256) -> __m256i {
        avx2!({
            let (from, to) = (_mm256_cmp_ps::<_CMP_GE_OQ>(s, least), _mm256_cmp_ps::<_CMP_LE_OQ>(s, most));
            _mm256_castps_si256(_mm256_and_ps(from, to))
        })
    }
    #[inline(always)]
    fn masked_s(s: __m256, mask: __m256i) -> __m256 {
        avx2!(_mm256_and_ps(s, _mm256_castsi256_ps(mask)))
    }
    #[inline(always)]
    fn masked_16(bits: [u16; 8], mask: __m256i) -> [u16; 8] {
        avx2!({
            let mask = _mm_packs_epi32(_mm256_castsi256_si128(mask), _mm256_extracti128_si256::<1>(mask));
            std::mem::transmute(_mm_and_si128(std::mem::transmute::<[u16; 8], __m128i>(bits), mask))
        })
    }
    #[inline(always)]
    fn of_f16(values: [f16; 8]) -> __m256 {
        avx2!(_mm256_cvtph_ps(std::mem::transmute::<[f16; 8], __m128i>(values)))
    }
    #[inline(always)]
    fn to_f16(s: __m256) -> [f16; 8] {
        avx2!(std::mem::transmute(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(s)))
    }
    #[inline(always)]
    fn of_bf16(values: [bf16; 8]) -> __m256 {
        avx2!({
            let bits = _mm256_cvtepu16_epi32(std::mem::transmute::<[bf16; 8], __m128i>(values));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        })
    }
    /// Rounds to nearest, ties to even, by an addition of 0x7FFF + (lowest bit kept) before the low 16 bits are cut off. A
    /// NaN is made quiet instead.
    #[inline(always)]
    fn to_bf16(s: __m256) -> [bf16; 8] {
        avx2!({
            let bits = _mm256_castps_si256(s);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(s, s));
            let kept = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
            let low = _mm256_castsi256_si128(kept);
            let high = _mm256_extracti128_si256::<1>(kept);
            std::mem::transmute(_mm_packus_epi32(low, high))
        })
    }
    #[inline(always)]
    fn widen(s: __m256) -> [__m256d; 2] {
        avx2!({
            let (low, high) = (_mm256_castps256_ps128(s), _mm256_extractf128_ps::<1>(s));
            [_mm256_cvtps_pd(low), _mm256_cvtps_pd(high)]
        })
    }
    #[inline(always)]
    fn narrow([low, high]: [__m256d; 2]) -> __m256 {
        avx2!({
            let low = _mm256_castps128_ps256(_mm256_cvtpd_ps(low));
            _mm256_insertf128_ps::<1>(low, _mm256_cvtpd_ps(high))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::portable::Portable;
    use super::*;
    use std::array::from_fn;

    /// The conversions of the two levels agree on every 16-bit number, and back on float32 numbers of every kind.
    #[test]
    fn conversions_agree() {
        if Token::detect().is_none() {
            eprintln!("skipped: this machine has no AVX2 with F16C");
            return;
        }
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        for bits in (0..=u16::MAX).step_by(8) {
            let half: [f16; 8] = from_fn(|i| f16::from_bits(bits + i as u16));
            let brain: [bf16; 8] = from_fn(|i| bf16::from_bits(bits + i as u16));
            let (a, b) = (Avx2::put_s(Avx2::of_f16(half)), Portable::of_f16(half));
            let (c, d) = (Avx2::put_s(Avx2::of_bf16(brain)), Portable::of_bf16(brain));
            for i in 0..8 {
                assert!(same(a[i], b[i]) && same(c[i], d[i]), "{bits:#x}");
            }
        }
        for bits in (0..=u32::MAX - 8).step_by(8 * 4099) {
            let wide: [f32; 8] = from_fn(|i| f32::from_bits(bits + i as u32));
            let (a, b) = (Avx2::to_f16(Avx2::get_s(wide)), Portable::to_f16(wide));
            let (c, d) = (Avx2::to_bf16(Avx2::get_s(wide)), Portable::to_bf16(wide));
            for i in 0..8 {
                assert!(same(a[i].to_f32(), b[i].to_f32()) && same(c[i].to_f32(), d[i].to_f32()), "{bits:#x}");
                assert!(!a[i].is_nan() || a[i].to_bits() & 0x200 != 0, "a signalling NaN: {bits:#x}");
            }
        }
    }
}
