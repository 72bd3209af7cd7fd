"""`_core.Host` over PyTorch's tensors: the bits of batchnorm's functions, written to PyTorch's memory."""

from __future__ import annotations

import sys
import threading

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.nn import functional

import batchnorm as bn
from batchnorm._core import Host

HOST = Host(torch.Tensor)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAST, LAST_3D = torch.channels_last, torch.channels_last_3d
CASES = {
    "NC": ((40, 33), None),
    "NCHW": ((6, 17, 7, 5), None),
    "NCHW channels-last": ((6, 17, 7, 5), LAST),
    "NCDHW": ((3, 5, 4, 3, 2), None),
    "NCDHW channels-last": ((3, 5, 4, 3, 2), LAST_3D),
    "one row": ((1, 3, 1, 9), LAST),
    "on several threads": ((8, 16, 64, 64), None),
}
FOLLOWS = [(None, False), (None, True), ("relu", False), ("relu", True), ("relu6", True)]
EPS, THREADS = 1e-5, 2

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_case = pytest.mark.parametrize(("shape", "memory"), CASES.values(), ids=CASES)
each_epilogue = pytest.mark.parametrize(("activation", "with_residual"), FOLLOWS)


def array(tensor):
    """A tensor's memory as an array: NumPy has bfloat16 from ml_dtypes, which PyTorch does not know."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_bits(got, wanted):
    """Equal to the last bit; one NaN is as good as another, and a zero's sign counts."""
    got, wanted = (array(a) if isinstance(a, torch.Tensor) else a for a in (got, wanted))
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    got, wanted = (np.where(np.isnan(a), np.array(np.nan, a.dtype), a) for a in (got, wanted))
    assert got.tobytes() == wanted.tobytes()


class Setting:
    """Seeded tensors of one shape and memory order, and places for results, full of 7."""

    def __init__(self, shape, memory=None, dtype=torch.float32, with_residual=False, wide=False):
        channels, self.shape = shape[1], shape
        parameters = torch.float64 if wide or dtype == torch.float64 else torch.float32

        def tensor(scale=1.0, mean=0.0):
            values = (torch.randn(shape, dtype=torch.float64) * scale + mean).to(dtype)
            return values if memory is None else values.contiguous(memory_format=memory)

        def vector():
            return torch.randn(channels, dtype=torch.float64).to(parameters)

        self.x, self.dy, self.residual = tensor(2, 3), tensor(), tensor() if with_residual else None
        self.weight, self.bias, self.mean, self.var = vector(), vector(), vector(), vector().abs() + 0.5
        self.y, self.dx, self.dresidual = (torch.full_like(self.x, 7) for _ in range(3))
        self.dweight, self.dbias = (torch.full((channels,), 7, dtype=parameters) for _ in range(2))
        self.moments, self.sums = (torch.full((3, channels), 7, dtype=torch.float64) for _ in range(2))

    def train(self, activation=None, running=(None, None), update_weight=0.1, host=HOST, **other):
        given = {name: other.get(name, getattr(self, name)) for name in ("x", "weight", "bias", "residual")}
        host.train(
            *given.values(),
            *running,
            other.get("y", self.y),
            other.get("moments", self.moments),
            threads=THREADS,
            update_weight=update_weight,
            eps=other.get("eps", EPS),
            activation=activation,
        )

    def forward(self):
        return self.x, self.weight, self.bias, self.residual


@each_dtype
@each_case
@each_epilogue
def test_training_has_the_bits_of_the_functions(shape, memory, dtype, activation, with_residual):
    s = Setting(shape, memory, dtype, with_residual)
    follows = {"activation": activation, "residual": s.residual}
    s.train(activation)
    y, cache = bn.train_forward(s.x, s.weight, s.bias, eps=EPS, **follows)
    assert_bits(s.y, y)
    moments = cache.moments
    assert_bits(s.moments, np.stack([moments.count, moments.mean, moments.m2]))

    dresidual = s.dresidual if with_residual else None
    options = {"threads": THREADS, "eps": EPS, "activation": activation}
    HOST.backward(s.dy, *s.forward(), s.moments, s.dx, dresidual, s.dweight, s.dbias, **options)
    wanted = bn.backward(s.dy, cache, dresidual=None if dresidual is None else np.empty_like(y))
    assert_bits(s.dx, wanted.dx)
    assert_bits(s.dweight, wanted.dgamma.astype(array(s.dweight).dtype))
    assert_bits(s.dbias, wanted.dbeta.astype(array(s.dbias).dtype))
    if with_residual:
        assert_bits(s.dresidual, wanted.dresidual)

    # The halves have the bits of the whole.
    halves = Setting(shape, memory, dtype)
    HOST.moments(s.x, halves.moments, threads=THREADS)
    HOST.normalize(*s.forward(), s.moments, halves.y, **options)
    HOST.gradient_sums(s.dy, *s.forward(), s.moments, halves.sums, **options)
    place = halves.dresidual if with_residual else None
    HOST.gradient_apply(s.dy, *s.forward(), s.moments, halves.sums, halves.dx, place, **options)
    assert_bits(halves.moments, s.moments)
    assert_bits(halves.y, s.y)
    assert_bits(halves.dx, s.dx)
    assert_bits(halves.dresidual, s.dresidual)
    sums = bn.gradient_sums(s.dy, cache)
    assert_bits(halves.sums, np.stack([sums.count, sums.dgamma, sums.dbeta]))


