"""Damaged ONNX models, and what the readers of `batchnorm.onnx` do with them; run by tests/test_onnx_fuzz.py.

`python tests/onnx_fuzz.py SEED NUMBER` mutates models NUMBER times and gives each to every verb, in a process
whose memory is limited. `hostile NODES` and `external` try the models of tests/onnx_hostile.py. It prints
what was tried and how it ended as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import batchnorm as bn
import onnx_hostile
from batchnorm.onnx import affines, fix, fold, frozen_layers, lint, load_frozen, replace_layers
from onnx_models import GOLDEN, batch_norm, make, parameters

MEMORY = 1 << 30  # bytes that the process may have more than after its imports
HUGE = (-1, 0, 1, 2, 7, 2**31 - 1, 2**31, 2**60, 2**63 - 1, -(2**63))
NUMBERS = (0.0, -1.0, 1e-45, 3e38, float("nan"), float("inf"))
OTHER = bn.FrozenBatchNorm([0, 1, 2], [1, 2, 3])


def replace(model):
    """Put another layer, of its number of channels, in the place of the first that can be read."""
    layers = frozen_layers(model, skip=True)
    for key, layer in layers.items():
        ones = np.ones(layer.channels)
        return replace_layers(model, {key: bn.FrozenBatchNorm(ones, 2 * ones, dtype=layer.dtype)})
    return replace_layers(model, {"y": OTHER})


VERBS = {
    "load_frozen": load_frozen,
    "frozen_layers": lambda model: frozen_layers(model, skip=True),
    "replace_layers": replace,
    "affines": affines,
    "lint": lint,
    "fix": fix,
    "fold": lambda model: fold(model, verify=False),
}


class Outcome:
    """What the verbs did: counts by kind, and every error that should not be."""

    def __init__(self):
        self.counts = Counter()
        self.failures = []
        self.opened = []  # by the verb that runs
        self._watching = False
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if self._watching and event == "open":
            self.opened.append(arguments[0])

    def try_all(self, what, source, folder=None):
        """Give a model to every verb; only ValueError, OSError and UserWarning may come of it."""
        self.counts["models"] += 1
        for name, verb in VERBS.items():
            self.opened.clear()
            problem: BaseException | None = None
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self._watching = True
                try:
                    verb(source)
                except BaseException as error:  # of any kind, all of which are judged below
                    problem = error
                self._watching = False
            result = "fine" if problem is None else type(problem).__name__
            if isinstance(problem, (ValueError, OSError)):
                if not str(problem):
                    self.failures.append([what, name, f"{result} without a message"])
            elif problem is not None:
                frames = traceback.extract_tb(problem.__traceback__)[-4:]
                places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
                self.failures.append([what, name, f"{result}: {problem}"[:300], places])
            self.counts["calls"] += 1
            self.counts[result] += 1
            for warning in caught:
                if not issubclass(warning.category, UserWarning):
                    self.failures.append([what, name, f"{warning.category.__name__}: {warning.message}"])
            for path in {
                Path(os.fsdecode(path)) for path in self.opened if isinstance(path, str | bytes | Path)
            }:
                if path.suffix in (".py", ".pyc", ".so"):  # imports
                    continue
                self.counts["files opened"] += 1
                if folder is None or not path.resolve().is_relative_to(folder.resolve()):
                    self.failures.append([what, name, f"opened {path}"])


def limit_memory():
    """Let the process have so much more memory than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def bases():
    """The models that are mutated."""
    rng = np.random.default_rng(0)
    models = [onnx.load(path) for path in GOLDEN[::3]]
    layer = bn.FrozenBatchNorm([0, 1, 2], [1, 2, 3], [1, 2, 3], [0, 1, 0])
    models += [layer.to_onnx(rank=2), layer.to_onnx(rank=2, mode="exact")]
    models.append(bn.FrozenWhitening([[1, 0.5], [0.5, 2]], [0, 1]).to_onnx(rank=2))
    values = parameters(rng)
    training = batch_norm(name="bn", training_mode=1, momentum=0.9)
    training.output.extend(["m", "v"])
    models.append(make([training], values))
    models.append(make([batch_norm(is_test=1)], values, opset=6, ir=3))
    inner = helper.make_graph(
        [batch_norm(y="z")], "b", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    )
    choice = helper.make_node("If", ["c"], ["h"], then_branch=inner, else_branch=inner)
    models.append(make([choice, batch_norm("h")], values | {"c": np.array(True)}))
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["mean"], value=numpy_helper.from_array(np.ones(1, "f"))),
        helper.make_node("Constant", [], ["f"], value_floats=[1.0, 2.0, 3.0]),
        helper.make_node("Reshape", ["f", "s"], ["r"]),
        helper.make_node("Expand", ["r", "s"], ["e"]),
        helper.make_node("Cast", ["e"], ["d"], to=TensorProto.DOUBLE),
        helper.make_node("CastLike", ["d", "x"], ["gamma"]),
        helper.make_node("Shape", ["x"], ["sizes"], start=1, end=2),
        helper.make_node("Unsqueeze", ["one", "zero"], ["u"]),
        helper.make_node("Expand", ["u", "sizes"], ["beta"]),
        helper.make_node("Mul", ["x", "gamma"], ["scaled"]),
        helper.make_node("Add", ["scaled", "e"], ["h"]),
        batch_norm("h"),
    ]
    constants = {"s": np.array([3]), "var": values["var"], "one": np.float32(1), "zero": np.array([0])}
    model = make(nodes, constants)
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(2, "f"), "var"), numpy_helper.from_array(np.array([0, 2])), [3]
    )
    del model.graph.initializer[1]
    model.graph.sparse_initializer.append(sparse)
    models.append(model)
    external = make([batch_norm()], values)
    for tensor in external.graph.initializer:
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights"), ("offset", "0"), ("length", "12")):
            tensor.external_data.add(key=key, value=value)
        tensor.ClearField("raw_data")
    models.append(external)
    model = make([helper.make_node("F", ["x"], ["y"], domain="d")], values)
    opset = helper.make_opsetid("", 15)
    model.functions.append(helper.make_function("d", "F", ["x"], ["y"], [batch_norm()], [opset]))
    models.append(model)
    return models


