//! Vectors of eight elements: how each element type is loaded, computed with and stored.

use super::lanes::Lanes;
use half::{bf16, f16};

/// Number of elements in a vector.
pub(crate) const WIDTH: usize = 8;

/// How kernels load, compute with and store elements of a type.
pub trait Vectors: Copy + Sized {
    /// The precision in which x is normalized: float64, or float32 for 16-bit types.
    type Wide: Copy;
    /// A vector of eight elements, in the precision in which x is normalized.
    type Vector<L: Lanes>: Copy;
    /// A vector of eight elements, to be compared with others.
    type Compared<L: Lanes>: Copy;

    /// One value in every lane.
    #[doc(hidden)]
    fn splat<L: Lanes>(value: Self::Wide) -> Self::Vector<L>;
    /// Loads the coefficients of eight columns.
    #[doc(hidden)]
    fn column<L: Lanes>(values: [Self::Wide; WIDTH]) -> Self::Vector<L>;
    /// Loads eight elements, exactly.
    #[doc(hidden)]
    fn load<L: Lanes>(values: [Self; WIDTH]) -> Self::Vector<L>;
    /// Rounds to eight elements.
    #[doc(hidden)]
    fn store<L: Lanes>(vector: Self::Vector<L>) -> [Self; WIDTH];
    /// (x − mean)·s + β, each operation rounded. Coefficients are mean (high and low part), s and β; the low part is used
    /// only where [`crate::Element::SPLIT_MEAN`].
    #[doc(hidden)]
    fn normalize<L: Lanes>(x: Self::Vector<L>, coefficients: [Self::Vector<L>; 4]) -> Self::Vector<L>;
    /// a + b, rounded.
    #[doc(hidden)]
    fn add<L: Lanes>(a: Self::Vector<L>, b: Self::Vector<L>) -> Self::Vector<L>;
    /// 0 where v ≤ 0, else v.
    #[doc(hidden)]
    fn relu<L: Lanes>(v: Self::Vector<L>) -> Self::Vector<L>;
    /// d where a > b, else 0.
    #[doc(hidden)]
    fn pass<L: Lanes>(d: [Self; WIDTH], a: Self::Vector<L>, b: Self::Vector<L>) -> [Self; WIDTH];
    /// Loads eight elements to be compared.
    #[doc(hidden)]
    fn compared<L: Lanes>(values: [Self; WIDTH]) -> Self::Compared<L>;
    /// d where least ≤ x ≤ most, else 0.
    #[doc(hidden)]
    fn pass_within<L: Lanes>(d: [Self; WIDTH], x: [Self; WIDTH], bounds: [Self::Compared<L>; 2]) -> [Self; WIDTH];
    /// top where v > top, else v.
    #[doc(hidden)]
    fn at_most<L: Lanes>(v: Self::Vector<L>, top: Self::Vector<L>) -> Self::Vector<L>;
    /// Loads eight elements as float64, exactly.
    #[doc(hidden)]
    fn load_wide<L: Lanes>(values: [Self; WIDTH]) -> [L::D; 2];
    /// Rounds eight float64 to elements; 16-bit types are rounded to float32 first.
    #[doc(hidden)]
    fn store_wide<L: Lanes>(vector: [L::D; 2]) -> [Self; WIDTH];
}

