//! The epilogue: a residual added and an activation applied in the same pass as normalization.

use crate::element::Element;
use crate::error::Error;
use crate::input::check_layout;
use crate::layout::Layout;
use crate::view::View;

/// An elementwise activation function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// max(v, 0); NaN stays NaN and −0 becomes 0. Its backward is dy where y > 0, else 0.
    Relu,
    /// min(max(v, 0), 6); NaN stays NaN and −0 becomes 0. Its backward is dy where 0 < y < 6, else 0.
    Relu6,
}

impl Activation {
    /// All activations.
    pub const ALL: [Self; 2] = [Self::Relu, Self::Relu6];

    /// Its name: "relu" or "relu6".
    pub fn name(self) -> &'static str {
        match self {
            Self::Relu => "relu",
            Self::Relu6 => "relu6",
        }
    }
}

/// What follows normalization in the same pass: y = activation(v + residual), where v = γx̂ + β.
///
/// The sum and the activation are computed in the precision of v, and y is rounded once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Epilogue<R> {
    /// The function that is applied last.
    pub activation: Option<Activation>,
    /// The tensor that is added before the activation, with the layout of x.
    pub residual: Option<R>,
}

/// No activation and no residual: y = v.
impl<R> Default for Epilogue<R> {
    fn default() -> Self {
        Self { activation: None, residual: None }
    }
}

impl<R: Copy> Epilogue<R> {
    /// Applies `f` to the residual, if there is one.
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
