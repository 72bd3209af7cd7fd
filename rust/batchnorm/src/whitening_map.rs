//! Whitening with frozen statistics: an affine map of the channels of each position, to the same bits everywhere.

use crate::element::Element;
use crate::error::Error;
use crate::input::Input;
use crate::kernels::{OrderedProduct, Rows};
use crate::memory::{collected, with_capacity, zeros};
use crate::patch::{Patch, Patches};
use crate::simd::dispatch;
use crate::verb::begin;
use crate::view::ViewMut;
use std::iter::repeat_n;

/// y = M(x − mean) + bias of each group of channels.
///
/// y_o = round(Σ M_oi·(x_i − mean_i) + bias_o) in float64, where the sum begins at 0 and goes in the order of i, and each
/// operation is rounded. So the bits of a position do not depend on the rest of the batch, on the number of threads or on
/// the instruction-set level.
#[derive(Debug, Clone)]
pub struct WhiteningMap {
    group: usize,
    /// A row of D numbers for each channel of the output.
    matrix: Vec<f64>,
    /// The transposed matrix of each group.
    transposed: Vec<f64>,
    mean: Vec<f64>,
    bias: Vec<f64>,
}

impl WhiteningMap {
    /// A map from its parts: `matrix` has a row of D numbers for each channel.
    ///
    /// # Errors
    /// [`Error::NoChannels`]; [`Error::Channels`] if `bias` is not as long as `mean`; [`Error::Elements`] if `matrix` is not of
    /// that form, with a D that divides the channels; [`Error::NotFinite`]; [`Error::NoMemory`].
    pub fn new(matrix: Vec<f64>, mean: Vec<f64>, bias: Vec<f64>) -> Result<Self, Error> {
        let channels = mean.len();
        if channels == 0 {
            return Err(Error::NoChannels);
        }
        Error::check_channels("bias", bias.len(), channels)?;
        let group = matrix.len() / channels;
        if group == 0 || !matrix.len().is_multiple_of(channels) || !channels.is_multiple_of(group) {
            return Err(Error::Elements { argument: "matrix", got: matrix.len(), wanted: channels * channels });
        }
        Error::check_finite_rows("matrix", &matrix, group)?;
        Error::check_finite("mean", &mean)?;
        Error::check_finite("bias", &bias)?;
        let transposed = collected((0..matrix.len()).map(|k| {
            let (g, i, o) = (k / (group * group), k / group % group, k % group);
            matrix[(g * group + o) * group + i]
        }))?;
        Ok(Self { group, matrix, transposed, mean, bias })
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.mean.len()
    }

    /// Number of groups of channels.
    pub fn groups(&self) -> usize {
        self.channels() / self.group
    }

    /// Writes y = M(x − mean) + bias.
    ///
    /// # Errors
    /// [`Error::Channels`], [`Error::LayoutMismatch`], [`Error::NoMemory`]; [`Error::Threads`], [`Error::Level`] for a wrong value
    /// of an environment variable.
    pub fn apply<T: Element>(&self, x: Input<'_, T>, y: &mut ViewMut<'_, T>) -> Result<(), Error> {
        self.product(("out", x), (&self.matrix, &self.transposed), (&self.mean, &self.bias), y)
    }

    /// Writes dx = Mᵀ·dy, where sums go in the order of the channels of dy.
    ///
    /// # Errors
    /// As [`WhiteningMap::apply`].
    pub fn backward<T: Element>(&self, dy: Input<'_, T>, dx: &mut ViewMut<'_, T>) -> Result<(), Error> {
        let nothing = zeros(self.channels())?;
        self.product(("dy", dy), (&self.transposed, &self.matrix), (&nothing, &nothing), dx)
    }

