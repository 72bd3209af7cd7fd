"""Keys of clients, stored as a file of SHA-256 digests, from which the keys cannot be recovered.

A line is `SCOPE[,SCOPE...]:DIGEST[:COMMENT]`; empty lines and lines that begin with # are ignored.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from batchnorm_service.errors import ForbiddenError, UnauthorizedError

logger = logging.getLogger(__name__)

SCOPES: Final = ("infer", "metadata", "control")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Key:
    """One line of the file."""

    scopes: frozenset[str]
    digest: bytes


def new_key(scopes: str) -> tuple[str, str]:
    """Return a random key of 256 bits and its line for the file.

    Raises:
        ValueError: A scope is unknown.
    """
    _scopes(scopes)
    key = f"bn_{secrets.token_urlsafe(32)}"
    return key, f"{scopes}:{hashlib.sha256(key.encode()).hexdigest()}"


def parse(text: str) -> tuple[Key, ...]:
    """Return the keys of a file.

    Raises:
        ValueError: A line is not a key; the message names the first such line.
    """
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            scopes, _, rest = line.strip().partition(":")
            digest = rest.partition(":")[0].lower()
            try:
                if not _DIGEST.fullmatch(digest):
                    raise ValueError("SCOPE:DIGEST is wanted, the digest as 64 hexadecimal digits")
                keys.append(Key(_scopes(scopes), bytes.fromhex(digest)))
            except ValueError as reason:
                raise ValueError(f"line {number}: {reason}") from None
    return tuple(keys)


class Keyring:
    """The keys in a file, read again when the file changes.

    Args:
        path: The file.

    Raises:
        ValueError: A line of the file is not a key.
        OSError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mark = self._marked()
        self._keys = parse(path.read_text(encoding="utf-8"))
        # Keys that were accepted before: computing a digest takes a tenth of the time of a small inference.
        self._known: dict[bytes, Key] = {}

    def refresh(self) -> None:
        """Read the file again if it has changed; if it cannot be read, the keys stay as they were."""
        try:
            mark = self._marked()
            if mark == self._mark:
                return
            self._mark = mark
            self._keys = parse(self._path.read_text(encoding="utf-8"))
            self._known = {}
        except FileNotFoundError:
            return  # between an old file and a new one
        except (OSError, ValueError) as reason:
            logger.error("the keys are kept as they were: %s", reason)
        else:
            logger.info("read %d keys", len(self._keys))

    def check(self, given: bytes | None, scope: str) -> None:
        """Raise an error unless a request has a key of this scope.

        Raises:
            UnauthorizedError: No key is given, or an unknown one.
            ForbiddenError: The key is not of this scope.
        """
        if given is None:
            raise UnauthorizedError("a key is wanted, as Authorization: Bearer KEY or X-API-Key: KEY")
        found = self._known.get(given) or self._find(given)
        if scope not in found.scopes:
            raise ForbiddenError(f"the key is not of scope {scope}")

    def _find(self, given: bytes) -> Key:
        digest = hashlib.sha256(given).digest()
        found = None
        for key in self._keys:  # compares all of them, so that the time does not depend on which one matches
            if hmac.compare_digest(digest, key.digest):
                found = key
        if found is None:
            raise UnauthorizedError("the key is not known")
        self._known[given] = found
        return found

    def _marked(self) -> tuple[int, int, int]:
        status = self._path.stat()
        return status.st_mtime_ns, status.st_ino, status.st_size


def _scopes(text: str) -> frozenset[str]:
    scopes = frozenset(text.split(","))
    if not scopes <= set(SCOPES):
        raise ValueError(f"scopes are {', '.join(SCOPES)}, got {', '.join(sorted(scopes - set(SCOPES)))!r}")
    return scopes
