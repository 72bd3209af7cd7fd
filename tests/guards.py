"""Every function of the core on memory that ends, or begins, at a guard page; run by test_guards.py.

Reading or writing one byte too far ends this process; writing on the open side spoils a pattern. Prints how
many calls it made.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import sys

import ml_dtypes  # noqa: F401 (names bfloat16 for np.dtype)
import numpy as np

import batchnorm as bn

PAGE = mmap.PAGESIZE
PROT_NONE = 0
PATTERN = 0xA5
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Guarded:
    """Memory for an array between two guard pages."""

    def __init__(self, capacity: int):
        self.room = -(-capacity // PAGE) * PAGE
        self.map = mmap.mmap(-1, self.room + 2 * PAGE)
        self.bytes = np.frombuffer(self.map, np.uint8)[PAGE : PAGE + self.room]
        for address in (self.bytes.ctypes.data - PAGE, self.bytes.ctypes.data + self.room):
            if LIBC.mprotect(address, PAGE, PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")

    def place(self, values: np.ndarray, *, at_end: bool) -> np.ndarray:
        """A copy of `values` next to one of the pages, the rest of the room filled with the pattern."""
        start = self.room - values.nbytes if at_end else 0
        self.used = slice(start, start + values.nbytes)
        self.bytes[:] = PATTERN
        array = self.bytes[self.used].view(values.dtype).reshape(values.shape)
        array[...] = values
        return array

    def is_whole(self) -> bool:
        """Whether nothing was written beside the array."""
        return bool((self.bytes[: self.used.start] == PATTERN).all()) and bool(
            (self.bytes[self.used.stop :] == PATTERN).all()
        )


class Run:
    """Calls every function on guarded copies, and compares the bits with those on ordinary memory."""

    def __init__(self, dtype: str, capacity: int):
        self.dtype = np.dtype(dtype)
        self.rooms = [Guarded(int(capacity) * self.dtype.itemsize) for _ in range(3)]
        self.calls = 0

    def check(self, shape: tuple[int, ...]) -> None:
        rng = np.random.default_rng(0)
        x, dy = (np.resize(a.astype(self.dtype), shape) for a in rng.normal(1, 2, (2, 99_991)))
        channels, count = shape[1], x.size // shape[1]
        gamma, beta, mean, var = rng.uniform(0.5, 2, (4, channels))

        def infer(x, dy, out):
            return (bn.infer(x, mean, var, gamma, beta, out=out),)

        def infer_backward(x, dy, out):
            return bn.infer_backward(dy, x, mean, var, gamma, out=out)

        def train(x, dy, out):
            y, cache = bn.train_forward(x, gamma, beta, out=out)
            return y, cache.mean, cache.invstd

        def backward(x, dy, out):
            _, cache = bn.train_forward(x, gamma, beta)
            return bn.backward(dy, cache, out=out)

        verbs = [(infer, "x"), (infer_backward, "dy")]
        if count > 1:
            verbs += [(train, "x"), (backward, "dy")]
        for verb, over in verbs:
            wanted = [a.tobytes() for a in verb(x, dy, None)]
            for at_end in (False, True):
                for target in ("out", over):
                    places = [
                        room.place(a, at_end=at_end) for room, a in zip(self.rooms, (x, dy, x), strict=True)
                    ]
                    out = {"out": places[2], "x": places[0], "dy": places[1]}[target]
                    got = [a.tobytes() for a in verb(*places[:2], out)]
                    where = f"{verb.__name__} {shape} {self.dtype} at_end={at_end} over {target}"
                    if got != wanted:
                        raise SystemExit(f"other bits: {where}")
                    if not all(room.is_whole() for room in self.rooms):
                        raise SystemExit(f"wrote beside the array: {where}")
                    self.calls += 1


def small(dtype: str) -> Run:
    """Lengths 0 to twice the widest register and one more, and about blocks: of channels, runs and rows."""
    longest = 2 * 64 // np.dtype(dtype).itemsize + 1
    lengths = [*range(longest + 1), *(n + d for n in (128, 256, 1024, 4096) for d in (-1, 0, 1))]
    run = Run(dtype, 20_000)
    for n in lengths:
        for shape in ((1, n), (3, n), (1, 1, n), (2, 3, n), (n, 1), (n, 2)):
            if shape[1] and np.prod(shape) <= 20_000 and (np.prod(shape) or shape[0] == 0):
                run.check(shape)
    return run


def large(dtype: str, nbytes: int) -> Run:
    """Odd lengths and widths of `nbytes` or a little more, which are written with non-temporal stores."""
    elements = -(-nbytes // np.dtype(dtype).itemsize)
    rows = ((67,), (64,), (5, 49), (3, 4099))
    shapes = [(-(-elements // int(np.prod(row))), *row) for row in rows]
    run = Run(dtype, max(map(np.prod, shapes)))
    for shape in shapes:
        run.check(shape)
    return run


if __name__ == "__main__":
    faulthandler.enable()
    dtype, level, *nbytes = sys.argv[1:]
    bn.set_simd_level(level)
    print((large(dtype, int(nbytes[0])) if nbytes else small(dtype)).calls)
