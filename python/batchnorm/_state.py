"""Frozen layers from the state of a whole network of PyTorch, and the names to serve layers by."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from batchnorm.conventions import TORCH_NAMES
from batchnorm.frozen import FrozenBatchNorm

_LONGEST: Final = 128
_NAME: Final = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{_LONGEST - 1}}}")
"""What the service takes as the name of a model; it also is a file's name."""
_RESERVED: Final = ("stats",)
_PICKLES: Final = (".pt", ".pth")


def frozen_layers(path: Path, eps: float) -> dict[str, FrozenBatchNorm]:
    """Return a frozen layer for each pair of running_mean and running_var in the file of a state.

    Args:
        path: A `.safetensors`, or what `torch.save` wrote to a `.pt` or `.pth`, which needs PyTorch. Mappings
            in mappings, such as a checkpoint with the state of an optimizer, are searched too.
        eps: ε of all layers; a state does not hold it.

    Returns:
        The layers by the name of the module, or of the file if the state is that of one layer; all are names
        that the service takes.

    Raises:
        OSError: The file cannot be read.
        ImportError: PyTorch, or ml_dtypes for bfloat16, is not installed.
        ValueError: The file is of another kind or damaged, has no such pair, or one that makes no layer or
            has a name that cannot be served.
    """
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", *_PICKLES):
        raise ValueError(f"{path}: wanted a name that ends in .safetensors, .pt or .pth")
    path.open("rb").close()  # says better than the readers why a file cannot be read
    state = _read_safetensors(path) if suffix == ".safetensors" else _read_pickle(path)
    mean = TORCH_NAMES["mean"]
    prefixes = [key.removesuffix(mean) for key in state if key == mean or key.endswith(f".{mean}")]
    prefixes = [prefix for prefix in prefixes if prefix + TORCH_NAMES["var"] in state]
    if not prefixes:
        raise ValueError(f"{path}: 1 pair of running_mean and running_var or more wanted, found none")
    layers = {}
    for prefix in prefixes:
        name = prefix.removesuffix(".") or path.stem
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise ValueError(
                f"{path}: a layer has the name {name!r}, but a file to be served wants one that matches "
                f"{_NAME.pattern} and is not {', '.join(_RESERVED)}"
            )
        try:
            layers[name] = FrozenBatchNorm.from_torch(state, prefix, eps=eps)
        except ValueError as error:
            raise ValueError(f"{path}: layer {name}: {error}") from error
    return layers


def served_names(layers: Iterable[str]) -> dict[str, str]:
    """Return a name that the service takes for each layer of an ONNX model, by the name of its node.

    Slashes become dots, as between the modules of PyTorch: `/layer1/0/bn1` is served as `layer1.0.bn1`. Other
    characters that are not taken become underscores. Where two names would be equal, later ones get a number.
    """
    names: dict[str, str] = {}
    for layer in layers:
        kept = re.sub(r"[^A-Za-z0-9._-]", "_", layer.strip("/").replace("/", "."))
        kept = kept.lstrip(".-")[:_LONGEST] or "layer"
        kept, number = f"{kept}_" if kept in _RESERVED else kept, 2
        name = kept
        while name in names.values():
            name, number = f"{kept[: _LONGEST - 12]}_{number}", number + 1
        names[layer] = name
    return names


def _of_a_layer(key: str) -> bool:
    return key.rpartition(".")[2] in TORCH_NAMES.values()


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="np") as file:
            keys = [key for key in file.keys() if _of_a_layer(key)]  # noqa: SIM118  (not a mapping)
            prefixes = {key.rpartition(".")[0] for key in keys if key.endswith(TORCH_NAMES["mean"])}
            # The weights of all else may be many gigabytes.
            keys = [key for key in keys if key.rpartition(".")[0] in prefixes]
            if any(file.get_slice(key).get_dtype() == "BF16" for key in keys):
                import ml_dtypes  # noqa: F401  (gives NumPy the dtype)
            return {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Any]:
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, for damaged files and for objects that are not weights
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path}: torch.load with weights_only=True does not read it: {reason[0]}"
        ) from error
    found = {}
    for key, value in _flat(loaded):
        if isinstance(value, torch.Tensor) and _of_a_layer(key):
            narrow = value.dtype in (torch.float16, torch.bfloat16)
            found[key] = (value.float() if narrow else value).detach().numpy()
    return found


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is in mappings within mappings, with the keys joined by dots."""
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, inner in value.items():
        if isinstance(key, str):
            yield from _flat(inner, f"{prefix}.{key}" if prefix else key)
