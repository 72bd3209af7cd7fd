"""The compiled core; `import batchnorm` is the public face."""

from typing import Any, Final, Literal, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm._types import Gradients

__all__ = [
    "ERROR_KINDS",
    "Cache",
    "Coefficients",
    "GradientSums",
    "Moments",
    "__version__",
    "backward",
    "copy",
    "get_num_threads",
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
    "simd_level",
    "simd_levels",
    "tensor",
    "train_forward",
]

__version__: Final[str]
ERROR_KINDS: Final[list[str]]

@final
class Moments:
    """Count, mean and M2 of each channel, in float64; a value that merges.

    ``m2`` is Σ(x − mean)². Moments of parts merge into those of the whole by the update of Chan, Golub and LeVeque
    (1979). The moments of no values (count 0) are the neutral element.

    Args:
        count: Values per channel, shape (channels,); finite, 0 or more.
        mean: Mean per channel, shape (channels,).
        m2: Sum of squared deviations per channel, shape (channels,); 0 or more.

    Raises:
        ValueError: Shapes differ, or a count or m2 is negative.
        TypeError: A part is not real.
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
        """The moments of the values of both, as a new value.

        Raises:
            ValueError: The numbers of channels differ.
        """
    def to_bytes(self) -> bytes:
        """A portable form: header with version, number of channels, then count, mean and m2, little-endian."""
    @staticmethod
    def from_bytes(data: bytes) -> Moments:
        """Reads what ``to_bytes`` wrote.

        Raises:
            ValueError: The bytes are not those of Moments.
        """
    def __eq__(self, other: object, /) -> bool: ...
    def __reduce__(self) -> tuple[Any, tuple[bytes]]: ...

@final
class GradientSums:
    """Σdy·x̂ and Σdy of each channel with the number of values summed, in float64; a value that merges.

    Args:
        count: Values per channel, shape (channels,); finite, 0 or more.
        dgamma: Σdy·x̂ per channel, shape (channels,).
        dbeta: Σdy per channel, shape (channels,).

    Raises:
        ValueError: Shapes differ, or a count is negative.
        TypeError: A part is not real.
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
        """The sums over the values of both, as a new value.

        Raises:
            ValueError: The numbers of channels differ.
        """
    def to_bytes(self) -> bytes:
        """A portable form: header with version, number of channels, then count, dγ and dβ, little-endian."""
    @staticmethod
    def from_bytes(data: bytes) -> GradientSums:
        """Reads what ``to_bytes`` wrote.

        Raises:
            ValueError: The bytes are not those of GradientSums.
        """
    def __eq__(self, other: object, /) -> bool: ...
    def __reduce__(self) -> tuple[Any, tuple[bytes]]: ...

@final
class Cache:
    """What a backward pass needs of its forward pass.

    It holds x and residual by reference: they must not be changed in between.
    """
    @property
    def x(self) -> NDArray[Any] | None:
        """The input of the forward pass; None where y was written over it."""
    @property
    def residual(self) -> NDArray[Any] | None:
        """What was added to the normalized x; None where nothing was."""
    @property
    def activation(self) -> str | None:
        """The activation that followed, by name; None where none did."""
    @property
    def moments(self) -> Moments:
        """The moments by which x was normalized."""
    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean per channel, shape (channels,), float64."""
    @property
    def invstd(self) -> NDArray[np.float64]:
        """1/√(σ² + ε) per channel, shape (channels,), float64."""
    @property
    def channel_axis(self) -> int:
        """The channel axis of the forward pass, as it was given."""

@final
class Coefficients:
    """The validated coefficients of a frozen layer: y = (x − mean)·s + β with s = γ/√(var + ε), in float64.

    Args:
        mean: E[x], shape (channels,) or a number.
        var: Var[x], shape (channels,) or a number; 0 or more.
        gamma: γ, shape (channels,) or a number; ones where absent.
        beta: β, shape (channels,) or a number; zeros where absent.
        eps: ε, finite, 0 or more; 0 only where every var is more than 0.

    Raises:
        ValueError: A shape or value is not as described.
        TypeError: A parameter is not real.
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
        activation: Literal["relu"] | None = None,
        residual: Any | None = None,
    ) -> NDArray[Any]:
        """As ``batchnorm.infer``."""
    def backward(
        self,
        dy: Any,
        x: Any,
        *,
        channel_axis: int = 1,
        out: NDArray[Any] | None = None,
        activation: Literal["relu"] | None = None,
        residual: Any | None = None,
        dresidual: NDArray[Any] | None = None,
    ) -> Gradients:
        """As ``batchnorm.infer_backward``."""

