"""What we are compared with. A module for each peer: NAME, `version()` and `calls(case, threads)`.

`calls` gives, by pass, a call that computes it and returns the answer in the shape of `case.rows(x)`, or of
x; passes and dtypes that the peer does not have are left out. Its memory is set up beforehand wherever the
peer lets us. Where a call has `finished`, that makes the whole answer of what it returned; where it has
`timed`, it runs in another process and takes its time there. Importing the module of a peer that is not
installed raises ImportError.
"""

from __future__ import annotations

import importlib
from types import ModuleType

# OpenVINO before JAX: importing it forks, which JAX, once its threads run, warns of.
MODULES = {
    "NumPy": "numpy",
    "ONNX Runtime": "onnxruntime",
    "OpenVINO": "openvino",
    "oneDNN": "onednn",
    "PyTorch": "torch",
    "scikit-learn": "sklearn",
    "JAX": "jax",
}


def installed() -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The peers that can be imported, by name, and why the others cannot."""
    found, absent = {}, {}
    for name, module in MODULES.items():
        try:
            found[name] = importlib.import_module(f"bench.peers.{module}")
        except ImportError as error:
            absent[name] = str(error)
    return found, absent
