//! Where the gradient passes an activation: between two values of x.

use crate::coefficients::Coefficients;
use crate::element::{Element, Wide};
use crate::epilogue::Activation;
use crate::error::Error;
use crate::kernels::normalize_one;
use crate::layout::Layout;
use crate::partition::Interleaved;
use crate::per_channel::PerChannel;
use std::borrow::Cow;
use std::ops::Range;

/// Values per channel from which bounds are worth their search, which takes as long as to compute y some sixty times.
const WORTH: usize = 64;

/// The least and the largest x of each channel at which the gradient passes the activation.
///
/// y never falls where x rises (or never rises, if γ < 0), since every operation that it is computed by rounds in order. So
/// the x for which 0 < y (and y < 6 for ReLU6) are all those between two of them, and to compare x with these takes less time than to
/// compute y again.
pub(crate) struct Bounds<T> {
    least: PerChannel<T>,
    most: PerChannel<T>,
}

impl<T: Element> Bounds<T> {
    /// The bounds of each channel of a forward pass without a residual; `None` where channels are short, or coefficients are
    /// not finite.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub(crate) fn of(
        activation: Activation,
        coefficients: &Coefficients,
        layout: Layout,
    ) -> Result<Option<Self>, Error> {
        if layout.count() < WORTH || !coefficients.are_finite::<T>() {
            return Ok(None);
        }
        let mut bounds = Self {
            least: PerChannel::filled(layout.channels(), T::from_f64(0.0))?,
            most: PerChannel::filled(layout.channels(), T::from_f64(0.0))?,
        };
        let of_channels = (0..layout.channels()).map(|c| search(activation, coefficients.of_channel::<T>(c)));
        PerChannel::fill_together([&mut bounds.least, &mut bounds.most], of_channels);
        Ok(Some(bounds))
    }

    /// The bounds of a channel.
    pub(crate) fn of_channel(&self, c: usize) -> [T; 2] {
        [self.least.as_slice()[c], self.most.as_slice()[c]]
    }

    /// The bounds of some channels.
    pub(crate) fn of_channels(&self, channels: Range<usize>) -> [&[T]; 2] {
        [&self.least.as_slice()[channels.clone()], &self.most.as_slice()[channels]]
    }

    /// The bounds of some columns, as kernels over rows take them.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub(crate) fn of_columns(&self, rows: &Interleaved, columns: Range<usize>) -> Result<[Cow<'_, [T]>; 2], Error> {
        Ok([rows.copies(&self.least, columns.clone())?, rows.copies(&self.most, columns)?])
    }
}

/// The bounds of a channel with these coefficients, which are finite. Where no gradient passes, one of them is NaN.
fn search<T: Element>(activation: Activation, coefficients: [T::Wide; 4]) -> [T; 2] {
    let [high, low, scale, beta] = coefficients;
    let (zero, one) = (T::Wide::default(), T::Wide::from_f64(1.0));
    let [least, most] = [f64::NEG_INFINITY, f64::INFINITY].map(T::from_f64);
    let is_relu = activation == Activation::Relu;
    let v = |x: T| normalize_one(x, coefficients);
    let above_zero = |v: T::Wide| v > T::ROUNDS_TO_ZERO;
    let below_six = |v: T::Wide| is_relu || v < T::ROUNDS_TO_SIX;
    // About where v takes a value.
    let near =
        |value: T::Wide| T::from_f64(high.to_f64() + low.to_f64() + (value.to_f64() - beta.to_f64()) / scale.to_f64());
    if scale > zero {
        let from = first(near(T::ROUNDS_TO_ZERO), |x| above_zero(v(x)));
        let beyond = |near| T::of_rank(first(near, |x| !below_six(v(x))) - 1);
        [T::of_rank(from), if is_relu { most } else { beyond(near(T::ROUNDS_TO_SIX)) }]
    } else if scale < zero {
        let from = |near| T::of_rank(first(near, |x| below_six(v(x))));
        let beyond = first(near(T::ROUNDS_TO_ZERO), |x| !above_zero(v(x)));
        [if is_relu { least } else { from(near(T::ROUNDS_TO_SIX)) }, T::of_rank(beyond - 1)]
    } else if above_zero(beta) && below_six(beta) {
        // v is β, but NaN where x − mean is not finite in this precision.
        let distance = |x: T| normalize_one(x, [high, low, one, zero]).to_f64();
        let (from, beyond) =
            (first(least, |x| distance(x) > f64::NEG_INFINITY), first(most, |x| distance(x) == f64::INFINITY));
        [T::of_rank(from), T::of_rank(beyond - 1)]
    } else {
        [most, least]
    }
}

