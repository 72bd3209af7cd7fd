"""The compiled core; import `batchnorm` to use it."""

from os import PathLike
from typing import Any, Final, Literal, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm._types import Gradients

__all__ = [
    "ERROR_KINDS",
    "Cache",
    "CoMoments",
    "Coefficients",
    "GradientSums",
    "Host",
    "HostTypes",
    "Moments",
    "WhiteningCache",
    "WhiteningMap",
    "__version__",
    "backward",
    "comoments",
    "copy",
    "get_num_threads",
    "get_thread_source",
    "gradient_apply",
    "gradient_sums",
    "infer",
    "infer_backward",
    "json_cut_data",
    "json_parse",
    "json_put_data",
    "moments",
    "normalize",
    "real_array",
    "release_memory",
    "set_num_threads",
    "set_simd_level",
    "set_thread_source",
    "simd_level",
    "simd_levels",
    "tensor",
    "train_forward",
    "whiten_backward",
    "whiten_forward",
    "whitening_matrix",
]

__version__: Final[str]
ERROR_KINDS: Final[list[str]]

@final
class Moments:
    """Count, mean and M2 of each channel, in float64: immutable, and mergeable over parts of the data.

    `m2` is Σ(x − mean)². The moments of parts merge into those of the whole by the update of Chan, Golub and LeVeque
    (1979). The moments of no values (count 0) are the neutral element.

    Args:
        count: Values per channel, shape (channels,); finite, 0 or more.
        mean: Mean per channel, shape (channels,).
        m2: Sum of squared deviations per channel, shape (channels,); 0 or more.

    Raises:
        ValueError: Shapes differ, or a count or m2 is negative.
        TypeError: An argument is not an array of real numbers.
    """
    def __new__(cls, count: ArrayLike, mean: ArrayLike, m2: ArrayLike) -> Moments: ...
    @property
    def channels(self) -> int:
        """Number of channels."""
    @property
    def count(self) -> NDArray[np.float64]:
        """Values per channel, shape (channels,), float64: the paper's m."""
    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean per channel, shape (channels,), float64: the paper's μ_B."""
    @property
    def m2(self) -> NDArray[np.float64]:
        """Σ(x − mean)² per channel, shape (channels,), float64."""
    @property
    def var(self) -> NDArray[np.float64]:
        """Biased variance m2/count, shape (channels,), float64: the paper's σ²_B (Algorithm 1).

        Raises:
            ValueError: A channel has no value.
        """
    @property
    def var_unbiased(self) -> NDArray[np.float64]:
        """Unbiased variance m2/(count − 1), shape (channels,), float64 (section 3.1).

        Raises:
            ValueError: A channel has fewer than 2 values.
        """
    def merge(self, other: Moments) -> Moments:
        """Return the moments over the values of both, as a new object.

        Raises:
            ValueError: The numbers of channels differ.
        """
    def to_bytes(self) -> bytes:
        """Encode as bytes: a header with the version, the number of channels, then count, mean and m2, little-endian."""
    @staticmethod
    def from_bytes(data: bytes) -> Moments:
        """Decode the bytes that `to_bytes` returned.

        Raises:
            ValueError: The bytes are not those of Moments.
        """
    def __eq__(self, other: object, /) -> bool: ...
    def __reduce__(self) -> tuple[Any, tuple[bytes]]: ...

@final
class GradientSums:
    """Σdy·x̂ and Σdy of each channel, and the number of values summed, in float64: immutable, and mergeable over parts.

    Args:
        count: Values per channel, shape (channels,); finite, 0 or more.
        dgamma: Σdy·x̂ per channel, shape (channels,).
        dbeta: Σdy per channel, shape (channels,).

    Raises:
        ValueError: Shapes differ, or a count is negative.
        TypeError: An argument is not an array of real numbers.
    """
    def __new__(cls, count: ArrayLike, dgamma: ArrayLike, dbeta: ArrayLike) -> GradientSums: ...
    @property
    def channels(self) -> int:
        """Number of channels."""
    @property
    def count(self) -> NDArray[np.float64]:
        """Values per channel, shape (channels,), float64."""
    @property
    def dgamma(self) -> NDArray[np.float64]:
        """∂ℓ/∂γ = Σdy·x̂, shape (channels,), float64 (section 3)."""
    @property
    def dbeta(self) -> NDArray[np.float64]:
        """∂ℓ/∂β = Σdy, shape (channels,), float64 (section 3)."""
    def merge(self, other: GradientSums) -> GradientSums:
        """Return the sums over the values of both, as a new object.

        Raises:
            ValueError: The numbers of channels differ.
        """
    def to_bytes(self) -> bytes:
        """Encode as bytes: a header with the version, the number of channels, then count, dγ and dβ, little-endian."""
    @staticmethod
    def from_bytes(data: bytes) -> GradientSums:
        """Decode the bytes that `to_bytes` returned.

        Raises:
            ValueError: The bytes are not those of GradientSums.
        """
    def __eq__(self, other: object, /) -> bool: ...
    def __reduce__(self) -> tuple[Any, tuple[bytes]]: ...

