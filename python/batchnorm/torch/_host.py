"""HOST: the passes of the core over PyTorch's tensors, in PyTorch's memory and on PyTorch's threads.

TYPES says which tensors they take as PyTorch's own operators would.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

from batchnorm import _core

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(
        f"batchnorm.torch needs PyTorch 2.15 or later, but {torch.__version__} is installed: "
        "pip install --upgrade 'batchnorm[torch]'"
    )


def _host() -> _core.Host:
    """Return the passes on the OpenMP team of PyTorch, or on threads of our own where it has none."""
    host = _core.Host(torch.Tensor)
    # The runtime that the process has, which may be a preloaded one, comes before that of PyTorch's library.
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if host.thread_source == "own" and library.exists():
        host = _core.Host(torch.Tensor, str(library))
    return host


HOST: Final = _host()
# All other subclasses of Tensor decide for themselves what an operator does.
PLAIN: Final = (torch.Tensor, torch.nn.Parameter)
TYPES: Final = _core.HostTypes(*PLAIN)