def json_cut_data(
    text: bytes | NDArray[np.uint8], max_elements: int, max_depth: int
) -> tuple[bytes, list[tuple[NDArray[np.float32 | np.float64], list[int]]]]:
    """Takes the ``data`` arrays out of the JSON of an inference request.

    NaN, Infinity and -Infinity are numbers too, and null is NaN in ``data``.

    Args:
        text: The request, as bytes or as an array of them.
        max_elements: The most numbers that all these arrays may hold.
        max_depth: How deep arrays and objects may be nested, up to 255.

    Returns:
        The text in which each array ``data`` of an object of ``inputs`` is [i], and the arrays, of which that is number
        i: for each a flat array of its numbers, float32 where the object's ``datatype`` is FP32 and else float64, and the
        shape of its nesting: of [[1, 2, 3]] that is (1, 3), and of [[], []] (2, 0).

    Raises:
        ValueError: The text is malformed or nested too deep; or an array holds something else than numbers, is ragged,
            or holds a finite number beyond the range of its dtype.
        OverflowError: There are more numbers than may be.
    """

def json_parse(text: bytes, max_depth: int) -> Any:
    """Parses UTF-8 JSON.

    NaN, Infinity and -Infinity are numbers too. Of two members of one name the last counts.

    Args:
        text: The text.
        max_depth: How deep arrays and objects may be nested, up to 255.

    Returns:
        The value, of dict, list, str, int, float and bool, or None.

    Raises:
        ValueError: The text is malformed or nested too deep, or holds a finite number beyond the range of float64.
    """

def json_put_data(
    before: bytes, values: NDArray[np.float32 | np.float64], after: bytes, null: bool
) -> NDArray[np.uint8]:
    """Prints a JSON text with an array of floats in it, each with the fewest digits that give its bits back.

    Args:
        before: What precedes the array.
        values: Flat array of float32 or float64, dense.
        after: What follows it.
        null: Whether NaN and infinities are null; else they are the tokens NaN, Infinity and -Infinity.

    Returns:
        The text in a new array of bytes. A reader that rounds numbers to float64, and for float32 then to float32, gets
        their bits back.

    Raises:
        TypeError: values is no such array.
    """

