"""The benchmark of folding runs, and writes what it printed; no figure is judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from batchnorm.onnx import fold
from bench.page import END, put_in
from bench_fold.__main__ import KINDS, LEVELS, MARK, ROUNDS, arguments, nodes_run
from onnx_models import real_graph

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def two_processors(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


def test_a_part_of_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARK}{END}after\n")
    options = ["--only", "shufflenet", "--rounds", "1", "--threads", "1", "--output", tmp_path, page]
    done = subprocess.run(
        [sys.executable, "-m", "bench_fold", *options],
        env={**os.environ, "PYTHONPATH": str(TESTS), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    results = json.loads((tmp_path / "bench-fold.json").read_text())
    assert [line["optimizations"] for line in results["lines"]] == list(LEVELS)
    assert {line["folded"] for line in results["lines"]} == {49}
    assert all(line["ms"].keys() == set(KINDS) and min(line["ms"].values()) > 0 for line in results["lines"])
    assert page.read_text() == f"before\n{MARK}{END}after\n"  # only a whole run is put in a page
    text = (tmp_path / "bench-fold.md").read_text()
    assert text.count("| shufflenet |") == 2
    assert done.stdout.count("shufflenet") == 2
    put_in(page, MARK, text)
    assert text in page.read_text()


def test_only_a_whole_run_goes_into_a_page():
    assert str(arguments(["page.md"]).page) == "page.md"
    for part in (["--only", "resnet50"], ["--rounds", str(ROUNDS - 1)], ["--threads", "1"]):
        assert arguments([*part, "page.md"]).page is None


def test_the_page_has_a_place_for_it():
    page = (TESTS.parent / "docs" / "folding.md").read_text()
    assert page.count(MARK) == page.count(END) == 1


def test_nodes_that_onnx_runtime_runs():
    """With its optimizations on, those of the original and of the folded model are the same."""
    model = real_graph("shufflenet")
    folded, _ = fold(model, verify=False)
    off, on, folded_off, folded_on = (
        nodes_run(m, optimize) for m in (model, folded) for optimize in (False, True)
    )
    assert off - folded_off == {"BatchNormalization": 49}
    assert on == folded_on
    assert on["BatchNormalization"] == 0
