"""Models of all JSON answers except those of infer; the OpenAPI document uses their schemas."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field

Count: TypeAlias = Annotated[int, Field(ge=0)]
Size: TypeAlias = Annotated[int, Field(ge=-1)]


class Error(BaseModel):
    """The answer of every request that fails."""

    error: str


class Live(BaseModel):
    """Whether the process runs."""

    live: bool


class Ready(BaseModel):
    """Whether a model is served; `live` is the specification's name for it."""

    ready: bool
    live: bool


class Server(BaseModel):
    """Metadata of the service."""

    name: str
    version: str
    extensions: list[str]


class Models(BaseModel):
    """Names of the loaded models."""

    models: list[str]


class ModelReady(BaseModel):
    """Whether a model is loaded."""

    name: str
    ready: bool


class Tensor(BaseModel):
    """An input or an output in the metadata; -1 stands for any size."""

    name: str
    datatype: str
    shape: list[Size]


class ModelParameters(BaseModel):
    """Parameters of a model that a fixed datatype and shape do not express."""

    fingerprint: str
    datatypes: str
    channel_axis: int


class BatchNormParameters(ModelParameters):
    """Parameters of a frozen batch norm."""

    eps: float


class WhiteningParameters(ModelParameters):
    """Parameters of a frozen whitening layer."""

    groups: int


class Model(BaseModel):
    """Metadata of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    parameters: BatchNormParameters | WhiteningParameters


class ConfiguredTensor(BaseModel):
    """An input or an output in the configuration; -1 stands for any size."""

    name: str
    data_type: str
    dims: list[Size]


class Configuration(BaseModel):
    """Configuration of a model in Triton's form."""

    name: str
    platform: str
    backend: str
    version_policy: dict[str, Any]
    max_batch_size: Count
    input: list[ConfiguredTensor]
    output: list[ConfiguredTensor]


class Duration(BaseModel):
    """How often something was done, and the nanoseconds that it took in total."""

    count: Count
    ns: Count


class Durations(BaseModel):
    """Durations of inference by outcome and stage."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class BatchDurations(BaseModel):
    """Durations of the stages for batches of one size."""

    batch_size: Count
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStatistics(BaseModel):
    """Statistics of one version of a model."""

    name: str
    version: str
    last_inference: Count
    inference_count: Count
    execution_count: Count
    inference_stats: Durations
    response_stats: dict[str, Any]
    batch_stats: list[BatchDurations]
    memory_usage: list[Any]


class Statistics(BaseModel):
    """Statistics of models."""

    model_stats: list[ModelStatistics]


class IndexEntry(BaseModel):
    """One version of a model in the index; the version is empty for a folder that has no valid version."""

    name: str
    version: str = ""
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class IndexRequest(BaseModel):
    """Request of the index: all models, or only those that are served."""

    ready: bool = False


class ControlRequest(BaseModel):
    """Request of a load or an unload; no parameter is supported."""

    parameters: dict[str, Any] = {}
