//! Lanes: four float64 or eight float32 at a time, and what turns elements into them.
//!
//! Kernels name these operations and not lane loops, since whether a compiler makes vectors of loops changes with every
//! edit (measured: up to five times slower). No operation fuses a multiply with an add, so every level rounds alike.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::array::from_fn;

/// The vectors of an instruction-set level.
pub trait Lanes: Copy + 'static {
    /// Four float64.
    type D: Copy;
    /// Eight float32.
    type S: Copy;

    /// The same value in all lanes.
    fn splat(value: f64) -> Self::D;
    /// Lanes from memory.
    fn get(values: [f64; 4]) -> Self::D;
    /// Lanes to memory.
    fn put(d: Self::D) -> [f64; 4];
    /// a + b
    fn add(a: Self::D, b: Self::D) -> Self::D;
    /// a − b
    fn sub(a: Self::D, b: Self::D) -> Self::D;
    /// a · b
    fn mul(a: Self::D, b: Self::D) -> Self::D;
    /// 0 where v ≤ 0, else v.
    fn relu(v: Self::D) -> Self::D;
    /// d where v > floor, else 0.
    fn pass(d: Self::D, v: Self::D, floor: Self::D) -> Self::D;
    /// The bits that the mask has.
    fn keep(d: Self::D, mask: [u64; 4]) -> Self::D;
    /// Exact.
    fn of_f32(values: [f32; 4]) -> Self::D;
    /// Rounds to nearest.
    fn to_f32(d: Self::D) -> [f32; 4];

    /// The same value in all lanes.
    fn splat_s(value: f32) -> Self::S;
    /// Lanes from memory.
    fn get_s(values: [f32; 8]) -> Self::S;
    /// Lanes to memory.
    fn put_s(s: Self::S) -> [f32; 8];
    /// a + b
    fn add_s(a: Self::S, b: Self::S) -> Self::S;
    /// a − b
    fn sub_s(a: Self::S, b: Self::S) -> Self::S;
    /// a · b
    fn mul_s(a: Self::S, b: Self::S) -> Self::S;
    /// 0 where v ≤ 0, else v.
    fn relu_s(v: Self::S) -> Self::S;
    /// d where v > floor, else 0.
    fn pass_s(d: Self::S, v: Self::S, floor: Self::S) -> Self::S;
    /// Exact.
    fn of_f16(values: [f16; 8]) -> Self::S;
    /// Rounds to nearest.
    fn to_f16(s: Self::S) -> [f16; 8];
    /// Exact.
    fn of_bf16(values: [bf16; 8]) -> Self::S;
    /// Rounds to nearest.
    fn to_bf16(s: Self::S) -> [bf16; 8];
    /// The low and the high four, exact.
    fn widen(s: Self::S) -> [Self::D; 2];
    /// Low and high four to one, rounded to nearest.
    fn narrow(d: [Self::D; 2]) -> Self::S;
}

/// Arrays, for the compiler to vectorize as it can.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

#[inline(always)]
fn zip<V: Copy, const N: usize>(a: [V; N], b: [V; N], f: impl Fn(V, V) -> V) -> [V; N] {
    from_fn(|lane| f(a[lane], b[lane]))
}

impl Lanes for Portable {
    type D = [f64; 4];
    type S = [f32; 8];

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
    fn pass(d: Self::D, v: Self::D, floor: Self::D) -> Self::D {
        from_fn(|lane| if v[lane] > floor[lane] { d[lane] } else { 0.0 })
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
    fn pass_s(d: Self::S, v: Self::S, floor: Self::S) -> Self::S {
        from_fn(|lane| if v[lane] > floor[lane] { d[lane] } else { 0.0 })
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

/// AVX2 and F16C. Only [`super::dispatch`] names it, where these instructions are there.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{Avx2, Lanes, bf16, f16};
    use std::arch::x86_64::*;

    /// Calls an intrinsic, or turns an array into the register of its size.
    macro_rules! avx2 {
        ($e:expr) => {
            // SAFETY: `Avx2` is only used where AVX2 and F16C have been found; arrays and registers that are
            // transmuted are plain data of one size.
            unsafe { $e }
        };
    }

    impl Lanes for Avx2 {
        type D = __m256d;
        type S = __m256;

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
        #[inline(always)]
        fn pass(d: __m256d, v: __m256d, floor: __m256d) -> __m256d {
            avx2!(_mm256_and_pd(d, _mm256_cmp_pd::<_CMP_GT_OQ>(v, floor)))
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
        #[inline(always)]
        fn pass_s(d: __m256, v: __m256, floor: __m256) -> __m256 {
            avx2!(_mm256_and_ps(d, _mm256_cmp_ps::<_CMP_GT_OQ>(v, floor)))
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
        /// Adds half a unit of the last place that is kept, less one where that place is even; a NaN is made quiet instead.
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
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use super::*;

    /// The conversions of the two levels agree on every 16-bit number, and back on float32 numbers of every kind.
    #[test]
    fn conversions_agree() {
        if !is_x86_feature_detected!("avx2") || !is_x86_feature_detected!("f16c") {
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
