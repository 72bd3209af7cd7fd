//! Passes over the tensors of a host library: in its memory, on its threads.

use crate::buffer::{Exchange, HostOutput, HostTensor, HostTensors, HostVector, with_element};
use crate::epilogue::activation_of;
use crate::parameters::Parameters;
use crate::run::run;
use crate::value_error;
use batchnorm::{Activation, Coefficients, Dy, Element, Epilogue, Error, ForwardPass, Input, Team, ThreadSource, View};
use pyo3::prelude::*;
use pyo3::types::PyType;
use std::path::PathBuf;

/// Passes over the tensors of a host library, in its memory and on its threads.
///
/// Tensors are read by DLPack's C exchange API, also those of bfloat16 and those that require grad. The channels are on axis
/// 1. Every method writes its results into tensors that it is given, and returns None:
///
/// - x is of rank 2 or more; float32, float64, float16 or bfloat16; dense in some order of its axes. dy, residual, y, dx and
///   dresidual have x's shape, dtype and strides.
/// - weight, bias, running_mean, running_var, mean, var, dweight and dbias are contiguous, shape (channels,), each float32 or
///   float64.
/// - moments is contiguous, shape (3, channels), float64: count, mean and M2. So is sums: count, dγ and dβ.
/// - What is written shares no memory with another argument.
///
/// weight, bias, residual, running_mean, running_var, dresidual, dweight and dbias may be None.
///
/// Args:
///     tensor_type: The type of the host's tensors.
///     library: Path of the OpenMP runtime whose threads work; if None, the runtime that the process has loaded. Where there
///         is none, threads of our own work.
///
/// Raises:
///     TypeError: tensor_type has no DLPack C exchange API of version 1. Methods raise it where a tensor is of a wrong type
///         or dtype, or not on the CPU.
///     ValueError: library is not an OpenMP runtime. Methods raise it where a shape, a memory order or a value is not as described. If it is an error of the
///         core, its attribute `kind` names it.
#[pyclass(frozen, module = "batchnorm._core", name = "Host")]
pub(crate) struct Host {
    exchange: Exchange,
    team: Option<Team>,
}

/// An optional argument.
type Optional<'a, 'py> = Option<&'a Bound<'py, PyAny>>;

/// The tensors of the forward pass, and what it is to do.
struct Forward<'a> {
    x: HostTensor<'a>,
    residual: Option<HostTensor<'a>>,
    activation: Option<Activation>,
    parameters: Parameters,
}

impl<'a> Forward<'a> {
    fn read(
        tensors: &mut HostTensors<'a>,
        x: &'a Bound<'_, PyAny>,
        (weight, bias): (Optional<'a, '_>, Optional<'a, '_>),
        residual: Optional<'a, '_>,
        eps: f64,
        activation: Optional<'_, '_>,
    ) -> PyResult<Self> {
        let x = tensors.x(x)?;
        let gamma = weight.map(|weight| tensors.numbers("weight", weight, &x)).transpose()?;
        let beta = bias.map(|bias| tensors.numbers("bias", bias, &x)).transpose()?;
        let residual = residual.map(|residual| tensors.input("residual", residual, &x)).transpose()?;
        let activation = activation.map(activation_of).transpose()?;
        Ok(Self { x, residual, activation, parameters: Parameters::new(gamma, beta, eps) })
    }

    fn epilogue<T: Element>(&self) -> Epilogue<View<'a, T>> {
        Epilogue { activation: self.activation, residual: self.residual.as_ref().map(HostTensor::view::<T>) }
    }

    fn pass<'b, T: Element>(&'b self, coefficients: &'b Coefficients) -> ForwardPass<'b, T> {
        ForwardPass { x: self.x.view(), coefficients, epilogue: self.epilogue() }
    }

    /// The coefficients of the moments that a table holds.
    fn of_moments(&self, [count, mean, m2]: [Vec<f64>; 3]) -> PyResult<Coefficients> {
        let moments = batchnorm::Moments::new(count, mean, m2).map_err(value_error)?;
        Coefficients::of_moments(&moments, self.parameters.of()).map_err(value_error)
    }

    /// The coefficients of frozen statistics.
    fn of_statistics(&self, mean: &[f64], var: &[f64]) -> PyResult<Coefficients> {
        Coefficients::new(mean, var, self.parameters.of()).map_err(value_error)
    }
}

