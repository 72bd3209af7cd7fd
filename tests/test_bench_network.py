"""The benchmark of networks judges, chooses and writes as it says; what needs PyTorch is in tests/pytorch."""

import io
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from bench.page import END, put_in
from bench_network import rows, tables
from bench_network.arguments import arguments
from bench_network.rows import (
    ADDED,
    COMPILED,
    EAGER,
    EVAL,
    FUSED,
    FUSED_COMPILED,
    MEMORY_PEAK,
    OURS,
    PYTORCH,
    REST,
    ROUNDS,
    ROWS,
    STEP,
    VARIANTS,
    WHOLE,
    Row,
)
from bench_network.verdicts import NO, UNDECIDED, YES, buried, judged, ratio, verdict

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "pytorch.md"


@pytest.fixture(autouse=True)
def two_processors(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


def line(direction=STEP, peaks=None, row="a network", **seconds):
    """A line of `measure`, whose variants are named by words: `ours_fused=[...]`."""
    names = {name.lower().replace(" ", "_"): name for name in VARIANTS}
    made = {"row": row, "pass": direction, "seconds": {names[name]: s for name, s in seconds.items()}}
    if direction == STEP:
        measured = [name for name in EAGER if name in made["seconds"]]
        made["operators"] = {name: {"batch norm": 3.0, "ReLU": 2.0, "addition": 1.0} for name in measured}
        made["peak_mib"] = {PYTORCH: 1000.0, OURS: 1000.0, FUSED: 900.0} if peaks is None else peaks
    return made


def found(goals):
    return {(goal["what"], goal["variant"]): (goal["median"], goal["reached"]) for goal in goals}


def test_a_ratio_is_of_the_quotients_of_rounds():
    """The quotient of medians is 0.5 here, that of means 0.71: the machine slows down in the middle."""
    upper, lower = [1.0, 2.0, 30.0, 2.0, 1.0], [1.0, 4.0, 40.0, 2.0, 4.0]
    assert ratio(upper, lower) == {"median": 0.75, "low": 0.5, "high": 1.0}
    assert ratio([3.0], [4.0]) == {"median": 0.75, "low": 0.75, "high": 0.75}
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("low", "median", "high", "wanted"),
    [
        (0.8, 0.9, 1.0, YES),
        (0.8, 0.9, 1.02, UNDECIDED),
        (0.8, 1.1, 1.2, UNDECIDED),
        (1.02, 1.1, 1.2, UNDECIDED),
        (1.03, 1.1, 1.2, NO),
        (float("nan"), float("nan"), float("nan"), NO),
    ],
)
def test_a_verdict_wants_the_middle_half_on_one_side(low, median, high, wanted):
    assert verdict({"low": low, "median": median, "high": high}, 1.02) == wanted


def test_goals_are_judged_by_what_they_name():
    """Beyond the rest ours take 0.6 and fused 0.4 of PyTorch's; compiled is held against compiled."""
    made = line(
        pytorch=[20.0, 30.0],
        pytorch_compiled=[10.0, 20.0],
        ours=[16.0, 26.0],
        ours_fused=[14.0, 24.0],
        ours_fused_compiled=[12.0, 24.0],
        rest=[10.0, 20.0],
    )
    goals = found(judged(made))
    assert goals[ADDED, OURS] == (pytest.approx(0.6), YES)
    assert goals[ADDED, FUSED] == (pytest.approx(0.4), YES)
    assert goals[WHOLE, OURS] == (pytest.approx((16 / 20 + 26 / 30) / 2), YES)
    assert goals[WHOLE, FUSED] == (pytest.approx((14 / 20 + 24 / 30) / 2), YES)
    assert goals[WHOLE, FUSED_COMPILED] == (pytest.approx(1.2), NO)
    assert goals[MEMORY_PEAK, FUSED] == (pytest.approx(0.9), YES)
    assert len(goals) == len(rows.goals(STEP)) == 6

    worse = judged(made | {"peak_mib": {PYTORCH: 1000.0, FUSED: 1021.0}})
    assert found(worse)[MEMORY_PEAK, FUSED] == (pytest.approx(1.021), NO)
    equal = judged(made | {"peak_mib": {PYTORCH: 1000.0, FUSED: 1020.0}})
    assert found(equal)[MEMORY_PEAK, FUSED] == (pytest.approx(1.02), YES)


@pytest.mark.parametrize(("variant", "limit"), [(OURS, 0.65), (FUSED, 0.45)])
def test_what_is_added_has_its_limit(variant, limit):
    for over, wanted in ((-0.01, YES), (0.01, NO)):
        seconds = {PYTORCH: [20.0] * 4, REST: [10.0] * 4, variant: [10 * (1 + limit + over)] * 4}
        goals = judged({"row": "a network", "pass": STEP, "seconds": seconds, "peak_mib": {}})
        assert found(goals)[ADDED, variant] == (pytest.approx(limit + over), wanted)