/// Implements [`Vectors`] for a type that is normalized in float64.
macro_rules! in_float64 {
    ($T:ty, $load:expr, $store:expr, $masked:expr, $Compared:ty, $compared:expr, $within:expr) => {
        impl Vectors for $T {
            type Wide = f64;
            type Vector<L: Lanes> = [L::D; 2];
            type Compared<L: Lanes> = $Compared;

            #[inline(always)]
            fn splat<L: Lanes>(value: f64) -> [L::D; 2] {
                [L::splat(value); 2]
            }
            #[inline(always)]
            fn column<L: Lanes>(values: [f64; WIDTH]) -> [L::D; 2] {
                <f64 as Vectors>::load_wide::<L>(values)
            }
            #[inline(always)]
            fn load<L: Lanes>(values: [Self; WIDTH]) -> [L::D; 2] {
                Self::load_wide::<L>(values)
            }
            #[inline(always)]
            fn store<L: Lanes>(vector: [L::D; 2]) -> [Self; WIDTH] {
                Self::store_wide::<L>(vector)
            }
            #[inline(always)]
            fn normalize<L: Lanes>(x: [L::D; 2], [mean, _, s, beta]: [[L::D; 2]; 4]) -> [L::D; 2] {
                std::array::from_fn(|h| L::add(L::mul(L::sub(x[h], mean[h]), s[h]), beta[h]))
            }
            #[inline(always)]
            fn add<L: Lanes>(a: [L::D; 2], b: [L::D; 2]) -> [L::D; 2] {
                std::array::from_fn(|h| L::add(a[h], b[h]))
            }
            #[inline(always)]
            fn relu<L: Lanes>(v: [L::D; 2]) -> [L::D; 2] {
                v.map(|v| L::relu(v))
            }
            #[inline(always)]
            fn pass<L: Lanes>(d: [Self; WIDTH], a: [L::D; 2], b: [L::D; 2]) -> [Self; WIDTH] {
                $masked(d, L::above(a, b))
            }
            #[inline(always)]
            fn compared<L: Lanes>(values: [Self; WIDTH]) -> $Compared {
                $compared(values)
            }
            #[inline(always)]
            fn pass_within<L: Lanes>(
                d: [Self; WIDTH],
                x: [Self; WIDTH],
                [least, most]: [$Compared; 2],
            ) -> [Self; WIDTH] {
                $masked(d, $within($compared(x), least, most))
            }
            #[inline(always)]
            fn at_most<L: Lanes>(v: [L::D; 2], top: [L::D; 2]) -> [L::D; 2] {
                std::array::from_fn(|h| L::at_most(v[h], top[h]))
            }
            #[inline(always)]
            fn load_wide<L: Lanes>(values: [Self; WIDTH]) -> [L::D; 2] {
                let (halves, _) = values.as_chunks::<4>();
                [$load(halves[0]), $load(halves[1])]
            }
            #[inline(always)]
            fn store_wide<L: Lanes>([low, high]: [L::D; 2]) -> [Self; WIDTH] {
                let halves: [[Self; 4]; 2] = [$store(low), $store(high)];
                let (values, _) = halves.as_flattened().as_chunks::<WIDTH>();
                values[0]
            }
        }
    };
}

in_float64!(
    f64,
    L::get,
    L::put,
    |d, mask| Self::store_wide::<L>(L::masked(Self::load_wide::<L>(d), mask)),
    [L::D; 2],
    Self::load_wide::<L>,
    L::within
);
in_float64!(f32, L::of_f32, L::to_f32, |d, mask| L::put_s(L::masked_s(L::get_s(d), mask)), L::S, L::get_s, L::within_s);

/// Implements [`Vectors`] for a type that is normalized in float32.
macro_rules! in_float32 {
    ($T:ty, $load:expr, $store:expr) => {
        impl Vectors for $T {
            type Wide = f32;
            type Vector<L: Lanes> = L::S;
            type Compared<L: Lanes> = L::S;

            #[inline(always)]
            fn splat<L: Lanes>(value: f32) -> L::S {
                L::splat_s(value)
            }
            #[inline(always)]
            fn column<L: Lanes>(values: [f32; WIDTH]) -> L::S {
                L::get_s(values)
            }
            #[inline(always)]
            fn load<L: Lanes>(values: [Self; WIDTH]) -> L::S {
                $load(values)
            }
            #[inline(always)]
            fn store<L: Lanes>(vector: L::S) -> [Self; WIDTH] {
                $store(vector)
            }
            #[inline(always)]
            fn normalize<L: Lanes>(x: L::S, [high, low, s, beta]: [L::S; 4]) -> L::S {
                L::add_s(L::mul_s(L::sub_s(L::sub_s(x, high), low), s), beta)
            }
            #[inline(always)]
            fn add<L: Lanes>(a: L::S, b: L::S) -> L::S {
                L::add_s(a, b)
            }
            #[inline(always)]
            fn relu<L: Lanes>(v: L::S) -> L::S {
                L::relu_s(v)
            }
            #[inline(always)]
            fn pass<L: Lanes>(d: [Self; WIDTH], a: L::S, b: L::S) -> [Self; WIDTH] {
                L::masked_16(d.map(<$T>::to_bits), L::above_s(a, b)).map(<$T>::from_bits)
            }
            #[inline(always)]
            fn compared<L: Lanes>(values: [Self; WIDTH]) -> L::S {
                $load(values)
            }
            #[inline(always)]
            fn pass_within<L: Lanes>(d: [Self; WIDTH], x: [Self; WIDTH], [least, most]: [L::S; 2]) -> [Self; WIDTH] {
                let within = L::within_s($load(x), least, most);
                L::masked_16(d.map(<$T>::to_bits), within).map(<$T>::from_bits)
            }
            #[inline(always)]
            fn at_most<L: Lanes>(v: L::S, top: L::S) -> L::S {
                L::at_most_s(v, top)
            }
            #[inline(always)]
            fn load_wide<L: Lanes>(values: [Self; WIDTH]) -> [L::D; 2] {
                L::widen($load(values))
            }
            #[inline(always)]
            fn store_wide<L: Lanes>(vector: [L::D; 2]) -> [Self; WIDTH] {
                $store(L::narrow(vector))
            }
        }
    };
}

in_float32!(f16, L::of_f16, L::to_f16);
in_float32!(bf16, L::of_bf16, L::to_bf16);
