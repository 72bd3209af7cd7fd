"""The model layer: frozen layers found in a directory. It knows neither HTTP nor JSON."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from batchnorm import FrozenBatchNorm
from batchnorm_service.errors import InvalidInputError, ModelNotFoundError, NotReadyError

logger = logging.getLogger(__name__)

# A name is one segment of a URL and one component of a path: no slash, no leading dot, no percent.
NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
# `v2/models/stats` is the protocol's path for the statistics of all models.
RESERVED_NAMES: Final = frozenset({"stats"})
# No leading zero, so that a version has one spelling.
VERSION: Final = re.compile(r"[1-9][0-9]{0,17}")
# NumPy's limit, so that of a tensor.
MAX_RANK: Final = 64


@dataclass(frozen=True)
class Model:
    """One version of one model.

    Attributes:
        name: Name of the model.
        version: Decimal number of the version, as text.
        layer: The layer that computes every answer.
    """

    name: str
    version: str
    layer: FrozenBatchNorm

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """Names of the dtypes of x that the layer takes, its own first."""
        narrow = ("float32", "float16", "bfloat16")
        return ("float64", *narrow) if self.layer.dtype == np.float64 else narrow

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of x at the lowest rank that the layer takes, -1 where any size goes; higher ranks go too."""
        axis = self.layer.channel_axis
        sizes = [-1] * max(2, axis + 1 if axis >= 0 else -axis)
        sizes[axis] = self.layer.channels
        return tuple(sizes)

    def infer(self, x: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return `layer(x)`, written to `out` where given.

        Raises:
            InvalidInputError: the layer refuses the dtype or shape of x; its reason is the text.
        """
        try:
            return self.layer(x, out=out)
        except (TypeError, ValueError) as refusal:
            raise InvalidInputError(str(refusal)) from refusal


class Repository:
    """The models of one directory: NAME/VERSION/bn.safetensors, or NAME.safetensors for version 1.

    They are loaded when this is made. A file that cannot be is logged with its reason; the others are served.

    Args:
        root: The directory. Nothing outside it is opened, whatever symbolic links say.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.resolve(strict=True)
        self._models: dict[str, dict[str, Model]] = {}
        self._failed: set[tuple[str, str]] = set()
        for name, version, path in self._candidates():
            self._open(name, version, path)
        if not self.ready:
            logger.warning("no model is loaded: the service will not be ready")

    @property
    def ready(self) -> bool:
        """Whether there is a model to serve."""
        return bool(self._models)

    def names(self) -> list[str]:
        """Return the names of the loaded models, sorted."""
        return sorted(self._models)

    def versions(self, name: str) -> list[str]:
        """Return the loaded versions of a model, lowest first; none for a model that is not loaded."""
        return sorted(self._models.get(name, {}), key=int)

    def get(self, name: str, version: str | None = None) -> Model:
        """Return a loaded model; the highest loaded version where none is named.

        The lookup is in memory: a name from outside never becomes a path.

        Raises:
            NotReadyError: the file exists and could not be loaded.
            ModelNotFoundError: there is no such model or version.
        """
        loaded = self._models.get(name, {})
        wanted = max(loaded, key=int, default=None) if version is None else version
        if wanted in loaded:
            return loaded[wanted]
        if any(name == failed and version in (None, number) for failed, number in self._failed):
            raise NotReadyError(
                f"model {_label(name, version)} could not be loaded; the service's log says why"
            )
        raise ModelNotFoundError(f"there is no model {_label(name, version)}")

    def _candidates(self) -> Iterator[tuple[str, str, Path]]:
        for path in sorted(self._root.glob("*/*/bn.safetensors")):
            yield path.parent.parent.name, path.parent.name, path
        for path in sorted(self._root.glob("*.safetensors")):
            yield path.stem, "1", path

    def _open(self, name: str, version: str, path: Path) -> None:
        try:
            self._check(name, version)
            layer = FrozenBatchNorm.load(self._contained(path))
            if not -MAX_RANK <= layer.channel_axis < MAX_RANK:
                raise ValueError(f"no tensor has a channel axis {layer.channel_axis}")
        # Whatever is wrong with one file must not stop the others.
        except Exception as reason:
            self._failed.add((name, version))
            logger.error("model %s is not loaded: %s", _label(name, version), reason)
        else:
            self._models.setdefault(name, {})[version] = Model(name, version, layer)
            logger.info("model %s is loaded, fingerprint %s", _label(name, version), layer.fingerprint)

    def _check(self, name: str, version: str) -> None:
        if not NAME.fullmatch(name):
            raise ValueError(f"the name must match {NAME.pattern}")
        if name in RESERVED_NAMES:
            raise ValueError("the name is reserved by the protocol")
        if not VERSION.fullmatch(version):
            raise ValueError(f"the version must match {VERSION.pattern}")
        if version in self._models.get(name, {}) or (name, version) in self._failed:
            raise ValueError("a file of this name and version was seen already")

    def _contained(self, path: Path) -> Path:
        real = path.resolve(strict=True)
        if not real.is_relative_to(self._root):
            raise ValueError("a symbolic link leaves the directory of models")
        if not real.is_file():
            raise ValueError("not a regular file")
        return real


def _label(name: str, version: str | None) -> str:
    return repr(name) if version is None else f"{name!r} version {version!r}"