/// The rank of the first number for which `is_reached` holds, if it holds for all after that; that of NaN where there is none. The
/// search begins at `near`.
fn first<T: Element>(near: T, is_reached: impl Fn(T) -> bool) -> i64 {
    let [least, most] = [f64::NEG_INFINITY, f64::INFINITY].map(|end| T::from_f64(end).rank());
    let is_reached = |rank: i64| rank > most || rank >= least && is_reached(T::of_rank(rank));
    let near = near.rank();
    // Nearly always; without a branch that depends on chance.
    if !is_reached(near - 1) & is_reached(near + 1) {
        return near + i64::from(!is_reached(near));
    }
    // In steps that double, until it holds for `after` and not for `before`.
    let (mut before, mut after, mut step) = (near - 1, near, 1i64);
    while !is_reached(after) {
        (before, after, step) = (after, after.saturating_add(step).min(most + 1), step.saturating_mul(2));
    }
    while is_reached(before) {
        (before, after, step) = (before.saturating_sub(step).max(least - 1), before, step.saturating_mul(2));
    }
    while after - before > 1 {
        let middle = before + (after - before) / 2;
        if is_reached(middle) { after = middle } else { before = middle }
    }
    after
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    /// Whether the gradient passes, as y itself says.
    fn passes<T: Element>(activation: Activation, x: T, coefficients: [T::Wide; 4]) -> bool {
        let y = T::narrow(normalize_one(x, coefficients)).to_f64();
        y > 0.0 && (activation == Activation::Relu || y < 6.0)
    }

    fn of_kernel<T: Element>([mean, scale, beta]: [f64; 3]) -> [T::Wide; 4] {
        let wide = T::Wide::from_f64;
        [wide(mean), wide(if T::SPLIT_MEAN { mean - wide(mean).to_f64() } else { 0.0 }), wide(scale), wide(beta)]
    }

    /// Compares the bounds with y at the given numbers and around the bounds; returns how many pass.
    fn check<T: Element>(channel: [f64; 3], numbers: impl Iterator<Item = T>) -> usize {
        let coefficients = of_kernel::<T>(channel);
        if coefficients.iter().any(|c| !c.to_f64().is_finite()) {
            return 0; // such coefficients have no bounds
        }
        let (mut passed, numbers): (_, Vec<T>) = (0, numbers.collect());
        for activation in Activation::ALL {
            let bounds @ [least, most] = search::<T>(activation, coefficients);
            let around = bounds.iter().flat_map(|bound| (-3..=3).map(|step| T::of_rank(bound.rank() + step)));
            for x in numbers.iter().copied().chain(around) {
                let within = least.widen() <= x.widen() && x.widen() <= most.widen();
                let wanted = passes(activation, x, coefficients);
                assert_eq!(within, wanted, "{activation:?}, {channel:?}, x = {:e}", x.to_f64());
                passed += usize::from(wanted);
            }
        }
        passed
    }

    /// Means, scales and β, ordinary and at the limits.
    fn channels() -> impl Iterator<Item = [f64; 3]> {
        let means = [0.0, -0.0, 1.0, -0.7, 1e-30, 1e4, -3e38, 6e4, 1.7e308, 5e-324];
        let scales = [1.0, -1.0, 0.37, -2.9, 0.0, -0.0, 1e-40, -1e-7, 1e30, -1e300, 5e-324];
        let betas = [0.0, 1.0, -1.0, 0.3, 5.9999, 6.0, 6.5, -1e30, 1e-45, 3e38, -1e308];
        let with_scales = move |mean| scales.into_iter().map(move |scale| (mean, scale));
        means.into_iter().flat_map(with_scales).flat_map(move |(mean, scale)| betas.map(|beta| [mean, scale, beta]))
    }

    #[test]
    fn every_number_of_16_bits_is_judged_as_y_says() {
        let every = || (0..=u16::MAX).step_by(if cfg!(miri) { 997 } else { 1 });
        let mut passed = 0;
        for channel in channels().step_by(7) {
            passed += check(channel, every().map(f16::from_bits));
            passed += check(channel, every().map(bf16::from_bits));
        }
        assert!(passed > 1_000_000 || cfg!(miri), "{passed}");
    }

    #[test]
    fn numbers_of_32_and_64_bits_are_judged_as_y_says() {
        let mut passed = 0;
        for channel in channels() {
            passed += check(
                channel,
                (0..400u64).map(|i| f32::from_bits((i.wrapping_mul(0x9e37_79b9) >> 3) as u32 ^ (i as u32) << 23)),
            );
            passed += check(channel, (0..400u64).map(|i| f64::from_bits(i.wrapping_mul(0x9e37_79b9_7f4a_7c15))));
        }
        assert!(passed > 50_000, "{passed}");
    }

    #[test]
    fn ranks_are_in_the_order_of_numbers() {
        let ordered = [f64::NEG_INFINITY, -3.5, -1.0, -5e-324, -0.0, 0.0, 5e-324, 2.0, f64::MAX, f64::INFINITY];
        assert!(ordered.is_sorted_by(|a, b| a.rank() < b.rank()));
        assert!(ordered.iter().all(|&number| f64::of_rank(number.rank()).to_bits() == number.to_bits()));
        assert_eq!(f64::of_rank((-0.0f64).rank() + 1).to_bits(), 0);
        for beyond in [f64::INFINITY.rank() + 1, f64::NEG_INFINITY.rank() - 1] {
            assert!(f64::of_rank(beyond).is_nan());
        }
    }
}
