"""Statistics count every request exactly once; configurations have what Triton's tools need."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.http as triton
from serving import CHANNELS, make_layer, serve

from batchnorm_service.models.model import Model
from batchnorm_service.protocol.exchange import Rules, infer

KINDS = (
    "success",
    "fail",
    "queue",
    "compute_input",
    "compute_infer",
    "compute_output",
    "cache_hit",
    "cache_miss",
)


@pytest.fixture
def fresh(models, tmp_path):
    with serve(tmp_path / "log", str(models)) as server:
        yield server


def ask(server, model, rows, binary=True, version=""):
    x = np.ones((rows, CHANNELS), np.float32)
    with triton.InferenceServerClient(server.address) as client:
        given = triton.InferInput("x", [rows, CHANNELS], "FP32").set_data_from_numpy(x, binary_data=binary)
        client.infer(model, [given], model_version=version)


def test_counts(fresh):
    with triton.InferenceServerClient(fresh.address) as client:
        assert client.get_inference_statistics("planar", "2")["model_stats"][0]["inference_count"] == 0
        for rows in (1, 3, 3, 128, 129):
            ask(fresh, "planar", rows)
        ask(fresh, "planar", 2, binary=False)
        ask(fresh, "planar", 7, version="2")
        ask(fresh, "last", 5)
        assert fresh.infer("planar", b"{}").status == 400
        assert fresh.infer("nobody", b"{}").status == 404  # counts nowhere

        (default,) = client.get_inference_statistics("planar", "10")["model_stats"]
        assert (default["name"], default["version"]) == ("planar", "10")
        assert default["inference_count"] == 1 + 3 + 3 + 128 + 129 + 2
        assert default["execution_count"] == 6
        assert default["last_inference"] > 1_700_000_000_000
        times = default["inference_stats"]
        assert tuple(times) == KINDS
        assert {kind: times[kind]["count"] for kind in KINDS} == dict.fromkeys(KINDS, 6) | {
            "fail": 1, "cache_hit": 0, "cache_miss": 0
        }  # fmt: skip
        parts = ("queue", "compute_input", "compute_infer", "compute_output")
        assert times["success"]["ns"] == sum(times[kind]["ns"] for kind in parts)
        assert all(times[kind]["ns"] > 0 for kind in (*parts, "fail"))
        # Sizes of batches beyond 128 are in the sums alone.
        assert [(one["batch_size"], one["compute_infer"]["count"]) for one in default["batch_stats"]] == [
            (1, 1), (2, 1), (3, 2), (128, 1)
        ]  # fmt: skip

        both = client.get_inference_statistics("planar")["model_stats"]
        assert [(one["version"], one["inference_count"]) for one in both] == [("2", 7), ("10", 266)]
        every = client.get_inference_statistics()["model_stats"]
        counts = {(one["name"], one["version"]): one["execution_count"] for one in every}
        assert counts == {
            ("last", "1"): 1, ("planar", "2"): 1, ("planar", "10"): 6,
            ("third", "1"): 0, ("wide", "1"): 0, ("wide-last", "1"): 0,
        }  # fmt: skip


def test_no_count_is_lost_between_threads(fresh):
    """Large messages are answered in threads."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: ask(fresh, "planar", 20_000), range(40)))
    (stats,) = fresh.request("GET", "/v2/models/planar/versions/10/stats").json()["model_stats"]
    assert (stats["execution_count"], stats["inference_count"]) == (40, 40 * 20_000)


@pytest.mark.parametrize(("axis", "rows"), [(0, 1), (-2, 1), (1, CHANNELS), (-1, CHANNELS)])
def test_rows_are_those_of_the_first_axis_unless_it_is_the_channels(axis, rows):
    x = np.ones((CHANNELS, CHANNELS), np.float32)
    given = {"name": "x", "shape": x.shape, "datatype": "FP32", "data": x.tolist()}
    model = Model("a", "1", make_layer(1, channel_axis=axis))
    assert infer(model, json.dumps({"inputs": [given]}).encode(), None, Rules()).rows == rows


def test_configuration(server):
    with triton.InferenceServerClient(server.address) as client:
        tensor = {"data_type": "TYPE_FP32", "dims": [-1, CHANNELS]}
        assert client.get_model_config("planar", "2") == {
            "name": "planar",
            "platform": "batchnorm_safetensors",
            "backend": "batchnorm",
            "version_policy": {"specific": {"versions": [2]}},
            "max_batch_size": 0,
            "input": [{"name": "x", **tensor}],
            "output": [{"name": "y", **tensor}],
        }
        assert client.get_model_config("wide-last")["input"][0]["data_type"] == "TYPE_FP64"


def test_a_demanded_fingerprint(server, layers):
    x = np.ones((1, CHANNELS), np.float32)
    given = {"name": "x", "shape": [1, CHANNELS], "datatype": "FP32", "data": x[0].tolist()}
    right, other = layers["planar"].fingerprint, layers["planar/2"].fingerprint
    for demanded, version, status in (
        (right, "", 200),
        (right, "/versions/2", 409),
        (other, "/versions/2", 200),
    ):
        message = {"inputs": [given], "parameters": {"fingerprint": demanded}}
        path = f"/v2/models/planar{version}/infer"
        answer = server.request("POST", path, json.dumps(message).encode())
        assert answer.status == status
        assert (
            demanded in answer.headers.get("Batchnorm-Fingerprint", "")
            or demanded[:10] in answer.json()["error"]
        )