@each_dtype
@each_case
@each_epilogue
def test_frozen_statistics_have_the_bits_of_the_functions(shape, memory, dtype, activation, with_residual):
    s = Setting(shape, memory, dtype, with_residual)
    options = {"threads": THREADS, "eps": EPS, "activation": activation}
    HOST.infer(*s.forward(), s.mean, s.var, s.y, **options)
    follows = {"activation": activation, "residual": s.residual, "eps": EPS}
    assert_bits(s.y, bn.infer(s.x, s.mean, s.var, s.weight, s.bias, **follows))
    dresidual = s.dresidual if with_residual else None
    HOST.infer_backward(s.dy, *s.forward(), s.mean, s.var, s.dx, dresidual, s.dweight, s.dbias, **options)
    buffer = np.empty_like(array(s.x)) if with_residual else None
    wanted = bn.infer_backward(s.dy, s.x, s.mean, s.var, s.weight, beta=s.bias, dresidual=buffer, **follows)
    assert_bits(s.dx, wanted.dx)
    assert_bits(s.dweight, wanted.dgamma.astype(array(s.dweight).dtype))
    assert_bits(s.dbias, wanted.dbeta.astype(array(s.dbias).dtype))
    if with_residual:
        assert_bits(s.dresidual, buffer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("update_weight", [0.1, 1.0, 0.25])
def test_running_statistics_are_those_of_pytorch(dtype, update_weight):
    s = Setting((16, 5, 9, 9), dtype=dtype)
    ours, judge = (s.mean.clone(), s.var.clone()), (s.mean.clone().double(), s.var.clone().double())
    s.train(running=ours, update_weight=update_weight)
    functional.batch_norm(s.x.double(), *judge, training=True, momentum=update_weight)
    count, mean, m2 = s.moments
    for got, before, wanted, new in zip(ours, (s.mean, s.var), judge, (mean, m2 / (count - 1)), strict=True):
        assert got.dtype == dtype
        # To the bit the formula in float64 on our moments; PyTorch's own moments have an error of a few ulps.
        assert_bits(got, ((1 - update_weight) * before.double() + update_weight * new).to(dtype))
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), wanted, rtol=max(eps / 2, 1e-14), atol=1e-14)


def test_each_vector_has_a_dtype_of_its_own():
    s = Setting((16, 5, 3), dtype=torch.float32)
    running = s.mean.double(), s.var.clone()
    s.train(running=running, weight=s.weight.double(), bias=None)
    y, _ = bn.train_forward(s.x, s.weight, eps=EPS)
    assert_bits(s.y, y)
    again = s.mean.clone(), s.var.double()
    s.train(running=again, weight=None, bias=None)
    assert_bits(running[0].float(), again[0])
    assert_bits(running[1], again[1].float())
    assert_bits(s.y, bn.train_forward(s.x, eps=EPS)[0])


def test_nan_enters_the_running_statistics_of_its_channel():
    s = Setting((16, 3, 5))
    s.x[0, 1, 0] = torch.nan
    running = torch.zeros(3), torch.ones(3)
    s.train(running=running)
    assert [t.isnan().tolist() for t in running] == [[False, True, False]] * 2


def test_tensors_that_require_grad_and_parameters_are_taken():
    s = Setting((8, 3, 4), dtype=torch.bfloat16)
    wanted = s.y.clone()
    s.train(y=wanted)
    s.train(x=s.x.requires_grad_(), weight=torch.nn.Parameter(s.weight), bias=torch.nn.Parameter(s.bias))
    assert_bits(s.y, wanted)


