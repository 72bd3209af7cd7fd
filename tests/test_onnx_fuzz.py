"""Damaged and hostile ONNX models give a ValueError or OSError, and nothing outside their folder is read.

Each runs in a process of tests/onnx_fuzz.py, whose memory is limited to 1 GiB more than its imports take. A
failure there names seed and trial, by which it can be repeated.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from onnx_fuzz import VERBS, Outcome

PROGRAM = Path(__file__).parent / "onnx_fuzz.py"


def tried(capsys, *arguments):
    """What a run of the program counted, which is printed; it must have found nothing."""
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    with capsys.disabled():
        print(f"\n{' '.join(map(str, arguments))}: {found['counts']}")
    assert found["failures"] == []
    counts = found["counts"]
    assert counts["calls"] == len(VERBS) * counts["models"]
    assert counts["fine"] > 0
    assert counts["ValueError"] > 0
    return counts


def test_mutated_models(capsys):
    assert tried(capsys, 0, 400)["models"] > 550


@pytest.mark.long
def test_many_mutated_models(capsys):
    assert tried(capsys, 1, 3000)["models"] > 4000


def test_hostile_models(capsys):
    assert tried(capsys, "hostile", 2000)["models"] == 81


@pytest.mark.long
def test_large_hostile_models(capsys):
    """10 000 nodes within each other, 100 000 in a row."""
    assert tried(capsys, "hostile", 100_000)["models"] == 81


def test_files_outside_the_folder(capsys):
    counts = tried(capsys, "external")
    assert counts["models"] == 44
    assert counts["files opened"] == 44 * len(VERBS)  # the models themselves
    assert counts["FileNotFoundError"] > 0


# The guard sees what it is there for


def failures(verb, monkeypatch, folder=None):
    monkeypatch.setattr("onnx_fuzz.VERBS", {"verb": verb})
    outcome = Outcome()
    outcome.try_all("a model", b"", folder)
    return [problem for _, _, problem, *_ in outcome.failures]


def test_other_errors_are_failures(monkeypatch):
    def raises(error):
        def verb(model):
            raise error

        return verb

    assert failures(raises(ValueError("model: damaged")), monkeypatch) == []
    assert failures(raises(OSError("no file")), monkeypatch) == []
    assert failures(raises(ValueError()), monkeypatch) == ["ValueError without a message"]
    for error in (TypeError("x"), KeyError("x"), MemoryError("x"), RecursionError("x"), AssertionError("x")):
        assert failures(raises(error), monkeypatch) == [f"{type(error).__name__}: {error}"]


def test_files_that_are_opened_are_seen(monkeypatch, tmp_path):
    path, folder = tmp_path / "secret", tmp_path / "model"
    folder.mkdir()
    path.write_bytes(b"1")

    def verb(model):
        path.read_bytes()

    assert failures(verb, monkeypatch, folder) == failures(verb, monkeypatch) == [f"opened {path}"]
    assert failures(verb, monkeypatch, tmp_path) == []
    (folder / "link").symlink_to(path)
    assert failures(lambda model: (folder / "link").read_bytes(), monkeypatch, folder) == [
        f"opened {folder / 'link'}"
    ]
