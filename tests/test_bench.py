"""The benchmarks run, compare answers before they time, and say who is absent; no figure is judged here."""

import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import rows, timing
from bench.case import TOLERANCE, Case

TESTS = Path(__file__).parent
SMALL = [
    rows.Row((4, 6, 5, 5)),
    rows.Row((4, 5, 5, 6), -1),
    rows.Row((40, 6)),
    *(rows.Row((4, 6, 5, 5), 1, dtype) for dtype in rows.DTYPES if dtype != "float32"),
]


@pytest.mark.parametrize("row", SMALL, ids=lambda row: row.name)
def test_installed_peers_give_our_answer(row):
    """Only peers that the tests install anyway; the others are checked when they are timed."""
    case = Case.of(row)
    case.answer_all()
    seen = 0
    for name in ("numpy", "onnxruntime", "sklearn"):
        module = __import__(f"bench.peers.{name}", fromlist=[name])
        for direction, call in module.calls(case, 1).items():
            answer = getattr(call, "finished", lambda y: y)(call())
            assert case.difference(direction, answer) <= TOLERANCE[row.dtype], (name, direction)
            seen += 1
    assert seen == {"float32": 5, "float64": 5}.get(row.dtype, 0) + 2 * (len(row.shape) == 2)


def test_a_wrong_answer_would_be_seen():
    case = Case.of(rows.Row((40, 6)))
    case.answer_all()
    for direction, wanted in case.wanted.items():
        assert case.difference(direction, wanted) == 0
        assert case.difference(direction, wanted + 0.1 * abs(wanted).max()) > TOLERANCE["float32"]


def test_a_run_writes_what_it_printed(tmp_path):
    """The whole command on its smallest rows, as `make bench ONLY=...` runs it."""
    for only, special in (("NC 128x1024", False), ("call overhead", True)):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "bench",
                "--only",
                only,
                "--rounds",
                "1",
                "--threads",
                "1",
                "--output",
                tmp_path,
            ],
            env={**os.environ, "PYTHONPATH": str(TESTS)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        written = json.loads((tmp_path / "bench.json").read_text())
        lines = written["special" if special else "rows"]
        assert {line["pass"] for line in lines} >= {"forward", "inference"}
        for line in lines:
            ours = format(line["ms"]["ours"], ".3g" if special else ".3f")
            assert ours in (tmp_path / "bench.md").read_text()
            assert line["row"] in done.stdout
    assert (tmp_path / "bench.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("interpreter", "why"),
    [(sys.executable, "no PyTorch here"), ("false", "ended with status 1"), ("no-such", "No such file")],
)
def test_an_interpreter_without_pytorch_is_an_absent_peer(interpreter, why, tmp_path):
    """A module stands in front of PyTorch, if that is installed."""
    (tmp_path / "torch.py").write_text("raise ImportError('no PyTorch here')\n")
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(TESTS)]), "BENCH_TORCH": interpreter}
    told = "from bench import peers; import json; print(json.dumps(peers.installed()[1]))"
    done = subprocess.run(
        [sys.executable, "-c", told], env=os.environ | env, capture_output=True, text=True, check=True
    )
    absent = json.loads(done.stdout)["PyTorch"]
    assert absent.startswith(f"{interpreter}: ")
    assert why in absent


def test_without_the_variable_pytorch_is_absent(monkeypatch):
    monkeypatch.delenv("BENCH_TORCH", raising=False)
    monkeypatch.delitem(sys.modules, "bench.peers.torch", raising=False)
    with pytest.raises(ImportError, match="BENCH_TORCH"):
        importlib.import_module("bench.peers.torch")


def test_rows_that_goals_and_stand_ins_name_exist():
    names = {row.name for row in rows.ROWS}
    assert len(names) == len(rows.ROWS) == 10 + 9 + 6
    assert {name for known in rows.STAND_INS.values() for name, _ in known} <= names
    assert {len(rows.goals(row, p)) for row in rows.ROWS for p in rows.DIRECTIONS} == {1, 2}


def test_medians_are_interleaved_and_batched():
    seen = []
    times = timing.medians({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3)
    assert {name: median.rounds for name, median in times.items()} == {"a": 3, "b": 3}
    assert all(median.ms > 0 for median in times.values())
    changes = sum(x != y for x, y in itertools.pairwise(seen))
    assert changes >= 3


def test_a_call_that_times_itself_is_asked_for_its_time():
    numbers = []

    def call():
        pass

    def timed(number):
        numbers.append(number)
        return timing.BATCH / 4

    call.timed = timed
    assert timing.medians({"itself": call}, 3)["itself"] == (timing.BATCH / 4 * 1e3, 3)
    assert numbers == [1, 4, 4, 4]