/// Memory for dγ and dβ, where they are wanted.
struct Sums<'a> {
    dweight: Option<HostVector<'a>>,
    dbias: Option<HostVector<'a>>,
}

impl<'a> Sums<'a> {
    fn read(
        tensors: &mut HostTensors<'a>,
        dweight: Optional<'a, '_>,
        dbias: Optional<'a, '_>,
        x: &HostTensor<'_>,
    ) -> PyResult<Self> {
        let dweight = dweight.map(|dweight| tensors.numbers_out("dweight", dweight, x)).transpose()?;
        let dbias = dbias.map(|dbias| tensors.numbers_out("dbias", dbias, x)).transpose()?;
        Ok(Self { dweight, dbias })
    }

    fn fill(mut self, sums: &batchnorm::GradientSums) -> PyResult<()> {
        self.dweight.as_mut().map_or(Ok(()), |dweight| dweight.fill(sums.dgamma()))?;
        self.dbias.as_mut().map_or(Ok(()), |dbias| dbias.fill(sums.dbeta()))
    }
}

impl Host {
    fn tensors(&self) -> HostTensors<'_> {
        HostTensors::new(&self.exchange)
    }

    /// Runs a pass on the host's threads.
    fn run<R: Send>(
        &self,
        py: Python<'_>,
        x: &HostTensor<'_>,
        threads: usize,
        work: impl FnOnce() -> Result<R, Error> + Send,
    ) -> PyResult<R> {
        run(py, x.bytes(), || batchnorm::hosted(self.team, threads, work))
    }
}

#[pymethods]
impl Host {
    #[new]
    #[pyo3(signature = (tensor_type, library=None))]
    fn new(tensor_type: &Bound<'_, PyType>, library: Option<PathBuf>) -> PyResult<Self> {
        let exchange = Exchange::of(tensor_type)?;
        let team = Team::find(library.as_deref()).map_err(value_error)?;
        Ok(Self { exchange, team })
    }