def messages(root):
    """All messages within a message, itself included."""
    pending = [root]
    while pending:
        current = pending.pop()
        yield current
        for field, value in current.ListFields():
            if field.type == field.TYPE_MESSAGE:
                pending.extend(value if field.is_repeated else [value])


def mutate_bytes(rng, model):
    """Flip, cut, double or drop bytes of a model."""
    data = bytearray(model.SerializeToString())
    for _ in range(rng.integers(1, 6)):
        place, length = int(rng.integers(len(data))), int(rng.integers(1, 12))
        kind = rng.integers(5)
        if kind == 0:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[place] = int(rng.integers(256))
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[place : place + length]
        else:
            del data[max(place, 1) :]
        if not data:
            break
    return bytes(data)


def mutate_fields(rng, model):
    """Drop, double, move or change fields of a model, of whatever depth."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = sorted({name for message in messages(copy) if isinstance(message, onnx.NodeProto)
                    for name in (*message.input, *message.output)})  # fmt: skip
    for _ in range(rng.integers(1, 5)):
        found = [message for message in messages(copy) if message.ListFields()]
        message = found[rng.integers(len(found))]
        fields = message.ListFields()
        field, value = fields[rng.integers(len(fields))]
        kind = rng.integers(4)
        if kind == 0:
            message.ClearField(field.name)
        elif field.is_repeated:
            _mutate_list(rng, field, value, names)
        elif field.type != field.TYPE_MESSAGE:
            setattr(message, field.name, _other(rng, field, value, names))
        elif kind == 1:
            value.Clear()
    return copy


def _mutate_list(rng, field, values, names):
    if not len(values):
        return
    index, kind = int(rng.integers(len(values))), rng.integers(3)
    if kind == 0:
        del values[index]
    elif kind == 1:
        values.extend([values[index]])
    elif field.type == field.TYPE_MESSAGE:
        items = [type(item).FromString(item.SerializeToString()) for item in values]
        rng.shuffle(items)
        del values[:]
        values.extend(items)
    else:
        values[index] = _other(rng, field, values[index], names)


def _other(rng, field, value, names):
    if field.type == field.TYPE_STRING:
        return ["", "x", "\0", "../weights", *names][rng.integers(4 + len(names))]
    if field.type == field.TYPE_BYTES:
        return value[: rng.integers(len(value) + 1)] + b"\xff" * int(rng.integers(9))
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return float(NUMBERS[rng.integers(len(NUMBERS))])
    if field.type == field.TYPE_ENUM:
        known = sorted(field.enum_type.values_by_number)
        return known[rng.integers(len(known))]
    wanted = HUGE[rng.integers(len(HUGE))]
    if field.type == field.TYPE_INT32:
        return max(-(2**31), min(wanted, 2**31 - 1))
    return wanted if field.type == field.TYPE_INT64 else abs(wanted)


def mutate(outcome, folder, seed, number):
    """Try mutated models, in turns as bytes and by their fields; the latter also as a file."""
    (folder / "weights").write_bytes(np.arange(1, 4, dtype=np.float32).tobytes())
    models, path = bases(), folder / "model.onnx"
    for trial in range(number):
        rng = np.random.default_rng([seed, trial])
        model = models[trial % len(models)]
        if trial // len(models) % 2:
            outcome.try_all(f"bytes {seed} {trial}", mutate_bytes(rng, model))
        else:
            mutated = mutate_fields(rng, model)
            outcome.try_all(f"fields {seed} {trial}", mutated)
            path.write_bytes(mutated.SerializeToString())
            outcome.try_all(f"file {seed} {trial}", path, folder)


def main(*arguments):
    """Try what the arguments ask for, and print what happened."""
    outcome = Outcome()
    limit_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        if arguments[0] == "hostile":
            for what, model in onnx_hostile.models(int(arguments[1])):
                outcome.try_all(what, model)
        elif arguments[0] == "external":
            secret = Path(name) / "secret"
            secret.write_bytes(bytes(12))
            for what, path in onnx_hostile.external(folder, secret):
                outcome.try_all(what, path, folder)
        else:
            mutate(outcome, folder, *map(int, arguments))
    print(json.dumps({"counts": outcome.counts, "failures": outcome.failures}))


if __name__ == "__main__":
    main(*sys.argv[1:])
