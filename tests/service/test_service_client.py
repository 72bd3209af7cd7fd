"""The unmodified client of Triton gets exactly the bits of the frozen layer, in both wire forms."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
from serving import CHANNELS
from tritonclient.utils import InferenceServerException

from batchnorm_service.protocol import metadata

DTYPES = {
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "FP16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
ACCEPTED = {
    "planar": ("FP32", "FP16", "BF16"),
    "last": ("FP32", "FP16", "BF16"),
    "wide": ("FP64", "FP32", "FP16", "BF16"),
    "wide-last": ("FP64", "FP32", "FP16", "BF16"),
}
SHAPES = {
    "planar": [(rows, CHANNELS, *inner) for rows in (0, 1, 3) for inner in ((), (7,), (4, 3), (0,))],
    "last": [(*outer, CHANNELS) for outer in ((0,), (1,), (3,), (2, 4, 3), (2, 0))],
}
SHAPES |= {"wide": SHAPES["planar"], "wide-last": SHAPES["last"]}


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(server.address) as client:
        yield client


def tensor(shape, datatype, seed=0):
    values = np.random.default_rng(seed).normal(size=shape) * 3
    return values.astype(DTYPES[datatype])


def infer(client, model, x, datatype, *, binary_in=True, binary_out=True, **options):
    given = triton.InferInput("x", list(x.shape), datatype).set_data_from_numpy(x, binary_data=binary_in)
    outputs = None if binary_out is None else [triton.InferRequestedOutput("y", binary_data=binary_out)]
    return client.infer(model, [given], outputs=outputs, **options)


def assert_same_bits(y, expected):
    """A NaN's payload is not promised."""
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(y), nan)
    assert y[~nan].tobytes() == expected[~nan].tobytes()


@pytest.mark.parametrize(
    ("model", "datatype"), [(m, datatype) for m, all_ in ACCEPTED.items() for datatype in all_]
)
def test_binary(client, layers, model, datatype):
    for seed, shape in enumerate(SHAPES[model]):
        x = tensor(shape, datatype, seed)
        result = infer(client, model, x, datatype)
        assert_same_bits(result.as_numpy("y"), layers[model](x))
        assert result.get_response()["outputs"][0]["parameters"] == {"binary_data_size": x.nbytes}


@pytest.mark.parametrize(
    ("model", "datatype"),
    [("planar", "FP32"), ("last", "FP32"), ("wide", "FP32"), ("wide", "FP64"), ("wide-last", "FP64")],
)
@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_json_and_binary_in_all_combinations(client, layers, model, datatype, binary_in, binary_out):
    for seed, shape in enumerate(SHAPES[model]):
        x = tensor(shape, datatype, seed)
        result = infer(client, model, x, datatype, binary_in=binary_in, binary_out=binary_out)
        assert_same_bits(result.as_numpy("y"), layers[model](x))
        assert ("data" in result.get_response()["outputs"][0]) == (binary_out is False)


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_special_values_as_json(client, layers, datatype):
    info = np.finfo(DTYPES[datatype])
    specials = [
        np.nan,
        np.inf,
        -np.inf,
        -0.0,
        0.0,
        info.max,
        info.min,
        info.tiny,
        info.smallest_subnormal,
        0.1,
    ]
    x = np.repeat(np.array(specials, DTYPES[datatype]), CHANNELS).reshape(-1, CHANNELS)
    with np.errstate(over="ignore"):
        expected = layers["wide"](x)
    assert {np.inf, -np.inf} <= set(expected.ravel())
    assert np.isnan(expected).any()
    result = infer(client, "wide", x, datatype, binary_in=False, binary_out=False)
    assert_same_bits(result.as_numpy("y"), expected)


