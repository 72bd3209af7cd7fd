from typing import Any, Final, Literal, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm._types import Gradients

__all__ = [
    "Affine",
    "Cache",
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
    "release_memory",
    "set_num_threads",
    "set_simd_level",
    "simd_level",
    "simd_levels",
    "train_forward",
]

__version__: Final[str]

@final
class Moments:
    def __new__(cls, count: ArrayLike, mean: ArrayLike, m2: ArrayLike) -> Moments: ...
    @property
    def channels(self) -> int: ...
    @property
    def count(self) -> NDArray[np.float64]: ...
    @property
    def mean(self) -> NDArray[np.float64]: ...
    @property
    def m2(self) -> NDArray[np.float64]: ...
    @property
    def var(self) -> NDArray[np.float64]: ...
    @property
    def var_unbiased(self) -> NDArray[np.float64]: ...
    def merge(self, other: Moments) -> Moments: ...
    def to_bytes(self) -> bytes: ...
    @staticmethod
    def from_bytes(data: bytes) -> Moments: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __reduce__(self) -> tuple[Any, tuple[bytes]]: ...

@final
class GradientSums:
    def __new__(cls, count: ArrayLike, dgamma: ArrayLike, dbeta: ArrayLike) -> GradientSums: ...
    @property
    def channels(self) -> int: ...
    @property
    def count(self) -> NDArray[np.float64]: ...
    @property
    def dgamma(self) -> NDArray[np.float64]: ...
    @property
    def dbeta(self) -> NDArray[np.float64]: ...
    def merge(self, other: GradientSums) -> GradientSums: ...
    def to_bytes(self) -> bytes: ...
    @staticmethod
    def from_bytes(data: bytes) -> GradientSums: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __reduce__(self) -> tuple[Any, tuple[bytes]]: ...

@final
class Cache:
    @property
    def x(self) -> NDArray[Any] | None: ...
    @property
    def residual(self) -> NDArray[Any] | None: ...
    @property
    def activation(self) -> str | None: ...
    @property
    def moments(self) -> Moments: ...
    @property
    def mean(self) -> NDArray[np.float64]: ...
    @property
    def invstd(self) -> NDArray[np.float64]: ...
    @property
    def channel_axis(self) -> int: ...

@final
class Affine:
    def __new__(
        cls,
        mean: ArrayLike,
        var: ArrayLike,
        gamma: ArrayLike | None = None,
        beta: ArrayLike | None = None,
        *,
        eps: float = 1e-5,
    ) -> Affine: ...
    @property
    def channels(self) -> int: ...
    def infer(
        self,
        x: Any,
        *,
        channel_axis: int = 1,
        out: NDArray[Any] | None = None,
        activation: Literal["relu"] | None = None,
        residual: Any | None = None,
    ) -> NDArray[Any]: ...
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
    ) -> Gradients: ...

def json_cut_data(
    text: bytes | NDArray[np.uint8], max_elements: int, max_depth: int
) -> tuple[bytes, list[tuple[NDArray[np.float32 | np.float64], list[int]]]]: ...
def json_parse(text: bytes, max_depth: int) -> Any: ...
def json_put_data(
    before: bytes, values: NDArray[np.float32 | np.float64], after: bytes, null: bool
) -> NDArray[np.uint8]: ...
def moments(x: Any, *, channel_axis: int = 1) -> Moments: ...
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
) -> tuple[NDArray[Any], Cache]: ...
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
) -> tuple[NDArray[Any], Cache]: ...
def gradient_sums(dy: Any, cache: Cache, *, x: Any | None = None) -> GradientSums: ...
def gradient_apply(
    dy: Any,
    cache: Cache,
    sums: GradientSums,
    *,
    x: Any | None = None,
    out: NDArray[Any] | None = None,
    dresidual: NDArray[Any] | None = None,
) -> NDArray[Any]: ...
def backward(
    dy: Any,
    cache: Cache,
    *,
    x: Any | None = None,
    out: NDArray[Any] | None = None,
    dresidual: NDArray[Any] | None = None,
) -> Gradients: ...
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
) -> NDArray[Any]: ...
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
) -> Gradients: ...
def copy(x: Any, out: NDArray[Any], *, z: Any | None = None, streaming: bool = False) -> None: ...
def release_memory() -> int: ...
def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def simd_level() -> str: ...
def set_simd_level(name: str | None) -> None: ...
def simd_levels() -> list[str]: ...
