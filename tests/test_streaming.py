"""Large outputs are written with non-temporal stores, and have the bits of parts too small for these."""

import re
from pathlib import Path

import numpy as np
import pytest

import batchnorm as bn

VIEW = (Path(__file__).parents[1] / "rust/batchnorm/src/view.rs").read_text()


def last_level_cache():
    """Bytes, as the core finds them; 32 MiB where the system does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max(
        (int(text[:-1]) * units[text[-1]] for text in (p.read_text().strip() for p in sizes)),
        default=32 << 20,
    )


SHARE = int(re.search(r"const STREAM_FROM: usize = (\d+);", VIEW)[1])
FROM = last_level_cache() // SHARE
GUARD = 64

# Shape of a row, channel axis: widths on either side of lines and steps, both families, strips of a row.
ROWS = [
    ((3,), 1),
    ((64,), 1),
    ((67,), 1),
    ((5003,), 1),
    ((5, 4), 1),
    ((17, 7, 7), 1),
    ((3, 70, 61), 1),
    ((9, 33), -1),
]


def shifted(values, shift):
    """A copy `shift` bytes off where it was aligned, and all of its memory, with guard zones around."""
    memory = np.full(values.nbytes + 2 * GUARD + shift, 0xA5, np.uint8)
    place = memory[GUARD + shift : GUARD + shift + values.nbytes].view(values.dtype).reshape(values.shape)
    place[...] = values
    return place, memory


def guards_are_whole(memory, shift):
    return (memory[: GUARD + shift] == 0xA5).all() and (memory[-GUARD:] == 0xA5).all()


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize(("row", "axis"), ROWS, ids=str)
def test_the_bits_are_those_of_parts(row, axis, dtype):
    item = np.dtype(dtype).itemsize
    rows = FROM // (item * int(np.prod(row))) + 3
    rng = np.random.default_rng(0)
    noise = rng.normal(1, 2, (2, 61, *row)).astype(dtype)
    x, dy = (np.resize(part, (rows, *row)) for part in noise)
    assert x.nbytes >= FROM
    parts = np.array_split(np.arange(rows), 3)
    assert max(x[part].nbytes for part in parts) < FROM

    whole = bn.moments(x, channel_axis=axis)
    gamma, beta = rng.normal(size=(2, whole.channels))
    options = {"channel_axis": axis}
    y, cache = bn.train_forward(x, gamma, beta, **options)
    sums = bn.gradient_sums(dy, cache)
    for part in parts:
        wanted, _ = bn.normalize(x[part], whole, gamma, beta, **options)
        assert wanted.tobytes() == y[part].tobytes()
    wanted = np.concatenate(
        [bn.gradient_apply(dy[p], bn.normalize(x[p], whole, gamma, beta, **options)[1], sums) for p in parts]
    )
    assert bn.backward(dy, cache).dx.tobytes() == wanted.tobytes()

    for shift in (0, item, 1):
        source, _ = shifted(x, shift)
        out, memory = shifted(np.zeros_like(x), shift)
        assert bn.train_forward(source, gamma, beta, out=out, **options)[0].tobytes() == y.tobytes()
        assert guards_are_whole(memory, shift)
        assert bn.backward(dy, cache, out=out).dx.tobytes() == wanted.tobytes()
        assert guards_are_whole(memory, shift)
        assert bn.train_forward(source, gamma, beta, out=source, **options)[0].tobytes() == y.tobytes()