@final
class Cache:
    """Everything that a backward pass needs of its forward pass.

    It holds x and residual by reference: they must not be changed between the two passes.
    """
    @property
    def x(self) -> NDArray[Any] | None:
        """The input of the forward pass; None if y was written over it."""
    @property
    def residual(self) -> NDArray[Any] | None:
        """The residual of the forward pass; None if it had none."""
    @property
    def activation(self) -> str | None:
        """The name of the forward pass's activation, "relu" or "relu6"; None if it had none."""
    @property
    def moments(self) -> Moments:
        """The moments by which x was normalized."""
    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean by which x was normalized, shape (channels,), float64."""
    @property
    def invstd(self) -> NDArray[np.float64]:
        """1/√(σ² + ε) of each channel, shape (channels,), float64."""
    @property
    def channel_axis(self) -> int:
        """The channel axis of the forward pass, as it was passed in."""

@final
class Coefficients:
    """The validated coefficients of a frozen layer: y = (x − mean)·s + β with s = γ/√(var + ε), in float64.

    Args:
        mean: E[x], shape (channels,) or a number.
        var: Var[x], shape (channels,) or a number; 0 or more.
        gamma: γ, shape (channels,) or a number; 1 if None.
        beta: β, shape (channels,) or a number; 0 if None.
        eps: ε, finite, 0 or more; 0 only if every var is more than 0.

    Raises:
        ValueError: A shape or value is not as described.
        TypeError: A parameter is not an array of real numbers.
    """
    def __new__(
        cls,
        mean: ArrayLike,
        var: ArrayLike,
        gamma: ArrayLike | None = None,
        beta: ArrayLike | None = None,
        *,
        eps: float = 1e-5,
    ) -> Coefficients: ...
    @property
    def channels(self) -> int:
        """Number of channels."""
    def infer(
        self,
        x: Any,
        *,
        channel_axis: int = 1,
        out: NDArray[Any] | None = None,
        activation: Literal["relu", "relu6"] | None = None,
        residual: Any | None = None,
    ) -> NDArray[Any]:
        """Normalize x by these coefficients; `batchnorm.infer` documents the arguments."""
    def backward(
        self,
        dy: Any,
        x: Any,
        *,
        channel_axis: int = 1,
        out: NDArray[Any] | None = None,
        activation: Literal["relu", "relu6"] | None = None,
        residual: Any | None = None,
        dresidual: NDArray[Any] | None = None,
    ) -> Gradients:
        """Compute the gradients with these coefficients; `batchnorm.infer_backward` documents the arguments."""

@final
class CoMoments:
    """Count, mean and scatter matrix of channels, in float64: immutable, and mergeable over parts of the data.

    `scatter` is Σ(x − mean)(x − mean)ᵀ over all positions, of each group of D adjacent channels. The comoments of parts merge into
    those of the whole by the update of Chan, Golub and LeVeque (1979), as `Moments` do. The comoments of no values (count
    0) are the neutral element.

    Args:
        count: Number of positions: values per channel; finite, 0 or more.
        mean: Mean per channel, shape (channels,).
        scatter: Shape (groups, D, D), D = channels / groups; of each matrix the lower triangle counts.

    Raises:
        ValueError: A shape is not as described, or the count or a diagonal element of scatter is negative.
        TypeError: An argument is not an array of real numbers.
    """
    def __new__(cls, count: float, mean: ArrayLike, scatter: ArrayLike) -> CoMoments: ...
    @property
    def channels(self) -> int:
        """Number of channels."""
    @property
    def groups(self) -> int:
        """Number of groups of adjacent channels."""
    @property
    def count(self) -> float:
        """Number of positions: values per channel, the paper's m."""
    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean per channel, shape (channels,), float64."""
    @property
    def scatter(self) -> NDArray[np.float64]:
        """Σ(x − mean)(x − mean)ᵀ of each group, shape (groups, D, D), float64."""
    @property
    def cov(self) -> NDArray[np.float64]:
        """Biased covariance scatter/count, shape (groups, D, D), float64: Λ, by which a batch is whitened.

        Raises:
            ValueError: There is no value.
        """
    @property
    def cov_unbiased(self) -> NDArray[np.float64]:
        """Unbiased covariance scatter/(count − 1), shape (groups, D, D), float64: an estimate of the population's.

        Raises:
            ValueError: There are fewer than 2 positions.
        """
    @property
    def moments(self) -> Moments:
        """Count, mean and M2 of each channel: the diagonal of scatter."""
    def merge(self, other: CoMoments) -> CoMoments:
        """Return the comoments over the values of both, as a new object.

        Raises:
            ValueError: The numbers of channels or of groups differ.
        """
    def to_bytes(self) -> bytes:
        """Encode as bytes: a header with version and sizes, then count, mean and scatter, little-endian."""
    @staticmethod
    def from_bytes(data: bytes) -> CoMoments:
        """Decode the bytes that `to_bytes` returned.

        Raises:
            ValueError: The bytes are not those of CoMoments.
        """
    def __eq__(self, other: object, /) -> bool: ...
    def __reduce__(self) -> tuple[Any, tuple[bytes]]: ...

@final
class WhiteningCache:
    """Everything that a backward pass needs of a whitening pass.

    It holds x by reference: it must not be changed between the two passes.
    """
    @property
    def x(self) -> NDArray[Any]:
        """The input of the forward pass."""
    @property
    def comoments(self) -> CoMoments:
        """The comoments of x."""
    @property
    def matrix(self) -> NDArray[np.float64]:
        """W of each group, shape (groups, D, D), float64."""
    @property
    def steps(self) -> int | None:
        """The most steps that a group took; None if the method is not iterative."""
    @property
    def residual(self) -> float | None:
        """The largest magnitude in W(Λ + εI)Wᵀ − I; None if the method is not iterative."""
    @property
    def shrinkage(self) -> NDArray[np.float64] | None:
        """The weight δ of shrinkage of each group, shape (groups,), float64; None without shrinkage."""
    @property
    def channel_axis(self) -> int:
        """The channel axis of the forward pass, as it was passed in."""

@final
class WhiteningMap:
    """The validated map of a frozen whitening layer: y = M(x − mean) + bias of each group of channels.

    y_o = round(Σ M_oi·(x_i − mean_i) + bias_o) in float64. The sum begins at 0 and goes in the order of i, and each operation is
    rounded; so the bits are the same for any batch split, any number of threads and any instruction-set level.

    Args:
        matrix: M, shape (channels, D), where D divides channels: row o has the weights of the channels of o's group.
        mean: Shape (channels,).
        bias: Shape (channels,).

    Raises:
        ValueError: A shape is not as described, or a value is not finite.
        TypeError: A parameter is not an array of real numbers.
    """
    def __new__(cls, matrix: ArrayLike, mean: ArrayLike, bias: ArrayLike) -> WhiteningMap: ...
    @property
    def channels(self) -> int:
        """Number of channels."""
    @property
    def groups(self) -> int:
        """Number of groups of adjacent channels."""
    def apply(self, x: Any, *, channel_axis: int = 1, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Apply the map to x.

        Args:
            x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
            channel_axis: The axis of the channels; negative counts from the end.
            out: Array of x's shape, dtype and memory order to write y to; may be x itself.

        Returns:
            y, of x's shape, dtype and memory order.

        Raises:
            ValueError: A shape is not as described.
            TypeError: x is not a tensor of one of these dtypes, or out has another dtype.
        """
    def backward(self, dy: Any, *, channel_axis: int = 1, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Compute dx = Mᵀ·dy, the gradient with the statistics held fixed.

        Args:
            dy: ∂ℓ/∂y; float32, float64, float16 or bfloat16.
            channel_axis: The axis of the channels; negative counts from the end.
            out: Array of dy's shape, dtype and memory order to write dx to; may be dy itself.

        Returns:
            dx, of dy's shape, dtype and memory order.

        Raises:
            ValueError: A shape is not as described.
            TypeError: dy is not a tensor of one of these dtypes, or out has another dtype.
        """

@final
class Host:
    """Passes over the tensors of a host library, in its memory and on its threads.

    Tensors are read by DLPack's C exchange API, also those of bfloat16 and those that require grad. The channels are on axis
    1. Every method writes its results into tensors that it is given, and returns None:

    - x is of rank 2 or more; float32, float64, float16 or bfloat16; dense in some order of its axes. dy, residual, y, dx and
      dresidual have x's shape, dtype and strides.
    - weight, bias, running_mean, running_var, mean, var, dweight and dbias are contiguous, shape (channels,), each float32 or
      float64.
    - moments is contiguous, shape (3, channels), float64: count, mean and M2. So is sums: count, dγ and dβ.
    - What is written shares no memory with another argument.

    weight, bias, residual, running_mean, running_var, dresidual, dweight and dbias may be None.

    Args:
        tensor_type: The type of the host's tensors.
        library: Path of the OpenMP runtime whose threads work; if None, the runtime that the process has loaded. Where there
            is none, threads of our own work.

    Raises:
        TypeError: tensor_type has no DLPack C exchange API of version 1. Methods raise it where a tensor is of a wrong type
            or dtype, or not on the CPU.
        ValueError: library is not an OpenMP runtime. Methods raise it where a shape, a memory order or a value is not as described. If it is an error of the
            core, its attribute `kind` names it.
    """
    def __new__(cls, tensor_type: type, library: str | PathLike[str] | None = None) -> Host: ...
    @property
    def thread_source(self) -> Literal["openmp", "own"]:
        """Whose threads work: "openmp", those of the runtime; "own" where there is none, and in a forked child."""
    def train(
        self,
        x: Any,
        weight: Any | None,
        bias: Any | None,
        residual: Any | None,
        running_mean: Any | None,
        running_var: Any | None,
        y: Any,
        moments: Any,
        *,
        threads: int,
        update_weight: float,
        eps: float,
        activation: Literal["relu", "relu6"] | None,
    ) -> None:
        """Normalize x by its own batch statistics (Algorithm 1): y = activation(γ·x̂ + β + residual), rounded once.

        The running statistics move towards those of the batch, r ← (1 − w)·r + w·new: computed in float64, the variance
        unbiased; what is not finite enters.

        Args:
            x: Tensor with 2 or more values in each channel.
            weight: γ; 1 if None.
            bias: β; 0 if None.
            residual: Tensor that is added before the activation, or None.
            running_mean: Running mean, changed in place, or None.
            running_var: Running variance, changed in place, or None.
            y: Tensor to write y to.
            moments: Table to write the moments of x to.
            threads: Number of threads that the host works with.
            update_weight: w, the weight of the new value in the running statistics.
            eps: ε, finite and more than 0.
            activation: None, "relu" or "relu6".

        Raises:
            ValueError: A shape, memory order or value is not as described.
            TypeError: A tensor is of a wrong type or dtype, or not on the CPU.
        """
    def infer(
        self,
        x: Any,
        weight: Any | None,
        bias: Any | None,
        residual: Any | None,
        mean: Any,
        var: Any,
        y: Any,
        *,
        threads: int,
        eps: float,
        activation: Literal["relu", "relu6"] | None,
    ) -> None:
        """Normalize x by frozen statistics (Algorithm 2): y = activation((x − mean)·γ/√(var + ε) + β + residual).

        Args:
            x: Tensor.
            weight: γ; 1 if None.
            bias: β; 0 if None.
            residual: Tensor that is added before the activation, or None.
            mean: E[x].
            var: Var[x]; 0 or more.
            y: Tensor to write y to.
            threads: Number of threads that the host works with.
            eps: ε, finite, 0 or more; 0 only if every var is more than 0.
            activation: None, "relu" or "relu6".

        Raises:
            ValueError: A shape, memory order or value is not as described.
            TypeError: A tensor is of a wrong type or dtype, or not on the CPU.
        """
    def backward(
        self,
        dy: Any,
        x: Any,
        weight: Any | None,
        bias: Any | None,
        residual: Any | None,
        moments: Any,
        dx: Any,
        dresidual: Any | None,
        dweight: Any | None,
        dbias: Any | None,
        *,
        threads: int,
        eps: float,
        activation: Literal["relu", "relu6"] | None,
    ) -> None:
        """Compute the gradients of a training pass, through the batch statistics (section 3): dx, dγ and dβ.

        Args:
            dy: ∂ℓ/∂y.
            x: The x of `train`.
            weight: γ; 1 if None.
            bias: β; 0 if None.
            residual: The residual of `train`, or None.
            moments: The moments of x.
            dx: Tensor to write ∂ℓ/∂x to.
            dresidual: Tensor to write ∂ℓ/∂residual to, which is the gradient that passes the activation, or None.
            dweight: Where to write ∂ℓ/∂γ, or None.
            dbias: Where to write ∂ℓ/∂β, or None.
            threads: Number of threads that the host works with.
            eps: ε, finite and more than 0.
            activation: The activation of `train`.

        Raises:
            ValueError: A shape, memory order or value is not as described.
            TypeError: A tensor is of a wrong type or dtype, or not on the CPU.
        """
    def infer_backward(
        self,
        dy: Any,
        x: Any,
        weight: Any | None,
        bias: Any | None,
        residual: Any | None,
        mean: Any,
        var: Any,
        dx: Any,
        dresidual: Any | None,
        dweight: Any | None,
        dbias: Any | None,
        *,
        threads: int,
        eps: float,
        activation: Literal["relu", "relu6"] | None,
    ) -> None:
        """Compute the gradients with frozen statistics: dx = γ/√(var + ε)·dy, dγ = Σdy·x̂, dβ = Σdy.

        Args:
            dy: ∂ℓ/∂y.
            x: The x of `infer`.
            weight: γ; 1 if None.
            bias: β; 0 if None.
            residual: The residual of `infer`, or None.
            mean: E[x].
            var: Var[x]; 0 or more.
            dx: Tensor to write ∂ℓ/∂x to.
            dresidual: Tensor to write ∂ℓ/∂residual to, which is the gradient that passes the activation, or None.
            dweight: Where to write ∂ℓ/∂γ, or None.
            dbias: Where to write ∂ℓ/∂β, or None.
            threads: Number of threads that the host works with.
            eps: ε, finite, 0 or more; 0 only if every var is more than 0.
            activation: The activation of `infer`.

        Raises:
            ValueError: A shape, memory order or value is not as described.
            TypeError: A tensor is of a wrong type or dtype, or not on the CPU.
        """
    def moments(
        self,
        x: Any,
        moments: Any,
        *,
        threads: int,
    ) -> None:
        """Compute the moments of x: count, mean and M2 of each channel.

        Args:
            x: Tensor.
            moments: Table to write the moments to.
            threads: Number of threads that the host works with.

        Raises:
            ValueError: A shape or memory order is not as described.
            TypeError: A tensor is of a wrong type or dtype, or not on the CPU.
        """
    def normalize(
        self,
        x: Any,
        weight: Any | None,
        bias: Any | None,
        residual: Any | None,
        moments: Any,
        y: Any,
        *,
        threads: int,
        eps: float,
        activation: Literal["relu", "relu6"] | None,
    ) -> None:
        """Normalize x by given moments: y = activation(γ·(x − mean)/√(σ² + ε) + β + residual), with the biased variance.

        Args:
            x: Tensor.
            weight: γ; 1 if None.
            bias: β; 0 if None.
            residual: Tensor that is added before the activation, or None.
            moments: Moments with 2 or more values in each channel, which may cover more than x.
            y: Tensor to write y to.
            threads: Number of threads that the host works with.
            eps: ε, finite and more than 0.
            activation: None, "relu" or "relu6".

        Raises:
            ValueError: A shape, memory order or value is not as described.
            TypeError: A tensor is of a wrong type or dtype, or not on the CPU.
        """
    def gradient_sums(
        self,
        dy: Any,
        x: Any,
        weight: Any | None,
        bias: Any | None,
        residual: Any | None,
        moments: Any,
        sums: Any,
        *,
        threads: int,
        eps: float,
        activation: Literal["relu", "relu6"] | None,
    ) -> None:
        """Compute the sums of a backward pass: dγ = Σdy·x̂ and dβ = Σdy of each channel (section 3).

        Args:
            dy: ∂ℓ/∂y.
            x: The x of `normalize`.
            weight: γ; 1 if None.
            bias: β; 0 if None.
            residual: The residual of `normalize`, or None.
            moments: The moments of `normalize`.
            sums: Table to write the sums to.
            threads: Number of threads that the host works with.
            eps: ε, finite and more than 0.
            activation: The activation of `normalize`.

        Raises:
            ValueError: A shape, memory order or value is not as described.
            TypeError: A tensor is of a wrong type or dtype, or not on the CPU.
        """
    def gradient_apply(
        self,
        dy: Any,
        x: Any,
        weight: Any | None,
        bias: Any | None,
        residual: Any | None,
        moments: Any,
        sums: Any,
        dx: Any,
        dresidual: Any | None,
        *,
        threads: int,
        eps: float,
        activation: Literal["relu", "relu6"] | None,
    ) -> None:
        """Compute the input gradient from the sums: dx = γ/√(σ²+ε)·(dy − dβ/m − x̂·dγ/m) (section 3, in closed form).

        Args:
            dy: ∂ℓ/∂y.
            x: The x of `normalize`.
            weight: γ; 1 if None.
            bias: β; 0 if None.
            residual: The residual of `normalize`, or None.
            moments: The moments of `normalize`.
            sums: Gradient sums over all values that the moments cover; m is their count.
            dx: Tensor to write ∂ℓ/∂x to.
            dresidual: Tensor to write ∂ℓ/∂residual to, which is the gradient that passes the activation, or None.
            threads: Number of threads that the host works with.
            eps: ε, finite and more than 0.
            activation: The activation of `normalize`.

        Raises:
            ValueError: A shape, memory order or value is not as described.
            TypeError: A tensor is of a wrong type or dtype, or not on the CPU.
        """

@final
class HostTypes:
    """The types of a host library whose tensors compute as its operators do: the passes of `Host` may take their place.

    A plain tensor is of one of these types and no subclass, has its values in memory of the CPU, and is not lazily negated.

    Args:
        tensor_type: The type of the host's tensors, with PyTorch's `is_neg`, `is_inference` and `requires_grad`.
        parameter_type: The type of its parameters, a subclass that computes as tensor_type does.

    Raises:
        TypeError: tensor_type has no DLPack C exchange API of version 1.
    """
    def __new__(cls, tensor_type: type, parameter_type: type) -> HostTypes: ...
    def is_plain(self, tensor: Any) -> bool:
        """Return whether a value is a plain tensor.

        Args:
            tensor: Any value.
        """
    def takes(
        self,
        x: Any,
        weight: Any | None,
        bias: Any | None,
        residual: Any | None,
        running_mean: Any | None,
        running_var: Any | None,
        training: bool,
    ) -> bool:
        """Return whether a forward pass of `Host` takes these arguments, and does what the host's own layer does with them.

        All are plain; x has values, in training 2 or more in a channel; the residual has x's shape and dtype; the others are
        contiguous, of shape (channels,), float64 for x of float64 and else float32. There are both running statistics, which
        require no grad, or in training neither.

        Args:
            x: Tensor.
            weight: γ, or None.
            bias: β, or None.
            residual: Tensor that is added, or None.
            running_mean: Running mean, or None.
            running_var: Running variance, or None.
            training: Whether x is normalized by its own statistics.
        """
    def increment(self, count: Any) -> bool:
        """Add 1 to a plain tensor that is a single int64 without axes; return whether it is one.

        A tensor that was made in inference mode is left to the host, which knows whether it may change.

        Args:
            count: Any value.
        """

def json_cut_data(
    text: bytes | NDArray[np.uint8], max_elements: int, max_depth: int
) -> tuple[bytes, list[tuple[NDArray[np.float32 | np.float64], list[int]]]]:
    """Take the `data` arrays out of the JSON of an inference request.

    NaN, Infinity and -Infinity are read as numbers. In `data`, null is read as NaN.

    Args:
        text: The request, as bytes or as an array of bytes.
        max_elements: Largest number of elements of all `data` arrays together.
        max_depth: Largest depth of nested arrays and objects, up to 255.

    Returns:
        The text, with [i] in place of the i-th `data` array of the objects in `inputs`; and a list of these arrays. Each
        is a pair: a flat array of its numbers (float32 if the object's `datatype` is FP32, else float64), and the lengths
        of its nested arrays, outermost first: (1, 3) for [[1, 2, 3]], and (2, 0) for [[], []].

    Raises:
        ValueError: The text is malformed or nested too deep; or an array holds anything but numbers, is ragged, or holds
            a finite number beyond the range of its dtype.
        OverflowError: There are more than max_elements numbers.
    """

def json_parse(text: bytes, max_depth: int) -> Any:
    """Parse UTF-8 JSON.

    NaN, Infinity and -Infinity are read as numbers. If an object has two members of one name, the last counts.

    Args:
        text: The text.
        max_depth: Largest depth of nested arrays and objects, up to 255.

    Returns:
        The value: dict, list, str, int, float, bool or None.

    Raises:
        ValueError: The text is malformed or nested too deep, or holds a finite number beyond the range of float64.
    """

def json_put_data(
    before: bytes, values: NDArray[np.float32 | np.float64], after: bytes, null: bool
) -> NDArray[np.uint8]:
    """Print a JSON text that contains an array of floats, each with the fewest digits that give its bits back.

    Args:
        before: The text before the array.
        values: Dense one-dimensional array of float32 or float64.
        after: The text after the array.
        null: Whether NaN and infinities are printed as null; else as the tokens NaN, Infinity and -Infinity.

    Returns:
        The text, in a new array of bytes. A reader that rounds numbers to float64, and for float32 then to float32, gets
        their bits back.

    Raises:
        TypeError: values is not such an array.
    """

def moments(x: Any, *, channel_axis: int = 1) -> Moments:
    """Compute the moments of x: count, mean and M2 of each channel over all other axes.

    Args:
        x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
        channel_axis: The axis of the channels; negative counts from the end.

    Returns:
        Moments in float64. If x has zero rows, they are the neutral element, with count 0. They are not finite if values
        of x are not finite, or differ by more than about 1e154, so that their squares overflow.

    Raises:
        ValueError: Rank, channel_axis or size are not as described.
        TypeError: x is not a tensor of one of these dtypes.
    """

def normalize(
    x: Any,
    moments: Moments,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    out: NDArray[Any] | None = None,
    activation: Literal["relu", "relu6"] | None = None,
    residual: Any | None = None,
) -> tuple[NDArray[Any], Cache]:
    """Normalize x by given moments: y = γ·(x − mean)/√(var + ε) + β, with the biased variance (Algorithm 1).

    With `residual` and `activation`, y = activation(γ·(x − mean)/√(var + ε) + β + residual), rounded once.

    The moments may cover more values than x: they may be merged over micro-batches or processes.

    Args:
        x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
        moments: Moments with 2 or more values in each channel.
        gamma: γ, shape (channels,) or a number; 1 if None.
        beta: β, shape (channels,) or a number; 0 if None.
        eps: ε, finite and more than 0.
        channel_axis: The axis of the channels; negative counts from the end.
        out: Array of x's shape, dtype and memory order to write y to; it must not share memory with x or residual.
        activation: None, "relu" or "relu6", applied last: max(·, 0), or min(max(·, 0), 6); NaN stays NaN.
        residual: Tensor of x's shape and dtype that is added before the activation; copied if its memory order differs.

    Returns:
        y, of x's shape, dtype and memory order, and the cache for the backward pass.

    Raises:
        ValueError: A shape or value is not as described.
        TypeError: x is not a tensor of one of these dtypes, or out or a parameter is of a wrong type.
    """

def train_forward(
    x: Any,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    out: NDArray[Any] | None = None,
    activation: Literal["relu", "relu6"] | None = None,
    residual: Any | None = None,
) -> tuple[NDArray[Any], Cache]:
    """Normalize x by its own batch statistics, as training does (Algorithm 1): y = γ·x̂ + β.

    With `residual` and `activation`, y = activation(γ·x̂ + β + residual), rounded once.

    The result has exactly the bits of `normalize(x, moments(x), ...)`.

    Args:
        x: Tensor of rank 2 or more, with 2 or more values in each channel; float32, float64, float16 or bfloat16.
        gamma: γ, shape (channels,) or a number; 1 if None.
        beta: β, shape (channels,) or a number; 0 if None.
        eps: ε, finite and more than 0.
        channel_axis: The axis of the channels; negative counts from the end.
        out: Array of x's shape, dtype and memory order to write y to; x itself, or memory that no input shares.
        activation: None, "relu" or "relu6", applied last: max(·, 0), or min(max(·, 0), 6); NaN stays NaN.
        residual: Tensor of x's shape and dtype that is added before the activation; copied if its memory order differs.

    Returns:
        y, of x's shape, dtype and memory order, and the cache for `backward`, which holds x and residual by reference.
        If y was written over x, the cache does not hold x, and `backward` needs a copy of it.

    Raises:
        ValueError: A shape or value is not as described.
        TypeError: x is not a tensor of one of these dtypes, or out or a parameter is of a wrong type.
    """

def gradient_sums(dy: Any, cache: Cache, *, x: Any | None = None) -> GradientSums:
    """Compute the sums of a backward pass, dγ = Σdy·x̂ and dβ = Σdy of each channel (section 3).

    If the forward pass ended in an activation, dy in these formulas is the gradient that passes it: dy where y > 0
    (and y < 6 for relu6), else 0.

    Args:
        dy: ∂ℓ/∂y, of the shape and dtype of x.
        cache: The cache that the forward pass returned.
        x: A copy of x, needed only if the forward pass wrote y over x.

    Returns:
        GradientSums in float64, which can be merged over micro-batches and processes.

    Raises:
        ValueError: dy has another shape than x.
        TypeError: dy has another dtype than x.
    """

def gradient_apply(
    dy: Any,
    cache: Cache,
    sums: GradientSums,
    *,
    x: Any | None = None,
    out: NDArray[Any] | None = None,
    dresidual: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Compute the input gradient from the sums: dx = γ/√(σ²+ε)·(dy − dβ/m − x̂·dγ/m) (section 3, in closed form).

    If the forward pass ended in an activation, dy in these formulas is the gradient that passes it: dy where y > 0
    (and y < 6 for relu6), else 0.

    Args:
        dy: ∂ℓ/∂y, of the shape and dtype of x.
        cache: The cache that the forward pass returned.
        sums: Gradient sums over all values that the moments of the forward pass cover; m is their count.
        x: A copy of x, needed only if the forward pass wrote y over x.
        out: Array of x's shape, dtype and memory order to write dx to; dy itself, or memory that no input shares.
        dresidual: Array of x's shape, dtype and memory order to write ∂ℓ/∂residual to, which is the gradient that passes
            the activation; dy itself, or memory that no input shares. Only if the forward pass had a residual.

    Returns:
        dx, of x's shape, dtype and memory order.

    Raises:
        ValueError: A shape is not as described, or the sums are over another number of values than the moments by which
            x was normalized.
        TypeError: dy or out has another dtype than x.
    """

def backward(
    dy: Any,
    cache: Cache,
    *,
    x: Any | None = None,
    out: NDArray[Any] | None = None,
    dresidual: NDArray[Any] | None = None,
) -> Gradients:
    """Compute the gradients of a training pass, through the batch statistics (section 3): dx, dγ and dβ.

    The result has exactly the bits of `gradient_sums` followed by `gradient_apply`.

    If the forward pass ended in an activation, dy passes where the rounded y > 0 (and y < 6 for relu6). That is computed
    again from x and residual, which must not have changed since; y is not needed.

    Args:
        dy: ∂ℓ/∂y, of the shape and dtype of x.
        cache: The cache that the forward pass returned.
        x: A copy of x, needed only if the forward pass wrote y over x.
        out: Array of x's shape, dtype and memory order to write dx to; dy itself, or memory that no input shares.
        dresidual: Array of x's shape, dtype and memory order to write ∂ℓ/∂residual to, which is the gradient that passes
            the activation; dy itself, or memory that no input shares. Only if the forward pass had a residual.

    Returns:
        Gradients (dx, dgamma, dbeta): dx like x; dγ and dβ of shape (channels,) in float64, even if γ and β were None.
        The attribute dresidual is the array that was given. If none was, it is dy itself where the forward pass had a
        residual and no activation (and dx was not written over dy), else None.

    Raises:
        ValueError: A shape is not as described; or the moments of the forward pass cover more values than x, so that
            gradient sums must be merged instead.
        TypeError: dy or out has another dtype than x.
    """

def infer(
    x: Any,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    out: NDArray[Any] | None = None,
    activation: Literal["relu", "relu6"] | None = None,
    residual: Any | None = None,
) -> NDArray[Any]:
    """Normalize x by frozen statistics (Algorithm 2): y = (x − mean)·s + β with s = γ/√(var + ε).

    With `residual` and `activation`, y = activation((x − mean)·s + β + residual), rounded once.

    y is computed in float64 for 32- and 64-bit tensors, and in float32 with a two-part mean for 16-bit ones. Each
    operation is rounded; none are fused. The bits do not depend on the rest of the batch, on threads or on the
    instruction set. For 16-bit tensors, `|x − mean|` must be in the range of float32 (up to 3.4e38), or y is not finite.

    Args:
        x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
        mean: E[x], shape (channels,) or a number.
        var: Var[x], shape (channels,) or a number; 0 or more.
        gamma: γ, shape (channels,) or a number; 1 if None.
        beta: β, shape (channels,) or a number; 0 if None.
        eps: ε, finite, 0 or more; 0 only if every var is more than 0.
        channel_axis: The axis of the channels; negative counts from the end.
        out: Array of x's shape, dtype and memory order to write y to; x itself, or memory that no input shares.
        activation: None, "relu" or "relu6", applied last: max(·, 0), or min(max(·, 0), 6); NaN stays NaN.
        residual: Tensor of x's shape and dtype that is added before the activation; copied if its memory order differs.

    Returns:
        y, of x's shape, dtype and memory order.

    Raises:
        ValueError: A shape or value is not as described.
        TypeError: x is not a tensor of one of these dtypes, or out or a parameter is of a wrong type.
    """

def infer_backward(
    dy: Any,
    x: Any,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    beta: ArrayLike | None = None,
    eps: float = 1e-5,
    channel_axis: int = 1,
    out: NDArray[Any] | None = None,
    activation: Literal["relu", "relu6"] | None = None,
    residual: Any | None = None,
    dresidual: NDArray[Any] | None = None,
) -> Gradients:
    """Compute the gradients with frozen statistics: dx = γ/√(var + ε)·dy, dγ = Σdy·x̂, dβ = Σdy.

    If the forward pass ended in an activation, dy in these formulas is the gradient that passes it: dy where y > 0
    (and y < 6 for relu6), else 0. `beta` and `residual` are needed for nothing else.

    Args:
        dy: ∂ℓ/∂y, of the shape and dtype of x.
        x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
        mean: E[x], shape (channels,) or a number.
        var: Var[x], shape (channels,) or a number; 0 or more.
        gamma: γ, shape (channels,) or a number; 1 if None.
        beta: β, shape (channels,) or a number; 0 if None.
        eps: ε, finite, 0 or more; 0 only if every var is more than 0.
        channel_axis: The axis of the channels; negative counts from the end.
        out: Array of x's shape, dtype and memory order to write dx to; dy itself, or memory that no input shares.
        activation: The activation of the forward pass: None, "relu" or "relu6".
        residual: The residual of the forward pass, or None.
        dresidual: Array of x's shape, dtype and memory order to write ∂ℓ/∂residual to, which is the gradient that passes
            the activation; dy itself, or memory that no input shares. Only with residual.

    Returns:
        Gradients (dx, dgamma, dbeta): dx like x; dγ and dβ of shape (channels,) in float64.
        The attribute dresidual is the array that was given. If none was, it is dy itself where the forward pass had a
        residual and no activation (and dx was not written over dy), else None.

    Raises:
        ValueError: A shape or value is not as described.
        TypeError: dy, x, out or a parameter is of a wrong type.
    """

def comoments(x: Any, *, groups: int = 1, channel_axis: int = 1) -> CoMoments:
    """Compute the comoments of x: count, mean and scatter matrix of the channels over all other axes.

    The bits are the same for any number of threads, on processors of one type.

    Args:
        x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
        groups: Number of groups of adjacent channels; each has a scatter matrix of its own.
        channel_axis: The axis of the channels; negative counts from the end.

    Returns:
        CoMoments in float64. If x has zero rows, they are the neutral element, with count 0.

    Raises:
        ValueError: Rank, channel_axis, groups or size are not as described.
        TypeError: x is not a tensor of one of these dtypes.
    """

def whitening_matrix(
    cov: ArrayLike,
    *,
    method: Literal["zca", "pca", "cholesky", "iterative"] = "zca",
    eps: float = 0.0,
    steps: int | None = None,
) -> NDArray[np.float64]:
    """Compute the whitening matrix W of each covariance Λ, so that W(Λ + εI)Wᵀ = I.

    The methods: "zca" is (Λ+εI)^(−1/2), the symmetric solution; "pca" is D^(−1/2)Uᵀ, eigenvalues in descending order and the
    entry of largest magnitude of each eigenvector positive; "cholesky" is L⁻¹ with Λ+εI = LLᵀ; "iterative" approximates "zca" by
    Newton–Schulz steps, from the matrix divided by its trace.

    Args:
        cov: Λ, shape (groups, D, D); of each matrix the lower triangle counts.
        method: "zca", "pca", "cholesky" or "iterative".
        eps: ε, finite, 0 or more.
        steps: Number of steps of "iterative", 1 to 100; None for as many as it takes.

    Returns:
        W, shape (groups, D, D), float64.

    Raises:
        ValueError: A shape or value is not as described; or Λ + εI has no inverse, as far as float64 can tell.
        TypeError: cov is not an array of real numbers.

    Warns:
        UserWarning: After so many steps, an element of W(Λ + εI)Wᵀ − I is above 1e-3.
    """

def whiten_forward(
    x: Any,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    method: Literal["zca", "pca", "cholesky", "iterative"] = "zca",
    groups: int = 1,
    eps: float = 1e-5,
    steps: int | None = None,
    shrinkage: Literal["ledoit-wolf"] | None = None,
    channel_axis: int = 1,
    out: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], WhiteningCache]:
    """Whiten x by its own batch statistics: y = γ·W(x − mean) + β with W(Λ + εI)Wᵀ = I.

    Λ is the biased covariance of the channels of a group over all positions. The bits are the same for any number of threads, on
    processors of one type; between types they differ within the accuracy of the linear algebra.

    Args:
        x: Tensor of rank 2 or more, with 2 or more positions; float32, float64, float16 or bfloat16.
        gamma: γ, shape (channels,) or a number; 1 if None.
        beta: β, shape (channels,) or a number; 0 if None.
        method: "zca", "pca", "cholesky" or "iterative"; `whitening_matrix` documents them.
        groups: Number of groups of adjacent channels, each whitened by itself. With one channel a group it is batch
            normalization.
        eps: ε, finite, 0 or more.
        steps: Number of steps of "iterative", 1 to 100; None for as many as it takes.
        shrinkage: None, or "ledoit-wolf" to shrink Λ towards a multiple of the identity, with the weight of Ledoit and Wolf
            (2004).
        channel_axis: The axis of the channels; negative counts from the end.
        out: Array of x's shape, dtype and memory order to write y to; it must not share memory with x.

    Returns:
        y, of x's shape, dtype and memory order, and the cache for `whiten_backward`, which holds x by reference.

    Raises:
        ValueError: A shape or value is not as described; the mean or covariance of x is not finite; or Λ + εI has no inverse,
            as far as float64 can tell.
        TypeError: x is not a tensor of one of these dtypes, or out or a parameter is of a wrong type.

    Warns:
        UserWarning: After so many steps, an element of W(Λ + εI)Wᵀ − I is above 1e-3.
    """

def whiten_backward(dy: Any, cache: WhiteningCache, *, out: NDArray[Any] | None = None) -> Gradients:
    """Compute the gradients of a whitening pass, through mean and covariance of the batch: dx, dγ and dβ.

    With x̂ = W(x − mean): dβ = Σdy, dγ = Σdy·x̂, and dx has the derivatives of W by Λ and of Λ and mean by x.

    Args:
        dy: ∂ℓ/∂y, of the shape and dtype of x.
        cache: The cache that the forward pass returned.
        out: Array of x's shape, dtype and memory order to write dx to; it must not share memory with x or dy.

    Returns:
        Gradients (dx, dgamma, dbeta): dx like x; dγ and dβ of shape (channels,) in float64, even if γ and β were None.

    Raises:
        ValueError: A shape is not as described; or the method is "pca" and two components, which are named, have nearly the same
            variance (a relative gap below 1e-8), so that there is no derivative.
        TypeError: dy or out has another dtype than x.
    """

def copy(x: Any, out: NDArray[Any], *, z: Any | None = None, streaming: bool = False) -> None:
    """Copy x to out, or write x + z to out: the least time that any function here can take, for benchmarks.

    Args:
        x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
        out: Array of x's shape, dtype and memory order to write to; it must not share memory with x or z.
        z: Tensor of x's shape and dtype, or None.
        streaming: Whether out is written with non-temporal stores.

    Raises:
        ValueError: A shape is not as described.
        TypeError: out or z has another dtype than x.
    """

def release_memory() -> int:
    """Free the memory that is kept for reuse by later outputs.

    Fresh memory takes longer to get than the arithmetic takes that fills it. So the memory of large outputs that no array
    uses any more is kept: 256 MiB in all or one output, whichever is larger. None is kept if the environment variable
    `BATCHNORM_KEEP_MEMORY` is 0. Arrays that are still alive are not affected.

    Returns:
        Number of bytes freed.
    """

def set_num_threads(n: int) -> None:
    """Set the number of threads that work on one call, including the caller's. Results do not depend on it.

    Raises:
        ValueError: n is not from 1 to 1024.
    """

def get_num_threads() -> int:
    """Return the number of threads that work on one call, including the caller's.

    It is the number that was set, else `BATCHNORM_NUM_THREADS`, else the number of CPUs that the affinity mask and the
    cgroup quota leave to this process.

    Raises:
        ValueError: `BATCHNORM_NUM_THREADS` is not a number from 1 to 1024.
    """

def set_thread_source(source: Literal["own", "openmp"], library: str | PathLike[str] | None = None) -> None:
    """Set whose threads work on calls: "own", or "openmp" for those of an OpenMP runtime. Results do not depend on it.

    The threads of an OpenMP runtime go on spinning after each of its parallel regions. In a program that uses one all the
    time, working on its threads is faster than beside them. Each calling thread then works with a team of
    `get_num_threads()` threads.

    There are OpenMP runtimes on Linux only, and none in a child that was forked after this call: elsewhere the source is
    "own", which `get_thread_source` tells.

    Args:
        source: "own" or "openmp".
        library: Path of the OpenMP runtime: GNU's, LLVM's or Intel's. It stays loaded. None is the runtime that the process
            shows to all of its libraries (after `import torch`, that of PyTorch), else `libgomp.so.1` of the system; if
            there is neither, the source is "own".

    Raises:
        ValueError: source is another name, or is "own" although library is given; library cannot be loaded, or has no
            `GOMP_parallel`.
    """

def get_thread_source() -> Literal["own", "openmp"]:
    """Return whose threads work on calls: "own" or "openmp".

    It is the source that was set, else `BATCHNORM_THREAD_SOURCE`, else "own"; and "own" where there is no OpenMP runtime.

    Raises:
        ValueError: `BATCHNORM_THREAD_SOURCE` is neither "own" nor "openmp".
    """

def simd_level() -> str:
    """Return the name of the instruction-set level in use.

    It is the level that was set, else that of `BATCHNORM_SIMD`, else the highest that this machine can run.

    Raises:
        ValueError: `BATCHNORM_SIMD` names a level that this machine cannot run.
    """

def set_simd_level(name: str | None) -> None:
    """Force an instruction-set level by name; None makes the default choice again.

    Results do not depend on it.

    Raises:
        ValueError: name is not in `simd_levels()`.
    """

def simd_levels() -> list[str]:
    """Return the names of the instruction-set levels that this machine can run, lowest first."""

def tensor(argument: str, value: Any) -> NDArray[Any]:
    """Return a tensor as a NumPy array that shares its memory.

    Args:
        argument: Name of the argument in errors.
        value: A NumPy array, or an object with `__dlpack__` (on the CPU) or `__array__`.

    Raises:
        TypeError: value is none of these, has a mask, or requires grad.
    """

def real_array(argument: str, value: ArrayLike) -> NDArray[Any]:
    """Return a parameter as a NumPy array of real numbers, of any shape.

    Args:
        argument: Name of the argument in errors.
        value: A number, a sequence of numbers, or any tensor that `tensor` takes.

    Raises:
        TypeError: value is not real, has a mask, or requires grad.
    """