def moments(x: Any, *, channel_axis: int = 1) -> Moments:
    """Moments of x: count, mean and M2 of each channel over all other axes.

    Args:
        x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
        channel_axis: The axis of the channels; negative counts from the end.

    Returns:
        Moments in float64. Those of zero rows are the neutral element, with count 0. They are not finite if values are
        not finite, or differ by more than about 1e154, so that squares overflow.

    Raises:
        ValueError: Rank, channel_axis or size are not as described.
        TypeError: x is no tensor of these dtypes.
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
    activation: Literal["relu"] | None = None,
    residual: Any | None = None,
) -> tuple[NDArray[Any], Cache]:
    """Normalizes x by given moments: y = γ·(x − mean)/√(var + ε) + β, with the biased variance (Algorithm 1).

    With ``residual`` and ``activation``, y = activation(γ·(x − mean)/√(var + ε) + β + residual), rounded once.

    The moments may be those of more than x: merged over micro-batches or processes.

    Args:
        x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
        moments: Moments with 2 values a channel or more.
        gamma: γ, shape (channels,) or a number; ones where absent.
        beta: β, shape (channels,) or a number; zeros where absent.
        eps: ε, finite and more than 0.
        channel_axis: The axis of the channels; negative counts from the end.
        out: Array of x's shape, dtype and memory order to write y to; it shares no memory with x or residual.
        activation: None or "relu", applied last: max(·, 0); NaN stays NaN.
        residual: Tensor of x's shape and dtype that is added before the activation; copied if its memory order differs.

    Returns:
        y, of x's shape, dtype and memory order, and the cache for the backward pass.

    Raises:
        ValueError: A shape or value is not as described.
        TypeError: x is no tensor of these dtypes, or out or a parameter is of a wrong type.
    """

def train_forward(
    x: Any,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    out: NDArray[Any] | None = None,
    activation: Literal["relu"] | None = None,
    residual: Any | None = None,
) -> tuple[NDArray[Any], Cache]:
    """Batch normalization in training (Algorithm 1): ``normalize`` by the moments of x itself, to the bit.

    With ``residual`` and ``activation``, y = activation(γ·x̂ + β + residual), rounded once.

    Args:
        x: Tensor of rank 2 or more, with 2 values a channel or more; float32, float64, float16 or bfloat16.
        gamma: γ, shape (channels,) or a number; ones where absent.
        beta: β, shape (channels,) or a number; zeros where absent.
        eps: ε, finite and more than 0.
        channel_axis: The axis of the channels; negative counts from the end.
        out: Array of x's shape, dtype and memory order to write y to; memory of its own, or x itself.
        activation: None or "relu", applied last: max(·, 0); NaN stays NaN.
        residual: Tensor of x's shape and dtype that is added before the activation; copied if its memory order differs.

    Returns:
        y, of x's shape, dtype and memory order, and the cache for ``backward``, which holds x and residual by reference.
        If y was written over x, the cache holds no x, and ``backward`` needs a copy of it.

    Raises:
        ValueError: A shape or value is not as described.
        TypeError: x is no tensor of these dtypes, or out or a parameter is of a wrong type.
    """

def gradient_sums(dy: Any, cache: Cache, *, x: Any | None = None) -> GradientSums:
    """The sums of a backward pass: dγ = Σdy·x̂ and dβ = Σdy of each channel (section 3), before any division by m.

    If the forward pass ended in an activation, dy stands for the gradient that passes it: dy where y > 0, else 0.

    Args:
        dy: ∂ℓ/∂y, of the shape and dtype of x.
        cache: What the forward pass returned.
        x: A copy of x, where the forward pass wrote y over x.

    Returns:
        GradientSums in float64, which merge over micro-batches and processes.

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
    """The input gradient from the sums: dx = γ/√(σ²+ε)·(dy − dβ/m − x̂·dγ/m) (section 3, in closed form).

    If the forward pass ended in an activation, dy stands for the gradient that passes it: dy where y > 0, else 0.

    Args:
        dy: ∂ℓ/∂y, of the shape and dtype of x.
        cache: What the forward pass returned.
        sums: Sums over all values whose moments were merged; m is their count.
        x: A copy of x, where the forward pass wrote y over x.
        out: Array of x's shape, dtype and memory order to write dx to; memory of its own, or dy itself.
        dresidual: Array of x's shape, dtype and memory order to write the residual's gradient to, which is the gradient
            that passes the activation; memory of its own, or dy itself. Only where the forward pass had a residual.

    Returns:
        dx, of x's shape, dtype and memory order.

    Raises:
        ValueError: A shape is not as described, or the sums are over another number of values than the moments by which x was
            normalized.
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
    """The backward pass of training (section 3): ``gradient_apply`` with ``gradient_sums``, to the bit.

    If the forward pass ended in an activation, dy passes where the rounded y > 0. That is told from x and residual, which
    must not have changed; y is not needed.

    Args:
        dy: ∂ℓ/∂y, of the shape and dtype of x.
        cache: What the forward pass returned.
        x: A copy of x, where the forward pass wrote y over x.
        out: Array of x's shape, dtype and memory order to write dx to; memory of its own, or dy itself.
        dresidual: Array of x's shape, dtype and memory order to write the residual's gradient to, which is the gradient
            that passes the activation; memory of its own, or dy itself. Only where the forward pass had a residual.

    Returns:
        Gradients (dx, dgamma, dbeta): dx like x; dγ and dβ of shape (channels,) in float64, also where γ, β were absent.
        Its attribute dresidual is the array given. Without one it is dy itself if the forward pass had a residual and no
        activation (and dx was not written over dy), else None.

    Raises:
        ValueError: A shape is not as described, or x was normalized by the moments of more than x: merge gradient sums then.
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
    activation: Literal["relu"] | None = None,
    residual: Any | None = None,
) -> NDArray[Any]:
    """Batch normalization with frozen statistics (Algorithm 2): y = (x − mean)·s + β, s = γ/√(var + ε).

    With ``residual`` and ``activation``, y = activation((x − mean)·s + β + residual), rounded once.

    Computed in float64 for 32- and 64-bit tensors, in float32 with a two-part mean for 16-bit ones; each operation
    rounded, none fused. The bits do not depend on the batch, on threads or on the instruction set. For 16-bit tensors,
    |x − mean| must be in the range of float32 (up to 3.4e38); beyond it y is not finite.

    Args:
        x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
        mean: E[x], shape (channels,) or a number.
        var: Var[x], shape (channels,) or a number; 0 or more.
        gamma: γ, shape (channels,) or a number; ones where absent.
        beta: β, shape (channels,) or a number; zeros where absent.
        eps: ε, finite, 0 or more; 0 only where every var is more than 0.
        channel_axis: The axis of the channels; negative counts from the end.
        out: Array of x's shape, dtype and memory order to write y to; x itself, or memory of its own.
        activation: None or "relu", applied last: max(·, 0); NaN stays NaN.
        residual: Tensor of x's shape and dtype that is added before the activation; copied if its memory order differs.

    Returns:
        y, of x's shape, dtype and memory order.

    Raises:
        ValueError: A shape or value is not as described.
        TypeError: x is no tensor of these dtypes, or out or a parameter is of a wrong type.
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
    activation: Literal["relu"] | None = None,
    residual: Any | None = None,
    dresidual: NDArray[Any] | None = None,
) -> Gradients:
    """The backward pass with frozen statistics: dx = γ/√(var + ε)·dy, dγ = Σdy·x̂, dβ = Σdy.

    With the ``activation`` of the forward pass, dy stands for the gradient that passes it: dy where y > 0, else 0. Only
    that depends on ``beta`` and ``residual``.

    Args:
        dy: ∂ℓ/∂y, of the shape and dtype of x.
        x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
        mean: E[x], shape (channels,) or a number.
        var: Var[x], shape (channels,) or a number; 0 or more.
        gamma: γ, shape (channels,) or a number; ones where absent.
        beta: β, shape (channels,) or a number; zeros where absent.
        eps: ε, finite, 0 or more; 0 only where every var is more than 0.
        channel_axis: The axis of the channels; negative counts from the end.
        out: Array of x's shape, dtype and memory order to write dx to; memory of its own, or dy itself.
        activation: None or "relu", as in the forward pass.
        residual: As in the forward pass.
        dresidual: Array of x's shape, dtype and memory order to write the residual's gradient to, which is the gradient
            that passes the activation; memory of its own, or dy itself. Only with residual.

    Returns:
        Gradients (dx, dgamma, dbeta): dx like x; dγ and dβ of shape (channels,) in float64.
        Its attribute dresidual is the array given. Without one it is dy itself if the forward pass had a residual and no
        activation (and dx was not written over dy), else None.

    Raises:
        ValueError: A shape or value is not as described.
        TypeError: dy, x, out or a parameter is of a wrong type.
    """

def copy(x: Any, out: NDArray[Any], *, z: Any | None = None, streaming: bool = False) -> None:
    """Copies x to out, or adds z to it: the least that any function here costs, which benchmarks compare with.

    Args:
        x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
        out: Array like x, in memory of its own.
        z: Tensor like x.
        streaming: Whether out is written with non-temporal stores.

    Raises:
        ValueError: A shape is not as described.
        TypeError: out or z has another dtype than x.
    """

def release_memory() -> int:
    """Frees the memory that is kept for outputs to come.

    Fresh memory costs more than the arithmetic that fills it. So the memory of large outputs that no array uses any more
    is kept: 256 MiB in all or one output, whichever is larger; none where the environment variable
    ``BATCHNORM_KEEP_MEMORY`` is 0. Arrays that are alive are not touched.

    Returns:
        Bytes freed.
    """

def set_num_threads(n: int) -> None:
    """Sets the number of threads that work on one call, the caller's own included. Results do not depend on it.

    Raises:
        ValueError: n is not from 1 to 1024.
    """

def get_num_threads() -> int:
    """The number of threads that work on one call.

    It is what was set, else ``BATCHNORM_NUM_THREADS``, else the CPUs that the affinity mask and the cgroup quota leave
    to this process.

    Raises:
        ValueError: ``BATCHNORM_NUM_THREADS`` is not a number from 1 to 1024.
    """

def simd_level() -> str:
    """The instruction-set level in use.

    It is what was set, else ``BATCHNORM_SIMD``, else the highest that this machine can run.

    Raises:
        ValueError: ``BATCHNORM_SIMD`` names a level that this machine cannot run.
    """

def set_simd_level(name: str | None) -> None:
    """Forces an instruction-set level by name; ``None`` goes back to the choice made at first use.

    Results do not depend on it.

    Raises:
        ValueError: name is none of ``simd_levels()``.
    """

def simd_levels() -> list[str]:
    """Names of the instruction-set levels that this machine can run, lowest first."""

def tensor(argument: str, value: Any) -> NDArray[Any]:
    """The array of a tensor, whose memory it shares.

    Args:
        argument: What errors call it.
        value: A NumPy array, or an object with ``__dlpack__`` (on the CPU) or ``__array__``.

    Raises:
        TypeError: It is none of these, has a mask, or requires grad.
    """

def real_array(argument: str, value: ArrayLike) -> NDArray[Any]:
    """The array of real numbers that parameters are given as, of any shape.

    Args:
        argument: What errors call it.
        value: What ``tensor`` takes, a number, or a sequence of numbers.

    Raises:
        TypeError: It is not real, has a mask, or requires grad.
    """
