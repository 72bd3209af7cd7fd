//! Inference: frozen statistics, so every element is mapped by itself (Algorithm 2, step 11).

use crate::affine::Affine;
use crate::blocks::{Family, Planar};
use crate::element::Element;
use crate::error::Error;
use crate::simd::{AffineRows, AffineRuns, dispatch};
use crate::view::{Grid, View, ViewMut};

/// Bytes that one task writes.
pub(crate) const TASK: usize = 256 * 1024;

/// y = (x − mean)·s + β.
///
/// # Errors
/// [`Error::Channels`], [`Error::LayoutMismatch`], and [`Error::Threads`], [`Error::Level`] for what the environment
/// names wrongly.
pub fn infer<T: Element>(x: View<'_, T>, affine: &Affine, y: &mut ViewMut<'_, T>) -> Result<(), Error> {
    if x.layout() != y.layout() {
        return Err(Error::LayoutMismatch { argument: "out" });
    }
    map(Some(x), affine, y)
}

/// The same with y in the memory of x.
///
/// # Errors
/// [`Error::Channels`], and [`Error::Threads`], [`Error::Level`] for what the environment names wrongly.
pub fn infer_in_place<T: Element>(affine: &Affine, y: &mut ViewMut<'_, T>) -> Result<(), Error> {
    map(None, affine, y)
}

/// Maps x, or where there is none y itself, into y.
fn map<T: Element>(x: Option<View<'_, T>>, affine: &Affine, y: &mut ViewMut<'_, T>) -> Result<(), Error> {
    let _mode = crate::begin()?;
    let layout = y.layout();
    Error::check_channels("x", layout.channels(), affine.channels())?;
    let elements = TASK / size_of::<T>();
    match Family::of(layout) {
        // Planes are adjacent, and each belongs to one channel: rows of a matrix with `inner` columns.
        Family::Planar(Planar { outer, channels, inner, .. }) => {
            let grid = Grid::new(outer * channels, inner, elements / inner, elements);
            y.map_tiles(&grid, |rect, y| {
                let x = x.map_or_else(|| y.as_tile(), |x| x.tile(inner, rect));
                for (i, plane) in rect.rows.clone().enumerate() {
                    let cols = 0..rect.cols.len();
                    let (x, y) = (x.part(i..i + 1, cols.clone()), &y.part(i..i + 1, cols));
                    dispatch(AffineRuns { x, y, coefficients: affine.coefficients::<T>(plane % channels) });
                }
            });
        }
        Family::Interleaved(rows) => {
            let columns = affine.columns::<T>(&rows);
            let grid = Grid::new(rows.rows, rows.width, elements / rows.width.max(1), elements);
            y.map_tiles(&grid, |rect, y| {
                let x = x.map_or_else(|| y.as_tile(), |x| x.tile(rows.width, rect));
                let coefficients = columns.each_ref().map(|column| &column[rect.cols.clone()]);
                dispatch(AffineRows { x, y: &y, coefficients });
            });
        }
    }
    Ok(())
}
