"""`make bench-service`, run for a second, and what it makes of what it measures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench_service.rows import OURS, P99, RATE, ROUTE, ROWS, TRITON, TRITON_OVER_ROUTE
from bench_service.tables import cells, judged

TESTS = Path(__file__).parents[1]
SMALL = ROWS[0]


@pytest.mark.long
@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_the_service_and_a_route_are_timed(tmp_path):
    command = [sys.executable, "-m", "bench_service", "--only", f"{SMALL.name}", "--peer", ROUTE]
    result = subprocess.run(
        [*command, "--rounds", "1", "--seconds", "1", "--output", tmp_path],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "bench-service.md").read_text().count(f"| {ROUTE} |") == 1
    assert (tmp_path / "bench-service.png").stat().st_size > 0
    (line,) = json.loads((tmp_path / "bench-service.json").read_text())["rows"]
    assert line["failing"] == {}
    assert {name: len(figures["rounds"]) for name, figures in line["figures"].items()} == {OURS: 1, ROUTE: 1}
    assert all(figures[RATE] > 0 and figures[P99] > 0 for figures in line["figures"].values())


def line(**figures):
    """A line of results; of each server its rate and p99."""
    named = {name: {RATE: rate, "p50": 1.0, P99: p99} for name, (rate, p99) in figures.items()}
    return {"row": SMALL.name, "figures": named, "failing": {}}


def test_goals_are_judged_by_rates_and_latencies():
    got = judged(line(**{OURS: (17.0, 2.0), ROUTE: (10.0, 3.0), TRITON: (14.0, 1.0)}), {})
    reached = {(goal["against"], goal["figure"]): goal["reached"] for goal in got["goals"]}
    assert reached == {
        (ROUTE, RATE): True,
        (TRITON, RATE): False,
        (ROUTE, P99): True,
        (TRITON, P99): False,
    }


def test_a_known_quotient_stands_for_triton_and_is_marked():
    got = judged(line(**{OURS: (17.0, 2.0), ROUTE: (10.0, 3.0)}), {TRITON: "does not start"})
    quotient = 1.7 / TRITON_OVER_ROUTE[SMALL.name]
    judgement = {(goal["against"], goal["figure"]): goal for goal in got["goals"]}
    assert judgement[TRITON, RATE]["ratio"] == pytest.approx(quotient)
    assert judgement[TRITON, P99]["reached"] is None
    assert f"{TRITON}*" in [cell[1] for cell in cells(got, {TRITON: "does not start"})]


def test_who_fails_is_neither_counted_nor_stood_in_for():
    failed = line(**{OURS: (17.0, 2.0), ROUTE: (10.0, 3.0)})
    failed["failing"] = {TRITON: "shape (0,)"}
    got = judged(failed, {})
    assert [goal["reached"] for goal in got["goals"] if goal["against"] == TRITON] == [None, None]
    assert [cell[2] for cell in cells(got, {}) if cell[1] == TRITON] == ["FAILS"]
