"""Cases for the tests of the core: dtypes, layouts, and sizes near lane, cache-line and block widths."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

DTYPES = tuple(np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16))
EDGES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 49, 63, 64, 65, 100, 4095, 4096, 4097, 12544)


class Layout(NamedTuple):
    """A shape, its channel axis, its axes as they lie in memory, outermost first (None: as in the shape)."""

    shape: tuple[int, ...]
    channel_axis: int = 1
    memory: tuple[int, ...] | None = None

    def __str__(self):
        return f"{'x'.join(map(str, self.shape))}@{self.channel_axis}" + ("permuted" if self.memory else "")

    @property
    def channels(self):
        return self.shape[self.channel_axis]

    def lay(self, values):
        """`values` (of this shape) in this memory order, densely."""
        order = self.memory or tuple(range(len(self.shape)))
        return np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))

    def normal(self, rng, dtype, mean=0.0, std=1.0):
        """Normal values with the given mean and deviation, numbers or (channels,)."""
        by_channel = np.moveaxis(np.empty(self.shape), self.channel_axis, -1).shape
        values = rng.standard_normal(by_channel) * std + mean
        return self.lay(np.moveaxis(values, -1, self.channel_axis).astype(dtype))


NHWC_AS_NCHW = (0, 2, 3, 1)
LAYOUTS = (
    *(Layout((3, 5, inner)) for inner in EDGES),
    *(Layout((rows, 3)) for rows in EDGES[1:]),
    *(Layout((5, channels)) for channels in EDGES if channels < 5000),
    *(Layout((1, channels, 5)) for channels in (1, 15, 16, 17, 64, 65, 1000)),
    *(Layout((67, channels, inner)) for channels, inner in ((1, 2), (9, 2), (33, 3), (17, 16), (64, 17))),
    Layout((2, 1, 4097)),
    Layout((2, 6, 7, 7)),
    Layout((2, 3, 4, 5, 6)),
    Layout((4, 3, 1, 1)),
    Layout((3, 7, 7, 5), channel_axis=-1),
    Layout((3, 7, 5), channel_axis=-1),
    Layout((5, 40), channel_axis=0),
    Layout((7, 5, 40), channel_axis=0),
    Layout((3, 4, 5, 6), channel_axis=2),
    Layout((3, 17, 5, 7), memory=NHWC_AS_NCHW),
    Layout((5, 33), memory=(1, 0)),
    Layout((3, 7, 5, 17), channel_axis=-1, memory=(0, 3, 1, 2)),
    Layout((4, 5, 6), memory=(2, 1, 0)),
    Layout((4, 5, 6), memory=(1, 2, 0)),
)


@st.composite
def layouts(draw, max_size=20_000, min_values=2):
    """Any layout of rank 2 to 5, any axis and memory order; `min_values` values a channel or more."""
    rank = draw(st.integers(2, 5))
    shape = [1] * rank
    room = max_size
    for axis in draw(st.permutations(range(rank))):
        shape[axis] = draw(
            st.one_of(st.integers(1, 9), st.sampled_from(EDGES)).filter(lambda n, room=room: n <= room)
        )
        room //= shape[axis]
    axis = draw(st.integers(-rank, rank - 1))
    if np.prod(shape) < min_values * shape[axis]:
        shape[(axis + 1) % rank] = min_values
    memory = draw(st.one_of(st.none(), st.permutations(range(rank)).map(tuple)))
    return Layout(tuple(shape), axis, memory)


def parameters(rng, channels):
    """mean, var, gamma, beta: float64, (channels,), of ordinary size."""
    return (
        rng.normal(0, 3, channels),
        rng.uniform(0.1, 4, channels),
        rng.normal(1, 0.5, channels),
        rng.normal(0, 2, channels),
    )


def strides(a):
    """The strides that matter: of axes with more than one element."""
    return tuple(s for s, n in zip(a.strides, a.shape, strict=True) if n > 1)


def bits(a):
    """The bytes of `a` in the order of its shape, every NaN made the same one (payloads are not promised)."""
    a = np.array(a, order="C")
    a[np.isnan(a)] = np.nan
    return a.tobytes()


def moments_bits(m):
    return bits(m.count), bits(m.mean), bits(m.m2)
