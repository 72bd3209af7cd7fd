"""A directory of models: which file is which model, and how a layer is read from a file.

    DIR/NAME/VERSION/bn.safetensors     or bn.onnx, model.onnx
    DIR/NAME.safetensors                or NAME.onnx: version 1

If DIR is a single model, its name is given, and its files are DIR/VERSION/bn.safetensors, or
DIR/bn.safetensors for version 1. Anything else that looks like a model (it has such a suffix, in upper or
lower case, or is a folder named like a version) is a source with a problem, so that nothing is ignored
silently.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from batchnorm._kinds import AnyFrozen, load
from batchnorm_service.models.model import MAX_RANK

# A name is one segment of a URL and one component of a path: no slash, no leading dot, no percent.
NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
# `v2/models/stats` is the protocol's path for the statistics of all models.
RESERVED_NAMES: Final = frozenset({"stats"})
# No leading zero, so that a version has one spelling.
VERSION: Final = re.compile(r"[1-9][0-9]{0,17}")
# File names of a model in a version's folder; Triton's repositories use the last.
FILES: Final = ("bn.safetensors", "bn.onnx", "model.onnx")
SUFFIXES: Final = (".safetensors", ".onnx")


@dataclass(frozen=True)
class Source:
    """A file that should be a version of a model, or a file or folder that only looks like one.

    Attributes:
        name: Name of the model.
        version: Version of the model; empty if a whole folder has a problem.
        path: The file.
        problem: Why it cannot be loaded, if that is known without opening it.
    """

    name: str
    version: str
    path: Path
    problem: str = ""


class Directory:
    """A directory of models, or of a single model.

    Args:
        root: The directory. Nothing outside it is opened, not even through symbolic links.
        name: Name of the model if the whole directory is one model; None for a directory of models.

    Raises:
        OSError: The directory does not exist.
    """

    def __init__(self, root: Path, name: str | None = None) -> None:
        self._root = root.resolve(strict=True)
        self._name = name

    def sources(self, name: str | None = None) -> list[Source]:
        """Return the sources that the directory has now, of one model or of all.

        Names from outside are compared with entries of the directory, never made into paths.

        Raises:
            OSError: The directory cannot be listed.
        """
        if self._name is None:
            found = [source for entry in _listed(self._root) for source in self._named(entry, name)]
        elif name in (None, self._name):
            found = list(self._single(self._name))
        else:
            found = []
        seen: set[tuple[str, str]] = set()
        return [self._checked(source, seen) for source in found]

    def read(self, source: Source, scratch: Path) -> AnyFrozen:
        """Return the layer of a source.

        The file is copied first, and the copy read, so that a change of the file meanwhile does no harm.

        Args:
            source: One of `sources()`.
            scratch: Path of a temporary file that may be written.

        Raises:
            ValueError: The source is not a complete file of a frozen layer, or not in the directory.
            OSError: It cannot be read or copied.
            ImportError: It is an ONNX model, and the package onnx is not installed.
        """
        if source.problem:
            raise ValueError(source.problem)
        real = self._contained(source.path)
        if not real.is_file():
            raise ValueError("not a regular file")
        with open(real, "rb", opener=_unfollowed) as file, scratch.open("wb") as copy:
            shutil.copyfileobj(file, copy)
        layer = _read_onnx(scratch) if real.suffix == ".onnx" else load(scratch)
        if not -MAX_RANK <= layer.channel_axis < MAX_RANK:
            raise ValueError(f"no tensor has a channel axis {layer.channel_axis}")
        return layer

    def explain(self, source: Source, scratch: Path, reason: Exception) -> str:
        """Return the text of an error of `read`, with paths relative to the directory."""
        text = f"{reason.strerror}" if isinstance(reason, OSError) and reason.strerror else str(reason)
        shown = str(source.path.relative_to(self._root))
        for path in (str(scratch), str(source.path), str(self._root)):
            text = text.replace(path, shown)
        return text

    def _named(self, entry: Path, wanted: str | None) -> Iterator[Source]:
        """Yield the sources of one entry of a directory of models."""
        if _is_model_file(entry):
            if wanted in (None, entry.stem):
                suffix = entry.suffix.lower()
                problem = "" if entry.suffix == suffix else f"the suffix must be {suffix}, not {entry.suffix}"
                yield Source(entry.stem, "1", entry, problem)
        elif wanted in (None, entry.name) and entry.is_dir() and not entry.name.startswith("."):
            yield from self._folder(entry.name, entry)

    def _single(self, name: str) -> Iterator[Source]:
        """Yield the sources of a directory that is a single model."""
        if _model_files(self._root):
            yield self._only_file(name, "1", self._root)
        yield from self._versions(name, self._root)

    def _folder(self, name: str, folder: Path) -> Iterator[Source]:
        """Yield the sources of a folder in a directory of models."""
        try:
            self._contained(folder)
            if misplaced := _model_files(folder):
                shown = ", ".join(path.name for path in misplaced)
                problem = f"{shown} must lie in the folder of a version, as {name}/1/{FILES[0]}"
                yield Source(name, "", folder, problem)
            yield from self._versions(name, folder)
        except (OSError, ValueError) as reason:
            yield Source(name, "", folder, self.explain(Source(name, "", folder), folder, reason))

    def _versions(self, name: str, folder: Path) -> Iterator[Source]:
        for entry in _listed(folder):
            if entry.is_dir() and (entry.name.isdigit() or _model_files(entry)):
                yield self._only_file(name, entry.name, entry)

    def _only_file(self, name: str, version: str, folder: Path) -> Source:
        found = [folder / file for file in FILES if os.path.lexists(folder / file)]
        if len(found) == 1:
            return Source(name, version, found[0])
        shown = ", ".join(path.name for path in found or _model_files(folder))
        problem = f"one of {', '.join(FILES)} is wanted, found {shown or 'none'}"
        return Source(name, version, folder, problem)

    def _checked(self, source: Source, seen: set[tuple[str, str]]) -> Source:
        problem = source.problem
        if not NAME.fullmatch(source.name):
            problem = f"the name must match {NAME.pattern}"
        elif source.name in RESERVED_NAMES:
            problem = "the name is reserved by the protocol"
        elif source.version and not VERSION.fullmatch(source.version):
            problem = f"the version must match {VERSION.pattern}"
        elif (source.name, source.version) in seen:
            problem = "a file of this name and version was seen already"
        seen.add((source.name, source.version))
        return Source(source.name, source.version, source.path, problem)

    def _contained(self, path: Path) -> Path:
        try:
            real = path.resolve(strict=True)
        except RuntimeError as loop:  # what Python 3.11 and 3.12 raise for links in a circle
            raise ValueError("symbolic links in a circle") from loop
        if not real.is_relative_to(self._root):
            raise ValueError("a symbolic link leaves the directory of models")
        return real


def _listed(folder: Path) -> list[Path]:
    # If two sources are of one version, the first counts: folders before files, right suffixes first.
    def order(path: Path) -> tuple[bool, bool, str]:
        return _is_model_file(path), path.suffix not in SUFFIXES, path.name

    return sorted(folder.iterdir(), key=order)


def _is_model_file(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _model_files(folder: Path) -> list[Path]:
    """Return the files in a folder that look like models; none if the folder cannot be listed."""
    try:
        return [path for path in _listed(folder) if _is_model_file(path)]
    except OSError:
        return []


def _unfollowed(path: str, flags: int) -> int:
    # In case a link or a pipe has replaced the file since it was checked.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _read_onnx(path: Path) -> AnyFrozen:
    try:
        import onnx

        from batchnorm.onnx import load_frozen
    except ImportError:
        raise ValueError("ONNX models need the package onnx: pip install 'batchnorm[onnx]'") from None

    model = onnx.load(path, load_external_data=False)
    tensors = [*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute)]
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors):
        raise ValueError("the model refers to data in other files, which are not opened")
    return load_frozen(model)
