"""Errors against extended precision, ours and the peers', which `make accuracy` prints; tests bound ours.

The reference is `oracle`: long double of 64 significant bits, pairwise sums, the mean corrected once.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import batchnorm as bn
import oracle
from cases import DTYPES

EPS = 1e-5
MEANS = (0.0, 1e2, 1e4, 1e6)
COUNTS = {2: 3000, 3: 2000, 100: 300, 8192: 6, 100_000: 2, 1_000_000: 1, 10_000_000: 1}  # values: channels
# What is measured: (mean, count, planar); of the largest counts, which take their time, less.
SETTINGS = [
    (mu, count, planar) for count in COUNTS if count < 1e6 for mu in MEANS for planar in (False, True)
]
LARGE = [(mu, 1_000_000, planar) for mu in (MEANS[0], MEANS[-1]) for planar in (False, True)]
LARGE += [(MEANS[-1], 10_000_000, False)]


class Error(NamedTuple):
    """The worst error of an output, in its unit, and as a share of what the contract allows."""

    units: float
    share: float


def sample(rng, shape, dtype, mu):
    """N(mu, 1), or wider where the dtype is so coarse at mu that no deviation would be left."""
    std = max(1.0, mu * float(np.ldexp(1.0, -{"float16": 8, "bfloat16": 5}.get(dtype.name, 60))))
    return (rng.standard_normal(shape) * std + mu).astype(dtype)


def mean_of(dtype, mu):
    """float16 ends at 65504: its largest mean is 3e4."""
    return min(mu, 3e4) if dtype.name == "float16" else mu


def shape_of(count, planar):
    """(rows, channels) or (rows, channels, inner) with `count` values in a channel."""
    channels = COUNTS[count]
    rows = math.gcd(count, 4)
    return (rows, channels, count // rows) if planar else (count, channels)


def errors(x, dy, gamma, beta, eps=EPS):
    """All that the core computes from x and dy, by name."""
    m = bn.moments(x)
    y, cache = bn.train_forward(x, gamma, beta, eps=eps)
    trained = oracle.forward(x, gamma, beta, eps)
    frozen = oracle.forward(x, gamma, beta, eps, population=(m.mean, m.var))
    inferred = bn.infer(x, m.mean, m.var, gamma, beta, eps=eps)
    result = {
        "y, training": (
            oracle.error_in_ulps(y, trained),
            oracle.share_of_bound(y, trained, trained=True),
        ),
        "y, inference": (
            oracle.error_in_ulps(inferred, frozen),
            oracle.share_of_bound(inferred, frozen, trained=False),
        ),
        "variance": variance_error(m, trained),
    } | oracle.gradient_errors(bn.backward(dy, cache), dy, trained, trained=True)
    return {name: Error(*error) for name, error in result.items()}


def variance_error(m, f):
    """Relative, in 2⁻⁵³, and as a share of 1e-15·(10 + |mean|/std), where σ² is in float64's range."""
    sigma2 = f.sigma2.ravel()
    some = sigma2 > 2.0**-969
    if not some.any():
        return 0.0, 0.0
    relative = abs(oracle.long(m.var[some]) - sigma2[some]) / sigma2[some]
    allowed = 1e-15 * (10 + abs(f.mu.ravel()[some]) / np.sqrt(sigma2[some]))
    return float(relative.max() * oracle.LONG(2) ** 53), float((relative / allowed).max())


def normal(rng, dtype, mu, count, planar):
    """Errors on normal values."""
    shape = shape_of(count, planar)
    x, dy = sample(rng, shape, dtype, mean_of(dtype, mu)), rng.standard_normal(shape).astype(dtype)
    gamma, beta = rng.normal(1, 0.5, shape[1]), rng.normal(0, 2, shape[1])
    return errors(x, dy, gamma, beta)


# Scales of x at the ends of each dtype: a few of the smallest numbers, and near where a difference overflows
# (in float64 a square).
TINY = {"float16": 2.0**-22, "bfloat16": 2.0**-131, "float32": 2.0**-145, "float64": 2.0**-1070}
HUGE = {"float16": 3e4, "bfloat16": 8e37, "float32": 1.6e38, "float64": 1e153}