    /// Whose threads work: "openmp", those of the runtime; "own" where there is none, and in a forked child.
    #[getter]
    fn thread_source(&self) -> &'static str {
        let source = self.team.filter(Team::usable).map_or(ThreadSource::Own, ThreadSource::OpenMp);
        source.name()
    }

    /// Normalize x by its own batch statistics (Algorithm 1): y = activation(γ·x̂ + β + residual), rounded once.
    ///
    /// The running statistics move towards those of the batch, r ← (1 − w)·r + w·new: computed in float64, the variance
    /// unbiased; what is not finite enters.
    ///
    /// Args:
    ///     x: Tensor with 2 or more values in each channel.
    ///     weight: γ; 1 if None.
    ///     bias: β; 0 if None.
    ///     residual: Tensor that is added before the activation, or None.
    ///     running_mean: Running mean, changed in place, or None.
    ///     running_var: Running variance, changed in place, or None.
    ///     y: Tensor to write y to.
    ///     moments: Table to write the moments of x to.
    ///     threads: Number of threads that the host works with.
    ///     update_weight: w, the weight of the new value in the running statistics.
    ///     eps: ε, finite and more than 0.
    ///     activation: None, "relu" or "relu6".
    ///
    /// Raises:
    ///     ValueError: A shape, memory order or value is not as described.
    ///     TypeError: A tensor is of a wrong type or dtype, or not on the CPU.
    #[pyo3(signature = (
        x, weight, bias, residual, running_mean, running_var, y, moments, *, threads, update_weight, eps, activation
    ))]
    #[allow(clippy::too_many_arguments, reason = "the signature that Python has")]
    fn train(
        &self,
        x: &Bound<'_, PyAny>,
        weight: Optional<'_, '_>,
        bias: Optional<'_, '_>,
        residual: Optional<'_, '_>,
        running_mean: Optional<'_, '_>,
        running_var: Optional<'_, '_>,
        y: &Bound<'_, PyAny>,
        moments: &Bound<'_, PyAny>,
        threads: usize,
        update_weight: f64,
        eps: f64,
        activation: Optional<'_, '_>,
    ) -> PyResult<()> {
        let (py, mut tensors) = (x.py(), self.tensors());
        let forward = Forward::read(&mut tensors, x, (weight, bias), residual, eps, activation)?;
        let x = &forward.x;
        let mut running_mean = running_mean.map(|mean| tensors.numbers_out("running_mean", mean, x)).transpose()?;
        let mut running_var = running_var.map(|var| tensors.numbers_out("running_var", var, x)).transpose()?;
        let mut y = tensors.output("y", y, x)?;
        let mut table = tensors.table_out("moments", moments, x)?;
        let (moments, _) = with_element!(x.dtype, T => {
            let (view, epilogue, mut y) = (x.view::<T>(), forward.epilogue::<T>(), y.view_mut::<T>());
            let pass = || batchnorm::train_forward(Input::View(view), forward.parameters.of(), epilogue, &mut y);
            self.run(py, x, threads, pass)
        })?;
        table.fill([moments.count(), moments.mean(), moments.m2()]);
        let (mean, var) = (running_mean.as_mut(), running_var.as_mut());
        moments
            .update_running(update_weight, mean.map(HostVector::numbers), var.map(HostVector::numbers))
            .map_err(value_error)
    }

    /// Normalize x by frozen statistics (Algorithm 2): y = activation((x − mean)·γ/√(var + ε) + β + residual).
    ///
    /// Args:
    ///     x: Tensor.
    ///     weight: γ; 1 if None.
    ///     bias: β; 0 if None.
    ///     residual: Tensor that is added before the activation, or None.
    ///     mean: E[x].
    ///     var: Var[x]; 0 or more.
    ///     y: Tensor to write y to.
    ///     threads: Number of threads that the host works with.
    ///     eps: ε, finite, 0 or more; 0 only if every var is more than 0.
    ///     activation: None, "relu" or "relu6".
    ///
    /// Raises:
    ///     ValueError: A shape, memory order or value is not as described.
    ///     TypeError: A tensor is of a wrong type or dtype, or not on the CPU.
    #[pyo3(signature = (x, weight, bias, residual, mean, var, y, *, threads, eps, activation))]
    #[allow(clippy::too_many_arguments, reason = "the signature that Python has")]
    fn infer(
        &self,
        x: &Bound<'_, PyAny>,
        weight: Optional<'_, '_>,
        bias: Optional<'_, '_>,
        residual: Optional<'_, '_>,
        mean: &Bound<'_, PyAny>,
        var: &Bound<'_, PyAny>,
        y: &Bound<'_, PyAny>,
        threads: usize,
        eps: f64,
        activation: Optional<'_, '_>,
    ) -> PyResult<()> {
        let (py, mut tensors) = (x.py(), self.tensors());
        let forward = Forward::read(&mut tensors, x, (weight, bias), residual, eps, activation)?;
        let x = &forward.x;
        let (mean, var) = (tensors.numbers("mean", mean, x)?, tensors.numbers("var", var, x)?);
        let mut y = tensors.output("y", y, x)?;
        let coefficients = forward.of_statistics(&mean, &var)?;
        with_element!(x.dtype, T => {
            let (view, epilogue, mut y) = (x.view::<T>(), forward.epilogue::<T>(), y.view_mut::<T>());
            self.run(py, x, threads, || batchnorm::infer(Input::View(view), &coefficients, epilogue, &mut y))
        })
    }

    /// Compute the gradients of a training pass, through the batch statistics (section 3): dx, dγ and dβ.
    ///
    /// Args:
    ///     dy: ∂ℓ/∂y.
    ///     x: The x of `train`.
    ///     weight: γ; 1 if None.
    ///     bias: β; 0 if None.
    ///     residual: The residual of `train`, or None.
    ///     moments: The moments of x.
    ///     dx: Tensor to write ∂ℓ/∂x to.
    ///     dresidual: Tensor to write ∂ℓ/∂residual to, which is the gradient that passes the activation, or None.
    ///     dweight: Where to write ∂ℓ/∂γ, or None.
    ///     dbias: Where to write ∂ℓ/∂β, or None.
    ///     threads: Number of threads that the host works with.
    ///     eps: ε, finite and more than 0.
    ///     activation: The activation of `train`.
    ///
    /// Raises:
    ///     ValueError: A shape, memory order or value is not as described.
    ///     TypeError: A tensor is of a wrong type or dtype, or not on the CPU.
    #[pyo3(signature = (
        dy, x, weight, bias, residual, moments, dx, dresidual, dweight, dbias, *, threads, eps, activation
    ))]
    #[allow(clippy::too_many_arguments, reason = "the signature that Python has")]
    fn backward(
        &self,
        dy: &Bound<'_, PyAny>,
        x: &Bound<'_, PyAny>,
        weight: Optional<'_, '_>,
        bias: Optional<'_, '_>,
        residual: Optional<'_, '_>,
        moments: &Bound<'_, PyAny>,
        dx: &Bound<'_, PyAny>,
        dresidual: Optional<'_, '_>,
        dweight: Optional<'_, '_>,
        dbias: Optional<'_, '_>,
        threads: usize,
        eps: f64,
        activation: Optional<'_, '_>,
    ) -> PyResult<()> {
        let (py, mut tensors) = (x.py(), self.tensors());
        let forward = Forward::read(&mut tensors, x, (weight, bias), residual, eps, activation)?;
        let x = &forward.x;
        let dy = tensors.input("dy", dy, x)?;
        let coefficients = forward.of_moments(tensors.table("moments", moments, x)?)?;
        let mut dx = tensors.output("dx", dx, x)?;
        let mut dresidual = dresidual.map(|dresidual| tensors.output("dresidual", dresidual, x)).transpose()?;
        let wanted = Sums::read(&mut tensors, dweight, dbias, x)?;
        let sums = with_element!(x.dtype, T => {
            let (dy, pass) = (Dy::View(dy.view::<T>()), forward.pass::<T>(&coefficients));
            let (mut dx, mut dresidual) = (dx.view_mut::<T>(), dresidual.as_mut().map(HostOutput::view_mut::<T>));
            self.run(py, x, threads, || batchnorm::backward(dy, pass, dresidual.as_mut(), &mut dx))
        })?;
        wanted.fill(&sums)
    }

    /// Compute the gradients with frozen statistics: dx = γ/√(var + ε)·dy, dγ = Σdy·x̂, dβ = Σdy.
    ///
    /// Args:
    ///     dy: ∂ℓ/∂y.
    ///     x: The x of `infer`.
    ///     weight: γ; 1 if None.
    ///     bias: β; 0 if None.
    ///     residual: The residual of `infer`, or None.
    ///     mean: E[x].
    ///     var: Var[x]; 0 or more.
    ///     dx: Tensor to write ∂ℓ/∂x to.
    ///     dresidual: Tensor to write ∂ℓ/∂residual to, which is the gradient that passes the activation, or None.
    ///     dweight: Where to write ∂ℓ/∂γ, or None.
    ///     dbias: Where to write ∂ℓ/∂β, or None.
    ///     threads: Number of threads that the host works with.
    ///     eps: ε, finite, 0 or more; 0 only if every var is more than 0.
    ///     activation: The activation of `infer`.
    ///
    /// Raises:
    ///     ValueError: A shape, memory order or value is not as described.
    ///     TypeError: A tensor is of a wrong type or dtype, or not on the CPU.
    #[pyo3(signature = (
        dy, x, weight, bias, residual, mean, var, dx, dresidual, dweight, dbias, *, threads, eps, activation
    ))]
    #[allow(clippy::too_many_arguments, reason = "the signature that Python has")]
    fn infer_backward(
        &self,
        dy: &Bound<'_, PyAny>,
        x: &Bound<'_, PyAny>,
        weight: Optional<'_, '_>,
        bias: Optional<'_, '_>,
        residual: Optional<'_, '_>,
        mean: &Bound<'_, PyAny>,
        var: &Bound<'_, PyAny>,
        dx: &Bound<'_, PyAny>,
        dresidual: Optional<'_, '_>,
        dweight: Optional<'_, '_>,
        dbias: Optional<'_, '_>,
        threads: usize,
        eps: f64,
        activation: Optional<'_, '_>,
    ) -> PyResult<()> {
        let (py, mut tensors) = (x.py(), self.tensors());
        let forward = Forward::read(&mut tensors, x, (weight, bias), residual, eps, activation)?;
        let x = &forward.x;
        let dy = tensors.input("dy", dy, x)?;
        let (mean, var) = (tensors.numbers("mean", mean, x)?, tensors.numbers("var", var, x)?);
        let mut dx = tensors.output("dx", dx, x)?;
        let mut dresidual = dresidual.map(|dresidual| tensors.output("dresidual", dresidual, x)).transpose()?;
        let wanted = Sums::read(&mut tensors, dweight, dbias, x)?;
        let coefficients = forward.of_statistics(&mean, &var)?;
        let sums = with_element!(x.dtype, T => {
            let (dy, pass) = (Dy::View(dy.view::<T>()), forward.pass::<T>(&coefficients));
            let (mut dx, mut dresidual) = (dx.view_mut::<T>(), dresidual.as_mut().map(HostOutput::view_mut::<T>));
            self.run(py, x, threads, || batchnorm::infer_backward(dy, pass, dresidual.as_mut(), &mut dx))
        })?;
        wanted.fill(&sums)
    }

    /// Compute the moments of x: count, mean and M2 of each channel.
    ///
    /// Args:
    ///     x: Tensor.
    ///     moments: Table to write the moments to.
    ///     threads: Number of threads that the host works with.
    ///
    /// Raises:
    ///     ValueError: A shape or memory order is not as described.
    ///     TypeError: A tensor is of a wrong type or dtype, or not on the CPU.
    #[pyo3(signature = (x, moments, *, threads))]
    fn moments(&self, x: &Bound<'_, PyAny>, moments: &Bound<'_, PyAny>, threads: usize) -> PyResult<()> {
        let (py, mut tensors) = (x.py(), self.tensors());
        let x = &tensors.x(x)?;
        let mut table = tensors.table_out("moments", moments, x)?;
        let moments = with_element!(x.dtype, T => {
            let view = x.view::<T>();
            self.run(py, x, threads, || batchnorm::moments(view))
        })?;
        table.fill([moments.count(), moments.mean(), moments.m2()]);
        Ok(())
    }

    /// Normalize x by given moments: y = activation(γ·(x − mean)/√(σ² + ε) + β + residual), with the biased variance.
    ///
    /// Args:
    ///     x: Tensor.
    ///     weight: γ; 1 if None.
    ///     bias: β; 0 if None.
    ///     residual: Tensor that is added before the activation, or None.
    ///     moments: Moments with 2 or more values in each channel, which may cover more than x.
    ///     y: Tensor to write y to.
    ///     threads: Number of threads that the host works with.
    ///     eps: ε, finite and more than 0.
    ///     activation: None, "relu" or "relu6".
    ///
    /// Raises:
    ///     ValueError: A shape, memory order or value is not as described.
    ///     TypeError: A tensor is of a wrong type or dtype, or not on the CPU.
    #[pyo3(signature = (x, weight, bias, residual, moments, y, *, threads, eps, activation))]
    #[allow(clippy::too_many_arguments, reason = "the signature that Python has")]
    fn normalize(
        &self,
        x: &Bound<'_, PyAny>,
        weight: Optional<'_, '_>,
        bias: Optional<'_, '_>,
        residual: Optional<'_, '_>,
        moments: &Bound<'_, PyAny>,
        y: &Bound<'_, PyAny>,
        threads: usize,
        eps: f64,
        activation: Optional<'_, '_>,
    ) -> PyResult<()> {
        let (py, mut tensors) = (x.py(), self.tensors());
        let forward = Forward::read(&mut tensors, x, (weight, bias), residual, eps, activation)?;
        let x = &forward.x;
        let coefficients = forward.of_moments(tensors.table("moments", moments, x)?)?;
        let mut y = tensors.output("y", y, x)?;
        with_element!(x.dtype, T => {
            let (view, epilogue, mut y) = (x.view::<T>(), forward.epilogue::<T>(), y.view_mut::<T>());
            self.run(py, x, threads, || batchnorm::infer(Input::View(view), &coefficients, epilogue, &mut y))
        })
    }

    /// Compute the sums of a backward pass: dγ = Σdy·x̂ and dβ = Σdy of each channel (section 3).
    ///
    /// Args:
    ///     dy: ∂ℓ/∂y.
    ///     x: The x of `normalize`.
    ///     weight: γ; 1 if None.
    ///     bias: β; 0 if None.
    ///     residual: The residual of `normalize`, or None.
    ///     moments: The moments of `normalize`.
    ///     sums: Table to write the sums to.
    ///     threads: Number of threads that the host works with.
    ///     eps: ε, finite and more than 0.
    ///     activation: The activation of `normalize`.
    ///
    /// Raises:
    ///     ValueError: A shape, memory order or value is not as described.
    ///     TypeError: A tensor is of a wrong type or dtype, or not on the CPU.
    #[pyo3(signature = (dy, x, weight, bias, residual, moments, sums, *, threads, eps, activation))]
    #[allow(clippy::too_many_arguments, reason = "the signature that Python has")]
    fn gradient_sums(
        &self,
        dy: &Bound<'_, PyAny>,
        x: &Bound<'_, PyAny>,
        weight: Optional<'_, '_>,
        bias: Optional<'_, '_>,
        residual: Optional<'_, '_>,
        moments: &Bound<'_, PyAny>,
        sums: &Bound<'_, PyAny>,
        threads: usize,
        eps: f64,
        activation: Optional<'_, '_>,
    ) -> PyResult<()> {
        let (py, mut tensors) = (x.py(), self.tensors());
        let forward = Forward::read(&mut tensors, x, (weight, bias), residual, eps, activation)?;
        let x = &forward.x;
        let dy = tensors.input("dy", dy, x)?;
        let coefficients = forward.of_moments(tensors.table("moments", moments, x)?)?;
        let mut table = tensors.table_out("sums", sums, x)?;
        let sums = with_element!(x.dtype, T => {
            let (dy, pass) = (dy.view::<T>(), forward.pass::<T>(&coefficients));
            self.run(py, x, threads, || batchnorm::gradient_sums(dy, pass))
        })?;
        table.fill([sums.count(), sums.dgamma(), sums.dbeta()]);
        Ok(())
    }

    /// Compute the input gradient from the sums: dx = γ/√(σ²+ε)·(dy − dβ/m − x̂·dγ/m) (section 3, in closed form).
    ///
    /// Args:
    ///     dy: ∂ℓ/∂y.
    ///     x: The x of `normalize`.
    ///     weight: γ; 1 if None.
    ///     bias: β; 0 if None.
    ///     residual: The residual of `normalize`, or None.
    ///     moments: The moments of `normalize`.
    ///     sums: Gradient sums over all values that the moments cover; m is their count.
    ///     dx: Tensor to write ∂ℓ/∂x to.
    ///     dresidual: Tensor to write ∂ℓ/∂residual to, which is the gradient that passes the activation, or None.
    ///     threads: Number of threads that the host works with.
    ///     eps: ε, finite and more than 0.
    ///     activation: The activation of `normalize`.
    ///
    /// Raises:
    ///     ValueError: A shape, memory order or value is not as described.
    ///     TypeError: A tensor is of a wrong type or dtype, or not on the CPU.
    #[pyo3(signature = (
        dy, x, weight, bias, residual, moments, sums, dx, dresidual, *, threads, eps, activation
    ))]
    #[allow(clippy::too_many_arguments, reason = "the signature that Python has")]
    fn gradient_apply(
        &self,
        dy: &Bound<'_, PyAny>,
        x: &Bound<'_, PyAny>,
        weight: Optional<'_, '_>,
        bias: Optional<'_, '_>,
        residual: Optional<'_, '_>,
        moments: &Bound<'_, PyAny>,
        sums: &Bound<'_, PyAny>,
        dx: &Bound<'_, PyAny>,
        dresidual: Optional<'_, '_>,
        threads: usize,
        eps: f64,
        activation: Optional<'_, '_>,
    ) -> PyResult<()> {
        let (py, mut tensors) = (x.py(), self.tensors());
        let forward = Forward::read(&mut tensors, x, (weight, bias), residual, eps, activation)?;
        let x = &forward.x;
        let dy = tensors.input("dy", dy, x)?;
        let coefficients = forward.of_moments(tensors.table("moments", moments, x)?)?;
        let [count, dgamma, dbeta] = tensors.table("sums", sums, x)?;
        let sums = batchnorm::GradientSums::new(count, dgamma, dbeta).map_err(value_error)?;
        let mut dx = tensors.output("dx", dx, x)?;
        let mut dresidual = dresidual.map(|dresidual| tensors.output("dresidual", dresidual, x)).transpose()?;
        with_element!(x.dtype, T => {
            let (dy, pass) = (Dy::View(dy.view::<T>()), forward.pass::<T>(&coefficients));
            let (mut dx, mut dresidual) = (dx.view_mut::<T>(), dresidual.as_mut().map(HostOutput::view_mut::<T>));
            self.run(py, x, threads, || batchnorm::gradient_apply(dy, pass, &sums, dresidual.as_mut(), &mut dx))
        })
    }
}
