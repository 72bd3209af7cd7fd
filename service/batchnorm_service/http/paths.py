"""What a request is, by its method and path: for admission, the routes and the OpenAPI document."""

from __future__ import annotations

import re
from enum import Enum
from typing import Final, NamedTuple

# A model, at the version that the path names, or at its highest one.
MODEL_PATHS: Final = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")

_INFER: Final = re.compile("/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer").fullmatch
_INDEX: Final = re.compile("/v2/repository/(?:[^/]+/)?index").fullmatch
# What an orchestrator asks before it has any key.
_HEALTH: Final = frozenset({"/v2/health/live", "/v2/health/ready"})


class Kind(Enum):
    """A kind of request; its value is the scope that a key needs for it, None where no key is needed."""

    HEALTH = None
    INFER = "infer"
    METADATA = "metadata"
    CONTROL = "control"


class Asked(NamedTuple):
    """What a request asks for.

    Attributes:
        kind: Its kind.
        model: Of an inference request, `name` and `version` of the model; the version may be None.
    """

    kind: Kind
    model: dict[str, str | None]


_OTHERS: Final = {kind: Asked(kind, {}) for kind in Kind}


def classify(method: str, path: str) -> Asked:
    """Return what a request asks for, whether or not there is such a model or path."""
    if method == "POST" and (found := _INFER(path)):
        return Asked(Kind.INFER, found.groupdict())
    if path in _HEALTH:
        return _OTHERS[Kind.HEALTH]
    if path.startswith("/v2/repository/") and not _INDEX(path):
        return _OTHERS[Kind.CONTROL]
    return _OTHERS[Kind.METADATA]
