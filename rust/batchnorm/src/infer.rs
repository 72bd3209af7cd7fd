//! Inference: frozen statistics, so every element is mapped by itself (Algorithm 2, step 11).

use crate::blocks::{Family, Planar, tile};
use crate::coefficients::Coefficients;
use crate::element::Element;
use crate::epilogue::Epilogue;
use crate::error::Error;
use crate::simd::{NormalizeRows, NormalizeRuns, dispatch};
use crate::view::{View, ViewMut};

/// y = (x − mean)·s + β, and what follows it.
///
/// # Errors
/// [`Error::Channels`], [`Error::LayoutMismatch`], and [`Error::Threads`], [`Error::Level`] for what the environment
/// names wrongly.
pub fn infer<T: Element>(
    x: View<'_, T>,
    coefficients: &Coefficients,
    epilogue: Epilogue<View<'_, T>>,
    y: &mut ViewMut<'_, T>,
) -> Result<(), Error> {
    if x.layout() != y.layout() {
        return Err(Error::LayoutMismatch { argument: "out" });
    }
    map(Some(x), coefficients, epilogue, y)
}

/// The same with y in the memory of x.
///
/// # Errors
/// [`Error::Channels`], [`Error::LayoutMismatch`], and [`Error::Threads`], [`Error::Level`] for what the environment names wrongly.
pub fn infer_in_place<T: Element>(
    coefficients: &Coefficients,
    epilogue: Epilogue<View<'_, T>>,
    y: &mut ViewMut<'_, T>,
) -> Result<(), Error> {
    map(None, coefficients, epilogue, y)
}

/// Maps x, or where there is none y itself, into y.
fn map<T: Element>(
    x: Option<View<'_, T>>,
    coefficients: &Coefficients,
    epilogue: Epilogue<View<'_, T>>,
    y: &mut ViewMut<'_, T>,
) -> Result<(), Error> {
    let _mode = crate::begin()?;
    let layout = y.layout();
    Error::check_channels("x", layout.channels(), coefficients.channels())?;
    coefficients.check_range::<T>()?;
    epilogue.check(layout)?;
    let elements = tile::<T>(layout);
    match Family::of(layout) {
        Family::Planar(planar) => {
            let Planar { channels, inner, .. } = planar;
            y.map_tiles(&planar.planes(elements), |rect, y| {
                let x = x.map_or_else(|| y.as_tile(), |x| x.tile(inner, rect));
                let coefficients = |r: usize| coefficients.of_channel::<T>((rect.rows.start + r) % channels);
                let then = epilogue.map(|residual| residual.tile(inner, rect));
                dispatch(NormalizeRuns { x, y: &y, coefficients, then });
            });
        }
        Family::Interleaved(rows) => {
            y.map_tiles(&rows.tiles(elements), |rect, y| {
                let x = x.map_or_else(|| y.as_tile(), |x| x.tile(rows.width, rect));
                let columns = coefficients.of_columns::<T>(&rows, rect.cols.clone());
                let coefficients = columns.each_ref().map(Vec::as_slice);
                let then = epilogue.map(|residual| residual.tile(rows.width, rect));
                dispatch(NormalizeRows { x, y: &y, coefficients, then });
            });
        }
    }
    Ok(())
}
