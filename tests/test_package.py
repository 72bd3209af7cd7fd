"""The distributions agree with each other, and importing is light."""

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

import batchnorm
import lowest
import stub

ROOT = Path(__file__).parent.parent


def test_all_versions_are_one():
    cargo = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]
    service = tomllib.loads((ROOT / "service" / "pyproject.toml").read_text())["project"]
    version = cargo["package"]["version"]
    lock = tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]
    ours = {p["name"]: p["version"] for p in lock if p["name"].startswith("batchnorm")}
    assert ours == dict.fromkeys(["batchnorm", "batchnorm-json", "batchnorm-python"], version)
    for crate in ("batchnorm", "batchnorm-json"):
        assert cargo["dependencies"][crate]["version"] == f"={version}"
    assert service["version"] == version
    assert f"batchnorm=={version}" in service["dependencies"]
    assert (
        batchnorm.__version__
        == metadata.version("batchnorm")
        == metadata.version("batchnorm-service")
        == version
    )


def test_import_loads_numpy_alone():
    code = "import sys, numpy, json; old = set(sys.modules); import batchnorm; "
    code += "print(json.dumps([*set(sys.modules) - old]))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    installed = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert "batchnorm" in installed
    assert installed <= {"batchnorm", "numpy"}


def test_without_pytorch_its_package_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None; import batchnorm.torch"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    wanted = r"ImportError: batchnorm\.torch needs PyTorch [\d.]+ or later: pip install 'batchnorm\[torch\]'"
    assert re.fullmatch(wanted, done.stderr.splitlines()[-1])


def test_the_version_of_pytorch_that_is_tested_is_the_declared_one():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = {r.name: r for r in map(Requirement, lowest.lines("constraints-torch.txt"))}["torch"]
    assert extras["torch"] == [str(pinned).replace("==", ">=").removesuffix(".0")]


def test_the_lowest_versions_that_are_tested_are_the_declared_ones():
    tested = {lowest.normal(r.name): r for r in map(Requirement, lowest.lines("constraints-lowest.txt"))}
    for declared in lowest.declared():
        floor = min(str(s.version) for s in declared.specifier if s.operator in (">=", "=="))
        version = str(tested[lowest.normal(declared.name)].specifier).removeprefix("==")
        assert Version(version) == Version(floor), (
            f"{declared}: run make lowest, or raise the floor to {version}"
        )


def test_the_stub_carries_the_docstrings_of_the_module():
    assert stub.STUB.read_text() == stub.generated(), "run make format"


def test_unsafe_has_five_addresses():
    core = r"rust/batchnorm/src/(simd/.*|view(/.*|\.rs)|float_mode\.rs|parallel/team\.rs)"
    allowed = re.compile(rf"{core}|rust/batchnorm-python/src/buffer/.*")
    sources = sorted((ROOT / "rust").rglob("*.rs"))
    with_unsafe = [
        str(path.relative_to(ROOT))
        for path in sources
        if re.search(r"\bunsafe\s*(\{|fn|impl)|allow\(unsafe", path.read_text())
    ]
    assert len(sources) > 15
    assert len(with_unsafe) >= 5
    assert [path for path in with_unsafe if not allowed.fullmatch(path)] == []
