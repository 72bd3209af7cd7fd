"""Classification of requests by method and path, for admission, the routes and the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum, auto
from typing import Final, NamedTuple

# Paths of a model: at its highest version, and at the version that the path names.
MODEL_PATHS: Final = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")

_INFER: Final = re.compile("/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer").fullmatch
_INDEX: Final = re.compile("/v2/repository/(?:[^/]+/)?index").fullmatch
# Orchestrators ask for these without a key.
_HEALTH_PATHS: Final = frozenset({"/v2/health/live", "/v2/health/ready"})


class Kind(Enum):
    """A kind of request."""

    HEALTH = auto()
    INFER = auto()
    METADATA = auto()
    CONTROL = auto()


class Asked(NamedTuple):
    """The result of `classify`: what a request asks for.

    Attributes:
        kind: Kind of the request.
        scope: Scope of the key that the request needs; None if it needs none.
        model: For inference, `name` and `version` of the model; the version may be None.
    """

    kind: Kind
    scope: str | None
    model: Mapping[str, str | None]


_HEALTH: Final = Asked(Kind.HEALTH, None, {})
_METADATA: Final = Asked(Kind.METADATA, "metadata", {})
_CONTROL: Final = Asked(Kind.CONTROL, "control", {})


def classify(method: str, path: str) -> Asked:
    """Return what a request asks for, without a check that the model or path exists."""
    if method == "POST" and (found := _INFER(path)):
        return Asked(Kind.INFER, "infer", found.groupdict())
    if path in _HEALTH_PATHS:
        return _HEALTH
    if path.startswith("/v2/repository/") and not _INDEX(path):
        return _CONTROL
    return _METADATA