def test_an_empty_batch_is_nothing_to_do():
    s = Setting((0, 3, 4))
    HOST.infer(*s.forward(), s.mean, s.var, s.y, threads=THREADS, eps=EPS, activation=None)
    HOST.moments(s.x, s.moments, threads=THREADS)
    assert not s.moments.any()


class Subclass(torch.Tensor):
    pass


class Liar:
    """Something that `isinstance` takes for a tensor."""

    __class__ = torch.Tensor


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(8, 3, 4)


NOT_TAKEN = {
    "number": lambda x: 1,
    "array": lambda x: x.numpy(),
    "liar": lambda x: Liar(),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([*torch.atleast_2d(x)], layout=torch.jagged),
    "integers": lambda x: x.long(),
    "complex": lambda x: x.to(torch.complex64),
    "bool": lambda x: x.bool(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("change", NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_what_is_no_dense_tensor_of_floats_is_a_type_error(change):
    s = Setting((8, 3, 4))
    before = s.y.clone()
    for name in ("x", "residual", "y"):
        with pytest.raises(TypeError, match=rf"^{name} (is|has) .*; wanted "):
            s.train(**{name: change(s.x)})
    for name in ("weight", "moments"):
        with pytest.raises(TypeError, match=rf"^{name} (is|has) .*; wanted "):
            s.train(**{name: change(getattr(s, name))})
    assert_bits(s.y, before)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_subclass_is_a_tensor_and_a_fake_tensor_has_no_memory():
    s = Setting((8, 3, 4))
    wanted = s.y.clone()
    s.train(y=wanted)
    s.train(x=s.x.as_subclass(Subclass))
    assert_bits(s.y, wanted)
    with pytest.raises(TypeError, match=r"^x "):
        s.train(x=fake())


def test_shapes_and_memory_orders_that_are_refused():
    s = Setting((8, 3, 4, 5))
    last = s.x.contiguous(memory_format=LAST)
    for given, message in (
        ({"x": s.x[:, :, ::2]}, r"^x has shape .* strides .*; wanted a tensor that is dense"),
        ({"x": s.x[:1, :1].expand(8, 3, 4, 5)}, r"^x has shape .* strides .*; wanted a tensor that is dense"),
        ({"x": s.x[0, 0, 0]}, r"^x has rank 1; wanted"),
        ({"x": s.x[:, :0]}, r"^x has 0 channels"),
        (
            {"y": last.clone()},
            r"^y has strides \[60, 1, 15, 3\]; wanted the memory order of x, .*\[60, 20, 5, 1\]",
        ),
        ({"residual": last}, r"^residual has strides"),
        ({"y": torch.empty(8, 3, 20)}, r"^y has shape \[8, 3, 20\]; wanted that of x, \[8, 3, 4, 5\]"),
        ({"weight": torch.ones(4)}, r"^weight has shape \[4\]; wanted \[3\]"),
        ({"weight": torch.ones(1, 3)}, r"^weight has shape \[1, 3\]; wanted \[3\]"),
        ({"bias": torch.ones(6)[::2]}, r"^bias has strides \[2\]; wanted a contiguous tensor"),
        ({"moments": torch.ones(3, 3, dtype=torch.float64).T}, r"^moments has strides"),
        ({"moments": torch.ones(9, dtype=torch.float64)}, r"^moments has shape \[9\]; wanted \[3, 3\]"),
        ({"running": (torch.ones(2), None)}, r"^running_mean has shape"),
        ({"activation": "gelu"}, r'^activation is "gelu"; wanted'),
    ):
        with pytest.raises(ValueError, match=message):
            s.train(**given)
    for given, message in (
        ({"y": s.y.double()}, r"^y has dtype float64; wanted that of x, float32"),
        ({"weight": s.weight.half()}, r"^weight has dtype float16; wanted float32 or float64"),
        ({"moments": s.moments.float()}, r"^moments has dtype float32; wanted float64"),
    ):
        with pytest.raises(TypeError, match=message):
            s.train(**given)
    assert (s.y == 7).all()
    assert (s.moments == 7).all()


def test_memory_that_is_shared_is_refused_by_name():
    s = Setting((8, 3, 4), dtype=torch.float64, with_residual=True)
    running = s.mean, s.var
    wide = torch.zeros(2 * s.x.numel(), dtype=torch.float64)
    x, y = wide[: s.x.numel()].view(s.x.shape), wide[s.x.numel() - 1 : -1].view(s.x.shape)
    options = {"threads": THREADS, "eps": EPS, "activation": "relu"}
    arguments = s.dy, *s.forward(), s.moments
    for message, call in {
        "y shares memory with x": lambda: s.train(y=s.x),
        "y shares memory with x;": lambda: s.train(x=x, y=y),
        "y shares memory with residual": lambda: s.train(y=s.residual),
        "running_mean shares memory with weight": lambda: s.train(running=(s.weight, None)),
        "running_var shares memory with running_mean": lambda: s.train(running=(s.mean, s.mean)),
        "moments shares memory with running_var": lambda: s.train(
            running=(None, s.moments[1]), moments=s.moments
        ),
        "dx shares memory with dy": lambda: HOST.backward(*arguments, s.dy, None, None, None, **options),
        "dresidual shares memory with dx": lambda: HOST.backward(
            *arguments, s.dx, s.dx, None, None, **options
        ),
        "dbias shares memory with dweight": lambda: HOST.backward(
            *arguments, s.dx, None, s.dbias, s.dbias, **options
        ),
        "sums shares memory with moments": lambda: HOST.gradient_sums(*arguments, s.moments, **options),
    }.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
    assert (s.y == 7).all()
    s.train(running=running, y=y, residual=None, x=s.x)


def test_errors_of_the_core_name_their_kind_and_change_nothing():
    s = Setting((8, 3, 4))
    bad = torch.tensor([1, torch.nan, 1])
    running = torch.zeros(3), torch.ones(3)
    for kind, call in {
        "NotFinite": lambda: s.train(weight=bad, running=running),
        "Eps": lambda: s.train(eps=-1.0, running=running),
        "EpsZeroInTraining": lambda: s.train(eps=0.0, running=running),
        "TooFewValues": lambda: Setting((1, 3)).train(running=running),
        "Negative": lambda: HOST.infer(
            *s.forward(), s.mean, -s.var, s.y, threads=1, eps=EPS, activation=None
        ),
        "Range": lambda: Setting((8, 3), dtype=torch.float16, wide=True).train(
            bias=torch.full((3,), 1e300, dtype=torch.float64), running=running
        ),
        "Counts": lambda: HOST.backward(
            s.dy,
            *s.forward(),
            torch.ones(3, 3, dtype=torch.float64) * 2,
            *(s.dx, None, None, None),
            threads=1,
            eps=EPS,
            activation=None,
        ),
    }.items():
        with pytest.raises(ValueError, match=r".+; wanted .+") as caught:
            call()
        assert caught.value.kind == kind
    assert running[0].tolist() == [0, 0, 0]
    assert running[1].tolist() == [1, 1, 1]
    assert (s.dx == 7).all()


def test_the_type_must_have_the_exchange_api():
    for wrong in (int, np.ndarray):
        with pytest.raises(
            TypeError, match=r"^tensor_type is .*; wanted the tensor type of a library with DLPack"
        ):
            Host(wrong)
    other = type("Other", (), {"__dlpack_c_exchange_api__": torch.zeros(1).__dlpack__()})
    with pytest.raises(TypeError, match=r"^tensor_type is .*Other with another capsule; wanted"):
        Host(other)


@pytest.mark.skipif(sys.platform != "linux", reason="teams are borrowed on Linux only")
def test_the_team_is_that_of_pytorch():
    assert HOST.thread_source == "openmp"
    with pytest.raises(ValueError, match=r"^library is ") as caught:
        Host(torch.Tensor, "no-such-library.so")
    assert caught.value.kind == "Library"


def test_bits_do_not_depend_on_the_number_of_threads():
    s = Setting((8, 16, 64, 64))
    results = []
    for threads in (1, 2, 3):
        y, moments = torch.empty_like(s.x), torch.empty_like(s.moments)
        options = {"threads": threads, "update_weight": 0.1, "eps": EPS, "activation": "relu"}
        HOST.train(*s.forward(), None, None, y, moments, **options)
        results.append((array(y).tobytes(), array(moments).tobytes()))
    assert results[0] == results[1] == results[2]


def test_calls_from_several_python_threads():
    s = Setting((8, 16, 64, 64))
    s.train("relu")
    results = [torch.empty_like(s.x) for _ in range(6)]

    def call(y):
        for _ in range(5):
            s.train("relu", y=y, moments=torch.empty_like(s.moments))

    threads = [threading.Thread(target=call, args=(y,)) for y in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    for y in results:
        assert_bits(y, s.y)