def test_only_what_was_measured_is_judged():
    """A goal is left out where its variant, or what that is held against, is absent."""
    assert set(found(judged(line(EVAL, pytorch=[1.0], ours=[1.0], ours_fused=[2.0], rest=[0.5])))) == {
        (WHOLE, OURS),
        (WHOLE, FUSED),
    }
    assert set(found(judged(line(EVAL, pytorch=[1.0], ours_fused_compiled=[1.0], rest=[0.5])))) == set()
    some = judged(line(peaks={PYTORCH: 1.0}, pytorch=[2.0], ours=[2.0], rest=[1.0]))
    assert set(found(some)) == {(WHOLE, OURS), (ADDED, OURS)}


def test_what_noise_buries_is_undecided():
    """Where PyTorch's is below the rest, a quotient is the smaller the more we add, and means nothing."""
    small = {"pytorch": [9.0, 9.0, 9.0, 11.0], "rest": [10.0] * 4}
    goals = found(judged(line(**small, ours=[30.0] * 4, ours_fused=[13.0] * 4)))
    assert goals[ADDED, OURS][0] == -20
    assert goals[ADDED, OURS][1] == goals[ADDED, FUSED][1] == UNDECIDED
    assert goals[WHOLE, OURS][1] == NO
    assert [buried(lower) for lower in ([1.0] * 4, [1.0] * 4 + [-1.0], [1.0, 1.0, 1.0, 0.0])] == [
        False,
        False,
        True,
    ]


def test_a_page_keeps_what_stands_around_the_tables(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.MARK}\nold\n{END}after\n<!-- end -->\n")
    for text in ("new\n", "newer\n"):
        put_in(page, tables.MARK, text)
        assert page.read_text() == f"before\n{tables.MARK}\n{text}\n{END}after\n<!-- end -->\n"


@pytest.mark.parametrize("text", ["no marks\n", f"{tables.MARK}no end\n", f"{tables.MARK * 2}{END}"])
def test_a_page_without_its_marks_is_left_alone(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises((ValueError, IndexError)):
        put_in(page, tables.MARK, "new\n")
    assert page.read_text() == text


def asked(*names):
    return [word for name in names for word in ("--variant", name)]


@pytest.mark.parametrize(
    "given",
    [
        [],
        asked(OURS, FUSED),
        asked(FUSED, OURS),
        asked(COMPILED, OURS, FUSED, FUSED_COMPILED),
        ["--rounds", "16"],
    ],
    ids=" ".join,
)
def test_runs_that_write_the_page(given):
    args = arguments([*given, "page.md"])
    assert (args.page, args.stays) == (Path("page.md"), None)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (asked(OURS), "variants"),
        (asked(FUSED, FUSED), "variants"),
        (asked(COMPILED, FUSED_COMPILED), "variants"),
        (asked(COMPILED, OURS, FUSED), "variants"),
        (asked(OURS, FUSED, FUSED_COMPILED), "variants"),
        (["--rounds", str(ROUNDS - 1)], "rounds"),
        (["--only", "resnet"], "rows"),
        (["--quick"], "rows"),
    ],
    ids=str,
)
def test_runs_that_leave_the_page(given, why):
    args = arguments([*given, "page.md"])
    assert args.page is None
    assert why in args.stays


@pytest.mark.parametrize(
    ("settings", "page", "compiled"),
    [
        ([], "docs/pytorch.md", 2),
        (["EAGER=1"], "docs/pytorch.md", 0),
        (["EAGER=1", "ROUNDS=3"], None, 0),
        (["ONLY=resnet50"], None, 1),
        (["QUICK=1"], None, 2),
    ],
    ids=str,
)
def test_the_makefile_asks_for_sets_that_the_page_may_show(settings, page, compiled):
    """`make` only prints here what it would run."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("no make")
    printed = subprocess.run(
        [make, "-n", "bench-network", *settings],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (command,) = [c for c in printed.replace("\\\n", " ").splitlines() if "-m bench_network" in c]
    args = arguments(shlex.split(command.split("-m bench_network", 1)[1]))
    assert args.page == (page and Path(page))
    assert sum(COMPILED in row.variants(args.asked) for row in args.rows) == compiled


def test_a_row_has_the_variants_that_are_asked_for():
    """PyTorch's and the rest are always there, in one order; without a wish a row has its own."""
    plain, compiled = Row("a", 1, 1, seconds=10, compiling=100), Row("a", 1, 1, compiled=True, seconds=10)
    assert plain.variants(None) == (*EAGER, REST)
    assert compiled.variants(None) == VARIANTS
    assert plain.variants((FUSED_COMPILED, OURS)) == (PYTORCH, OURS, FUSED_COMPILED, REST)
    assert compiled.variants((OURS,)) == (PYTORCH, OURS, REST)
    assert [plain.takes(plain.variants(wish)) for wish in (None, (COMPILED,), VARIANTS)] == [10, 110, 110]


