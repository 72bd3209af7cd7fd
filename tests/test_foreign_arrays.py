"""Arrays of other libraries, as tensors and as parameters: one rule on every path.

Lazily negated tensors are resolved, masks and tensors that require grad raise TypeError, bfloat16 works.
PyTorch and pandas are not needed: what their objects do is done by exporters of ours too.
"""

from __future__ import annotations

import importlib

import ml_dtypes
import numpy as np
import pytest

import batchnorm as bn
from batchnorm._core import Coefficients
from cases import bits
from dlpack import Exporter

X = np.arange(12, dtype=np.float32).reshape(4, 3) - 5
V = np.array([1.0, 2.0, 3.0], np.float32)
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def torch():
    return installed("torch")


@pytest.fixture
def pandas():
    return installed("pandas")


def installed(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return pytest.skip(f"{name} is not installed")


def set_parameter(name):
    def take(value):
        layer = bn.BatchNorm(3)
        setattr(layer, name, value)
        return getattr(layer, name)

    return take


def load_layer(name):
    def take(value):
        layer = bn.BatchNorm(3)
        layer.load_state_dict(layer.state_dict() | {name: value})
        return getattr(layer, name)

    return take


def load_population(value):
    population = bn.MovingAverage(0.1)
    population.load_state_dict({"mean": value, "var": V})
    return population.mean


def from_torch(name, ours):
    state = {"running_mean": V, "running_var": V, "weight": V, "bias": V}
    return lambda value: getattr(bn.FrozenBatchNorm.from_torch(state | {name: value}), ours)


def one_of(take, name):
    return lambda value: take(**({"mean": V, "var": V, "gamma": V, "beta": V} | {name: value}))


# Every way in of parameters: how errors call it, and what takes it and hands it out or normalizes X by it.
PARAMETERS = {
    **{f"infer {name}": (name, one_of(lambda **p: bn.infer(X, **p), name)) for name in ("mean", "beta")},
    **{
        f"Coefficients {name}": (name, one_of(lambda **p: Coefficients(**p).infer(X), name))
        for name in ("var", "gamma")
    },
    **{
        f"FrozenBatchNorm {name}": (name, one_of(lambda **p: bn.FrozenBatchNorm(**p)(X), name))
        for name in ("mean", "var", "gamma", "beta")
    },
    "train_forward gamma": ("gamma", lambda value: bn.train_forward(X, value)[0]),
    "Moments": ("m2", lambda value: bn.Moments(V, V, value).m2),
    "GradientSums": ("dgamma", lambda value: bn.GradientSums(V, value, V).dgamma),
    "layer.gamma": ("gamma", set_parameter("gamma")),
    "layer.beta": ("beta", set_parameter("beta")),
    "layer.load_state_dict": ("gamma", load_layer("gamma")),
    "population.load_state_dict": ("state['mean']", load_population),
    "from_torch running_mean": ("state_dict['running_mean']", from_torch("running_mean", "mean")),
    "from_torch weight": ("state_dict['weight']", from_torch("weight", "gamma")),
}
# Every way in of tensors.
TENSORS = {
    "moments": ("x", lambda x: bn.moments(x).mean),
    "infer": ("x", lambda x: bn.infer(x, V, V)),
    "residual": ("residual", lambda x: bn.infer(np.asarray(X, _dtype_of(x)), V, V, residual=x)),
    "train_forward": ("x", lambda x: bn.train_forward(x)[0]),
    "dy": ("dy", lambda x: bn.infer_backward(x, np.asarray(X, _dtype_of(x)), V, V).dx),
    "frozen layer": ("x", lambda x: bn.FrozenBatchNorm(V, V)(x)),
    "layer": ("x", lambda x: bn.BatchNorm(3)(x)),
}


def _dtype_of(tensor):
    return BF16 if "bfloat" in str(getattr(tensor, "dtype", "")) else np.float32


def ways_in(table):
    return pytest.mark.parametrize(("name", "take"), table.values(), ids=list(table))


class Negated(Exporter):
    """A lazily negated tensor, which DLPack cannot express, like PyTorch's `z.conj().imag`."""

    def __init__(self, array):
        super().__init__(array, array.shape, "float", 32)
        self.resolved = Exporter(-array, array.shape, "float", 32)  # it must outlive what is made of it

    def is_neg(self):
        return True

    def resolve_neg(self):
        return self.resolved


@ways_in(PARAMETERS)
def test_lazily_negated_parameters(name, take):
    assert bits(take(Negated(-V))) == bits(take(V))


@ways_in(TENSORS)
def test_lazily_negated_tensors(name, take):
    assert bits(take(Negated(-X))) == bits(take(X))


@ways_in(PARAMETERS)
def test_negated_parameters_of_torch(torch, name, take):
    z = torch.complex(torch.zeros(3), -torch.from_numpy(V))
    assert z.conj().imag.is_neg()
    assert bits(take(z.conj().imag)) == bits(take(V))


@ways_in(TENSORS)
def test_negated_tensors_of_torch(torch, name, take):
    z = torch.complex(torch.zeros(4, 3), -torch.from_numpy(X))
    assert bits(take(z.conj().imag)) == bits(take(X))


def test_a_conjugate_is_no_real_tensor(torch):
    with pytest.raises(TypeError, match=r"^x is torch.Tensor \(.*conjugate bit"):
        bn.moments(torch.ones(4, 3, dtype=torch.complex64).conj())


@ways_in(PARAMETERS)
def test_masked_parameters(name, take):
    for mask in ([False, True, False], False):
        with pytest.raises(TypeError) as error:
            take(np.ma.masked_array(V, mask))
        wanted = f"{name} is numpy.ma.MaskedArray with a mask; wanted real numbers"
        assert str(error.value).startswith(wanted)


@ways_in(TENSORS)
def test_masked_tensors(name, take):
    with pytest.raises(
        TypeError, match=rf"^{name} is numpy\.ma\.MaskedArray with a mask; wanted a NumPy array"
    ):
        take(np.ma.masked_array(X, X > 0))


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_masked_tensors_of_torch(torch):
    masked = torch.masked.masked_tensor(torch.ones(4, 3), torch.ones(4, 3) > 0)
    with pytest.raises(TypeError, match=r"^x is .*MaskedTensor with a mask"):
        bn.moments(masked)
    with pytest.raises(TypeError, match=r"^mean is .*MaskedTensor with a mask"):
        bn.infer(X, masked[0], V)


class Series:
    """A pandas Series is an array by `__array__`, and has a method `mask`, which is not a mask."""

    def __init__(self, values):
        self.values = values

    def mask(self, cond):
        raise NotImplementedError

    def __array__(self, dtype=None, copy=None):
        return self.values


@ways_in(PARAMETERS)
def test_a_method_called_mask_is_no_mask(name, take):
    assert bits(take(Series(V))) == bits(take(V))


@ways_in(PARAMETERS)
def test_series_of_pandas(pandas, name, take):
    assert bits(take(pandas.Series(V))) == bits(take(V))


def test_data_frames_of_pandas(pandas):
    assert bits(bn.infer(pandas.DataFrame(X), V, V)) == bits(bn.infer(X, V, V))
    with pytest.raises(ValueError, match="mean is NaN in channel 1"):
        bn.infer(X, pandas.array([1, None, 2], dtype="Float32"), V)


def bfloat16(values):
    """An exporter of bfloat16, which NumPy's own `from_dlpack` does not take."""
    memory = np.asarray(values, BF16).view(np.uint16)
    exporter = Exporter(memory, memory.shape, "bfloat", 16)
    with pytest.raises((TypeError, BufferError, RuntimeError)):
        np.from_dlpack(exporter)
    exporter.deleted = 0
    exporter.dtype = "bfloat16"
    return exporter


@ways_in(PARAMETERS)
def test_bfloat16_parameters(name, take):
    assert bits(take(bfloat16(V))) == bits(take(V))


@ways_in(TENSORS)
def test_bfloat16_tensors(name, take):
    exporter = bfloat16(X)
    result = take(exporter)
    assert bits(result) == bits(take(X.astype(BF16)))
    assert result.dtype in (BF16, np.float64)  # of moments
    assert bits(take(exporter)) == bits(result)  # it was left as it was


def test_bfloat16_is_not_copied_and_given_back_once():
    memory = X.astype(BF16)
    exporter = Exporter(memory.view(np.uint16), (3, 4), "bfloat", 16, strides=(1, 3))
    _, cache = bn.train_forward(exporter)
    assert cache.x.dtype == BF16
    assert np.shares_memory(cache.x, memory)
    assert bits(cache.x) == bits(memory.T)
    assert exporter.deleted == 0
    del cache
    assert exporter.deleted == 1


@ways_in(PARAMETERS)
def test_bfloat16_parameters_of_torch(torch, name, take):
    assert bits(take(torch.from_numpy(V).bfloat16())) == bits(take(V))


@ways_in(TENSORS)
def test_bfloat16_tensors_of_torch(torch, name, take):
    result = take(torch.from_numpy(X).bfloat16())
    assert bits(result) == bits(take(X.astype(BF16)))


@ways_in(PARAMETERS | TENSORS)
def test_tensors_of_torch_that_require_grad(torch, name, take):
    with pytest.raises(TypeError) as error:
        take(torch.from_numpy(X if name in ("x", "dy", "residual") else V).requires_grad_())
    assert str(error.value) == f"{name} is torch.Tensor that requires grad; wanted {name}.detach()"


class RequiresGrad(Exporter):
    requires_grad = True

    def detach(self):
        return Exporter(self.memory, tuple(self.shape), "float", 32)


@ways_in(PARAMETERS | TENSORS)
def test_tensors_that_require_grad(name, take):
    values = X if name in ("x", "dy", "residual") else V
    exporter = RequiresGrad(values, values.shape, "float", 32)
    with pytest.raises(TypeError) as error:
        take(exporter)
    assert str(error.value).endswith(f"RequiresGrad that requires grad; wanted {name}.detach()")
    detached = exporter.detach()
    assert bits(take(detached)) == bits(take(values))


def test_state_dicts_of_torch(torch):
    module = torch.nn.BatchNorm1d(3).bfloat16()
    module(torch.from_numpy(X).bfloat16())
    frozen = bn.FrozenBatchNorm.from_torch(module.state_dict())
    assert frozen.dtype == np.float32
    assert frozen.mean.tolist() == module.running_mean.tolist()
    with pytest.raises(TypeError) as error:
        bn.FrozenBatchNorm.from_torch(module)
    assert str(error.value) == (
        "state_dict: was torch.nn.modules.batchnorm.BatchNorm1d, wanted a mapping of names to arrays, as "
        "module.state_dict() returns it"
    )


@pytest.mark.parametrize("state", [None, [("running_mean", V)], "bn.pt"])
def test_states_that_are_no_mappings(state):
    layer = bn.BatchNorm(3)
    for take in (bn.FrozenBatchNorm.from_torch, layer.load_state_dict, layer.population.load_state_dict):
        with pytest.raises(
            TypeError, match=r"^state(_dict)?: was \w+, wanted a mapping of names to arrays, as"
        ):
            take(state)
    assert not layer.population.ready
