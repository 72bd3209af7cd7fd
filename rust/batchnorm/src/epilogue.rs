//! What may follow normalization in the same pass: a residual is added, an activation applied.

use crate::element::Element;
use crate::error::Error;
use crate::input::check_layout;
use crate::layout::Layout;
use crate::view::View;

/// A function of every element by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// max(v, 0): a NaN stays one, −0 becomes 0. Its gradient passes where y > 0.
    Relu,
}

/// What follows normalization: y = activation(v + residual), where v is the normalized value, scaled and shifted. It is
/// computed in the precision of v and rounded once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Epilogue<R> {
    /// What is applied to the sum.
    pub activation: Option<Activation>,
    /// What is added: a tensor like x.
    pub residual: Option<R>,
}

/// Nothing follows.
impl<R> Default for Epilogue<R> {
    fn default() -> Self {
        Self { activation: None, residual: None }
    }
}

impl<R: Copy> Epilogue<R> {
    /// The epilogue with its residual in another form.
    #[inline(always)]
    pub(crate) fn map<S>(&self, f: impl FnOnce(R) -> S) -> Epilogue<S> {
        Epilogue { activation: self.activation, residual: self.residual.map(f) }
    }
}

impl<T: Element> Epilogue<View<'_, T>> {
    /// Checks that the residual has the layout of x.
    pub(crate) fn check(&self, layout: Layout) -> Result<(), Error> {
        self.residual.map_or(Ok(()), |residual| check_layout("residual", residual.layout(), layout))
    }
}
