"""The Python code of README, docs and docstrings is run; files, and names in files, that they name exist.

What needs PyTorch is run by tests/pytorch/test_torch_docs.py.
"""

import ast
import doctest
import functools
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


@functools.cache
def definitions(path):
    """The functions and types of a file as `file::name` names them; of Rust without what they are part of."""
    if path.suffix == ".rs":
        return set(re.findall(r"\b(?:fn|struct|enum|trait) (\w+)", path.read_text()))

    def of(body, prefix=""):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from of(node.body, f"{prefix}{node.name}::")

    return set(of(ast.parse(path.read_text()).body))


def undefined(text):
    """The `file::name` of a page, or names of tests alone, that do not exist."""
    missing = []
    for file, name in re.findall(r"`([\w/.-]+\.(?:py|rs))::([\w:]+)`", text):
        names = set(name.split("::")) if file.endswith(".rs") else {name}
        if not (ROOT / file).exists() or not names <= definitions(ROOT / file):
            missing.append(f"{file}::{name}")
    tests = set().union(*(definitions(path) for path in (ROOT / "tests").rglob("test_*.py")))
    return missing + sorted(set(re.findall(r"`((?:test_|Test[A-Z])\w+)`", text)) - tests)


def test_functions_and_tests_that_pages_name_exist():
    paper = (ROOT / "docs" / "paper.md").read_text()
    assert len(re.findall(r"`[\w/.-]+::[\w:]+`", paper)) > 80
    assert [missing for page in PAGES for missing in undefined(page.read_text())] == []


def test_a_name_that_does_not_exist_is_found():
    core, here = "rust/batchnorm/src/moments.rs", "tests/test_docs.py"
    right = [f"{core}::Moments::var", f"{here}::undefined", "test_code_of_a_page_runs"]
    wrong = [f"{core}::Moments::vars", f"{here}::of", "tests/none.py::undefined", "test_code_of_a_page"]
    assert undefined(" ".join(f"`{name}`" for name in right + wrong)) == wrong


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
