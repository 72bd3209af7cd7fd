//! Where a pass reads its input: from a separate tensor, or from the memory that it writes (in place).

use crate::element::Element;
use crate::error::Error;
use crate::layout::Layout;
use crate::view::{Rect, Tile, TileMut, View, ViewMut};

/// The input of a pass that maps it, element by element, to an output of the same layout.
#[derive(Clone, Copy)]
pub enum Input<'a, T: Copy> {
    /// A tensor in memory of its own, with the layout of the output.
    View(View<'a, T>),
    /// The tensor that lies in the output's memory; the result overwrites it.
    InPlace,
}

impl<'a, T: Element> Input<'a, T> {
    pub(crate) fn check(&self, argument: &'static str, layout: Layout) -> Result<(), Error> {
        match self {
            Self::View(view) => check_layout(argument, view.layout(), layout),
            Self::InPlace => Ok(()),
        }
    }

    /// The input tensor of a pass that writes `output`.
    pub(crate) fn view<'b>(&self, output: &'b ViewMut<'_, T>) -> View<'b, T>
    where
        'a: 'b,
    {
        match *self {
            Self::View(view) => view,
            Self::InPlace => output.as_view(),
        }
    }

    /// The rectangle `rect` of the input, read as a matrix with rows of `width` elements; `output` is the same rectangle of
    /// the output.
    #[inline]
    pub(crate) fn tile<'b>(&self, width: usize, rect: &Rect, output: &'b TileMut<'_, T>) -> Tile<'b, T>
    where
        'a: 'b,
    {
        match self {
            Self::View(view) => view.tile(width, rect),
            Self::InPlace => output.as_tile(),
        }
    }
}

pub(crate) fn check_layout(argument: &'static str, got: Layout, wanted: Layout) -> Result<(), Error> {
    if got == wanted { Ok(()) } else { Err(Error::LayoutMismatch { argument }) }
}