    fn product<T: Element>(
        &self,
        (argument, x): (&'static str, Input<'_, T>),
        (matrix, transposed): (&[f64], &[f64]),
        (mean, bias): (&[f64], &[f64]),
        y: &mut ViewMut<'_, T>,
    ) -> Result<(), Error> {
        let _mode = begin()?;
        let layout = y.layout();
        x.check(argument, layout)?;
        Error::check_channels("x", layout.channels(), self.channels())?;
        if layout.is_empty() {
            return Ok(());
        }
        let patches = Patches::of(layout, self.groups())?;
        let ones = collected(repeat_n(1.0, self.channels()))?;
        let room = || {
            let mut panel = with_capacity(self.group)?;
            panel.resize(self.group, [0.0; 8]);
            Ok(([patches.room(None)?, patches.room(None)?], panel))
        };
        patches.write(y, room, |([from, to], panel), channels, rect, y| {
            from.gather(patches.input(&x, rect, y), &mean[channels.clone()]);
            to.like(from);
            for g in 0..channels.len() / self.group {
                let at = (channels.start + g * self.group) * self.group;
                let own = at..at + self.group * self.group;
                self.multiply((&matrix[own.clone()], &transposed[own]), from, to, g * self.group, panel);
            }
            to.scatter(&ones[channels.clone()], &bias[channels.clone()], y);
            Ok(())
        })
    }

    /// The product of a group's matrix with the group that begins at a channel of a patch.
    fn multiply(
        &self,
        (matrix, transposed): (&[f64], &[f64]),
        from: &Patch,
        to: &mut Patch,
        channel: usize,
        panel: &mut [[f64; 8]],
    ) {
        let (d, positions, stride) = (self.group, from.positions(), self.group);
        let by_position = from.by_position();
        let from = from.rows(channel);
        let (to, to_stride) = to.rows_mut(channel);
        // The vectors of a product lie along the rows of its right matrix, which memory has in one of two orders.
        dispatch(match by_position {
            true => {
                let right = Rows { values: transposed, stride };
                OrderedProduct { left: from, right, rows: positions, inner: d, cols: d, panel, to, to_stride }
            }
            false => {
                let left = Rows { values: matrix, stride };
                OrderedProduct { left, right: from, rows: d, inner: d, cols: positions, panel, to, to_stride }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]
    use super::*;
    use crate::layout::Layout;
    use crate::view::View;

    /// The expression of the contract, for element (n, o, p) of a tensor with `inner` positions a row.
    fn expected(map: &WhiteningMap, x: &[f32], (n, o, p): (usize, usize, usize), inner: usize) -> f32 {
        let (d, channels) = (map.group, map.channels());
        let first = o / d * d;
        let sum = (0..d).fold(0.0, |sum, i| {
            let value = f64::from(x[(n * channels + first + i) * inner + p]);
            sum + map.matrix[o * d + i] * (value - map.mean[first + i])
        });
        (sum + map.bias[o]) as f32
    }

    #[test]
    fn every_position_is_the_expression_to_the_bit() {
        let value = |k: usize| ((k * 7919 + 13) % 1009) as f64 / 500.0 - 1.0;
        for (outer, groups, d, inner) in [(5, 1, 3, 1), (300, 2, 9, 1), (2, 3, 4, 7), (3, 1, 8, 700), (1, 1, 300, 5)] {
            let channels = groups * d;
            let matrix = (0..channels * d).map(value).collect();
            let [mean, bias] = [3, 5].map(|k| (0..channels).map(|c| value(k * c + k)).collect());
            let map = WhiteningMap::new(matrix, mean, bias).unwrap();
            let layout = Layout::new(outer, channels, inner).unwrap();
            let x: Vec<f32> = (0..layout.len()).map(|k| value(3 * k + 1) as f32).collect();
            let mut y = vec![0f32; x.len()];
            let input = Input::View(View::new(&x, layout).unwrap());
            map.apply(input, &mut ViewMut::new(&mut y, layout).unwrap()).unwrap();
            for (k, y) in y.iter().enumerate() {
                let place = (k / (channels * inner), k / inner % channels, k % inner);
                assert_eq!(
                    y.to_bits(),
                    expected(&map, &x, place, inner).to_bits(),
                    "{outer} {groups} {d} {inner}: {place:?}"
                );
            }
            let mut again = x.clone();
            map.apply(Input::InPlace, &mut ViewMut::new(&mut again, layout).unwrap()).unwrap();
            assert_eq!(again, y);
        }
    }
}
