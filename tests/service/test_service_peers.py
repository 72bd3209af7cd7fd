"""Clients of other servers: kserve's in its own environment, and the bodies that MLServer's codecs make."""

from __future__ import annotations

import json
import subprocess
import venv
from pathlib import Path

import numpy as np
import pytest
from serving import CHANNELS

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).with_name("kserve-requirements.txt")
X = np.arange(2 * CHANNELS, dtype=np.float32).reshape(2, CHANNELS)


@pytest.fixture(scope="session")
def kserve():
    """The interpreter of an environment with kserve, made once for the requirements; 450 MB."""
    home = ROOT / ".venv-kserve"
    done = home / "requirements.txt"
    python = home / "bin" / "python"
    if not done.exists() or done.read_bytes() != REQUIREMENTS.read_bytes():
        venv.create(home, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        result = subprocess.run([*pip, "-r", REQUIREMENTS], capture_output=True, text=True, timeout=600)
        if result.returncode:
            pytest.skip(f"kserve cannot be installed: {result.stderr.strip().splitlines()[-1]}")
        done.write_bytes(REQUIREMENTS.read_bytes())
    return python


@pytest.mark.long
def test_kserve(server, layers, kserve):
    script = Path(__file__).with_name("kserve_client.py")
    command = [kserve, script, f"http://{server.address}", "wide", str(CHANNELS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == 7
    assert {answer["datatype"] for answer in answers} == {"FP16", "FP32", "FP64"}
    for answer in answers:
        dtype = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64}[answer["datatype"]]
        x = np.frombuffer(bytes.fromhex(answer["x"]), dtype).reshape(answer["shape"])
        assert bytes.fromhex(answer["y"]) == layers["wide"](x).tobytes(), answer


# NumpyCodec.encode_input and InferenceRequest.model_dump_json of MLServer 1.7.1.
PLAIN = (
    '{"inputs":[{"name":"x","shape":[2,5],"datatype":"FP32","parameters":{"content_type":"np"},'
    '"data":[0.0,1.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0,9.0]}]}'
)
WITH_NULLS = (
    '{"id":null,"parameters":{"content_type":"np","headers":null},"inputs":[{"name":"x","shape":[2,5],'
    '"datatype":"FP32","parameters":{"content_type":"np","headers":null},'
    '"data":[0.0,1.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0,9.0]}],"outputs":null}'
)


@pytest.mark.parametrize("body", [PLAIN, WITH_NULLS])
def test_mlserver(server, layers, body):
    answer = server.infer("planar", body.encode(), headers={"Content-Type": "application/json"})
    (output,) = answer.json()["outputs"]
    assert output["datatype"] == "FP32"
    y = np.array(output["data"], np.float32).reshape(output["shape"])
    assert y.tobytes() == layers["planar"](X).tobytes()


def test_what_mlserver_makes_of_nan(server, layers):
    """NaN and infinities are null: all come back as NaN."""
    body = PLAIN.replace("[0.0,1.0,2.0", "[null,null,2.0")
    (output,) = server.infer("planar", body.encode()).json()["outputs"]
    x = X.copy()
    x[0, :2] = np.nan
    y = np.reshape(output["data"], (2, CHANNELS)).astype(np.float32)
    assert np.array_equal(y, layers["planar"](x), equal_nan=True)


def test_what_mlserver_makes_of_one_axis(server):
    """MLServer sends shape (N,) as (N, 1), which does not fit several channels: that is an error."""
    body = PLAIN.replace("[2,5]", "[10,1]")
    answer = server.infer("planar", body.encode())
    assert answer.status == 400
    assert "channels" in answer.json()["error"]
