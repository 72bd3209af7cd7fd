"""Settings of a process: keyword, else environment variable `BATCHNORM_SERVICE_<NAME>`, else default."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import ByteSize, DirectoryPath, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_PREFIX: Final = "BATCHNORM_SERVICE_"


class Settings(BaseSettings):
    """What a process is started with; immutable.

    Raises:
        pydantic.ValidationError: a value is missing or out of range; it is a ValueError.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    models: DirectoryPath = Field(default=..., description="Directory of models")
    host: str = Field(default="127.0.0.1", description="Address to bind")
    port: int = Field(default=8080, ge=0, le=65535, description="Port to bind; 0 takes a free one")
    workers: int = Field(default=1, ge=1, description="Number of processes")
    max_body: ByteSize = Field(
        default=ByteSize(64 * 2**20), ge=1, description="Largest body, in bytes or as 64MiB"
    )
    nan: Literal["tokens", "null"] = Field(
        default="tokens",
        description="NaN and infinities in JSON answers: the tokens NaN, Infinity and -Infinity, or null",
    )
