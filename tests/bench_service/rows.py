"""What is sent, what is to be reached, and what stands for Triton where it does not start: data alone."""

from __future__ import annotations

from typing import NamedTuple

OURS = "ours"
ROUTE = "FastAPI route"
ENDPOINT = "ASGI endpoint"
LISTS = "FastAPI, pydantic lists"
MODELLED = "the same with a response model"
MLSERVER = "MLServer"
TRITON = "Triton"
EMPTY = "empty ASGI endpoint"

RATE, P99, P50 = "requests/s", "p99", "p50"


class Goal(NamedTuple):
    """Our figure over that of `against` is at least `limit` for rates, at most `limit` for latencies."""

    against: str
    figure: str
    limit: float


class Row(NamedTuple):
    """One request, sent again and again on `connections`, and who answers it beside us."""

    shape: tuple[int, int]
    form: str
    connections: int
    peers: tuple[str, ...]
    goals: tuple[Goal, ...]

    @property
    def name(self) -> str:
        """As tables and `--only` name it."""
        lone = ", concurrency 1" if self.connections == 1 else ""
        return f"{self.shape[0]}x{self.shape[1]} {self.form}{lone}"


BINARY = (ROUTE, ENDPOINT, TRITON)
JSON = (ROUTE, LISTS, MODELLED, MLSERVER, TRITON)
SMALL = (Goal(ROUTE, RATE, 1.7), Goal(TRITON, RATE, 1.3), Goal(ROUTE, P99, 1), Goal(TRITON, P99, 1))

ROWS = [
    Row((1, 256), "binary", 16, BINARY, SMALL),
    Row((32, 256), "binary", 16, BINARY, SMALL),
    Row((64, 4096), "binary", 16, BINARY, (Goal(ROUTE, RATE, 1.6), Goal(TRITON, RATE, 1.25))),
    Row((1, 256), "JSON", 16, JSON, (Goal(ROUTE, RATE, 1.2), Goal(TRITON, RATE, 1), Goal(MLSERVER, RATE, 3))),
    Row(
        (32, 256),
        "JSON",
        16,
        JSON,
        (
            Goal(ROUTE, RATE, 1.8),
            Goal(TRITON, RATE, 1),
            Goal(MLSERVER, RATE, 3),
            Goal(LISTS, RATE, 15),
        ),
    ),
    Row((1, 256), "binary", 1, (EMPTY,), (Goal(EMPTY, P50, 1.5),)),
]

# Triton 2.51's rate over that of the plain route, measured side by side on another occasion; the middle of
# the range where the figures were single runs.
TRITON_OVER_ROUTE = {
    "1x256 binary": 4878 / 3713,
    "32x256 binary": 3942 / 3208,
    "64x4096 binary": 293 / 229,
    "1x256 JSON": 3450 / 3200,
    "32x256 JSON": 510 / 590,
}
