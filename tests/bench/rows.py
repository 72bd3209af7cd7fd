"""What is timed, what is to be reached, and what stands for a peer that is not installed: data alone."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

FORWARD, INFERENCE, BACKWARD = DIRECTIONS = ("forward", "inference", "backward")
DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "float16")} | {
    "bfloat16": np.dtype(ml_dtypes.bfloat16)
}


class Row(NamedTuple):
    """A tensor that the three passes are timed on; `axis` is the channels', 1 or -1."""

    shape: tuple[int, ...]
    axis: int = 1
    dtype: str = "float32"
    group: str = "ResNet-50"

    @property
    def name(self) -> str:
        """As tables and `--only` name it."""
        order = {(2, 1): "NC", (4, 1): "NCHW", (4, -1): "NHWC"}.get((len(self.shape), self.axis), "NCL")
        kind = "" if self.dtype == "float32" else f" {self.dtype}"
        return f"{order} {'x'.join(map(str, self.shape))}{kind}"

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        return int(np.prod(self.shape)) * DTYPES[self.dtype].itemsize

    @property
    def planar(self) -> bool:
        """Whether the values of a channel lie in runs; else whole rows hold every channel once."""
        return self.axis == 1 and len(self.shape) > 2


BASELINE = [
    Row((32, 64, 112, 112), group="baseline"),
    Row((32, 256, 56, 56), group="baseline"),
    Row((32, 2048, 7, 7), group="baseline"),
    Row((64, 64, 32, 32), group="baseline"),
    Row((1, 64, 56, 56), group="baseline"),
    Row((32, 56, 56, 256), -1, group="baseline"),
    Row((64, 32, 32, 64), -1, group="baseline"),
    Row((128, 1024), group="baseline"),
    Row((4096, 512), group="baseline"),
    Row((200_000, 64), group="baseline"),
]
# Channels and width of the other tensors that ResNet-50 normalizes; 64x112, 256x56 and 2048x7 are above.
RESNET = [
    Row((32, channels, side, side))
    for channels, side in (
        (64, 56),
        (128, 56),
        (128, 28),
        (512, 28),
        (256, 28),
        (256, 14),
        (1024, 14),
        (512, 14),
        (512, 7),
    )
]
OTHER_DTYPES = [
    Row(shape, axis, dtype, group="dtypes")
    for dtype in ("float16", "bfloat16", "float64")
    for shape, axis in (((32, 256, 56, 56), 1), ((32, 56, 56, 256), -1))
]
COMPARED = BASELINE + RESNET  # with the best peer
ROWS = COMPARED + OTHER_DTYPES

# C = 64 with a large inner size, and what must not cost 1.3 times as much by the byte; all about 100 MB.
PER_BYTE_REFERENCE = {
    True: Row((32, 64, 112, 112), group="per byte"),
    False: Row((400_000, 64), group="per byte"),
}
PER_BYTE = [
    Row((32, 1, 896, 896), group="per byte"),
    Row((32, 3, 512, 512), group="per byte"),
    Row((200_000, 64, 2), group="per byte"),
    Row((100_000, 64, 4), group="per byte"),
    Row((8192, 64, 7, 7), group="per byte"),
    Row((8_400_000, 3), group="per byte"),
]

# x of 16 KiB to 12 MiB: what one and two threads are compared on.
THREADS = [
    Row((n, 64, side, side), group="threads") for n, side in ((1, 8), (4, 16), (4, 32), (32, 32), (48, 32))
]
THREADS += [Row((n, 64), group="threads") for n in (64, 1024, 4096, 32_768, 49_152)]

# Tensors that caches hold, timed on one thread.
IN_CACHE = [
    Row(shape, group="in cache")
    for shape in ((128, 256), (512, 256), (16, 96, 16, 16), (16, 576, 4, 4), (1, 64, 56, 56))
]

# Channels and width of what the batch norms of torchvision's mobilenet_v2 take from 128x128 images, in order.
MOBILENET_CHANNELS = [
    *((32, 64), (32, 64), (16, 64), (96, 64), (96, 32), (24, 32), (144, 32), (144, 32), (24, 32)),
    *((144, 32), (144, 16), (32, 16), *[(192, 16), (192, 16), (32, 16)] * 2),
    *((192, 16), (192, 8), (64, 8), *[(384, 8), (384, 8), (64, 8)] * 3),
    *((384, 8), (384, 8), (96, 8), *[(576, 8), (576, 8), (96, 8)] * 2),
    *((576, 8), (576, 4), (160, 4), *[(960, 4), (960, 4), (160, 4)] * 2),
    *((960, 4), (960, 4), (320, 4), (1280, 4)),
]
MOBILENET = [Row((16, channels, side, side), group="MobileNetV2") for channels, side in MOBILENET_CHANNELS]

