"""The Python code of README, docs and docstrings is run; the files that they name exist.

What needs PyTorch is run by tests/pytorch/test_torch_docs.py.
"""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import batchnorm

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(*, torch):
    """The blocks that import PyTorch, or those that don't. Those of service.md want a running service."""
    return [
        pytest.param(block, id=f"{page.name}-{i}")
        for page in PAGES
        if page.name != "service.md"
        for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
        if bool(re.search(r"^(import|from) (batchnorm\.)?torch", block, re.M)) == torch
    ]


BLOCKS = blocks(torch=False)


@pytest.mark.parametrize("block", BLOCKS)
def test_code_of_a_page_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "page", "exec"), {"__name__": "page"})


def test_pages_have_code_and_name_only_files_that_exist():
    assert len(BLOCKS) >= 3
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"`((?:tests|rust|python|service|docs)/[\w/.-]*)`", text))
    links = {f"docs/{link}" for link in re.findall(r"\]\((?:docs/)?([\w-]+\.md)\)", text)}
    assert len(named) >= 8
    assert len(links) >= 4
    assert [name for name in sorted(named | links) if not (ROOT / name).exists()] == []


def modules():
    import batchnorm_service  # not where only PyTorch's tests are run

    for package in (batchnorm, batchnorm_service):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not info.name.endswith("__main__") and not info.name.startswith("batchnorm.torch"):
                yield info.name


def test_docstring_examples_run():
    results = [doctest.testmod(importlib.import_module(name)) for name in modules()]
    assert sum(result.attempted for result in results) > 0
    assert sum(result.failed for result in results) == 0


PUBLIC = [name for name in batchnorm.__all__ if not name.startswith("__")]


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_is_documented(name):
    thing = getattr(batchnorm, name)
    members = [m for m in vars(thing) if not m.startswith("_")] if isinstance(thing, type) else []
    # A slot is documented among the attributes of its class.
    in_class = re.findall(r"^ +(\w+): ", thing.__doc__ or "", re.M)
    undocumented = [m for m in members if not (getattr(thing, m).__doc__ or "").strip() and m not in in_class]
    assert (thing.__doc__ or "").strip()
    assert undocumented == []
