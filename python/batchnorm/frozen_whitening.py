"""The frozen whitening layer `FrozenWhitening`: immutable; it is saved, exported and served."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from batchnorm._checks import channels_where, integer, parameter_dtype
from batchnorm._core import CoMoments, WhiteningMap, real_array, whitening_matrix
from batchnorm._frozen import COARSE, Frozen, checked_axis, fingerprint, rounded, warn_of_rounding

if TYPE_CHECKING:
    import onnx


@final
@dataclass(frozen=True, slots=True, init=False, eq=False, repr=False)
class FrozenWhitening(Frozen):
    """Whitening with fixed statistics: y = matrix·(x − mean) + bias in each group of adjacent channels.

    With D = channels / groups, y_o = Σ_i matrix[o, i]·(x_i − mean_i) + bias_o, where i runs in order over the
    D channels of o's group. This is computed in float64, with every operation rounded and no fused
    multiply-add, and then rounded to x's dtype (16-bit x: to float32 first). So any split of a batch, any
    number of threads and any instruction-set level give the same bits.

    Ioffe and Szegedy 2015 (arXiv 1502.03167) start from whitening in section 2. The parameters are rounded
    once, to `dtype`, when the layer is made. The layer computes with the rounded parameters, saves, exports
    and serves them, and `fingerprint` identifies them. Layers are equal if their fingerprints are.

    Args:
        matrix: diag(γ)·W, shape (channels, D): row o holds what the channels of o's group contribute to y_o.
            D divides channels; a square matrix is one group.
        mean: E[x]; any real array that broadcasts to (channels,).
        bias: β; any real array that broadcasts to (channels,); zeros if None.
        channel_axis: The axis of x that holds the channels; -1 is channels-last.
        dtype: dtype of the parameters, float32 or float64.

    Attributes:
        matrix: diag(γ)·W, shape (channels, D); like all three arrays of `dtype`, and read-only.
        mean: E[x], shape (channels,).
        bias: β, shape (channels,).
        channel_axis: The axis of the channels, as passed in.
        dtype: The NumPy dtype of the parameters.
        fingerprint: Lower-case hex SHA-256 of the parameters; `docs/format.md` says over which bytes.

    Raises:
        TypeError: A parameter is not real, or `dtype` is neither float32 nor float64.
        ValueError: A parameter is of the wrong shape or not finite, or rounding makes it infinite.

    Example:
        >>> frozen = FrozenWhitening([[1.0, 0.0], [-0.5, 0.5]], mean=[1.0, 2.0])
        >>> frozen(np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32))
        array([[0., 0.],
               [2., 0.]], dtype=float32)
    """

    matrix: NDArray[Any]
    mean: NDArray[Any]
    bias: NDArray[Any]
    channel_axis: int
    dtype: np.dtype[Any]
    fingerprint: str
    _map: WhiteningMap

    def __init__(
        self,
        matrix: ArrayLike,
        mean: ArrayLike,
        bias: ArrayLike | None = None,
        *,
        channel_axis: int = 1,
        dtype: DTypeLike = "float32",
    ) -> None:
        dtype = parameter_dtype(dtype)
        channel_axis = checked_axis(channel_axis)
        given = real_array("matrix", matrix)
        channels, size = given.shape if given.ndim == 2 else (0, 0)
        if size == 0 or channels == 0 or channels % size:
            wanted = "(channels, D) with D a divisor of channels, 1 or more"
            raise ValueError(f"matrix: shape was {given.shape}, wanted {wanted}")
        kept = {
            "matrix": rounded("matrix", _finite("matrix", given), dtype),
            "mean": rounded("mean", _vector("mean", mean, channels), dtype),
            "bias": rounded("bias", _vector("bias", 0.0 if bias is None else bias, channels), dtype),
        }
        put: Callable[[str, Any], None] = partial(object.__setattr__, self)
        for name, values in kept.items():
            put(name, values)
        put("channel_axis", channel_axis)
        put("dtype", dtype)
        put("_map", WhiteningMap(**kept))
        head = struct.pack("<qQQ", channel_axis, channels, channels // size)
        put("fingerprint", fingerprint("batchnorm-frozen-whitening/1", dtype, head, kept.values()))

    @classmethod
    def from_comoments(
        cls,
        comoments: CoMoments,
        gamma: ArrayLike | None = None,
        beta: ArrayLike | None = None,
        *,
        method: Literal["zca", "pca", "cholesky", "iterative"] = "zca",
        eps: float = 1e-5,
        ddof: int = 1,
        steps: int | None = None,
        channel_axis: int = 1,
        dtype: DTypeLike = "float32",
    ) -> FrozenWhitening:
        """Make the layer whose population statistics are those of the co-moments: y = γ·W(x − mean) + β.

        W(Λ + εI)Wᵀ = I in each group, where Λ is the covariance; `batchnorm.whitening_matrix` documents the
        methods and what is refused.

        Args:
            comoments: Co-moments of the whole data; their groups are those of the layer.
            gamma: γ; a real array that broadcasts to (channels,); ones if None.
            beta: β; likewise; zeros if None.
            method: "zca", "pca", "cholesky" or "iterative".
            eps: ε, added to the diagonal of Λ.
            ddof: 1 for the unbiased covariance scatter/(count − 1), 0 for the biased scatter/count.
            steps: Newton–Schulz steps of the method "iterative".
            channel_axis: The axis of x that holds the channels.
            dtype: dtype of the parameters, float32 or float64.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: There are `ddof` values or fewer, Λ + εI cannot be whitened, or the layer cannot be
                made (see the class).

        Warns:
            UserWarning: Rounding the matrix and the mean moves y, for data with these statistics, by more
                than 1e-4 of its standard deviations (the root of the mean square); names the channels.
        """
        dtype = parameter_dtype(dtype)
        if ddof not in (0, 1):
            raise ValueError(f"ddof: was {ddof!r}, wanted 1 (unbiased covariance) or 0 (biased)")
        if comoments.count <= ddof:
            wanted = "1 value" if ddof == 0 else "2 values"
            raise ValueError(f"comoments: {wanted} or more wanted in each channel, found {comoments.count:g}")
        cov = comoments.cov_unbiased if ddof else comoments.cov
        channels = comoments.channels
        scale = _vector("gamma", 1.0 if gamma is None else gamma, channels)
        bias = _vector("beta", 0.0 if beta is None else beta, channels)
        whitening = whitening_matrix(cov, method=method, eps=eps, steps=steps)
        with np.errstate(all="ignore"):  # what the dtype cannot hold is asked of the result
            matrix = scale[:, None] * whitening.reshape(channels, -1)
            layer = cls(matrix, comoments.mean, bias, channel_axis=channel_axis, dtype=dtype)
            lost = (matrix - layer.matrix).reshape(cov.shape)
            lost_mean = (comoments.mean - layer.mean).reshape(len(cov), -1, 1)
            variance = ((lost @ cov) * lost).sum(axis=2)
            shift = (layer.matrix.reshape(cov.shape) @ lost_mean)[:, :, 0]
            moved = np.sqrt(variance + shift**2).ravel()
        warn_of_rounding("dtype", "y", moved > COARSE * np.abs(scale), dtype)
        return layer

    @staticmethod
    def load(path: str | PathLike[str]) -> FrozenWhitening:
        """Load the layer saved at `path`, and verify its fingerprint.

        Raises:
            OSError: The file cannot be read.
            ValueError: The file is not a frozen whitening layer, is of an unknown version, or is damaged.
        """
        from batchnorm._file import WHITENING, read

        return read(path, {WHITENING: FrozenWhitening})

    def save(self, path: str | PathLike[str]) -> None:
        """Save the layer to `path` as safetensors (`docs/format.md`), whole or not at all.

        The same layer always makes the same bytes.

        Raises:
            OSError: The file cannot be written; an old file at `path` is unchanged.
        """
        from batchnorm._file import WHITENING, write

        write(self, path, WHITENING)

    def to_onnx(self, *, opset: int = 15, rank: int = 4) -> onnx.ModelProto:
        """Make an ONNX model of the layer, with input x and output y of the layer's dtype.

        The mean is subtracted, and the matrix is a Gemm, a 1×1 Conv or an Einsum, between two Transposes if
        that wants the channels on another axis. This needs the extra `batchnorm[onnx]`. `docs/onnx.md` says
        which form is written when, and how close the result is.

        Args:
            opset: Version of the ONNX operators, from 15 to the newest that the installed onnx knows.
            rank: Rank of x, which a valid ONNX model must declare: 2 for (N, C), 4 for (N, C, H, W). The
                sizes of all axes but the channels' are dynamic.

        Raises:
            ImportError: The package onnx is not installed.
            ValueError: opset or rank is not as described.
            TypeError: opset or rank is not an integer.
        """
        from batchnorm.onnx.whitening import build_model

        return build_model(self, opset=integer("opset", opset), rank=integer("rank", rank))

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.mean)

    @property
    def groups(self) -> int:
        """Number of groups of adjacent channels that are whitened together."""
        return len(self.matrix) // len(self.matrix[0])

    def __call__(self, x: Any, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Whiten x.

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
        return self._map.apply(self._tensor("x", x), channel_axis=self.channel_axis, out=out)

    def backward(self, dy: Any, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Compute dx_i = Σ_o matrix[o, i]·dy_o over the outputs of i's group: the statistics are held fixed.

        Args:
            dy: ∂ℓ/∂y, of a dtype that the layer takes.
            out: Array of dy's shape, dtype and memory order to write dx to; may be dy itself.

        Returns:
            dx, of dy's shape, dtype and memory order.

        Raises:
            TypeError: dy is not of such a dtype.
            ValueError: dy or out is of the wrong shape.
        """
        return self._map.backward(self._tensor("dy", dy), channel_axis=self.channel_axis, out=out)

    def __repr__(self) -> str:
        return (
            f"FrozenWhitening(channels={self.channels}, groups={self.groups}, channel_axis="
            f"{self.channel_axis}, dtype={self.dtype.name}, fingerprint={self.fingerprint[:12]}…)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(FrozenWhitening, channel_axis=self.channel_axis, dtype=self.dtype.name)
        return make, (self.matrix, self.mean, self.bias)


def _finite(name: str, array: NDArray[Any]) -> NDArray[np.float64]:
    with np.errstate(all="ignore"):  # a longdouble beyond float64, found by the look at the result
        wide = array.astype(np.float64)
    if bad := channels_where(~np.isfinite(wide)):
        raise ValueError(f"{name}: not finite in {bad}")
    return wide


def _vector(name: str, values: ArrayLike, channels: int) -> NDArray[np.float64]:
    array = real_array(name, values)
    if array.ndim > 1 or array.size not in (1, channels):
        raise ValueError(f"{name}: shape was {array.shape}, wanted ({channels},) or a number")
    return _finite(name, np.broadcast_to(array, (channels,)))