def extreme(rng, dtype, scales):
    """Errors on values spread over ±scale."""
    shape = (500, 8)
    x = (rng.uniform(-1, 1, shape) * scales[dtype.name]).astype(dtype)
    gamma, beta = rng.normal(1, 0.5, 8), np.zeros(8)
    return errors(x, rng.standard_normal(shape).astype(dtype), gamma, beta)


def worst(results):
    """By name the largest units and the largest share."""
    names = results[0].keys()
    return {name: Error(*(max(r[name][k] for r in results) for k in range(2))) for name in names}


def table(heads, rows):
    return "".join(f"| {' | '.join(row)} |\n" for row in [heads, ["---"] * len(heads), *rows])


def ours():
    """Our errors: for each dtype and mean the worst over counts and families; at the ends of the range."""
    rng = np.random.default_rng(0)
    rows = []
    for dtype in DTYPES:
        lines = {}
        for mean in MEANS:
            counts = [normal(rng, dtype, *setting) for setting in SETTINGS + LARGE if setting[0] == mean]
            lines[f"mean {mean_of(dtype, mean):g}"] = worst(counts)
        lines["subnormal"] = extreme(rng, dtype, TINY)
        lines["near overflow"] = extreme(rng, dtype, HUGE)
        for what, line in lines.items():
            rows.append([dtype.name, what, *(f"{e.units:.3g} ({e.share:.2f})" for e in line.values())])
            print(".", end="", file=sys.stderr, flush=True)
    return table(["dtype", "x", *line], rows)


def compared():
    """The largest error of y with γ = 1, β = 0, ours and of each peer installed; float32, NC and NCHW."""
    from bench import peers
    from bench.case import Case
    from bench.rows import FORWARD, INFERENCE, Row

    installed, absent = peers.installed()
    rows = []
    for shape in ((8192, 64), (32, 64, 16, 16)):
        for mu in MEANS:
            case = Case.of(Row(shape))
            case.x[...] = sample(np.random.default_rng(1), shape, case.x.dtype, mu)
            case.gamma[...], case.beta[...], case.mean[...], case.var[...] = 1, 0, mu, 1
            calls = {"batchnorm": case.ours()}
            calls |= {name: peer.calls(case, 2) for name, peer in installed.items()}
            exact = {
                FORWARD: oracle.forward(case.x, case.gamma, case.beta, EPS),
                INFERENCE: oracle.forward(
                    case.x, case.gamma, case.beta, EPS, population=(case.mean, case.var)
                ),
            }
            for direction in (FORWARD, INFERENCE):
                cells = []
                for call in (of.get(direction) for of in calls.values()):
                    if call is None:
                        cells.append("–")
                        continue
                    y = getattr(call, "finished", lambda y: y)(call())
                    error = abs(oracle.long(np.asarray(y).reshape(shape)) - exact[direction].y).max()
                    cells.append(f"{float(error):.1e}")
                rows.append(["x".join(map(str, shape)), direction, f"{mu:g}", *cells])
            del exact
    versions = ", ".join(f"{name} {peer.version()}" for name, peer in installed.items())
    text = table(["shape", "pass", "mean", "batchnorm", *installed], rows)
    return f"{versions}.{' Absent: ' + ', '.join(absent) + '.' if absent else ''}\n\n{text}"


END = "<!-- end -->\n"


def main():
    """Prints both tables, and puts them into the page that is named, each after its mark."""
    tables = {"ours": ours(), "beside the peers": compared()}
    print("\n".join(tables.values()))
    for page in map(Path, sys.argv[1:]):
        text = page.read_text()
        for name, printed in tables.items():
            before, rest = text.split(f"<!-- printed by `make accuracy`: {name} -->\n")
            after = rest.split(END, 1)[1]
            text = f"{before}<!-- printed by `make accuracy`: {name} -->\n\n{printed}\n{END}{after}"
        page.write_text(text)


if __name__ == "__main__":
    main()
