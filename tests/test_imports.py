"""The graph of imports of the package has no cycle.

A module's edges are all imports that it writes, of modules of the package: those inside functions and under
TYPE_CHECKING count too, since they tell what a reader of the module must know. Packages that Python imports
on the way to a module (`batchnorm` for `batchnorm.frozen`) are no edges: `__init__` gathers what lies below.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import batchnorm

PACKAGE = Path(batchnorm.__file__).parent


def files():
    """The sources; of the compiled module, its stub."""
    return [*sorted(PACKAGE.rglob("*.py")), PACKAGE / "_core.pyi"]


def modules():
    """Source file of each module by dotted name."""
    dotted = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in files()}
    return {name.removesuffix(".__init__"): path for name, path in dotted.items()}


def imports(name, path, known):
    """The modules of the package that this one names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            # `from package import module` names the module, `from module import thing` the module too.
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (below & known) or {node.module}
    return (found & known) - {name}


def graph():
    known = modules()
    return {name: imports(name, path, known.keys()) for name, path in known.items()}


def test_the_graph_sees_every_module():
    edges = graph()
    assert len(edges) == len(files()) > 15
    assert {"batchnorm.frozen", "batchnorm.layer", "batchnorm.population"} <= edges["batchnorm"]
    assert "batchnorm.frozen" in edges["batchnorm.layer"]
    assert {"batchnorm._file", "batchnorm.onnx.export"} <= edges["batchnorm.frozen"]  # inside functions
    assert sum(map(len, edges.values())) > 30


def test_there_is_no_cycle():
    list(TopologicalSorter(graph()).static_order())


def test_a_cycle_would_be_seen():
    edges = graph()
    edges["batchnorm._file"].add("batchnorm.frozen")
    with pytest.raises(CycleError):
        list(TopologicalSorter(edges).static_order())
