"""The benchmark of whitening runs, and writes what it printed; no figure is judged here."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bench import timing
from bench.page import END
from bench.process import STATUS, Process
from bench_whitening import costs, peers, rows, tables
from bench_whitening.__main__ import arguments

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def two_processors(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The whole command with few channels: what it printed, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("bench")
    options = ["--most", "64", "--rounds", "1", "--threads", "1", "--output", folder]
    done = subprocess.run(
        [sys.executable, "-m", "bench_whitening", *options],
        env={**os.environ, "PYTHONPATH": str(TESTS), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_a_run_writes_what_it_printed(run):
    printed, folder = run
    written = json.loads((folder / "bench-whitening.json").read_text())
    text = (folder / "bench-whitening.md").read_text()
    assert [(line["size"], line["pass"]) for line in written["costs"]] == [
        (size, direction) for size in (16, 32, 64) for direction in rows.PASSES
    ]
    for line in written["costs"]:
        assert set(line["ms"]) == set(line["rounds"]) == set(rows.CONTENDERS)
        assert all(ms > 0 for ms in line["ms"].values())
        assert line["steps"] > 5
        for cell in tables.times(line)[2:]:
            assert cell in printed
            assert cell in text
    assert [(record["pass"], set(record["ms"])) for record in written["peers"]] == [
        ("zca", {"ours", "NumPy"}),
        ("pca", {"ours", "scikit-learn"}),
    ]
    for record in written["peers"]:
        assert f"ours {record['ms']['ours']:.3g}" in text
        assert record["reached"] == (record["ratio"] <= 1)
    assert f"reached in {sum(record['reached'] for record in written['peers'])} of 2" in printed
    assert (folder / "bench-whitening.png").stat().st_size > 10_000


@pytest.mark.skipif(not STATUS.exists(), reason="the system doesn't tell")
def test_memory_is_that_of_the_method(run):
    """It never falls from the forward pass to the backward pass, and the iteration keeps its steps."""
    lines = json.loads((run[1] / "bench-whitening.json").read_text())["costs"]
    by_pass = {(line["size"], line["pass"]): line["added_mib"] for line in lines}
    for (size, direction), added in by_pass.items():
        assert set(added) == set(rows.CONTENDERS)
        assert all(0 <= mib < 32 for mib in added.values())
        if direction == rows.BACKWARD:
            assert all(added[name] >= mib for name, mib in by_pass[size, rows.FORWARD].items())
    # Two matrices for each step.
    kept = lines[-1]["steps"] * 2 * 64 * 64 * 8 / 2**20
    assert by_pass[64, rows.BACKWARD]["iterative"] > kept / 2


def test_a_report_fills_a_page_and_draws_beside_it(run, tmp_path):
    results = json.loads((run[1] / "bench-whitening.json").read_text())
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.MARK}\nold\n{END}after\n")
    tables.report(results, tmp_path / "output", page, Console(width=200, file=io.StringIO()))
    text = (tmp_path / "output" / "bench-whitening.md").read_text()
    assert page.read_text() == f"before\n{tables.MARK}\n{text}\n{END}after\n"
    assert 10_000 < (tmp_path / "figures" / "whitening.png").stat().st_size < 150_000


def test_the_page_has_a_place_for_the_tables():
    text = (TESTS.parent / "docs" / "whitening.md").read_text()
    assert text.count(tables.MARK) == 1
    assert f"]({tables.FIGURE})" in text
    assert (TESTS.parent / "docs" / tables.FIGURE).stat().st_size < 150_000


@pytest.mark.parametrize(
    ("given", "page"),
    [
        ([], Path("page.md")),
        (["--rounds", "20"], Path("page.md")),
        (["--rounds", "3"], None),
        (["--most", "1024"], None),
        (["--threads", "1"], None),
    ],
    ids=str,
)
def test_only_a_whole_run_writes_the_page(given, page):
    assert arguments([*given, "page.md"]).page == page


@pytest.mark.parametrize("method", peers.PAIRS)
def test_peers_give_our_answer(method):
    """NumPy's is ours; scikit-learn's has other signs, and divides by the number of rows less one."""
    x = costs.correlated(200, 5, np.float64)
    mine, theirs = (whiten(x) for whiten in peers.PAIRS[method].values())
    if method == "pca":
        theirs *= np.sign((mine * theirs).sum(0)) * np.sqrt(200 / 199)
    np.testing.assert_allclose(mine, theirs, atol=1e-10)


def test_an_answer_that_is_not_white_is_not_timed(monkeypatch):
    monkeypatch.setitem(peers.PAIRS, "zca", {"ours": peers.ours("zca"), "NumPy": lambda x: x - x.mean(0)})
    with pytest.raises(peers.DifferentError, match="D = 8: the covariance by NumPy is off by"):
        peers.compare(8, 1, lambda what: None)


def test_the_values_have_the_condition_that_they_are_said_to_have():
    values = np.linalg.eigvalsh(np.cov(costs.correlated(20_000, 40, np.float64), rowvar=False))
    assert 7 < values[-1] / values[0] < 11


def test_a_call_that_takes_longer_than_the_budget_is_made_once():
    made = []

    def call(name, seconds):
        def timed(number):
            made.append(name)
            return seconds

        def cold():
            timed(1)
            now[0] += seconds

        cold.timed = timed
        return cold

    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.time, "perf_counter", lambda: now[0])
        calls = {"long": call("long", 11.0), "middle": call("middle", 4.0), "short": call("short", 1.0)}
        times = timing.medians(calls, 9, budget=10.0)
    assert times == {"long": (11_000, 1), "middle": (4_000, 3), "short": (1_000, 9)}
    assert [made.count(name) for name in calls] == [1, 3 + 2, 9 + 2]


def test_an_error_in_a_process_is_handed_on():
    there = Process("D = 16: zca", costs.Passes, "zca", 16, 1)
    try:
        with pytest.raises(RuntimeError, match="D = 16: zca: KeyError"):
            there.ask("timed", "sideways", 1)
        assert there.ask("steps") is None
    finally:
        there.close()
    assert there.process.exitcode == 0
