"""The folders of the service: the imports between its modules, and the one that imports the web framework."""

from __future__ import annotations

import ast
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import batchnorm_service

ROOT = Path(batchnorm_service.__file__).parent
# Each level knows only those before it, and the modules of its own level.
LEVELS = (
    ("", "errors", "logs", "keys"),
    ("models",),
    ("protocol",),
    ("counts",),
    ("settings",),
    ("lifecycle",),
    ("context",),
    ("http",),
    ("process",),
    ("__main__",),
)


def level(module: str) -> int:
    """The level of a module, named below the package; fails for one that has none."""
    room = module.partition(".")[0]
    (found,) = (k for k, names in enumerate(LEVELS) if room in names)
    return found


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def modules() -> dict[str, set[str]]:
    """What each module imports; both are named below the package, where they are of it."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        found[name] = imported(path)
    return found


def own(name: str, names: dict[str, set[str]]) -> set[str]:
    """The modules of the package among those that a module imports."""
    prefix = "batchnorm_service."
    return {target.removeprefix(prefix) for target in names[name] if target.startswith(prefix)} & names.keys()


FOUND = modules()


def test_every_module_was_seen():
    assert len(FOUND) >= 35
    assert {"", "context", "models.model", "protocol.request", "http.app", "process.worker"} <= FOUND.keys()
    assert {name.partition(".")[0] for name in FOUND} == {name for names in LEVELS for name in names}
    assert sum(len(own(name, FOUND)) for name in FOUND) >= 80
    assert "http.admission" in own("http.app", FOUND)
    assert "http.openapi" in own("http.app", FOUND)  # by `from package import module`


@pytest.mark.parametrize("name", FOUND)
def test_a_module_knows_only_those_below_it(name):
    above = {target for target in own(name, FOUND) if level(target) > level(name)}
    assert above == set()


def test_no_circle():
    """Within a room too."""
    left = {name: own(name, FOUND) - {name} for name in FOUND}
    while free := {name for name, needed in left.items() if not needed & left.keys()}:
        left = {name: needed for name, needed in left.items() if name not in free}
    assert left == {}


@pytest.mark.parametrize(
    ("packages", "room"),
    [({"fastapi", "starlette"}, "http"), ({"uvicorn", "httptools"}, "process")],
    ids=["framework", "server"],
)
def test_one_room_knows_the_web(packages, room):
    knowing = {name for name in FOUND if packages & {target.partition(".")[0] for target in FOUND[name]}}
    assert len(knowing) >= 2
    assert {name.partition(".")[0] for name in knowing} == {room}


def test_uvicorn_is_within_bounds():
    """Its internals are subclassed: a version that these tests have not run with is not allowed."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    (declared,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "uvicorn")
    tested = Version(version("uvicorn"))
    assert tested in declared.specifier
    assert f"{tested.major}.{tested.minor + 1}" not in declared.specifier
    assert "0.52.4" not in declared.specifier
