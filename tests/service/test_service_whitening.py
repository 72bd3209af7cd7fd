"""A frozen whitening layer is a model like any other: its metadata, its bits, and its ONNX model."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
import tritonclient.http as triton
from serving import serve

import batchnorm as bn

CHANNELS, GROUPS, ROWS = 6, 2, 48
CUTS = ([], [1], [7, 8, 31], list(range(1, ROWS)))
DTYPES = {"FP32": np.float32, "FP64": np.float64, "FP16": np.float16, "BF16": ml_dtypes.bfloat16}


def make_layer(seed, **options):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(CHANNELS, CHANNELS // GROUPS))
    mean, bias = rng.normal(size=(2, CHANNELS))
    return bn.FrozenWhitening(matrix, mean, bias, **options)


@pytest.fixture(scope="module")
def layers():
    return {
        "planar": make_layer(1),
        "last": make_layer(2, channel_axis=-1),
        "wide": make_layer(3, dtype="float64"),
        "onnx": make_layer(4),
        "norm": bn.FrozenBatchNorm(np.zeros(CHANNELS), np.ones(CHANNELS)),
    }


@pytest.fixture(scope="module")
def root(layers, tmp_path_factory):
    """A batch norm is served beside them."""
    root = tmp_path_factory.mktemp("whitening")
    for name in ("planar", "last", "wide", "norm"):
        (root / name / "1").mkdir(parents=True)
        layers[name].save(root / name / "1" / "bn.safetensors")
    onnx.save(layers["onnx"].to_onnx(), root / "onnx.onnx")
    return root


@pytest.fixture(scope="module", params=[1, 2])
def server(root, tmp_path_factory, request):
    workers = ("--workers", str(request.param), "--control")
    with serve(tmp_path_factory.mktemp("log") / "log", str(root), *workers) as running:
        yield running
    assert "Traceback" not in running.log


def tensor(shape, datatype):
    return (np.random.default_rng(len(shape)).normal(size=shape) * 10).astype(DTYPES[datatype])


def ask(server, model, x, datatype, binary):
    """The bytes of the output, sent and answered as bytes or as JSON."""
    given = {"name": "x", "shape": x.shape, "datatype": datatype}
    given |= (
        {"parameters": {"binary_data_size": x.nbytes}} if binary else {"data": [float(v) for v in x.ravel()]}
    )
    message = {"inputs": [given], "parameters": {"binary_data_output": binary}}
    answer = server.infer(model, message, x.tobytes() if binary else b"")
    assert answer.status == 200, answer.body
    if binary:
        return answer.body[int(answer.headers["Inference-Header-Content-Length"]) :]
    return np.array(answer.json()["outputs"][0]["data"], x.dtype).tobytes()


@pytest.mark.parametrize(
    ("model", "datatype"),
    [
        ("planar", "FP32"), ("planar", "FP16"), ("planar", "BF16"), ("last", "FP32"),
        ("wide", "FP32"), ("wide", "FP64"), ("wide", "FP16"), ("onnx", "FP32"),
    ],
)  # fmt: skip
def test_the_same_bytes_in_any_batches(server, layers, model, datatype):
    x = tensor((ROWS, 3, CHANNELS) if model == "last" else (ROWS, CHANNELS, 3), datatype)
    expected = layers[model](x).tobytes()
    forms = (True, False) if datatype in ("FP32", "FP64") else (True,)
    for cuts in CUTS:
        for binary in forms:
            answers = [ask(server, model, part, datatype, binary) for part in np.split(x, cuts)]
            assert b"".join(answers) == expected


def test_a_large_tensor(server, layers):
    """One that is whitened in a thread, in the memory that it arrived in."""
    x = tensor((40, CHANNELS, 61, 63), "FP32")
    assert x.nbytes > 2**20
    assert ask(server, "planar", x, "FP32", binary=True) == layers["planar"](x).tobytes()


def test_metadata(server, layers):
    with triton.InferenceServerClient(server.address) as client:
        described = client.get_model_metadata("wide")
        tensor = {"datatype": "FP64", "shape": [-1, CHANNELS]}
        assert described == {
            "name": "wide",
            "versions": ["1"],
            "platform": "batchnorm_safetensors",
            "inputs": [{"name": "x", **tensor}],
            "outputs": [{"name": "y", **tensor}],
            "parameters": {
                "fingerprint": layers["wide"].fingerprint,
                "datatypes": "FP64,FP32,FP16,BF16",
                "channel_axis": 1,
                "groups": GROUPS,
            },
        }
        norm = client.get_model_metadata("norm")["parameters"]
        assert sorted(norm) == ["channel_axis", "datatypes", "eps", "fingerprint"]
        assert client.get_model_config("planar")["backend"] == "batchnorm"


def test_the_fingerprint_is_in_every_answer_and_may_be_required(server, layers):
    given = {"name": "x", "shape": [1, CHANNELS], "datatype": "FP32", "data": [0.0] * CHANNELS}
    wanted = {"fingerprint": layers["planar"].fingerprint}
    answer = server.infer("planar", {"inputs": [given], "parameters": wanted})
    assert answer.status == 200
    assert answer.headers["Batchnorm-Fingerprint"] == layers["planar"].fingerprint
    assert server.infer("last", {"inputs": [given], "parameters": wanted}).status == 409


def test_what_the_layer_refuses_is_told(server):
    given = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [0.0, 1.0]}
    answer = server.infer("planar", {"inputs": [given]})
    assert (answer.status, "x" in answer.json()["error"]) == (400, True)


def test_a_model_changes_from_one_kind_to_the_other(tmp_path, layers):
    layers["norm"].save(tmp_path / "changing.safetensors")
    with serve(tmp_path / "log", str(tmp_path), "--control") as server:
        x = tensor((5, CHANNELS), "FP32")
        for layer in (layers["norm"], layers["planar"], layers["norm"]):
            layer.save(tmp_path / "changing.safetensors")
            assert server.request("POST", "/v2/repository/models/changing/load", b"").status == 200
            assert ask(server, "changing", x, "FP32", binary=True) == layer(x).tobytes()


def test_a_damaged_file_is_not_served(tmp_path, layers):
    path = tmp_path / "bad.safetensors"
    layers["planar"].save(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    layers["norm"].save(tmp_path / "good.safetensors")
    with serve(tmp_path / "log", str(tmp_path)) as server:
        index = server.request("POST", "/v2/repository/index", b"").json()
        reasons = {entry["name"]: entry["reason"] for entry in index}
    assert reasons["good"] == ""
    assert reasons["bad"].startswith("bad.safetensors: damaged: fingerprint is")
