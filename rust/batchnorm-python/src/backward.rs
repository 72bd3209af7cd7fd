//! The tensors that every backward pass takes and returns.

use crate::buffer::{Output, Tensor, empty_vector, filled};
use crate::epilogue::Epilogue;
use batchnorm::{Dy, Element, ViewMut};
use numpy::{PyArray1, PyUntypedArray};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

/// dy, the memory for dx, and the memory for ∂ℓ/∂residual if that is asked for.
pub(crate) struct Back<'py> {
    dy: Tensor<'py>,
    place: Place,
    pub(crate) dx: Output<'py>,
    dresidual: Option<Output<'py>>,
}

/// Which tensor's memory dy lies in.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Own,
    Dx,
    Dresidual,
}

impl<'py> Back<'py> {
    pub(crate) fn read(
        dy: &Bound<'py, PyAny>,
        x: &Tensor<'py>,
        epilogue: &Epilogue<'py>,
        out: Option<&Bound<'py, PyAny>>,
        dresidual: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Self> {
        if dresidual.is_some() && epilogue.residual.is_none() {
            return Err(PyValueError::new_err("dresidual is given, but the forward pass had no residual; wanted None"));
        }
        let dy = x.read_like("dy", dy)?;
        let mut inputs = epilogue.inputs(&[("x", x)]);
        let (dx, over_dy) = x.output_over("out", out, ("dy", &dy), &inputs)?;
        let mut place = if over_dy { Place::Dx } else { Place::Own };
        let dresidual = match dresidual {
            Some(_) => {
                if out.is_some() {
                    inputs.push(("out", &dx.array));
                }
                let (output, over_dy) = x.output_over("dresidual", dresidual, ("dy", &dy), &inputs)?;
                if over_dy {
                    place = Place::Dresidual;
                }
                Some(output)
            }
            None => None,
        };
        Ok(Self { dy, place, dx, dresidual })
    }

    /// dy, dresidual and dx as the core takes them; if an output has dy's memory, there is no separate view of dy.
    pub(crate) fn views<T: Element>(&mut self) -> (Dy<'_, T>, Option<ViewMut<'_, T>>, ViewMut<'_, T>) {
        let dy = match self.place {
            Place::Own => Dy::View(self.dy.view()),
            Place::Dx => Dy::InDx,
            Place::Dresidual => Dy::InDresidual,
        };
        (dy, self.dresidual.as_mut().map(Output::view_mut), self.dx.view_mut())
    }

    /// Memory for dγ and dβ. It is made before the pass writes anything, so that none of its results is lost.
    pub(crate) fn vectors(&self) -> PyResult<[Bound<'py, PyArray1<f64>>; 2]> {
        let vector = || empty_vector(self.dy.array.py(), self.dy.layout.channels());
        Ok([vector()?, vector()?])
    }

    /// The named tuple that a backward pass returns, with the sums in these vectors.
    pub(crate) fn gradients(
        &self,
        epilogue: &Epilogue<'py>,
        sums: &batchnorm::GradientSums,
        [dgamma, dbeta]: [Bound<'py, PyArray1<f64>>; 2],
    ) -> PyResult<Bound<'py, PyAny>> {
        let dx = &self.dx.array;
        let py = dx.py();
        let (dgamma, dbeta) = (filled(dgamma, sums.dgamma())?, filled(dbeta, sums.dbeta())?);
        let gradients = (dx, dgamma, dbeta, self.dresidual(epilogue));
        gradients_type(py)?.call1(gradients)
    }

    /// ∂ℓ/∂residual if it is known: the output that was asked for, or dy itself without an activation.
    fn dresidual(&self, epilogue: &Epilogue<'py>) -> Option<Bound<'py, PyUntypedArray>> {
        let is_dy = epilogue.activation.is_none() && epilogue.residual.is_some() && self.place == Place::Own;
        let asked_for = self.dresidual.as_ref().map(|dresidual| dresidual.array.clone());
        asked_for.or_else(|| is_dy.then(|| self.dy.array.clone()))
    }
}

/// The named tuple that a backward pass returns.
pub(crate) fn gradients_type(py: Python<'_>) -> PyResult<&Bound<'_, PyType>> {
    static GRADIENTS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    GRADIENTS.import(py, "batchnorm._types", "Gradients")
}
