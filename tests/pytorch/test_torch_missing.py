"""What `import batchnorm.torch` says where PyTorch is missing or too old."""

from __future__ import annotations

import subprocess
import sys

import pytest

MISSING = "sys.modules['torch'] = None"
OLD = "old = sys.modules['torch'] = types.ModuleType('torch'); old.__version__ = '2.9.1'; old.Tensor = object"


@pytest.mark.parametrize(
    ("state", "text"), [(MISSING, "needs PyTorch 2.15 or later"), (OLD, "but 2.9.1 is installed")]
)
def test_the_error_says_what_is_needed(state, text):
    code = f"import sys, types; {state}\nimport batchnorm\nimport batchnorm.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: batchnorm.torch needs PyTorch")
    assert text in last
    assert "pip install" in last
