"""The declared floors of all dependencies, resolved: writes `constraints-lowest.txt` (`make lowest`).

What the distributions depend on stands at its floor, the tools of the tests at their usual version, and what
these need at the newest version that fits. `make test-lowest` installs exactly that.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

TESTS = Path(__file__).parent
LOWEST = TESTS / "constraints-lowest.txt"
HEADER = (
    "# Every dependency at its declared floor, for the lowest Python that we support; by `make lowest`.\n"
)


def declared() -> list[Requirement]:
    """What both distributions depend on, extras included, but not on each other, and not PyTorch.

    That is several GB, and its floor is the version of .venv-torch.
    """
    found = []
    for path in (TESTS.parent / "pyproject.toml", TESTS.parent / "service" / "pyproject.toml"):
        project = tomllib.loads(path.read_text())["project"]
        extras = project.get("optional-dependencies", {}).values()
        found += [Requirement(line) for part in (project["dependencies"], *extras) for line in part]
    elsewhere = ("batchnorm", "batchnorm-service", "torch")
    return [requirement for requirement in found if requirement.name not in elsewhere]


def tools() -> list[str]:
    """The other packages that the tests want, at the versions of `constraints.txt`."""
    ours = {normal(requirement.name) for requirement in declared()}
    pinned = {normal(Requirement(line).name): line for line in lines("constraints.txt")}
    wanted = [Requirement(line) for line in lines("requirements.txt")]
    others = [requirement for requirement in wanted if normal(requirement.name) not in ours]
    return [f"{r}{Requirement(pinned[normal(r.name)]).specifier}" for r in others]


def lines(name: str) -> list[str]:
    """The requirements that a file lists."""
    text = (TESTS / name).read_text().splitlines()
    return [line for line in text if line and not line.startswith("#")]


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return name.lower().replace("_", "-").replace(".", "-")


def resolved() -> str:
    """All versions, one a line."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--python-version", "3.11"]
    command += ["--resolution", "lowest-direct", "--no-annotate", "--no-header", "-"]
    wanted = "\n".join([*map(str, declared()), *tools()])
    return subprocess.run(command, input=wanted, text=True, check=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    LOWEST.write_text(HEADER + resolved())