def test_rows():
    """Four networks in both memory formats, each compiled once; JSON carries rows to a process."""
    assert len({row.name for row in ROWS}) == len(ROWS) == 8
    assert sorted(row.memory for row in ROWS if row.compiled) == sorted(rows.MEMORY)
    assert [Row(*json.loads(json.dumps(row))) for row in ROWS] == ROWS
    assert not {row.name for row in rows.QUICK} & {row.name for row in ROWS}


@pytest.mark.parametrize(
    ("operator", "kinds"),
    [
        ("aten::native_batch_norm", ["batch norm"]),
        ("NativeBatchNormBackward0", ["batch norm"]),
        ("batchnorm::train", ["batch norm"]),
        ("aten::relu_", ["ReLU"]),
        ("aten::threshold_backward", ["ReLU"]),
        ("aten::hardtanh_", ["ReLU"]),
        ("aten::clamp_min", ["ReLU"]),
        ("aten::add", ["addition"]),
        ("aten::add_", ["addition"]),
        ("aten::addmm", []),
        ("aten::convolution", []),
    ],
)
def test_an_operator_counts_as_one_kind(operator, kinds):
    assert [kind for kind, name in rows.OPERATORS.items() if name.search(operator)] == kinds


def reported(lines, folder, page=None):
    """What `report` writes and prints of some lines."""
    results = {
        "machine": {"processor": "a processor", "threads": 2, "simd": "avx2"},
        "versions": {"batchnorm": "1"},
        "how": {"rounds": 3, "quick": False},
        "rows": lines,
    }
    console = Console(width=300, file=io.StringIO())
    assert tables.report(results, folder, page, console) == 0
    return (folder / "bench-network.md").read_text(), console.file.getvalue()


PLAIN = {
    "pytorch": [0.020, 0.030, 0.020],
    "ours": [0.016, 0.026, 0.016],
    "ours_fused": [0.014] * 3,
    "rest": [0.01] * 3,
}
WHOLE_ROW = PLAIN | {"pytorch_compiled": [0.5] * 3, "ours_fused_compiled": [0.4] * 3}


def test_a_report_of_rows_with_different_variants(tmp_path):
    """A variant that a row lacks is a dash; the tables, the files and the page are of one text."""
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    lines = [
        made
        for direction in (STEP, EVAL)
        for made in (line(direction, row="plain", **PLAIN), line(direction, row="whole", **WHOLE_ROW))
    ]
    text, printed = reported(lines, tmp_path, page)
    assert "| plain | step | 20 | – | 16 | 14 | – | 10 |\n" in text
    assert "| whole | step | 20 | 500 | 16 | 14 | 400 | 10 |\n" in text
    assert (
        "| whole | step | added to the rest | ours fused | PyTorch | 0.40 (0.30 to 0.40) | ≤ 0.45 | yes |\n"
        in text
    )
    assert "| plain | ours fused | 4 | 3.0 | 2.0 | 1.0 | 900 |\n" in text
    marks = "goals reached: 14 of 16; undecided, "
    assert marks in text
    assert marks in printed
    assert "0.40 (0.30 to 0.40)" in printed
    assert "a quarter of them: 2." in text
    assert "the compiled ones in these rows: whole." in text
    assert text in page.read_text()
    assert page.read_text().split(tables.MARK)[0] == PAGE.read_text().split(tables.MARK)[0]
    assert len(json.loads((tmp_path / "bench-network.json").read_text())["rows"][1]["goals"]) == 6
    assert (tmp_path / "bench-network.png").stat().st_size > 10_000


def test_a_report_says_which_set_it_shows(tmp_path):
    eager, _ = reported([line(**PLAIN)], tmp_path)
    assert (
        f"variants: those that are not compiled (EAGER=1), which are {PYTORCH}, {OURS}, {FUSED}, {REST}."
        in eager
    )
    some, _ = reported([line(pytorch=[1.0] * 3, ours=[1.0] * 3, rest=[0.5] * 3)], tmp_path)
    assert f"variants: only some, which are {PYTORCH}, {OURS}, {REST}." in some
    every, _ = reported([line(row=row, **WHOLE_ROW) for row in ("one", "other")], tmp_path)
    assert "the compiled ones in these rows: one, other." in every