# Fresh memory against `out=`.
FRESH = [
    Row((32, 64, 112, 112), group="fresh"),
    Row((64, 64, 32, 32), group="fresh"),
    Row((128, 1024), group="fresh"),
]


class Goal(NamedTuple):
    """Our time is at most `limit` times that of `against`."""

    against: str
    limit: float


FLOOR, PEER = "floor", "best peer"
LARGE = 50_000_000
HALF = ("float16", "bfloat16")
# The floor of the backward pass is that of reading two tensors and writing one.
# Not behind is where the best peer takes this share of our time or more; below 1 it is called equal.
EQUAL = 0.95
# Families beyond the caches: their goals over the floor.
PLANAR = {INFERENCE: 1.05, FORWARD: 1.35, BACKWARD: 1.35}
INTERLEAVED = {INFERENCE: 1.1, FORWARD: 1.85, BACKWARD: 1.85}
CALL_OVERHEAD = {INFERENCE: 6.0, FORWARD: 12.0}  # against np.add(x, b, out=out)
FROZEN_OVERHEAD = 4.0  # the same, of a frozen layer
MOMENTS_LIMIT = 0.85  # against the floor of the forward pass, which writes too
# Against copies of what all the layers read and write.
MOBILENET_LIMITS = {FORWARD: 2.0, BACKWARD: 1.8}
FRESH_LIMIT = 1.25  # against the time with out=
PER_BYTE_LIMIT = 1.3  # against the reference
# One thread's time over two threads', from so many bytes; never slower, of which noise may hide 5 %.
TWO_THREADS = ((8 << 20, 1.8), (1 << 20, 1.3), (0, 0.95))


def goals(row: Row, direction: str) -> list[Goal]:
    """What our time on a row is to be, against the floor and against the best peer."""
    if row.dtype in HALF:
        return [Goal(FLOOR, 1.3 if direction == INFERENCE else 2.0)]
    wanted = []
    if row.nbytes > LARGE:
        wanted.append(Goal(FLOOR, (PLANAR if row.planar else INTERLEAVED)[direction]))
    if row in COMPARED:
        wanted.append(Goal(PEER, 1 / EQUAL))
    return wanted


# What a peer took over a streaming copy of the same run, on a two-core AVX2 machine where it was installed,
# in the rows where it was the best; midpoints of what was measured. It stands for the peer where it's absent.
STAND_INS: dict[str, dict[tuple[str, str], float]] = {
    "PyTorch": {
        ("NCHW 32x64x112x112", FORWARD): 5.7,
        ("NCHW 32x64x112x112", INFERENCE): 1.15,
        ("NCHW 32x64x112x112", BACKWARD): 7.5,
        ("NCHW 32x256x56x56", FORWARD): 5.7,
        ("NCHW 32x256x56x56", INFERENCE): 1.15,
        ("NCHW 32x256x56x56", BACKWARD): 7.5,
        ("NCHW 32x2048x7x7", INFERENCE): 0.94 / 0.70,
        ("NCHW 32x2048x7x7", BACKWARD): 4.9 / 0.70,
        ("NCHW 64x64x32x32", INFERENCE): 1.1 / 1.31,
        ("NCHW 64x64x32x32", BACKWARD): 3.5 / 1.31,
        ("NHWC 32x56x56x256", FORWARD): 2.6,
        ("NHWC 32x56x56x256", INFERENCE): 1.26,
        ("NHWC 64x32x32x64", BACKWARD): 3.1 / 1.36,
    },
    "oneDNN": {
        ("NCHW 32x64x112x112", BACKWARD): 4.6,
        ("NCHW 32x256x56x56", BACKWARD): 4.6,
        ("NHWC 32x56x56x256", BACKWARD): 22.8 / 6.25,
        ("NHWC 64x32x32x64", FORWARD): 1.4 / 1.36,
        ("NHWC 64x32x32x64", INFERENCE): 0.74 / 1.36,
        ("NC 200000x64", FORWARD): 8.1 / 3.55,
        ("NC 200000x64", INFERENCE): 3.6 / 3.55,
        ("NC 200000x64", BACKWARD): 9.35 / 3.55,
    },
    "JAX": {
        ("NCHW 32x2048x7x7", FORWARD): 5.1 / 0.70,
        ("NCHW 64x64x32x32", FORWARD): 5.8 / 1.31,
    },
}
