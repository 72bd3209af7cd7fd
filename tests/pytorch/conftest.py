"""`make test-torch` runs these tests in .venv-torch. Without PyTorch they are left out, and that is said."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MISSING = importlib.util.find_spec("torch") is None
collect_ignore_glob = ["test_*.py"] if MISSING else []
# What PyTorch says of its own code, and of interfaces that tests must use. Other warnings are errors.
THEIRS = (
    r"ignore:`torch\.jit\.\w+` is deprecated:FutureWarning",
    r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning",
    r"ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning",
    r"ignore::DeprecationWarning:torch(\..*)?",
    r"ignore::FutureWarning:torch(\..*)?",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            for line in THEIRS:
                item.add_marker(pytest.mark.filterwarnings(line))


def pytest_terminal_summary(terminalreporter):
    if MISSING:
        terminalreporter.write_line(
            "left out: tests/pytorch, since PyTorch is not installed here; `make test-torch` runs them"
        )


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in each test, in any order."""
    import torch

    torch.manual_seed(1502_03167)


@pytest.fixture(params=(1, 2, 3))
def threads(request):
    """As many threads of PyTorch, which are ours too; its former number comes back."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
