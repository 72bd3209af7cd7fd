//! Inference with frozen statistics: every element is normalized by itself (Algorithm 2, step 11).

use crate::coefficients::Coefficients;
use crate::element::Element;
use crate::epilogue::Epilogue;
use crate::error::Error;
use crate::input::Input;
use crate::kernels::{NormalizeRows, NormalizeRuns};
use crate::partition::{Family, tile};
use crate::simd::dispatch;
use crate::verb::begin;
use crate::view::{View, ViewMut};

/// Normalizes x with frozen statistics: y = (x − mean)·s + β with s = γ/√(var + ε), followed by the epilogue.
///
/// # Errors
/// [`Error::Channels`], [`Error::Range`], [`Error::LayoutMismatch`], [`Error::NoMemory`]; [`Error::Threads`],
/// [`Error::Level`] for a wrong value of an environment variable.
pub fn infer<T: Element>(
    x: Input<'_, T>,
    coefficients: &Coefficients,
    epilogue: Epilogue<View<'_, T>>,
    y: &mut ViewMut<'_, T>,
) -> Result<(), Error> {
    let _mode = begin()?;
    let layout = y.layout();
    x.check("out", layout)?;
    Error::check_channels("x", layout.channels(), coefficients.channels())?;
    coefficients.check_range::<T>()?;
    epilogue.check(layout)?;
    let elements = tile::<T>(layout);
    match Family::of(layout) {
        Family::Planar(planar) => y.map_tiles(&planar.planes(elements), |rect, y| {
            let x = x.tile(planar.inner, rect, &y);
            let coefficients = |r: usize| coefficients.of_channel::<T>((rect.rows.start + r) % planar.channels);
            let then = epilogue.map(|residual| residual.tile(planar.inner, rect));
            dispatch(NormalizeRuns { x, y: &y, coefficients, then });
            Ok(())
        }),
        Family::Interleaved(rows) => y.map_tiles(&rows.tiles(elements), |rect, y| {
            let x = x.tile(rows.width, rect, &y);
            let columns = coefficients.of_columns::<T>(&rows, rect.cols.clone())?;
            let then = epilogue.map(|residual| residual.tile(rows.width, rect));
            dispatch(NormalizeRows { x, y: &y, coefficients: columns.slices(), then });
            Ok(())
        }),
    }
}
