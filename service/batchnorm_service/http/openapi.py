"""The OpenAPI document: FastAPI's own, with examples added, and with infer, which is not a route of FastAPI.

Every operation has an example, the real answer for the model of `docs/service.md`; a test sends them.
"""

from __future__ import annotations

import json
import struct
from base64 import b64encode
from collections.abc import Iterable
from typing import Any, Final

from batchnorm_service import __version__
from batchnorm_service.http.answers import ControlRequest, Error, IndexRequest
from batchnorm_service.http.error_answers import STATUS
from batchnorm_service.http.paths import MODEL_PATHS, Kind, classify
from batchnorm_service.models.directory import NAME, VERSION
from batchnorm_service.protocol import metadata
from batchnorm_service.protocol.request import INPUT, OUTPUT
from batchnorm_service.protocol.tensors import DTYPES, JSON_DATATYPES

_DESCRIPTION: Final = """Frozen batch normalization and whitening layers by the Open Inference Protocol v2.
Every answer but 200 is `{"error": text}`; a defect is answered 500."""

_LENGTH: Final = "Inference-Header-Content-Length"
_TEXT: Final = {"type": "string"}


def _record(properties: dict[str, Any], *optional: str) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an optional member of a request; null means that it is absent."""
    return {"anyOf": [schema, {"type": "null"}]}


def _parameters(description: str, **known: dict[str, Any]) -> dict[str, Any]:
    members = {name: _or_null(schema) for name, schema in known.items()}
    return _or_null({"description": description, "type": "object", "properties": members})


_FLAG: Final = {"type": "boolean"}
_SHAPE: Final = _list({"type": "integer", "minimum": 0})
_COUNT: Final = {"type": "integer", "minimum": 0}
_NUMBERS: Final = {
    "description": "Row-major. In a request null is NaN. NaN, Infinity and -Infinity, which JSON does "
    "not have, are taken too, and given unless the service is told to give null.",
    "type": "array",
}

SCHEMAS: Final[dict[str, Any]] = {
    "InferenceRequest": _record(
        {
            "id": _or_null(_TEXT),
            "parameters": _parameters(
                "fingerprint: that the model must have, else 409. binary_data_output: whether outputs are "
                "bytes, where they do not say it themselves.",
                fingerprint=_TEXT,
                binary_data_output=_FLAG,
            ),
            "inputs": _list(
                _record(
                    {
                        "name": {"const": INPUT},
                        "shape": _SHAPE,
                        "datatype": {"enum": [*DTYPES]},
                        "parameters": _parameters(
                            "binary_data_size: bytes that follow the JSON, in place of data.",
                            binary_data_size=_COUNT,
                        ),
                        "data": _or_null(_NUMBERS),
                    },
                    "parameters",
                    "data",
                )
            )
            | {"minItems": 1, "maxItems": 1},
            "outputs": _or_null(
                _list(
                    _record(
                        {
                            "name": {"const": OUTPUT},
                            "parameters": _parameters(
                                "binary_data: whether the output is bytes.", binary_data=_FLAG
                            ),
                        },
                        "parameters",
                    )
                )
                | {"maxItems": 1}
            ),
        },
        "id",
        "parameters",
        "outputs",
    ),
    "InferenceResponse": _record(
        {
            "id": _TEXT,
            "model_name": _TEXT,
            "model_version": _TEXT,
            "outputs": _list(
                _record(
                    {
                        "name": _TEXT,
                        "datatype": {"enum": sorted(JSON_DATATYPES)},
                        "shape": _SHAPE,
                        "data": _NUMBERS,
                    }
                )
            ),
        },
        "id",
    ),
}


_FINGERPRINT: Final = "77b24e6f1a32eca5d0e9b74fe25529a786c99cca1fd6b916f4fc99975c35e32b"
_METADATA_TENSOR: Final = {"datatype": "FP32", "shape": [-1, 3]}
_CONFIGURED_TENSOR: Final = {"data_type": "TYPE_FP32", "dims": [-1, 3]}
_NEVER: Final = {"count": 0, "ns": 0}
_STATISTICS: Final = {
    "model_stats": [
        {
            "name": "scale",
            "version": "1",
            "last_inference": 0,
            "inference_count": 0,
            "execution_count": 0,
            "inference_stats": {
                "success": _NEVER,
                "fail": _NEVER,
                "queue": _NEVER,
                "compute_input": _NEVER,
                "compute_infer": _NEVER,
                "compute_output": _NEVER,
                "cache_hit": _NEVER,
                "cache_miss": _NEVER,
            },
            "response_stats": {},
            "batch_stats": [],
            "memory_usage": [],
        }
    ]
}
_OF_MODEL: Final[dict[str, Any]] = {
    "": {
        "name": "scale",
        "versions": ["1"],
        "platform": metadata.PLATFORM,
        "inputs": [{"name": INPUT} | _METADATA_TENSOR],
        "outputs": [{"name": OUTPUT} | _METADATA_TENSOR],
        "parameters": {
            "fingerprint": _FINGERPRINT,
            "datatypes": "FP32,FP16,BF16",
            "channel_axis": 1,
            "eps": 9.999999747378752e-06,
        },
    },
    "/ready": {"name": "scale", "ready": True},
    "/config": {
        "name": "scale",
        "platform": metadata.PLATFORM,
        "backend": "batchnorm",
        "version_policy": {"specific": {"versions": [1]}},
        "max_batch_size": 0,
        "input": [{"name": INPUT} | _CONFIGURED_TENSOR],
        "output": [{"name": OUTPUT} | _CONFIGURED_TENSOR],
    },
    "/stats": _STATISTICS,
}
# Answers of each path for the model of `docs/service.md`, before any inference.
EXAMPLES: Final[dict[str, Any]] = {
    "/v2/health/live": {"live": True},
    "/v2/health/ready": {"ready": True, "live": True},
    "/v2": metadata.server(),
    "/v2/models": {"models": ["scale"]},
    "/v2/models/stats": _STATISTICS,
    "/v2/repository/index": [{"name": "scale", "version": "1", "state": "READY", "reason": ""}],
} | {path + end: example for path in MODEL_PATHS for end, example in _OF_MODEL.items()}

_GIVEN: Final = {"name": INPUT, "shape": [1, 3], "datatype": "FP32"}
_ANSWER: Final = {"model_name": "scale", "model_version": "1"}
_RETURNED: Final = {"name": OUTPUT, "datatype": "FP32", "shape": [1, 3]}
_X: Final = struct.pack("<3f", 1.5, 1.0, 2.5)
_Y: Final = struct.pack("<3I", 0x3F7FFFAC, 0x3F7FFFEB, 0x3F7FFEB0)


def _bytes(head: dict[str, Any], tail: bytes, multiple: int = 1) -> dict[str, Any]:
    """Return an example that is not JSON, in base64 with its header, since OpenAPI has no form for bytes."""
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % multiple)
    headers = {_LENGTH: str(len(text))}
    return {"x-base64": b64encode(text + tail).decode(), "x-headers": headers}


REQUESTS: Final = {
    "json": {"value": {"inputs": [_GIVEN | {"data": [[1.5, 1.0, 2.5]]}]}},
    "binary": _bytes(
        {
            "inputs": [_GIVEN | {"parameters": {"binary_data_size": 12}}],
            "outputs": [{"name": OUTPUT, "parameters": {"binary_data": True}}],
        },
        _X,
    ),
}
ANSWERS: Final = {
    "json": {"value": _ANSWER | {"outputs": [_RETURNED | {"data": [0.999995, 0.99999875, 0.99998]}]}},
    "binary": _bytes(_ANSWER | {"outputs": [_RETURNED | {"parameters": {"binary_data_size": 12}}]}, _Y, 8),
}


def document(generated: dict[str, Any]) -> dict[str, Any]:
    """Return the document of the service.

    Args:
        generated: FastAPI's own document, of which the summaries and the schemas of answers are used.
    """
    paths = {}
    for path, operations in generated["paths"].items():
        for verb, found in operations.items():
            content = found["responses"]["200"].get("content", {})
            if path == "/metrics":
                content = {"text/plain": {"schema": _TEXT, "example": "batchnorm_workers 1.0\n"}}
            elif path not in EXAMPLES:  # loads and unloads answer with nothing
                content = {}
            elif verb == "get":
                content["application/json"]["example"] = EXAMPLES[path]
            else:
                content["application/json"]["examples"] = {"json": {"value": EXAMPLES[path]}}
            paths[path] = {verb: _operation(verb, path, found["summary"], content)}
            if verb == "post":
                form = ControlRequest if classify("POST", path).kind is Kind.CONTROL else IndexRequest
                asked = {"schema": form.model_json_schema(), "examples": {"json": {"value": {}}}}
                paths[path][verb]["requestBody"] = {"required": False, "content": {"application/json": asked}}
    for path in (one + "/infer" for one in MODEL_PATHS):
        paths[path] = {"post": _infer(path)}
    schemas = {**generated["components"]["schemas"], "Error": Error.model_json_schema(), **SCHEMAS}
    return {
        "openapi": "3.1.0",
        "info": {"title": "batchnorm-service", "version": __version__, "description": _DESCRIPTION},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _operation(verb: str, path: str, summary: str, content: dict[str, Any]) -> dict[str, Any]:
    errors = {"description": "Error", "content": {"application/json": {"schema": _ref("Error")}}}
    parameters = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "pattern": f"^{pattern.pattern}$"},
            "example": example,
        }
        for name, pattern, example in (("name", NAME, "scale"), ("version", VERSION, "1"))
        if f"{{{name}}}" in path
    ]
    scope = classify(verb.upper(), path).scope
    key = f"Where keys are asked for, one of scope `{scope}` is needed." if scope else "No key is needed."
    return {
        "summary": summary,
        "description": key,
        "parameters": parameters,
        "responses": {"200": {"description": "Done", "content": content}}
        | {str(status): errors for status in sorted({*STATUS.values()})},
    }


def _infer(path: str) -> dict[str, Any]:
    binary = {"type": "string", "format": "binary"}
    forms: Iterable[tuple[str, str, dict[str, Any], dict[str, Any]]] = (
        ("application/json", "json", _ref("InferenceRequest"), _ref("InferenceResponse")),
        ("application/octet-stream", "binary", binary, binary),
    )
    operation = _operation(
        "post",
        path,
        "Normalize a tensor",
        {kind: {"schema": answer, "examples": {name: ANSWERS[name]}} for kind, name, _, answer in forms},
    )
    # Headers that change what a body means, which its schema cannot say: so they are no parameters here.
    operation["description"] += (
        " Content-Type is ignored, and so are unknown members. Inference-Header-Content-Length is the number "
        "of bytes of JSON before those of the tensor; 0 for a raw request. Content-Encoding may be gzip or "
        "deflate. Accept-Encoding with one of the two and nothing else has the answer compressed."
    )
    operation["requestBody"] = {
        "required": True,
        "content": {
            kind: {"schema": asked, "examples": {name: REQUESTS[name]}} for kind, name, asked, _ in forms
        },
    }
    done = operation["responses"]["200"]
    done["headers"] = {
        "Batchnorm-Fingerprint": {
            "description": "SHA-256 of the parameters",
            "schema": _TEXT,
        },
        _LENGTH: {"description": "As in a request", "schema": {"type": "string"}},
    }
    return operation
