"""What the benchmark makes of times: figures are given, none is measured."""

import io
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

import bench.__main__ as bench
from bench import check, page, rows, special, tables, verdicts

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
CELL = ("NHWC 32x56x56x256", "forward")


def line(ms, streaming=2.0, cell=CELL):
    return {"row": cell[0], "pass": cell[1], "ms": ms, "streaming_ms": streaming}


def judged(ms, absent=(), cell=CELL):
    return verdicts.judged(verdicts.merged([line(ms, cell=cell)]), absent)


def test_what_stands_for_an_absent_peer_is_marked():
    found = judged({"ours": 1.0, "floor": 1.0}, ["PyTorch"])
    assert found["best_peer"] == {
        "name": "PyTorch*",
        "ms": pytest.approx(5.2),
        "over_ours": pytest.approx(5.2),
    }
    assert found["goals"][1]["reached"] is True


def test_nothing_stands_for_a_peer_that_was_measured():
    found = judged({"ours": 1.0, "floor": 1.0, "PyTorch": 9.0}, ["JAX"])
    assert found["best_peer"] == {"name": "PyTorch", "ms": 9.0, "over_ours": 9.0}


def test_a_row_without_a_peer_is_not_ahead_of_one():
    found = judged({"ours": 1.0, "floor": 1.0})
    assert found["best_peer"] is None
    assert found["goals"][1]["reached"] is None
    assert verdicts.behind([found]) is None


@pytest.mark.parametrize(
    ("ours", "peer", "floor", "reached"),
    [
        (1.84, 1.76, 1.0, [True, True]),
        (1.86, 1.76, 1.0, [False, False]),
        (1.0, 0.951, 0.54, [False, True]),
        (1.0, 0.949, 0.55, [True, False]),
    ],
)
def test_goals_are_over_the_floor_and_beside_the_best_peer(ours, peer, floor, reached):
    found = judged({"ours": ours, "slow": 9.0, "fast": peer, "floor": floor})
    assert [goal["reached"] for goal in found["goals"]] == reached
    assert [goal["against"] for goal in found["goals"]] == [rows.FLOOR, rows.PEER]


def test_runs_give_medians_of_times_and_of_quotients_within_a_run():
    """A run in which the whole machine was slow changes no quotient."""
    runs = [
        line({"ours": 1.0, "floor": 0.5, "NumPy": 2.0}, 0.5),
        line({"ours": 9.0, "floor": 4.5, "NumPy": 18.0}, 4.5),
        line({"ours": 2.0, "floor": 1.0, "NumPy": 1.0}, 1.0),
    ]
    found = verdicts.merged(runs)
    assert found["ms"] == {"ours": 2.0, "floor": 1.0, "NumPy": 2.0}
    assert found["over_ours"] == {"ours": 1.0, "floor": 0.5, "NumPy": 2.0}
    assert (found["streaming_ms"], found["streaming_over_ours"]) == (1.0, 0.5)


def test_every_cell_below_the_limit_is_named():
    names = [row.name for row in rows.COMPARED]
    quotients = {
        names[0]: 0.949,
        names[1]: 0.5,
        names[2]: 0.95,
        names[3]: 0.999,
        names[4]: 1.0,
        names[-1]: 0.9,
    }
    lines = [
        judged({"ours": 1.0, "floor": 1.0, "X": quotient}, cell=(name, "inference"))
        for name, quotient in quotients.items()
    ]
    outside = judged({"ours": 1.0, "floor": 1.0, "X": 0.1}, cell=(rows.OTHER_DTYPES[0].name, "forward"))
    said = verdicts.behind([*lines, outside])
    assert said == (
        f"best peer / ours is below 0.95 in 3 of 6 cells: {names[1]} inference 0.500 (X), "
        f"{names[-1]} inference 0.900 (X), {names[0]} inference 0.949 (X); "
        "in 2 it is from 0.95 to below 1, which is called equal"
    )
    assert "in 0 of 1 cells; in 1" in verdicts.behind([lines[2]])


def test_special_records_have_a_limit_on_one_side():
    def reached(ratios, **options):
        made = [special.record("g", "r", "forward", {"ours": 1.0}, r, 1.5, **options) for r in ratios]
        return verdicts.judged_special(verdicts.merged(made))["reached"]

    assert reached([1.4]) is True
    assert reached([1.6]) is False
    assert reached([1.6], at_least=True) is True
    assert reached([1.4], at_least=True) is False
    assert reached([1.4, 9.0, 1.3]) is True
    assert reached([None]) is None


