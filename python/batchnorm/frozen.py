"""The frozen layer `FrozenBatchNorm`: immutable; it is saved, exported and served."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from batchnorm._checks import channels_where, integer, number, parameter_dtype
from batchnorm._core import Coefficients, Moments, real_array
from batchnorm._frozen import COARSE, Frozen, checked_axis, fingerprint, rounded, warn_of_rounding
from batchnorm._types import Gradients
from batchnorm.conventions import torch_parameters

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, slots=True, eq=False)
class FrozenCache:
    """Everything that a backward pass needs of a forward pass with frozen statistics.

    It holds x and residual by reference: they must not be changed between the two passes.
    """

    coefficients: Coefficients
    x: NDArray[Any]
    channel_axis: int
    activation: Literal["relu", "relu6"] | None = None
    residual: Any | None = None

    def backward(
        self, dy: Any, *, out: NDArray[Any] | None = None, dresidual: NDArray[Any] | None = None
    ) -> Gradients:
        """Return the gradients with the statistics held fixed; `batchnorm.infer_backward` documents them."""
        return self.coefficients.backward(
            dy,
            self.x,
            channel_axis=self.channel_axis,
            out=out,
            activation=self.activation,
            residual=self.residual,
            dresidual=dresidual,
        )


@final
@dataclass(frozen=True, slots=True, init=False, eq=False, repr=False)
class FrozenBatchNorm(Frozen):
    """Batch normalization with fixed statistics: y = (x − mean)·gamma/√(var + eps) + beta.

    It is the inference form of Ioffe and Szegedy 2015 (arXiv 1502.03167), Algorithm 2, steps 8 to 12. The
    parameters are rounded once, when the layer is made: the four arrays to `dtype`, and eps always to
    float32, since ONNX can carry no more. The layer computes with these five rounded parameters, saves,
    exports and serves them, and `fingerprint` identifies them. Layers are equal if their fingerprints are.

    Args:
        mean: E[x]; like all four arrays, any real array that broadcasts to (channels,).
        var: Var[x], not negative; by the convention of this package the unbiased variance, but used as given.
        gamma: γ; ones if None.
        beta: β; zeros if None.
        eps: ε, finite and not negative; 0 only if every variance is positive.
        channel_axis: The axis of x that holds the channels; -1 is channels-last.
        dtype: dtype of the parameters, float32 or float64.

    Attributes:
        mean: E[x]; like all four arrays of shape (channels,), of `dtype`, and read-only.
        var: Var[x].
        gamma: γ.
        beta: β.
        eps: ε, a float whose value float32 holds exactly.
        channel_axis: The axis of the channels, as passed in.
        dtype: The NumPy dtype of the parameters.
        fingerprint: Lower-case hex SHA-256 of the parameters; `docs/format.md` says over which bytes.

    Raises:
        TypeError: A parameter is not real, or `dtype` is neither float32 nor float64.
        ValueError: A parameter is of the wrong shape or not finite, var or eps is negative, or eps and a
            variance are both 0; or rounding makes a parameter infinite, or a positive variance or eps 0.

    Warns:
        UserWarning: Rounding the mean moves it by more than 1e-4·√(var + eps); names the channels.

    Example:
        >>> frozen = FrozenBatchNorm(mean=[1.0, 2.0], var=[4.0, 9.0], gamma=[1.0, 3.0], eps=0)
        >>> frozen(np.array([[5.0, 5.0], [1.0, 2.0]], dtype=np.float32))
        array([[2., 3.],
               [0., 0.]], dtype=float32)
    """

    mean: NDArray[Any]
    var: NDArray[Any]
    gamma: NDArray[Any]
    beta: NDArray[Any]
    eps: float
    channel_axis: int
    dtype: np.dtype[Any]
    fingerprint: str
    _coefficients: Coefficients

    def __init__(
        self,
        mean: ArrayLike,
        var: ArrayLike,
        gamma: ArrayLike | None = None,
        beta: ArrayLike | None = None,
        *,
        eps: float = 1e-5,
        channel_axis: int = 1,
        dtype: DTypeLike = "float32",
    ) -> None:
        dtype = parameter_dtype(dtype)
        channel_axis = checked_axis(channel_axis)
        given = {
            "mean": real_array("mean", mean),
            "var": real_array("var", var),
            "gamma": real_array("gamma", 1.0 if gamma is None else gamma),
            "beta": real_array("beta", 0.0 if beta is None else beta),
        }
        eps = number("eps", eps)
        # Raises, by name, whatever was wrong before rounding.
        channels = Coefficients(**given, eps=eps).channels
        with np.errstate(all="ignore"):  # Coefficients, above, has checked the values
            wide = {name: array.astype(np.float64) for name, array in given.items()}
        exact = {name: np.broadcast_to(array, (channels,)) for name, array in wide.items()}
        kept = {name: rounded(name, values, dtype) for name, values in exact.items()}
        eps = _rounded_eps(eps)

        put: Callable[[str, Any], None] = partial(object.__setattr__, self)
        for name, values in kept.items():
            put(name, values)
        put("eps", eps)
        put("channel_axis", channel_axis)
        put("dtype", dtype)
        put("_coefficients", Coefficients(**kept, eps=eps))
        head = struct.pack("<qQd", channel_axis, channels, eps)
        arrays = (self.gamma, self.beta, self.mean, self.var)
        put("fingerprint", fingerprint("batchnorm-frozen/1", dtype, head, arrays))
        sigma = np.sqrt(self.var.astype(np.float64) + eps)
        coarse = np.abs(exact["mean"] - self.mean) > COARSE * sigma
        warn_of_rounding("mean", "it", coarse, dtype)

    @classmethod
    def from_moments(
        cls,
        moments: Moments,
        gamma: ArrayLike | None = None,
        beta: ArrayLike | None = None,
        *,
        eps: float = 1e-5,
        ddof: int = 1,
        channel_axis: int = 1,
        dtype: DTypeLike = "float32",
    ) -> FrozenBatchNorm:
        """Make the layer whose population statistics are those of the moments.

        Args:
            moments: Moments of the whole data.
            gamma: γ; ones if None.
            beta: β; zeros if None.
            eps: ε.
            ddof: 1 for the unbiased variance M2/(count − 1), 0 for the biased M2/count.
            channel_axis: The axis of x that holds the channels.
            dtype: dtype of the parameters, float32 or float64.

        Raises:
            ValueError: A channel has `ddof` values or fewer, or the layer cannot be made (see the class).
        """
        if ddof not in (0, 1):
            raise ValueError(f"ddof: was {ddof!r}, wanted 1 (unbiased variance) or 0 (biased)")
        too_few = moments.count <= ddof
        if too_few.any():
            there = f"{channels_where(too_few)} with fewer"
            values = "1 value" if ddof == 0 else "2 values"
            raise ValueError(f"moments: {values} or more wanted in each channel, found {there}")
        var = moments.var_unbiased if ddof else moments.var
        return cls(moments.mean, var, gamma, beta, eps=eps, channel_axis=channel_axis, dtype=dtype)

    @classmethod
    def from_torch(
        cls, state_dict: Mapping[str, Any], prefix: str = "", *, eps: float = 1e-5
    ) -> FrozenBatchNorm:
        """Make the layer that computes what PyTorch's BatchNorm with this state computes in eval mode.

        PyTorch need not be installed: the state may hold plain arrays or CPU tensors. It does not hold ε, so
        pass `eps` if the PyTorch layer did not have the default. The parameters are float64 if an array of
        the state is, else float32. ε is rounded to float32 in both cases, which PyTorch does not do.

        Args:
            state_dict: Maps `running_mean` and `running_var`, and `weight` and `bias` if the layer was
                affine, to arrays.
            prefix: The part of the keys before those names, including the dot: `"features.1."`.
            eps: ε of the PyTorch layer.

        Raises:
            ValueError: Running statistics are missing, or the layer cannot be made (see the class).
            TypeError: `state_dict` is not a mapping, or an array in it is not real, has a mask or requires
                grad.
        """
        parameters = torch_parameters(state_dict, prefix)
        wide = any(values is not None and values.dtype == np.float64 for values in parameters.values())
        return cls(**parameters, eps=eps, dtype="float64" if wide else "float32")

    @staticmethod
    def load(path: str | PathLike[str]) -> FrozenBatchNorm:
        """Load the layer saved at `path`, and verify its fingerprint.

        Raises:
            OSError: The file cannot be read.
            ValueError: The file is not a frozen layer, is of an unknown version, or is damaged.
        """
        from batchnorm._file import BATCH_NORM, read

        return read(path, {BATCH_NORM: FrozenBatchNorm})

    def save(self, path: str | PathLike[str]) -> None:
        """Save the layer to `path` as safetensors (`docs/format.md`), whole or not at all.

        The same layer always makes the same bytes.

        Raises:
            OSError: The file cannot be written; an old file at `path` is unchanged.
        """
        from batchnorm._file import BATCH_NORM, write

        write(self, path, BATCH_NORM)

    def to_onnx(
        self,
        *,
        opset: int = 15,
        mode: Literal["inference", "exact", "affine", "training"] = "inference",
        rank: int | None = None,
        shape: Sequence[int | str | None] | None = None,
        dtype: DTypeLike | None = None,
        name: str = "",
        x: str = "x",
        y: str = "y",
        update_weight: float | None = None,
        count: int | None = None,
    ) -> onnx.ModelProto:
        """Make an ONNX model of the layer.

        This needs the extra `batchnorm[onnx]`. `docs/onnx.md` says what each mode promises.

        Args:
            opset: Version of the ONNX operators, from 9 to the newest that the installed onnx knows; from 13
                for bfloat16 and from 14 for mode "training".
            mode: "inference" for one BatchNormalization node, "exact" for arithmetic that gives, in ONNX
                Runtime, the bits of this layer, "affine" for x·scale + shift, from which the layer cannot be
                read back, or "training" for a BatchNormalization node that normalizes by the statistics of
                the batch and computes new running statistics.
            rank: Rank of x, which a valid ONNX model must declare: 2 for (N, C), 4 for (N, C, H, W). If None,
                that of `shape`, and 4 if that is None too.
            shape: Sizes of x's axes: an integer is fixed, a name or None is dynamic. If None, all sizes but
                that of the channels are dynamic.
            dtype: dtype of x and y: one that the layer takes; if None, that of its parameters.
            name: Name of the node; all names in the model but x and y then begin with it and a dot.
            x: Name of the input.
            y: Name of the output.
            update_weight: In mode "training", the weight of the new statistics in the running ones. ONNX's
                momentum is 1 minus it.
            count: In mode "training", the number of values per channel of every batch, by which the unbiased
                variance becomes the biased one that ONNX stores.

        Raises:
            ImportError: The package onnx is not installed.
            ValueError: An argument is not as described, or a number is out of the range of the type in which
                the mode computes.
            TypeError: opset, rank, count or a size is not an integer, update_weight is not a number, or dtype
                is not one of float16, bfloat16, float32 and float64.
        """
        from batchnorm.onnx.export import build_model

        return build_model(
            self,
            opset=integer("opset", opset),
            mode=mode,
            rank=None if rank is None else integer("rank", rank),
            shape=shape,
            dtype=dtype,
            name=name,
            x=x,
            y=y,
            update_weight=None if update_weight is None else number("update_weight", update_weight),
            count=None if count is None else integer("count", count),
        )

    def fold_into_linear(
        self, weight: ArrayLike, bias: ArrayLike | None = None, *, before: bool = False
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return weight and bias of the linear layer that does what a linear layer and this batch norm do.

        They are computed in float64 and rounded once; `docs/folding.md` has the algebra.

        Args:
            weight: Shape (out, in), as PyTorch stores it; pass the transpose of a weight of shape (in, out).
            bias: Shape (out,); zeros if None.
            before: Whether the batch norm comes before the linear layer, and not after it.

        Returns:
            The new weight and bias, both of the weight's dtype.

        Raises:
            TypeError: An array is not of real numbers, or the weight is not of floats.
            ValueError: Shapes do not fit the layer, a value is not finite, or the result is not in the range
                of the weight's dtype, or all weights of a channel become 0 in it.
        """
        from batchnorm.folding import fold_arrays

        return fold_arrays(self, "linear", weight, bias, before=before)

    def fold_into_conv(
        self,
        weight: ArrayLike,
        bias: ArrayLike | None = None,
        *,
        groups: int = 1,
        before: bool = False,
        padded: bool | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return weight and bias of the convolution that does what a convolution and this batch norm do.

        Before a convolution that pads, a batch norm can be folded only if it adds nothing: the zeros are put
        around its result, so near the border what it adds is in some terms of a sum and not in others.

        Args:
            weight: Shape (out, in/groups, kernel…), as PyTorch and ONNX store it.
            bias: Shape (out,); zeros if None.
            groups: Number of groups of channels.
            before: Whether the batch norm comes before the convolution, and not after it.
            padded: Whether the convolution pads its input; must be given if `before`.

        Returns:
            The new weight and bias, both of the weight's dtype.

        Raises:
            TypeError: An array is not of real numbers, or the weight is not of floats.
            ValueError: See `fold_into_linear`; or the batch norm comes before a padded convolution and
                beta − mean·gamma/√(var + eps) is not 0 in every channel, or `padded` is not given.
        """
        from batchnorm.folding import fold_arrays

        if before and padded is None:
            raise ValueError("padded: was None, wanted True or False if the batch norm comes before")
        return fold_arrays(self, "conv", weight, bias, groups=groups, before=before, padded=bool(padded))

    def fold_into_conv_transpose(
        self, weight: ArrayLike, bias: ArrayLike | None = None, *, groups: int = 1
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return weight and bias of the transposed convolution that does what one and this batch norm do.

        The batch norm comes after it. Before it none can be folded: how many terms of a transposed
        convolution meet in a value, and with them what the batch norm adds, depends on the position.

        Args:
            weight: Shape (in, out/groups, kernel…), as PyTorch and ONNX store it.
            bias: Shape (out,); zeros if None.
            groups: Number of groups of channels.

        Returns:
            The new weight and bias, both of the weight's dtype.

        Raises:
            TypeError: An array is not of real numbers, or the weight is not of floats.
            ValueError: See `fold_into_linear`.
        """
        from batchnorm.folding import fold_arrays

        return fold_arrays(self, "conv_transpose", weight, bias, groups=groups)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.mean)

    def __call__(self, x: Any, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Normalize x.

        Args:
            x: Tensor of rank 2 or more with `channels` entries on the channel axis. A layer with float32
                parameters takes float16, bfloat16 and float32; one with float64 parameters takes float64 too.
            out: Array of x's shape, dtype and memory order to write y to; may be x itself.

        Returns:
            y, of x's shape, dtype and memory order.

        Raises:
            TypeError: x is not of such a dtype.
            ValueError: x or out is of the wrong shape.
        """
        return self._coefficients.infer(self._tensor("x", x), channel_axis=self.channel_axis, out=out)

    def _forward(
        self, x: Any, activation: Literal["relu", "relu6"] | None = None, residual: Any | None = None
    ) -> tuple[NDArray[Any], FrozenCache]:
        """Normalize x and return a cache for the backward pass, as a trainable layer does in eval mode.

        Args:
            x: Tensor, as `__call__` takes it.
            activation: None, "relu" or "relu6", applied last.
            residual: Array of x's shape and dtype that is added before the activation.

        Returns:
            y, of x's shape, dtype and memory order, and the cache, which holds x and residual by reference.

        Raises:
            TypeError: x is not of a dtype that the layer takes.
            ValueError: A tensor is of the wrong shape, or the activation is unknown.
        """
        x, axis = self._tensor("x", x), self.channel_axis
        y = self._coefficients.infer(x, channel_axis=axis, activation=activation, residual=residual)
        return y, FrozenCache(self._coefficients, x, axis, activation, residual)

    def backward(self, dy: Any, x: Any, out: NDArray[Any] | None = None) -> Gradients:
        """Compute the gradients with the statistics held fixed: dx = γ/√(var + ε)·dy, dγ = Σ dy·x̂, dβ = Σ dy.

        Args:
            dy: ∂ℓ/∂y, of x's shape and dtype.
            x: The tensor that the layer was called with.
            out: Array of x's shape, dtype and memory order to write dx to; may be dy itself.

        Raises:
            TypeError: x is not of a dtype that the layer takes, or dy or out has another dtype than x.
            ValueError: A tensor is of the wrong shape.
        """
        return FrozenCache(self._coefficients, self._tensor("x", x), self.channel_axis).backward(dy, out=out)

    def __repr__(self) -> str:
        return (
            f"FrozenBatchNorm(channels={self.channels}, channel_axis={self.channel_axis}, "
            f"dtype={self.dtype.name}, eps={np.float32(self.eps)!s}, fingerprint={self.fingerprint[:12]}…)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(FrozenBatchNorm, eps=self.eps, channel_axis=self.channel_axis, dtype=self.dtype.name)
        return make, (self.mean, self.var, self.gamma, self.beta)


def _rounded_eps(eps: float) -> float:
    with np.errstate(all="ignore"):
        held = float(np.float32(eps)) + 0.0  # turns -0.0, which is the same ε, into 0.0
    if not np.isfinite(held) or (eps > 0 and held == 0):
        raise ValueError(f"eps: {eps!r} is {held} in float32, in which eps is held")
    return held
