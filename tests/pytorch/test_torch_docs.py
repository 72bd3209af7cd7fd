"""The code of pages and docstrings that needs PyTorch is run, and the page names all that is public."""

import doctest
import importlib
import pkgutil
import re

import pytest

import batchnorm.torch
from test_docs import ROOT, blocks

BLOCKS = blocks(torch=True)


@pytest.mark.parametrize("block", BLOCKS)
def test_code_of_a_page_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "page", "exec"), {"__name__": "page"})


def test_pages_have_code():
    assert len(BLOCKS) >= 3


def test_docstring_examples_run():
    package = batchnorm.torch
    names = [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    results = [doctest.testmod(importlib.import_module(name)) for name in [package.__name__, *names]]
    assert len(results) > 3
    assert sum(result.failed for result in results) == 0


@pytest.mark.parametrize("name", batchnorm.torch.__all__)
def test_everything_public_is_documented_and_on_the_page(name):
    thing = getattr(batchnorm.torch, name)
    members = [m for m in vars(thing) if not m.startswith("_")] if isinstance(thing, type) else []
    undocumented = [m for m in members if callable(getattr(thing, m)) and not getattr(thing, m).__doc__]
    assert (thing.__doc__ or "").strip()
    assert undocumented == []
    assert re.search(rf"`{name}\b", (ROOT / "docs" / "pytorch.md").read_text())
