"""Which goals of a row are reached, from the seconds of its rounds."""

from __future__ import annotations

import statistics
from typing import Any

from bench_network.rows import ADDED, MEMORY_PEAK, REST, goals

YES, NO, UNDECIDED = "yes", "NO", "undecided"


def ratio(upper: list[float], lower: list[float]) -> dict[str, float]:
    """Median and quartiles of the quotients of rounds."""
    quotients = [a / b for a, b in zip(upper, lower, strict=True)]
    if len(quotients) == 1:
        return dict.fromkeys(("median", "low", "high"), quotients[0])
    low, median, high = statistics.quantiles(quotients, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def added(line: dict[str, Any], variant: str) -> list[float]:
    """Seconds that a variant takes beyond the rest, of each round."""
    return [a - b for a, b in zip(line["seconds"][variant], line["seconds"][REST], strict=True)]


def verdict(found: dict[str, float], limit: float) -> str:
    """Whether a goal is reached: undecided where the middle half of the rounds lies on both sides of it."""
    if found["low"] <= limit <= found["high"]:
        return UNDECIDED
    return YES if found["median"] <= limit else NO


def buried(lower: list[float]) -> bool:
    """Whether what quotients are taken over is lost in noise: not above nothing in a quarter of the rounds.

    Such a quotient has the wrong sign, so it would count for us the more, the more we add.
    """
    return 4 * sum(seconds <= 0 for seconds in lower) >= len(lower)


def judged(line: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals of a line whose variants were measured, with what was found."""
    made = []
    for goal in goals(line["pass"]):
        if goal.what == MEMORY_PEAK:
            peaks = line.get("peak_mib", {})
            if goal.variant not in peaks:
                continue
            found = ratio([peaks[goal.variant]], [peaks[goal.against]])
            reached = YES if found["median"] <= goal.limit else NO
        elif not {goal.variant, goal.against} <= set(line["seconds"]):
            continue
        else:
            of = added if goal.what == ADDED else lambda line, variant: line["seconds"][variant]
            lower = of(line, goal.against)
            found = ratio(of(line, goal.variant), lower)
            reached = UNDECIDED if buried(lower) else verdict(found, goal.limit)
        made.append(goal._asdict() | found | {"reached": reached})
    return made