def test_special_times_are_shown_in_their_unit():
    made = special.record(
        "in cache", "r", "forward", {"ours": 0.5, "X": 0.25}, 2.0, 1.05, unit=(1e6 / 1e6, " ns an element")
    )
    cells = tables.special_cells(verdicts.judged_special(verdicts.merged([made])))
    assert cells[3:] == ["ours 0.5, X 0.25 ns an element", "2.00", "≤ 1.05", "NO"]


def test_the_check_fails_above_twice_the_goal_and_behind_numpy():
    def passing(ours, numpy=3.0, floors=(1.0, 1.2)):
        runs = [
            {"ours": t, check.NUMPY: numpy, "floor, regular": floors[0], "floor, streaming": floors[1]}
            for t in ours
        ]
        return [verdict.passes for verdict in check.verdicts(runs, [1.35])]

    assert passing([9.0, 2.69, 2.6]) == [True, True]
    assert passing([2.71, 2.71, 1.0]) == [False, True]
    assert passing([2.0, 2.0, 2.0], numpy=1.9) == [True, False]
    assert [verdict.against for verdict in check.verdicts([{"ours": 1.0, check.NUMPY: 2.0}], [])] == [
        check.NUMPY
    ]


def test_the_check_fails_only_what_fails_twice(monkeypatch):
    monkeypatch.setattr(check, "PAUSE", 0.0)

    def outcome(*ours):
        left = [[{"ours": t, check.NUMPY: 1.0}] * 3 for t in ours]
        made = check.judged(lambda: left.pop(0), [])
        return [verdict.passes for verdict in made], len(left)

    assert outcome(0.9, 2.0) == ([True], 1)
    assert outcome(2.0, 0.9) == ([True], 0)
    assert outcome(2.0, 1.1) == ([False], 0)


def test_the_check_compares_rows_with_every_goal_over_the_floor():
    limits = {goal for row in check.ROWS for p in rows.DIRECTIONS for goal in rows.goals(row, p)}
    floors = {goal for row in rows.ROWS for p in rows.DIRECTIONS for goal in rows.goals(row, p)}
    assert {goal for goal in limits if goal.against == rows.FLOOR} == {
        goal for goal in floors if goal.against == rows.FLOOR
    }


def test_only_what_is_between_the_marks_of_a_page_changes(tmp_path):
    path = tmp_path / "page.md"
    mark, other = tables.page_mark(2), tables.page_mark(1)
    path.write_text(f"before\n{other}old one\n{page.END}between\n{mark}old\n{page.END}after\n")
    page.put_in(path, mark, "new")
    assert path.read_text() == (f"before\n{other}old one\n{page.END}between\n{mark}\nnew\n{page.END}after\n")


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ([], True),
        (["--threads", "1", "--runs", "3"], True),
        (["--threads", "3"], False),
        (["--only", "NC"], False),
        (["--rounds", "30"], False),
        (["--pass", "forward"], False),
    ],
)
def test_only_a_whole_run_writes_the_page(options, written, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    monkeypatch.setattr(sys, "argv", ["bench", *options, str(PAGE)])
    assert bench.arguments().page == (PAGE if written else None)


def test_a_run_puts_into_the_page_what_it_printed(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{tables.page_mark(1)}{page.END}after\n")
    cell = line({"ours": 1.0, "floor": 0.6, "NumPy": 0.9}) | {
        "error_ulps": {"ours": 0.5},
        "wrong_answers": {},
    }
    slow = special.record("moments", "NC 3x4", "moments", {"ours": 1.0}, 1.5, 1.0)
    results = {
        "machine": {"processor": "Abacus", "threads": 1, "simd": "beads"},
        "versions": {"batchnorm": "9", "NumPy": "8"},
        "absent": {"JAX": "not here"},
        "how": {"rounds": 31, "runs": 3},
        "rows": [verdicts.merged([cell])],
        "special": [verdicts.merged([slow])],
    }
    assert tables.report(results, tmp_path, path, Console(file=io.StringIO())) == 0
    written = path.read_text()
    assert (tmp_path / "bench.md").read_text() in written
    for text in (
        "Abacus, 1 thread, beads; milliseconds, medians of 31 interleaved rounds, of which the medians of 3",
        "absent: JAX (not here).",
        f"in 1 of 1 cells: {CELL[0]} {CELL[1]} 0.900 (NumPy)",
        "| NumPy 0.900 | 0.90 | floor ≤ 1.85: yes, peer ≥ 0.95: NO | 0.50 |",
        "| moments | NC 3x4 | moments | ours 1 | 1.50 | ≤ 1 | NO |",
        "goals reached: 1 of 3",
    ):
        assert text in written


def test_the_documentation_has_a_place_for_one_thread_and_for_two():
    text = PAGE.read_text()
    for threads in (1, 2):
        after = text.split(tables.page_mark(threads))
        assert len(after) == 2
        assert page.END in after[1]
