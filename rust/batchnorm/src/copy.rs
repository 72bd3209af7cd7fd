//! The floor under every verb: what it costs to move the memory, by the same threads and in the same tiles.

use crate::element::Element;
use crate::error::Error;
use crate::kernels::Transfer;
use crate::simd::dispatch;
use crate::verb::begin;
use crate::view::{Grid, View, ViewMut};

/// y = x, or y = x + z: reads one or two tensors and writes one, past the caches if `streaming`. For benchmarks.
///
/// # Errors
/// [`Error::LayoutMismatch`], and [`Error::Threads`], [`Error::Level`] for what the environment names wrongly.
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
