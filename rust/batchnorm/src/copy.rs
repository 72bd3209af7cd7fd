//! Copying a tensor with the threads and tiles of the other passes: the least time that a pass over memory can take.

use crate::element::Element;
use crate::error::Error;
use crate::kernels::Transfer;
use crate::simd::dispatch;
use crate::verb::begin;
use crate::view::{Grid, View, ViewMut};

/// Copies a tensor, y = x, or adds two, y = x + z; with non-temporal stores if `streaming`. For benchmarks.
///
/// # Errors
/// [`Error::LayoutMismatch`]; [`Error::Threads`], [`Error::Level`] for a wrong value of an environment variable.
pub fn copy<T: Element>(
    x: View<'_, T>,
    z: Option<View<'_, T>>,
    y: &mut ViewMut<'_, T>,
    streaming: bool,
) -> Result<(), Error> {
    let _mode = begin()?;
    let layout = x.layout();
    if y.layout() != layout {
        return Err(Error::LayoutMismatch { argument: "out" });
    }
    if z.is_some_and(|z| z.layout() != layout) {
        return Err(Error::LayoutMismatch { argument: "z" });
    }
    let elements = crate::partition::tile::<T>(layout);
    let grid = Grid::new(1, layout.len(), 1, elements);
    y.map_tiles(&grid, |rect, y| {
        let (x, z) = (x.tile(layout.len(), rect), z.map(|z| z.tile(layout.len(), rect)));
        dispatch(Transfer { x, z, y: &y, streaming });
        Ok(())
    })
}
