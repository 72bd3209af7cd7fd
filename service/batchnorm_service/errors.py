"""Errors of the service, without HTTP: `http.error_answers.STATUS` maps each class to its status.

The text of an error is sent to the client: it names what was wrong and what was wanted, never a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class ServiceError(Exception):
    """Base of every refusal; only its subclasses are raised.

    Attributes:
        headers: What a client is told beside the text, as headers of the answer.
    """

    headers: ClassVar[Mapping[str, str]] = {}


class InvalidInputError(ServiceError):
    """The message, or the tensor in it, is not what the protocol or the model takes."""


class ModelNotFoundError(ServiceError):
    """No model of that name, or no such version of it."""


class NotReadyError(ServiceError):
    """The model is known and could not be loaded, or no model is loaded at all."""


class BodyTooLargeError(ServiceError):
    """The request body exceeds the limit of the settings."""


class FingerprintMismatchError(ServiceError):
    """The request demands other parameters than those that would compute its answer."""


class UnsupportedError(ServiceError):
    """A part of the protocol that this service, or this installation of it, does not have."""


class UnsupportedEncodingError(UnsupportedError):
    """The body is compressed in a way that this service does not read."""

    headers: ClassVar[Mapping[str, str]] = {"Accept-Encoding": "gzip, deflate"}


class LoadError(ServiceError):
    """A model was to be loaded and cannot be; what was served before still is."""


class UnauthorizedError(ServiceError):
    """No key was given, or none that is known."""

    headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": "Bearer"}


class ForbiddenError(ServiceError):
    """The key does not go so far, or nobody may: the control API is off."""


class OverloadedError(ServiceError):
    """As many requests or bytes are under way as the settings allow."""

    headers: ClassVar[Mapping[str, str]] = {"Retry-After": "1"}


class LaggingError(ServiceError):
    """A change of the models stands, and not every worker has taken it in time."""