@pytest.mark.parametrize("datatype", ["FP32", "FP16", "BF16"])
def test_every_misalignment(server, client, layers, datatype):
    """The id's length moves the tensor through every position relative to a multiple of 8."""
    x = tensor((4, CHANNELS, 3), datatype)
    seen = set()
    for k in range(8):
        name, size = "i" * (k + 1), {"binary_data_size": x.nbytes}
        given = {"name": "x", "shape": x.shape, "datatype": datatype, "parameters": size}
        head = {"id": name, "inputs": [given], "parameters": {"binary_data_output": True}}
        seen.add(len(json.dumps(head)) % 8)
        answer = server.infer("planar", head, x.tobytes())
        assert answer.status == 200
        length = int(answer.headers["Inference-Header-Content-Length"])
        assert length % 8 == 0
        assert answer.body[length:] == layers["planar"](x).tobytes()
        assert infer(client, "planar", x, datatype, request_id=name).get_response()["id"] == name
    assert seen == set(range(8))


@pytest.mark.parametrize("shape", [(300, CHANNELS, 97), (1, CHANNELS, 400_000), (1_500_000, CHANNELS)])
def test_large_tensors(client, layers, shape):
    x = tensor(shape, "FP32")
    assert_same_bits(infer(client, "planar", x, "FP32").as_numpy("y"), layers["planar"](x))


def test_batches_may_be_split_anywhere(client, layers):
    x = tensor((64, CHANNELS, 5), "FP32")
    whole = infer(client, "planar", x, "FP32").as_numpy("y")
    for cuts in ([1], [7, 8, 31], list(range(1, 64))):
        parts = [infer(client, "planar", part, "FP32").as_numpy("y") for part in np.split(x, cuts)]
        assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_versions(server, client, layers):
    x = tensor((3, CHANNELS), "FP32")
    for version, layer in (("", "planar"), ("10", "planar"), ("2", "planar/2")):
        result = infer(client, "planar", x, "FP32", model_version=version)
        assert_same_bits(result.as_numpy("y"), layers[layer](x))
        assert result.get_response()["model_version"] == (version or "10")
    with pytest.raises(InferenceServerException, match="no model 'planar' version '3'") as refusal:
        infer(client, "planar", x, "FP32", model_version="3")
    assert refusal.value.status() == "404"


def test_control_calls(client, layers):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("planar")
    assert client.is_model_ready("planar", "2")
    assert not client.is_model_ready("planar", "11")
    assert not client.is_model_ready("nobody")
    server = client.get_server_metadata()
    assert (server["name"], server["extensions"]) == ("batchnorm-service", metadata.EXTENSIONS)
    described = client.get_model_metadata("wide-last")
    tensor = {"datatype": "FP64", "shape": [-1, CHANNELS]}
    assert described == {
        "name": "wide-last",
        "versions": ["1"],
        "platform": "batchnorm_safetensors",
        "inputs": [{"name": "x", **tensor}],
        "outputs": [{"name": "y", **tensor}],
        "parameters": {
            "fingerprint": layers["wide-last"].fingerprint,
            "datatypes": "FP64,FP32,FP16,BF16",
            "channel_axis": -1,
            "eps": layers["wide-last"].eps,
        },
    }
    assert client.get_model_metadata("planar")["versions"] == ["2", "10"]
    parameters = client.get_model_metadata("planar", "2")["parameters"]
    assert parameters["fingerprint"] == layers["planar/2"].fingerprint
    with pytest.raises(InferenceServerException, match="'broken' could not be loaded") as refusal:
        client.get_model_metadata("broken")
    assert refusal.value.status() == "503"


def test_asynchronous_calls(client, layers):
    x = tensor((3, CHANNELS), "FP32")
    given = triton.InferInput("x", list(x.shape), "FP32").set_data_from_numpy(x)
    pending = [client.async_infer("planar", [given]) for _ in range(3)]
    for one in pending:
        assert_same_bits(one.get_result().as_numpy("y"), layers["planar"](x))


def test_clients_at_the_same_time(server, layers):
    def run(seed):
        with triton.InferenceServerClient(server.address) as client:
            for k in range(10):
                x = tensor((1 + 3000 * (k % 2), CHANNELS, 11), "FP32", 100 * seed + k)
                assert_same_bits(infer(client, "planar", x, "FP32").as_numpy("y"), layers["planar"](x))
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))
