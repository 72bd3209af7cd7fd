"""gzip and deflate, of requests and answers, in every combination with the wire forms of tensors."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import zlib

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from serving import CHANNELS, serve
from test_service_client import DTYPES, assert_same_bits, infer, tensor

from batchnorm_service.errors import BodyTooLargeError, InvalidInputError
from batchnorm_service.http.body import MAX_MEMBERS, decompress

CODINGS = (None, "gzip", "deflate")
FORMS = [
    (datatype, binary_in, binary_out)
    for datatype in DTYPES
    for binary_in in (True, False)
    for binary_out in (True, False, None)
    # 16-bit numbers travel as bytes alone.
    if datatype in ("FP32", "FP64") or (binary_in and binary_out is not False)
]
X = np.arange(2 * CHANNELS, dtype=np.float32).reshape(2, CHANNELS)
MESSAGE = {"inputs": [{"name": "x", "shape": [2, CHANNELS], "datatype": "FP32", "data": X.ravel().tolist()}]}
TEXT = json.dumps(MESSAGE).encode()


def encode(coding, data):
    return gzip.compress(data) if coding == "gzip" else zlib.compress(data)


@pytest.mark.parametrize(("datatype", "binary_in", "binary_out"), FORMS)
def test_every_form_in_every_coding(server, layers, datatype, binary_in, binary_out):
    with triton.InferenceServerClient(server.address) as client:
        for seed, (asked, answered) in enumerate(itertools.product(CODINGS, CODINGS)):
            x = tensor((3, CHANNELS, 4), datatype, seed)
            codings = {"request_compression_algorithm": asked, "response_compression_algorithm": answered}
            result = infer(client, "wide", x, datatype, binary_in=binary_in, binary_out=binary_out, **codings)
            assert_same_bits(result.as_numpy("y"), layers["wide"](x))


@pytest.mark.parametrize(("datatype", "binary_in", "binary_out"), FORMS)
def test_every_form_with_the_aio_client(server, layers, datatype, binary_in, binary_out):
    """The client sends br beside gzip and deflate in Accept-Encoding, but by default decodes none of them."""

    async def run():
        async with triton_aio.InferenceServerClient(server.address) as client:
            assert (await client.get_model_metadata("wide"))["name"] == "wide"
            for seed, (asked, answered) in enumerate(itertools.product(CODINGS, CODINGS)):
                x = tensor((3, CHANNELS, 4), datatype, seed)
                given = triton_aio.InferInput("x", list(x.shape), datatype)
                given.set_data_from_numpy(x, binary_data=binary_in)
                outputs = None
                if binary_out is not None:
                    outputs = [triton_aio.InferRequestedOutput("y", binary_data=binary_out)]
                result = await client.infer(
                    "wide",
                    [given],
                    outputs=outputs,
                    request_compression_algorithm=asked,
                    response_compression_algorithm=answered,
                )
                assert_same_bits(result.as_numpy("y"), layers["wide"](x))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip", "gzip"),
        ("Deflate", "deflate"),
        ("x-gzip", "gzip"),
        ("identity", None),
        ("", None),
        ("gzip, deflate, br", None),
        ("br", None),
        ("gzip;q=0", None),
        ("*", None),
    ],
)
def test_an_answer_is_compressed_where_one_coding_is_asked_for(server, accepted, coding):
    answer = server.infer("planar", TEXT, headers={"Accept-Encoding": accepted})
    assert answer.status == 200
    assert answer.headers["Content-Encoding"] == coding
    plain = server.infer("planar", TEXT).body
    read = {None: bytes, "gzip": gzip.decompress, "deflate": zlib.decompress}[coding]
    assert read(answer.body) == plain
    # Nothing but inference: the aio client could not read it.
    assert "Content-Encoding" not in server.request("GET", "/v2", headers={"Accept-Encoding": "gzip"}).headers


def test_the_length_of_the_json_is_the_plain_one(server, layers):
    head = {"inputs": [{"name": "x", "shape": [2, CHANNELS], "datatype": "FP32"}]}
    head["inputs"][0]["parameters"] = {"binary_data_size": X.nbytes}
    head["parameters"] = {"binary_data_output": True}
    text = json.dumps(head).encode()
    headers = {
        "Inference-Header-Content-Length": str(len(text)),
        "Content-Encoding": "gzip",
        "Accept-Encoding": "deflate",
    }
    answer = server.infer("planar", gzip.compress(text + X.tobytes()), headers=headers)
    plain = zlib.decompress(answer.body)
    assert plain[int(answer.headers["Inference-Header-Content-Length"]) :] == layers["planar"](X).tobytes()


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda body: body[:-1], "cut short"),
        (lambda body: body[:5], "cut short"),
        (lambda body: b"", "cut short"),
        (lambda body: body + b"\0", "follow the end"),
        (lambda body: TEXT, "is not"),
        (lambda body: body[:-6] + bytes(6), "is not"),
    ],
)
def test_a_damaged_body(server, coding, damage, reason):
    answer = server.infer("planar", damage(encode(coding, TEXT)), headers={"Content-Encoding": coding})
    assert (answer.status, list(answer.json())) == (400, ["error"])
    assert reason in answer.json()["error"]


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZIP"])
@pytest.mark.parametrize("cuts", [(), (1,), (0, 0, 50), (10, 11, 12, 40), range(0, 200, 3)])
def test_gzip_of_several_members(server, cuts, coding):
    """RFC 1952: the contents of all members make one body; parallel and blocked compressors write several."""
    edges = [0, *cuts, len(TEXT)]
    body = b"".join(gzip.compress(TEXT[a:b]) for a, b in itertools.pairwise(edges))
    answer = server.infer("planar", body, headers={"Content-Encoding": coding})
    assert (answer.status, answer.body) == (200, server.infer("planar", TEXT).body)
    for damaged in (body[:-1], body + b"\x1f\x8b", body + gzip.compress(b"{")[:9]):
        answer = server.infer("planar", damaged, headers={"Content-Encoding": coding})
        assert (answer.status, "cut short" in answer.json()["error"]) == (400, True)


def test_members_without_end():
    """The limit of size holds for all members together, and a limit on their number bounds the time."""
    member = gzip.compress(bytes(2**10))
    assert len(decompress(b"gzip", member * 64, 2**16)) == 2**16
    with pytest.raises(BodyTooLargeError, match="limit of 65535 bytes"):
        decompress(b"gzip", member * 64, 2**16 - 1)
    empty = gzip.compress(b"")
    assert decompress(b"gzip", empty * MAX_MEMBERS, 1) == b""
    with pytest.raises(BodyTooLargeError, match="more than 65536 members"):
        decompress(b"gzip", empty * (MAX_MEMBERS + 1), 1)
    with pytest.raises(InvalidInputError, match=f"{len(empty)} bytes follow"):
        decompress(b"deflate", zlib.compress(b"") + empty, 1)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_bomb(server, coding):
    """64 MiB and one byte, compressed to 64 KB; compressed twice, only the outer layer is undone."""
    bomb = encode(coding, bytes(64 * 2**20 + 1))
    assert len(bomb) < 100_000
    answer = server.infer("planar", bomb, headers={"Content-Encoding": coding})
    assert (answer.status, "67108864" in answer.json()["error"]) == (413, True)
    answer = server.infer("planar", encode(coding, bomb), headers={"Content-Encoding": coding})
    assert answer.status == 400
    answer = server.infer("planar", bomb, headers={"Content-Encoding": f"{coding}, {coding}"})
    assert (answer.status, answer.headers["Accept-Encoding"]) == (501, "gzip, deflate")


def test_null_in_place_of_tokens(tmp_path, models, layers):
    x = np.array([[np.nan, np.inf, -np.inf, 1, 2]], np.float32)
    text = json.dumps({"inputs": [{"name": "x", "shape": [1, 5], "datatype": "FP32", "data": x[0].tolist()}]})
    with serve(tmp_path / "log", str(models), "--nan", "null") as server:
        answer = server.infer("planar", text.encode())
    (output,) = json.loads(answer.body, parse_constant=pytest.fail)["outputs"]
    y = layers["planar"](x)[0]
    assert output["data"][:3] == [None, None, None]
    assert np.array(output["data"][3:], np.float32).tobytes() == y[3:].tobytes()
