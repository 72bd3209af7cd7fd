"""Settings: each by keyword, else by the environment variable `BATCHNORM_SERVICE_<NAME>`, else a default."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Final, Literal, Self

from pydantic import ByteSize, DirectoryPath, Field, FilePath, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from batchnorm_service.models.directory import NAME, RESERVED_NAMES, Directory

ENV_PREFIX: Final = "BATCHNORM_SERVICE_"
MIB: Final = 2**20


class Settings(BaseSettings):
    """Settings of a process; immutable.

    Raises:
        pydantic.ValidationError: A value is missing, wrong or in conflict with another; it is a ValueError.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    models: DirectoryPath | None = Field(default=None, description="Directory of models")
    model_dir: DirectoryPath | None = Field(
        default=None, description="Directory of one model, in place of DIR; needs --model-name"
    )
    model_name: str | None = Field(default=None, description="Name of the model in --model-dir")
    strict: bool = Field(default=False, description="Do not start if a model cannot be loaded")
    control: bool = Field(default=False, description="Let clients load and unload models")

    host: str = Field(default="127.0.0.1", description="Address to bind")
    port: int = Field(default=8080, ge=0, le=65535, description="Port to bind; 0 takes a free one")
    keys: FilePath | None = Field(default=None, description="File of keys; every request then needs a key")
    allow_anonymous: bool = Field(
        default=False, description="Allow addresses other than loopback without keys"
    )
    tls_cert: FilePath | None = Field(default=None, description="Certificate chain (PEM); turns TLS on")
    tls_key: FilePath | None = Field(default=None, description="Private key of --tls-cert (PEM)")
    tls_client_ca: FilePath | None = Field(
        default=None, description="CA (PEM) that must have signed the certificate of every client"
    )

    workers: int = Field(default=1, ge=1, description="Number of processes")
    drain_seconds: float = Field(
        default=5,
        ge=0,
        description="How long requests are still accepted after SIGTERM, while ready is false",
    )
    run_dir: DirectoryPath | None = Field(
        default=None, description="Directory in which the processes share state; by default a temporary one"
    )
    access_log: bool = Field(default=False, description="Log every request")

    nan: Literal["tokens", "null"] = Field(
        default="tokens",
        description="NaN and infinities in JSON answers: the tokens NaN, Infinity and -Infinity, or null",
    )
    max_body: ByteSize = Field(
        default=ByteSize(64 * MIB), ge=1, description="Largest body, compressed or not, in bytes or as 64MiB"
    )
    max_elements: int = Field(default=2**24, ge=1, description="Largest number of elements of a tensor")
    max_requests: int = Field(
        default=256, ge=1, description="Largest number of inference requests in flight, per process"
    )
    max_queued: ByteSize = Field(
        default=ByteSize(256 * MIB),
        ge=1,
        description="Largest number of bytes of the bodies in flight, per process",
    )
    max_connections: int = Field(default=1024, ge=1, description="Largest number of connections, per process")
    header_seconds: float = Field(
        default=10, gt=0, description="How long a client may take to send the headers"
    )
    body_seconds: float = Field(default=60, gt=0, description="How long a client may take to send the body")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.models is None) == (self.model_dir is None):
            raise ValueError("a directory of models must be given, either DIR or --model-dir")
        if (self.model_dir is None) != (self.model_name is None):
            raise ValueError("--model-dir and --model-name go together")
        if self.model_name is not None and (
            not NAME.fullmatch(self.model_name) or self.model_name in RESERVED_NAMES
        ):
            raise ValueError(
                f"--model-name must match {NAME.pattern} and be none of {', '.join(RESERVED_NAMES)}"
            )
        if not (_is_loopback(self.host) or self.keys or self.allow_anonymous):
            raise ValueError(
                f"--host {self.host} is not a loopback address: give --keys or --allow-anonymous"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("--tls-client-ca needs --tls-cert")
        if self.max_queued < self.max_body:
            raise ValueError("--max-queued must be at least --max-body")
        return self

    def directory(self) -> Directory:
        """Return the directory of models."""
        root = self.models or self.model_dir
        assert root is not None  # `_consistent` has checked it
        return Directory(root, self.model_name)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
