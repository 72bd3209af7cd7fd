//! What a backward pass needs of its forward pass, and the gradient that passes the activation.

use crate::bounds::Bounds;
use crate::coefficients::{Coefficients, OfColumns};
use crate::copy::copy;
use crate::element::Element;
use crate::epilogue::Epilogue;
use crate::error::Error;
use crate::input::Input;
use crate::kernels::{ActivationBackward, NormalizeRows, NormalizeRuns};
use crate::layout::Layout;
use crate::partition::{Family, Interleaved, Planar, tile};
use crate::simd::dispatch;
use crate::view::{Rect, Tile, TileMut, View, ViewMut};
use std::ops::Range;

/// A forward pass, as its backward pass needs it: x, coefficients and epilogue.
#[derive(Clone, Copy)]
pub struct ForwardPass<'a, T: Copy> {
    /// The input of the forward pass.
    pub x: View<'a, T>,
    /// The coefficients by which x was normalized.
    pub coefficients: &'a Coefficients,
    /// The epilogue that followed normalization.
    pub epilogue: Epilogue<View<'a, T>>,
}

// The methods `through_…` return, for one part of the tensor, the gradient that passes the activation: dy where y > 0
// (and y < 6 for ReLU6), else 0. Without an activation that is dy itself. With one, the gradient is written to `to`, which may be dy's own memory.
impl<'a, T: Element> ForwardPass<'a, T> {
    /// The layout of all tensors of the pass.
    pub(crate) fn layout(&self) -> Layout {
        self.x.layout()
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        self.epilogue.check(self.layout())?;
        Error::check_channels("x", self.layout().channels(), self.coefficients.channels())
    }

    pub(crate) fn has_activation(&self) -> bool {
        self.epilogue.activation.is_some()
    }

    /// What dx is written to: `dx`; or, after the gradient that passes the activation has been written there, `cached`, since
    /// a non-temporal store to a line in the caches would first have to empty it.
    pub(crate) fn output<'t, 'm>(&self, dx: &'t TileMut<'m, T>, cached: &'t TileMut<'m, T>) -> &'t TileMut<'m, T> {
        if self.has_activation() { cached } else { dx }
    }

    /// The pass, and the bounds of x between which the gradient passes its activation. Where it has them, it comes without its
    /// epilogue: then kernels find the gradient by the bounds alone.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub(crate) fn bounded(self) -> Result<(Self, Option<Bounds<T>>), Error> {
        let bounds = match self.epilogue {
            Epilogue { activation: Some(activation), residual: None } => {
                Bounds::of(activation, self.coefficients, self.layout())?
            }
            _ => None,
        };
        Ok((if bounds.is_some() { self.without_epilogue() } else { self }, bounds))
    }

    /// The forward pass without its epilogue, for a gradient that has passed the activation already.
    pub(crate) fn without_epilogue(&self) -> Self {
        Self { epilogue: Epilogue::default(), ..*self }
    }

    /// The gradient that passes the activation, in a rectangle whose rows are of one channel each (see [`Planar::planes`]).
    pub(crate) fn through_planes<'t>(
        &self,
        planar: &Planar,
        rect: &Rect,
        dy: Tile<'t, T>,
        to: &'t TileMut<'_, T>,
    ) -> Tile<'t, T> {
        let Some(activation) = self.epilogue.activation else {
            return dy;
        };
        let (x, residual) = self.tiles(planar.inner, rect);
        let coefficients = |r: usize| self.coefficients.of_channel::<T>((rect.rows.start + r) % planar.channels);
        dispatch(NormalizeRuns { x, y: to, coefficients, then: ActivationBackward { activation, dy, residual } });
        to.as_tile()
    }

    /// The gradient that passes the activation, in a rectangle whose rows are runs of equal length, one for each of some
    /// adjacent channels.
    pub(crate) fn through_runs<'t>(
        &self,
        planar: &Planar,
        (channels, rect): (&Range<usize>, &Rect),
        dy: Tile<'t, T>,
        to: &'t TileMut<'_, T>,
    ) -> Tile<'t, T> {
        let Some(activation) = self.epilogue.activation else {
            return dy;
        };
        let (x, residual) = self.tiles(planar.width(), rect);
        let run = x.cols() / channels.len();
        let coefficients = |c: usize| self.coefficients.of_channel::<T>(channels.start + c);
        for r in 0..x.rows() {
            let residual = residual.map(|residual| residual.split_row(r, run));
            let then = ActivationBackward { activation, dy: dy.split_row(r, run), residual };
            dispatch(NormalizeRuns { x: x.split_row(r, run), y: &to.split_row(r, run), coefficients, then });
        }
        to.as_tile()
    }

    /// The coefficients of some columns for [`ForwardPass::through_rows`], or `None` without an activation.
    pub(crate) fn columns(&self, rows: &Interleaved, columns: Range<usize>) -> Result<Option<OfColumns<'a, T>>, Error> {
        self.has_activation().then(|| self.coefficients.of_columns(rows, columns)).transpose()
    }

    /// The gradient that passes the activation, in a rectangle whose columns are channels.
    pub(crate) fn through_rows<'t>(
        &self,
        rows: &Interleaved,
        (columns, rect): (Option<&OfColumns<'_, T>>, &Rect),
        dy: Tile<'t, T>,
        to: &'t TileMut<'_, T>,
    ) -> Tile<'t, T> {
        let (Some(activation), Some(columns)) = (self.epilogue.activation, columns) else {
            return dy;
        };
        let (x, residual) = self.tiles(rows.width, rect);
        let then = ActivationBackward { activation, dy, residual };
        dispatch(NormalizeRows { x, y: to, coefficients: columns.slices(), then });
        to.as_tile()
    }

    /// Writes the gradient that passes the activation to `to`, for the whole tensor, with or without an activation.
    pub(crate) fn through(&self, dy: Input<'_, T>, to: &mut ViewMut<'_, T>) -> Result<(), Error> {
        let layout = self.layout();
        let elements = tile::<T>(layout);
        match (Family::of(layout), dy) {
            (_, Input::View(dy)) if !self.has_activation() => copy(dy, None, to, false),
            (_, Input::InPlace) if !self.has_activation() => Ok(()),
            (Family::Planar(planar), _) => to.map_tiles(&planar.planes(elements), |rect, to| {
                self.through_planes(&planar, rect, dy.tile(planar.inner, rect, &to), &to);
                Ok(())
            }),
            (Family::Interleaved(rows), _) => to.map_tiles(&rows.tiles(elements), |rect, to| {
                let columns = self.columns(&rows, rect.cols.clone())?;
                self.through_rows(&rows, (columns.as_ref(), rect), dy.tile(rows.width, rect, &to), &to);
                Ok(())
            }),
        }
    }

    fn tiles(&self, width: usize, rect: &Rect) -> (Tile<'a, T>, Option<Tile<'a, T>>) {
        (self.x.tile(width, rect), self.epilogue.residual.map(|residual| residual.tile(width, rect)))
    }
}
